"""Schedules: parsing and decisions."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddit.runtime.errors import UsageError
from ddit.runtime.policies import (
    Adaptive,
    Dynamic,
    Fixed,
    Native,
    Policy,
    Reusing,
    RunHistory,
    parse_schedule,
    statistic,
)
from ddit.runtime.policies.parse import Choices

DEFAULT = Dynamic(native=2, coarse=(4, 8), tau=0.001, rho=0.4, warmup=3)


def parse(text: str):
    return parse_schedule(text, Choices((2, 4, 8), 2, DEFAULT, Adaptive(0.04)))


def deviations(four: float, eight: float) -> dict[int, np.ndarray]:
    return {4: np.full((2, 2), four, np.float32), 8: np.full((1, 1), eight, np.float32)}


def level(policy: Policy, past: list[int], measured: dict[int, np.ndarray]) -> int:
    """The level that a policy decides on."""
    return policy.decide(RunHistory(np.zeros(51), levels=past, deviations=measured)).level


def test_written_forms():
    assert parse("native") == Native(2)
    assert parse("dynamic") == DEFAULT
    assert parse("dynamic:tau=0.5, rho=0.9,warmup=5") == Dynamic(2, (4, 8), 0.5, 0.9, 5)
    assert parse("fixed:8x2,4x1,2") == Fixed((8, 8, 4, 2))
    assert parse("adaptive") == parse("native+adaptive") == Reusing(Native(2), Adaptive(0.04))
    assert parse("dynamic+adaptive:1e+0,order=2") == Reusing(DEFAULT, Adaptive(1.0, 2))


@pytest.mark.parametrize(
    "text",
    [
        *("", "fast", "native:1", "fixed", "fixed:", "fixed:4y2", "fixed:x2", "fixed:16x2", "fixed:4x-1"),
        *("dynamic:tau", "dynamic:mu=1", "dynamic:rho=1", "dynamic:rho=0", "dynamic:tau=-1", "dynamic:tau=nan"),
        *("dynamic:warmup=2", "adaptive:tolerance=-1", "adaptive:tolerance=inf", "adaptive:order=3", "adaptive:tau=1"),
        *("native+dynamic", "adaptive+adaptive", "native+", "+native", "native++adaptive", "native+fast", "adaptive:"),
    ],
)
def test_what_cannot_be_read_is_refused(text):
    with pytest.raises(UsageError):
        parse(text)


@given(parts=st.lists(st.tuples(st.sampled_from([2, 4, 8]), st.integers(0, 30)), min_size=1, max_size=6))
def test_fixed_schedules_run_what_they_list(parts):
    schedule = parse("fixed:" + ",".join(f"{patch}x{count}" for patch, count in parts))
    expected = [patch for patch, count in parts for _ in range(count)]
    assert [level(schedule, expected[:step], {}) for step in range(len(expected))] == expected


@pytest.mark.parametrize(
    ("four", "eight", "patch"),
    [(0.0005, 0.0005, 8), (0.0005, 0.002, 4), (0.002, 0.002, 2), (0.002, 0.0005, 8), (0.001, 0.001, 2)],
)
def test_dynamic_takes_the_largest_patch_under_the_threshold(four, eight, patch):
    assert level(DEFAULT, [2] * 10, deviations(four, eight)) == patch


def test_dynamic_warms_up_at_the_native_level():
    assert [level(DEFAULT, [2] * step, deviations(0, 0)) for step in range(5)] == [2, 2, 2, 8, 8]


@pytest.mark.parametrize(
    ("past", "patch"),
    [
        ([2, 2, 2, 8], 8),  # one step after the switch, whatever it did to the difference
        ([2, 2, 2, 8, 8], 8),
        ([2, 2, 2, 8, 8, 8], 2),  # three steps at one level: now the difference says something
        ([2, 2, 2, 8, 8, 8, 2], 2),
    ],
)
def test_a_level_keeps_running_until_its_own_steps_can_be_compared(past, patch):
    assert level(DEFAULT, past, deviations(1, 1)) == patch
    assert level(replace(DEFAULT, hold=1), past, deviations(1, 1)) == 2


@given(value=st.floats(1e-6, 1.0), low=st.floats(1e-6, 1.0), high=st.floats(1e-6, 1.0))
def test_a_larger_tau_is_never_finer(value, low, high):
    low, high = sorted((low, high))
    coarse = [level(Dynamic(2, (4, 8), tau, 0.4, 3), [2] * 3, deviations(value, value)) for tau in (low, high)]
    assert coarse[0] <= coarse[1]


def test_a_flat_background_does_not_hide_a_zebra():
    """Under the quantile a busy 70 % of the patches counts; the mean of the rest would not."""
    picture = np.concatenate([np.zeros(30), np.ones(70)]).astype(np.float32)
    assert statistic(picture, 0.4) == 1.0
