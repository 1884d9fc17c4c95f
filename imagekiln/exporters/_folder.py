"""Files of one network as diffusers and transformers keep them: a config and safetensors in a folder."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from imagekiln.engine import tensors as tensorfiles
from imagekiln.engine.run import disk_faults, write_whole
from imagekiln.errors import UsageError
from imagekiln.nets.clip_text import ClipText


def library(out: Path) -> Any:
    """diffusers. Raises `UsageError` when it is not usable here; what was written to `out` by then stays."""
    try:
        return importlib.import_module("diffusers")
    except (ImportError, RuntimeError) as error:
        raise UsageError(
            f"The files are written to {out}, but diffusers, which would prove that they load, is not usable here "
            f"({error}). pip install 'imagekiln[sd]'."
        ) from error


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference of a number; where numbers are larger than 1, in units of the largest of ours.

    >>> import torch
    >>> apart(torch.tensor([1.0, -4.0]), torch.tensor([1.5, -4.0]))
    0.125
    """
    return float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file."""
    tensorfiles.write_tensors(path, tensors, {"format": "pt"})


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """One JSON file."""
    write_whole(path, json.dumps(values, indent=2) + "\n")


def config_of(network: Any) -> dict[str, Any]:
    """The config of a network of diffusers, its class included."""
    config: dict[str, Any] = json.loads(network.to_json_string())
    return config


def write_network(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """A network of diffusers: `config.json` and its weights."""
    write_json(folder / "config.json", config)
    write_tensors(folder / "diffusion_pytorch_model.safetensors", tensors)


def write_text_encoder(folder: Path, encoder: ClipText, projected: bool = True) -> None:
    """The text encoder as transformers' `CLIPTextModelWithProjection`, or `CLIPTextModel` without its projection."""
    name = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    tensors = {k: v for k, v in encoder.clip.state_dict().items() if projected or k.startswith("text_model.")}
    _write_transformer(folder, name, encoder.clip, tensors)


def write_silent_encoder(folder: Path, encoder: ClipText, width: int) -> None:
    """A text encoder for the same tokens that says nothing: all its weights are 0, so its answers are exactly 0."""
    config = encoder.clip.config.to_dict() | {
        "hidden_size": width,
        "intermediate_size": width,
        "projection_dim": width,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    silent: nn.Module = type(encoder.clip)(type(encoder.clip.config)(**config))
    for weight in silent.parameters():
        nn.init.zeros_(weight)
    _write_transformer(folder, "CLIPTextModelWithProjection", silent, silent.state_dict())


def write_tokenizer(folder: Path, encoder: ClipText) -> None:
    """The tokenizer as transformers writes it."""
    with disk_faults(folder):
        encoder.tokenizer().save_pretrained(folder)


def _write_transformer(folder: Path, name: str, network: Any, tensors: Mapping[str, Tensor]) -> None:
    write_json(folder / "config.json", json.loads(network.config.to_json_string()) | {"architectures": [name]})
    write_tensors(folder / "model.safetensors", tensors)
