"""The light runtime: bundles in, pictures out. Needs NumPy and ONNX Runtime, never torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddit.runtime.bundle import Bundle
    from ddit.runtime.errors import DditError
    from ddit.runtime.pipeline import Pipeline, Result
    from ddit.runtime.request import Request

__all__ = ["Bundle", "DditError", "Pipeline", "Request", "Result"]

_MODULES = {
    "Bundle": "bundle",
    "DditError": "errors",
    "Pipeline": "pipeline",
    "Request": "request",
    "Result": "pipeline",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: commands start with `ddit.runtime.start` alone."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
