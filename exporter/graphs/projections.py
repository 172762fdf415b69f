"""Rules of a twin's second stage for what follows a projection: the norms of queries and keys, biases, gelu."""

import onnx_ir as ir
from onnxscript.rewriter import RewriteRuleClassBase

from ddit.exporter.graphs.operators import CONTRIB, DOMAIN, HEADS
from ddit.exporter.graphs.values import (
    FLOAT,
    WHOLE_HEADS,
    any_of,
    attributes_of,
    epsilon_of,
    fits_kernels,
    heads,
    integers,
    is_bias,
    is_linear,
    is_product,
    length,
    width_of,
)

GELUS = ("BiasGelu", "BiasGeluWithBranch")


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
            return length(weight) == length(bias) and fits_kernels(size)
        return length(weight) == size and size in HEADS

    def rewrite(self, op, x, bias, weight, shape, normed, **_):
        """One operator on (B, S, heads · size)."""
        found = heads(shape)
        assert found is not None
        options = {"num_heads": found[0], "epsilon": epsilon_of(normed), "across": self.across}
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
        return op.BiasNormRotary(x, bias, weight, *tables, **attributes_of(normed), _domain=DOMAIN)


class JoinedBiasNormRotary(RewriteRuleClassBase):
    """The same of text and picture after each other (FLUX's double blocks)."""

    def pattern(self, op, text, text_bias, text_weight, x, bias, weight, first, cos, sin):
        """Two norms, joined, then the embedding."""
        text = op.BiasNorm(text, text_bias, text_weight, _outputs=["text_normed"], _domain=DOMAIN)
        normed = op.BiasNorm(x, bias, weight, _outputs=["normed"], _domain=DOMAIN)
        return op.RotaryEmbedding(op.Concat(text, normed, axis=1), first, cos, sin, interleaved=1, _domain=CONTRIB)

    def check(self, context, first, text_normed, normed, **_):
        """The two are normed alike."""
        return attributes_of(text_normed) == attributes_of(normed) and integers(first) == [0]

    def rewrite(self, op, text, text_bias, text_weight, x, bias, weight, cos, sin, normed, **_):
        """One operator for both."""
        both = (text, text_bias, text_weight, x, bias, weight)
        tables = (_table(op, cos), _table(op, sin))
        return op.JoinedBiasNormRotary(*both, *tables, **attributes_of(normed), _domain=DOMAIN)


class JoinedBias(RewriteRuleClassBase):
    """The values of text and picture after each other."""

    def pattern(self, op, text, text_bias, x, bias):
        """Two linear layers' results, joined."""
        return op.Concat(op.Add(text, text_bias), op.Add(x, bias), axis=1)

    def check(self, context, text, text_bias, x, bias, **_):
        """Products and their biases."""
        return is_linear(text, text_bias) and is_linear(x, bias)

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
        return is_linear(h, bias)

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
        return is_product(h) and is_product(branch)

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
        return op.Concat(first, any_of(op, self.operator, "gelu"), axis=2, _outputs=["both"])

    def check(self, context, gelu, both, **_):
        """The channels of both are known."""
        return fits_kernels(width_of(both)) and is_bias(gelu.producer().inputs[1])

    def rewrite(self, op, first, gelu, **_):
        """One operator, which writes the gelu where it belongs."""
        inputs = [first, *gelu.producer().inputs]
        return getattr(op, f"Joined{self.operator}")(*inputs, _domain=DOMAIN)


def _joins_again(bias: ir.Value, shape: ir.Value, whole: ir.Value) -> bool:
    """Whether heads are taken apart from as many channels as a bias has, and joined to those again."""
    found = heads(shape)
    if found is None or integers(whole) != WHOLE_HEADS:
        return False
    return length(bias) == found[0] * found[1] and fits_kernels(length(bias))


def _table(op, table: ir.Value):
    """A table of the rotary embedding in float32, as it was before it was rounded."""
    node = table.producer()
    exact = node.inputs[0] if node is not None and node.op_type == "Cast" else table
    return exact if exact is not None and exact.dtype == FLOAT else op.Cast(exact, to=FLOAT)
