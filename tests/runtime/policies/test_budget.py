"""Time budgets: the plan, and the deadline that no schedule misses by more than a step."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import run
from ddit.runtime import Pipeline
from ddit.runtime.bundle.manifest import Costs, CurvePoint
from ddit.runtime.cli import main as ddit_run
from ddit.runtime.errors import UsageError
from ddit.runtime.policies import Adaptive, Budgeted, Dynamic, Native, Reusing, RunHistory, parse_schedule
from ddit.runtime.policies.budget import plan
from ddit.runtime.policies.parse import Choices
from ddit.runtime.shapes import Size

COSTS = Costs(levels={2: 40.0, 4: 15.0, 8: 10.0}, predicted=0.5, encode=50.0, decode=150.0)
DEFAULT = Dynamic(native=2, coarse=(4, 8), tau=0.5, rho=0.4, warmup=3)
ADAPTIVE = Adaptive(0.04)


class Clock:
    """Time that passes only when a step runs."""

    def __init__(self):
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def spend(schedule: Budgeted, clock: Clock, steps: int, slower: float) -> RunHistory:
    """Run a path whose velocity nothing predicts well, so that an adaptive policy wants to compute every step."""
    history = RunHistory(np.linspace(1, 0, steps + 1))
    for _ in range(steps):
        decision = schedule.decide(history)
        cost = COSTS.predicted if decision.level is None else COSTS.levels[decision.level]
        clock.seconds += cost * slower / 1000
        history.record(decision, np.full((2, 2), 1e6, np.float32), {})
    return history


@given(st.integers(3, 60), st.floats(0.3, 4.0))
def test_a_deadline_is_kept(steps, seconds):
    clock = Clock()
    deadline = clock() + max(seconds, (3 * COSTS.levels[2] + (steps - 3) * COSTS.predicted) / 1000)
    history = spend(Budgeted(Reusing(Native(2), ADAPTIVE), COSTS, steps, deadline, clock), clock, steps, slower=1.0)
    assert clock() <= deadline + 1e-6
    assert clock() >= min(deadline - 0.04, 100 + steps * 0.04 - 1e-6), "the time is used"
    assert len(history.computed) >= 3


def test_a_machine_that_slows_down_ends_as_early_as_it_can():
    clock = Clock()
    schedule = Budgeted(Reusing(Native(2), ADAPTIVE), COSTS, 20, clock() + 0.4, clock)
    history = spend(schedule, clock, 20, slower=1.5)
    assert clock() - 100 <= 0.4 + 0.06 + 20 * COSTS.predicted * 1.5 / 1000
    assert history.computed == [*range(len(history.computed))], "whatever does not fit is predicted"


def test_all_native_where_it_fits():
    assert plan(2.3, COSTS, 50, native=2, default=ADAPTIVE) == Native(2)


def test_the_smallest_tolerance_that_is_fast_enough():
    curve = [CurvePoint(value=value, shares={2: share}) for value, share in ((0.1, 0.2), (0.02, 0.6), (0.05, 0.3))]
    chosen = plan(1.0, COSTS, 50, native=2, default=ADAPTIVE, curve=curve)  # 800 ms are 19 native steps and 31 others
    assert chosen == Reusing(Native(2), Adaptive(0.05))


def test_without_a_calibration_the_tolerance_is_what_is_typical():
    assert plan(1.0, COSTS, 50, native=2, default=ADAPTIVE) == Reusing(Native(2), Adaptive(0.04))
    assert plan(0.5, COSTS, 50, native=2, default=ADAPTIVE) == Reusing(Native(2), Adaptive(0.2))


def test_what_cannot_be_done_is_said_with_what_can():
    with pytest.raises(UsageError, match=r"50 steps need at least 0\.34 s here, 0\.20 s of it .* for 3 computed steps"):
        plan(0.3, COSTS, 50, native=2, default=ADAPTIVE)


@pytest.mark.parametrize(
    "text",
    [
        "native",
        "fixed:8x3,4x1,8x2",
        "dynamic:tau=0.02,rho=0.3,warmup=4,hold=1,coarsest=4,absolute=1",
        "fixed:2x8+adaptive:tolerance=0.02,order=2",
        "native+taylorseer:interval=6,order=1,first=2",
        "native+teacache:threshold=0.25",
        "native+spectralcache:threshold=0.5,low=0.7,high=1.4,least=0.3,most=2,longest=3",
    ],
)
def test_a_schedule_is_written_as_it_is_read(text):
    choices = Choices((2, 4, 8), 2, DEFAULT, Adaptive(0.04), gate=(1.0, 0.0))
    assert str(parse_schedule(text, choices)) == text


def test_a_picture_in_time(tiny_bundle):
    pipeline = Pipeline.open(tiny_bundle, backend="cpu")
    size = {"steps": 20, "height": 64, "width": 64}
    result = pipeline("a red circle", budget=60.0, **size)
    assert result.trace.schedule["text"] == "native"
    costs = pipeline.costs(Size(64, 64))  # measured once, by the call before
    assert 0 < costs.predicted < costs.levels[2]
    shortest = (costs.encode + costs.decode + 3 * costs.levels[2]) / 1000
    with pytest.raises(UsageError, match="20 steps need at least"):
        pipeline("a red circle", budget=shortest / 2, **size)
    with pytest.raises(UsageError, match="a budget chooses the schedule"):
        pipeline("a red circle", budget=1.0, schedule="native", **size)
    between = (costs.encode + costs.decode + 10 * costs.levels[2] + 10 * costs.predicted) / 1000
    quick = pipeline("a red circle", budget=between, **size)
    assert quick.trace.predicted > 0


def test_a_time_that_cannot_be_read(tiny_bundle):
    result = run(ddit_run, "generate", tiny_bundle, "red", "--budget", "soon")
    assert result.exit_code == 2
    assert "'soon': give a time, as in 1.5s or 800ms" in result.stderr
