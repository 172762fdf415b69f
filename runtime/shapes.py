"""Shapes: the symbols of the graphs' free dimensions, and the one place where their values are worked out.

A tensor's dimension is a number, a symbol (``"B"``), a symbol over a number (``"H/4"``) or times one (``"H*8"``).

    >>> resolve(("B", 16, "H/4", "W/4"), {"B": 2, "H": 64, "W": 32})
    (2, 16, 16, 8)
    >>> infer([("B", 16, "H", "W")], [(2, 16, 64, 32)])
    {'B': 2, 'H': 64, 'W': 32}
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from ddit.profiles import Entry, Profile, Range
from ddit.runtime.errors import UsageError

if TYPE_CHECKING:
    from ddit.runtime.bundle.manifest import LatentInfo

# by the names that profiles and commands use; H, W and F count latent pixels and frames, L text tokens
SYMBOLS = {"batch": "B", "frames": "F", "height": "H", "width": "W", "text": "L"}
NAMES = {symbol: name for name, symbol in SYMBOLS.items()}

DIMENSION = re.compile(r"(\w+)(?:([*/])(\d+))?")

Shape = Sequence[int | str]


@dataclass(frozen=True)
class Size:
    """The size of a picture, or of a clip."""

    height: int  # pixels
    width: int
    frames: int | None = None  # of a clip

    def by_name(self) -> dict[str, int]:
        """Its numbers by the names that profiles use.

        >>> Size(480, 832, 81).by_name()
        {'frames': 81, 'height': 480, 'width': 832}
        """
        sides = {"height": self.height, "width": self.width}
        return sides if self.frames is None else {"frames": self.frames, **sides}

    def __str__(self) -> str:
        sides = f"{self.height}×{self.width}"
        return sides if self.frames is None else f"{self.frames} frames of {sides}"


def resolve(shape: Shape, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """A symbolic shape in numbers. Raises `ValueError` for an unknown symbol or a size that does not divide evenly."""
    return tuple(dim if isinstance(dim, int) else _value(dim, sizes) for dim in shape)


def infer(shapes: Iterable[Shape], numbers: Iterable[Sequence[int]]) -> dict[str, int]:
    """The symbols' values from tensors' shapes in numbers: the inverse of `resolve`."""
    sizes = {}
    for shape, values in zip(shapes, numbers, strict=True):
        for dim, value in zip(shape, values, strict=True):
            if isinstance(dim, str):
                symbol, operator, factor = split(dim)
                sizes[symbol] = value // factor if operator == "*" else value * factor
    return sizes


def split(dim: str) -> tuple[str, str, int]:
    """Symbol, operator (``"*"``, ``"/"`` or nothing) and number of a dimension: ``"H/4"`` → ``("H", "/", 4)``."""
    match = DIMENSION.fullmatch(dim)
    if match is None:
        raise ValueError(f"dimension {dim!r} cannot be read")
    return match[1], match[2] or "", int(match[3] or 1)


def divisors(shapes: Iterable[Shape]) -> dict[str, int]:
    """For every symbol the least common multiple of what it is divided by: its value is a multiple of that."""
    found: dict[str, int] = {}
    for shape in shapes:
        for dim in shape:
            if isinstance(dim, str):
                symbol, operator, number = split(dim)
                found[symbol] = math.lcm(found.get(symbol, 1), number if operator == "/" else 1)
    return found


def nearest(value: int, unit: int, *, least: int | None = None, most: int | None = None) -> int:
    """The multiple of ``unit`` nearest to a value, the lower of two; inside the bounds where there are some.

    >>> nearest(256, 96), nearest(256, 96, most=280), nearest(10, 96)
    (288, 192, 96)
    """
    low, high = -(-(least or 1) // unit), math.inf if most is None else most // unit
    below = value // unit
    chosen = below if value - below * unit <= (below + 1) * unit - value else below + 1
    return int(min(max(chosen, low), high)) * unit


def _value(dim: str, sizes: Mapping[str, int]) -> int:
    symbol, operator, factor = split(dim)
    if symbol not in sizes:
        raise ValueError(f"dimension {dim!r} is not known")
    value = sizes[symbol]
    if operator == "*":
        return value * factor
    if value % factor:
        raise ValueError(f"{symbol} = {value} is not a multiple of {factor}")
    return value // factor


def units(latent: "LatentInfo", patches: Iterable[int]) -> dict[str, int]:
    """What every side of a picture is a multiple of, in pixels, so that all levels' patches divide the latent."""
    return {axis.name: axis.downscale * math.lcm(*patches) for axis in latent.sides}


def to_symbols(latent: "LatentInfo", sizes: Mapping[str, int]) -> dict[str, int]:
    """The symbols' values for sizes by name: ``{"height": 256, "batch": 1}`` → ``{"H": 32, "B": 1}``."""
    axes = {axis.name: axis for axis in latent.axes}
    return {SYMBOLS[name]: axes[name].to_latent(size) if name in axes else size for name, size in sizes.items()}


def to_names(latent: "LatentInfo", symbols: Mapping[str, int]) -> dict[str, int]:
    """The inverse of `to_symbols`: sizes in pixels, tokens and pictures by the names that profiles use."""
    axes = {SYMBOLS[axis.name]: axis for axis in latent.axes}
    return {NAMES[one]: axes[one].from_latent(size) if one in axes else size for one, size in symbols.items()}


def to_size(latent: "LatentInfo", symbols: Mapping[str, int]) -> Size:
    """The size of the picture or clip that a latent is."""
    named = to_names(latent, symbols)
    return Size(**{axis.name: named[axis.name] for axis in latent.axes})


def grid(latent: "LatentInfo", patch: int, symbols: Mapping[str, int]) -> dict[str, int]:
    """A level's patches along each axis of a latent, by the axes' names in the latent's order."""
    sides = {axis.name for axis in latent.sides}
    return {axis.name: symbols[SYMBOLS[axis.name]] // (patch if axis.name in sides else 1) for axis in latent.axes}


def image_tokens(latent: "LatentInfo", patch: int, symbols: Mapping[str, int]) -> int:
    """How many tokens a latent is at a level."""
    return math.prod(grid(latent, patch, symbols).values())


def scaled(latent: "LatentInfo", patches: Sequence[int], symbols: Mapping[str, int], scale: Fraction) -> dict[str, int]:
    """The symbols' values at a share of the latent's height and width: the nearest that the levels' patches divide.

    Raises `UsageError` where that is no smaller than the latent itself along a side, unless the scale is 1.
    """
    unit, small = math.lcm(*patches), dict(symbols)
    for axis in latent.sides:
        symbol = SYMBOLS[axis.name]
        small[symbol] = nearest(round(symbols[symbol] * scale), unit) if scale < 1 else symbols[symbol]
        if scale < 1 and small[symbol] >= symbols[symbol]:
            whole, step = symbols[symbol] * axis.downscale, unit * axis.downscale
            raise UsageError(
                f"a {axis.name} of {whole} has no smaller size at the scale {scale}: the levels' patches ask for "
                f"multiples of {step} pixels; choose a larger picture or another schedule"
            )
    return small


def check(latent: "LatentInfo", patches: Sequence[int], sizes: Mapping[str, int]) -> None:
    """Raise `UsageError` with the nearest valid values where a size does not fit the latent or the levels."""
    for axis in latent.axes:
        if axis.name == "frames" and axis.from_latent(axis.to_latent(sizes["frames"])) != sizes["frames"]:
            below = axis.to_latent(sizes["frames"])
            near = sorted({axis.from_latent(max(below + more, 1)) for more in (0, 1)})
            raise UsageError(
                f"{sizes['frames']} frames cannot be made: the latent has one for the first frame and one for every "
                f"{axis.downscale} more; nearest: {' or '.join(map(str, near))}"
            )
    for name, unit in units(latent, patches).items():
        value = sizes[name]
        if value % unit or value < unit:
            below = max(value // unit, 1) * unit
            near = sorted({below, below + unit} if value >= unit else {unit})
            raise UsageError(
                f"{name} {value} is not a multiple of {unit}, which the levels' patches ask for in pixels; "
                f"nearest: {' or '.join(map(str, near))}"
            )


def fit(profile: Profile, latent: "LatentInfo", patches: Sequence[int]) -> Profile:
    """The profile with every range cut to sizes that the latent and its levels can have, its optimum to the nearest.

    Raises `UsageError` where a range holds none, and for a profile of pictures where clips are made.
    """
    entries = []
    for entry in profile.entry:
        fitted: dict[str, Range | None] = {"frames": _fit_frames(profile, entry, latent)}
        for name, unit in units(latent, patches).items():
            extent: Range = getattr(entry, name)
            least, most = -(-extent.minimum // unit) * unit, extent.maximum // unit * unit
            if least > most:
                raise UsageError(
                    f"profile {profile.name!r} has no {name} between {extent.minimum} and {extent.maximum} that is a "
                    f"multiple of {unit}, which levels {', '.join(map(str, patches))} ask for in pixels"
                )
            optimum = nearest(extent.optimum, unit, least=least, most=most)
            fitted[name] = Range(minimum=least, optimum=optimum, maximum=most)
        entries.append(entry.model_copy(update=fitted))
    return profile.model_copy(update={"entry": tuple(entries)})


def _fit_frames(profile: Profile, entry: Entry, latent: "LatentInfo") -> Range | None:
    """The range of frames, cut to numbers that the latent can hold; None where it has no frames."""
    axis = next((axis for axis in latent.axes if axis.name == "frames"), None)
    if axis is None:
        return None
    if entry.frames is None:
        raise UsageError(f"profile {profile.name!r} is for pictures: it has no frames; choose another --profile")
    least, optimum, most = (
        axis.from_latent(axis.to_latent(getattr(entry.frames, bound))) for bound in ("minimum", "optimum", "maximum")
    )
    least = least if least >= entry.frames.minimum else least + axis.downscale
    if least > most:
        raise UsageError(
            f"profile {profile.name!r} has no number of frames between {entry.frames} that is one more than a multiple "
            f"of {axis.downscale}"
        )
    return Range(minimum=least, optimum=min(max(optimum, least), most), maximum=most)
