"""Every step at the native level: the base model, unchanged."""

from dataclasses import dataclass

from ddit.runtime.policies.base import Decision, Policy, RunHistory


@dataclass(frozen=True)
class Native(Policy):
    """Always the native patch."""

    native: int

    def decide(self, history: RunHistory) -> Decision:
        """The native level."""
        return Decision(self.native, by="native")

    def __str__(self) -> str:
        return "native"
