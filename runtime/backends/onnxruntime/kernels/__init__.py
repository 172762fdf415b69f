"""CUDA kernels for the operators of domain ``ddit``, which a level's twin uses between its matrix products.

The operators are a library for ONNX Runtime (operators.cpp), built when ddit is installed where there is a C++
compiler. Their kernels (kernels.cu) are compiled by NVRTC for the GPU that is there, once for a user. Where either is
missing, ONNX Runtime runs the functions of the same names that every twin holds, which is slower.
"""

import ctypes
import hashlib
import logging
from contextlib import suppress
from pathlib import Path

from ddit.runtime.errors import DditError
from ddit.runtime.files import user_cache, whole

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
SOURCES = ("arguments.h", "conversions.cuh", "kernels.cu")  # in the order in which they are one program
LIBRARY = "operators.*"
FLOAT8_SINCE = (8, 9)  # compute capability
SUFFIXES = {".so", ".pyd", ".dll"}


def find_library() -> Path | None:
    """The built library; None where ddit was installed without a C++ compiler."""
    return next((path for path in sorted(FOLDER.glob(LIBRARY)) if path.suffix in SUFFIXES), None)


def load_kernels(capability: str) -> Path | None:
    """Load the kernels for a GPU; its ``capability`` is as in ``"9.0"``.

    Returns the library to register with a session; None where there is none, or where it cannot be used, with a
    warning.
    """
    library = find_library()
    if library is None:
        log.warning("ddit has no CUDA kernels, and steps take longer: install a C++ compiler, then ddit again")
        return None
    try:
        code = _compiled(f"sm_{capability.replace('.', '')}")
        status = ctypes.CDLL(str(library)).ddit_load(code)
    except Exception as error:  # whatever: the model runs all the same
        log.warning("the CUDA kernels cannot be used, and steps take longer: %s", str(error).splitlines()[0])
        return None
    if status:
        log.warning("the CUDA kernels cannot be loaded, and steps take longer: CUDA answers %d", status)
        return None
    return library


def why_no_float8(capability: str) -> str | None:
    """Why there are no products in FP8 on a GPU after `load_kernels`; None where there are."""
    if tuple(map(int, capability.split("."))) < FLOAT8_SINCE:
        return f"the GPU has compute capability {capability}, FP8 needs 8.9 or newer"
    library = find_library()
    if library is None:
        return "ddit was installed without its kernels"
    if not getattr(ctypes.CDLL(str(library)), "ddit_float8", int)():  # one that is older than this has none
        return "cuBLASLt of CUDA 12 or 13 is not found; run: pip install 'ddit[cuda]'"
    return None


def _compiled(arch: str) -> bytes:
    """The kernels' code for an architecture, as in ``"sm_90"``: from the user's cache, or compiled and kept there."""
    source = "".join((FOLDER / name).read_text(encoding="utf-8") for name in SOURCES)
    key = hashlib.sha256(f"{arch}\n{source}".encode()).hexdigest()[:16]
    path = user_cache() / f"kernels-{arch}-{key}.cubin"
    with suppress(OSError):
        return path.read_bytes()
    from cuda.core import Program, ProgramOptions

    log.info("compiling the CUDA kernels for %s", arch)
    compiled = Program(source, "c++", ProgramOptions(arch=arch, std="c++17")).compile("cubin")
    code = bytes(compiled.code)
    with suppress(OSError, DditError):  # it is compiled again next time
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as partial:
            partial.write_bytes(code)
    return code
