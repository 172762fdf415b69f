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
from ddit.runtime.policies import Budgeted, Dynamic, Fixed, Native, RunHistory, parse_schedule
from ddit.runtime.policies.budget import native_first, plan
from ddit.runtime.policies.parse import Choices

COSTS = Costs(levels={2: 40.0, 4: 15.0, 8: 10.0}, encode=50.0, decode=150.0)
DEFAULT = Dynamic(native=2, coarse=(4, 8), tau=0.5, rho=0.4, warmup=3)


class Clock:
    """Time that passes only when a step runs."""

    def __init__(self):
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def past(steps: int) -> RunHistory:
    return RunHistory(np.zeros(101), levels=[2] * steps)


def spend(schedule: Budgeted, clock: Clock, steps: int, slower: float) -> None:
    for step in range(steps):
        clock.seconds += schedule.milliseconds[schedule.decide(past(step)).level] * slower / 1000


@given(st.integers(1, 60), st.floats(0.3, 4.0), st.sampled_from([2, 4, 8]))
def test_a_deadline_is_missed_by_a_step_at_most(steps, seconds, level):
    clock = Clock()
    deadline = clock() + max(seconds, steps * COSTS.levels[8] / 1000)
    schedule = Budgeted(Fixed((level,) * steps), COSTS.levels, steps, deadline, clock)
    spend(schedule, clock, steps, slower=1.0)
    assert clock() <= deadline + 1e-6


def test_a_machine_that_slows_down_ends_as_early_as_it_can():
    clock = Clock()
    schedule = Budgeted(Native(2), COSTS.levels, 20, clock() + 0.8, clock)
    spend(schedule, clock, 20, slower=1.5)
    assert clock() - 100 <= 0.8 + 20 * COSTS.levels[8] * 0.5 / 1000 + 0.06
    assert schedule.decide(past(19)).level == 8


def test_all_native_where_it_fits():
    assert plan(2.3, COSTS, 50, default=DEFAULT) == Native(2)


def test_the_smallest_tau_that_is_fast_enough():
    curve = [
        CurvePoint(tau=0.1, shares={2: 0.9, 4: 0.1, 8: 0.0}),
        CurvePoint(tau=0.2, shares={2: 0.4, 4: 0.6, 8: 0.0}),
        CurvePoint(tau=0.3, shares={2: 0.1, 4: 0.2, 8: 0.7}),
    ]
    assert plan(1.6, COSTS, 50, default=DEFAULT, curve=curve) == Dynamic(2, (4, 8), 0.2, 0.4, 3)


def test_without_a_calibration_native_steps_come_first():
    schedule = plan(1.2, COSTS, 50, default=DEFAULT)
    assert str(schedule) == "fixed:2x16,8x34"


def test_what_cannot_be_done_is_said_with_what_can():
    with pytest.raises(UsageError, match=r"50 steps need at least 0\.70 s here, 0\.20 s of it .* for 30 steps"):
        plan(0.5, COSTS, 50, default=DEFAULT)


@given(st.floats(0, 3000), st.integers(1, 60))
def test_native_steps_first_keep_to_the_time_where_that_can_be(allowed, steps):
    levels = native_first(allowed, COSTS.levels, steps, native=2)
    assert len(levels) == steps
    assert sorted(levels) == list(levels)
    if steps * COSTS.levels[8] <= allowed:
        assert sum(COSTS.levels[level] for level in levels) <= allowed + 1e-6


@pytest.mark.parametrize(
    "text",
    [
        "native",
        "fixed:8x3,4x1,8x2",
        "dynamic:tau=0.02,rho=0.3,warmup=4,hold=1,coarsest=4,absolute=1",
        "fixed:2x8+adaptive:tolerance=0.02,order=2,longest=3",
        "native+taylorseer:interval=6,order=1,first=2",
        "native+teacache:threshold=0.25",
        "native+spectralcache:threshold=0.5,low=0.7,high=1.4,least=0.3,most=2,longest=3",
    ],
)
def test_a_schedule_is_written_as_it_is_read(text):
    assert str(parse_schedule(text, Choices((2, 4, 8), 2, DEFAULT, gate=(1.0, 0.0)))) == text


def test_a_picture_in_time(tiny_bundle):
    pipeline = Pipeline.open(tiny_bundle, backend="cpu")
    size = {"steps": 20, "height": 64, "width": 64}
    result = pipeline("a red circle", budget=60.0, **size)
    assert result.trace.schedule["text"] == "native"
    costs = pipeline._costs(64, 64)  # measured once, by the call before
    shortest = (costs.encode + costs.decode + 20 * min(costs.levels.values())) / 1000
    with pytest.raises(UsageError, match="20 steps need at least"):
        pipeline("a red circle", budget=shortest / 2, **size)
    with pytest.raises(UsageError, match="a budget chooses the schedule"):
        pipeline("a red circle", budget=1.0, schedule="native", **size)


def test_a_time_that_cannot_be_read(tiny_bundle):
    result = run(ddit_run, "generate", tiny_bundle, "red", "--budget", "soon")
    assert result.exit_code == 2
    assert "'soon': give a time, as in 1.5s or 800ms" in result.stderr
