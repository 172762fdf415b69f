"""Runs operators of domain ddit on the emulated GPU, in a process of its own: the emulation stands in for the driver.

python operators.py FOLDER inputs.npz output.npz    (FOLDER: the two libraries; inputs.npz: `model` and the inputs)
"""

import ctypes
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort

folder, given, wanted = Path(sys.argv[1]), np.load(sys.argv[2]), sys.argv[3]
loaded = [ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL) for path in folder.glob("lib*.so.*")]
library = folder / "operators.so"
operators = ctypes.CDLL(str(library))
assert operators.ddit_load(b"emulated") == 0
assert operators.ddit_float8() == (folder / "libcublasLt.so.13").exists()
options = ort.SessionOptions()
options.register_custom_ops_library(str(library))
results = {}
for name in {key.partition("/")[0] for key in given.files}:
    session = ort.InferenceSession(given[f"{name}/model"].tobytes(), options, providers=["CPUExecutionProvider"])
    inputs = {one.name: given[f"{name}/{one.name}"] for one in session.get_inputs()}
    for output, value in zip(session.get_outputs(), session.run(None, inputs), strict=True):
        results[f"{name}/{output.name}"] = value
np.savez(wanted, **results)
