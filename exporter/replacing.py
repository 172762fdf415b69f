"""A bundle's folder while it is written: it appears whole, and an older bundle stays until the new one is complete."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from ddit.runtime.backends.artifacts import FOLDER as ENGINES
from ddit.runtime.backends.artifacts import EngineStore
from ddit.runtime.backends.onnxruntime.host import FLOAT8
from ddit.runtime.bundle import MANIFEST, Bundle, read_manifest
from ddit.runtime.errors import ModelError, UsageError
from ddit.runtime.files import PARTIAL
from ddit.runtime.folders import flush, locked, new_folder, replace_folder

ENDINGS = (".onnx", ".safetensors", ".tokenizer.json")  # of a bundle's files
KILLED = (f"{FLOAT8}.safetensors", f".{FLOAT8}.onnx")  # endings of what a killed ddit-export fp8 left


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A new folder to write a bundle into. When the block ends well it takes the place of ``out``.

    Engines of graphs that stay the same come along. A symbolic link stays, and what it points to is replaced. Raises
    `UsageError` for a place that is something else than a bundle, `ModelError` where it cannot be written; ``out`` is
    then as it was.
    """
    try:
        # beside what a link points to: a rename works only within one disk
        target = Path(os.path.realpath(out))
        _check_place(out, target)
        with new_folder(target) as folder:
            yield folder
            flush(folder)
            # no calibration and no engine is added between the look at the old bundle and its end
            with locked(target) if target.exists() else nullcontext():
                _check_place(out, target)
                new = Bundle(folder, read_manifest(folder))
                EngineStore(new).adopt(EngineStore(Bundle(target, new.manifest)))
                replace_folder(folder, target)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ModelError(
                f"no space left on the disk of {out.parent}; free some and run the command again"
            ) from None
        raise ModelError(f"{out} cannot be written: {error.strerror or error}") from None


def _check_place(out: Path, target: Path) -> None:
    """Raise `UsageError` unless a bundle can be put at ``target``, which ``out`` leads to, and nothing is lost."""
    if not os.path.lexists(target):
        return
    if not (target / MANIFEST).is_file():
        raise UsageError(f"{out} exists and is not a bundle; choose another --out")
    here = Path.cwd()
    if here == target or target in here.parents:
        raise UsageError(f"{out} is the folder that you are in, which cannot be replaced; go elsewhere first")
    if target.is_mount():
        raise UsageError(f"{out} is where a disk is mounted, which cannot be replaced; choose another --out")
    if foreign := _foreign(target):
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise UsageError(
            f"{out} holds {foreign[0]}{more}, which the bundle's manifest does not name and which would be lost; "
            "move it away or choose another --out"
        )


def _foreign(bundle: Path) -> list[str]:
    """The names of what a bundle's folder holds beside the bundle."""
    names = sorted(path.name for path in bundle.iterdir())
    others = [name for name in names if name not in (MANIFEST, ENGINES) and not _is_left_over(name)]
    try:
        # of any version of the format
        files = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))["files"]
        known = {Path(name).parts[0] for name in files}
    except (ValueError, KeyError, TypeError, IndexError):
        return [name for name in others if not name.endswith(ENDINGS)]
    return [name for name in others if name not in known]


def _is_left_over(name: str) -> bool:
    """Whether a killed calibration or export to FP8 left a file of this name."""
    return (name.startswith(".") and PARTIAL in name) or name.endswith(KILLED)
