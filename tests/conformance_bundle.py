"""Tiny bundles with all that decides something: a curve of smooth pictures, paths, calibrations."""

import json
from collections.abc import Sequence
from pathlib import Path

STEPS, SIZE = 12, (128, 192)  # of the conformance vectors
SIZES = ((64, 64), SIZE, (256, 128))
CLIP = {"frames": 9, "height": 128, "width": 192}
CLIP_SCHEDULES = (
    *("native", "fixed", "dynamic:tau=6,hold=1", "adaptive", "taylorseer", "teacache:300", "dpcache"),
    *("progressive:adaptive,delta=0.2+teacache:300", "progressive:delta=0.2+dynamic:tau=8,hold=1+adaptive:0.5"),
)
PICTURES = [{"height": height, "width": width} for height, width in SIZES]


def enrich(bundle: Path, sizes: Sequence[dict[str, int]]) -> None:
    """Write into ``bundle.json`` what calibrations would, for pictures or clips of these sizes."""
    manifest = json.loads((bundle / "bundle.json").read_text())
    runs = [{"steps": STEPS, **size} for size in sizes]
    manifest["schedule"]["smooth"] = [
        {"sigma": sigma, "statistic": {"4": fine, "8": coarse}}
        for sigma, fine, coarse in ((0.9, 40.0, 34.0), (0.5, 19.0, 17.0), (0.05, 12.0, 14.0))
    ]
    manifest["paths"] = [{**run, "computed": [0, 1, 2, 5, 9, 11], "error": 0.1, "prompts": 2} for run in runs]
    costs = {"levels": {"2": 1.0, "4": 1.0, "8": 1.0}, "predicted": 0.1, "encode": 1.0, "decode": 1.0}
    found = {"speedup": 1.5, "similarity": 0.9, "prompts": 4, "costs": costs, "curve": []}
    manifest["calibrations"] = [
        {"kind": "adaptive", "tolerance": tolerance, "order": 1, **runs[0], **found, "backend": backend}
        for backend, tolerance in (("cpu", 0.7), ("cuda", 0.2))
    ]
    (bundle / "bundle.json").write_text(json.dumps(manifest))
