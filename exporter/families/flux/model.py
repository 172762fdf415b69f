"""FLUX.1: how a diffusers `FluxPipeline` is read and which graphs it becomes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, ModelMixin
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextModel, T5Config, T5EncoderModel

from ddit.exporter.adapter import Adapter
from ddit.exporter.families.flux.modules import (
    NATIVE_PATCH,
    ClipEncoder,
    FluxLevel,
    T5Encoder,
    VaeDecoder,
    resized_ends,
)
from ddit.exporter.graphs.job import GraphJob
from ddit.exporter.graphs.weights import SafetensorsFolder
from ddit.exporter.models import Source
from ddit.exporter.steps.update import step_job
from ddit.runtime.bundle.manifest import (
    AxisInfo,
    Dtype,
    FlowMatchEulerInfo,
    GuidanceInfo,
    LatentInfo,
    RotaryAxis,
    RotaryInfo,
    TensorSpec,
    TextEncoderInfo,
    TokenizerInfo,
)
from ddit.runtime.errors import ModelError, UsageError

__all__ = ["NATIVE_PATCH", "FluxLevel", "FluxModel"]

TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TRUNK_FILE = "transformer.safetensors"
ROPE_THETA = 10000.0  # fixed in diffusers' FluxTransformer2DModel

# What the runtime's sampler computes. A scheduler that asks for anything else is refused, never approximated.
SCHEDULER = "FlowMatchEulerDiscreteScheduler"
SCHEDULER_FIXED = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "invert_sigmas": False,
    "stochastic_sampling": False,
    "shift_terminal": None,
    "time_shift_type": "exponential",
}


@dataclass(frozen=True)
class FluxModel:
    """A FLUX.1 pipeline's folder, to be exported at some levels.

    ``depth`` keeps only that many blocks of the transformer and of T5: for checking graphs whose full size a machine
    cannot run.
    """

    source: Source
    levels: tuple[int, ...]
    dtype: Dtype
    adapter: Adapter | None = None
    depth: int | None = None

    def __post_init__(self) -> None:
        pipeline = self.source.config("", "model_index.json").get("_class_name")
        if pipeline != "FluxPipeline":
            raise ModelError(f"{self.source.folder} holds a {pipeline}; family flux exports a FluxPipeline")
        for patch in self.levels:
            if patch < NATIVE_PATCH or patch % NATIVE_PATCH:
                raise UsageError(f"level {patch} is not a multiple of FLUX's native level {NATIVE_PATCH}")

    # ---- what the manifest says of the model ----

    @cached_property
    def transformer_config(self) -> dict[str, Any]:
        """The transformer's configuration, cut to ``depth``."""
        config: dict[str, Any] = dict(self.source.config("transformer"))
        if self.depth is not None:
            config["num_layers"] = min(self.depth, config["num_layers"])
            config["num_single_layers"] = min(self.depth, config["num_single_layers"])
        return config

    @cached_property
    def vae_config(self) -> dict[str, Any]:
        """The VAE's configuration."""
        return dict(self.source.config("vae"))

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
        odd = {name for name, value in SCHEDULER_FIXED.items() if config.get(name, value) != value}
        if config.get("_class_name") != SCHEDULER or odd:
            what = f"with {min(odd)} = {config[min(odd)]!r}" if odd else str(config.get("_class_name"))
            raise ModelError(f"scheduler {what} is not supported; ddit samples with {SCHEDULER} as FLUX.1 uses it")
        names = ("use_dynamic_shifting", "shift", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
        usual = dict(zip(names, (False, 1.0, 0.5, 1.15, 256, 4096), strict=True))
        steps = self.source.defaults.steps or (50 if self.guidance.embedded else 4)
        settings: dict[str, Any] = {name: config.get(name, usual[name]) for name in names}
        return FlowMatchEulerInfo(**settings, steps=steps)

    def save_tokenizers(self, folder: Path) -> tuple[TextEncoderInfo, ...]:
        """Write both tokenizers as ``tokenizer.json`` files and describe the encoders that they belong to."""
        infos = []
        for name, component, longest, feeds in (
            ("clip", "tokenizer", 77, {"pooled": "pooled"}),
            ("t5", "tokenizer_2", 512, {"context": "context"}),
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
            infos.append(TextEncoderInfo(graph=name, tokenizer=info, free_length=name == "t5", feeds=feeds))
        return tuple(infos)

    # ---- the graphs ----

    def jobs(self) -> list[GraphJob]:
        """Every graph of the bundle. Raises `ModelError` for a pipeline that is not whole, before any work is done."""
        self._transformer_weights.require(self._meta_transformer.state_dict())
        coarse = tuple(patch for patch in self.levels if patch != NATIVE_PATCH)
        return [
            self._clip_job(),
            self._t5_job(),
            *(self.level_job(patch) for patch in self.levels),
            step_job(self.latent.channels, coarse),
            self._vae_job(),
        ]

    def level_job(self, patch: int) -> GraphJob:
        """The graph of one level."""
        config = self.transformer_config
        module = self._level(self._meta_transformer, patch)
        own = module.own_parameters()
        adapter = self.adapter if module.config is not None else None

        def values(name: str) -> Tensor:
            if name not in own:
                return self._transformer_weights[_trunk_name(name)]
            return adapter.value(patch, name) if adapter else resized_ends(self._transformer_weights, patch)[name]

        def place(name: str) -> tuple[str, str]:
            return (f"level-{patch}.safetensors", name) if name in own else (TRUNK_FILE, _trunk_name(name))

        table = (f"H/{patch}", f"W/{patch}", sum(config["axes_dims_rope"]))
        picture = ("B", self.latent.channels, "H", "W")
        return GraphJob(
            name=f"level-{patch}",
            module=module,
            inputs=(
                _float("latent", *picture),
                _float("timestep", "B"),
                _float("context", "B", "L", config["joint_attention_dim"]),
                _float("pooled", "B", config["pooled_projection_dim"]),
                _float("rope_cos", *table),
                _float("rope_sin", *table),
                *([_float("guidance", "B")] if self.guidance.embedded else []),
            ),
            outputs=(_float("velocity", *picture),),
            dtype=self.dtype,
            values=values,
            place=place,
            reference=lambda: self._level(self._transformer(), patch),
            trace_sizes={"B": 2, "H": 2 * patch, "W": 3 * patch, "L": 5},
        )

    def _level(self, transformer: nn.Module, patch: int) -> FluxLevel:
        config = self.adapter.configs.get(patch) if self.adapter else None
        level = FluxLevel(transformer, patch, config)
        if self.adapter and config:
            self.adapter.apply(level, patch, shortened=self.depth is not None)
        return level

    @cached_property
    def _meta_transformer(self) -> nn.Module:
        """The transformer without weights; every level is traced over this one."""
        with torch.device("meta"):
            transformer: nn.Module = FluxTransformer2DModel.from_config(self.transformer_config)
        return transformer.to(TORCH_DTYPES[self.dtype])

    @cached_property
    def _transformer_weights(self) -> SafetensorsFolder:
        return SafetensorsFolder(self.source.folder / "transformer")

    def _transformer(self) -> nn.Module:
        """The transformer with its weights, read independently of the export where that is possible."""
        if self.depth is None:
            folder = self.source.folder / "transformer"
            transformer: nn.Module = load_component(FluxTransformer2DModel, folder, self.dtype)
            return transformer
        return _filled(partial(FluxTransformer2DModel.from_config, self.transformer_config), self._transformer_weights)

    def _clip_job(self) -> GraphJob:
        module = ClipEncoder(load_component(CLIPTextModel, self.source.folder / "text_encoder", self.dtype))
        config: Any = module.encoder.config
        ids = _ids("input_ids", "B", config.max_position_embeddings)
        return replace(
            self._real_job("clip", module, ids, _float("pooled", "B", config.hidden_size), {"B": 2}),
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
        module = T5Encoder(encoder)
        stored = SafetensorsFolder(folder)
        stored.require({"shared.weight"})
        tied = {"encoder.encoder.embed_tokens.weight": "shared.weight"}

        def stored_name(name: str) -> str:
            return tied.get(name, name.removeprefix("encoder."))

        def reference() -> nn.Module:
            if self.depth is None:
                return T5Encoder(load_component(T5EncoderModel, folder, self.dtype))
            return T5Encoder(_filled(partial(T5EncoderModel, config), stored))

        return GraphJob(
            name="t5",
            module=module,
            inputs=(_ids("input_ids", "B", "L"),),
            outputs=(_float("context", "B", "L", config.d_model),),
            dtype=self.dtype,
            values=lambda name: stored[stored_name(name)],
            place=lambda name: ("t5.safetensors", stored_name(name)),
            reference=reference,
            trace_sizes={"B": 2, "L": 5},
            vocabulary=config.vocab_size,
        )

    def _vae_job(self) -> GraphJob:
        # also in bfloat16, for which ONNX Runtime's CUDA provider has no Resize
        dtype: Dtype = "fp32" if self.vae_config.get("force_upcast", True) else self.dtype
        module = VaeDecoder(load_component(AutoencoderKL, self.source.folder / "vae", dtype))
        scale = self.latent.axes[0].downscale
        latent = _float("latent", *self.latent.shape)
        image = _float("image", "B", self.vae_config["out_channels"], f"H*{scale}", f"W*{scale}")
        return self._real_job("vae_decoder", module, latent, image, {"B": 2, "H": 4, "W": 6}, dtype)

    def _real_job(
        self,
        name: str,
        module: nn.Module,
        taken: TensorSpec,
        given: TensorSpec,
        trace_sizes: Mapping[str, int],
        dtype: Dtype | None = None,
    ) -> GraphJob:
        """A job for a model that is small enough to be traced with its weights (it has buffers that files lack)."""
        state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        return GraphJob(
            name=name,
            module=module,
            inputs=(taken,),
            outputs=(given,),
            dtype=dtype or self.dtype,
            values=lambda key: state[key],
            place=lambda key: (f"{name}.safetensors", key),
            reference=lambda: module,
            trace_sizes=trace_sizes,
        )


def rotary_positions(dimensions: Sequence[int]) -> RotaryInfo:
    """FLUX.1's positions: an axis that is always 0 for pictures, the row and the column."""
    names: tuple[Literal["height", "width"] | None, ...] = (None, "height", "width")
    axes = (RotaryAxis(axis=name, dimensions=size) for name, size in zip(names, dimensions, strict=True))
    return RotaryInfo(axes=tuple(axes), theta=ROPE_THETA)


def _float(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=shape)


def _ids(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name=name, dtype="int64", shape=shape)


def _trunk_name(name: str) -> str:
    """A trunk parameter's name in the pipeline's files; at the native level its ends have two names in the module."""
    if name.startswith("embed."):
        return name.replace("embed.", "x_embedder.", 1)
    if name.startswith("head."):
        return name.replace("head.", "proj_out.", 1)
    return name.removeprefix("trunk.")


def load_component(cls: Any, folder: Path, dtype: Dtype) -> Any:
    """A component with its weights, in evaluation mode. Raises `ModelError`."""
    keyword = "torch_dtype" if issubclass(cls, ModelMixin) else "dtype"
    try:
        return cls.from_pretrained(folder, **{keyword: TORCH_DTYPES[dtype]}).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"{folder} cannot be read: {str(error).strip().splitlines()[0]}") from None


def _filled(make: Callable[[], nn.Module], stored: Mapping[str, Tensor]) -> nn.Module:
    """A module of reduced depth with the weights of the blocks that it has, in float32."""
    module = make().eval()
    names = dict.fromkeys(name for name, _ in module.named_parameters())
    module.load_state_dict({name: stored[name] for name in names}, strict=False)
    return module.float()
