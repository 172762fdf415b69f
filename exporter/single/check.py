"""The single model's gate: its pictures beside the runtime's, before it is accepted."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ddit.exporter.memory import fits
from ddit.runtime import Pipeline, shapes
from ddit.runtime.backends.onnxruntime.host import CPU, engine_errors, import_onnxruntime, session_options
from ddit.runtime.bundle import Bundle, Manifest
from ddit.runtime.bundle.manifest import Dtype
from ddit.runtime.conditioning.text import Tokenizer
from ddit.runtime.errors import ParityError
from ddit.runtime.samplers.sigmas import noise

FOLDER_OF_WEIGHTS = "session.model_external_initializers_file_folder_path"
PROMPT = "a red circle on a striped background"
STEPS = 8  # enough for the adaptive policy to predict some
PREDICTS = 10.0  # a tolerance with which it does
# by how much of 255 a picture may differ: the same kernels in another order round otherwise
PIXELS: dict[Dtype, int] = {"fp32": 1, "fp16": 8, "bf16": 8}

Inputs = dict[str, Any]


def why_unchecked(bundle: Bundle) -> str:
    """What keeps this machine from checking a model; empty where nothing does."""
    if any(graph.dtype == "bf16" for graph in bundle.manifest.graphs.values()):
        return "ONNX Runtime's CPU provider has no bfloat16"
    # the model's weights and the runtime's, each in a copy that the session makes
    size = sum(file.size for file in bundle.manifest.files.values())
    return "" if fits(3 * size) else "this machine's memory does not hold it"


def check_single(bundle: Bundle, path: Path, folder: Path, dtype: Dtype) -> int:
    """The largest difference of a pixel to the runtime's pictures, over a run through all levels and one that predicts.

    The model at ``path`` has its weights below ``folder``. Raises `ParityError` where levels differ, or pixels by more
    than the arithmetic explains.
    """
    manifest = bundle.manifest
    listed = [patch for patch in manifest.patches for _ in range(2)]
    runs: dict[str, Inputs] = {
        "fixed:" + ",".join(map(str, listed)): {"levels": listed, "steps": len(listed), "tolerance": 0},
        f"native+adaptive:tolerance={PREDICTS}": {"levels": [manifest.native], "steps": STEPS, "tolerance": PREDICTS},
    }
    options = session_options()
    options.add_session_config_entry(FOLDER_OF_WEIGHTS, str(folder))
    with engine_errors(f"load {path.name}"):
        session = import_onnxruntime().InferenceSession(path.read_bytes(), options, providers=[CPU])
    pipeline, worst = Pipeline.open(bundle.path, backend="cpu"), 0
    smallest = manifest.profile.entry[0].at("minimum")
    height, width = smallest["height"], smallest["width"]
    for schedule, settings in runs.items():
        given = {**text_inputs(bundle, PROMPT), **noise_input(manifest, 0, height=height, width=width), **settings}
        with engine_errors(f"run {path.name}"):
            image, levels = session.run(["image", "level"], typed(session, given))
        expected = pipeline(PROMPT, steps=settings["steps"], schedule=schedule, height=height, width=width)
        wanted = [level or 0 for level in expected.trace.levels]
        if levels.tolist() != wanted:
            raise ParityError(f"{path.name} ran the levels {levels.tolist()} where the runtime runs {wanted}")
        worst = max(worst, int(abs(image.astype(int) - np.asarray(expected.image)).max()))
        if worst > PIXELS[dtype]:
            raise ParityError(
                f"{path.name} makes another picture than the runtime: {worst}/255 off, {PIXELS[dtype]}/255 allowed"
            )
    return worst


def text_inputs(bundle: Bundle, prompt: str) -> Inputs:
    """A prompt as the model takes it: token ids by input."""
    return {
        f"{info.graph}_ids": Tokenizer(bundle.file(info.tokenizer.file), info.tokenizer)(prompt)[0]
        for info in bundle.manifest.encoders
    }


def noise_input(manifest: Manifest, seed: int, *, height: int, width: int) -> Inputs:
    """The starting noise of a seed and a size in pixels."""
    sizes = shapes.to_symbols(manifest.latent, {"height": height, "width": width, "batch": 1})
    return {"noise": noise(seed, shapes.resolve(manifest.latent.shape[1:], sizes))}


def typed(session: Any, given: Mapping[str, Any]) -> Inputs:
    """Inputs as arrays of the types that a session asks for."""
    types = {"tensor(int64)": np.int64, "tensor(float)": np.float32}
    asked = {one.name: types[one.type] for one in (*session.get_inputs(), *session.get_overridable_initializers())}
    return {name: np.asarray(value, asked[name]) for name, value in given.items()}
