"""Floating point operations of a bundle's levels, counted in their graphs.

    level_flops(Bundle.open("demo.bundle"), size=Size(256, 256))     # {2: 4.05e9, 4: 1.25e9, 8: 0.54e9}

A matrix product of (m, k) and (k, n) is 2·m·k·n operations, one multiplication and one addition for every term, as in
torch's `FlopCounterMode`. Products, convolutions and attention are counted; norms and activations are left out, as is
usual. A transformer step on N tokens is then about 2·N·(weights of the linear layers) + 4·N²·width for every attention.
A level with a quarter of the image's tokens costs more than a quarter: the text's tokens stay, and the adapter adds.
"""

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

import onnx_ir as ir
from onnxscript import optimizer

from ddit.runtime import Bundle
from ddit.runtime.conditioning.guidance import is_guided
from ddit.runtime.errors import BundleError
from ddit.runtime.shapes import Size

COUNTED = {"MatMul", "Gemm", "Conv", "Attention"}


def level_flops(
    bundle: Bundle, *, size: Size, text: int | None = None, guidance: float | None = None
) -> dict[int, float]:
    """Operations of one denoising step of one picture or clip, by level.

    ``text`` is the number of text tokens, the bundle's own when None. A step that is guided by two passes at the scale
    ``guidance``, the bundle's when None, runs its level twice. Raises `UsageError` for a size that the bundle cannot
    make, `BundleError` where a graph's shapes cannot be found.
    """
    manifest = bundle.manifest
    sizes = manifest.sizes(size, text=manifest.text_length if text is None else text)
    scale = manifest.guidance.default if guidance is None else guidance
    passes = 2 if is_guided(manifest.guidance, scale) else 1
    flops = {}
    for patch in manifest.patches:
        info = bundle.graph(manifest.level(patch).graph)
        shapes = {spec.name: spec.resolve(sizes) for spec in info.inputs}
        flops[patch] = passes * graph_flops(bundle.file(info.file), shapes)
    return flops


def graph_flops(path: Path, shapes: Mapping[str, Sequence[int]]) -> float:
    """Operations of a level's graph on inputs of these shapes; its weights are not read."""
    model = ir.load(path)
    for value in model.graph.inputs:
        value.shape = ir.Shape(shapes[value.name or ""])
    for node in model.graph:  # the symbolic shapes that the exporter left would hide the numbers
        for output in node.outputs:
            output.shape = None
    for initializer in model.graph.initializers.values():
        if isinstance(initializer.const_value, ir.ExternalTensor):
            initializer.const_value = None  # so that nothing is folded with it
    optimizer.fold_constants(model, onnx_shape_inference=True)  # the arithmetic on shapes: all of them become numbers
    return float(sum(_node_flops(node, path.name) for node in model.graph if node.op_type in COUNTED))


def _node_flops(node: ir.Node, file: str) -> int:
    first, second = _shape(node.inputs[0], file), _shape(node.inputs[1], file)
    result = _shape(node.outputs[0], file)
    if node.op_type == "Conv":  # weight (out, in, …): every output value takes in·… terms
        return 2 * prod(result) * prod(second[1:])
    if node.op_type == "Attention":  # queries (…, n, d), keys (…, m, d), values (…, m, e) → n·m·(d + e) terms
        return 2 * prod(first[:-1]) * second[-2] * (first[-1] + result[-1])
    transposed = node.op_type == "Gemm" and node.attributes.get_int("transA")
    return 2 * prod(result) * first[-2 if transposed else -1]


def _shape(value: ir.Value | None, file: str) -> tuple[int, ...]:
    shape = value.shape if value is not None else None
    if shape is None or not shape.is_static():
        raise BundleError(f"{file}: the shape of {value and value.name} cannot be found; export the bundle again")
    return tuple(shape.numpy())
