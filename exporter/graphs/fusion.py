"""The second stage of a level's twin: what lies between its matrix products in operators of the project's own.

The rules put the operators of `operators` where the first stage (`rewrite`) left several nodes that each pass over all
tokens. They go in small steps, so that each pattern is short; a step that finds nothing leaves the twin as it is:

=============================================  ====================================================================
in the twin                                    becomes
=============================================  ====================================================================
bias, then a branch (LoRA)                     the branch, then the bias
bias, gate, residual sum, ``Clip``             ``Residual``, ``GatedResidual``, ``…WithBranch``
``LayerNormalization`` with scale and shift    ``ModulatedNorm``; joined with the residual sum before it, ``…Norm``
bias, ``RMSNormalization``, ``Rotary…``        ``BiasNorm``, then ``BiasNormRotary``, of text and picture ``Joined…``
bias, ``FastGelu``, ``Concat``                 ``BiasGelu``, ``JoinedBiasGelu``, ``…WithBranch``
biases of text and picture, ``Concat``         ``JoinedBias``
heads taken apart and joined again             nothing
=============================================  ====================================================================

The kernels want channels that are a multiple of 8 and heads of a power of two. Where they are not, or not known, the
nodes stay.
"""

from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.rewriter import RewritePass, RewriteRuleClassBase, RewriteRuleSet

from ddit.exporter.graphs.operators import CHANNELS, CONTRIB, DOMAIN, HEADS, add_functions
from ddit.exporter.graphs.values import (
    WHOLE_HEADS,
    has_row_per_sample,
    heads,
    integers,
    is_bias,
    length,
    number,
)

FLOAT = ir.DataType.FLOAT
WITH_BRANCH = "WithBranch"


def fuse(model: ir.Model) -> None:
    """Put the operators of the domain ``ddit`` into a twin, in place, with the functions that say what they are."""
    for rules in STEPS:
        RewritePass(rules)(model)
    ir.passes.Sequential(
        common.RemoveUnusedNodesPass(),
        common.TopologicalSortPass(),  # the sum of a `…Norm` may be used before the norm was
    )(model)
    add_functions(model)


class BranchFirst(RewriteRuleClassBase):
    """The branch of a layer with LoRA is added before the bias, so that all that follows finds the bias last."""

    def pattern(self, op, product, bias, branch):
        """``product + bias + branch``."""
        return op.Add(op.Add(product, bias), branch)

    def check(self, context, product, bias, branch, **_):
        """Two products, and a vector between them."""
        return is_bias(bias) and _is_product(product) and _is_product(branch)

    def rewrite(self, op, product, bias, branch):
        """The same in another order."""
        return op.Add(op.Add(product, branch), bias)


class GatedResidual(RewriteRuleClassBase):
    """A residual sum with a gate that the timestep decides (DiT's adaLN-Zero)."""

    def pattern(self, op, x, y, bias, gate):
        """``x + gate · (y + bias)``, in any order."""
        return op.Add(x, op.Mul(gate, op.Add(y, bias)))

    def check(self, context, x, y, bias, gate, **_):
        """A linear layer's product and bias, and one row of gates for every sample."""
        return _is_tokens(x) and _is_linear(y, bias) and has_row_per_sample(gate)

    def rewrite(self, op, x, y, bias, gate, **_):
        """One operator."""
        return op.GatedResidual(x, y, bias, gate, _domain=DOMAIN)


class GatedResidualInFloat32(RewriteRuleClassBase):
    """The same in half precision's graphs whose gates are float32 (Wan)."""

    def pattern(self, op, wide, y, bias, gate, narrow):
        """``x + gate · (y + bias)``, computed in float32."""
        moved = op.Mul(gate, op.Cast(op.Add(y, bias), to=FLOAT))
        return op.Cast(op.Add(wide, moved), to=narrow)

    def check(self, context, wide, y, bias, gate, narrow, **_):
        """The sum's type is the one that was made wide."""
        return _narrow(wide, narrow) is not None and _is_linear(y, bias) and has_row_per_sample(gate)

    def rewrite(self, op, wide, y, bias, gate, narrow, **_):
        """One operator on the graph's type."""
        return op.GatedResidual(_narrow(wide, narrow), y, bias, gate, _domain=DOMAIN)


class Residual(RewriteRuleClassBase):
    """A residual sum without a gate (Wan's cross attention)."""

    def pattern(self, op, x, y, bias):
        """``x + (y + bias)``."""
        return op.Add(x, op.Add(y, bias))

    def check(self, context, x, y, bias, **_):
        """A linear layer's product and bias."""
        return _is_tokens(x) and _is_linear(y, bias)

    def rewrite(self, op, x, y, bias):
        """One operator."""
        return op.Residual(x, y, bias, _domain=DOMAIN)


class GatedResidualWithBranch(RewriteRuleClassBase):
    """The gated sum of a layer with LoRA."""

    def pattern(self, op, x, product, branch, bias, gate):
        """``x + gate · (product + branch + bias)``."""
        return op.GatedResidual(x, op.Add(product, branch), bias, gate, _domain=DOMAIN)

    def check(self, context, product, branch, **_):
        """Two products."""
        return _is_product(product) and _is_product(branch)

    def rewrite(self, op, x, product, branch, bias, gate):
        """One operator for all."""
        return op.GatedResidualWithBranch(x, product, bias, branch, gate, _domain=DOMAIN)


class Limited(RewriteRuleClassBase):
    """A sum whose numbers are cut to the largest ones that float16 holds."""

    def __init__(self, operator: str) -> None:
        super().__init__()
        self.operator = operator

    def pattern(self, op, lowest, highest):
        """``clip(sum, lowest, highest)``."""
        return op.Clip(_any(op, self.operator, "total"), lowest, highest)

    def check(self, context, lowest, highest, **_):
        """The limits are known, and as far from zero."""
        limit = number(highest)
        return limit is not None and limit > 0 and number(lowest) == -limit

    def rewrite(self, op, total, highest, **_):
        """The limit as an attribute."""
        return _again(op, total, limit=number(highest))


class ModulatedNorm(RewriteRuleClassBase):
    """A layer norm whose scale and shift the timestep decides, or a usual one with weights."""

    def pattern(self, op, x, scale, shift):
        """``norm(x) · scale + shift``."""
        return op.LayerNormalization(x, scale, shift, axis=-1, _outputs=["normed"])

    def check(self, context, x, scale, shift, normed, **_):
        """Scale and shift are one row for every sample or one for all, and the channels are known."""
        return _is_modulation(scale, shift) and _fits(_width(normed))

    def rewrite(self, op, x, scale, shift, normed, **_):
        """One operator, which adds the 1 of adaLN's ``1 + scale`` itself."""
        return _modulated(op, x, scale, shift, normed)


class ModulatedNormInFloat32(RewriteRuleClassBase):
    """The same in half precision's graphs that compute it in float32 (Wan)."""

    def pattern(self, op, wide, scale, shift, narrow):
        """``norm(x) · scale + shift``, computed in float32."""
        normed = op.LayerNormalization(wide, scale, shift, axis=-1, _outputs=["normed"])
        return op.Cast(normed, to=narrow, _outputs=["rounded"])

    def check(self, context, wide, scale, shift, narrow, rounded, **_):
        """The result's type is the one that was made wide."""
        return _narrow(wide, narrow) is not None and _is_modulation(scale, shift) and _fits(_width(rounded))

    def rewrite(self, op, wide, scale, shift, narrow, normed, **_):
        """One operator on the graph's type."""
        return _modulated(op, _narrow(wide, narrow), scale, shift, normed)


class SumAndNorm(RewriteRuleClassBase):
    """A residual sum and the norm of it, which reads the sum while it is at hand. The sum has other users too."""

    def __init__(self, operator: str) -> None:
        super().__init__()
        self.operator = operator

    def pattern(self, op, scale, shift):
        """The norm of the sum, and the sum."""
        total = _any(op, self.operator, "total")
        return op.ModulatedNorm(total, scale, shift, _outputs=["normed"], _domain=DOMAIN), total

    def rewrite(self, op, total, scale, shift, normed):
        """One operator with two outputs."""
        kind, branch, _ = self.operator.partition(WITH_BRANCH)
        name = f"{kind}Norm{branch}"
        total, normed = _again(op, total, name, scale, shift, _outputs=2, **_attributes(normed))
        return normed, total


class HeadsOfBoth(RewriteRuleClassBase):
    """Text and picture are joined after their heads are."""

    def pattern(self, op, text, x, whole):
        """The heads of both are joined at once."""
        return op.Reshape(op.Concat(text, x, axis=1), whole)

    def check(self, context, whole, **_):
        """(B, S, heads, size) → (B, S, heads · size)."""
        return integers(whole) == WHOLE_HEADS

    def rewrite(self, op, text, x, whole):
        """Each for itself."""
        return op.Concat(op.Reshape(text, whole), op.Reshape(x, whole), axis=1)


class BiasNorm(RewriteRuleClassBase):
    """The norm of queries or keys, head by head (FLUX)."""

    across = 0

    def pattern(self, op, x, bias, weight, shape, whole):
        """``norm(x + bias)`` of every head."""
        apart = op.Reshape(op.Add(x, bias), shape)
        normed = op.RMSNormalization(apart, weight, axis=-1, _outputs=["normed"])
        return op.Reshape(normed, whole)

    def check(self, context, x, bias, weight, shape, whole, **_):
        """The heads are known, and as the kernels want them."""
        found = heads(shape)
        if found is None or not _joins_again(bias, shape, whole):
            return False
        size = found[1]
        if self.across:
            return length(weight) == length(bias) and _fits(size)
        return length(weight) == size and size in HEADS

    def rewrite(self, op, x, bias, weight, shape, normed, **_):
        """One operator on (B, S, heads · size)."""
        found = heads(shape)
        assert found is not None
        options = {"num_heads": found[0], "epsilon": _epsilon(normed), "across": self.across}
        return op.BiasNorm(x, bias, weight, **options, _domain=DOMAIN)


class BiasNormAcross(BiasNorm):
    """The norm of queries or keys across all heads (Wan)."""

    across = 1

    def pattern(self, op, x, bias, weight, shape, whole):
        """``norm(x + bias)``, whose heads are taken apart and joined again."""
        normed = op.RMSNormalization(op.Add(x, bias), weight, axis=-1, _outputs=["normed"])
        return op.Reshape(op.Reshape(normed, shape), whole)


class WholeHeads(RewriteRuleClassBase):
    """Heads that are taken apart and joined again, as those of the values are."""

    def pattern(self, op, x, bias, shape, whole):
        """A linear layer's result, there and back."""
        return op.Reshape(op.Reshape(op.Add(x, bias), shape), whole)

    def check(self, context, bias, shape, whole, **_):
        """As many channels as the heads have together."""
        return _joins_again(bias, shape, whole)

    def rewrite(self, op, x, bias, **_):
        """The result itself."""
        return op.Add(x, bias)


class BiasNormRotary(RewriteRuleClassBase):
    """The rotary embedding of what was normed."""

    def pattern(self, op, x, bias, weight, first, cos, sin):
        """Norm, then embedding."""
        normed = op.BiasNorm(x, bias, weight, _outputs=["normed"], _domain=DOMAIN)
        return op.RotaryEmbedding(normed, first, cos, sin, interleaved=1, _domain=CONTRIB)

    def check(self, context, first, **_):
        """Positions are the rows of the tables, from the first on."""
        return integers(first) == [0]

    def rewrite(self, op, x, bias, weight, cos, sin, normed, **_):
        """One operator, whose tables are float32."""
        tables = (_table(op, cos), _table(op, sin))
        return op.BiasNormRotary(x, bias, weight, *tables, **_attributes(normed), _domain=DOMAIN)


class JoinedBiasNormRotary(RewriteRuleClassBase):
    """The same of text and picture after each other (FLUX's double blocks)."""

    def pattern(self, op, text, text_bias, text_weight, x, bias, weight, first, cos, sin):
        """Two norms, joined, then the embedding."""
        text = op.BiasNorm(text, text_bias, text_weight, _outputs=["text_normed"], _domain=DOMAIN)
        normed = op.BiasNorm(x, bias, weight, _outputs=["normed"], _domain=DOMAIN)
        return op.RotaryEmbedding(op.Concat(text, normed, axis=1), first, cos, sin, interleaved=1, _domain=CONTRIB)

    def check(self, context, first, text_normed, normed, **_):
        """The two are normed alike."""
        return _attributes(text_normed) == _attributes(normed) and integers(first) == [0]

    def rewrite(self, op, text, text_bias, text_weight, x, bias, weight, cos, sin, normed, **_):
        """One operator for both."""
        both = (text, text_bias, text_weight, x, bias, weight)
        tables = (_table(op, cos), _table(op, sin))
        return op.JoinedBiasNormRotary(*both, *tables, **_attributes(normed), _domain=DOMAIN)


class JoinedBias(RewriteRuleClassBase):
    """The values of text and picture after each other."""

    def pattern(self, op, text, text_bias, x, bias):
        """Two linear layers' results, joined."""
        return op.Concat(op.Add(text, text_bias), op.Add(x, bias), axis=1)

    def check(self, context, text, text_bias, x, bias, **_):
        """Products and their biases."""
        return _is_linear(text, text_bias) and _is_linear(x, bias)

    def rewrite(self, op, text, text_bias, x, bias):
        """One operator."""
        return op.JoinedBias(text, text_bias, x, bias, _domain=DOMAIN)


class BiasGelu(RewriteRuleClassBase):
    """A linear layer's bias, then gelu's tanh form."""

    def pattern(self, op, h, bias):
        """``gelu(h + bias)``."""
        return op.FastGelu(h, bias, _domain=CONTRIB)

    def check(self, context, h, bias, **_):
        """A product and its bias."""
        return _is_linear(h, bias)

    def rewrite(self, op, h, bias):
        """One operator."""
        return op.BiasGelu(h, bias, _domain=DOMAIN)


class BiasGeluWithBranch(RewriteRuleClassBase):
    """The same of a layer with LoRA."""

    def pattern(self, op, h, branch, bias):
        """``gelu(h + branch + bias)``."""
        return op.BiasGelu(op.Add(h, branch), bias, _domain=DOMAIN)

    def check(self, context, h, branch, **_):
        """Two products."""
        return _is_product(h) and _is_product(branch)

    def rewrite(self, op, h, branch, bias):
        """One operator for all."""
        return op.BiasGeluWithBranch(h, bias, branch, _domain=DOMAIN)


class JoinedBiasGelu(RewriteRuleClassBase):
    """The attention's result and the gelu beside each other (FLUX's single blocks)."""

    def __init__(self, operator: str) -> None:
        super().__init__()
        self.operator = operator

    def pattern(self, op, first):
        """``concat(first, gelu)``."""
        return op.Concat(first, _any(op, self.operator, "gelu"), axis=2, _outputs=["both"])

    def check(self, context, gelu, both, **_):
        """The channels of both are known."""
        return _fits(_width(both)) and is_bias(gelu.producer().inputs[1])

    def rewrite(self, op, first, gelu, **_):
        """One operator, which writes the gelu where it belongs."""
        inputs = [first, *gelu.producer().inputs]
        return getattr(op, f"Joined{self.operator}")(*inputs, _domain=DOMAIN)


def _any(op, operator: str, name: str):
    """The pattern of one of this domain's operators, whatever its inputs."""
    return getattr(op, operator)(_allow_other_inputs=True, _outputs=[name], _domain=DOMAIN)


def _again(op, value: ir.Value, operator: str | None = None, *more: ir.Value, _outputs: int = 1, **given):
    """The node that makes a value once more, with more inputs and attributes, or as another operator."""
    node = value.producer()
    assert node is not None
    options = _attributes(value) | given
    return getattr(op, operator or node.op_type)(*node.inputs, *more, **options, _domain=DOMAIN, _outputs=_outputs)


def _attributes(value: ir.Value) -> dict[str, Any]:
    """The attributes of the node that makes a value."""
    node = value.producer()
    return {} if node is None else {name: attribute.value for name, attribute in node.attributes.items()}


def _epsilon(normed: ir.Value) -> float:
    """What a norm adds before it takes the root; 1e-5 where it does not say, by ONNX."""
    return float(_attributes(normed).get("epsilon", 1e-5))


def _fits(channels: int | None) -> bool:
    """Whether the kernels take so many channels."""
    return channels is not None and channels % CHANNELS == 0


def _width(value: ir.Value) -> int | None:
    """The channels of a tensor that goes into a matrix product, which its weights (C, …) tell."""
    for user, index in value.uses():
        if user.op_type == "MatMul" and index == 0 and (weight := user.inputs[1]) is not None and weight.shape:
            return weight.shape[0] if isinstance(weight.shape[0], int) else None
    return None


def _is_tokens(value: ir.Value) -> bool:
    """Whether a value is computed for every token: neither stored nor a row that is repeated."""
    return value.producer() is not None and not has_row_per_sample(value)


def _is_product(value: ir.Value) -> bool:
    """Whether a value is a product of matrices, or a number of times one."""
    node = value.producer()
    if node is not None and node.op_type == "Mul" and node.inputs[1] is not None:
        node = node.inputs[0].producer() if node.inputs[0] and number(node.inputs[1]) is not None else None
    return node is not None and node.op_type == "MatMul"


def _is_linear(product: ir.Value, bias: ir.Value) -> bool:
    """Whether two values are what a linear layer adds, of channels that the kernels take."""
    node = product.producer()
    with_branch = node is not None and node.op_type == "Add" and all(one and _is_product(one) for one in node.inputs)
    return _fits(length(bias)) and (with_branch or _is_product(product))


def _joins_again(bias: ir.Value, shape: ir.Value, whole: ir.Value) -> bool:
    """Whether heads are taken apart from as many channels as a bias has, and joined to those again."""
    found = heads(shape)
    if found is None or integers(whole) != WHOLE_HEADS:
        return False
    return length(bias) == found[0] * found[1] and _fits(length(bias))


def _narrow(wide: ir.Value, narrow: ir.Attr) -> ir.Value | None:
    """The tensor of the type ``narrow`` that was cast to float32, if it was."""
    node = wide.producer()
    if node is None or node.op_type != "Cast" or node.attributes["to"].value != FLOAT:
        return None
    source = node.inputs[0]
    return source if source is not None and source.dtype == narrow.value else None


def _table(op, table: ir.Value):
    """A table of the rotary embedding in float32, as it was before it was rounded."""
    node = table.producer()
    exact = node.inputs[0] if node is not None and node.op_type == "Cast" else table
    return op.Cast(exact, to=FLOAT)


def _is_modulation(scale: ir.Value, shift: ir.Value) -> bool:
    """Whether scale and shift are one row for every sample, or one for all."""
    return all(has_row_per_sample(value) or is_bias(value) for value in (scale, shift))


def _modulated(op, x, scale, shift, normed):
    """The operator for a norm; a number that is added to its scale is taken in: 1 in adaLN, nothing elsewhere."""
    offset, factor, axes = 0.0, scale.producer(), None
    if factor is not None and factor.op_type == "Unsqueeze" and factor.inputs[0] is not None:
        factor, axes = factor.inputs[0].producer(), factor.inputs[1]
    if factor is not None and factor.op_type == "Add" and (added := number(factor.inputs[1])) is not None:
        offset = added
        scale = factor.inputs[0] if axes is None else op.Unsqueeze(factor.inputs[0], axes)
    return op.ModulatedNorm(x, scale, shift, epsilon=_epsilon(normed), offset=offset, _domain=DOMAIN)


SUMS = ("Residual", "GatedResidual", "GatedResidualWithBranch")
GELUS = ("BiasGelu", "BiasGeluWithBranch")

# in this order: what a step makes is what the next ones look for
STEPS = [
    [BranchFirst.rule()],
    RewriteRuleSet([GatedResidual.rule(), GatedResidualInFloat32.rule()], commute=True),
    [GatedResidualWithBranch.rule(), Residual.rule()],
    [Limited.rule(operator) for operator in SUMS],
    [ModulatedNormInFloat32.rule(), ModulatedNorm.rule()],
    [SumAndNorm.rule(operator) for operator in SUMS],
    [HeadsOfBoth.rule()],
    [BiasNorm.rule(), BiasNormAcross.rule(), WholeHeads.rule()],
    [JoinedBiasNormRotary.rule(), BiasNormRotary.rule(), JoinedBias.rule()],
    [BiasGelu.rule()],
    [BiasGeluWithBranch.rule()],
    [JoinedBiasGelu.rule(operator) for operator in GELUS],
]
