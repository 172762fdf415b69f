"""A list of levels, whatever the picture (FlexiDiT, arXiv 2502.20126)."""

from dataclasses import dataclass
from itertools import groupby

from ddit.runtime.errors import UsageError
from ddit.runtime.policies.base import Decision, Policy, RunHistory


@dataclass(frozen=True)
class Fixed(Policy):
    """The level of every step, in order."""

    levels: tuple[int, ...]

    def decide(self, history: RunHistory) -> Decision:
        """The step's entry in the list."""
        return Decision(self.levels[history.step], by="fixed")

    def steps(self, asked: int | None, default: int) -> int:
        """As many as it lists."""
        if asked is not None and asked != len(self.levels):
            raise UsageError(f"the fixed schedule has {len(self.levels)} steps, not {asked}")
        return len(self.levels)

    def __str__(self) -> str:
        runs = ((patch, sum(1 for _ in same)) for patch, same in groupby(self.levels))
        return "fixed:" + ",".join(f"{patch}x{count}" for patch, count in runs)
