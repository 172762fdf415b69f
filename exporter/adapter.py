"""The adapter file: one safetensors file with what every coarse level adds to the base model.

Tensors are named ``level_<patch>.<parameter>``: ``embed`` and ``head`` (weight, bias), ``identity``, ``residual.…``
and, for LoRA, the base layer's path followed by ``lora_A.weight`` and ``lora_B.weight`` as peft names them. The
metadata hold the format, the family, the base model and every level's `AdapterConfig`. See docs/adapter.md.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ddit.exporter.levels import AdapterConfig, Level
from ddit.runtime.errors import AdapterError

FORMAT = "ddit-adapter"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Adapter:
    """What an adapter file holds: its levels' configurations and their tensors, memory-mapped where they were read."""

    path: Path
    base_model: str
    family: str
    configs: Mapping[int, AdapterConfig]
    tensors: Mapping[str, Tensor]

    def value(self, patch: int, parameter: str) -> Tensor:
        """The value of one of a level's own parameters, by its name in the level."""
        return self.tensors[f"level_{patch}.{parameter.removeprefix('trunk.')}"]

    def apply(self, level: Level, patch: int, *, shortened: bool = False) -> None:
        """Fill a level's own parameters. Raises `AdapterError` when names or shapes do not fit.

        ``shortened``: the level has fewer blocks than the model that the adapter was made for; the rest is left out.
        """
        prefix = f"level_{patch}."
        found = {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}
        wanted = {name.removeprefix("trunk."): parameter for name, parameter in level.own_parameters().items()}
        if shortened:
            found = {name: tensor for name, tensor in found.items() if name in wanted}
        if odd := sorted(found.keys() ^ wanted.keys()):
            raise AdapterError(
                f"{self.path.name} does not fit the model: {odd[0]!r} of level {patch} is "
                f"{'missing in the file' if odd[0] in wanted else 'unknown to the model'}; "
                f"the adapter was made for {self.base_model!r}"
            )
        for name, parameter in wanted.items():
            if parameter.shape != found[name].shape:
                raise AdapterError(
                    f"{self.path.name} does not fit the model: {name!r} of level {patch} has shape "
                    f"{tuple(found[name].shape)}, the model needs {tuple(parameter.shape)}; "
                    f"the adapter was made for {self.base_model!r}"
                )
            with torch.no_grad():
                parameter.copy_(found[name])

    def save(self) -> None:
        """Write the file."""
        metadata = {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "family": self.family,
            "base_model": self.base_model,
            "levels": json.dumps({str(patch): asdict(config) for patch, config in self.configs.items()}),
        }
        # not save_file, which makes files that only their owner may read
        self.path.write_bytes(save(dict(self.tensors), metadata=metadata))


def save_adapter(
    path: Path | str,
    levels: Mapping[int, Level],
    *,
    base_model: str,
    family: str,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the own parameters of coarse levels, by patch size, as one adapter file."""
    tensors = {
        f"level_{patch}.{name.removeprefix('trunk.')}": parameter.detach().to("cpu", dtype).contiguous()
        for patch, level in levels.items()
        for name, parameter in level.own_parameters().items()
    }
    configs = {patch: level.config for patch, level in levels.items() if level.config}
    Adapter(Path(path), base_model, family, configs, tensors).save()


def load_adapter(path: Path | str) -> Adapter:
    """Read an adapter file. Raises `AdapterError` when it is not one."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise AdapterError(f"adapter file {path} is not a regular file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise AdapterError(
                    f"{path} is not an adapter file (no {FORMAT!r} in its metadata); see docs/adapter.md"
                )
            if int(metadata["format_version"]) > FORMAT_VERSION:
                raise AdapterError(
                    f"{path} has adapter format {metadata['format_version']}, this version reads up to "
                    f"{FORMAT_VERSION}; update ddit"
                )
            family = metadata["family"]
            configs = {
                int(patch): AdapterConfig(**{**config, "targets": tuple(config["targets"])})
                for patch, config in json.loads(metadata["levels"]).items()
            }
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except FileNotFoundError:
        raise AdapterError(f"adapter file {path} does not exist") from None
    except KeyError as error:
        raise AdapterError(f"adapter file {path} cannot be read: it has no {error} in its metadata") from error
    except (SafetensorError, AttributeError, TypeError, ValueError, OSError, RecursionError) as error:
        raise AdapterError(f"adapter file {path} cannot be read: {error}") from error
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise AdapterError(f"adapter file {path} holds NaN or infinity in {name!r}; train it again")
    return Adapter(path, metadata.get("base_model", "unknown"), family, configs, tensors)
