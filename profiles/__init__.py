"""Shape profiles: for which sizes a bundle's graphs and engines are made.

A profile is a named list of entries; an entry gives minimum, optimum and maximum of every free dimension. The built-in
ones are the ``*.toml`` files beside this module; a path to such a file works everywhere a name does.

    >>> load_profile("256").contains(height=256, width=256, text=32, batch=1)
    True
"""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib  # type: ignore[no-redef,import-not-found,unused-ignore]


BOUNDS = ("minimum", "optimum", "maximum")
LARGEST = 65_536  # pixels, tokens or pictures: a size that was damaged is refused before memory is asked for
LONGEST_FILE = 1_000_000  # bytes


def _one_line(text: str) -> str:
    """Refuse control characters: a text from a file reaches terminals and reports."""
    if not text.isprintable():
        raise ValueError("the text has a line break or another character that cannot be shown")
    return text


Text = Annotated[str, Field(max_length=2000), AfterValidator(_one_line)]


class ProfileError(ValueError):
    """A profile does not exist or is not valid."""


class Range(BaseModel):
    """Minimum, optimum and maximum of one dimension. Written as a list of three in TOML and JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    minimum: int = Field(ge=1)
    optimum: int
    maximum: int = Field(le=LARGEST)

    @model_validator(mode="before")
    @classmethod
    def _from_list(cls, value: object) -> object:
        if isinstance(value, list | tuple):
            if len(value) != 3:
                raise ValueError("give three numbers: minimum, optimum, maximum")
            return dict(zip(("minimum", "optimum", "maximum"), value, strict=True))
        return value

    @model_validator(mode="after")
    def _ordered(self) -> "Range":
        if not self.minimum <= self.optimum <= self.maximum:
            raise ValueError(f"not ordered: {self.minimum}, {self.optimum}, {self.maximum}")
        return self

    def __contains__(self, value: int) -> bool:
        return self.minimum <= value <= self.maximum

    def __str__(self) -> str:
        return str(self.minimum) if self.minimum == self.maximum else f"{self.minimum} to {self.maximum}"


class Entry(BaseModel):
    """One range of shapes; with TensorRT, one optimisation profile."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    frames: Range | None = Field(default=None, description="of a clip; null for pictures")
    height: Range = Field(description="pixels")
    width: Range = Field(description="pixels")
    text: Range = Field(description="text tokens")
    batch: Range = Field(description="pictures in one call")

    def contains(self, **sizes: int) -> bool:
        """Whether every named size (``frames``, ``height``, ``width``, ``text``, ``batch``) lies inside."""
        ranges = self._ranges()
        return all(name in ranges and value in ranges[name] for name, value in sizes.items())

    def at(self, bound: str) -> dict[str, int]:
        """Every size by name at one of `BOUNDS`."""
        return {name: getattr(extent, bound) for name, extent in self._ranges().items()}

    def _ranges(self) -> dict[str, Range]:
        ranges = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: extent for name, extent in ranges.items() if extent is not None}

    def __str__(self) -> str:
        return ", ".join(f"{name} {extent}" for name, extent in self._ranges().items())


class Profile(BaseModel):
    """A named list of entries, tried in order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Text
    description: Text = ""
    entry: tuple[Entry, ...] = Field(min_length=1)

    def contains(self, **sizes: int) -> bool:
        """Whether one entry holds all the sizes."""
        return any(entry.contains(**sizes) for entry in self.entry)

    def __str__(self) -> str:
        return "; or ".join(map(str, self.entry))


def built_in() -> dict[str, Path]:
    """The profiles that come with the package, by name."""
    return {path.stem: path for path in sorted(Path(__file__).parent.glob("*.toml"))}


def load_profile(name: str | Path) -> Profile:
    """Read a built-in profile by name, or a TOML file by path. Raises `ProfileError`."""
    path = built_in().get(str(name), Path(name))
    try:
        content = tomllib.loads(_read(path))
        return Profile(name=path.stem, **content)
    except OSError:
        raise ProfileError(
            f"unknown profile {str(name)!r}; built in: {', '.join(built_in())}; or a .toml file"
        ) from None
    except ValidationError as error:
        raise ProfileError(f"profile {path} is not valid: {why_invalid(error)}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise ProfileError(f"profile {path} is not valid TOML: {error}") from None


def _read(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(path)  # a device or a pipe has no end
    with path.open(encoding="utf-8") as file:
        text = file.read(LONGEST_FILE + 1)
    if len(text) > LONGEST_FILE:
        raise ValueError(f"it is longer than {LONGEST_FILE} characters")
    return text


def why_invalid(error: ValidationError) -> str:
    """The first thing that pydantic found: the field, then what is wrong with it."""
    first = error.errors(include_url=False, include_input=False)[0]
    return ": ".join([".".join(map(str, first["loc"]))] * bool(first["loc"]) + [first["msg"]])
