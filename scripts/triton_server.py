"""Make a folder with a Triton server that runs models of its Python backend, from the wheel of nvidia-pytriton.

    python scripts/triton_server.py build/triton
    build/triton/tritonserver --model-repository models

The wheel carries the server, the Python backend and a stub for every Python. It is unpacked and not installed, because
that stub reads the arrays of NumPy 1 alone. So the folder has a Python environment of its own: NumPy 1, and behind it
the packages of the Python that runs this, ddit among them. There is no GPU support in it that this project has tried.
"""

import os
import shutil
import site
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import click

from ddit.runtime.console import DditCommand, say
from ddit.runtime.errors import DditError
from ddit.runtime.folders import new_folder, replace_folder

WHEEL = "nvidia-pytriton==0.7.0"  # with Triton 2.51, of release 24.10
NUMPY = "numpy>=1.26,<2"
SERVER = "pytriton/tritonserver"
STUB = "triton_python_backend_stub"
LAUNCHER = """#!/bin/sh
here=$(cd "$(dirname "$0")" && pwd)
export LD_LIBRARY_PATH="$here/nvidia_pytriton.libs:{libraries}:$LD_LIBRARY_PATH"
export PATH="$here/python/bin:$PATH"  # where the stub looks for its Python
exec "$here/pytriton/tritonserver/bin/tritonserver" --backend-directory "$here/pytriton/tritonserver/backends" "$@"
"""


@click.command(cls=DditCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
def main(folder: Path) -> None:
    """Make FOLDER with a program tritonserver, which takes the real one's options."""
    make_server(folder)
    say(f"{folder / 'tritonserver'} --model-repository MODELS")


def make_server(folder: Path) -> None:
    """Fill the folder, whole or not at all. Raises `DditError` where there is no such server for this machine."""
    with new_folder(folder.absolute()) as new:
        pip(["download", "--no-deps", "--only-binary=:all:", "--dest", str(new), WHEEL])
        (wheel,) = new.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(new)
        wheel.unlink()
        stub = new / SERVER / "python_backend_stubs" / f"{sys.version_info[0]}.{sys.version_info[1]}" / STUB
        if not stub.is_file():
            raise DditError(f"{WHEEL} has no stub for Python {sys.version_info[0]}.{sys.version_info[1]}")
        placed = shutil.copy(stub, new / SERVER / "backends" / "python")
        make_environment(new / "python")
        launcher = new / "tritonserver"
        launcher.write_text(LAUNCHER.format(libraries=sysconfig.get_config_var("LIBDIR")), encoding="utf-8")
        for program in (launcher, new / SERVER / "bin" / "tritonserver", Path(placed)):
            program.chmod(0o755)
        replace_folder(new, folder.absolute())


def make_environment(folder: Path) -> None:
    """A Python environment with NumPy 1, and behind it what this Python finds."""
    venv.EnvBuilder(symlinks=True).create(folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    pip(["install", "--no-deps", "--only-binary=:all:", "--target", str(packages), NUMPY])
    places = [*filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), *site.getsitepackages()]
    # addsitedir reads the .pth files there too, by which editable installs are found
    lines = [f"import site; site.addsitedir({os.path.abspath(place)!r})" for place in places]
    (packages / "others.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")


def pip(arguments: Sequence[str]) -> None:
    """Run pip. Raises `DditError` with the end of what it said."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
        raise DditError(f"Triton's server cannot be had: {said[-1].removeprefix('ERROR: ')}")


if __name__ == "__main__":
    main()
