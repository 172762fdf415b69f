"""The light runtime: bundles in, pictures out. Needs NumPy and ONNX Runtime, never torch."""

from ddit.runtime.bundle import Bundle
from ddit.runtime.errors import DditError
from ddit.runtime.pipeline import Pipeline, Result
from ddit.runtime.request import Request

__all__ = ["Bundle", "DditError", "Pipeline", "Request", "Result"]
