"""Sessions: samples in flight step together and do not influence each other."""

import numpy as np
import pytest

from ddit.runtime import Pipeline, Request
from ddit.runtime.policies import Fixed
from ddit.runtime.session import Session
from ddit.runtime.step import level_program, sample_buffers

SIZE = {"height": 128, "width": 64}


@pytest.fixture(scope="module")
def pipeline(tiny_bundle) -> Pipeline:
    return Pipeline.open(tiny_bundle, backend="cpu")


def admit(session: Session, pipeline: Pipeline, prompt: str, seed: int, levels: tuple[int, ...]):
    (run,) = pipeline.resolve([Request(prompt, seed, schedule=Fixed(levels), guidance=2.0, **SIZE)])
    conditions = {name: values[0] for name, values in pipeline.encode([prompt]).items()}
    return session.admit(run, {**conditions, "guidance": np.float32(2.0)})


def test_a_step_is_calls_on_buffers_that_have_the_tensors_names(pipeline):
    manifest = pipeline.bundle.manifest
    program = level_program(manifest, 4, {"H": 16, "W": 8})
    assert [call.graph for call in program.calls] == ["level-4", "step"]
    renamed = [(one.graph, *pair) for one in program.calls for pair in one.inputs.items() if pair[0] != pair[1]]
    assert renamed == [("level-4", "timestep", "model_timestep")]  # which may be rounded; the step's may not
    assert {f"next_{name}" for name in program.state} <= {spec.name for spec in manifest.graphs["step"].outputs}
    assert "latent" in program.state
    assert program.results == ("prediction_error", "deviation_4", "deviation_8")
    assert program.tokens == 8
    assert program.tables["rope_cos"].shape == (4, 2, 16)
    assert not set(program.tables) & set(sample_buffers(manifest)), "tables are the same for all samples"


def test_samples_that_come_and_go_are_as_if_alone(pipeline):
    jobs = {
        ("a red circle", 1): (2, 2, 4, 4, 8, 2),
        ("a blue star", 2): (2, 4, 4, 8),
        ("a green square", 3): (4, 4, 2, 4, 4),
        ("a red star", 4): (8, 2, 8),
    }
    session, waiting, flying, done = Session(pipeline.backend), list(jobs.items()), {}, {}
    together = 0
    while waiting or flying:
        if waiting:  # one more joins at every step, whatever the others are doing
            (prompt, seed), levels = waiting.pop(0)
            flying[prompt, seed] = admit(session, pipeline, prompt, seed, levels)
        together = max(together, *(len(members) for members in session.groups()))
        session.step()
        for key, sample in list(flying.items()):
            if sample.done:
                del flying[key]
                done[key] = session.retire(sample), sample.trace
    assert together > 1, "some steps must be shared for this test to say something"
    for (prompt, seed), levels in jobs.items():
        latent, trace = done[prompt, seed]
        assert trace.levels == list(levels)
        alone = pipeline(prompt, seed=seed, schedule=Fixed(levels), guidance=2.0, **SIZE).latent
        np.testing.assert_allclose(latent, alone, atol=1e-5 * np.abs(alone).max())


def test_samples_that_predict_and_samples_that_compute_step_beside_each_other(pipeline):
    """What was kept of one sample's velocities is not another's, whoever shares its steps."""
    schedules = ["adaptive:tolerance=0.5", "fixed:2x4,4x8+adaptive:tolerance=0.5", "native", "adaptive:tolerance=0.05"]
    requests = [Request("a red circle", seed, 12, text, **SIZE) for seed, text in enumerate(schedules)]
    results = pipeline.run(requests)
    assert 0 < results[3].trace.predicted < results[0].trace.predicted
    for request, result in zip(requests, results, strict=True):
        (alone,) = pipeline.run([request])
        assert result.trace.levels == alone.trace.levels
        np.testing.assert_allclose(result.latent, alone.latent, atol=1e-5 * np.abs(alone.latent).max())


@pytest.mark.parametrize("levels", ["native", "fixed:2x4,8x4,4x4"])
def test_at_tolerance_0_nothing_is_predicted_and_the_picture_is_the_same_to_the_bit(pipeline, levels):
    size = {"steps": 12, **SIZE}
    plain = pipeline("a red circle", schedule=levels, **size)
    none_predicted = pipeline("a red circle", schedule=f"{levels}+adaptive:tolerance=0", **size)
    assert none_predicted.trace.levels == plain.trace.levels
    np.testing.assert_array_equal(none_predicted.latent, plain.latent)


def test_what_one_sample_carries_does_not_depend_on_who_steps_with_it(pipeline):
    """A sample that has had no native step has no detail to carry; the one beside it does all the same."""
    session = Session(pipeline.backend)
    with_native = admit(session, pipeline, "a red circle", 1, (2, 4, 4))
    session.step()
    without = admit(session, pipeline, "a blue star", 2, (4, 4))
    session.step()
    session.step()
    for sample, prompt, seed, levels in (
        (with_native, "a red circle", 1, (2, 4, 4)),
        (without, "a blue star", 2, (4, 4)),
    ):
        alone = pipeline(prompt, seed=seed, schedule=Fixed(levels), guidance=2.0, **SIZE).latent
        np.testing.assert_allclose(session.retire(sample), alone, atol=1e-5 * np.abs(alone).max())


def test_a_cancelled_sample_leaves_the_others_alone(pipeline):
    session = Session(pipeline.backend)
    stays = admit(session, pipeline, "a red circle", 1, (2, 2, 4))
    leaves = admit(session, pipeline, "a blue star", 2, (2, 2, 4))
    session.step()
    session.retire(leaves)
    while not stays.done:
        session.step()
    alone = pipeline("a red circle", seed=1, schedule=Fixed((2, 2, 4)), guidance=2.0, **SIZE).latent
    np.testing.assert_allclose(session.retire(stays), alone, atol=1e-5 * np.abs(alone).max())
    assert not session.samples
