"""The work of ``ddit-run generate --prompts``."""

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import click
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from ddit.runtime import strict_json
from ddit.runtime.backends.registry import open_backend
from ddit.runtime.batch.lines import Wanted, at_line, read_lines, without_finished
from ddit.runtime.batch.make import make, make_in_turn, write_files
from ddit.runtime.batch.results import RESULTS, Results, gather, read_results
from ddit.runtime.bundle import Bundle
from ddit.runtime.bundle.manifest import VideoDecoderInfo
from ddit.runtime.console import say, terminal
from ddit.runtime.errors import DditError, UsageError
from ddit.runtime.files import with_ending
from ddit.runtime.folders import locked
from ddit.runtime.pipeline import Pipeline
from ddit.runtime.saving import PICTURES
from ddit.runtime.serving.engine_room import EngineRoom
from ddit.runtime.tiling import check_side
from ddit.runtime.video import check_clip_type


def generate_many(
    bundle: Path,
    prompts: Path,
    out: Path,
    defaults: Mapping[str, Any],
    *,
    fps: float | None,
    backend: str | None,
    threads: int | None,
    low_memory: bool,
    vae_tiling: int | None,
    in_flight: int,
    ray: bool,
    replicas: tuple[int, int] | None,
    as_json: bool,
) -> None:
    """Make what a file asks for into the folder ``out``, without what is finished there. Raises `DditError`."""
    opened = Bundle.open(bundle)
    decoder = opened.manifest.decoder
    clips = isinstance(decoder, VideoDecoderInfo)
    if fps and not clips:
        raise UsageError("this model makes pictures; --fps is for clips")
    frames_per_second = (fps or decoder.frames_per_second) if isinstance(decoder, VideoDecoderInfo) else None
    given = {name: value for name, value in defaults.items() if value is not None}
    wanted = read_lines(prompts, given, opened.manifest, ".mp4" if clips else ".png")
    for one in wanted:
        with naming(prompts, one):
            check_file(one.file, clips)
    check_side(opened.manifest.latent, vae_tiling)
    pipeline = None
    if not ray:
        chosen = open_backend(backend, opened, threads, low_memory=low_memory)
        pipeline = Pipeline(opened, chosen, vae_tiling=vae_tiling)
    steps = {}
    for one in wanted:
        with naming(prompts, one):
            run = (
                pipeline.resolve([one.request])[0] if pipeline else one.request.resolve(opened.manifest, backend or "")
            )
            steps[one.id] = run.steps - run.first_step
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{out} cannot be the folder of the results: {error.strerror or error}") from None
    with locked(out, wait=False) as free:
        if not free:
            raise UsageError(f"another process is writing {out}; wait for its end, or choose another --out")
        found = read_results(out)
        left = without_finished(wanted, found, out)
        gather(out, found, ())
        with _Progress(len(wanted), {one.id: steps[one.id] for one in left}, by_step=not ray) as progress:
            if not left:
                pass
            elif pipeline is None:
                from ddit.runtime.batch.ray_data import spread

                spread(left, out, bundle, backend=backend, threads=threads, vae_tiling=vae_tiling, in_flight=in_flight,
                       replicas=replicas, frames_per_second=frames_per_second, on_done=progress.done)  # fmt: skip
            else:
                if pipeline.backend.low_memory:
                    made = make_in_turn(pipeline, left, progress.step)
                else:
                    made = make(EngineRoom(pipeline, in_flight=in_flight, waiting=in_flight), left, progress.step)
                with closing(Results(out)) as results:
                    write_files(made, out, results, frames_per_second=frames_per_second, on_done=progress.done)
        gather(out, read_results(out), [one.id for one in wanted])
    count = len(left) - len(progress.failed)
    if as_json:
        report = {"out": str(out), "made": count, "kept": len(wanted) - len(left), "failed": len(progress.failed)}
        click.echo(strict_json.dump(report))
    else:
        kept = f", {len(wanted) - len(left)} were there" if len(left) < len(wanted) else ""
        say(f"{out}: {count} made{kept}; {out / RESULTS} has them in order")
    if progress.failed:
        first, reason = progress.failed[0]
        raise DditError(f"{len(progress.failed)} of {len(left)} were not made; line {first.line}: {reason}")


def check_file(name: str, clips: bool) -> None:
    """Raise `UsageError` for a file that could not be written."""
    path = Path(name)
    if clips:
        check_clip_type(path)
    elif path.suffix.lower() not in PICTURES:
        raise UsageError(f"{name} has an unknown file type; name it {with_ending(path, '.png')}, for instance")


@contextmanager
def naming(path: Path, one: Wanted) -> Iterator[None]:
    """Say of an error on which line it is."""
    try:
        yield
    except UsageError as error:
        raise at_line(path, one.line, error) from None


class _Progress:
    """A bar over the steps of all pictures that are left to make, and what failed."""

    def __init__(self, wanted: int, left: Mapping[str, int], *, by_step: bool):
        """``left``: the steps of what is left to make, by id. ``by_step``: whether somebody tells of every step."""
        self.failed: list[tuple[Wanted, DditError]] = []
        self._wanted, self._left, self._by_step = wanted, left, by_step
        self._done = wanted - len(left)
        columns = (TextColumn("{task.description:>24}"), BarColumn(), TaskProgressColumn())
        console = terminal(stderr=True)
        self._bar = ProgressBar(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True,
                                disable=not console.is_terminal)  # fmt: skip
        self._task = self._bar.add_task("opening", total=sum(left.values()))

    def __enter__(self) -> "_Progress":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def step(self) -> None:
        """A picture has taken a step."""
        self._bar.advance(self._task)
        self._bar.update(self._task, description=self._text())

    def done(self, one: Wanted, error: DditError | None) -> None:
        """A picture is written, or could not be made."""
        self._done += 1
        if not self._by_step:
            self._bar.advance(self._task, self._left[one.id])
        if error is not None:
            self.failed.append((one, error))
            say(f"line {one.line}: {error}")
        self._bar.update(self._task, description=self._text())

    def _text(self) -> str:
        return f"{self._done} of {self._wanted} done"
