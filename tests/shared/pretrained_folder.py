"""Tiny pretrained models of real classes, as users have them on disk."""

from __future__ import annotations

from pathlib import Path

import torch

from imagekiln.nets import pretrained
from imagekiln.nets.libraries import diffusers as library


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
