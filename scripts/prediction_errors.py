"""What predicted steps do to a picture, over the noise level, and what coarse levels do in their place.

    python scripts/prediction_errors.py demo.bundle --prompts scenes:2000-2008

Every row is a stretch of predicted steps between computed ones, in runs that are native otherwise: the error of the
latent that the adaptive policy expects, the one that is there at the end of the stretch, and at the end of the run
without and with the correction. Beside it the error of one coarse step's velocity in the middle of the stretch. All are
root mean squares, as geometric means over the prompts (docs/method.md).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray
from rich.progress import track
from rich.table import Table

from command_line.prompts import prompt_texts
from ddit.runtime import Pipeline
from ddit.runtime.console import DditCommand, terminal
from ddit.runtime.denoise import Progress
from ddit.runtime.policies import Fixed, Policy, Prediction, Reuse, Reusing, RunHistory
from ddit.runtime.policies.prediction import lagrange_weights, newton_product, root_mean_square

STRETCHES = ((2, 4), (4, 6), (6, 9), (9, 13), (13, 18), (18, 24), (24, 32), (32, 40), (40, 48))  # of fifty steps
STEPS = 50


@dataclass(frozen=True)
class Stretch(Reuse):
    """The steps between two are predicted by the line through the two computed ones before; all others are computed."""

    first: int  # the last computed step before the stretch
    last: int  # the first computed one after it
    corrected: bool

    name = "stretch"

    def predict(self, history: RunHistory) -> Prediction | None:
        if not self.first < history.step <= self.last:
            return None
        sigmas = history.sigmas.astype(float)
        nodes = sigmas[[self.first, self.first - 1]].tolist()
        now = float(sigmas[history.step])
        since = range(self.first + 1, self.last)
        moved = sum((sigmas[j + 1] - sigmas[j]) * newton_product(nodes, float(sigmas[j])) for j in since)
        correction = float(moved) / newton_product(nodes, now) if self.corrected else 0.0
        return Prediction(lagrange_weights(nodes, now), history.step < self.last, correction)

    def __str__(self) -> str:
        return f"stretch:{self.first}-{self.last}"


@dataclass
class Row:
    """One stretch with one prompt."""

    expected: float
    there: float
    uncorrected: float  # at the end of the run
    corrected: float
    levels: dict[int, float]  # by coarse patch: RMS of its velocity minus the native one's


class Paths:
    """Runs of one prompt."""

    def __init__(self, pipeline: Pipeline, prompt: str, seed: int, size: dict[str, int]):
        self.pipeline, self.prompt, self.seed, self.size = pipeline, prompt, seed, size
        self.native_levels = (pipeline.bundle.manifest.native,) * STEPS
        self.native: dict[int, NDArray[np.float32]] = {}  # the latent after every step
        self.native = self.run(Fixed(self.native_levels))[0]

    def run(self, policy: Policy, first: int = 0) -> tuple[dict[int, NDArray[np.float32]], dict[int, float | None]]:
        """The latents after the steps from a number on, where the native run is then, and the predictions' errors."""
        latents: dict[int, NDArray[np.float32]] = {}

        def on_step(done: Progress) -> None:
            latents[done.step] = done.latents()[0]

        result = self.pipeline(
            self.prompt,
            seed=self.seed,
            schedule=policy,
            latent=self.native[first - 1] if first else None,
            first_step=first,
            on_step=on_step,
            **self.size,  # type: ignore[arg-type]
        )
        return latents, {record.step: record.error for record in result.trace.steps}

    def stretch(self, first: int, last: int) -> Row:
        """Predict the steps between two."""
        sigmas = self.pipeline.sigmas(STEPS, **self.size).astype(float)
        fixed = Fixed(self.native_levels)
        plain, errors = self.run(Reusing(fixed, Stretch(first, last, corrected=False)), first - 1)
        mended, _ = self.run(Reusing(fixed, Stretch(first, last, corrected=True)), first - 1)
        nodes = sigmas[[first, first - 1]].tolist()
        moved = sum((sigmas[j + 1] - sigmas[j]) * newton_product(nodes, sigmas[j]) for j in range(first + 1, last))
        error = errors[last]
        assert error is not None
        return Row(
            expected=abs(error * moved / newton_product(nodes, sigmas[last])),
            there=root_mean_square(plain[last - 1] - self.native[last - 1]),
            uncorrected=root_mean_square(plain[STEPS - 1] - self.native[STEPS - 1]),
            corrected=root_mean_square(mended[STEPS - 1] - self.native[STEPS - 1]),
            levels={patch: self.coarse(patch, (first + last) // 2) for patch in self.pipeline.bundle.manifest.coarse},
        )

    def coarse(self, patch: int, step: int) -> float:
        """One coarse step in a native run: how far it moves the latent from where the native one does, over Δσ."""
        levels = (*self.native_levels[:step], patch, *self.native_levels[step + 1 :])
        sigmas = self.pipeline.sigmas(STEPS, **self.size)
        latents, _ = self.run(Fixed(levels), step - 1)  # a native step first, whose detail is carried
        return root_mean_square(latents[step] - self.native[step]) / abs(float(sigmas[step + 1] - sigmas[step]))


@click.command(cls=DditCommand)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--prompts",
    default="scenes:2000-2008",
    show_default=True,
    help="A file with a prompt a line, or scenes:START-STOP.",
)
@click.option("--backend", default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(1))
def main(bundle: Path, prompts: str, backend: str, threads: int | None) -> None:
    """Measure what predicted steps do, over the noise level."""
    pipeline = Pipeline.open(bundle, backend=backend, threads=threads)
    sigmas, size = pipeline.sigmas(STEPS), pipeline.bundle.manifest.size().by_name()
    paths = [Paths(pipeline, prompt, seed, size) for seed, prompt in enumerate(prompt_texts(prompts))]
    coarse = pipeline.bundle.manifest.coarse
    table = Table("σ → σ′", "expected", "at σ′", "at the end", "corrected", "grew by", "1/(1 − σ′)",
                  *(f"level {patch}'s v" for patch in coarse))  # fmt: skip
    for first, last in track(STRETCHES, description="predicting", transient=True):
        rows = [path.stretch(first, last) for path in paths]
        there, corrected = mean(rows, lambda row: row.there), mean(rows, lambda row: row.corrected)
        table.add_row(
            f"{sigmas[first]:.3f} → {sigmas[last]:.3f}",
            *(f"{mean(rows, value):.4f}" for value in (lambda row: row.expected, lambda row: row.there)),
            f"{mean(rows, lambda row: row.uncorrected):.4f}",
            f"{corrected:.4f}",
            f"{mean(rows, lambda row: row.uncorrected) / there:.1f}",
            f"{1 / (1 - sigmas[last]):.1f}",
            *(f"{mean(rows, lambda row, patch=patch: row.levels[patch]):.2f}" for patch in coarse),  # type: ignore[misc]
        )
    terminal().print(table)


def mean(rows: Sequence[Row], value: Callable[[Row], float]) -> float:
    """The geometric mean of a figure over prompts."""
    return float(np.exp(np.mean([np.log(max(value(row), 1e-12)) for row in rows])))


if __name__ == "__main__":
    main()
