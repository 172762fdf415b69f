"""What `ddit-run inspect` shows of a bundle."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from rich.table import Table
from rich.text import Text

from ddit.runtime.backends.artifacts import StoredEngine
from ddit.runtime.backends.onnxruntime.host import FLOAT8
from ddit.runtime.bundle import Manifest
from ddit.runtime.bundle.manifest import AdaptiveInfo, ScheduleInfo
from ddit.runtime.console import printable, red, terminal


def show(bundle: Path, manifest: Manifest, engines: Sequence[StoredEngine]) -> None:
    """Print a bundle's settings, levels, graphs and engines."""
    console = terminal()
    revision = f"@{manifest.model.revision[:12]}" if manifest.model.revision else ""
    total = sum(info.size for info in manifest.files.values())
    title = Text(printable(str(bundle)), style="bold", end="")
    console.print(title, f": {manifest.family}, {manifest.model.id}{revision}, {manifest.dtype}, opset "
                  f"{manifest.opset}, {total / 1e6:,.0f} MB", sep="")  # fmt: skip
    console.print(f"profile {manifest.profile.name}: {manifest.profile}")
    guidance = "none" if manifest.guidance.kind == "none" else f"default {manifest.guidance.default:g}"
    dynamic = manifest.schedule
    console.print(
        f"sampling: {manifest.sampler.steps} steps, guidance {guidance}, carry {manifest.carry:g}; "
        f"adaptive: {_adaptive(manifest.adaptive)}; dynamic: {_dynamic(dynamic)}, "
        f"coarsest {dynamic.coarsest or max(manifest.patches)}"
    )
    for one in manifest.calibrations:
        settings = _dynamic(one) if isinstance(one, ScheduleInfo) else _adaptive(one)
        console.print(
            f"{one.kind} calibrated for {one.steps} steps at {one.size}: {settings}; "
            f"{one.speedup:.2f}× on {one.backend}, SSIM {one.similarity:.3f} ({one.prompts} prompts)"
        )
    if manifest.gate:
        console.print(f"teacache's polynomial: {manifest.gate.source}")
    for path in manifest.paths:
        console.print(
            f"dpcache computes {len(path.computed)} of {path.steps} steps at {path.size}: "
            f"{', '.join(map(str, path.computed))} ({path.prompts} prompts)"
        )
    console.print(_levels_table(manifest))
    console.print(_graphs_table(manifest))
    for backend, built_for in sorted({(engine.info.backend, engine.info.built_for) for engine in engines}):
        console.print(_engines_table(backend, built_for, engines))
    console.print("made with " + ", ".join(f"{name} {version}" for name, version in manifest.made_with.items()))


def _dynamic(info: ScheduleInfo) -> str:
    """τ with what it is a multiple of, and the rest."""
    relative = " × that of smooth pictures" if info.smooth else ""
    return f"τ {info.tau:.4g}{relative}, ρ {info.rho:g}, warm-up {info.warmup}, hold {info.hold}"


def _adaptive(info: AdaptiveInfo) -> str:
    return f"tolerance {info.tolerance:.4g}, order {info.order}"


def _levels_table(manifest: Manifest) -> Table:
    table = Table("level", "state", "graph", "own weights", title="Levels", title_justify="left")
    for level in sorted(manifest.levels, key=lambda level: level.patch):
        native = level.patch == manifest.native
        state = Text("native") if native else (Text("trained") if level.trained else red("untrained"))
        if level.adapter_sha256:
            state.append(f" (adapter {level.adapter_sha256[:12]})")
        own = manifest.files.get(f"level-{level.patch}.safetensors")
        table.add_row(str(level.patch), state, level.graph, f"{own.size / 1e6:.1f} MB" if own else "none")
    return table


def _graphs_table(manifest: Manifest) -> Table:
    table = Table("graph", "dtype", "inputs", "outputs", "file", "parity", title="Graphs", title_justify="left")
    for name, graph in manifest.graphs.items():
        results = [result for result in manifest.parity if result.graph == name and result.twin != FLOAT8]
        worst = max((result.error for result in results), default=float("nan"))
        in_float8 = [result.error for result in manifest.parity if result.graph == name and result.twin == FLOAT8]
        note = "" if all(result.checked == "full" for result in results) else " (reduced)"
        table.add_row(
            name,
            graph.dtype,
            "\n".join(_signature(spec.name, spec.shape) for spec in graph.inputs),
            "\n".join(_signature(spec.name, spec.shape) for spec in graph.outputs),
            "\n".join(
                [_kilobytes(manifest, graph.file)]
                + [f"{backend}: {_kilobytes(manifest, file)}" for backend, file in graph.twins.items()]
            ),
            f"{worst:.1e}{note}" + (f"\n{FLOAT8}: {max(in_float8):.1e}" if in_float8 else ""),
        )
    return table


def _engines_table(backend: str, built_for: str, engines: Sequence[StoredEngine]) -> Table:
    """The engines that were built for a backend and one kind of machine."""
    title = f"Engines for {printable(built_for)}\nBackend {printable(backend)}"
    table = Table("graph", "profile", "size", "built", "key", title=title, title_justify="left")
    infos = [engine.info for engine in engines if (engine.info.backend, engine.info.built_for) == (backend, built_for)]
    for info in sorted(infos, key=lambda info: (info.graph, info.built)):
        size = f"{info.size / 1e6:,.0f} MB"
        table.add_row(printable(info.graph), info.profile.name, size, _minute(info.built), info.key)
    return table


def _kilobytes(manifest: Manifest, file: str) -> str:
    return f"{manifest.files[file].size / 1e3:.0f} kB"


def _minute(time: str) -> str:
    """An ISO 8601 time, down to the minute."""
    try:
        return datetime.fromisoformat(time).strftime("%Y-%m-%d %H:%M")
    except ValueError:
        return printable(time)


def _signature(name: str, shape: tuple[int | str, ...]) -> str:
    return f"{name} ({', '.join(map(str, shape))})"
