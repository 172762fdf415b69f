"""One ONNX model that makes a picture: text encoders, the denoising loop, the decoder (docs/single.md).

All weights are the outermost graph's, so that the branches of all levels read the same ones.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass

from ddit.exporter.single.defaults import Defaults
from ddit.exporter.single.loop import FLOAT, INT64, Run, denoise
from ddit.exporter.single.rules import DOMAIN, RULES
from ddit.exporter.single.splice import Outermost, Part, Values
from ddit.runtime import strict_json
from ddit.runtime.bundle import Bundle, Manifest
from ddit.runtime.bundle.manifest import DecoderInfo, FlowMatchEulerInfo, SmoothPoint
from ddit.runtime.bundle.names import GUIDANCE, IDS, IMAGE, LATENT, PREDICTION, TABLES, UPDATE
from ddit.runtime.errors import UsageError
from ddit.runtime.policies.prediction import KEPT_VELOCITIES
from ddit.runtime.policies.smooth import LEAST

UINT8 = ir.DataType.UINT8
IR_VERSION, OLD_IR_VERSION = 10, 8  # the old one for graphs at opset 17, as the bundle's own have it
OLD_OPSET = 17
NOISE = "noise"
METADATA = "ddit"  # the key of what a host has to know of the inputs, as JSON


def single_model(bundle: Bundle, defaults: Defaults, backend: str) -> ir.Model:
    """The model, whose weights point into the bundle's files.

    ``backend``: the levels' twins for it are taken, where the bundle has some. Raises `UsageError` for a bundle of
    which no single model can be made.
    """
    manifest, outermost = bundle.manifest, Outermost(bundle.path)
    check_manifest(manifest)
    main = Part(outermost)
    given = _given(manifest)
    optional = _optional(outermost, manifest, defaults)
    latent = main.op("Unsqueeze", given[NOISE], outermost.constant([0]))
    sides = [main.op("Squeeze", main.op("Shape", latent, start=axis, end=axis + 1)) for axis in (2, 3)]
    sigmas = _noise_levels(main, manifest, optional["steps"], sides)
    run = Run(
        manifest=manifest,
        backend=backend,
        settings=optional,
        sigmas=sigmas,
        smooth=_smooth(main, manifest, sigmas, defaults.smooth) if manifest.coarse else None,
        conditions=_conditions(main, manifest, given, optional),
        tables={patch: _tables(main, manifest, patch, sides) for patch in manifest.patches},
    )
    made = denoise(main, run, latent)
    assert isinstance(manifest.decoder, DecoderInfo)
    graph = manifest.decoder.graph
    (image,) = main.rule("to_pixels", main.graph(graph, manifest.graphs[graph].file, {LATENT: made.latent})[IMAGE])
    outputs = {
        "image": (image, UINT8, ("height", "width", 3)),
        "latent": (main.op("Squeeze", made.latent, outermost.constant([0])), FLOAT, manifest.latent.shape[1:]),
        "sigmas": (sigmas, FLOAT, ("steps+1",)),
        "level": (made.level, INT64, ("steps",)),
        "expected_error": (made.expected_error, FLOAT, ("steps",)),
    }
    if made.statistic is not None:
        outputs["statistic"] = made.statistic, FLOAT, ("steps", len(manifest.coarse))
    for name, (value, dtype, shape) in outputs.items():
        value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
    return _model(main, [*given.values(), *optional.values()], [value for value, *_ in outputs.values()], manifest)


def check_manifest(manifest: Manifest) -> None:
    """Raise `UsageError` for a bundle of which no single model can be made."""
    kept = next(spec for spec in manifest.graphs[UPDATE].inputs if spec.name == PREDICTION).shape[1]
    lacking = {
        "clips": manifest.latent.has_frames,
        f"the sampler {manifest.sampler.kind}": manifest.sampler.kind != "flow_match_euler",
        "guidance by two passes": manifest.guidance.two_passes,
        f"{kept} kept velocities": kept != KEPT_VELOCITIES,
    }
    if any(lacking.values()):
        what = ", ".join(name for name, there in lacking.items() if there)
        raise UsageError(f"a single model cannot have what this bundle has ({what}); run it with ddit-run")


def _given(manifest: Manifest) -> dict[str, ir.Value]:
    """The inputs that a caller has to give."""
    inputs = {
        f"{info.graph}_ids": ir.Value(
            name=f"{info.graph}_ids",
            type=ir.TensorType(INT64),
            shape=ir.Shape(["L" if info.free_length else info.tokenizer.length]),
        )
        for info in manifest.encoders
    }
    shape = ir.Shape(manifest.latent.shape[1:])
    return {**inputs, NOISE: ir.Value(name=NOISE, type=ir.TensorType(FLOAT), shape=shape)}


def _optional(outermost: Outermost, manifest: Manifest, defaults: Defaults) -> dict[str, ir.Value]:
    """The inputs that have a value where a caller gives none: initializers of the same name."""
    values: dict[str, np.ndarray | np.generic] = {
        "steps": np.int64(defaults.steps),
        "levels": np.array(defaults.levels, np.int64),
        "tolerance": np.float32(defaults.tolerance),
        "order": np.int64(defaults.order),
    }
    if manifest.guidance.embedded:
        values[GUIDANCE] = np.float32(defaults.guidance)
    if manifest.coarse:
        values |= {
            "carry": np.float32(defaults.carry),
            "tau": np.float32(defaults.tau),
            "rho": np.float32(defaults.rho),
            "warmup": np.int64(defaults.warmup),
            "hold": np.int64(defaults.hold),
            "coarsest": np.int64(defaults.coarsest),
        }
    inputs = {name: outermost.constant(value, name) for name, value in values.items()}
    inputs["levels"].shape = ir.Shape(["listed"])
    return inputs


def _noise_levels(main: Part, manifest: Manifest, steps: ir.Value, sides: list[ir.Value]) -> ir.Value:
    """σ₀ … σ_N, from the number of steps and of native tokens."""
    sampler, constant = manifest.sampler, main.outermost.constant
    assert isinstance(sampler, FlowMatchEulerInfo)
    if sampler.use_dynamic_shifting:
        native = constant(manifest.native)
        tokens = main.op("Mul", *(main.op("Div", side, native) for side in sides))
        slope = (sampler.max_shift - sampler.base_shift) / (sampler.max_image_seq_len - sampler.base_image_seq_len)
        numbers = {"base shift": sampler.base_shift, "shift's slope": slope, "base tokens": sampler.base_image_seq_len}
        (shift,) = main.rule(
            "dynamic_shift", tokens, *(constant(np.float64(value), name) for name, value in numbers.items())
        )
    else:
        shift = constant(np.float64(sampler.shift), "shift")
    return main.rule("noise_levels", steps, constant(np.float64(sampler.smallest or 0), "smallest level"), shift)[0]


def _smooth(main: Part, manifest: Manifest, sigmas: ir.Value, points: Sequence[SmoothPoint]) -> ir.Value:
    """(N, P) float64: a smooth picture's statistic after every step, for P coarse patches; 1 without a curve."""
    constant, coarse = main.outermost.constant, manifest.coarse
    if not points:
        steps = main.op("Sub", main.op("Shape", sigmas), constant([1]))
        shape = main.op("Concat", steps, constant([len(coarse)]), axis=0)
        return main.op("Expand", constant(np.float64(1)), shape)
    rising = sorted(points, key=lambda point: point.sigma)
    knots = np.array([point.sigma for point in rising])
    values = np.log(np.maximum([[point.statistic[patch] for patch in coarse] for point in rising], LEAST))
    # a last segment without width, so that a curve of one point has one too
    widths = np.diff(knots, append=knots[-1])
    slopes = np.diff(values, axis=0, append=values[-1:]) / np.where(widths > 0, widths, 1)[:, None]
    curve = {"smooth sigma": knots, "smooth width": widths, "smooth slope": slopes, "smooth start": values[0]}
    return main.rule("smooth_statistic", sigmas, *(constant(value, name) for name, value in curve.items()))[0]


def _conditions(main: Part, manifest: Manifest, given: Values, optional: Values) -> dict[str, ir.Value]:
    """The levels' inputs that stay the same: what the text encoders give, and the guidance."""
    first = main.outermost.constant([0])
    conditions: dict[str, ir.Value] = {}
    for info in manifest.encoders:
        ids = main.op("Unsqueeze", given[f"{info.graph}_ids"], first)
        found = main.graph(info.graph, manifest.graphs[info.graph].file, {IDS: ids})
        conditions |= {info.feeds[name]: value for name, value in found.items()}
    if manifest.guidance.embedded:
        conditions[GUIDANCE] = main.op("Unsqueeze", optional[GUIDANCE], first)
    return conditions


def _tables(main: Part, manifest: Manifest, patch: int, sides: list[ir.Value]) -> Values:
    """A level's rotary tables."""
    constant = main.outermost.constant
    grows: dict[str, list[np.ndarray]] = {"height": [], "width": []}
    for one in manifest.positions.axes:
        frequency = manifest.positions.theta ** -(np.arange(0, one.dimensions, 2, dtype=np.float64) / one.dimensions)
        for name, parts in grows.items():
            parts.append(np.repeat(frequency, 2) * (one.axis == name))  # every angle stands twice, side by side
    tables = main.rule(
        "position_tables",
        *(main.op("Div", side, constant(patch)) for side in sides),
        constant(np.float64(patch / manifest.native)),
        *(constant(np.concatenate(parts), f"angles by {name}") for name, parts in grows.items()),
    )
    return dict(zip(TABLES, tables, strict=True))


def _model(main: Part, inputs: list[ir.Value], outputs: list[ir.Value], manifest: Manifest) -> ir.Model:
    """The model around the outermost graph."""
    opsets = {**main.outermost.opsets, DOMAIN: 1}
    rules = [rule.function_ir for rule in RULES.values()]
    for rule in rules:
        rule.opset_imports[""] = opsets[""]  # they are written so that this changes nothing
    functions = [*rules, *main.outermost.functions.values()]
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=main.nodes,
        initializers=list(main.outermost.initializers.values()),
        opset_imports=opsets,
        name="ddit",
    )
    version = OLD_IR_VERSION if opsets[""] == OLD_OPSET else IR_VERSION
    model = ir.Model(graph, ir_version=version, producer_name="ddit", functions=functions)
    model.metadata_props[METADATA] = strict_json.dump(_description(manifest))
    NameFixPass()(model)
    return model


def _description(manifest: Manifest) -> Mapping[str, object]:
    """What a host has to know to fill the inputs."""
    return {
        "model": manifest.model.id,
        "patches": manifest.patches,
        "pixels_per_latent": {axis.name: axis.downscale for axis in manifest.latent.axes},
        "profile": manifest.profile.model_dump(mode="json", exclude_none=True)["entry"],
        "tokens": {
            f"{info.graph}_ids": {"length": info.tokenizer.length, "pad_id": info.tokenizer.pad_id}
            for info in manifest.encoders
        },
    }
