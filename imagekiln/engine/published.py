"""Published autoencoders as codecs: folders of diffusers' `AutoencoderKL` or `AutoencoderTiny`, or of a pipeline.

Their latents keep the scales of their own config, because the denoisers that were published with them expect these. A
run keeps network, config and scales in one file.

Shapes: B pictures, C channels, H rows, W columns; a latent has its own C, H and W.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from imagekiln.engine.codec import Codec
from imagekiln.errors import RecipeError, UsageError
from imagekiln.nets import latent_autoencoder
from imagekiln.nets.libraries import diffusers, quietly

FORMAT = "diffusers"
_FACTORS = {"AutoencoderKL": 0.18215, "AutoencoderTiny": 1.0}
"""What each class multiplies latents by where its config does not say."""

_CLASSES = tuple(_FACTORS)


class PublishedCoder(nn.Module):
    """The network as a `Coder`, for pictures of one shape."""

    averaged = ("network",)
    """What its file holds, as of a family's."""

    def __init__(self, network: Any, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.network, self.image_shape = network.eval().requires_grad_(False), image_shape

    def encode(self, images: Tensor) -> Tensor:
        """latents_BCHW float32 of images_BCHW in [-1, 1]: the mean, nothing random."""
        return latent_autoencoder.moments(self.network, images)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """images_BCHW float32 of latents_BCHW."""
        return latent_autoencoder.pictures(self.network, latents)


@dataclass
class PublishedModel:
    """What a codec needs of a model."""

    family: PublishedCoder
    device: torch.device

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """Full float32: some published autoencoders overflow in less."""
        return contextlib.nullcontext()


def folder_of(path: str) -> Path | None:
    """The folder of the autoencoder that a path names, itself or the pipeline's around it; None where there is none."""
    root = Path(path).expanduser()
    for file in (root / "config.json", *sorted(root.glob("*/config.json"))):
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(config, dict) and config.get("_class_name") in _CLASSES:
            return file.parent
    return None


def require_scales(codec: str, base: str) -> None:
    """Refuse a published codec for a pretrained model whose own autoencoder, of the same class, scales latents
    otherwise: its denoiser expects these scales. Latents of another class may be scaled already, as those of TAESD are.

    codec, base: what `data.codec` names, and the folder of the pretrained model.

    Raises:
        RecipeError: the scales differ.
    """
    folders = folder_of(codec), folder_of(base)
    if None in folders:
        return
    ours, theirs = (json.loads((one / "config.json").read_text(encoding="utf-8")) for one in folders if one)
    if ours["_class_name"] == theirs["_class_name"] and _scales(ours) != _scales(theirs):
        (factor, shift), (wanted, lower) = _scales(ours), _scales(theirs)
        raise RecipeError(
            f"data.codec = {codec!r} scales latents by {factor:g} after {shift:g} is taken off, and {base} was trained "
            f"with {wanted:g} and {lower:g}. Leave data.codec out: the autoencoder of the model is taken then."
        )


def _scales(config: Mapping[str, Any]) -> tuple[float, float]:
    """What latents are multiplied by, and what is taken off before, by a config that may leave both out."""
    factor = config.get("scaling_factor") or _FACTORS[config["_class_name"]]
    return float(factor), float(config.get("shift_factor") or 0.0)


def opened(folder: Path, image_shape: tuple[int, int, int]) -> Codec:
    """The codec of a folder, for pictures of this shape.

    Raises:
        UsageError: its weights cannot be read, or pictures have another number of channels or sides it cannot halve.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = getattr(diffusers(), config["_class_name"])
    if not any(folder.glob("*.safetensors")):
        raise UsageError(f"data.codec: {folder} holds no safetensors; weights as pickles can run any code.")
    try:
        with quietly():
            network = kind.from_pretrained(folder, local_files_only=True, use_safetensors=True).float()
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"data.codec: {folder} cannot be read as a {kind.__name__} ({error}).") from error
    channels, halvings = network.config.in_channels, 2 ** (len(_widths(network)) - 1)
    if image_shape[0] != channels or image_shape[1] % halvings or image_shape[2] % halvings:
        raise UsageError(
            f"data.codec: {folder} encodes pictures of {channels} channels whose sides are multiples of {halvings}; "
            f"these are {image_shape} (channels, height, width). Set data.size, or convert the pictures."
        )
    about = {
        "format": FORMAT,
        "class": kind.__name__,
        "config": network.to_json_string(),
        "image_shape": json.dumps(list(image_shape)),
    }
    tensors = {name: value.contiguous() for name, value in network.state_dict().items()}
    return _codec(network, image_shape, to_bytes(tensors, about))


def reopened(weights: Path) -> Codec | None:
    """The codec of a file that a run keeps; None where the file holds a model of another kind."""
    with safe_open(weights, "pt") as file:
        about = file.metadata() or {}
        if about.get("format") != FORMAT or about.get("class") not in _CLASSES:
            return None
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
    network = getattr(diffusers(), about["class"]).from_config(json.loads(about["config"]))
    network.load_state_dict(tensors)
    rows: Sequence[int] = json.loads(about["image_shape"])
    return _codec(network, (rows[0], rows[1], rows[2]), weights.read_bytes())


def _codec(network: Any, image_shape: tuple[int, int, int], data: bytes) -> Codec:
    shift, factor = network.config.get("shift_factor") or 0.0, network.config.get("scaling_factor") or 1.0
    return Codec(PublishedModel(PublishedCoder(network, image_shape), torch.device("cpu")), data, shift, 1 / factor)


def _widths(network: Any) -> Sequence[int]:
    config = network.config
    widths: Sequence[int] = config.get("block_out_channels") or config["encoder_block_out_channels"]
    return widths
