"""The demo model's parts: a small FLUX pipeline for scenes, before training."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from ddit.exporter.families.flux.model import rotary_positions
from ddit.runtime.bundle.manifest import AxisInfo, LatentInfo
from demo_model.scenes import vocabulary
from training.distillation import Tables, level_tables

TEXT_LENGTH = 16  # the longest caption has 13 tokens, start and end included
PATCH = 2
STEPS = 50  # of sampling


@dataclass(frozen=True)
class Sizes:
    """Widths and depths. The defaults make the demo model: 11 million parameters in the transformer."""

    picture: int = 256  # pixels of a side, where it is judged
    vae: tuple[int, ...] = (32, 64, 96, 96)
    latent_channels: int = 16
    text_width: int = 128
    text_layers: int = 2
    heads: int = 4
    head_dim: int = 64
    rope: tuple[int, int, int] = (16, 24, 24)
    double_blocks: int = 2
    single_blocks: int = 6


TINY = Sizes(64, (8, 8, 8, 8), 4, 16, 1, 2, 16, (4, 6, 6), 1, 1)  # a smoke test's


def make_vae(sizes: Sizes) -> AutoencoderKL:
    """FLUX's kind of VAE: eight times smaller, 16 channels, no quantisation convolutions."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=sizes.vae,
        layers_per_block=1,
        latent_channels=sizes.latent_channels,
        norm_num_groups=min(16, sizes.vae[0] // 2),
        sample_size=sizes.picture,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=True,
    )


def make_transformer(sizes: Sizes) -> FluxTransformer2DModel:
    """FLUX.1-dev's architecture, small; guidance embedded as there."""
    transformer = FluxTransformer2DModel(
        in_channels=sizes.latent_channels * PATCH**2,
        num_layers=sizes.double_blocks,
        num_single_layers=sizes.single_blocks,
        attention_head_dim=sizes.head_dim,
        num_attention_heads=sizes.heads,
        joint_attention_dim=sizes.text_width,
        pooled_projection_dim=sizes.text_width,
        guidance_embeds=True,
        axes_dims_rope=sizes.rope,
    )
    for parameter in transformer.proj_out.parameters():  # the untrained model then predicts 0, as DiT's does
        nn.init.zeros_(parameter)
    return transformer


def make_tables(transformer: FluxTransformer2DModel, device: torch.device) -> Tables:
    """The levels' position tables."""
    axes = (AxisInfo(name="height", downscale=8), AxisInfo(name="width", downscale=8))
    latent = LatentInfo(channels=transformer.config.in_channels // PATCH**2, axes=axes)
    return level_tables(rotary_positions(transformer.config.axes_dims_rope), latent, PATCH, device)


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """FLUX.1-dev's scheduler."""
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)


def make_clip(sizes: Sizes) -> tuple[CLIPTextModel, PreTrainedTokenizerFast]:
    """A CLIP text encoder and a byte-pair tokenizer over the captions' words."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE(unk_token=end, end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=[start, end],
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator([*vocabulary(), *letters], trainer)
    ids = {token: tokenizer.token_to_id(token) for token in (start, end)}
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=list(ids.items())
    )
    tokenizer.decoder = decoders.BPEDecoder()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=start,
        eos_token=end,
        pad_token=end,
        unk_token=end,
        model_max_length=TEXT_LENGTH,
    )
    config = CLIPTextConfig(
        vocab_size=len(fast),
        hidden_size=sizes.text_width,
        intermediate_size=2 * sizes.text_width,
        num_hidden_layers=sizes.text_layers,
        num_attention_heads=max(1, sizes.text_width // 32),
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=ids[start],
        eos_token_id=ids[end],
        pad_token_id=ids[end],
    )
    return CLIPTextModel(config), fast


def make_t5_tokenizer(words: Sequence[str], length: int) -> PreTrainedTokenizerFast:
    """A unigram tokenizer over these words, with T5's marks, for texts of so many tokens at most."""
    special = ["<pad>", "</s>", "<unk>"]
    pieces = [(token, 0.0) for token in special] + [(f"▁{word}", -4.0) for word in words]
    pieces += [(letter, -9.0) for letter in ["▁", *(chr(code) for code in range(ord("a"), ord("z") + 1))]]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=special.index("<unk>")))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=length,
    )


def t5_settings(width: int, layers: int, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The configuration of a T5 encoder, of either kind."""
    return {
        "vocab_size": len(tokenizer),
        "d_model": width,
        "d_kv": 32,
        "d_ff": 2 * width,
        "num_layers": layers,
        "num_heads": max(1, width // 32),
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
    }


def make_t5(sizes: Sizes) -> tuple[T5EncoderModel, PreTrainedTokenizerFast]:
    """A T5 encoder and its tokenizer."""
    tokenizer = make_t5_tokenizer(vocabulary(), TEXT_LENGTH)
    return T5EncoderModel(T5Config(**t5_settings(sizes.text_width, sizes.text_layers, tokenizer))), tokenizer


def make_umt5(
    width: int, layers: int, words: Sequence[str], length: int
) -> tuple[UMT5EncoderModel, PreTrainedTokenizerFast]:
    """A UMT5 encoder and its tokenizer, for texts of these words and of so many tokens at most."""
    tokenizer = make_t5_tokenizer(words, length)
    return UMT5EncoderModel(UMT5Config(**t5_settings(width, layers, tokenizer))), tokenizer
