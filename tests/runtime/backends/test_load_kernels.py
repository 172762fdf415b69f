"""Finding and compiling the CUDA kernels: a cubin is compiled once, and nothing that goes wrong stops a run."""

import sys
from types import SimpleNamespace

import pytest

from ddit.runtime.backends.onnxruntime import kernels


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A folder with the kernels' sources and a library that takes what it is given."""
    for name in kernels.SOURCES:
        (tmp_path / name).write_text(f"// {name}\n")
    path = tmp_path / "operators.so"
    path.write_bytes(b"")
    loaded = []
    monkeypatch.setattr(kernels, "FOLDER", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(
        kernels.ctypes, "CDLL", lambda _: SimpleNamespace(ddit_load=lambda code: loaded.append(code) or 0)
    )
    return SimpleNamespace(path=path, loaded=loaded)


@pytest.fixture
def compiler(monkeypatch):
    """cuda.core as far as it is used; `programs` are those that it compiled."""
    programs = []

    class Program:
        def __init__(self, source, kind, options):
            programs.append((source, kind, options))

        def compile(self, kind):
            return SimpleNamespace(code=f"{kind} {len(programs)}".encode())

    monkeypatch.setitem(sys.modules, "cuda", SimpleNamespace())
    monkeypatch.setitem(
        sys.modules, "cuda.core", SimpleNamespace(Program=Program, ProgramOptions=lambda **options: options)
    )
    return programs


def test_kernels_are_compiled_once_for_a_gpu(library, compiler):
    assert kernels.load_kernels("9.0") == library.path
    assert kernels.load_kernels("9.0") == library.path
    assert library.loaded == [b"cubin 1"] * 2
    source, kind, options = compiler[0]
    assert source == "// arguments.h\n// conversions.cuh\n// kernels.cu\n"
    assert (kind, options) == ("c++", {"arch": "sm_90", "std": "c++17"})
    kernels.load_kernels("12.0")
    assert [options["arch"] for *_, options in compiler] == ["sm_90", "sm_120"]


def test_kernels_are_compiled_anew_when_their_source_changes(library, compiler):
    kernels.load_kernels("9.0")
    (library.path.parent / "kernels.cu").write_text("// better")
    kernels.load_kernels("9.0")
    assert len(compiler) == 2


def test_a_cache_that_cannot_be_written_is_no_hindrance(library, compiler, monkeypatch):
    (library.path.parent / "cache").write_text("a file, no folder")
    assert kernels.load_kernels("9.0") == library.path


def test_without_a_compiler_of_kernels_there_is_a_warning(library, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    assert kernels.load_kernels("9.0") is None
    assert "the CUDA kernels cannot be used" in caplog.text


def test_without_the_library_there_is_a_warning(library, caplog):
    library.path.unlink()
    assert kernels.load_kernels("9.0") is None
    assert "install a C++ compiler" in caplog.text
