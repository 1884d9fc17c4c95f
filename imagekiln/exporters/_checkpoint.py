"""A whole fine-tuned model as one file under the names of its first publication, as ComfyUI and most programs load it.

The file says nothing of heads, norms, noise or scales: programs have these numbers from the layout that they take the
file for. So a model with others is refused, and what latents are scaled by goes into the autoencoder's weights where it
differs (`_coder.folded`; by 1 for published ones).

The proof: diffusers' own reader of such files opens it with the configs of `family.base` and the scales that ComfyUI
has, and draws and encodes what we do. That ComfyUI takes the file for what it is, `_comfyui_rules` tells.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from imagekiln.engine.codec import Codec
from imagekiln.errors import UsageError
from imagekiln.exporters import _classical, _coder, _comfyui_rules, _folder
from imagekiln.nets.libraries import quietly
from imagekiln.nets.pretrained import PIPELINES, noise_of

FOLDER = Path("models/checkpoints")
"""Where ComfyUI looks for such files."""

MODELS = {"sd1": "SD15", "sdxl": "SDXL"}
"""What ComfyUI calls the layouts that one file is written for."""

FACTORS = {"sd1": 0.18215, "sdxl": 0.13025}
"""What it multiplies latents by."""

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
DENOISER = {"norm_num_groups": 32, "act_fn": "silu", "flip_sin_to_cos": True, "freq_shift": 0}
SIZES = {"sd1": {}, "sdxl": {"addition_time_embed_dim": 256}}
ACTIVATIONS = ("quick_gelu", "gelu")
"""Of the first text encoder and of the second."""


def write(family: Any, path: Path) -> None:
    """Write the file.

    Raises:
        UsageError: ComfyUI would not compute from the file what this model computes; nothing is written.
    """
    base = family.base
    if base.kind not in MODELS:
        raise UsageError("ComfyUI is given whole models of Stable Diffusion 1.5 and XL here. Use --to diffusers.")
    networks = base.networks() | dict(family.tuned.items())
    encoders = [networks[name] for name in list(networks)[1:]]
    tensors = _classical.checkpoint(
        networks["denoiser"].state_dict(),
        networks["denoiser"].config.layers_per_block,
        _coder_tensors(family.codec, FACTORS[base.kind]),
        [encoder.state_dict() for encoder in encoders],
    )
    try:
        _comfyui_rules.checkpoint(_comfyui_rules.shapes_of(tensors))
    except UsageError as refusal:
        raise UsageError(f"{refusal} Use --to diffusers.") from None
    _refuse(base, networks["denoiser"], encoders)
    _folder.write_tensors(path, tensors)


def _coder_tensors(codec: Codec, factor: float) -> dict[str, Tensor]:
    """The autoencoder for latents that are divided by this factor before it decodes them."""
    coder = _coder.family_of(codec)
    kind, tensors = type(_coder.network_of(coder)).__name__, _coder.tensors_of(coder)
    if kind != "AutoencoderKL" or "quant_conv.weight" not in tensors:
        raise UsageError(
            f"data.codec is an autoencoder of class {kind}, and one file of a whole model holds an AutoencoderKL with "
            "1x1 convolutions next to the latents. Leave data.codec out, or use --to diffusers."
        )
    return _coder.folded(tensors, factor * (codec.scale or 1.0), codec.shift or 0.0)


def _refuse(base: Any, denoiser: Any, encoders: list[Any]) -> None:
    """What shapes do not tell."""
    found, wanted = dict(denoiser.config), DENOISER | SIZES[base.kind]
    heads = denoiser.config.get("num_attention_heads") or denoiser.config.attention_head_dim
    widths = denoiser.config.block_out_channels
    found["heads"] = [heads] * len(widths) if isinstance(heads, int) else list(heads)
    fixed = _comfyui_rules.UNETS[MODELS[base.kind]]
    wanted = wanted | {"heads": [fixed.heads or width // fixed.head for width in widths]}
    for number, encoder in enumerate(encoders):
        found[f"hidden_act of encoder {number + 1}"] = encoder.config.hidden_act
        wanted[f"hidden_act of encoder {number + 1}"] = ACTIVATIONS[number]
    other = [name for name, value in wanted.items() if found[name] != value]
    if other:
        raise UsageError(
            f"family.base has {other[0]} = {found[other[0]]!r}, and ComfyUI computes with {wanted[other[0]]!r} "
            "whatever it is. Use --to diffusers."
        )
    known = [noise_of(NOISE | {"rescale_betas_zero_snr": ending}, base.kind).betas for ending in (False, True)]
    betas = base.noise.betas
    if not any(len(betas) == len(one) and torch.allclose(betas, one, atol=1e-6) for one in known if one is not None):
        raise UsageError(
            "family.base was trained with other noise than Stable Diffusion 1.5 and XL, and ComfyUI has no node for "
            "it. Use --to diffusers."
        )


def detected(path: Path) -> dict[str, Any]:
    """What ComfyUI takes the file for. Raises `UsageError` where it would refuse it."""
    with safe_open(path, "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  not a dict
    return _comfyui_rules.checkpoint(shapes)


def example(family: Any, name: str, path: Path) -> str:
    """Python that opens the file as this class."""
    more = ", safety_checker=None" if family.base.kind == "sd1" else ""
    return f"pipeline = {name}.from_single_file({str(path)!r}, config={family.base.folder!r}{more})\n"


def opened(family: Any, path: Path, out: Path) -> Any:
    """The stock pipeline of the file, with what latents are scaled by in ComfyUI."""
    kind, options = family.base.kind, {"config": family.base.folder, "local_files_only": True}
    if kind == "sd1":
        options |= {"safety_checker": None, "requires_safety_checker": False}
    with quietly():
        pipeline = getattr(_folder.library(out), PIPELINES[kind]).from_single_file(str(path), **options)
        pipeline.to(torch.float32)
    pipeline.vae.register_to_config(scaling_factor=FACTORS[kind], shift_factor=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def encoded_difference(family: Any, pipeline: Any) -> float:
    """Largest difference of a latent of a random picture."""
    x = torch.rand(1, *family.picture_shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = pipeline.vae.encode(x).latent_dist.mean * pipeline.vae.config.scaling_factor
    return _folder.apart(family.codec.encode(x), latents)
