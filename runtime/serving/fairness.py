"""Who goes first: by virtual time, so that short work overtakes long work and nobody starves.

The engines are thought of as shared equally by all who want them. Everybody gets the virtual time at which the work
would be done then, and whoever's is earliest goes first, as in weighted fair queueing (Demers, Keshav and Shenker 1989)
and the fair sojourn protocol (Friedman and Henderson 2003). Equal work is done in the order of its arrival; short work
finishes early whatever long work came before it; and since virtual time passes the finish time of any work that
waits, later work cannot overtake it for ever.
"""

from collections import OrderedDict
from collections.abc import Mapping

from ddit.runtime.bundle.manifest import LatentInfo
from ddit.runtime.policies import Fixed
from ddit.runtime.request import Run
from ddit.runtime.shapes import image_tokens

REMEMBERED = 256  # kinds of runs whose work is remembered
RECENT = 0.2  # share of the newest run in what is remembered

Kind = tuple[str, bool, int, tuple[int, ...]]


class VirtualTime:
    """The clock of a server that shares its capacity equally, by weight, among all who wait."""

    def __init__(self) -> None:
        self.now = 0.0

    def finish(self, work: float, weight: float) -> float:
        """The virtual time at which work that arrives now would be done."""
        return self.now + work / weight

    def spend(self, work: float, weights: float) -> None:
        """Work was done while tickets of so much weight in all were open."""
        self.now += work / weights


class Workload:
    """What runs cost, in tokens that pass through the transformer; predicted steps are taken as free."""

    def __init__(self, latent: LatentInfo, native: int):
        self._latent, self._native = latent, native
        self._seen: OrderedDict[Kind, float] = OrderedDict()

    def step(self, run: Run, level: int | None, sizes: Mapping[str, int]) -> float:
        """Of one step at a level, on a latent of these sizes."""
        if level is None:
            return 0.0
        tokens = image_tokens(self._latent, level, sizes) + run.text_length
        return float(tokens * (2 if run.guided else 1))

    def expected(self, run: Run) -> float:
        """Of a whole run: as much as the last ones of its kind; else what its list says, or all steps native."""
        if (seen := self._seen.get(self._kind(run))) is not None:
            return seen
        policy = run.policy
        levels = policy.levels if isinstance(policy, Fixed) else (self._native,) * run.steps
        return sum(self.step(run, level, run.sizes) for level in levels[run.first_step :])

    def learn(self, run: Run, work: float) -> None:
        """A run is done and took so much work."""
        kind = self._kind(run)
        before = self._seen.pop(kind, work)
        self._seen[kind] = before + RECENT * (work - before)
        if len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)

    @staticmethod
    def _kind(run: Run) -> Kind:
        return str(run.policy), run.guided, run.steps - run.first_step, tuple(run.sizes.values())
