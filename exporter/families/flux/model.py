"""FLUX.1: how a diffusers `FluxPipeline` is read and which graphs it becomes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from ddit.exporter.components import TORCH_DTYPES, load_component, load_rounded, load_text_pipeline, shortened
from ddit.exporter.families import FLUX
from ddit.exporter.families.flux import original
from ddit.exporter.families.flux.modules import (
    ATTENTION,
    FEED_FORWARD,
    NATIVE_PATCH,
    ClipEncoder,
    FluxGate,
    FluxLevel,
    T5Encoder,
    VaeDecoder,
    resized_ends,
)
from ddit.exporter.families.pretrained import TRUNK_FILE, PretrainedFamily
from ddit.exporter.graphs.job import GraphJob, Original, floats, ids, loaded_job
from ddit.exporter.graphs.weights import SafetensorsFolder
from ddit.exporter.levels import AdapterConfig
from ddit.exporter.schedulers import EULER, EULER_FIXED, check_scheduler
from ddit.exporter.steps.gate import GATE, gate_outputs, gate_state
from ddit.exporter.steps.jobs import sampling_jobs
from ddit.profiles import why_invalid
from ddit.runtime.bundle.manifest import (
    AxisInfo,
    DecoderInfo,
    Dtype,
    FlowMatchEulerInfo,
    GateInfo,
    GuidanceInfo,
    LatentInfo,
    RotaryAxis,
    RotaryInfo,
    SpectrumInfo,
    TensorSpec,
    TextEncoderInfo,
    TokenizerInfo,
)
from ddit.runtime.errors import ModelError

CLIP, T5, DECODER = "clip", "t5", "vae_decoder"  # graphs
# TeaCache's polynomial for FLUX.1, from the paper's code; the highest power first
TEACACHE = (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)
TEXT_LENGTH = 512  # of FLUX.1-dev's T5
ROPE_THETA = 10000.0  # fixed in diffusers' FluxTransformer2DModel
SPECTRUM = SpectrumInfo(amplitude=203.615097, exponent=1.915461)  # of FLUX.1's latents (arXiv 2605.18736)


@dataclass(frozen=True)
class Flux(PretrainedFamily):
    """A FLUX.1 pipeline's folder, to be exported at some levels."""

    info = FLUX
    pipeline = "FluxPipeline"
    native = NATIVE_PATCH
    feed_forward = FEED_FORWARD
    attention = ATTENTION
    embedding = "x_embedder"
    transformer_class = FluxTransformer2DModel
    text_component = "tokenizer_2"
    longest_text = TEXT_LENGTH

    # ---- what the manifest says of the model ----

    @cached_property
    def transformer_config(self) -> dict[str, Any]:
        """The transformer's configuration, cut to ``depth``."""
        config: dict[str, Any] = self.source.config("transformer")
        if self.depth is not None:
            config["num_layers"] = min(self.depth, config["num_layers"])
            config["num_single_layers"] = min(self.depth, config["num_single_layers"])
        return config

    @property
    def latent(self) -> LatentInfo:
        """The latent's channels and its pixels along one latent pixel."""
        downscale = 2 ** (len(self.vae_config["block_out_channels"]) - 1)
        axes = (AxisInfo(name="height", downscale=downscale), AxisInfo(name="width", downscale=downscale))
        return LatentInfo(channels=self.vae_config["latent_channels"], axes=axes)

    @property
    def positions(self) -> RotaryInfo:
        """The transformer's rotary positions."""
        return rotary_positions(self.transformer_config["axes_dims_rope"])

    @property
    def guidance(self) -> GuidanceInfo:
        """Guidance of the distilled variant (dev); the unguided one (schnell) takes none."""
        embedded = bool(self.transformer_config["guidance_embeds"])
        default = self.source.defaults.guidance
        kind: Literal["embedded", "none"] = "embedded" if embedded else "none"
        return GuidanceInfo(kind=kind, default=default if default is not None else 3.5 * embedded)

    @property
    def sampler(self) -> FlowMatchEulerInfo:
        """The scheduler's settings. Raises `ModelError` for one that the runtime does not compute."""
        config = self.source.config("scheduler", "scheduler_config.json")
        check_scheduler(config, {EULER: EULER_FIXED}, self.info.title)
        names = ("use_dynamic_shifting", "shift", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
        usual = dict(zip(names, (False, 1.0, 0.5, 1.15, 256, 4096), strict=True))
        steps = self.source.defaults.steps or (50 if self.guidance.embedded else 4)
        settings: dict[str, Any] = {name: config.get(name, usual[name]) for name in names}
        try:
            return FlowMatchEulerInfo(**settings, steps=steps)
        except ValidationError as error:
            raise ModelError(f"the scheduler's settings are not usable: {why_invalid(error)}") from None

    @property
    def decoder(self) -> DecoderInfo:
        """The VAE's decoder."""
        return DecoderInfo(graph=DECODER)

    @property
    def gate(self) -> GateInfo:
        """TeaCache's, with its published polynomial."""
        return GateInfo(graph=GATE, coefficients=TEACACHE, source="TeaCache's for FLUX.1 (arXiv 2411.19108)")

    @property
    def spectrum(self) -> SpectrumInfo:
        """That of FLUX.1's latents; a model of another kind says its own in ``ddit.json``."""
        return SPECTRUM

    def save_tokenizers(self, folder: Path) -> tuple[TextEncoderInfo, ...]:
        """Write both tokenizers as ``tokenizer.json`` files and describe the encoders that they belong to."""
        infos = []
        for name, component, longest, feeds in (
            (CLIP, "tokenizer", 77, {"pooled": "pooled"}),
            (T5, self.text_component, self.longest_text, {"context": "context"}),
        ):
            try:
                tokenizer = AutoTokenizer.from_pretrained(self.source.folder / component, use_fast=True)
            except (OSError, ValueError) as error:
                first = str(error).strip().splitlines()[0]
                raise ModelError(f"{self.source.folder / component} cannot be read: {first}") from None
            file = f"{name}.tokenizer.json"
            tokenizer.backend_tokenizer.save(str(folder / file))
            length = min(tokenizer.model_max_length, longest)  # some files say "no limit" with a huge number
            info = TokenizerInfo(file=file, length=length, pad_id=tokenizer.pad_token_id)
            infos.append(TextEncoderInfo(graph=name, tokenizer=info, free_length=name == T5, feeds=feeds))
        return tuple(infos)

    # ---- the graphs ----

    def jobs(self) -> list[GraphJob]:
        """Every graph of the bundle. Raises `ModelError` for a pipeline that is not whole, before any work is done."""
        self._check_parts()
        self._transformer_weights.require(self._meta_transformer.state_dict())
        coarse = tuple(patch for patch in self.levels if patch != NATIVE_PATCH)
        return [
            self._clip_job(),
            self._t5_job(),
            *(self.level_job(patch) for patch in self.levels),
            *sampling_jobs(self.latent, NATIVE_PATCH, coarse, self.sampler, self.guidance),
            self._gate_job(),
            self._vae_job(),
        ]

    def _check_parts(self) -> None:
        """Raise `ModelError` for parts of different models."""
        transformer, text, text_2 = (
            self.transformer_config,
            self.source.config("text_encoder"),
            self.source.config("text_encoder_2"),
        )
        for name, wanted, part in (
            ("in_channels", NATIVE_PATCH**2 * self.latent.channels, "vae"),
            ("pooled_projection_dim", text["hidden_size"], "text_encoder"),
            ("joint_attention_dim", text_2["d_model"], "text_encoder_2"),
        ):
            if transformer[name] != wanted:
                raise ModelError(
                    f"the transformer does not fit the {part}: its {name} is {transformer[name]} instead of {wanted}; "
                    f"is {self.source.folder} a whole FLUX.1 pipeline?"
                )

    def build_level(self, transformer: nn.Module, patch: int, config: AdapterConfig | None = None) -> FluxLevel:
        """A `FluxLevel`."""
        assert isinstance(transformer, FluxTransformer2DModel)
        return FluxLevel(transformer, patch, config)

    def original_step(
        self,
        prompts: Sequence[str],
        latent: NDArray[np.float32],
        *,
        steps: int,
        guidance: float,
        text_length: int,
        device: torch.device,
    ) -> Mapping[str, NDArray[np.float32]]:
        """The first step of diffusers' `FluxPipeline`."""
        return original.first_step(
            self.source.folder,
            self.dtype,
            self._vae_dtype,
            prompts,
            latent,
            steps=steps,
            guidance=guidance,
            text_length=text_length,
            device=device,
        )

    def text_encoder(self, length: int, device: torch.device) -> Callable[[Sequence[str]], dict[str, Tensor]]:
        """``context`` (B, L, Dc) and ``pooled`` (B, Dp), as diffusers' `FluxPipeline` makes them."""
        pipeline = load_text_pipeline(FluxPipeline, self.source.folder, self.dtype, device)

        def encode(prompts: Sequence[str]) -> dict[str, Tensor]:
            context, pooled, _ = pipeline.encode_prompt(list(prompts), device=device, max_sequence_length=length)
            return {"context": context, "pooled": pooled}

        return encode

    def picture_encoder(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """The VAE's encoder, with the latent's scale and shift."""
        vae = load_component(AutoencoderKL, self.source.folder / "vae", "fp32").to(device)
        scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0

        def encode(pictures: Tensor) -> Tensor:
            latent: Tensor = (vae.encode(pictures.to(device)).latent_dist.mode() - shift) * scale
            return latent

        return encode

    @property
    def text_inputs(self) -> tuple[TensorSpec, ...]:
        """T5's hidden states and CLIP's pooled output."""
        config = self.transformer_config
        return (
            floats("context", "B", "L", config["joint_attention_dim"]),
            floats("pooled", "B", config["pooled_projection_dim"]),
        )

    def trace_sizes(self, patch: int) -> Mapping[str, int]:
        """Of a small picture."""
        return {"B": 2, "H": 2 * patch, "W": 3 * patch, "L": 5}

    def resized_ends(self, patch: int) -> Mapping[str, Tensor]:
        """From the native level's."""
        return resized_ends(self._transformer_weights, patch)

    def native_original(self, transformer: nn.Module) -> Original:
        """diffusers' transformer on packed latents."""
        return original.native_velocity(transformer)

    def _gate_job(self) -> GraphJob:
        """The gate's graph; all of its weights are the native level's."""
        config, patch = self.transformer_config, NATIVE_PATCH
        module = FluxGate(self._meta_transformer)  # type: ignore[arg-type]
        width: int = module.x_embedder.out_features

        def stored_name(name: str) -> str:
            return name.replace("norm.", "transformer_blocks.0.norm1.", 1) if name.startswith("norm.") else name

        def load_original(device: torch.device) -> Original:
            # no more blocks than are looked at: the whole model would not fit where the gate does
            short = {**config, "num_layers": 1, "num_single_layers": 1}

            def make() -> nn.Module:
                rounded: nn.Module = FluxTransformer2DModel.from_config(short).to(TORCH_DTYPES[self.dtype])
                return rounded

            return original.first_block_change(shortened(make, self._transformer_weights).to(device))

        return GraphJob(
            name=GATE,
            module=module,
            inputs=(
                floats("latent", *self.latent.shape),
                floats("timestep", "B"),
                floats("pooled", "B", config["pooled_projection_dim"]),
                gate_state("gate_input", *self.latent.patch_grid(patch), width),
                *([floats("guidance", "B")] if self.guidance.embedded else []),
            ),
            outputs=gate_outputs(*self.latent.patch_grid(patch), width),
            dtype=self.dtype,
            values=lambda name: self._transformer_weights[stored_name(name)],
            place=lambda name: (TRUNK_FILE, stored_name(name)),
            original=load_original,
            trace_sizes={"B": 2, "H": 2 * patch, "W": 3 * patch},
        )

    def _clip_job(self) -> GraphJob:
        folder = self.source.folder / "text_encoder"
        module = ClipEncoder(load_component(CLIPTextModel, folder, self.dtype))
        config: CLIPTextConfig = module.encoder.config
        return loaded_job(
            CLIP,
            module,
            inputs=(ids("input_ids", "B", config.max_position_embeddings),),
            outputs=(floats("pooled", "B", config.hidden_size),),
            dtype=self.dtype,
            original=lambda device: original.pooled_text(load_rounded(CLIPTextModel, folder, self.dtype, device)),
            trace_sizes={"B": 2},
            vocabulary=config.vocab_size,
        )

    def _t5_job(self) -> GraphJob:
        folder = self.source.folder / "text_encoder_2"
        config = T5Config.from_pretrained(folder)
        if self.depth is not None:
            config.num_layers = min(self.depth, config.num_layers)
        with torch.device("meta"):
            encoder = T5EncoderModel(config).to(TORCH_DTYPES[self.dtype])
        if self.dtype == "fp16":  # as transformers does: this layer overflows in half precision
            for block in encoder.encoder.block:
                block.layer[-1].DenseReluDense.wo.to(torch.float32)
        stored = SafetensorsFolder(folder)
        stored.require({"shared.weight"})
        tied = {"encoder.encoder.embed_tokens.weight": "shared.weight"}

        def stored_name(name: str) -> str:
            return tied.get(name, name.removeprefix("encoder."))

        def load_original(device: torch.device) -> Original:
            if self.depth is None:
                return original.text_states(load_rounded(T5EncoderModel, folder, self.dtype, device))
            return original.text_states(shortened(partial(T5EncoderModel, config), stored).to(device))

        return GraphJob(
            name=T5,
            module=T5Encoder(encoder),
            inputs=(ids("input_ids", "B", "L"),),
            outputs=(floats("context", "B", "L", config.d_model),),
            dtype=self.dtype,
            values=lambda name: stored[stored_name(name)],
            place=lambda name: ("t5.safetensors", stored_name(name)),
            original=load_original,
            trace_sizes={"B": 2, "L": 5},
            vocabulary=config.vocab_size,
        )

    @property
    def _vae_dtype(self) -> Dtype:
        """float32 where the VAE asks for it, in bfloat16 too: ONNX Runtime's CUDA provider has no Resize for that."""
        return "fp32" if self.vae_config.get("force_upcast", True) else self.dtype

    def _vae_job(self) -> GraphJob:
        folder, dtype = self.source.folder / "vae", self._vae_dtype
        scale = self.latent.axes[0].downscale
        return loaded_job(
            DECODER,
            VaeDecoder(load_component(AutoencoderKL, folder, dtype)),
            inputs=(floats("latent", *self.latent.shape),),
            outputs=(floats("image", "B", self.vae_config["out_channels"], f"H*{scale}", f"W*{scale}"),),
            dtype=dtype,
            original=lambda device: original.decoded(load_rounded(AutoencoderKL, folder, dtype, device)),
            trace_sizes={"B": 2, "H": 4, "W": 6},
        )


def rotary_positions(dimensions: Sequence[int]) -> RotaryInfo:
    """FLUX.1's positions: an axis that is always 0 for pictures, the row and the column."""
    names: tuple[Literal["height", "width"] | None, ...] = (None, "height", "width")
    axes = (RotaryAxis(axis=name, dimensions=size) for name, size in zip(names, dimensions, strict=True))
    return RotaryInfo(axes=tuple(axes), theta=ROPE_THETA)
