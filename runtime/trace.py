"""The trace of a run: what every denoising step did."""

from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import TYPE_CHECKING, Any

from ddit.runtime import strict_json
from ddit.runtime.complexity import Complexity

if TYPE_CHECKING:
    from ddit.runtime.request import Run


@dataclass(frozen=True)
class StepRecord:
    """One denoising step of one sample."""

    step: int
    sigma: float  # noise level at which the model was asked
    level: int | None  # patch that it ran at; None: no level ran, the velocity was predicted
    milliseconds: float  # of the level's graph and the step graph; shared by the samples that ran together
    statistic: dict[int, float]  # σ_p of every coarse patch after the step; empty until three steps are done
    error: float | None = None  # root mean square of v − v̂ at a computed step for which a velocity was predicted
    by: str = ""  # the policy that decided
    figures: dict[str, float] = field(default_factory=dict)  # on what, by name
    scale: float = 1.0  # share of the picture's height and width that it ran at
    size: tuple[int, int] | None = None  # pixels that are that: a size that the levels' patches divide


@dataclass
class Trace:
    """A run, step by step."""

    prompt: str
    seed: int
    height: int  # pixels
    width: int
    guidance: float
    carry: float  # share of the last native step's detail that coarse steps took over
    backend: str
    schedule: dict[str, Any]
    steps: list[StepRecord] = field(default_factory=list)
    encode_milliseconds: float = 0.0  # text encoders
    decode_milliseconds: float = 0.0  # latent to picture
    complexity: Complexity | None = None  # where and when there was detail; none without coarse levels
    frames: int | None = None  # of a clip

    @classmethod
    def of(cls, run: "Run", backend: str) -> "Trace":
        """An empty trace of a run on a backend."""
        size = run.size
        return cls(
            prompt=run.prompt,
            seed=run.seed,
            height=size.height,
            width=size.width,
            frames=size.frames,
            guidance=run.guidance,
            carry=run.carry,
            backend=backend,
            schedule=run.policy.describe(),
        )

    @property
    def levels(self) -> list[int | None]:
        """The level of every step; None for a predicted one."""
        return [record.level for record in self.steps]

    @property
    def predicted(self) -> int:
        """How many steps ran no level."""
        return self.levels.count(None)

    def steps_per_level(self) -> dict[int, int]:
        """How many steps ran at each level."""
        return dict(sorted(Counter(level for level in self.levels if level is not None).items()))

    def smaller_steps(self) -> dict[tuple[int, int], int]:
        """How many steps ran at each size below the picture's, in pixels."""
        return dict(Counter(record.size for record in self.steps if record.size and record.scale < 1))

    def milliseconds_per_level(self) -> dict[int, float]:
        """Median milliseconds of a step at each level, at the picture's size."""
        times: defaultdict[int, list[float]] = defaultdict(list)
        for record in self.steps:
            if record.level is not None and record.scale == 1:
                times[record.level].append(record.milliseconds)
        return {level: median(values) for level, values in sorted(times.items())}

    def milliseconds_predicted(self) -> float:
        """Median milliseconds of a predicted step; 0 where there was none."""
        return median([record.milliseconds for record in self.steps if record.level is None] or [0.0])

    def total_milliseconds(self) -> float:
        """Milliseconds of all denoising steps."""
        return sum(record.milliseconds for record in self.steps)

    def summary(self) -> dict[str, Any]:
        """The figures that a report shows."""
        return {
            "steps": len(self.steps),
            "steps_per_level": self.steps_per_level(),
            "predicted_steps": self.predicted,
            "smaller_steps": {f"{height}x{width}": count for (height, width), count in self.smaller_steps().items()},
            "milliseconds_per_level": self.milliseconds_per_level(),
            "denoise_milliseconds": self.total_milliseconds(),
            "encode_milliseconds": self.encode_milliseconds,
            "decode_milliseconds": self.decode_milliseconds,
        }

    def to_json(self) -> str:
        """The whole trace as JSON."""
        values = asdict(replace(self, complexity=None))
        values["complexity"] = self.complexity.to_dict() if self.complexity else None
        return strict_json.dump({**values, "summary": self.summary()}, indent=2)
