"""When a latent grows, beside the paper's equations in plain NumPy."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.fft import dctn, idctn

from ddit.runtime.bundle.manifest import SpectrumInfo
from ddit.runtime.errors import UsageError
from ddit.runtime.policies import Adaptive, Decision, Dynamic, Native, Progressive, Reusing, RunHistory, parse_schedule
from ddit.runtime.policies.parse import Choices
from ddit.runtime.policies.progressive import Stage, activation, edge_power, gain

FLUX = SpectrumInfo(amplitude=203.615097, exponent=1.915461)
HALF, FULL = Stage(Fraction(1, 2), 32, 64 * 64), Stage(Fraction(1), 64, 128 * 128)
DEFAULT = Dynamic(native=2, coarse=(4, 8), tau=0.001, rho=0.4, warmup=3)
ADAPTIVE = Adaptive(0.04)


def stages(scales):
    return tuple(Stage(scale, float(scale * 64), int(scale * 128) ** 2) for scale in (*scales, Fraction(1)))


def parse(text: str):
    return parse_schedule(text, Choices((2, 4, 8), 2, DEFAULT, ADAPTIVE, spectrum=FLUX, stages=stages))


def test_written_forms():
    usual = Progressive(Native(2), (HALF, FULL), 0.05, FLUX)
    assert parse("progressive") == parse("native+progressive") == parse("progressive+native") == usual
    assert parse("progressive+adaptive").policy == Reusing(Native(2), ADAPTIVE)
    assert parse("dynamic+progressive:delta=0.1+adaptive") == parse("progressive:delta=0.1+adaptive+dynamic")
    own = parse("progressive:adaptive,delta=0.01,scales=1/4-1/2+fixed:2x9")
    assert own.own
    assert own.scales() == (Fraction(1, 4), Fraction(1, 2), Fraction(1))
    for text in ("progressive", "dynamic+adaptive+progressive:adaptive,scales=1/3-1/2", "progressive:delta=0.3"):
        assert parse(str(parse(text))) == parse(text)


@pytest.mark.parametrize(
    "text",
    [
        *("progressive:", "progressive:delta=0", "progressive:delta=1", "progressive:delta=nan", "progressive:fast"),
        *("progressive:scales=", "progressive:scales=1", "progressive:scales=1/1", "progressive:scales=0/2"),
        *("progressive:scales=1/2-1/2", "progressive:scales=1/2-1/4", "progressive:scales=1/100", "progressive:tau=1"),
        *("progressive:scales=0.5", "progressive+progressive", "progressive:scales=1/2-", "progressive:scales=3/2"),
    ],
)
def test_what_cannot_be_read_is_refused(text):
    with pytest.raises(UsageError, match=r"progressive\[:delta=0.05,scales=1/2,adaptive\]|delta must|decides twice"):
        parse(text)


@pytest.mark.parametrize(("delta", "at", "then"), [(0.01, 0.853, 0.920), (0.05, 0.718, 0.836), (0.10, 0.638, 0.779)])
def test_flux_at_1024_grows_where_the_paper_says(delta, at, then):
    policy = Progressive(Native(2), (HALF, FULL), delta, FLUX)
    power = FLUX.amplitude * 32**-FLUX.exponent
    level = 1 / (1 + np.sqrt(delta / (power * (1 + power - delta))))
    assert activation(policy.power(HALF, None), delta) == pytest.approx(level, rel=1e-12)
    assert level == pytest.approx(at, abs=5e-4)
    assert gain(2, level) * level == pytest.approx(then, abs=5e-4)
    sigmas = np.array([1.0, np.nextafter(level, 1), level, 0.3, 0.0])
    assert [decide(policy, sigmas, step).scale for step in range(3)] == [Fraction(1, 2), Fraction(1, 2), Fraction(1)]
    grown = decide(policy, sigmas, 2)
    assert grown.gain * sigmas[2] == pytest.approx(then, abs=5e-4)
    assert grown.figures["grows_at"] == pytest.approx(level)


def decide(policy: Progressive, sigmas: np.ndarray, step: int) -> Decision:
    """A step's decision while the latent has the smallest size."""
    return policy.decide(RunHistory(sigmas, levels=[2] * step, computed=[*range(step)], scale=policy.scales()[0]))


def test_a_latent_never_shrinks_and_stages_can_be_left_out():
    policy = parse("progressive:scales=1/4-1/2")
    sigmas = np.array([1.0, 0.2, 0.1, 0.0])
    decision = decide(policy, sigmas, 1)
    assert decision.scale == 1, "both are due"
    assert decision.gain == pytest.approx(4 / (1 + 3 * 0.2))
    assert policy.decide(RunHistory(np.ones(4))).scale == 1


@given(sigma=st.floats(0.01, 1), ratio=st.floats(1, 8))
def test_a_grown_latent_is_at_the_noise_level_that_it_is_said_to_be(sigma, ratio):
    """z = (1 − t)·x/r + t·ε times κ is (1 − t̃)·x + t̃·ε."""
    factor = gain(ratio, sigma)
    assert factor * (1 - sigma) / ratio == pytest.approx(1 - factor * sigma, abs=1e-9)


def test_the_power_at_the_edge_is_that_of_the_highest_frequencies():
    rng = np.random.default_rng(0)
    coefficients = rng.standard_normal((8, 24, 16))
    radius = np.hypot(np.arange(24)[:, None] / 24, np.arange(16) / 16)
    coefficients *= np.where((radius >= 0.9) & (radius < 1), 3.0, 0.5)
    latent = idctn(coefficients, norm="ortho", axes=(1, 2)).astype(np.float32)
    edge = dctn(latent, norm="ortho", axes=(1, 2))[:, (radius >= 0.9) & (radius < 1)]
    assert edge_power(latent) == pytest.approx(np.mean(edge**2), rel=1e-5)


def test_with_adaptive_a_picture_of_much_detail_grows_earlier():
    policy = Progressive(Native(2), (HALF, FULL), 0.05, FLUX, own=True)
    sigmas, latent = np.linspace(1, 0, 51), np.random.default_rng(0).standard_normal((16, 64, 64))

    def grows_at(power: float) -> float:
        """The noise level of the first larger step of a picture whose estimates are white, of a power."""
        estimate = latent * np.sqrt(power)
        for step in range(1, 50):
            done = {"levels": [2] * step, "computed": [*range(step)]}
            history = RunHistory(sigmas, **done, scale=HALF.scale, estimate=lambda: estimate)
            if policy.decide(history).scale == 1:
                return float(sigmas[step])
        return 0.0

    for power in (0.01, 0.1, 1.0):  # of a small latent's coefficients: a larger latent's have twice the amplitude
        expected = activation(4 * power, 0.05)
        assert expected - 0.03 <= grows_at(power) <= expected + 0.01


def test_without_an_estimate_adaptive_goes_by_the_model_s_pictures():
    own, usual = (Progressive(Native(2), (HALF, FULL), 0.05, FLUX, own) for own in (True, False))
    sigmas = np.linspace(1, 0, 51)
    assert [decide(own, sigmas, step).scale for step in range(50)] == [
        decide(usual, sigmas, step).scale for step in range(50)
    ]
