"""JSON as the standard has it: no NaN, no infinity, no name twice."""

import json
import math
from collections.abc import Sequence
from typing import Any


def parse(text: str) -> Any:
    """Read JSON. Raises `ValueError`.

    >>> parse('{"a": NaN}')
    Traceback (most recent call last):
    ...
    ValueError: NaN is no number
    """
    try:
        return json.loads(text, parse_constant=_refuse, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def dump(values: Any, indent: int | None = None) -> str:
    """Write JSON, with null for a figure that is not finite.

    >>> dump({"error": float("inf")})
    '{"error": null}'
    """
    return json.dumps(_finite(values), indent=indent, allow_nan=False)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for name, value in pairs:
        if name in names:
            raise ValueError(f"{name!r} stands twice")
        names[name] = value
    return names


def _finite(values: Any) -> Any:
    if isinstance(values, float):
        return values if math.isfinite(values) else None
    if isinstance(values, dict):
        return {key: _finite(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_finite(value) for value in values]
    return values
