"""What families share whose transformer lies in a diffusers pipeline's folder: its weights, and the levels over it."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ddit.exporter.components import TORCH_DTYPES, load_component, shortened
from ddit.exporter.families.base import Family
from ddit.exporter.graphs.job import GraphJob, Original, Tables, floats, level_name
from ddit.exporter.graphs.weights import SafetensorsFolder
from ddit.runtime.bundle.manifest import TensorSpec
from ddit.runtime.conditioning.positions import level_tables

TRUNK_FILE = "transformer.safetensors"


@dataclass(frozen=True)
class PretrainedFamily(Family):
    """A family of diffusers pipelines with a ``transformer`` and a ``vae``."""

    embedding: ClassVar[str]  # the transformer's patch embedding, by name; its head is ``proj_out``

    @cached_property
    def vae_config(self) -> dict[str, Any]:
        """The VAE's configuration."""
        return self.source.config("vae")

    # ---- what differs ----

    @property
    @abstractmethod
    def text_inputs(self) -> tuple[TensorSpec, ...]:
        """The levels' inputs that text feeds."""

    @abstractmethod
    def trace_sizes(self, patch: int) -> Mapping[str, int]:
        """The sizes at which a level is traced."""

    @abstractmethod
    def resized_ends(self, patch: int) -> Mapping[str, Tensor]:
        """A coarse level's embedding and head as they start out, by their names in the level."""

    @abstractmethod
    def native_original(self, transformer: nn.Module) -> Original:
        """The transformer as the pipeline's denoising loop calls it."""

    def rounded(self, transformer: nn.Module) -> nn.Module:
        """A transformer in the graphs' type."""
        return transformer.to(TORCH_DTYPES[self.dtype])

    def stored_value(self, stored: str) -> Tensor:
        """A shared parameter's value as the levels have it, by its name in the pipeline's files."""
        return self._transformer_weights[stored]

    # ---- the levels ----

    def level_job(self, patch: int) -> GraphJob:
        """The graph of one level."""
        module = self.level(self._meta_transformer, patch)
        own = module.own_parameters()
        adapter = self.adapter if module.config is not None else None

        def values(name: str) -> Tensor:
            if name not in own:
                return self.stored_value(self._stored_name(name))
            return adapter.value(patch, name) if adapter else self.resized_ends(patch)[name]

        def place(name: str) -> tuple[str, str]:
            return (f"{level_name(patch)}.safetensors", name) if name in own else (TRUNK_FILE, self._stored_name(name))

        def tables(sizes: Mapping[str, int]) -> Tables:
            return level_tables(self.positions, self.latent, self.native, patch, sizes)

        table: tuple[int | str, ...] = (
            *self.latent.patch_grid(patch),
            sum(axis.dimensions for axis in self.positions.axes),
        )
        return GraphJob(
            name=level_name(patch),
            module=module,
            inputs=(
                floats("latent", *self.latent.shape),
                floats("timestep", "B"),
                *self.text_inputs,
                floats("rope_cos", *table),
                floats("rope_sin", *table),
                *([floats("guidance", "B")] if self.guidance.embedded else []),
            ),
            outputs=(floats("velocity", *self.latent.shape),),
            dtype=self.dtype,
            values=values,
            place=place,
            original=partial(self._original_level, patch),
            trace_sizes=self.trace_sizes(patch),
            tables=tables,
        )

    def _stored_name(self, name: str) -> str:
        """A shared parameter's name in the pipeline's files.

        The native level's embedding and head are the transformer's own layers, which the module has under two names.
        """
        if name.startswith("embed."):
            return name.replace("embed", self.embedding, 1)
        if name.startswith("head."):
            return name.replace("head", "proj_out", 1)
        return name.removeprefix("trunk.")

    def _original_level(self, patch: int, device: torch.device) -> Original:
        """diffusers' transformer at the native patch. Coarse levels have no original: the module itself, in torch."""
        transformer = self._transformer()
        if patch == self.native:
            return self.native_original(transformer.float().to(device))
        level = self.level(transformer, patch).float().to(device)
        level.dtype = torch.float32
        return level

    # ---- the transformer ----

    @cached_property
    def _meta_transformer(self) -> nn.Module:
        """The transformer without weights; every level is traced over this one."""
        with torch.device("meta"):
            transformer: nn.Module = self.transformer_class.from_config(self.transformer_config)
        return self.rounded(transformer)

    @cached_property
    def _transformer_weights(self) -> SafetensorsFolder:
        return SafetensorsFolder(self.source.folder / "transformer")

    def _transformer(self) -> nn.Module:
        """The transformer with its weights in the graphs' type, read independently of the export where possible."""
        if self.depth is None:
            folder = self.source.folder / "transformer"
            transformer: nn.Module = load_component(self.transformer_class, folder, self.dtype)
            return transformer
        make = partial(self.transformer_class.from_config, self.transformer_config)
        return shortened(make, self._transformer_weights)
