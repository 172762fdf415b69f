"""What a host computes around the graphs, as ONNX functions: docs/spec/sampling.md and docs/spec/policies.md.

Each is a function of the single model, under its own name. They use operators only in forms that opset 17 and opset 23
share, so that they fit a bundle of either. Arithmetic is float64 where the specification says so.
"""

from onnxscript import BOOL, DOUBLE, FLOAT, INT64, script, values
from onnxscript import opset17 as op

DOMAIN = "ddit.rules"
FLOAT32, INTEGER, FLOAT64 = 1, 7, 11  # ONNX's numbers of these types

rules = values.Opset(DOMAIN, 1)


@script(rules, default_opset=op)
def dynamic_shift(tokens: INT64, base: DOUBLE, slope: DOUBLE, base_tokens: DOUBLE) -> DOUBLE:
    """s = e^μ, with μ linear in the native image tokens."""
    return op.Exp(base + slope * (op.Cast(tokens, to=FLOAT64) - base_tokens))


@script(rules, default_opset=op)
def noise_levels(steps: INT64, last: DOUBLE, shift: DOUBLE) -> FLOAT:
    """σ₀ … σ_N of Euler's method, (N + 1,) float32; ``last`` is the last one before the shift, and 0 stands for 1/N."""
    number = op.Range(op.Constant(value_int=0), steps, op.Constant(value_int=1))
    count = op.Cast(steps, to=FLOAT64)
    end = op.Where(last > 0.0, last, 1.0 / count)
    even = op.Cast(number, to=FLOAT64) * ((end - 1.0) / op.Max(count - 1.0, 1.0)) + 1.0
    is_last = op.And(number == steps - 1, number > 0)
    u = op.Cast(op.Cast(op.Where(is_last, end, even), to=FLOAT32), to=FLOAT64)
    levels = op.Cast(shift * u / (1.0 + (shift - 1.0) * u), to=FLOAT32)
    return op.Concat(levels, op.Constant(value_floats=[0.0]), axis=0)


@script(rules, default_opset=op)
def position_tables(height: INT64, width: INT64, ratio: DOUBLE, by_row: DOUBLE, by_column: DOUBLE):
    """Rotary cosines and sines (rows, columns, D) of a level, from what an angle grows by along height and width."""
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    rows = (op.Cast(op.Range(zero, height, one), to=FLOAT64) + 0.5) * ratio - 0.5
    columns = (op.Cast(op.Range(zero, width, one), to=FLOAT64) + 0.5) * ratio - 0.5
    down = op.Unsqueeze(rows, op.Constant(value_ints=[1, 2])) * by_row
    across = op.Unsqueeze(columns, op.Constant(value_ints=[0, 2])) * by_column
    angle = down + across
    return op.Cast(op.Cos(angle), to=FLOAT32), op.Cast(op.Sin(angle), to=FLOAT32)


@script(rules, default_opset=op)
def smooth_statistic(
    sigmas: FLOAT,
    knots: DOUBLE,
    widths: DOUBLE,
    slopes: DOUBLE,
    start: DOUBLE,
) -> DOUBLE:
    """S_p after every step, (N, P) for P coarse patches.

    The curve's logarithm is linear in S segments. Each begins at its knot (S,) and adds its slopes (S, P) over its
    width (S,); ``start`` (P,) is the value before the first one.
    """
    sigma = op.Cast(sigmas, to=FLOAT64)
    before = op.Slice(sigma, op.Constant(value_ints=[0]), op.Constant(value_ints=[-1]), op.Constant(value_ints=[0]))
    after = op.Slice(
        sigma, op.Constant(value_ints=[1]), op.Constant(value_ints=[9223372036854775807]), op.Constant(value_ints=[0])
    )
    way = op.Max(op.Min(op.Unsqueeze(before, op.Constant(value_ints=[1])) - knots, widths), 0.0)
    logarithm = op.MatMul(way, slopes) + start
    # the mean length of the up to three steps that a third difference spans
    length = before - after
    total = op.CumSum(length, op.Constant(value_int=0))
    steps = op.Size(length)
    number = op.Range(op.Constant(value_int=0), steps, op.Constant(value_int=1))
    earlier = op.Where(number >= 3, op.Gather(total, op.Max(number - 3, 0)), 0.0)
    mean = (total - earlier) / op.Cast(op.Min(number + 1, 3), to=FLOAT64)
    return op.Exp(logarithm) * op.Unsqueeze(mean * mean * mean, op.Constant(value_ints=[1]))


@script(rules, default_opset=op)
def quantile(deviation: FLOAT, rho: FLOAT) -> FLOAT:
    """The ρ-quantile of the deviations, interpolated linearly from the nearer of two values, in float32."""
    flat = op.Reshape(deviation, op.Constant(value_ints=[-1]))
    count = op.Size(flat)
    rising, _places = op.TopK(flat, op.Unsqueeze(count, op.Constant(value_ints=[0])), largest=0)
    place = op.Cast(count - 1, to=FLOAT32) * rho
    below = op.Floor(place)
    share = place - below
    index = op.Cast(below, to=INTEGER)
    low = op.Gather(rising, index)
    high = op.Gather(rising, op.Min(index + 1, count - 1))
    return op.Where(share < 0.5, low + (high - low) * share, high - (high - low) * (1.0 - share))


@script(rules, default_opset=op)
def dynamic_level(
    step: INT64,
    last: INT64,
    running: INT64,
    statistic: FLOAT,
    smooth: DOUBLE,
    patches: INT64,
    native: INT64,
    tau: FLOAT,
    warmup: INT64,
    hold: INT64,
    coarsest: INT64,
) -> INT64:
    """The largest of P coarse patches whose statistic (P,) lies under τ times a smooth picture's (P,).

    ``last`` is the level of the last step, which has run for ``running`` steps.
    """
    warm = step >= op.Max(warmup, 3)
    judged = op.And(warm, running >= op.Min(hold, step))
    under = op.Cast(statistic, to=FLOAT64) < op.Cast(tau, to=FLOAT64) * smooth
    found = op.ReduceMax(op.Where(op.And(under, patches <= coarsest), patches, native), keepdims=0)
    return op.Where(judged, found, op.Where(warm, last, native))


@script(rules, default_opset=op)
def listed_level(step: INT64, levels: INT64, patches: INT64, native: INT64, content: INT64) -> INT64:
    """The entry of ``levels`` (M,) for a step, the last one where there are fewer; 0 asks for what the content says.

    ``patches`` (Q,) are those that there are; any other entry is the native one.
    """
    listed = op.Gather(levels, op.Min(step, op.Size(levels) - 1))
    known = op.ReduceMax(op.Cast(patches == listed, to=INTEGER), keepdims=0) > 0
    return op.Where(listed == 0, content, op.Where(known, listed, native))


@script(rules, default_opset=op)
def predict_step(
    sigma: FLOAT,
    after: FLOAT,
    nodes: DOUBLE,
    known: INT64,
    error: DOUBLE,
    signed: DOUBLE,
    absolute: DOUBLE,
    order: INT64,
    tolerance: FLOAT,
    longest: DOUBLE,
):
    """The adaptive policy at one step.

    Args:
        sigma, after: σ_i and σ_{i+1}.
        nodes: (4,) noise levels of the computed steps at the level, the newest first; ``known`` of them mean something.
        error: E, or below 0 where nothing is known of it.
        signed, absolute: Σ P_j and Σ |P_j| over the steps since the last computed one, without this one.
        order, tolerance, longest: q, the tolerance, and the factor by which 1 − σ may grow.

    Returns:
        the weights of the three kept velocities; the correction; this step's P; whether it needs no level; and the
        expected error, below 0 where it is not known.
    """
    now, then = op.Cast(sigma, to=FLOAT64), op.Cast(after, to=FLOAT64)
    place = op.Constant(value_ints=[0, 1, 2, 3])
    product = op.ReduceProd(op.Where(place <= order, now - nodes, 1.0), keepdims=0)
    ready = known > order
    # Lagrange's weights, one column of factors for each other node
    column = op.Constant(value_ints=[0, 1, 2])
    used = column <= order
    three = op.Slice(nodes, op.Constant(value_ints=[0]), op.Constant(value_ints=[3]))
    row = op.Unsqueeze(column, op.Constant(value_ints=[1]))
    factor = (now - three) / (op.Unsqueeze(three, op.Constant(value_ints=[1])) - three)
    factor = op.Where(op.And(used, op.Not(row == column)), factor, 1.0)
    weights = op.Gather(factor, 0, axis=1) * op.Gather(factor, 1, axis=1) * op.Gather(factor, 2, axis=1)
    weights = op.Where(op.And(used, ready), weights, 0.0)
    move = op.Where(ready, (then - now) * product, 0.0)
    correction = op.Where(ready, signed / product, 0.0)
    # what the last prediction missed is the next divided difference, at the nodes before it
    newest = op.Gather(nodes, 0)
    earlier = op.ReduceProd(op.Where(op.And(place >= 1, place <= order + 1), newest - nodes, 1.0), keepdims=0)
    expected = error / op.Abs(earlier) * (absolute + op.Abs(move)) / (1.0 - then)
    measured = op.And(known >= order + 2, error >= 0.0)
    near = 1.0 - then <= longest * (1.0 - newest)
    enough = op.And(op.And(measured, near), expected < op.Cast(tolerance, to=FLOAT64))
    shown = op.Cast(op.Where(measured, expected, -1.0), to=FLOAT32)
    return op.Cast(weights, to=FLOAT32), correction, move, enough, shown


@script(rules, default_opset=op)
def remember_step(
    sigma: FLOAT,
    level: INT64,
    last: INT64,
    running: INT64,
    nodes: DOUBLE,
    known: INT64,
    error: DOUBLE,
    signed: DOUBLE,
    absolute: DOUBLE,
    move: DOUBLE,
    missed: FLOAT,
    order: INT64,
    predicted: BOOL,
):
    """The history after a step: its level, how many steps that has run, and what `predict_step` looks at.

    A predicted step has the level of the one before. ``missed`` is the step graph's prediction error.
    """
    squares = op.Cast(missed, to=FLOAT64)
    found = op.Sqrt(op.ReduceSum(squares * squares, keepdims=0) / op.Cast(op.Size(missed), to=FLOAT64))
    found = op.Where(known > order, found, -1.0)
    now = op.Unsqueeze(op.Cast(sigma, to=FLOAT64), op.Constant(value_ints=[0]))
    older = op.Slice(nodes, op.Constant(value_ints=[0]), op.Constant(value_ints=[3]))
    same = level == last
    next_level = op.Where(predicted, last, level)
    next_running = op.Where(next_level == last, running + 1, 1)
    next_nodes = op.Where(predicted, nodes, op.Concat(now, older, axis=0))
    next_known = op.Where(predicted, known, op.Where(same, op.Min(known + 1, 4), 1))
    next_error = op.Where(predicted, error, found)
    next_signed = op.Where(predicted, signed + move, 0.0)
    next_absolute = op.Where(predicted, absolute + op.Abs(move), 0.0)
    return next_level, next_running, next_nodes, next_known, next_error, next_signed, next_absolute


@script(rules, default_opset=op)
def to_pixels(image: FLOAT):
    """RGB (1, 3, H, W) in [−1, 1] → 8 bits, (H, W, 3), a half rounded to the even number."""
    clipped = op.Max(op.Min(image, 1.0), -1.0)
    whole = op.Round((clipped + 1.0) * 127.5)
    rows = op.Transpose(op.Squeeze(whole, op.Constant(value_ints=[0])), perm=[1, 2, 0])
    return op.Cast(rows, to=2)


RULES = {
    rule.name: rule
    for rule in (
        dynamic_shift,
        noise_levels,
        position_tables,
        smooth_statistic,
        quantile,
        dynamic_level,
        listed_level,
        predict_step,
        remember_step,
        to_pixels,
    )
}
