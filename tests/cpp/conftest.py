"""The C++ host, built once a session: optimised, and with sanitizers. Skipped where its build lacks something."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from conftest import make_once
from ddit.runtime.bundle import Bundle
from ddit.runtime.conditioning.text import Tokenizer
from ddit.runtime.errors import DditError
from ddit.runtime.samplers.sigmas import noise

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "runtime" / "cpp"
EMULATED = Path(__file__).parent / "emulated_tensorrt"
TENSORRT = {8: "8.6.0", 10: "10.9.0.34", 11: "11.4.0.106"}
PROMPT = "a red circle on a striped background"
SEED = 7
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # pip's cmake and ninja first
PNG_HEADERS = (Path("/usr/include/png.h"), Path("/usr/include/libpng16/png.h"), Path("/usr/local/include/png.h"))


def json_headers() -> Path | None:
    """nlohmann-json's folder: the system's, or that of the Python package."""
    if Path("/usr/include/nlohmann/json.hpp").is_file():
        return Path("/usr/include")
    found = importlib.util.find_spec("nlohmann_json")
    return Path(found.submodule_search_locations[0]) / "include" if found else None


@pytest.fixture(scope="session")
def sdk(shared_folder) -> Path:
    """ONNX Runtime's headers and library."""
    from onnxruntime_sdk import make_sdk

    for tool in ("g++", "cmake", "ninja"):
        if shutil.which(tool, path=PATH) is None:
            pytest.skip(f"the C++ host needs {tool}: apt-get install g++, pip install cmake ninja")
    if json_headers() is None:
        pytest.skip("the C++ host needs nlohmann-json's headers: pip install nlohmann-json")
    if not any(path.is_file() for path in PNG_HEADERS):
        pytest.skip("the C++ host needs libpng's headers: apt-get install libpng-dev")

    def make(path: Path) -> None:
        try:
            make_sdk(path)
        except DditError as error:
            pytest.skip(f"the C++ host cannot be built here: {error}")

    return make_once(shared_folder / "onnxruntime", make)


def tool(*arguments: object, cwd: Path = ROOT) -> None:
    """Run a tool of the build; what it said is the failure."""
    words = [str(argument) for argument in arguments]
    done = subprocess.run(words, cwd=cwd, env={**os.environ, "PATH": PATH}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"


def build(preset: str, folder: Path, *settings: str) -> None:
    """Configure and build a preset in a folder."""
    tool("cmake", "--preset", preset, "-B", folder, *settings, cwd=SOURCE)
    tool("cmake", "--build", folder)


@pytest.fixture(scope="session")
def cuda() -> Path | None:
    """CUDA's runtime library and its headers, as Python packages bring them: include/ and lib/."""
    found = importlib.util.find_spec("nvidia")
    folders = map(Path, found.submodule_search_locations if found else ())
    return next((one / "cu13" for one in folders if (one / "cu13" / "include" / "crt").is_dir()), None)


def compile_shared(source: Path, library: Path, *options: object) -> None:
    """One file to a shared library, which is found by its own name."""
    library.parent.mkdir(parents=True, exist_ok=True)
    tool("g++", "-std=c++17", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", source, *options, "-o", library)


@pytest.fixture(scope="session")
def emulated(shared_folder, sdk, cuda) -> dict[int, Path]:
    """A folder with an emulated TensorRT and the GPU under it for every release: include/ and lib/."""

    def make(folder: Path, release: int) -> None:
        header = folder / "include" / "NvInferRuntime.h"
        header.parent.mkdir(parents=True)
        header.write_text(f"#define TENSORRT_RELEASE {release}\n{(EMULATED / header.name).read_text()}")
        gpu, lib = folder / "lib" / "libcudart.so.13", sdk / "lib"
        compile_shared(EMULATED / "cudart.cpp", gpu, "-isystem", cuda / "include")
        folders = (header.parent, cuda / "include", sdk / "include" / "onnxruntime", json_headers())
        libraries = (gpu, f"-L{lib}", "-lonnxruntime", f"-Wl,-rpath,{lib}:{gpu.parent}")
        includes = (word for path in folders for word in ("-I", path))
        compile_shared(EMULATED / "nvinfer.cpp", gpu.with_name("libnvinfer.so"), *includes, *libraries)

    return {
        release: make_once(shared_folder / f"tensorrt-{release}", partial(make, release=release))
        for release in (TENSORRT if cuda else ())
    }


@pytest.fixture(scope="session")
def places(sdk, cuda, emulated) -> list[str]:
    """Where cmake finds the libraries: ONNX Runtime, and the newest TensorRT where CUDA's headers are."""
    found = [f"-DONNXRUNTIME_ROOT={sdk}", f"-DNLOHMANN_JSON_INCLUDE_DIR={json_headers()}"]
    if emulated:
        newest = emulated[max(TENSORRT)]
        found += [f"-DTENSORRT_ROOT={newest}", f"-DCUDAToolkit_ROOT={cuda}"]
        found.append(f"-DTensorRT_CUDART_LIBRARY={newest / 'lib' / 'libcudart.so.13'}")
    return found


@pytest.fixture(scope="session")
def release(shared_folder, places) -> Path:
    """The optimised build's folder."""
    return make_once(shared_folder / "cpp-release", lambda path: build("release", path, *places, "-DDDIT_TESTS=ON"))


@pytest.fixture(scope="session")
def sanitized(shared_folder, places) -> Path:
    """The folder of the build with AddressSanitizer and UndefinedBehaviorSanitizer."""
    return make_once(shared_folder / "cpp-sanitized", lambda path: build("sanitize", path, *places[:2]))


@pytest.fixture(scope="session")
def tensorrt_hosts(shared_folder, sdk, cuda, emulated, release) -> dict[int, Path]:
    """The folder of ddit_host for every release: the newest as CMake builds it, the others with its other objects."""
    if not emulated:
        pytest.skip("needs CUDA's headers: pip install nvidia-cuda-runtime nvidia-cuda-crt")

    def make(folder: Path, number: int) -> None:
        folder.mkdir()
        lib = emulated[number] / "lib"
        strict = ("-std=c++17", "-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Werror")
        includes = ("-I", SOURCE / "include", "-isystem", cuda / "include", "-isystem", lib.parent / "include")
        objects = (SOURCE / "src" / "tensorrt.cpp", next(release.rglob("main.cpp.o")), release / "libddit.a")
        link_host(folder, sdk, *strict, *includes, *objects, lib / "libnvinfer.so", lib / "libcudart.so.13",
                  f"-Wl,-rpath,{lib}")  # fmt: skip

    newest = max(TENSORRT)
    return {newest: release} | {
        number: make_once(shared_folder / f"cpp-tensorrt-{number}", partial(make, number=number))
        for number in TENSORRT
        if number != newest
    }


def link_host(folder: Path, sdk: Path, *parts: object) -> None:
    """A ddit_host of objects, with what every one needs."""
    lib = sdk / "lib"
    tool("g++", *parts, lib / "libonnxruntime.so", "-lpng", f"-Wl,-rpath,{lib}", "-o", folder / "ddit_host")


Run = Callable[..., subprocess.CompletedProcess[str]]


def runner(program: Path, **variables: str) -> Run:
    """Calls of a program, with variables of its environment."""
    # a bundle may ask for more memory than there is: then the allocation fails, which is no error of the program.
    # ONNX Runtime keeps objects until the end of the process
    environment = {**os.environ, "ASAN_OPTIONS": "allocator_may_return_null=1:detect_leaks=0", **variables}

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        words = [str(program), *map(str, arguments)]
        return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, check=False)

    return call


@pytest.fixture(scope="session")
def host(release) -> Run:
    """Runs ddit_host."""
    return runner(release / "ddit_host")


@pytest.fixture(scope="session")
def checked_host(sanitized) -> Run:
    """Runs ddit_host with its sanitizers."""
    return runner(sanitized / "ddit_host")


def write_inputs(bundle: Path, folder: Path, height: int, width: int, frames: int | None = None) -> Sequence[object]:
    """The prompt's ids and the seed's noise as files, and the arguments that name them."""
    opened = Bundle.open(bundle)
    manifest = opened.manifest
    encoders = {one.graph: Tokenizer(opened.file(one.tokenizer.file), one.tokenizer) for one in manifest.encoders}
    files: list[object] = []
    for option, text in (("--ids", PROMPT), ("--negative-ids", "")):
        if text or manifest.guidance.kind == "two_passes":
            file = folder / f"{option.removeprefix('--')}.json"
            file.write_text(json.dumps({graph: encode(text)[0].tolist() for graph, encode in encoders.items()}))
            files += (option, file)
    sizes = {"frames": frames, "height": height, "width": width}
    sides = [axis.to_latent(sizes[axis.name]) for axis in manifest.latent.axes]
    np.save(folder / "noise.npy", noise(SEED, (manifest.latent.channels, *sides)))
    clip = ("--frames", frames) if frames else ()
    return (*files, "--noise", folder / "noise.npy", "--height", height, "--width", width, *clip)
