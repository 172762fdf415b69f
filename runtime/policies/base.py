"""What a policy is: it decides what every denoising step does, and knows nothing of the model or of where it runs."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]

DIFFERENCE_ORDER = 3  # a third difference needs three finished steps


@dataclass(frozen=True)
class Decision:
    """What one denoising step of one sample does."""

    level: int  # the patch size that it runs at


@dataclass
class RunHistory:
    """A run so far, as its policy sees it.

    ``deviations`` holds, for every coarse patch p, the standard deviation of the latent's third difference inside each
    p×p patch after the last step, (H/p, W/p); it is empty until three steps are done.
    """

    levels: list[int] = field(default_factory=list)  # of the steps that are done
    deviations: Mapping[int, FloatArray] = field(default_factory=dict)
    first: int = 0  # number of the run's first step: above 0 where it goes on from a latent that was given

    @property
    def step(self) -> int:
        """The number of the step to decide on, from 0."""
        return self.first + len(self.levels)


class Policy(ABC):
    """Decides the steps of runs. Immutable, so that one object serves every sample and thread.

    To add one, write a subclass in a module of its own and its written form in `ddit.runtime.policies.parse`.
    """

    @abstractmethod
    def decide(self, history: RunHistory) -> Decision:
        """What the next step does."""

    @abstractmethod
    def __str__(self) -> str:
        """The written form, which `ddit.runtime.policies.parse.parse_schedule` reads."""

    def steps(self, asked: int | None, default: int) -> int:
        """How many steps a run has. Raises `UsageError` where ``asked`` does not fit the policy."""
        return default if asked is None else asked

    def quantile(self) -> float | None:
        """The quantile ρ of the deviations that it looks at; None for a policy that looks at none."""
        return None

    def describe(self) -> dict[str, object]:
        """The policy as plain data, for the trace."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}  # type: ignore[arg-type]
        return {"kind": type(self).__name__.lower(), "text": str(self), **values}
