"""A bundle's graphs → TensorRT engines in its store. Needs TensorRT, Polygraphy and the GPU to run on, no torch.

One engine per graph, with one optimisation profile per entry of the shape profile. Its file is a plan, as TensorRT
calls a serialized engine.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ddit.profiles import BOUNDS, Profile
from ddit.runtime import shapes
from ddit.runtime.backends.artifacts import Target
from ddit.runtime.backends.building import EngineBuilder, Progress, Report
from ddit.runtime.backends.device.cuda import Gpu
from ddit.runtime.backends.tensorrt import compat
from ddit.runtime.backends.tensorrt.engines import OPTIMIZATION_LEVEL, BuilderOptions, this_target
from ddit.runtime.bundle import Bundle, Manifest
from ddit.runtime.bundle.manifest import GraphInfo
from ddit.runtime.errors import BackendError, UsageError
from ddit.runtime.files import user_cache

OPSETS = "opset 23 is for TensorRT 10.15 and newer, 18 to 22 for 10.0 and newer, 17 for 8.6 (ddit-export flux --opset)"


class TensorRTBuilder(EngineBuilder):
    """Builds on this machine's GPU. Raises `BackendError` where there is no GPU, TensorRT or Polygraphy.

    Args:
        timing_cache: file of kernel timings; the user's for this GPU model and TensorRT version when None.
        optimization_level: how long TensorRT searches, 0 to 5.
        workspace: most bytes of scratch memory of a kernel; all that the GPU has when None.
    """

    file = "engine.plan"

    def __init__(
        self,
        report: Report,
        progress: Progress,
        *,
        timing_cache: Path | None = None,
        optimization_level: int = OPTIMIZATION_LEVEL,
        workspace: int | None = None,
    ):
        self.trt = compat.import_tensorrt()
        try:
            import onnx_ir  # noqa: F401
            import polygraphy  # noqa: F401
        except ImportError as error:
            raise BackendError(
                f"building engines needs {error.name}; install it with: pip install 'ddit[tensorrt]'"
            ) from None
        self.gpu = Gpu()  # asks the driver first: TensorRT crashes without a GPU
        self.settings = BuilderOptions(optimization_level=optimization_level, workspace=workspace)
        super().__init__(this_target(self.trt, self.gpu), self.settings.model_dump(), report, progress)
        self.timing_cache = timing_cache or default_timing_cache(self.target)

    def _build(self, bundle: Bundle, profile: Profile, graph: str, temporary: str) -> tuple[memoryview, int]:
        """A plan, and the scratch memory that its contexts need; merged weights lie in the temporary file."""
        from polygraphy.backend.trt import engine_bytes_from_network
        from polygraphy.exception import PolygraphyException
        from polygraphy.logger import G_LOGGER

        trt, info = self.trt, bundle.graph(graph)
        logger, builder, network, parser = parse(trt, bundle, graph, temporary)
        with self.progress(graph) as report, G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
            monitor = compat.progress_monitor(trt, report)
            config = self._config(builder, network, bundle.manifest, info, profile, monitor)
            try:
                serialized = engine_bytes_from_network((builder, network, parser), config)
            except PolygraphyException as error:
                if monitor is not None and monitor.interrupted:
                    raise KeyboardInterrupt from None
                raise self._failure(graph, logger.errors, error) from None
        self._keep_timings(config)
        # also proves that the plan loads
        engine = trt.Runtime(logger).deserialize_cuda_engine(serialized)
        if engine is None:
            raise self._failure(graph, logger.errors, None)
        return memoryview(serialized), compat.scratch_bytes(engine)

    def _config(
        self,
        builder: Any,
        network: Any,
        manifest: Manifest,
        info: GraphInfo,
        profile: Profile,
        monitor: Any | None,
    ) -> Any:
        from polygraphy.backend.trt import create_config

        trt = self.trt
        typed = compat.strongly_typed(trt)
        if info.dtype == "bf16" and not typed:
            raise UsageError(
                f"TensorRT {trt.__version__} has no bfloat16; export the bundle with --dtype fp16 --opset 17"
            )
        workspace = self.settings.workspace
        config = create_config(
            builder,
            network,
            profiles=optimization_profiles(manifest, info, profile),
            fp16=info.dtype == "fp16" and not typed,
            tf32=True,  # as ONNX Runtime and torch's accelerators compute float32 products
            memory_pool_limits={trt.MemoryPoolType.WORKSPACE: workspace} if workspace else None,
            tactic_sources=compat.own_tactic_sources(trt),
            builder_optimization_level=self.settings.optimization_level,
            progress_monitor=monitor,
        )
        compat.share_profiles(trt, config)
        cache = config.create_timing_cache(read_or_empty(self.timing_cache))
        if cache is not None:  # None: the file is another release's or damaged; the builder starts from nothing
            config.set_timing_cache(cache, False)
        return config

    def _failure(self, graph: str, errors: Sequence[str], cause: Exception | None) -> BackendError:
        """What went wrong and what to change, from TensorRT's own words."""
        said = " ".join(errors) or str(cause or "no reason given")
        where = f"TensorRT could not build {graph}"
        # nodes that were fused have a long name: {ForeignNode[first...last]}
        if node := re.search(r"any implementation for node (\{.*?\]\}|\S+?)\.\)?(?!\S)", said):
            return BackendError(
                f"{where}: it has no kernel for node {node[1]}; try another --optimization-level, more --workspace, a "
                "profile with smaller sizes, or a newer TensorRT"
            )
        if re.search(r"out ?of ?memory|MEM_ALLOC_FAILED|insufficient memory", said, re.IGNORECASE):
            return BackendError(
                f"{where}: out of memory with {self.gpu.free_bytes() / 1e9:.1f} GB free on {self.gpu.name}; stop other "
                "programs, give less --workspace, or choose a profile with smaller sizes"
            )
        return BackendError(f"{where}: {said.splitlines()[0]}")

    def _keep_timings(self, config: Any) -> None:
        """Merge what was timed into the cache's file, which other builders may be writing too."""
        from filelock import FileLock

        timings = config.get_timing_cache()
        if timings is None:
            return
        path = self.timing_cache
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):
                before = config.create_timing_cache(read_or_empty(path))
                if before is not None:
                    timings.combine(before, True)
                partial = path.with_name(f"{path.name}.partial")
                partial.write_bytes(bytes(timings.serialize()))
                os.replace(partial, path)
        except OSError as error:  # the engine is built all the same
            self.report(f"warning: the timing cache {path} cannot be written: {error.strerror or error}")


def parse(trt: Any, bundle: Bundle, graph: str, temporary: str) -> tuple[Any, Any, Any, Any]:
    """A graph as a network, ready to be built: logger, builder, network and parser, which has to outlive the building.

    Merged weights are written to the file ``temporary`` of the bundle. Raises `BackendError` where TensorRT cannot read
    the graph.
    """
    import onnx_ir as ir

    from ddit.runtime.backends.tensorrt.merge import merge_lora

    logger = compat.make_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(compat.network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    file = bundle.file(bundle.graph(graph).file)
    model = ir.load(file)
    merge_lora(model, bundle.path, temporary)
    # the path is only for the weights' files, which lie beside it
    if not parser.parse(ir.to_proto(model).SerializeToString(), str(file)):
        raise BackendError(f"TensorRT {trt.__version__} cannot read {graph}: {parser_error(parser)}; {OPSETS}")
    compat.let_attention_decompose(trt, network)
    return logger, builder, network, parser


def profile_sizes(manifest: Manifest, info: GraphInfo, profile: Profile) -> Iterator[dict[str, list[tuple[int, ...]]]]:
    """Minimum, optimum and maximum shape of every input by its name, for every entry of a shape profile."""
    for entry in profile.entry:
        sizes = [shapes.to_symbols(manifest.latent, entry.at(bound)) for bound in BOUNDS]
        yield {spec.name: [spec.resolve(size) for size in sizes] for spec in info.inputs}


def optimization_profiles(manifest: Manifest, info: GraphInfo, profile: Profile) -> list[Any]:
    """Polygraphy's profiles, one for every entry of a shape profile."""
    from polygraphy.backend.trt import Profile as Shapes

    profiles = []
    for sizes in profile_sizes(manifest, info, profile):
        one = Shapes()
        for name, bounds in sizes.items():
            one.add(name, *bounds)
        profiles.append(one)
    return profiles


def parser_error(parser: Any) -> str:
    """The parser's first error, with the node that it names."""
    if not parser.num_errors:
        return "the parser gives no reason"
    error = parser.get_error(0)
    node = error.node_name() if hasattr(error, "node_name") else f"number {error.node()}"
    return f"{error.desc().strip().splitlines()[0]} (node {node})"


def default_timing_cache(target: Target) -> Path:
    """A file in the user's cache folder, for every GPU model and TensorRT version one of its own."""
    name = re.sub(r"[^\w.]+", "-", f"{target.needs['gpu']}-{target.needs['tensorrt']}")
    return user_cache() / f"timing-{name}.cache"


def read_or_empty(path: Path) -> bytes:
    """A file's content, nothing if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError:
        return b""
