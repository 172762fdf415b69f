"""Make a folder with ONNX Runtime's C++ headers and library, for runtime/cpp: ONNXRUNTIME_ROOT.

    python scripts/onnxruntime_sdk.py build/onnxruntime

The library is that of the installed Python package, so that a host in C++ runs what `ddit-run` runs. The package has no
headers. They come from Debian's libonnxruntime-dev: as it is installed, or else from its archive, which apt fetches and
which is unpacked into the folder and nowhere else. ONNX Runtime's interface only grows, so that headers of an older
release fit.
"""

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from ddit.runtime.console import DditCommand, say
from ddit.runtime.errors import DditError

PACKAGE = "libonnxruntime-dev"
RELEASE = "trixie"  # the first Debian that has it
HEADER = "onnxruntime_cxx_api.h"
INSTALLED = Path("/usr/include/onnxruntime")
LISTS = (Path("/etc/apt/sources.list"), Path("/etc/apt/sources.list.d"))


@click.command(cls=DditCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
def main(folder: Path) -> None:
    """Make FOLDER with include/ and lib/, for cmake -DONNXRUNTIME_ROOT=FOLDER."""
    make_sdk(folder)
    say(f"{folder}: ONNX Runtime's headers and library")


def make_sdk(folder: Path) -> None:
    """Fill the folder; what is there already stays. Raises `DditError` where there is no library or are no headers."""
    library = find_library()
    (folder / "lib").mkdir(parents=True, exist_ok=True)
    # a provider's library is looked for beside the main one
    for file in [*library.parent.glob("libonnxruntime_providers_*.so")]:
        link(folder / "lib" / file.name, file)
    for name in ("libonnxruntime.so.1", "libonnxruntime.so"):
        link(folder / "lib" / name, library)
    include = folder / "include" / "onnxruntime"
    if not (include / HEADER).is_file():
        headers = INSTALLED if (INSTALLED / HEADER).is_file() else None
        include.parent.mkdir(exist_ok=True)
        if headers:
            shutil.copytree(headers, include, dirs_exist_ok=True)
        else:
            fetch_headers(include)


def find_library() -> Path:
    """The shared library inside the installed Python package."""
    found = importlib.util.find_spec("onnxruntime")
    folders = found.submodule_search_locations if found else None
    libraries = sorted(Path(folders[0]).glob("capi/libonnxruntime.so.*")) if folders else []
    if not libraries:
        raise DditError("ONNX Runtime's library is not installed; choose one: pip install 'ddit[cpu]' or 'ddit[cuda]'")
    return libraries[-1]


def link(path: Path, target: Path) -> None:
    """A symbolic link, anew."""
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def fetch_headers(include: Path) -> None:
    """The headers in Debian's archive, by apt. Nothing is installed, and apt's own lists stay as they are."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise DditError(f"there are no headers of ONNX Runtime; install {PACKAGE}, or unpack a release's archive")
    with TemporaryDirectory() as name:
        work = Path(name)
        work.chmod(0o755)  # apt fetches as a user of its own
        for part in ("lists/partial", "cache/archives/partial", "sources"):
            (work / part).mkdir(parents=True)
        for file in sources():
            (work / "sources" / file.name).write_text(for_release(file.read_text(encoding="utf-8")), encoding="utf-8")
        apt = ["apt-get", "-qq", "-o", "Dir::Etc::sourcelist=/dev/null", "-o", f"Dir::Etc::sourceparts={work}/sources"]
        apt += [
            "-o",
            f"Dir::State::lists={work}/lists",
            "-o",
            f"Dir::Cache={work}/cache",
            "-o",
            "APT::Sandbox::User=root",
        ]
        run([*apt, "update"], work)
        run([*apt, "download", PACKAGE], work)
        (archive,) = work.glob(f"{PACKAGE}_*.deb")
        run(["dpkg-deb", "-x", str(archive), str(work / "unpacked")], work)
        shutil.copytree(work / "unpacked" / INSTALLED.relative_to("/"), include, dirs_exist_ok=True)


def sources() -> list[Path]:
    """Where apt is told its archives."""
    files = [path for place in LISTS for path in ([place] if place.is_file() else sorted(place.glob("*")))]
    return [path for path in files if path.suffix in (".list", ".sources")]


def for_release(text: str) -> str:
    """The same archives' entries for the release that has the package.

    >>> for_release("Suites: bookworm bookworm-updates")
    'Suites: trixie trixie-updates'
    """
    return re.sub(r"\b(bullseye|bookworm)\b", RELEASE, text)


def run(command: Sequence[str], folder: Path) -> None:
    """Run a command. Raises `DditError` with the end of what it said."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise DditError(f"the headers of ONNX Runtime cannot be fetched: {said}; install {PACKAGE}")


if __name__ == "__main__":
    main()
