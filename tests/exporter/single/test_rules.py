"""The rules as ONNX functions, in ONNX Runtime, beside NumPy and the runtime's policies."""

from functools import cache

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from ddit.exporter.single.loop import HISTORY, PREDICTING
from ddit.exporter.single.rules import DOMAIN, RULES
from ddit.runtime.bundle.manifest import FlowMatchEulerInfo, RotaryAxis, RotaryInfo, SmoothPoint
from ddit.runtime.conditioning.positions import rotary_tables
from ddit.runtime.policies import Adaptive, Dynamic, Native, Reusing, RunHistory
from ddit.runtime.policies.adaptive import LONGEST
from ddit.runtime.policies.smooth import smooth_at
from ddit.runtime.samplers.sigmas import flow_shift, sigmas
from transcription import noise_levels

EULER = {
    "kind": "flow_match_euler",
    "use_dynamic_shifting": True,
    "shift": 3.0,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}


def call(name: str, *arguments, opset: int = 23) -> list[np.ndarray]:
    """A rule's outputs."""
    arrays = [np.asarray(value) for value in arguments]
    signature = tuple((array.dtype.str, array.ndim) for array in arrays)
    session = prepared(name, signature, opset)
    return session.run(None, {f"x{i}": array for i, array in enumerate(arrays)})


@cache
def prepared(name: str, signature: tuple[tuple[str, int], ...], opset: int) -> onnxruntime.InferenceSession:
    function = RULES[name].function_ir
    function.opset_imports[""] = opset
    inputs = [
        ir.Value(
            name=f"x{i}", type=ir.TensorType(ir.DataType.from_numpy(np.dtype(kind))), shape=ir.Shape([None] * rank)
        )
        for i, (kind, rank) in enumerate(signature)
    ]
    node = ir.Node(DOMAIN, name, inputs, num_outputs=len(function.outputs))
    graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": opset, DOMAIN: 1}, name=name)
    model = ir.to_proto(ir.Model(graph, ir_version=10, functions=[function]))
    for output in model.graph.output:
        output.ClearField("type")
    return onnxruntime.InferenceSession(model.SerializeToString())


@pytest.mark.parametrize("opset", [17, 23])
@pytest.mark.parametrize("smallest", [None, 0.01])
@pytest.mark.parametrize("steps", [1, 2, 7, 28, 50])
def test_noise_levels(steps, smallest, opset):
    info = FlowMatchEulerInfo(**EULER, smallest=smallest, steps=steps)
    size, native = (48, 80), 2
    tokens = 24 * 40
    slope = (1.15 - 0.5) / (4096 - 256)
    (shift,) = call("dynamic_shift", np.int64(tokens), 0.5, slope, 256.0, opset=opset)
    assert shift == pytest.approx(np.exp(flow_shift(info, tokens)), rel=1e-15)
    (found,) = call("noise_levels", np.int64(steps), float(smallest or 0), shift, opset=opset)
    np.testing.assert_array_equal(found, sigmas(info, steps, tokens))
    manifest = {"sampler": {**EULER, "smallest": smallest}, "native": native}
    np.testing.assert_allclose(found, noise_levels(manifest, steps, size), rtol=2e-7)


def test_position_tables():
    axes = (("height", 6), (None, 4), ("width", 8))
    info = RotaryInfo(axes=[RotaryAxis(axis=axis, dimensions=size) for axis, size in axes], theta=10000.0)
    by = {
        name: np.concatenate(
            [np.repeat(1e4 ** -(np.arange(0, size, 2) / size), 2) * (axis == name) for axis, size in axes]
        )
        for name in ("height", "width")
    }
    found = call("position_tables", np.int64(5), np.int64(7), 2.0, by["height"], by["width"])
    for table, wanted in zip(found, rotary_tables(info, {"height": 5, "width": 7}, 2.0), strict=True):
        np.testing.assert_allclose(table, wanted, atol=1e-7)


@pytest.mark.parametrize("opset", [17, 23])
@pytest.mark.parametrize("rho", [0.01, 0.4, 0.5, 0.99])
def test_quantile(rho, opset):
    rng = np.random.default_rng(1)
    for shape in ((1, 1), (1, 3, 5), (2, 8, 8)):
        values = rng.standard_normal(shape, dtype=np.float32)
        (found,) = call("quantile", values, np.float32(rho), opset=opset)
        assert found == pytest.approx(np.quantile(values, rho), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("points", [1, 2, 9])
def test_smooth_statistic(points):
    rng = np.random.default_rng(points)
    curve = [
        SmoothPoint(sigma=float(sigma), statistic={4: float(4 * a), 8: float(8 * b)})
        for sigma, (a, b) in zip(rng.uniform(0.1, 0.9, points), rng.uniform(0, 1, (points, 2)), strict=True)
    ]
    levels = sigmas(FlowMatchEulerInfo(**EULER, steps=12), 12, 256)
    knots = np.array(sorted(point.sigma for point in curve))
    rising = sorted(curve, key=lambda point: point.sigma)
    values = np.log([[point.statistic[4], point.statistic[8]] for point in rising])
    widths = np.diff(knots, append=knots[-1])
    slopes = np.diff(values, axis=0, append=values[-1:]) / np.where(widths > 0, widths, 1)[:, None]
    (found,) = call("smooth_statistic", levels, knots, widths, slopes, values[0])
    wanted = smooth_at(curve, levels)
    np.testing.assert_allclose(found, np.stack([wanted[4], wanted[8]], axis=1), rtol=1e-9)


@pytest.mark.parametrize("opset", [17, 23])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_adaptive_decides_as_the_policy_does(order, opset):
    """Step by step, over runs with errors of all sizes and levels that change."""
    rng = np.random.default_rng(order)
    levels = sigmas(FlowMatchEulerInfo(**EULER, steps=30), 30, 256)
    outcomes = set()
    for _ in range(8):
        tolerance = float(np.float32(10 ** rng.uniform(-3, 0)))
        policy = Reusing(Native(2), Adaptive(tolerance, order))
        history, state = RunHistory(levels), dict(HISTORY)
        level = 2
        for step in range(30):
            wanted = policy.decide(history)
            level = level if rng.uniform() < 0.8 else int(rng.choice([2, 4]))
            weights, correction, move, enough, expected = call(
                "predict_step",
                *levels[step : step + 2],
                *(state[name] for name in PREDICTING),
                np.int64(order),
                np.float32(tolerance),
                LONGEST,
                opset=opset,
            )
            assert enough == (wanted.level is None)
            outcomes.add(bool(enough))
            padded = [*wanted.prediction, *[0.0] * (3 - len(wanted.prediction))]
            assert weights == pytest.approx(padded, rel=1e-6, abs=1e-6)
            if not enough:
                assert correction == pytest.approx(wanted.correction, rel=1e-9, abs=1e-15)
            assert expected == pytest.approx(wanted.figures.get("expected_error", -1), rel=1e-6)
            missed = (rng.standard_normal((1, 3, 4)) * 10 ** rng.uniform(-3, 0)).astype(np.float32)
            decision = wanted if enough else policy.levels.decide(history)
            if not enough:
                decision = type(wanted)(level, wanted.prediction, wanted.correction)
            history.record(decision, missed, {})
            after = call(
                "remember_step",
                levels[step],
                np.int64(level),
                *state.values(),
                move,
                missed,
                np.int64(order),
                enough,
                opset=opset,
            )
            state = dict(zip(HISTORY, after, strict=True))
            assert state["last"] == history.levels[-1]
            level = history.levels[-1]
    assert outcomes == {True, False}


@pytest.mark.parametrize("opset", [17, 23])
@pytest.mark.parametrize("hold", [1, 3, 5])
def test_dynamic_decides_as_the_policy_does(hold, opset):
    rng = np.random.default_rng(hold)
    steps, native, coarse = 40, 2, (4, 8)
    levels = sigmas(FlowMatchEulerInfo(**EULER, steps=steps), steps, 256)
    smooth = {p: tuple(rng.uniform(0.5, 2, steps).tolist()) for p in coarse}
    policy = Dynamic(native, coarse, tau=1.0, rho=0.4, warmup=4, hold=hold, smooth=smooth)
    history, statistic, ran, running, last = RunHistory(levels), np.zeros(2, np.float32), set(), 0, 0
    for step in range(steps):
        wanted = policy.decide(history)
        (found,) = call(
            "dynamic_level",
            *map(np.int64, (step, last, running)),
            statistic,
            np.array([smooth[p][max(step - 1, 0)] for p in coarse]),
            np.array(coarse),
            np.int64(native),
            np.float32(1),
            *map(np.int64, (4, hold, 8)),
            opset=opset,
        )
        assert found == wanted.level
        ran.add(int(found))
        deviations = {p: rng.uniform(0, 3, (1, 3, 4)).astype(np.float32) for p in coarse}
        history.record(wanted, np.zeros((1, 1), np.float32), deviations)
        statistic = np.array([call("quantile", deviations[p], np.float32(0.4))[0] for p in coarse])
        running = running + 1 if found == last else 1
        last = found
    assert ran == {2, 4, 8}


@pytest.mark.parametrize(("listed", "wanted"), [(0, 8), (4, 4), (2, 2), (3, 2), (-1, 2)])
def test_listed_level(listed, wanted):
    patches = np.array([2, 4, 8])
    for step, levels in ((0, [listed, 8]), (7, [2, listed])):
        assert call("listed_level", np.int64(step), np.array(levels), patches, np.int64(2), np.int64(8)) == [wanted]


def test_pixels_are_the_decoder_s():
    from ddit.runtime.decoding import to_pixels

    halves = (np.arange(-4, 260, dtype=np.float32) + 0.5) / 127.5 - 1
    picture = np.stack([halves.reshape(12, 22)] * 3)
    np.testing.assert_array_equal(call("to_pixels", picture[None])[0], to_pixels(picture[:, None])[0])
