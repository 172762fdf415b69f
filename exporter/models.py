"""Where a pretrained pipeline comes from: a demo model, a local folder, or the hub."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ddit.profiles import why_invalid
from ddit.runtime import strict_json
from ddit.runtime.bundle.manifest import (
    MAX_GUIDANCE,
    MAX_STEPS,
    Dtype,
    ModelInfo,
    Patch,
    SmoothPoint,
    SpectrumInfo,
    StepCount,
)
from ddit.runtime.console import printable
from ddit.runtime.errors import ModelError
from ddit.runtime.reading import read_text

DEMOS = ("demo", "demo-video")  # of pictures, of clips; folders beside this file
DEFAULTS_FILE = "ddit.json"
LONGEST_CONFIG = 16_000_000  # bytes


class ExportDefaults(BaseModel):
    """What a model's folder may say about its own export, in ``ddit.json`` beside ``model_index.json``.

    Every field is optional; the command line's options come first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    levels: tuple[Patch, ...] | None = None
    dtype: Dtype | None = None
    profile: str | None = None
    adapter: str | None = None  # file in the same folder
    guidance: float | None = Field(default=None, ge=-MAX_GUIDANCE, le=MAX_GUIDANCE)
    carry: float | None = Field(default=None, ge=0, le=1)
    steps: StepCount | None = None
    tau: float | None = Field(default=None, gt=0)
    rho: float | None = Field(default=None, gt=0, lt=1)
    warmup: int | None = Field(default=None, ge=3, le=MAX_STEPS)
    hold: int | None = Field(default=None, ge=1, le=MAX_STEPS)
    coarsest: Patch | None = None
    smooth: tuple[SmoothPoint, ...] | None = None
    spectrum: SpectrumInfo | None = None


class Config(dict[str, Any]):
    """A component's configuration. A setting that it lacks raises `ModelError`."""

    def __init__(self, path: Path, values: Mapping[str, Any]):
        super().__init__(values)
        self.path = path

    def __missing__(self, key: str) -> Any:
        raise ModelError(f"{self.path} has no {key!r}; is it the configuration of another kind of model?")


@dataclass(frozen=True)
class Source:
    """A diffusers pipeline's folder on this machine, and what to call it in the manifest."""

    folder: Path
    info: ModelInfo
    defaults: ExportDefaults

    def config(self, component: str, file: str = "config.json") -> Config:
        """A component's configuration. Raises `ModelError`."""
        path = self.folder / component / file
        try:
            content = strict_json.parse(read_text(path, LONGEST_CONFIG))
        except (OSError, ValueError) as error:
            raise ModelError(f"{path} cannot be read: {error}; is {self.folder} a whole diffusers pipeline?") from None
        if not isinstance(content, dict):
            raise ModelError(f"{path} is not a configuration; is {self.folder} a whole diffusers pipeline?")
        return Config(path, content)


def quiet_libraries() -> None:
    """Silence diffusers and transformers: our commands report progress themselves."""
    import diffusers.utils.logging
    import transformers.utils.logging

    warnings.filterwarnings("ignore", "`torch_dtype` is deprecated")  # older diffusers need this name
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def find_model(name: str, revision: str | None = None) -> Source:
    """The folder of ``demo`` or ``demo-video``, a local path, or a hub id (downloaded into the hub's cache)."""
    if name in DEMOS:
        folder = Path(str(files("ddit.exporter") / name))
        if not (folder / "model_index.json").is_file():
            raise ModelError(f"this installation has no model {name!r}; install ddit from its repository")
        info = ModelInfo(id=name)
    elif Path(name).is_dir():
        folder, info = Path(name), ModelInfo(id=printable(Path(name).resolve().name))
    elif name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelError(f"model {name!r} is neither a folder nor a hub id such as black-forest-labs/FLUX.1-dev")
    else:
        folder, info = _download(name, revision)
    if not (folder / "model_index.json").is_file():
        raise ModelError(f"{folder} is not a diffusers pipeline: it has no model_index.json")
    return Source(folder, info, _defaults(folder))


def _defaults(folder: Path) -> ExportDefaults:
    path = folder / DEFAULTS_FILE
    if not path.is_file():
        return ExportDefaults()
    try:
        return ExportDefaults.model_validate_json(read_text(path, LONGEST_CONFIG))
    except ValidationError as error:
        raise ModelError(f"{path} is not valid: {why_invalid(error)}") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None


def _download(name: str, revision: str | None) -> tuple[Path, ModelInfo]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    # not the single-file checkpoints at the top of such repositories, which hold the same weights again
    wanted = ["model_index.json", DEFAULTS_FILE, "*/*.json", "*/*.safetensors", "*/*.txt", "*/*.model"]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except GatedRepoError:
        raise ModelError(
            f"{name} is gated: accept its licence at https://huggingface.co/{name}, then log in with: hf auth login"
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"the hub has no model {name!r}, or it is private: check the name, or log in with: hf auth login"
        ) from None
    except LocalEntryNotFoundError:
        raise ModelError(
            f"the hub cannot be reached and {name} is not in its cache; check the network, or give a local folder"
        ) from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(f"{name} could not be downloaded: {str(error).strip().splitlines()[0]}") from None
    return folder, ModelInfo(id=name, revision=folder.name)
