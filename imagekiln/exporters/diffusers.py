"""A folder that diffusers loads: a network, an autoencoder, or a whole pipeline from words to pictures.

A U-Net on pixels has the state dict and config of `UNet2DModel`, so writing is two files; a rectified flow without
classes also becomes a `DDPMPipeline` with `FlowMatchEulerDiscreteScheduler`, which is plain Euler in time. An
autoencoder becomes a folder of its own class. What reads text becomes a whole pipeline, see `_pipelines`. The proof is
loading with the real classes and comparing outputs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from imagekiln.engine.codec import Codec
from imagekiln.engine.models import Model
from imagekiln.errors import UsageError
from imagekiln.exporters import _coder, _folder, _pipelines, _tuned
from imagekiln.exporters._card import sizes, write_card

TOLERANCE = 1e-5


def write(model: Model, out: Path) -> dict[str, Any]:
    """Write the folder, with a model card, and load it back. `call` in the receipt is Python that uses it.

    Raises:
        UsageError: the model has no part of that shape, diffusers is not installed, or what it computes differs.
    """
    if _tuned.is_tuned(model.family):
        return _tuned.write(model, out, "diffusers")
    if _pipelines.reads_text(model.family):
        return _write_text_to_picture(model, out)
    if _coder.network_of(model.family) is not None:
        return _write_autoencoder(model, out)
    return _write_pixel_unet(model, out)


# -- text to picture --------------------------------------------------------------------------------------------------


def _write_text_to_picture(model: Model, out: Path) -> dict[str, Any]:
    stock = _pipelines.write(model, out)
    family: Any = model.family
    # a pipeline that does not shift latents has the shift in the autoencoder's weights
    offset = family.codec.shift if stock.folds else 0.0
    parts = _coder.difference(family.codec.model.family, out / _coder.FOLDER, offset)
    drawn = _pipelines.difference(model, stock, out)
    _agree(parts, TOLERANCE, out / _coder.FOLDER)
    _agree(drawn, _pipelines.TOLERANCE, out)
    prompt = next(iter(model.prompts), "a picture")
    call = stock.example(str(out), prompt, family.config.sample.guidance)
    said = (
        f"With equal noise, {stock.exact} steps and guidance 3, {stock.pipeline} draws what the model draws: pixels in "
        f"[0, 1] differ by at most {drawn:.2g}; what the autoencoder encodes and decodes by at most {parts:.2g}."
    )
    write_card(
        model,
        out,
        f"```python\n{stock.example('.', prompt, family.config.sample.guidance)}```",
        [said, *_pipelines.origin_of_text(family)],
        _limits(model, stock),
    )
    return {
        "format": "diffusers",
        "path": str(out),
        "difference": max(drawn, parts),
        "differences": {"pictures": drawn, "codec": parts},
        "pipeline": stock.pipeline,
        "call": call,
        "sentence": f"{stock.pipeline} written to {out}; loaded back, its pictures differ by at most {drawn:.2g} and "
        f"its autoencoder by {parts:.2g}. README.md there says how to call it.",
    }


def _limits(model: Model, stock: _pipelines.Stock) -> list[str]:
    family: Any = model.family
    config = family.config
    limits = [
        f"It reads {family.text.context} tokens of a text, its marks included; what is longer is cut. It has "
        "learned to draw the words of the captions it was trained with.",
        sizes(model),
        "The pipeline's own sampler is first order and takes more steps than the default of imagekiln; guidance in an "
        "interval is not a part of it.",
    ]
    if stock.pipeline == "StableDiffusion3Pipeline":
        limits.append(
            "Without `max_sequence_length=0` the pipeline puts tokens of zeros behind the words, which the model has "
            "never seen, and draws something else."
        )
    elif config.path == "rf":
        limits.append("Numbers of steps that divide 999 (27, 37, 111) are exact; others round time to thousandths.")
    else:
        limits.append("Numbers of steps that divide 1000 (20, 25, 40, 50) are exact.")
    return limits


# -- autoencoders -----------------------------------------------------------------------------------------------------


def _write_autoencoder(model: Model, out: Path) -> dict[str, Any]:
    name = type(_coder.network_of(model.family)).__name__
    shift, scale = _coder.spread_of(model.family)
    _coder.write_with_scales(model.family, out, shift, scale)
    difference = _coder.difference(model.family, out)
    _agree(difference, TOLERANCE, out)
    call = f"from diffusers import {name}\n\nvae = {name}.from_pretrained({str(out)!r})\n"
    write_card(
        model,
        out,
        f"```python\nfrom diffusers import {name}\n\nvae = {name}.from_pretrained('.')\n```",
        [
            f"Loaded back by diffusers, latents and pictures differ by at most {difference:.2g}.",
            f"Latents have mean {shift:.4g} and standard deviation {scale:.4g} over the training set; the config says "
            "so in `scaling_factor` and, where its class has it, in `shift_factor`.",
        ],
        ["It encodes pictures like those it was trained on; others lose more."],
    )
    return {
        "format": "diffusers",
        "path": str(out),
        "difference": difference,
        "pipeline": "",
        "call": call,
        "sentence": f"{name} written to {out}; loaded back by diffusers, latents and pictures differ by at most "
        f"{difference:.2g}.",
    }


# -- U-Nets on pixels -------------------------------------------------------------------------------------------------


def _write_pixel_unet(model: Model, out: Path) -> dict[str, Any]:
    unet: Any = next((part for part in model.family.children() if hasattr(part, "diffusers_config")), None)
    if unet is None:
        raise UsageError(
            f"A {model.family.config.name} model has no network that diffusers knows. Use --to safetensors."
        )
    codec: Any = model.family.codec
    coder = _coder.family_of(codec) if isinstance(codec, Codec) else None
    config = unet.diffusers_config()
    _folder.write_network(out / "unet", config, unet.diffusers_state_dict())
    pipeline = coder is None and _write_pixel_pipeline(model, config, out)
    difference = _unet_difference(unet, config, out)
    _agree(difference, TOLERANCE, out / "unet")
    if coder is not None:  # no stock pipeline draws with it
        _coder.write_with_scales(coder, out / _coder.FOLDER, codec.shift, codec.scale)
        difference = max(difference, _coder.difference(coder, out / _coder.FOLDER))
        _agree(difference, TOLERANCE, out / _coder.FOLDER)
    what = "Pipeline and U-Net" if pipeline else "U-Net" if coder is None else "U-Net and autoencoder"
    return {
        "format": "diffusers",
        "path": str(out),
        "difference": difference,
        "pipeline": "DDPMPipeline" if pipeline else "",
        "sentence": f"{what} written to {out}; loaded back by diffusers, outputs differ by at most {difference:.2g}.",
    }


def _write_pixel_pipeline(model: Model, config: dict[str, Any], out: Path) -> bool:
    """A stock pipeline feeds neither labels nor other targets than the flow's velocity."""
    family = model.family.config
    if config["num_class_embeds"] is not None or getattr(family, "path", "") != "rf" or family.target != "v":
        return False
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}
    index = {
        "_class_name": "DDPMPipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    }
    _folder.write_json(out / "scheduler" / "scheduler_config.json", scheduler)
    _folder.write_json(out / "model_index.json", index)
    return True


@torch.no_grad()
def _unet_difference(unet: Any, config: dict[str, Any], out: Path) -> float:
    """Largest difference of outputs on random pictures, in float32."""
    theirs = _folder.library(out).UNet2DModel.from_pretrained(out / "unet").eval()
    generator = torch.Generator().manual_seed(0)
    shape = (2, config["in_channels"], config["sample_size"], config["sample_size"])
    images, times = torch.randn(shape, generator=generator), torch.tensor([10.0, 700.0])
    labels = torch.tensor([0, config["num_class_embeds"] - 1]) if config["num_class_embeds"] else None
    ours = unet.eval()(images, times, labels)
    return _folder.apart(ours, theirs(images, times, class_labels=labels).sample)


def _agree(difference: float, tolerance: float, where: Path) -> None:
    if not difference <= tolerance:
        raise UsageError(
            f"diffusers computes something else from {where}: outputs differ by {difference:.2g}, more than "
            f"{tolerance:g}. Please report this with the versions `imagekiln doctor` prints."
        )
