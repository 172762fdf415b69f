"""ddit-export: a pretrained diffusion transformer becomes a bundle."""

import json
from pathlib import Path

import click

from ddit.runtime.bundle import Dtype
from ddit.runtime.console import DditGroup, say, set_up_logging
from ddit.runtime.errors import ModelError, UsageError

FLUX_DEV = "black-forest-labs/FLUX.1-dev"


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
        if not all(part.isdecimal() and int(part) > 0 for part in parts):
            self.fail(f"{value!r}: give patch sizes separated by commas, as in 2,4,8", param, ctx)
        return tuple(sorted({int(part) for part in parts}))


@click.group(cls=DditGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ddit")
@click.option("-v", "--verbose", count=True, help="Say more; twice for everything.")
def main(verbose: int) -> None:
    """Export a pretrained diffusion transformer, once per patch-size level, to a bundle that ddit-run can run."""
    set_up_logging(verbose)


@main.command()
@click.option("--model", default=FLUX_DEV, show_default=True, help="Hub id, local diffusers folder, or 'demo'.")
@click.option("--revision", help="Branch, tag or commit of the model on the hub.")
@click.option("--levels", type=Levels(), help="Patch sizes to export, as in 2,4,8.  [default: the model's, or 2,4]")
@click.option(
    "--adapter",
    type=click.Path(path_type=Path),
    help="Adapter file with the trained coarse levels.  [default: the model's, or none]",
)
@click.option("--profile", help="Shape profile: 256, 512, 1024, 2048 or a .toml file.  [default: the model's, or 1024]")
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    help="Arithmetic inside the graphs.  [default: the model's, or bf16]",
)
@click.option(
    "--opset",
    type=click.IntRange(17, 23),
    default=23,
    show_default=True,
    help="ONNX opset of the graphs; 17 is for TensorRT 8.6.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the bundle.  [default: MODEL.bundle]")
@click.option("--json", "as_json", is_flag=True, help="Report as JSON on stdout.")
def flux(
    model: str,
    revision: str | None,
    levels: tuple[int, ...] | None,
    adapter: Path | None,
    profile: str | None,
    dtype: Dtype | None,
    opset: int,
    out: Path | None,
    as_json: bool,
) -> None:
    """Export a FLUX.1 pipeline."""
    _require_libraries()
    # heavy imports here, so that --help and usage errors answer at once
    from ddit.exporter.adapter import load_adapter
    from ddit.exporter.build import export_bundle
    from ddit.exporter.families.flux import NATIVE_PATCH, FluxModel
    from ddit.exporter.models import find_model
    from ddit.exporter.opset17 import LOWERED
    from ddit.profiles import ProfileError, load_profile

    source = find_model(model, revision)
    defaults = source.defaults
    dtype = dtype or defaults.dtype or "bf16"
    if opset == LOWERED and dtype == "bf16":
        raise UsageError(
            f"opset {LOWERED} is for TensorRT 8.6, which has no bfloat16; add --dtype fp16 or --dtype fp32"
        )
    levels = levels or defaults.levels or (2, 4)
    if NATIVE_PATCH not in levels:
        raise UsageError(f"the native level {NATIVE_PATCH} must be among the levels: every schedule falls back to it")
    try:
        shapes = load_profile(profile or defaults.profile or "1024")
    except ProfileError as error:
        raise UsageError(str(error)) from None
    if adapter is None and defaults.adapter is not None:
        adapter = source.folder / defaults.adapter
    loaded = load_adapter(adapter) if adapter else None
    untrained = [patch for patch in levels if patch != NATIVE_PATCH and not (loaded and patch in loaded.configs)]
    if untrained:
        names = ", ".join(map(str, untrained))
        say(f"warning: no adapter for level {names}: pictures will suffer where a schedule uses it")
    out = out or Path(f"{source.info.id.rpartition('/')[2]}.bundle")
    export = FluxModel(source, levels, dtype, loaded)
    manifest = export_bundle(export, out, profile=shapes, opset=opset, report=say)
    worst = max(manifest.parity, key=lambda result: result.error / result.tolerance)
    size = sum(info.size for info in manifest.files.values())
    if as_json:
        report = {"out": str(out), "levels": manifest.patches, "bytes": size, "untrained": untrained}
        click.echo(json.dumps({**report, "worst_parity": worst.model_dump()}))
        return
    say(
        f"{out}: levels {', '.join(map(str, manifest.patches))}, {size / 1e6:,.0f} MB; "
        f"worst parity {worst.error:.1e} ({worst.graph}, allowed {worst.tolerance:g})"
    )


def _require_libraries() -> None:
    """See that torch and its companions are there, and keep them quiet: this command says itself what it does."""
    try:
        import diffusers.utils.logging
        import torch  # noqa: F401
        import transformers.utils.logging
    except ImportError as error:
        raise ModelError(f"exporting needs {error.name}; install it with: pip install 'ddit[export]'") from None
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


if __name__ == "__main__":
    main()
