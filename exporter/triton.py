"""ddit-export triton: a model repository for NVIDIA's Triton server, with a bundle as a model of the Python backend."""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import click

from ddit.runtime.bundle import Bundle, Manifest
from ddit.runtime.commands.options import BACKEND, BUNDLE, THREADS, VAE_TILING
from ddit.runtime.console import DditCommand, say
from ddit.runtime.errors import ModelError, UsageError
from ddit.runtime.folders import flush, new_folder, replace_folder
from ddit.runtime.serving.triton import CLIP, IMAGE, PROMPT, REPORT, inputs
from ddit.runtime.tiling import check_side

CONFIG = "config.pbtxt"
MARK = "# Written by ddit-export triton"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
MODEL = '''"""The bundle that config.pbtxt names, in an engine room; ddit has to be installed in Triton's Python."""

from ddit.runtime.serving.triton import Model


class TritonPythonModel(Model):
    """Makes pictures; all requests share the engines step by step."""
'''


@click.command(cls=DditCommand)
@BUNDLE
@click.argument("repository", metavar="REPO", type=click.Path(path_type=Path, file_okay=False))
@click.option("--name", help="Of the model.  [default: the bundle's folder, without .bundle]")
@click.option("--copy", is_flag=True, help="Copy the bundle into the repository; else its path is written there.")
@click.option("--in-flight", type=click.IntRange(1, 1024), default=32, show_default=True,
              help="Pictures that denoise at once.")  # fmt: skip
@click.option("--waiting", type=click.IntRange(0, 100_000), default=256, show_default=True,
              help="Pictures that may wait; more are refused as unavailable.")  # fmt: skip
@BACKEND
@THREADS
@VAE_TILING
def triton(
    bundle: Path,
    repository: Path,
    name: str | None,
    copy: bool,
    in_flight: int,
    waiting: int,
    backend: str | None,
    threads: int | None,
    vae_tiling: int | None,
) -> None:
    """Write a bundle as a model into Triton's model repository REPO. Needs no torch."""
    opened = Bundle.open(bundle)
    check_side(opened.manifest.latent, vae_tiling)
    name = name or bundle.resolve().name.removesuffix(".bundle")
    options = {"in_flight": in_flight, "waiting": waiting, "backend": backend, "threads": threads,
               "vae_tiling": vae_tiling}  # fmt: skip
    given = {key: str(value) for key, value in options.items() if value is not None}
    written = write_model(opened, repository, name, given, copy=copy)
    say(f"{written}; run: tritonserver --model-repository {repository}")


def write_model(bundle: Bundle, repository: Path, name: str, options: Mapping[str, str], *, copy: bool) -> Path:
    """Write the model's folder, whole or not at all, in the place of an older one; returns it.

    ``options`` are those of `ddit.runtime.serving.triton.Model`. Raises `UsageError` for a name that is none or a place
    that is something else, `ModelError` where it cannot be written.
    """
    if not NAME.fullmatch(name):
        raise UsageError(f"{name!r} is no name for a model; give --name with letters, digits and ._- alone")
    target = Path(os.path.realpath(repository / name))
    if os.path.lexists(target) and not _is_ours(target):
        raise UsageError(f"{target} exists and was not written by ddit-export triton; choose another --name")
    try:
        with new_folder(target) as folder:
            (folder / "1").mkdir()
            (folder / "1" / "model.py").write_text(MODEL, encoding="utf-8")
            if copy:
                with bundle.unchanged():
                    shutil.copytree(bundle.path, folder / "bundle")
            place = "bundle" if copy else str(bundle.path.resolve())
            text = config(bundle.manifest, name, {"bundle": place, **options})
            (folder / CONFIG).write_text(text, encoding="utf-8")
            flush(folder)
            replace_folder(folder, target)
    except OSError as error:
        raise ModelError(f"{target} cannot be written: {error.strerror or error}") from None
    return repository / name


def config(manifest: Manifest, name: str, parameters: Mapping[str, str]) -> str:
    """The model's ``config.pbtxt``."""
    clips = manifest.latent.has_frames
    shape = "-1, -1, -1, 3" if clips else "-1, -1, 3"
    lines = [
        f"{MARK} for {manifest.model.id}.",
        f"name: {quoted(name)}",
        'backend: "python"',
        "max_batch_size: 0  # an engine room batches steps, not requests",
        "input [",
        ",\n".join(
            f"  {{ name: {quoted(one)} data_type: TYPE_{kind} dims: [ 1 ]"
            f"{'' if one == PROMPT else ' optional: true'} }}"
            for one, kind in inputs(manifest).items()
        ),
        "]",
        "output [",
        f"  {{ name: {quoted(CLIP if clips else IMAGE)} data_type: TYPE_UINT8 dims: [ {shape} ] }},",
        f"  {{ name: {quoted(REPORT)} data_type: TYPE_STRING dims: [ 1 ] }}",
        "]",
        "# one instance: another one would have an engine room and weights of its own",
        "instance_group [ { kind: KIND_MODEL count: 1 } ]",
        *(
            f"parameters {{ key: {quoted(key)} value: {{ string_value: {quoted(value)} }} }}"
            for key, value in parameters.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def quoted(text: str) -> str:
    """A text as protobuf's text format has it."""
    return json.dumps(text, ensure_ascii=False)


def _is_ours(folder: Path) -> bool:
    """Whether a model's folder was written here."""
    try:
        return (folder / CONFIG).read_text(encoding="utf-8").startswith(MARK)
    except (OSError, UnicodeDecodeError):
        return False
