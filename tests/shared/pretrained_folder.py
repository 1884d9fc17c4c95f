"""Tiny pretrained models of real classes, as users have them on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from imagekiln.nets import pretrained
from imagekiln.nets.libraries import diffusers as library
from imagekiln.nets.libraries import transformers


def xl_unet(
    widths: tuple[int, ...], heads: tuple[int, ...], layers: tuple[int, ...], words: int, whole: int, **given: Any
) -> Any:
    """A U-Net of the kind that XL was published with. words, whole: numbers of a word, and of a whole text."""
    return library().UNet2DConditionModel(
        block_out_channels=widths,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=words,
        attention_head_dim=heads,
        transformer_layers_per_block=layers,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=6 * 256 + whole,
        **given,
    )


def full_autoencoder(widths: tuple[int, ...], **given: Any) -> Any:
    """An autoencoder of the kind that Stable Diffusion 1 and XL were published with."""
    return library().AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=2,
        **given,
    )


def joint_transformer(layers: int, head: int, words: int, whole: int, **given: Any) -> Any:
    """A transformer of the kind that Stable Diffusion 3 was published with. words, whole: as of `xl_unet`."""
    return library().SD3Transformer2DModel(
        num_layers=layers,
        num_attention_heads=layers,
        attention_head_dim=head,
        caption_projection_dim=layers * head,
        joint_attention_dim=words,
        pooled_projection_dim=whole,
        in_channels=16,
        out_channels=16,
        **given,
    )


def third_encoder(layers: int, width: int, inner: int, heads: int, head: int, tokens: int) -> Any:
    """T5's encoder, as Stable Diffusion 3 has it."""
    sizes = {"num_layers": layers, "d_model": width, "d_ff": inner, "num_heads": heads, "d_kv": head}
    config = transformers().T5Config(**sizes, vocab_size=tokens, feed_forward_proj="gated-gelu")
    return transformers().T5EncoderModel(config)


def joint_base(third: bool) -> dict[str, Any]:
    """Parts of Stable Diffusion 3, narrow. third: with T5."""
    found: dict[str, Any] = {"text_encoder_3": None, "tokenizer_3": None}
    if third:
        found["tokenizer_3"] = transformers().T5TokenizerFast()
        found["text_encoder_3"] = third_encoder(2, 96, 24, 2, 8, len(found["tokenizer_3"]))
    found["transformer"] = joint_transformer(2, 16, 96, 80, sample_size=4, pos_embed_max_size=16)
    scales = {"scaling_factor": 1.5305, "shift_factor": 0.0609}
    bare = {"use_quant_conv": False, "use_post_quant_conv": False}
    found["vae"] = full_autoencoder((32, 64, 128, 128), latent_channels=16, **scales, **bare)
    found["scheduler"] = library().FlowMatchEulerDiscreteScheduler(shift=3.0)
    return found


def write_whole_base(folder: Path, kind: str, third: bool = False) -> Path:
    """One whose levels, blocks and encoders are of the kinds that "sd1", "sdxl" and "sd3" were published with, but
    narrow. third: with the third encoder of "sd3"."""
    diffusers, parts = library(), pretrained.random_parts(kind)
    torch.manual_seed(2)
    given = {"layers_per_block": 2, "sample_size": 4}
    if kind == "sd1":
        parts["unet"] = diffusers.UNet2DConditionModel(
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=8,
            **given,
        )
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    else:
        first, sizes = parts["text_encoder"].config, {"hidden_size": 48, "intermediate_size": 192, "projection_dim": 48}
        sizes |= {"num_hidden_layers": 3, "num_attention_heads": 6, "hidden_act": "gelu"}
        parts["text_encoder_2"] = type(parts["text_encoder_2"])(type(first)(**first.to_dict() | sizes))
    if kind == "sdxl":
        parts["unet"] = xl_unet((32, 64, 64), heads=(4, 8, 8), layers=(1, 1, 2), words=80, whole=48, **given)
    parts["vae"] = full_autoencoder((32, 64, 128, 128), scaling_factor=0.5)
    parts["scheduler"] = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False
    )
    parts |= joint_base(third) if kind == "sd3" else {}
    getattr(diffusers, pretrained.PIPELINES[kind])(**parts).save_pretrained(folder)
    return folder


def write_base(folder: Path, kind: str) -> Path:
    """A tiny pretrained model of real classes, written as diffusers writes it."""
    diffusers, parts = library(), pretrained.random_parts(kind)
    torch.manual_seed(1)
    parts["vae"] = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.5,
        shift_factor=0.1 if kind == "sd3" else None,
    )
    if kind == "sd3":
        parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        parts |= {"text_encoder_3": None, "tokenizer_3": None}
    else:
        parts["scheduler"] = diffusers.DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False
        )
    if kind == "sd1":
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    getattr(diffusers, pretrained.PIPELINES[kind])(**parts).save_pretrained(folder)
    return folder
