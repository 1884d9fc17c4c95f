r"""Autoencoders as files of diffusers, and the change of latents that a tool expects.

A run that learns latents takes z = (raw - shift) / scale, where raw is what the autoencoder says. A tool has latents c
of its own with raw = a c + b. Where its file has no numbers for a and b, they go into the 1x1 convolutions next to the
latents, which is exact: such a convolution is linear and has no border.

    post_quant_conv   W (a c + b) + v  =  (a W) c + (v + b W 1)
    quant_conv        mean_c = (mean - b) / a      logvar_c = logvar - 2 ln a

Shapes: B pictures, Z latent channels, h rows, w columns, K codes.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from imagekiln.core import Family
from imagekiln.engine.codec import Codec, Coder
from imagekiln.errors import UsageError
from imagekiln.exporters._folder import apart, config_of, library, write_network
from imagekiln.nets import latent_autoencoder
from imagekiln.nets.codebook import Codebook
from imagekiln.nets.libraries import quietly

FOLDER = Path("./vae")
"""Where diffusers and ComfyUI expect an autoencoder."""

CLASSES = ("AutoencoderKL", "AutoencoderTiny", "VQModel")


def network_of(family: Family) -> Any | None:
    """The network of a family of autoencoders, an instance of one of `CLASSES`; None for other families."""
    return next((part for part in family.children() if type(part).__name__ in CLASSES), None)


def family_of(codec: Codec) -> Family:
    """The family of autoencoders that a run's codec is. Raises `UsageError` where no other program knows its class."""
    family: Family = codec.model.family
    if network_of(family) is None:
        raise UsageError(
            f"The run's codec is a {family.config.name} model, and other programs know {', '.join(CLASSES)}. Train an "
            "autoencoder of one of these classes first, or use --to safetensors."
        )
    return family


def tensors_of(family: Family) -> dict[str, Tensor]:
    """The network's weights under the keys of its class, codes included; its latents are those of `family.encode`."""
    book = _book(family)
    if book is not None:
        return latent_autoencoder.diffusers_state_dict(network_of(family), book.codes)
    return latent_autoencoder.diffusers_state_dict(network_of(family), moments=_moments(family))


def folded(tensors: dict[str, Tensor], gain: float, offset: float) -> dict[str, Tensor]:
    """Weights of an `AutoencoderKL` for latents c with raw = gain c + offset. gain must be positive.

    >>> conv = {"weight": torch.ones(2, 1, 1, 1), "bias": torch.zeros(2)}
    >>> before = {f"{name}.{k}": v for name in ("quant_conv", "post_quant_conv") for k, v in conv.items()}
    >>> after = folded(before, 2.0, 1.0)
    >>> after["quant_conv.bias"].tolist(), after["post_quant_conv.bias"].tolist()
    ([-0.5, -1.3862943649291992], [1.0, 1.0])
    """
    tensors = dict(tensors)
    weight, bias = (tensors[f"quant_conv.{name}"].clone() for name in ("weight", "bias"))
    half = len(weight) // 2
    weight[:half] /= gain
    bias[:half] = (bias[:half] - offset) / gain
    bias[half:] -= 2 * math.log(gain)
    back = tensors["post_quant_conv.weight"]
    return tensors | {
        "quant_conv.weight": weight,
        "quant_conv.bias": bias,
        "post_quant_conv.weight": gain * back,
        "post_quant_conv.bias": tensors["post_quant_conv.bias"] + offset * back.sum((1, 2, 3)),
    }


def write_with_scales(family: Family, folder: Path, shift: float, scale: float) -> None:
    """Write the network with the numbers that standardise its latents, as far as its class has a place for them."""
    config = config_of(network_of(family))
    config["scaling_factor"] = 1 / scale
    if "shift_factor" in config:
        config["shift_factor"] = shift
    write_network(folder, config, tensors_of(family))


def write_with_scale(family: Family, folder: Path, shift: float, scale: float) -> None:
    """Write an `AutoencoderKL` for tools that scale latents and do not shift them: the shift is in its weights."""
    config = config_of(network_of(family)) | {"scaling_factor": 1 / scale, "shift_factor": None}
    write_network(folder, config, folded(tensors_of(family), 1.0, shift))


def spread_of(family: Family) -> tuple[float, float]:
    """Mean and standard deviation of all numbers of the latents: 0 and 1 where the family standardises them."""
    kept = _moments(family)
    if kept is None or _book(family) is None:
        return 0.0, 1.0
    mean, square = float(kept.mean.double().mean()), float(kept.square.double().mean())
    return mean, max(square - mean**2, 0.0) ** 0.5 or 1.0


@torch.no_grad()
def difference(family: Family, folder: Path, offset: float = 0.0) -> float:
    """Largest difference between the network and the one that diffusers loads from `folder`, on random pictures.

    Latents and pictures are compared in float32 as in `_folder.apart`. offset: what the file's latents are lower by.
    """
    network = network_of(family)
    kind = getattr(library(folder), type(network).__name__)
    with quietly():
        theirs = kind.from_pretrained(folder).eval()
    x = torch.rand(2, *family.image_shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    raw = cast("Coder", family).encode(x)
    encoded = theirs.encode(x)
    latents = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latents
    book = _book(family)
    codes = raw if book is None else book(raw).codes
    ours, other = latent_autoencoder.pictures(network, codes), theirs.decode(raw - offset).sample
    return max(apart(raw - offset, latents), apart(ours, other))


def _moments(family: Family) -> latent_autoencoder.LatentMoments | None:
    return next((part for part in family.children() if isinstance(part, latent_autoencoder.LatentMoments)), None)


def _book(family: Family) -> Codebook | None:
    return next((part for part in family.children() if isinstance(part, Codebook)), None)
