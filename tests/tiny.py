"""A random FLUX pipeline of a few kilobytes with the real architecture, for tests."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from ddit.exporter.adapter import save_adapter
from ddit.exporter.families.base import Family
from ddit.exporter.families.flux.model import Flux
from ddit.exporter.families.flux.modules import FEED_FORWARD, FluxLevel
from ddit.exporter.graphs.trace import export_graph
from ddit.exporter.graphs.weights import WeightFiles
from ddit.exporter.levels import AdapterConfig
from ddit.exporter.models import find_model

WORDS = tuple(
    "a red blue green circle square star on the left right striped plain noisy background small large two".split()  # noqa: SIM905
)
CHANNELS = 4


def clip_tokenizer() -> PreTrainedTokenizerFast:
    """A CLIP-like tokenizer over a few words: start and end of text, filled up with the end token."""
    special = ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate([*WORDS, "<unk>", *special])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>", special_tokens=[(token, vocabulary[token]) for token in special]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[0],
        eos_token=special[1],
        pad_token=special[1],
        unk_token="<unk>",
        model_max_length=12,
    )


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """A T5-like tokenizer: Unigram over a few words, closed by </s>, filled up with <pad>."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -2.0) for word in WORDS)]
    pieces += [(letter, -5.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.normalizer = normalizers.Replace(Regex(" {2,}"), " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>", model_max_length=16
    )


def tiny_transformer(*, guidance: bool = True, layers: int = 1) -> FluxTransformer2DModel:
    """FLUX's transformer, two heads wide. Biases and scales are random too: zeros would hide mistakes."""
    transformer = FluxTransformer2DModel(
        in_channels=4 * CHANNELS,
        num_layers=layers,
        num_single_layers=2 * layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 6, 6),
    )
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return transformer.eval()


def save_tiny_pipeline(
    folder: Path, *, guidance: bool = True, post_quant_conv: bool = False, dtype: torch.dtype = torch.float32
) -> Path:
    """Write the pipeline as a diffusers folder; ``guidance`` as in FLUX.1-dev, without it as in FLUX.1-schnell."""
    torch.manual_seed(0)
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=guidance, shift=3.0 if guidance else 1.0),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            latent_channels=CHANNELS,
            norm_num_groups=4,
            use_quant_conv=False,
            use_post_quant_conv=post_quant_conv,
            scaling_factor=0.7,
            shift_factor=0.1,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(clip),
                hidden_size=20,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=12,
                bos_token_id=clip.bos_token_id,
                eos_token_id=clip.eos_token_id,
            )
        ),
        tokenizer=clip,
        text_encoder_2=T5EncoderModel(
            T5Config(
                vocab_size=len(t5),
                d_model=24,
                d_kv=8,
                d_ff=32,
                num_layers=2,
                num_heads=3,
                feed_forward_proj="gated-gelu",
            )
        ),
        tokenizer_2=t5,
        transformer=tiny_transformer(guidance=guidance),
    )
    pipeline.to(dtype=dtype).save_pretrained(folder)
    return folder


def tiny_adapter_config(**settings: Any) -> AdapterConfig:
    """An adapter's settings with LoRA in the feed-forward layers."""
    return AdapterConfig(**{"targets": FEED_FORWARD, **settings})


def save_tiny_adapter(path: Path, pipeline: Path, patches: tuple[int, ...] = (4, 8)) -> Path:
    """Write an adapter of random tensors, as if trained: nothing in it is zero."""
    transformer = FluxTransformer2DModel.from_pretrained(pipeline / "transformer")
    levels = {
        patch: FluxLevel(transformer, patch, tiny_adapter_config(rank=4, alpha=8.0, residual_width=8))
        for patch in patches
    }
    with torch.no_grad():
        for level in levels.values():
            for parameter in level.own_parameters().values():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    save_adapter(path, levels, base_model="tiny", family="flux")
    return path


def half_precision_level(pipeline: Path, folder: Path, family: type[Family] = Flux) -> Path:
    """The native level's graph in float16, without the rest of a bundle."""
    job = next(job for job in family(find_model(str(pipeline)), (2,), "fp16").jobs() if job.name == "level-2")
    weights = WeightFiles(folder)
    graph = export_graph(job, 23, weights)
    weights.write()
    return folder / graph.save(folder, weights)
