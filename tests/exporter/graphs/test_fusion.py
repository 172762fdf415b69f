"""The second stage of a level's twin: which operators it puts where, and that the level computes what it did."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from diffusers import WanTransformer3DModel

from ddit.exporter.families.wan.model import Wan
from ddit.exporter.families.wan.original import native_velocity
from ddit.exporter.graphs import projections, rewrite, values
from ddit.exporter.graphs.operators import DOMAIN
from ddit.exporter.graphs.rewrite import write_twin
from ddit.runtime import Bundle
from ddit.runtime.backends.onnxruntime.host import OnnxRuntimeEngine, open_session
from ddit.runtime.conditioning.positions import level_tables
from ddit.runtime.tools.samples import sample_inputs
from ddit.runtime.tools.verify import relative_error
from tiny import half_precision_level

DOUBLE, SINGLE = 1, 2  # blocks of the tiny FLUX,
WAN_BLOCKS = 2  # and of the tiny Wan
FUSED = {
    "LayerNormalization",
    "RMSNormalization",
    "RotaryEmbedding",
    "FastGelu",
    "Clip",
}  # what stays in functions only

FLUX_SIZES = {"B": 2, "H": 24, "W": 16, "L": 11}
WAN_SIZES = {"B": 2, "F": 3, "H": 16, "W": 24, "L": 11}


def operators(graph: ir.Graph) -> Counter:
    """The operators of the domain ``ddit`` in a graph."""
    return Counter(node.op_type for node in graph if node.domain == DOMAIN)


def level_inputs(bundle: Path, patch: int, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    manifest = Bundle.open(bundle).manifest
    tables = level_tables(manifest.positions, manifest.latent, manifest.native, patch, sizes)
    return sample_inputs(manifest.graphs[f"level-{patch}"].inputs, sizes, seed=patch, tables=tables)


def velocity(path: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    return OnnxRuntimeEngine(open_session(path), path.name).run(inputs)["velocity"]


def flux_operators(branch: str) -> Counter:
    """FLUX's, with LoRA in the feed-forward layers and the single blocks or not."""
    found = {
        # where the tokens come in, where text and picture are joined, and at the end
        "ModulatedNorm": 2 + 1 + 1,
        "JoinedBiasNormRotary": 2 * DOUBLE,
        "BiasNormRotary": 2 * SINGLE,
        "JoinedBias": DOUBLE,
        f"BiasGelu{branch}": 2 * DOUBLE,
        f"JoinedBiasGelu{branch}": SINGLE,
        # the last blocks' sums have no norm after them: they are joined, or cut
        f"GatedResidual{branch}": 2 + 1,
    }
    sums = Counter({"GatedResidualNorm": 2 * DOUBLE})
    sums[f"GatedResidualNorm{branch}"] += 2 * (DOUBLE - 1) + SINGLE - 1
    return Counter(found) + sums


def wan_operators(branch: str) -> Counter:
    """Wan's, with LoRA in the feed-forward layers or not."""
    found = {
        "ModulatedNorm": 1,
        "BiasNormRotary": 2 * WAN_BLOCKS,
        "BiasNorm": 2 * WAN_BLOCKS,
        "ResidualNorm": WAN_BLOCKS,
    }
    sums = Counter({"GatedResidualNorm": WAN_BLOCKS})
    sums[f"GatedResidualNorm{branch}"] += WAN_BLOCKS
    gelus = Counter({"BiasGelu": 1})  # of the text
    gelus[f"BiasGelu{branch}"] += WAN_BLOCKS
    return Counter(found) + sums + gelus


@pytest.mark.parametrize(
    ("bundle", "expected"), [("tiny_bundle", flux_operators), ("wan_bundle", wan_operators)], ids=["flux", "wan"]
)
@pytest.mark.parametrize(("patch", "branch"), [(2, ""), (4, "WithBranch"), (8, "WithBranch")])
def test_a_level_is_made_of_these_operators(request, bundle, expected, patch, branch):
    model = ir.load(request.getfixturevalue(bundle) / f"level-{patch}.cuda.onnx")
    assert operators(model.graph) == expected(branch)
    assert FUSED.isdisjoint(node.op_type for node in model.graph)
    used = {node.op_type for part in (model.graph, *model.functions.values()) for node in part if node.domain == DOMAIN}
    assert {name for _, name, _ in model.functions} == used
    assert model.opset_imports[DOMAIN] == 1


def test_a_single_block_has_five_kernels_beside_its_products_and_its_attention(tiny_bundle):
    nodes = list(ir.load(tiny_bundle / "level-2.cuda.onnx").graph)
    first, after = (
        next(
            index
            for index, node in enumerate(nodes)
            for value in node.inputs
            if value is not None and value.name == f"single_transformer_blocks.{block}.norm.linear.weight"
        )
        for block in (0, 1)
    )
    over_tokens = {"ModulatedNorm": 1, "BiasNormRotary": 2, "Add": 1, "JoinedBiasGelu": 1}
    products = {"MatMul": 5, "MultiHeadAttention": 1}
    rows = {"Gemm": 1, "Split": 1, "Unsqueeze": 3}
    assert Counter(node.op_type for node in nodes[first:after]) == {**over_tokens, **products, **rows}


@torch.no_grad()
def test_wan_s_twin_computes_what_diffusers_does(wan_bundle):
    """Two samples have noise levels of their own, so each has its own row of scales, shifts and gates."""
    inputs = level_inputs(wan_bundle, 2, WAN_SIZES)
    folder = wan_bundle.with_suffix(".model") / "transformer"
    original = native_velocity(WanTransformer3DModel.from_pretrained(folder).eval())
    expected = original(**{name: torch.from_numpy(value) for name, value in inputs.items()}).numpy()
    assert relative_error(velocity(wan_bundle / "level-2.cuda.onnx", inputs), expected) < 1e-5


@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize(("bundle", "sizes"), [("tiny_bundle", FLUX_SIZES), ("wan_bundle", WAN_SIZES)])
def test_a_twin_computes_what_its_level_does(request, bundle, sizes, patch):
    folder = request.getfixturevalue(bundle)
    inputs = level_inputs(folder, patch, sizes)
    expected = velocity(folder / f"level-{patch}.onnx", inputs)
    assert relative_error(velocity(folder / f"level-{patch}.cuda.onnx", inputs), expected) < 1e-5


def test_wan_in_half_precision_casts_nothing_between_products(tiny_wan, wan_bundle, tmp_path):
    """Its modulation is float32; the operators take it as it is, and tokens stay in float16 between them."""
    path = half_precision_level(tiny_wan, tmp_path, Wan)
    twin = tmp_path / write_twin(path).file
    graph = ir.load(twin).graph
    assert operators(graph) == wan_operators("")
    # latent, text and velocity; the timestep's embedding, and as the modulation wants it, in blocks and at the end
    assert sum(node.op_type == "Cast" for node in graph) == 6
    inputs = level_inputs(wan_bundle, 2, WAN_SIZES)
    exact = velocity(wan_bundle / "level-2.onnx", inputs)
    errors = [relative_error(velocity(file, inputs), exact) for file in (path, twin)]
    assert max(errors) < 2e-3
    assert errors[1] < 1.5 * errors[0]


def copy_of(bundle: Path, name: str, folder: Path) -> Path:
    """A level's graph in another folder, whose weights stand in the file."""
    model = ir.load(bundle / name)
    ir.external_data.load_to_model(model)
    ir.save(model, folder / name)
    return folder / name


@pytest.mark.parametrize(
    ("module", "limit", "value", "left"),
    [
        (
            projections,
            "HEADS",
            (8,),
            {"RMSNormalization": 2 * (2 * DOUBLE + SINGLE), "RotaryEmbedding": 2 * (DOUBLE + SINGLE)},
        ),
        (
            values,
            "CHANNELS",
            5,
            {"LayerNormalization": 2 + 1 + 1 + 2 * DOUBLE + SINGLE - 1, "FastGelu": 2 * DOUBLE + SINGLE},
        ),
    ],
)
def test_shapes_that_the_kernels_do_not_take_stay_with_the_library(
    tiny_bundle, tmp_path, monkeypatch, module, limit, value, left
):
    monkeypatch.setattr(module, limit, value)
    path = copy_of(tiny_bundle, "level-2.onnx", tmp_path)
    twin = tmp_path / write_twin(path).file
    model = ir.load(twin)
    found = Counter(node.op_type for node in model.graph)
    assert {name: found[name] for name in left} == left
    assert not {name for _, name, _ in model.functions} & (
        {"BiasNorm", "BiasNormRotary", "JoinedBiasNormRotary"} if limit == "HEADS" else operators(model.graph).keys()
    )
    inputs = level_inputs(tiny_bundle, 2, FLUX_SIZES)
    assert relative_error(velocity(twin, inputs), velocity(path, inputs)) < 1e-5


@pytest.mark.parametrize(
    ("bundle", "patch"), [("tiny_bundle", 2), ("tiny_bundle", 4), ("wan_bundle", 2), ("wan_bundle", 4)]
)
def test_without_the_kernels_it_is_no_more_than_the_first_stage(request, tmp_path, monkeypatch, bundle, patch):
    """ONNX Runtime puts the functions' bodies in place, and folds what attributes decide."""
    path = copy_of(request.getfixturevalue(bundle), f"level-{patch}.onnx", tmp_path)

    def nodes_that_run() -> Counter:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        onnxruntime.InferenceSession(tmp_path / write_twin(path).file, options, providers=["CPUExecutionProvider"])
        return Counter(node.op_type for node in ir.load(tmp_path / "optimized.onnx").graph)

    both = nodes_that_run()
    monkeypatch.setattr(rewrite, "fuse", lambda model: None)
    first = nodes_that_run()
    assert both <= first
