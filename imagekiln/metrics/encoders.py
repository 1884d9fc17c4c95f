"""Feature networks of transformers: DINOv2 and CLIP, from a local folder or a pinned revision of the hub.

    DINOv2   the class token after the last normalization (M. Oquab et al., arXiv:2304.07193), which FD-DINOv2 is
             computed on (J. Stein et al., arXiv:2306.04675)
    CLIP     the projected picture embedding, of length 1 (A. Radford et al., arXiv:2103.00020), which CMMD is computed
             on (S. Jayasumana et al., arXiv:2401.09603); its cosine with a text embedding is how well they agree

Both see pictures resized by Pillow's antialiased bicubic in float32 and normalized by the published mean and deviation.
The package `transformers` is needed (`pip install 'imagekiln[sd]'`). Only safetensors are read, no code of a model.

Shapes: B images or texts, C channels, H rows, W columns, D features.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from imagekiln.errors import DataError, UsageError
from imagekiln.metrics.features import weights_hash
from imagekiln.metrics.resize import resize

FILTER = "pil-bicubic"
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of red, green and blue in 0..1 that the networks were trained with."""
DINOV2_SIDE = 224


class Dinov2(nn.Module):
    """DINOv2's class token: a `FeatureNetwork` for three-channel pictures of any size.

    source: a folder with `config.json` and safetensors, or `NAME@REVISION` of the hub with the full commit hash.
    side: pixels pictures are resized to; 224 is what published numbers use.

    Raises UsageError without `transformers` or for a hub name without a revision, DataError when nothing can be read.
    """

    def __init__(self, source: str | Path, side: int = DINOV2_SIDE) -> None:
        super().__init__()
        self.model = _open("Dinov2Model", source)
        self.side, self.num_features = side, self.model.config.hidden_size
        self.name = f"dinov2-{_title(source)}"
        self.eval().requires_grad_(False)

    @property
    def hash(self) -> str:
        """sha256 of the weights and of what is done to pictures before them."""
        return _hash(self.model, self.side, IMAGENET)

    def features(self, images_BCHW: Tensor) -> Tensor:
        """features_BD float32 of images_BCHW float32 in [-1, 1]."""
        pixels = _normalized(images_BCHW, self.side, IMAGENET)
        return self.model(pixel_values=pixels).last_hidden_state[:, 0].float()

    forward = features


class Clip(nn.Module):
    """CLIP's picture embedding of length 1, and its agreement with text: a `FeatureNetwork` for three channels.

    source: as for `Dinov2`. The text side is read when it is first needed.
    """

    def __init__(self, source: str | Path) -> None:
        super().__init__()
        self.source = str(source)
        self.model = _open("CLIPVisionModelWithProjection", source)
        self.side, self.num_features = self.model.config.image_size, self.model.config.projection_dim
        self.name = f"clip-{_title(source)}"
        self._text: tuple[Any, Any] | None = None
        self.eval().requires_grad_(False)

    @property
    def hash(self) -> str:
        """sha256 of the picture side's weights and of what is done to pictures before them."""
        return _hash(self.model, self.side, CLIP)

    def features(self, images_BCHW: Tensor) -> Tensor:
        """features_BD float32 of length 1, of images_BCHW float32 in [-1, 1]."""
        pixels = _normalized(images_BCHW, self.side, CLIP)
        return functional.normalize(self.model(pixel_values=pixels).image_embeds.float(), dim=1)

    forward = features

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """features_BD float32 of length 1; texts longer than the model's context are cut."""
        if self._text is None:
            model = _open("CLIPTextModelWithProjection", self.source)
            self._text = _open("CLIPTokenizer", self.source), model.eval().requires_grad_(False)
        tokenizer, model = self._text
        device = next(self.model.parameters()).device
        length = model.config.max_position_embeddings
        tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        found = model.to(device)(input_ids=tokens.input_ids.to(device), attention_mask=tokens.attention_mask.to(device))
        return functional.normalize(found.text_embeds.float(), dim=1)

    def agreement(self, images_BCHW: Tensor, texts: Sequence[str]) -> Tensor:
        """cosine_B in [-1, 1] of each picture with its own text. Raises DataError when the numbers of them differ."""
        if len(images_BCHW) != len(texts):
            raise DataError(f"There are {len(images_BCHW)} pictures and {len(texts)} texts; give one text a picture.")
        with torch.inference_mode():
            return (self.features(images_BCHW) * self.text_features(texts)).sum(1)


def _normalized(images_BCHW: Tensor, side: int, scale: tuple[Sequence[float], Sequence[float]]) -> Tensor:
    if images_BCHW.ndim != 4 or images_BCHW.shape[1] != 3:
        raise DataError(
            f"The encoder got pictures of shape {tuple(images_BCHW.shape)}; it needs (pictures, 3, height, width): "
            "repeat grey pictures three times."
        )
    pixels = ((images_BCHW.float() + 1) * 127.5).clamp(0, 255)
    mean, deviation = (torch.tensor(numbers, device=pixels.device).view(3, 1, 1) for numbers in scale)
    return (resize(pixels, side, FILTER) / 255 - mean) / deviation


def _open(kind: str, source: str | Path) -> Any:
    """A model or tokenizer of transformers, float32, from a folder or a pinned revision of the hub."""
    transformers = _transformers()
    name, options = _located(source)
    try:
        if kind == "CLIPTokenizer":
            return transformers.CLIPTokenizer.from_pretrained(name, **options)
        options |= {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
        model, found = getattr(transformers, kind).from_pretrained(name, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise DataError(
            f"{source} cannot be read as {kind} ({reason}). Give a folder with config.json and model.safetensors."
        ) from None
    random = [str(key) for part in ("missing_keys", "mismatched_keys") for key in found[part]]
    if random:  # transformers fills them with random numbers and goes on
        raise DataError(
            f"{source} does not fit {kind}: {len(random)} tensors are missing or of another shape, such as {random[0]}."
        )
    return model


def _located(source: str | Path) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` is called with. A hub name without a revision may be another model tomorrow."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return str(folder), {"local_files_only": True}
    name, at, revision = str(source).partition("@")
    pinned = at and len(revision) == 40 and not set(revision) - set("0123456789abcdef")
    if not pinned:
        raise UsageError(
            f"{source} is no folder and names no revision. Give a folder with config.json and model.safetensors, or "
            "NAME@REVISION of the hub with the full commit hash (40 hex digits)."
        )
    return name, {"revision": revision}


def _transformers() -> ModuleType:
    try:
        return importlib.import_module("transformers")  # late: it is an extra, and takes a second to load
    except ImportError as error:
        raise UsageError(
            f"Features of DINOv2 and CLIP need the package transformers ({error}): pip install 'imagekiln[sd]'."
        ) from None


def _hash(model: nn.Module, side: int, scale: tuple[Sequence[float], Sequence[float]]) -> str:
    return hashlib.sha256(f"{weights_hash(model)}:{side}:{FILTER}:{scale}".encode()).hexdigest()


def _title(source: str | Path) -> str:
    """The last part of a folder or hub name: where a folder lies does not belong into a result."""
    return Path(str(source).partition("@")[0]).name
