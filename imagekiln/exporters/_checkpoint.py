"""A whole fine-tuned model as one file under the names of its first publication, as ComfyUI and most programs load it.

The file says nothing of heads, norms, noise or scales: programs have these numbers from the layout that they take the
file for. So a model with others is refused, and what latents are scaled by goes into the autoencoder's weights where it
differs (`_coder.folded`; by 1 for published ones), if it has 1x1 convolutions next to the latents.

The proof: diffusers' own reader of such files opens it with the configs of `family.base` and the scales that ComfyUI
has, and draws and encodes what we do. That ComfyUI takes the file for what it is, `_comfyui_whole` tells.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from imagekiln.engine.codec import Codec
from imagekiln.errors import UsageError
from imagekiln.exporters import _classical, _coder, _comfyui_rules, _comfyui_whole, _folder
from imagekiln.nets.libraries import quietly
from imagekiln.nets.pretrained import PIPELINES, noise_of

FOLDER = Path("models/checkpoints")
"""Where ComfyUI looks for such files."""

MODELS = {"sd1": "SD15", "sdxl": "SDXL", "sd3": "SD3"}
"""What ComfyUI calls the layouts."""

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
DENOISER = {"norm_num_groups": 32, "act_fn": "silu", "flip_sin_to_cos": True, "freq_shift": 0}
SIZES = {"sd1": {}, "sdxl": {"addition_time_embed_dim": 256}}
ACTIVATIONS = ("quick_gelu", "gelu", "gelu_new")
"""Of text encoders in their order."""


def write(family: Any, path: Path) -> None:
    """Write the file.

    Raises:
        UsageError: ComfyUI would not compute from the file what this model computes; nothing is written.
    """
    base = family.base
    networks = base.networks() | dict(family.tuned.items())
    denoiser, *encoders = networks.values()
    weights, coder = denoiser.state_dict(), _coder_tensors(family.codec, base.kind)
    words = [encoder.state_dict() for encoder in encoders]
    if base.kind == "sd3":
        tensors = _classical.joint_checkpoint(weights, coder, words)
    else:
        tensors = _classical.checkpoint(weights, denoiser.config.layers_per_block, coder, words)
    try:
        _comfyui_whole.checkpoint(_comfyui_rules.shapes_of(tensors))
    except UsageError as refusal:
        raise UsageError(f"{refusal} Use --to diffusers.") from None
    _refuse(base, denoiser, encoders)
    _folder.write_tensors(path, tensors)


def _coder_tensors(codec: Codec, layout: str) -> dict[str, Tensor]:
    """The autoencoder for latents that ComfyUI scales before it decodes them."""
    coder = _coder.family_of(codec)
    kind, tensors = type(_coder.network_of(coder)).__name__, _coder.tensors_of(coder)
    convolutions = layout != "sd3"
    if kind != "AutoencoderKL" or ("quant_conv.weight" in tensors) != convolutions:
        raise UsageError(
            f"data.codec is an autoencoder of class {kind}, and one file of a whole model holds an AutoencoderKL "
            f"{'with' if convolutions else 'without'} 1x1 convolutions next to the latents. Leave data.codec out, or "
            "use --to diffusers."
        )
    factor, lower = _comfyui_rules.LATENTS[MODELS[layout]]
    scale, shift = codec.scale or 1.0, codec.shift or 0.0
    if convolutions:
        return _coder.folded(tensors, factor * scale, shift - lower * factor * scale)
    if not (math.isclose(scale * factor, 1, rel_tol=1e-6) and math.isclose(shift, lower, abs_tol=1e-6)):
        raise UsageError(
            f"data.codec has latents that are lowered by {shift:g} and multiplied by {1 / scale:g}; ComfyUI's are by "
            f"{lower:g} and {factor:g}. Leave data.codec out, or use --to diffusers."
        )
    return tensors


def _refuse(base: Any, denoiser: Any, encoders: list[Any]) -> None:
    """What shapes do not tell."""
    found: dict[str, Any] = dict(denoiser.config)
    wanted: dict[str, Any] = {"attention_head_dim": _comfyui_rules.HEAD}
    if base.kind != "sd3":
        heads = denoiser.config.get("num_attention_heads") or denoiser.config.attention_head_dim
        widths = denoiser.config.block_out_channels
        found["heads"] = [heads] * len(widths) if isinstance(heads, int) else list(heads)
        fixed = _comfyui_rules.UNETS[MODELS[base.kind]]
        wanted = DENOISER | SIZES[base.kind]
        wanted["heads"] = [fixed.heads or width // fixed.head for width in widths]
    for number, encoder in enumerate(encoders):
        activation = "dense_act_fn" if hasattr(encoder.config, "dense_act_fn") else "hidden_act"
        found[f"{activation} of encoder {number + 1}"] = getattr(encoder.config, activation)
        wanted[f"{activation} of encoder {number + 1}"] = ACTIVATIONS[number]
    other = [name for name, value in wanted.items() if found[name] != value]
    if other:
        raise UsageError(
            f"family.base has {other[0]} = {found[other[0]]!r}, and ComfyUI computes with {wanted[other[0]]!r} "
            "whatever it is. Use --to diffusers."
        )
    betas = base.noise.betas
    if betas is None:
        return
    known = [noise_of(NOISE | {"rescale_betas_zero_snr": ending}, base.kind).betas for ending in (False, True)]
    if not any(len(betas) == len(one) and torch.allclose(betas, one, atol=1e-6) for one in known if one is not None):
        raise UsageError(
            "family.base was trained with other noise than Stable Diffusion 1.5 and XL, and ComfyUI has no node for "
            "it. Use --to diffusers."
        )


def absent(base: Any) -> tuple[str, ...]:
    """Parts that a stock pipeline must be told are not there."""
    return ("text_encoder_3", "tokenizer_3") if base.kind == "sd3" and len(base.encoders) < 3 else ()


def detected(path: Path) -> dict[str, Any]:
    """What ComfyUI takes the file for. Raises `UsageError` where it would refuse it."""
    with safe_open(path, "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  not a dict
    return _comfyui_whole.checkpoint(shapes)


def example(family: Any, name: str, path: Path) -> str:
    """Python that opens the file as this class."""
    parts = ["safety_checker"] if family.base.kind == "sd1" else absent(family.base)
    more = "".join(f", {part}=None" for part in parts)
    opening = f"pipeline = {name}.from_single_file({str(path)!r}, config={family.base.folder!r}{more})\n"
    # diffusers leaves T5 as in training, where some of its numbers are dropped
    return opening + ("pipeline.text_encoder_3.eval()\n" if len(family.base.encoders) > 2 else "")


def opened(family: Any, path: Path, out: Path) -> Any:
    """The stock pipeline of the file, with what latents are scaled by in ComfyUI."""
    kind, options = family.base.kind, {"config": family.base.folder, "local_files_only": True}
    options |= dict.fromkeys(absent(family.base))
    if kind == "sd1":
        options |= {"safety_checker": None, "requires_safety_checker": False}
    with quietly():
        pipeline = getattr(_folder.library(out), PIPELINES[kind]).from_single_file(str(path), **options)
        pipeline.to(torch.float32)
    if len(family.base.encoders) > 2:
        pipeline.text_encoder_3.eval()  # see `example`
    factor, lower = _comfyui_rules.LATENTS[MODELS[kind]]
    pipeline.vae.register_to_config(scaling_factor=factor, shift_factor=lower or None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def encoded_difference(family: Any, pipeline: Any) -> float:
    """Largest difference of a latent of a random picture."""
    x = torch.rand(1, *family.picture_shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    vae, config = pipeline.vae, pipeline.vae.config
    latents = (vae.encode(x).latent_dist.mean - (config.shift_factor or 0.0)) * config.scaling_factor
    return _folder.apart(family.codec.encode(x), latents)
