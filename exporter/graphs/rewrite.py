"""A level's graph for ONNX Runtime's CUDA provider: a twin of the standard one, in operators that have one kernel each.

Between its matrix products a level spends as much time on small kernels as another compiler spends on everything but
the products (docs/tensorrt.md). ONNX Runtime has operators of its own (domain ``com.microsoft``) that do more in one
pass over the tokens. The twin uses them where they compute exactly what stands in the graph:

===========================================  ====================================================================
in the standard graph                        in the twin
===========================================  ====================================================================
the rotary embedding in about ten nodes,     ``RotaryEmbedding`` in the graph's type, its tables cast once
in float32
four ``Transpose`` around ``Attention``      ``MultiHeadAttention``, which takes (B, S, heads · size) as it is
bias, then ``Gelu`` (tanh)                   ``FastGelu`` with the bias
``LayerNormalization``, scale, shift         one ``LayerNormalization`` whose scale and bias have a row per sample
a branch times its scale, if that is 1       the branch
``Max``, then ``Min`` (fp16's overflow)      ``Clip``
tokens cut in two and joined again           nothing
===========================================  ====================================================================

What the library has no operator for is left to a second stage (`fusion`). The twin names the same tensors of the same
weight files, so that sessions share them with every other level. Nothing is copied.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.rewriter import MatchResult, RewritePass, RewriteRuleClassBase

from ddit.exporter.graphs.fusion import fuse
from ddit.exporter.graphs.operators import CONTRIB, CONTRIB_VERSION
from ddit.exporter.graphs.trace import quiet
from ddit.exporter.graphs.values import (
    WHOLE_HEADS,
    constant,
    has_row_per_sample,
    heads,
    integers,
    is_all_ones,
    is_bias,
    number,
)

OPSET = 23  # the first with Attention as one node
BACKEND = "cuda"  # that runs the twins, by its name in the registry
TO_THE_END = np.iinfo(np.int64).max  # torch's end of a slice that has none


@dataclass(frozen=True)
class Twin:
    """A level's twin, or why it has none."""

    file: str | None
    why_not: str = ""


def write_twin(path: Path) -> Twin:
    """Write the twin of a level's graph beside it, as ``<name>.cuda.onnx``.

    None is written where an attention of the graph does not look as these rules expect it: the graph itself is the one
    to run then.
    """
    model = ir.load(path)
    try:
        rewrite(model)
    except ValueError as error:
        return Twin(None, str(error))
    file = f"{path.stem}.{BACKEND}.onnx"
    ir.save(model, path.with_name(file))
    return Twin(file)


def rewrite(model: ir.Model) -> None:
    """Rewrite a level's graph in place. Raises `ValueError` where that cannot be done to all of it."""
    attentions = _count(model, "Attention")
    if not attentions:
        raise ValueError("it has no Attention node")
    with quiet():
        # in this order: the attention is recognised by the rotary embeddings that feed it
        for rule in (Rotary, RotaryInFloat32, Attention):
            RewritePass([rule.rule()])(model)
        if left := _count(model, "Attention"):
            raise ValueError(f"{left} of its {attentions} attentions are unlike those that can be rewritten")
        RewritePass([kind.rule() for kind in (TimesOne, Gelu, GeluOfBranch, Modulation, Limits, SplitAndJoined)])(model)
        model.opset_imports[CONTRIB] = CONTRIB_VERSION
        common.IdentityEliminationPass()(model)
        fuse(model)
        # not `tidy`, which compares initializers by their values: here they have some, in files of many gigabytes
        ir.passes.Sequential(
            common.IdentityEliminationPass(),
            common.CommonSubexpressionEliminationPass(),
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            common.RemoveUnusedNodesPass(),
            common.NameFixPass(),
        )(model)


class Rotary(RewriteRuleClassBase):
    """``x · cos + turned(x) · sin``, where ``turned`` makes (−b, a) of every pair (a, b) of neighbours (RoFormer).

    The tables (S, size) hold every number twice, once for each of a pair; the operator wants it once. Its positions are
    then the table's rows from 0 on.
    """

    in_float32 = False

    def pattern(self, op, x, pairs, first, second, third, last, shape, cos, sin):
        """The chain of diffusers' `apply_rotary_emb` on (B, S, heads, size)."""
        paired = op.Reshape(x, pairs)
        a = op.Squeeze(op.Slice(paired, first, second, last), last)
        b = op.Squeeze(op.Slice(paired, second, third, last), last)
        turned = op.Concat(op.Unsqueeze(op.Neg(b), last), op.Unsqueeze(a, last), axis=-1)
        turned = op.Reshape(turned, shape)
        if self.in_float32:
            x, turned = op.Cast(x, to=ir.DataType.FLOAT), op.Cast(turned, to=ir.DataType.FLOAT)
        rotated = op.Add(op.Mul(x, cos), op.Mul(turned, sin))
        return op.Cast(rotated, _outputs=["rounded"]) if self.in_float32 else rotated

    def check(self, context, first, second, third, last, shape, cos, sin, **_):
        """Pairs of neighbours, a known number of heads, and tables (S, size) that are the same for all heads."""
        result = MatchResult()
        if [integers(value) for value in (first, second, third, last)] != [[0], [1], [2], [-1]]:
            return result.fail("other elements than neighbours are turned")
        if heads(shape) is None:
            return result.fail("the number of heads is not fixed")
        if _table(cos) is None or _table(sin) is None:
            return result.fail("the tables differ between heads or samples")
        return result

    def rewrite(self, op, x, shape, cos, sin, rounded=None, **_):
        """One operator on (B, S, heads · size)."""
        tables = []
        for table in (_table(cos), _table(sin)):
            assert table is not None
            halved = op.Slice(table, constant(op, [0]), constant(op, [TO_THE_END]), constant(op, [1]),
                              constant(op, [2]))  # fmt: skip
            halved.dtype = table.dtype
            to = rounded.producer().attributes["to"].value if self.in_float32 else None
            tables.append(op.Cast(halved, to=to) if to else halved)
        joined = op.Reshape(x, constant(op, WHOLE_HEADS))
        rotated = op.RotaryEmbedding(joined, constant(op, [0]), *tables, interleaved=1, _domain=CONTRIB)
        return op.Reshape(rotated, shape)


class RotaryInFloat32(Rotary):
    """The same in half precision's graphs, which compute it in float32; the tables are rounded instead."""

    in_float32 = True


class Attention(RewriteRuleClassBase):
    """``Attention`` between transposes, to (B, heads, S, size) and back."""

    def pattern(self, op, query, key, value, shape):
        """Query, key and value (B, S, heads, size), the result (B, S, heads · size)."""
        swapped = [op.Transpose(tensor, perm=[0, 2, 1, 3]) for tensor in (query, key, value)]
        attended = op.Attention(*swapped, _outputs=["attended"])
        return op.Reshape(op.Transpose(attended, perm=[0, 2, 1, 3]), shape)

    def check(self, context, query, attended, **_):
        """Neither a mask nor anything else that the standard node may do, and a known number of heads."""
        result = MatchResult()
        usual = {"is_causal": 0, "qk_matmul_output_mode": 0, "softcap": 0.0}
        given = {name: attribute.value for name, attribute in attended.producer().attributes.items()}
        if any(name != "scale" and usual.get(name) != value for name, value in given.items()):
            return result.fail("the attention does more than attend")
        if _heads_of(query) is None:
            return result.fail("the number of heads is not fixed")
        return result

    def rewrite(self, op, query, key, value, attended, **_):
        """One operator on (B, S, heads · size)."""
        scale = attended.producer().attributes.get("scale")
        options = {} if scale is None else {"scale": scale.value}
        joined = [_joined(op, tensor) for tensor in (query, key, value)]
        return op.MultiHeadAttention(*joined, num_heads=_heads_of(query), **options, _domain=CONTRIB)


class TimesOne(RewriteRuleClassBase):
    """The scale of a LoRA whose alpha is its rank."""

    def pattern(self, op, branch, scale):
        """``branch · scale``."""
        return op.Mul(branch, scale)

    def check(self, context, scale, **_):
        """The scale is 1."""
        return number(scale) == 1

    def rewrite(self, op, branch, **_):
        """The branch as it is."""
        return op.Identity(branch)


class Gelu(RewriteRuleClassBase):
    """A linear layer's bias, then gelu's tanh form."""

    def pattern(self, op, product, bias):
        """``gelu(product + bias)``."""
        return op.Gelu(op.Add(product, bias), approximate="tanh")

    def check(self, context, bias, **_):
        """The bias is a vector."""
        return is_bias(bias)

    def rewrite(self, op, product, bias):
        """One operator for both."""
        return op.FastGelu(product, bias, _domain=CONTRIB)


class GeluOfBranch(RewriteRuleClassBase):
    """The same for a layer with LoRA, whose branch is added after the bias."""

    def pattern(self, op, product, bias, branch):
        """``gelu(product + bias + branch)``."""
        return op.Gelu(op.Add(op.Add(product, bias), branch), approximate="tanh")

    def check(self, context, bias, **_):
        """The bias is a vector."""
        return is_bias(bias)

    def rewrite(self, op, product, bias, branch):
        """The branch is added first."""
        return op.FastGelu(op.Add(product, branch), bias, _domain=CONTRIB)


class Modulation(RewriteRuleClassBase):
    """A layer norm without weights, scaled and shifted by numbers (B, 1, C) that the timestep decides (DiT's adaLN)."""

    def pattern(self, op, x, ones, scale, shift):
        """``norm(x) · scale + shift``."""
        return op.Add(op.Mul(op.LayerNormalization(x, ones, axis=-1, _outputs=["normed"]), scale), shift)

    def check(self, context, ones, scale, shift, **_):
        """ONNX Runtime's kernel takes scale and bias of one shape, (B, 1, C) for (B, S, C)."""
        result = MatchResult()
        if not is_all_ones(ones):
            return result.fail("the norm has weights of its own")
        if not (has_row_per_sample(scale) and has_row_per_sample(shift)):
            return result.fail("scale or shift is not one row for every sample")
        return result

    def rewrite(self, op, x, scale, shift, normed, **_):
        """The norm with scale and shift as its own."""
        attributes = {name: one.value for name, one in normed.producer().attributes.items()}
        return op.LayerNormalization(x, scale, shift, **attributes)


class Limits(RewriteRuleClassBase):
    """Numbers that float16 cannot hold are cut to its largest ones."""

    def pattern(self, op, x, lowest, highest):
        """``min(max(x, lowest), highest)``."""
        return op.Min(op.Max(x, lowest), highest)

    def check(self, context, lowest, highest, **_):
        """Both limits are single numbers that are known."""
        return number(lowest) is not None and number(highest) is not None

    def rewrite(self, op, x, lowest, highest):
        """One operator."""
        return op.Clip(x, lowest, highest)


class SplitAndJoined(RewriteRuleClassBase):
    """Tokens that are cut into text and picture and joined again, between diffusers' single blocks."""

    def pattern(self, op, x, start, middle, end, axis, step):
        """``concat(x[:n], x[n:])``."""
        return op.Concat(op.Slice(x, start, middle, axis, step), op.Slice(x, middle, end, axis, step), axis=1)

    def check(self, context, start, end, axis, step, **_):
        """All of the second axis."""
        found = [integers(value) for value in (start, end, axis, step)]
        return found == [[0], [TO_THE_END], [1], [1]]

    def rewrite(self, op, x, **_):
        """What was cut."""
        return op.Identity(x)


def _count(model: ir.Model, operator: str) -> int:
    return sum(node.op_type == operator for node in model.graph)


def _heads_of(tensor: ir.Value) -> int | None:
    """The heads of a tensor that was made (B, S, heads, size) just before."""
    node = tensor.producer()
    if node is None or node.op_type != "Reshape" or node.inputs[1] is None:
        return None
    found = heads(node.inputs[1])
    return found[0] if found else None


def _joined(op, tensor: ir.Value):
    """(B, S, heads, size) → (B, S, heads · size): what a rotary embedding gave, before its heads were taken apart."""
    node = tensor.producer()
    source = node.inputs[0] if node is not None and node.op_type == "Reshape" else None
    made_by = source.producer() if source is not None else None
    if source is not None and made_by is not None and made_by.op_type == "RotaryEmbedding":
        return source
    return op.Reshape(tensor, constant(op, WHOLE_HEADS))


def _table(value: ir.Value) -> ir.Value | None:
    """The table (S, size) behind one that was made (1, S, 1, size)."""
    for axes in ([2], [0]):
        node = value.producer()
        if node is None or node.op_type != "Unsqueeze" or integers(node.inputs[1]) != axes:
            return None
        assert node.inputs[0] is not None
        value = node.inputs[0]
    return value
