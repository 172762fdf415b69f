"""The type of a model family: everything that differs between families, and who asks for it.

Adding a family touches at most three files: ``families/__init__.py``, one more `FamilyInfo`; ``families/<name>.py``,
its `Family` and the modules that it traces; and, where that is a folder of files instead, ``pyproject.toml``, which
lists the packages. The command, the tracing, the weights, the parity gate and the manifest are shared.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ddit.exporter.models import Source
from ddit.runtime.bundle.manifest import (
    Decoder,
    Dtype,
    GateInfo,
    GuidanceInfo,
    LatentInfo,
    RotaryInfo,
    SamplerInfo,
    SpectrumInfo,
    TextEncoderInfo,
)
from ddit.runtime.errors import AdapterError, ModelError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ddit.exporter.adapter import Adapter
    from ddit.exporter.graphs.job import GraphJob
    from ddit.exporter.levels import AdapterConfig, Level

REDUCED_DEPTH = 1  # blocks of each kind in a model that stands in for one that a machine cannot run


@dataclass(frozen=True)
class FamilyInfo:
    """What the command line says of a family before torch is imported."""

    name: str  # the command of ddit-export, and `family` in manifests and adapter files
    title: str  # in help and messages, as in "FLUX.1"
    model: str  # default of --model
    levels: tuple[int, ...]  # defaults, where the model's folder says nothing
    dtype: Dtype
    profile: str
    load: Callable[[], "type[Family]"]  # imports the family's module


@dataclass(frozen=True)
class Family(ABC):
    """A pretrained pipeline of a family, to be exported at some levels.

    ``depth`` keeps only that many blocks of each kind in the large models: for checking graphs whose full size a
    machine cannot run.

    What a family gives, and who asks for it:

    ==================================  ================================================================
    ``info``                            the command line
    ``pipeline``, ``native``            the constructor, which refuses pipelines and levels that do not fit
    ``feed_forward``, ``attention``     training: the layers that get LoRA
    ``transformer_class``,              training: the base model itself, with its weights or with random ones, and
    ``transformer_config``,             what prompts and pictures are to it. A family that is only exported leaves
    ``text_component``,                 these out
    ``longest_text``, ``text_length``,
    ``text_encoder``,
    ``picture_encoder``
    ``latent``, ``positions``,          the manifest, for hosts; the parity gate, for inputs of a graph's
    ``guidance``, ``sampler``,          own kind
    ``decoder``, ``save_tokenizers``,
    ``gate``, ``spectrum``
    ``jobs``                            the export: every graph of the bundle, with the original's own
                                        computation of the same thing
    ``original_step``                   the parity gate: the original pipeline from prompt to picture
    ``level_job``, ``build_level``      ``level``, and with it the jobs and training
    ==================================  ================================================================

    Raises:
        ModelError, UsageError, AdapterError: the folder holds another pipeline, a level is not a multiple of the native
            one, or the adapter was made for another family.
    """

    source: Source
    levels: tuple[int, ...]
    dtype: Dtype
    adapter: "Adapter | None" = None
    depth: int | None = None

    info: ClassVar[FamilyInfo]
    pipeline: ClassVar[str]  # class in model_index.json
    native: ClassVar[int]  # the patch that the models were trained at
    feed_forward: ClassVar[tuple[str, ...]]  # ends of layers' dotted names: where DDiT puts its LoRA
    attention: ClassVar[tuple[str, ...]]  # what LoRA usually adapts, and DDiT leaves alone
    transformer_class: ClassVar[Any]  # diffusers', with `from_pretrained` and `from_config`
    text_component: ClassVar[str]  # the folder of the tokenizer whose prompts have a free length
    longest_text: ClassVar[int]  # tokens; a tokenizer's own limit comes first

    def __post_init__(self) -> None:
        found = self.source.config("", "model_index.json").get("_class_name")
        if found != self.pipeline:
            raise ModelError(f"{self.source.folder} holds a {found}; family {self.info.name} exports a {self.pipeline}")
        for patch in self.levels:
            if patch < self.native or patch % self.native:
                raise UsageError(f"level {patch} is not a multiple of {self.info.title}'s native level {self.native}")
        if self.adapter and self.adapter.family != self.info.name:
            raise AdapterError(
                f"{self.adapter.path} is an adapter for family {self.adapter.family}, not {self.info.name}; "
                "choose another --adapter"
            )

    # ---- what the manifest says of the model ----

    @property
    @abstractmethod
    def latent(self) -> LatentInfo:
        """The latent's channels and axes."""

    @property
    @abstractmethod
    def positions(self) -> RotaryInfo:
        """How the levels' position tables are made."""

    @property
    @abstractmethod
    def guidance(self) -> GuidanceInfo:
        """How guidance comes in, and its default."""

    @property
    @abstractmethod
    def sampler(self) -> SamplerInfo:
        """The scheduler's settings. Raises `ModelError` for one that the runtime does not compute."""

    @property
    @abstractmethod
    def decoder(self) -> Decoder:
        """The graphs that turn a latent into a picture or a clip."""

    @property
    def gate(self) -> GateInfo | None:
        """The graph by which TeaCache decides, which is then among the `jobs`; None for a family without one."""
        return None

    @property
    def spectrum(self) -> SpectrumInfo | None:
        """The power of the family's latents over the frequency; None where nobody has measured it."""
        return None

    @abstractmethod
    def save_tokenizers(self, folder: Path) -> tuple[TextEncoderInfo, ...]:
        """Write every tokenizer as a ``tokenizer.json`` file into the bundle; returns the encoders they belong to."""

    # ---- what is exported, and what it is compared with ----

    @abstractmethod
    def jobs(self) -> "list[GraphJob]":
        """Every graph of the bundle: encoders, levels, step and decoder.

        Raises `ModelError` for a pipeline that is not whole, before any work is done.
        """

    @abstractmethod
    def level_job(self, patch: int) -> "GraphJob":
        """The graph of one level. Needs no weights and no tokenizers before it is exported."""

    @abstractmethod
    def build_level(self, transformer: "nn.Module", patch: int, config: "AdapterConfig | None" = None) -> "Level":
        """A level over the base model's transformer, sharing its parameters; coarse ones as they start training."""

    @abstractmethod
    def original_step(
        self,
        prompts: Sequence[str],
        latent: NDArray[np.float32],
        *,
        steps: int,
        guidance: float,
        text_length: int,
        device: "torch.device",
    ) -> Mapping[str, NDArray[np.float32]]:
        """The original pipeline's first of so many steps, in float32 from weights rounded to the graphs' types.

        Args:
            prompts: B of them, ``text_length`` tokens each where the encoder has no length of its own.
            latent: the noise, of the latent's shape, float32.

        Returns:
            ``latent`` after the step, and the ``image`` (B, 3, height, width) that it decodes to, of a clip its frames
            (B, 3, frames, height, width), cut to [-1, 1].
        """

    # ---- what training needs beside the levels ----

    @property
    def transformer_config(self) -> dict[str, Any]:
        """The transformer's configuration."""
        return self.source.config("transformer")

    @property
    def text_length(self) -> int:
        """Tokens of a prompt at most. Raises `ModelError` without a tokenizer."""
        config: dict[str, Any] = self.source.config(self.text_component, "tokenizer_config.json")
        # some files say "no limit" with a huge number
        return min(int(config.get("model_max_length", self.longest_text)), self.longest_text)

    def text_encoder(self, length: int, device: "torch.device") -> "Callable[[Sequence[str]], dict[str, torch.Tensor]]":
        """Loads the original pipeline's text encoders, in ``dtype``. Raises `ModelError`.

        What it returns turns B prompts, filled up to ``length`` tokens, into the levels' inputs that text feeds, by
        name and with a row a prompt: what the original pipeline's transformer is given.
        """
        raise ModelError(f"family {self.info.name} cannot encode prompts for training")

    def picture_encoder(self, device: "torch.device") -> "Callable[[torch.Tensor], torch.Tensor]":
        """Loads the original pipeline's VAE, in float32. Raises `ModelError`.

        What it returns turns pictures (B, 3, height, width) in [-1, 1] into latents (B, C, …) float32, scaled as the
        transformer knows them; where latents have frames, into those of clips of one frame.
        """
        raise ModelError(f"family {self.info.name} cannot encode pictures for training")

    def level(self, transformer: "nn.Module", patch: int) -> "Level":
        """A level with its adapter's values, where there are some. Raises `AdapterError` if they do not fit."""
        config = self.adapter.configs.get(patch) if self.adapter else None
        level = self.build_level(transformer, patch, config)
        if self.adapter and config:
            self.adapter.apply(level, patch, shortened=self.depth is not None)
        return level

    def reduced(self) -> "Family":
        """The same model in float32 with one block of each kind."""
        return replace(self, dtype="fp32", depth=REDUCED_DEPTH)
