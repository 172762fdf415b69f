"""The runtime stays light: it never imports torch, diffusers or the exporter, and not even ONNX Runtime before use."""

import subprocess
import sys
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[2]

HEAVY = (
    *("torch", "diffusers", "transformers", "onnx", "onnxruntime", "matplotlib", "ddit.exporter"),
    *("tensorrt", "polygraphy", "cuda", "filelock", "fastapi", "uvicorn", "prometheus_client", "ray"),
)


def loaded_after(statement: str) -> set[str]:
    code = f"{statement}; import sys; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_runtime_imports_nothing_heavy():
    modules = (
        *("", ".cli", ".tools.verify", ".tools.bench", ".backends.artifacts", ".backends.tensorrt.backend"),
        *(".backends.registry", ".backends.building", ".backends.onnxruntime.cuda", ".serving.engine_room"),
    )
    loaded = loaded_after("import " + ", ".join(f"ddit.runtime{module}" for module in modules))
    assert not loaded & set(HEAVY)


def test_the_exporter_s_help_answers_without_torch():
    assert "torch" not in loaded_after("import ddit.exporter.cli")


def test_building_engines_needs_no_torch():
    assert not loaded_after("import ddit.exporter.cli, ddit.runtime.backends.tensorrt.builder") & {
        "torch",
        "onnx",
        "onnx_ir",
    }


def test_writing_a_single_model_needs_no_torch():
    assert not loaded_after("import ddit.exporter.single.write") & {"torch", "diffusers", "transformers"}


def test_every_package_is_installed():
    """A package that pyproject.toml leaves out works from the repository and is missing from a wheel."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = [
        path.parent for name in ("exporter", "runtime", "profiles") for path in ROOT.glob(f"{name}/**/__init__.py")
    ]
    found = {".".join(("ddit", *folder.relative_to(ROOT).parts)) for folder in folders}
    assert found == set(settings["tool"]["setuptools"]["packages"])
