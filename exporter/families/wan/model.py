"""Wan 2.1: how a diffusers `WanPipeline` is read and which graphs it becomes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from numpy.typing import NDArray
from pydantic import ValidationError
from tokenizers import Regex, normalizers
from torch import Tensor, nn
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from ddit.exporter.components import (
    TORCH_DTYPES,
    keep_float32,
    load_component,
    load_rounded,
    load_text_pipeline,
    shortened,
)
from ddit.exporter.families import WAN
from ddit.exporter.families.pretrained import TRUNK_FILE, PretrainedFamily
from ddit.exporter.families.wan import original
from ddit.exporter.families.wan.decoder import CACHED_FRAMES, FirstFrame, NextFrames
from ddit.exporter.families.wan.modules import (
    ATTENTION,
    FEED_FORWARD,
    NATIVE_PATCH,
    Umt5Encoder,
    WanGate,
    WanLevel,
    resized_ends,
)
from ddit.exporter.graphs.job import GraphJob, Original, floats, ids, loaded_job
from ddit.exporter.graphs.weights import SafetensorsFolder
from ddit.exporter.levels import AdapterConfig
from ddit.exporter.schedulers import EULER, EULER_FIXED, UNIPC, UNIPC_FIXED, check_scheduler
from ddit.exporter.steps.gate import GATE, gate_outputs, gate_state
from ddit.exporter.steps.jobs import sampling_jobs
from ddit.profiles import why_invalid
from ddit.runtime.bundle.manifest import (
    AxisInfo,
    Dtype,
    FlowMatchEulerInfo,
    GateInfo,
    GuidanceInfo,
    LatentInfo,
    RotaryAxis,
    RotaryInfo,
    SamplerInfo,
    SpectrumInfo,
    TensorSpec,
    TextEncoderInfo,
    TokenizerInfo,
    UniPCInfo,
    VideoDecoderInfo,
)
from ddit.runtime.errors import ModelError

UMT5, FIRST, FOLLOWING = "umt5", "vae_first_frame", "vae_next_frames"  # graphs
# TeaCache's polynomial for Wan 2.1 T2V 1.3B without `use_ret_steps`, from the paper's code; the highest power first
TEACACHE = (2396.76752, -1311.10545, 201.331979, -8.29855975, 0.137887774)
ROPE_THETA = 10000.0  # fixed in diffusers' WanTransformer3DModel
SPECTRUM = SpectrumInfo(amplitude=219.484718, exponent=2.422687)  # of Wan 2.1's latents (arXiv 2605.18736)
GUIDANCE, STEPS, TEXT_LENGTH = 5.0, 50, 512  # WanPipeline's defaults
FRAMES_PER_SECOND = 16.0  # of the clips that Wan 2.1 was trained on
TRAIN_STEPS = 1000
VAE_DTYPE: Dtype = "fp32"  # as Wan's model cards run it, whatever the transformer computes in


@dataclass(frozen=True)
class Wan(PretrainedFamily):
    """A Wan 2.1 text-to-video pipeline's folder, to be exported at some levels."""

    info = WAN
    pipeline = "WanPipeline"
    native = NATIVE_PATCH
    feed_forward = FEED_FORWARD
    attention = ATTENTION
    embedding = "patch_embedding"
    transformer_class = WanTransformer3DModel
    text_component = "tokenizer"
    longest_text = TEXT_LENGTH

    # ---- what the manifest says of the model ----

    @cached_property
    def transformer_config(self) -> dict[str, Any]:
        """The transformer's configuration, cut to ``depth``."""
        config: dict[str, Any] = self.source.config("transformer")
        if self.depth is not None:
            config["num_layers"] = min(self.depth, config["num_layers"])
        return config

    @property
    def latent(self) -> LatentInfo:
        """The latent's channels, its frames, and its pixels along one latent pixel."""
        frames = 2 ** sum(self.vae_config["temperal_downsample"])
        side = 2 ** (len(self.vae_config["dim_mult"]) - 1)
        axes = {"frames": frames, "height": side, "width": side}
        return LatentInfo(
            channels=self.vae_config["z_dim"],
            axes=tuple(AxisInfo.model_validate({"name": name, "downscale": size}) for name, size in axes.items()),
        )

    @property
    def positions(self) -> RotaryInfo:
        """The transformer's rotary positions."""
        return rotary_positions(self.transformer_config["attention_head_dim"])

    @property
    def guidance(self) -> GuidanceInfo:
        """Guidance by two passes."""
        default = self.source.defaults.guidance
        return GuidanceInfo(kind="two_passes", default=GUIDANCE if default is None else default)

    @property
    def sampler(self) -> SamplerInfo:
        """The scheduler's settings. Raises `ModelError` for one that the runtime does not compute."""
        config = self.source.config("scheduler", "scheduler_config.json")
        both: dict[str, Any] = {"num_train_timesteps": TRAIN_STEPS}  # what the transformer's timestep counts
        fixed = {UNIPC: UNIPC_FIXED | both, EULER: EULER_FIXED | both | {"use_dynamic_shifting": False}}
        found = check_scheduler(config, fixed, self.info.title)
        steps = self.source.defaults.steps or STEPS
        try:
            if found == UNIPC:
                shift, order = config.get("flow_shift", 1.0), config.get("solver_order", 2)
                return UniPCInfo(shift=shift, order=order, train_steps=TRAIN_STEPS, steps=steps)
            shift = config.get("shift", 1.0)
            return FlowMatchEulerInfo(
                use_dynamic_shifting=False,
                shift=shift,
                base_shift=0.5,
                max_shift=1.15,
                base_image_seq_len=256,
                max_image_seq_len=4096,
                # WanPipeline leaves the levels to the scheduler, which shifts its smallest one twice
                smallest=shift / (TRAIN_STEPS + shift - 1),
                steps=steps,
            )
        except ValidationError as error:
            raise ModelError(f"the scheduler's settings are not usable: {why_invalid(error)}") from None

    @property
    def decoder(self) -> VideoDecoderInfo:
        """The VAE's decoder, one latent frame a call."""
        return VideoDecoderInfo(first=FIRST, following=FOLLOWING, frames_per_second=FRAMES_PER_SECOND)

    @property
    def gate(self) -> GateInfo:
        """TeaCache's, with its published polynomial."""
        return GateInfo(graph=GATE, coefficients=TEACACHE, source="TeaCache's for Wan 2.1 T2V 1.3B (arXiv 2411.19108)")

    @property
    def spectrum(self) -> SpectrumInfo:
        """That of Wan 2.1's latents; a model of another kind says its own in ``ddit.json``."""
        return SPECTRUM

    @cached_property
    def _tokenizer(self) -> Any:
        folder = self.source.folder / self.text_component
        try:
            return AutoTokenizer.from_pretrained(folder, use_fast=True)
        except (OSError, ValueError) as error:
            raise ModelError(f"{folder} cannot be read: {str(error).strip().splitlines()[0]}") from None

    def save_tokenizers(self, folder: Path) -> tuple[TextEncoderInfo, ...]:
        """Write the tokenizer as a ``tokenizer.json`` file and describe the encoder that it belongs to.

        `WanPipeline` cleans a prompt first. The file does what such a file can: white space becomes single spaces, and
        none is left at the ends. Left out are HTML's escapes (``&amp;``) and what ftfy mends where it is installed.
        """
        backend = self._tokenizer.backend_tokenizer
        own = backend.normalizer
        clean = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
        backend.normalizer = normalizers.Sequence([*clean, *([own] if own else [])])
        file = f"{UMT5}.tokenizer.json"
        backend.save(str(folder / file))
        backend.normalizer = own
        length = min(self._tokenizer.model_max_length, TEXT_LENGTH)  # some files say "no limit" with a huge number
        info = TokenizerInfo(file=file, length=length, pad_id=self._tokenizer.pad_token_id)
        return (TextEncoderInfo(graph=UMT5, tokenizer=info, free_length=True, feeds={"context": "context"}),)

    # ---- the graphs ----

    def jobs(self) -> list[GraphJob]:
        """Every graph of the bundle. Raises `ModelError` for a pipeline that is not whole, before any work is done."""
        self._check_parts()
        self._transformer_weights.require(self._meta_transformer.state_dict())
        coarse = tuple(patch for patch in self.levels if patch != NATIVE_PATCH)
        return [
            self._umt5_job(),
            *(self.level_job(patch) for patch in self.levels),
            *sampling_jobs(self.latent, NATIVE_PATCH, coarse, self.sampler, self.guidance),
            self._gate_job(),
            *self._vae_jobs(),
        ]

    def _check_parts(self) -> None:
        """Raise `ModelError` for another kind of Wan, and for parts of different models."""
        index, transformer, vae = self.source.config("", "model_index.json"), self.transformer_config, self.vae_config
        newer = {
            "transformer_2": (index.get("transformer_2") or [None])[-1] is not None,
            "boundary_ratio": index.get("boundary_ratio") is not None,
            "expand_timesteps": bool(index.get("expand_timesteps")),
            "is_residual": bool(vae.get("is_residual")),
            "a VAE with patches": vae.get("patch_size") is not None,
        }
        if odd := [name for name, present in newer.items() if present]:
            raise ModelError(f"{self.source.folder} holds Wan 2.2 ({odd[0]}); family wan exports Wan 2.1")
        if transformer.get("added_kv_proj_dim") is not None or transformer.get("image_dim") is not None:
            raise ModelError(f"{self.source.folder} makes clips from pictures; family wan exports text-to-video models")
        latent = self.latent
        frames, side = latent.axes[0].downscale, latent.axes[1].downscale
        for name, found, wanted, part in (
            (
                "the transformer's patch_size",
                list(transformer["patch_size"]),
                [1, NATIVE_PATCH, NATIVE_PATCH],
                "family",
            ),
            ("the transformer's in_channels", transformer["in_channels"], latent.channels, "vae"),
            ("the transformer's out_channels", transformer["out_channels"], latent.channels, "vae"),
            ("the transformer's text_dim", transformer["text_dim"], self._umt5_config.d_model, "text_encoder"),
            ("the vae's scale_factor_temporal", vae.get("scale_factor_temporal", 4), frames, "layers"),
            ("the vae's scale_factor_spatial", vae.get("scale_factor_spatial", 8), side, "layers"),
        ):
            if found != wanted:
                raise ModelError(
                    f"{name} is {found}, which does not fit the {part}: that would be {wanted}; "
                    f"is {self.source.folder} a whole Wan 2.1 pipeline?"
                )

    def build_level(self, transformer: nn.Module, patch: int, config: AdapterConfig | None = None) -> WanLevel:
        """A `WanLevel`."""
        assert isinstance(transformer, WanTransformer3DModel)
        return WanLevel(transformer, patch, config)

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
        """The first step of diffusers' `WanPipeline`."""
        return original.first_step(
            self.source.folder,
            self.dtype,
            VAE_DTYPE,
            prompts,
            latent,
            steps=steps,
            guidance=guidance,
            text_length=text_length,
            device=device,
        )

    def text_encoder(self, length: int, device: torch.device) -> Callable[[Sequence[str]], dict[str, Tensor]]:
        """``context`` (B, L, Dt), as diffusers' `WanPipeline` makes it."""
        pipeline = load_text_pipeline(WanPipeline, self.source.folder, self.dtype, device)

        def encode(prompts: Sequence[str]) -> dict[str, Tensor]:
            context, _ = pipeline.encode_prompt(
                list(prompts), do_classifier_free_guidance=False, device=device, max_sequence_length=length
            )
            return {"context": context}

        return encode

    def picture_encoder(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """The VAE's encoder on clips of one frame, with the mean and deviation of its latents' channels."""
        vae = load_component(AutoencoderKLWan, self.source.folder / "vae", "fp32").to(device)
        shape = (1, -1, 1, 1, 1)
        mean = torch.tensor(vae.config.latents_mean, device=device).view(shape)
        deviation = torch.tensor(vae.config.latents_std, device=device).view(shape)

        def encode(pictures: Tensor) -> Tensor:
            clips = pictures.to(device)[:, :, None]
            latent: Tensor = (vae.encode(clips).latent_dist.mode() - mean) / deviation
            return latent

        return encode

    @property
    def text_inputs(self) -> tuple[TensorSpec, ...]:
        """UMT5's hidden states."""
        return (floats("context", "B", "L", self.transformer_config["text_dim"]),)

    def trace_sizes(self, patch: int) -> Mapping[str, int]:
        """Of a small clip."""
        return {"B": 2, "F": 3, "H": 4 * patch, "W": 5 * patch, "L": 7}

    def resized_ends(self, patch: int) -> Mapping[str, Tensor]:
        """From the native level's."""
        return resized_ends(self._transformer_weights, patch)

    def native_original(self, transformer: nn.Module) -> Original:
        """diffusers' transformer with its own positions."""
        return original.native_velocity(transformer)

    def rounded(self, transformer: nn.Module) -> nn.Module:
        """A transformer in the graphs' type, but for what diffusers keeps in float32."""
        return keep_float32(transformer, WanTransformer3DModel._keep_in_fp32_modules, TORCH_DTYPES[self.dtype])

    def stored_value(self, stored: str) -> Tensor:
        """As it is stored; the patch embedding, a convolution there, is a linear layer here."""
        value = self._transformer_weights[stored]
        return value.flatten(1) if stored == f"{self.embedding}.weight" else value

    def _gate_job(self) -> GraphJob:
        """The gate's graph. All of its weights are the levels', which have them in float32 whatever their type."""
        module = WanGate(self._meta_transformer)  # type: ignore[arg-type]
        width: int = module.time_embedder.linear_2.out_features

        def stored_name(name: str) -> str:
            return f"condition_embedder.{name}"

        def load_original(device: torch.device) -> Original:
            # no more blocks than are looked at: the whole model would not fit where the gate does
            make = partial(WanTransformer3DModel.from_config, {**self.transformer_config, "num_layers": 1})
            return original.embedding_change(shortened(make, self._transformer_weights).to(device))

        return GraphJob(
            name=GATE,
            module=module,
            inputs=(floats("timestep", "B"), gate_state("gate_input", width)),
            outputs=gate_outputs(width),
            dtype="fp32",
            values=lambda name: self._transformer_weights[stored_name(name)],
            place=lambda name: (TRUNK_FILE, stored_name(name)),
            original=load_original,
            trace_sizes={"B": 2},
        )

    @cached_property
    def _umt5_config(self) -> UMT5Config:
        # checked first, because transformers would take its defaults where the file is missing
        self.source.config("text_encoder")
        config = UMT5Config.from_pretrained(self.source.folder / "text_encoder")
        if self.depth is not None:
            config.num_layers = min(self.depth, config.num_layers)
        return config

    def _umt5_job(self) -> GraphJob:
        folder, config, pad_id = self.source.folder / "text_encoder", self._umt5_config, self._tokenizer.pad_token_id
        with torch.device("meta"):
            encoder = UMT5EncoderModel(config)
        # as transformers does: these layers overflow in half precision
        kept = UMT5EncoderModel._keep_in_fp32_modules if self.dtype == "fp16" else ()
        keep_float32(encoder, kept, TORCH_DTYPES[self.dtype])
        stored = SafetensorsFolder(folder)
        stored.require({"shared.weight"})
        tied = {"encoder.encoder.embed_tokens.weight": "shared.weight"}

        def stored_name(name: str) -> str:
            return tied.get(name, name.removeprefix("encoder."))

        def load_original(device: torch.device) -> Original:
            if self.depth is None:
                module = load_rounded(UMT5EncoderModel, folder, self.dtype, device)
            else:
                module = shortened(partial(UMT5EncoderModel, config), stored).to(device)
            return original.text_states(module, pad_id)

        return GraphJob(
            name=UMT5,
            module=Umt5Encoder(encoder, pad_id),
            inputs=(ids("input_ids", "B", "L"),),
            outputs=(floats("context", "B", "L", config.d_model),),
            dtype=self.dtype,
            values=lambda name: stored[stored_name(name)],
            place=lambda name: (f"{UMT5}.safetensors", stored_name(name)),
            original=load_original,
            trace_sizes={"B": 2, "L": 5},
            vocabulary=config.vocab_size,
        )

    def _vae_jobs(self) -> tuple[GraphJob, GraphJob]:
        """The decoder's graphs, which have their weights in one file."""
        folder = self.source.folder / "vae"
        vae = load_component(AutoencoderKLWan, folder, VAE_DTYPE)
        first, following = FirstFrame(vae), NextFrames(vae)
        frames, side, _ = (axis.downscale for axis in self.latent.axes)
        latent_frame = floats("latent_frame", "B", self.latent.channels, 1, "H", "W")

        def caches(prefix: str = "") -> list[Any]:
            return [
                floats(f"{prefix}cache_{number}", "B", channels, CACHED_FRAMES, *_sides(scale))
                for number, (channels, scale) in enumerate(first.caches)
            ]

        def job(name: str, module: nn.Module, count: int, state: Sequence[Any]) -> GraphJob:
            clip = floats("frames", "B", self.vae_config.get("out_channels", 3), count, *_sides(side))
            made = loaded_job(
                name,
                module,
                inputs=(latent_frame, *state),
                outputs=(clip, *caches("next_")),
                dtype=VAE_DTYPE,
                original=lambda device: original.decoded(load_rounded(AutoencoderKLWan, folder, VAE_DTYPE, device)),
                trace_sizes={"B": 2, "H": 4, "W": 6},
            )
            return replace(made, place=lambda key: ("vae.safetensors", key))

        return job(FIRST, first, 1, ()), job(FOLLOWING, following, frames, caches())


def rotary_positions(head: int) -> RotaryInfo:
    """Wan's positions in a head of so many numbers: a sixth of the pairs for rows and columns each, frames the rest."""
    side = 2 * (head // 6)
    sizes = {"frames": head - 2 * side, "height": side, "width": side}
    axes = (RotaryAxis.model_validate({"axis": name, "dimensions": size}) for name, size in sizes.items())
    return RotaryInfo(axes=tuple(axes), theta=ROPE_THETA)


def _sides(scale: int) -> tuple[str, str]:
    """Height and width of a tensor with so many pixels along a latent pixel."""
    return ("H", "W") if scale == 1 else (f"H*{scale}", f"W*{scale}")
