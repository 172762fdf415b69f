"""Picture sizes in training: what FLUX makes of them, and that all processes choose alike."""

import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ddit.profiles import load_profile
from ddit.runtime.samplers.sigmas import sigmas
from demo_model.buckets import BUCKETS, bucket_of
from demo_model.parts import TEXT_LENGTH, make_scheduler
from demo_model.results import EXPORT_DEFAULTS
from demo_model.stages import sampler_info

SCRIPTS = Path(__file__).parents[3] / "scripts"
CHOICES = "print(*[bucket_of(step, BUCKETS) for step in range(50)])"


def test_sizes_fit_all_levels_and_the_profile():
    profile = load_profile(EXPORT_DEFAULTS["profile"])
    (entry,) = profile.entry
    for name in ("height", "width"):
        sides = {getattr(bucket, name) for bucket in BUCKETS}
        allowed = getattr(entry, name)
        assert (min(sides), max(sides)) == (allowed.minimum, allowed.maximum)
        assert sides == set(range(128, 385, 64))
        assert max(BUCKETS, key=lambda bucket: bucket.weight).size == (allowed.optimum, allowed.optimum)
    assert len({bucket.size for bucket in BUCKETS}) == len(BUCKETS)


@pytest.mark.parametrize("bucket", BUCKETS, ids=str)
def test_noise_levels_are_shifted_as_the_scheduler_does(bucket):
    scheduler = make_scheduler()
    plain = np.linspace(1, 1 / 50, 50)
    scheduler.set_timesteps(sigmas=plain.tolist(), mu=bucket.mu)
    shifted = bucket.shift * plain / (1 + (bucket.shift - 1) * plain)
    np.testing.assert_allclose(scheduler.sigmas[:-1].numpy(), shifted, rtol=1e-6)
    np.testing.assert_allclose(scheduler.sigmas.numpy(), sigmas(sampler_info(), 50, bucket.tokens), atol=1e-6)


def test_the_shift_is_flux_s_at_its_usual_size():
    square = next(bucket for bucket in BUCKETS if bucket.size == (256, 256))
    assert square.tokens == 256
    assert square.shift == pytest.approx(math.exp(0.5))


def test_a_step_is_the_same_work_at_every_size():
    tokens = [bucket.rows(320) * (bucket.tokens + TEXT_LENGTH) for bucket in BUCKETS]
    assert max(tokens) / min(tokens) < 1.01


def test_every_size_gets_its_share_of_the_steps():
    counts = Counter(bucket_of(step, BUCKETS) for step in range(4000))
    total = sum(bucket.weight for bucket in BUCKETS)
    for bucket in BUCKETS:
        assert counts[bucket] / 4000 == pytest.approx(bucket.weight / total, rel=0.3)


def test_two_processes_choose_the_same_sizes():
    command = f"from demo_model.buckets import BUCKETS, bucket_of; {CHOICES}"
    other = subprocess.run([sys.executable, "-c", command], cwd=SCRIPTS, capture_output=True, text=True, check=True)
    assert other.stdout.split() == [str(bucket_of(step, BUCKETS)) for step in range(50)]
