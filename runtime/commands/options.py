"""What several commands share."""

import re
from collections.abc import Set
from pathlib import Path

import click

from ddit.runtime.backends.registry import kinds
from ddit.runtime.errors import UsageError
from ddit.runtime.files import with_ending

BUNDLE = click.argument("bundle", type=click.Path(path_type=Path))
HEIGHT = click.option("--height", type=int, help="Pixels.  [default: the profile's optimum]")
WIDTH = click.option("--width", type=int, help="Pixels.  [default: the profile's optimum]")
FRAMES = click.option("--frames", type=int, help="Frames of the clip.  [default: the profile's optimum]")
LONGEST_LIST = 16_000_000  # characters of a file of prompts
JSON = click.option("--json", "as_json", is_flag=True, help="Report as JSON on stdout.")


class BackendOption(click.Option):
    """An option whose help lists the backends that are registered when somebody asks."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """The option and its help."""
        known = "; ".join(f"{kind.name}: {kind.description}" for kind in kinds())
        self.help = f"{known}; or an ONNX Runtime execution provider by name.  [default: the fastest here]"
        return super().get_help_record(ctx)


BACKEND = click.option("--backend", cls=BackendOption)
THREADS = click.option("--threads", type=click.IntRange(1), help="Threads of one graph.  [default: all cores]")
LOW_MEMORY = click.option(
    "--low-memory", is_flag=True, help="Text encoders leave memory before the levels come, and are loaded anew for the "
    "next prompt.  [default: where GPU memory is short]",
)  # fmt: skip
VAE_TILING = click.option(
    "--vae-tiling", type=int, metavar="PIXELS", help="Decode what is larger in overlapping tiles of this side, in the "
    "memory that one of them takes; a multiple of 32, as in 512.  [default: all is decoded whole]",
)  # fmt: skip
IN_FLIGHT = click.option("--in-flight", type=click.IntRange(1, 1024), default=32, show_default=True,
                         help="Pictures that denoise at once.")  # fmt: skip


class Replicas(click.ParamType):  # type: ignore[type-arg]
    """How many processes have the model: a number, or the fewest and the most of an autoscaled pool."""

    name = "number"

    def convert(
        self, value: str | tuple[int, int], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        """``"4"`` → (4, 4) and ``"1-8"`` → (1, 8)."""
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", value.strip(), re.ASCII)
        least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= least <= most:
            self.fail(f"{value!r}: give a number, as in 4, or the fewest and the most, as in 1-8", param, ctx)
        return least, most


class Seconds(click.ParamType):  # type: ignore[type-arg]
    """A time."""

    name = "time"

    def convert(self, value: str | float, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """``"1.5s"``, ``"1500ms"`` and ``"1.5"`` → 1.5."""
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)(ms|s|)", value.strip())
        if match is None or not float(match[1]):
            self.fail(f"{value!r}: give a time, as in 1.5s or 800ms", param, ctx)
        return float(match[1]) / (1000 if match[2] == "ms" else 1)


def check_type(path: Path, known: Set[str]) -> None:
    """Raise `UsageError` for a file whose ending is not among the known ones."""
    if path.suffix.lower() not in known:
        raise UsageError(f"{path} has an unknown file type; name it {with_ending(path, '.png')}, for instance")


def read_prompts(path: Path) -> list[str]:
    """The lines of a file, or of a pipe, that are not empty. Raises `UsageError` where it cannot be read."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(LONGEST_LIST + 1)
    except (OSError, UnicodeDecodeError):
        raise UsageError(f"{path} cannot be read; give a text file with a prompt a line") from None
    if len(text) > LONGEST_LIST:
        raise UsageError(f"{path} has more than {LONGEST_LIST} characters; give a text file with a prompt a line")
    return [line.strip() for line in text.splitlines() if line.strip()]
