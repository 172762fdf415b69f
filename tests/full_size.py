"""Real configurations, traced on meta tensors: what an export of billions of parameters costs."""

import json
from pathlib import Path
from time import process_time

from ddit.runtime.tools.bench import peak_memory_mb

DATA = Path(__file__).parent / "data"


def trace(folder: Path, configuration: str) -> dict[str, float]:
    """Trace levels 2 and 4 of the model in ``data``, in bfloat16, with an adapter's branches on level 4.

    Runs in a process of its own, for its peak memory.
    """
    import onnx_ir as ir

    from ddit.exporter.adapter import Adapter
    from ddit.exporter.families import family_of
    from ddit.exporter.graphs.rewrite import write_twin
    from ddit.exporter.graphs.trace import export_graph
    from ddit.exporter.graphs.weights import WeightFiles
    from ddit.exporter.levels import AdapterConfig
    from ddit.exporter.models import find_model
    from evaluation.flops import graph_flops

    class Untouched(Adapter):
        def apply(self, level, patch, *, shortened=False):
            pass

        def value(self, patch, parameter):
            raise AssertionError("tracing reads no weights")

    source = find_model(str(DATA / configuration))
    family = family_of(source)
    config = AdapterConfig(targets=family.feed_forward)
    model = family(source, (2, 4), "bf16", Untouched(folder, configuration, family.info.name, {4: config}, {}))
    report: dict[str, float] = {}
    weights = WeightFiles(folder)
    start = process_time()
    for patch in model.levels:
        graph = export_graph(model.level_job(patch), 23, weights)
        for name in graph.places:  # save the graph alone: nobody has 24 GB of weights here
            initializer = graph.model.graph.initializers[name]
            initializer.const_value = ir.ExternalTensor(
                "weights", 0, 0, dtype=initializer.dtype, shape=initializer.shape, name=name
            )
        ir.save(graph.model, folder / f"level-{patch}.onnx")
        report[f"level-{patch} kB"] = (folder / f"level-{patch}.onnx").stat().st_size / 1e3
    report["seconds of the processor"] = process_time() - start
    start = process_time()
    for patch in model.levels:
        twin = write_twin(folder / f"level-{patch}.onnx")
        report[f"level-{patch}'s twin kB"] = (folder / str(twin.file)).stat().st_size / 1e3
        report[f"level-{patch}'s twin nodes"] = len(ir.load(folder / str(twin.file)).graph)
    report["seconds of the processor for twins"] = process_time() - start
    for patch in model.levels:
        for text in (512, 128, 64):
            sizes = {"B": 1, "F": 1, "H": 128, "W": 128, "L": text}
            shapes = {spec.name: spec.resolve(sizes) for spec in model.level_job(patch).inputs}
            flops = graph_flops(folder / f"level-{patch}.onnx", shapes)
            report[f"level-{patch} TFLOP at 1024×1024 with {text} text tokens"] = flops / 1e12
    report["peak MB"] = peak_memory_mb()
    report["GB of weights"] = weights.total_bytes() / 1e9
    report["GB of level 4's own"] = weights.file_bytes("level-4.safetensors") / 1e9
    (folder / "report.json").write_text(json.dumps(report))
    return report
