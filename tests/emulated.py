"""The CUDA kernels without a GPU: real operators, whose driver and cuBLASLt are emulations (tests/cpp)."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from ddit.runtime.backends.onnxruntime import kernels

FOLDER = Path(kernels.__file__).parent
EMULATION = Path(__file__).parent / "cpp"
COMPILER = shutil.which("g++")
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")


def build(folder: Path, *, cublaslt: bool = True) -> Path:
    """The operators for ONNX Runtime's CPU provider, and the libraries that run their kernels and products there."""
    if COMPILER is None:
        pytest.skip("no g++ here")
    shared = ("-O2", *WARNINGS, "-shared", "-fPIC", f"-I{FOLDER}")
    sources = {"libcuda.so.1": "emulated_gpu.cpp"} | (
        {"libcublasLt.so.13": "emulated_cublaslt.cpp"} if cublaslt else {}
    )
    commands = [
        ("-std=c++20", *shared, f"-Wl,-soname,{name}", "-o", folder / name, EMULATION / source, "-lpthread")
        for name, source in sources.items()
    ]
    operators = (folder / "operators.so", FOLDER / "operators.cpp", "-ldl")
    commands.append(("-std=c++17", *shared, "-DDDIT_PROVIDER=nullptr", "-o", *operators))
    for command in commands:
        subprocess.run([COMPILER, *command], check=True)
    return folder


def run(folder: Path, name: str, given: Mapping[str, np.ndarray], **environment: str) -> Mapping[str, np.ndarray]:
    """Outputs of models, ``case/model``, on their inputs, ``case/input``; by ``case/output``."""
    inputs, outputs = (folder / f"{name}-{which}.npz" for which in ("inputs", "outputs"))
    np.savez(inputs, **given)
    command = [sys.executable, EMULATION / "operators.py", folder, inputs, outputs]
    subprocess.run(command, check=True, env=os.environ | environment)
    return np.load(outputs)
