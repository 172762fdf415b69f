"""ddit-export: a pretrained diffusion transformer becomes a bundle, and a bundle gets a machine's engines."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ddit.exporter.families import families, find_family
from ddit.exporter.families.base import FamilyInfo
from ddit.exporter.single.command import single
from ddit.exporter.triton import triton
from ddit.profiles import Profile, ProfileError, load_profile
from ddit.runtime import shapes, strict_json
from ddit.runtime.backends import registry
from ddit.runtime.backends.artifacts import DEFAULT_BACKEND
from ddit.runtime.backends.onnxruntime.host import FLOAT8
from ddit.runtime.backends.registry import BackendKind
from ddit.runtime.bundle import Bundle
from ddit.runtime.bundle.manifest import Dtype
from ddit.runtime.console import DditGroup, say, set_up_logging, terminal
from ddit.runtime.errors import ModelError, UsageError

if TYPE_CHECKING:
    from ddit.runtime.backends.building import EngineBuilder


class Levels(click.ParamType):  # type: ignore[type-arg]
    """Patch sizes, comma-separated."""

    name = "levels"

    def convert(
        self, value: str | tuple[int, ...], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """``"2,4"`` → ``(2, 4)``."""
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in value.split(",")]
        if not all(re.fullmatch(r"0*[1-9]\d{0,8}", part) for part in parts):
            self.fail(f"{value!r}: give patch sizes separated by commas, as in 2,4,8", param, ctx)
        return tuple(sorted({int(part) for part in parts}))


class BuiltBackend(click.ParamType):  # type: ignore[type-arg]
    """A backend whose engines must be built."""

    name = "backend"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """The names, as a choice shows them."""
        return f"[{'|'.join(self._kinds())}]"

    def convert(
        self, value: str | BackendKind, param: click.Parameter | None, ctx: click.Context | None
    ) -> BackendKind:
        """``"tensorrt"`` → what the registry knows of it."""
        if isinstance(value, BackendKind):
            return value
        kinds = self._kinds()
        if value not in kinds:
            self.fail(f"{value!r} is no backend with engines to build; there is: {', '.join(kinds)}", param, ctx)
        return kinds[value]

    def _kinds(self) -> dict[str, BackendKind]:
        return {kind.name: kind for kind in registry.kinds() if kind.needs_build}


class FamilyGroup(DditGroup):
    """The commands below, and one that exports for every family that is registered."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, sorted."""
        return sorted({*super().list_commands(ctx), *(info.name for info in families())})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a name."""
        made = {info.name: info for info in families()}
        return export_command(made[cmd_name]) if cmd_name in made else super().get_command(ctx, cmd_name)


@click.group(cls=FamilyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ddit")
@click.option("-v", "--verbose", count=True, help="Say more; twice for everything.")
def main(verbose: int) -> None:
    """Export a pretrained diffusion transformer, once per patch-size level, to a bundle that ddit-run can run."""
    set_up_logging(verbose)


main.add_command(single)
main.add_command(triton)


def export_command(info: FamilyInfo) -> click.Command:
    """The command that exports a family's pipelines."""
    levels = ",".join(map(str, info.levels))
    options = [
        click.Option(["--model"], default=info.model, show_default=True,
                     help="Hub id, local diffusers folder, 'demo', or 'demo-video'."),
        click.Option(["--revision"], help="Branch, tag or commit of the model on the hub."),
        click.Option(["--levels"], type=Levels(),
                     help=f"Patch sizes to export, as in 2,4,8.  [default: the model's, or {levels}]"),
        click.Option(["--adapter"], type=click.Path(path_type=Path),
                     help="Adapter file with the trained coarse levels.  [default: the model's, or none]"),
        click.Option(["--lora", "loras"], multiple=True, metavar="FILE[:SCALE]",
                     help="LoRA of the model to merge into it, as in style.safetensors:0.8; again for more."),
        click.Option(["--profile"],
                     help="Shape profile: 128-384, 256, 512, 1024, 2048 or a .toml file.  "
                          f"[default: the model's, or {info.profile}]"),
        click.Option(["--dtype"], type=click.Choice(["fp32", "fp16", "bf16"]),
                     help=f"Arithmetic inside the graphs.  [default: the model's, or {info.dtype}]"),
        click.Option(["--opset"], type=click.IntRange(17, 23), default=23, show_default=True,
                     help="ONNX opset of the graphs; 17 is for TensorRT 8.6."),
        click.Option(["--out"], type=click.Path(path_type=Path), help="Folder of the bundle.  [default: MODEL.bundle]"),
        click.Option(["--engines", "backend"], type=BuiltBackend(),
                     help="Also build this machine's engines, as ddit-export engines does."),
        click.Option(["--json", "as_json"], is_flag=True, help="Report as JSON on stdout."),
    ]  # fmt: skip
    help_text = f"Export a {info.title} pipeline."
    return click.Command(info.name, params=[*options], callback=partial(export, info), help=help_text)


def export(
    info: FamilyInfo,
    model: str,
    revision: str | None,
    levels: tuple[int, ...] | None,
    adapter: Path | None,
    loras: tuple[str, ...],
    profile: str | None,
    dtype: Dtype | None,
    opset: int,
    out: Path | None,
    backend: BackendKind | None,
    as_json: bool,
) -> None:
    """Export a pipeline of a family, and say what came of it."""
    # first, so that a missing TensorRT or GPU is reported before the export, not after it
    builder = _builder(backend) if backend else None
    _require_libraries()
    # heavy imports here, so that --help and usage errors answer at once
    from ddit.exporter.adapter import load_adapter
    from ddit.exporter.build import export_bundle
    from ddit.exporter.graphs.opset17 import LOWERED
    from ddit.exporter.loras import Lora, with_loras
    from ddit.exporter.models import find_model

    chosen = [Lora.parse(text) for text in loras]
    source = find_model(model, revision)
    family_class = find_family(info.name)
    native, defaults = family_class.native, source.defaults
    dtype = dtype or defaults.dtype or info.dtype
    if opset == LOWERED and dtype == "bf16":
        raise UsageError(
            f"opset {LOWERED} is for TensorRT 8.6, which has no bfloat16; add --dtype fp16 or --dtype fp32"
        )
    levels = levels or defaults.levels or info.levels
    if native not in levels:
        raise UsageError(f"the native level {native} must be among the levels: every schedule falls back to it")
    asked = _profile(profile or defaults.profile or info.profile)
    if adapter is None and defaults.adapter is not None:
        adapter = source.folder / defaults.adapter
    loaded = load_adapter(adapter) if adapter else None
    untrained = [patch for patch in levels if patch != native and not (loaded and patch in loaded.configs)]
    if untrained:
        names = ", ".join(map(str, untrained))
        say(f"warning: no adapter for level {names}: pictures will suffer where a schedule uses it")
    if dtype == "bf16" and len(levels) > 1:
        say("warning: bfloat16's rounding outweighs what the dynamic schedule looks at (docs/method.md); "
            "--dtype fp16 is better for it")  # fmt: skip
    out = out or Path(f"{source.info.id.rpartition('/')[2]}.bundle")
    with with_loras(source, chosen, out.absolute().parent) as merged:
        family = family_class(merged, levels, dtype, loaded)
        fitted = shapes.fit(asked, family.latent, levels)
        manifest = export_bundle(family, out, profile=fitted, opset=opset, report=say)
    if builder:
        builder.build(Bundle.open(out), fitted, list(manifest.graphs))
    worst = max(manifest.parity, key=lambda result: result.error / result.tolerance)
    size = sum(file.size for file in manifest.files.values())
    if as_json:
        report = {"out": str(out), "levels": manifest.patches, "bytes": size, "untrained": untrained}
        click.echo(strict_json.dump({**report, "worst_parity": worst.model_dump()}))
        return
    say(
        f"{out}: levels {', '.join(map(str, manifest.patches))}, {size / 1e6:,.0f} MB; "
        f"worst parity {worst.error:.1e} ({worst.graph}, allowed {worst.tolerance:g})"
    )


class Bytes(click.ParamType):  # type: ignore[type-arg]
    """A number of bytes."""

    name = "bytes"

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """``"16GiB"`` → 17179869184; also MiB, GB, MB, and plain numbers."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([kMGT]?)(i?)B?\s*", value)
        if match is None:
            self.fail(f"{value!r}: give a size, as in 16GiB", param, ctx)
        return int(float(match[1]) * (1024 if match[3] else 1000) ** " kMGT".index(match[2] or " "))


@main.command()
@click.argument("path", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.option(
    "--backend",
    type=BuiltBackend(),
    default=DEFAULT_BACKEND,
    show_default=True,
    help="Which backend's engines to build.",
)
@click.option("--level", "levels", type=int, multiple=True, help="Build only these levels' engines.  [default: all]")
@click.option("--profile", help="Shape profile: a name or a .toml file.  [default: the bundle's]")
@click.option(
    "--optimization-level",
    type=click.IntRange(0, 5),
    help="How long the builder searches.  [default: its own choice]",
)
@click.option(
    "--timing-cache",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File of kernel timings.  [default: the user's, one per GPU model and TensorRT version]",
)
@click.option(
    "--target",
    help="Compute capability to build for, as in sm89: --backend tensorrt-rtx needs no GPU then.  [default: this GPU]",
)
@click.option("--workspace", type=Bytes(), help="Most scratch memory of a kernel, as in 16GiB.  [default: all]")
@click.option("--json", "as_json", is_flag=True, help="Report as JSON on stdout.")
def engines(
    path: Path,
    backend: BackendKind,
    levels: tuple[int, ...],
    profile: str | None,
    optimization_level: int | None,
    timing_cache: Path | None,
    target: str | None,
    workspace: int | None,
    as_json: bool,
) -> None:
    """Build a bundle's engines, on the machine that will run them unless there is a --target. Needs no torch."""
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    chosen = _profile(profile) if profile else manifest.profile
    wanted = {manifest.level(patch).graph for patch in levels or manifest.patches}
    others = {level.graph for level in manifest.levels} - wanted
    builder = _builder(
        backend,
        timing_cache=timing_cache,
        optimization_level=optimization_level,
        target=target,
        workspace=workspace,
    )
    built = builder.build(bundle, chosen, [graph for graph in manifest.graphs if graph not in others])
    if as_json:
        infos = [
            {"new": one.new, "key": one.engine.info.key, **one.engine.info.model_dump(mode="json")} for one in built
        ]
        click.echo(strict_json.dump(infos, indent=2))
        return
    new = [one.engine.info for one in built if one.new]
    say(
        f"{path}: {len(new)} engines built in {sum(info.seconds for info in new):.0f} s, {len(built) - len(new)} were "
        f"there already; for {builder.target}"
    )


@main.command()
@click.argument("path", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Report as JSON on stdout.")
def fp8(path: Path, as_json: bool) -> None:
    """Add twins of a bundle's levels with FP8 products, for the backend cuda-fp8. Needs neither torch nor a GPU."""
    bundle = Bundle.open(path)
    try:
        from ddit.exporter.float8 import add_float8
    except ImportError as error:
        raise ModelError(f"exporting needs {error.name}; install it with: pip install 'ddit[export]'") from None
    results = [result for result in bundle.manifest.parity if result.twin == FLOAT8]
    if results:
        say(f"{path} has its FP8 twins already")
    else:
        results = [*add_float8(bundle, say, _build_progress)]
    errors = {result.graph: max(one.error for one in results if one.graph == result.graph) for result in results}
    if as_json:
        click.echo(strict_json.dump({"backend": FLOAT8, "errors": errors}))
        return
    listed = ", ".join(f"{graph} {error:.1e}" for graph, error in errors.items())
    say(f"{path}: relative error in FP8 {listed}; run it with --backend {FLOAT8}")


def _builder(kind: BackendKind, **options: object) -> "EngineBuilder":
    """The builder of a backend, with the options that were given (not None)."""
    assert kind.builder is not None
    given = {name: value for name, value in options.items() if value is not None}
    if unknown := given.keys() - set(kind.build_options):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(unknown))
        raise UsageError(f"the engines of {kind.name} are built without {names}; leave it out")
    return kind.builder(say, _build_progress, **given)


@contextmanager
def _build_progress(graph: str) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar of the builder's current phase."""
    console = terminal(stderr=True)
    columns = (TextColumn(f"{graph} {{task.description}}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)
        yield lambda phase, done, total: progress.update(task, description=phase, completed=done, total=total)


def _profile(name: str) -> Profile:
    try:
        return load_profile(name)
    except ProfileError as error:
        raise UsageError(str(error)) from None


def _require_libraries() -> None:
    """Raise `ModelError` unless torch and the libraries around it are installed; silence their messages."""
    from ddit.exporter.models import quiet_libraries

    try:
        import torch  # noqa: F401

        quiet_libraries()
    except ImportError as error:
        raise ModelError(f"exporting needs {error.name}; install it with: pip install 'ddit[export]'") from None


if __name__ == "__main__":
    main()
