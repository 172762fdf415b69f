"""Rules of a twin's second stage for residual sums and norms: gates, branches, modulation."""

import onnx_ir as ir
from onnxscript.rewriter import RewriteRuleClassBase

from ddit.exporter.graphs.operators import DOMAIN
from ddit.exporter.graphs.values import (
    FLOAT,
    any_of,
    attributes_of,
    epsilon_of,
    fits_kernels,
    has_row_per_sample,
    is_bias,
    is_linear,
    is_product,
    number,
    width_of,
)

WITH_BRANCH = "WithBranch"
SUMS = ("Residual", "GatedResidual", f"GatedResidual{WITH_BRANCH}")


class BranchFirst(RewriteRuleClassBase):
    """The branch of a layer with LoRA is added before the bias, so that all that follows finds the bias last."""

    def pattern(self, op, product, bias, branch):
        """``product + bias + branch``."""
        return op.Add(op.Add(product, bias), branch)

    def check(self, context, product, bias, branch, **_):
        """Two products, and a vector between them."""
        return is_bias(bias) and is_product(product) and is_product(branch)

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
        return _is_tokens(x) and is_linear(y, bias) and has_row_per_sample(gate)

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
        return _narrow(wide, narrow) is not None and is_linear(y, bias) and has_row_per_sample(gate)

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
        return _is_tokens(x) and is_linear(y, bias)

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
        return is_product(product) and is_product(branch)

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
        return op.Clip(any_of(op, self.operator, "total"), lowest, highest)

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
        return _is_modulation(scale, shift) and fits_kernels(width_of(normed))

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
        return _narrow(wide, narrow) is not None and _is_modulation(scale, shift) and fits_kernels(width_of(rounded))

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
        total = any_of(op, self.operator, "total")
        return op.ModulatedNorm(total, scale, shift, _outputs=["normed"], _domain=DOMAIN), total

    def rewrite(self, op, total, scale, shift, normed):
        """One operator with two outputs."""
        kind, branch, _ = self.operator.partition(WITH_BRANCH)
        name = f"{kind}Norm{branch}"
        total, normed = _again(op, total, name, scale, shift, _outputs=2, **attributes_of(normed))
        return normed, total


def _again(op, value: ir.Value, operator: str | None = None, *more: ir.Value, _outputs: int = 1, **given):
    """The node that makes a value once more, with more inputs and attributes, or as another operator."""
    node = value.producer()
    assert node is not None
    options = attributes_of(value) | given
    return getattr(op, operator or node.op_type)(*node.inputs, *more, **options, _domain=DOMAIN, _outputs=_outputs)


def _is_tokens(value: ir.Value) -> bool:
    """Whether a value is computed for every token: neither stored nor a row that is repeated."""
    return value.producer() is not None and not has_row_per_sample(value)


def _narrow(wide: ir.Value, narrow: ir.Attr) -> ir.Value | None:
    """The tensor of the type ``narrow`` that was cast to float32, if it was."""
    node = wide.producer()
    if node is None or node.op_type != "Cast" or node.attributes["to"].value != FLOAT:
        return None
    source = node.inputs[0]
    return source if source is not None and source.dtype == narrow.value else None


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
    return op.ModulatedNorm(x, scale, shift, epsilon=epsilon_of(normed), offset=offset, _domain=DOMAIN)
