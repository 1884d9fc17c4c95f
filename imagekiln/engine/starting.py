"""Drawing that begins with a given picture instead of noise alone, and keeps parts of it where a mask says so.

A picture noised to a part of the way is drawn again from there (SDEdit, Meng et al. 2022, arXiv:2108.01073):
`strength` is the share of the steps that are taken. Where a mask is black the picture stays: in every step what the
network expects there is replaced by the picture itself, and at last its pixels are put back.

Shapes: B pictures, C channels, H rows, W columns, of pictures; h, w of what a family draws.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from imagekiln.config import Fit
from imagekiln.core import Condition
from imagekiln.data import to_float
from imagekiln.engine import pictures
from imagekiln.engine.models import Model
from imagekiln.errors import UsageError


class Start(NamedTuple):
    """Where drawing begins.

    picture_1CHW: float32 in [-1, 1]. begins_1Chw: the same as the family draws it. keep_11HW: 1.0 where the picture
    stays, 0.0 where it is drawn anew.
    """

    picture_1CHW: Tensor
    begins_1Chw: Tensor
    keep_11HW: Tensor

    def condition(self, condition: Condition, count: int) -> Condition:
        """The condition of so many pictures, with this beginning."""
        whole = -F.adaptive_max_pool2d(-self.keep_11HW, self.begins_1Chw.shape[-2:])  # what is kept to its last pixel
        return condition._replace(
            start=self.begins_1Chw.expand(count, -1, -1, -1), keep=whole.expand(count, -1, -1, -1)
        )

    def restored(self, images_BCHW: Tensor) -> Tensor:
        """Drawn pictures with the kept pixels put back."""
        return torch.where(self.keep_11HW.bool(), self.picture_1CHW, images_BCHW)


def begun(model: Model, picture: str | Path | None, mask: str | Path | None, options: Any) -> Start | None:
    """The beginning that these files describe; None without a picture.

    mask: a picture of the same size as `picture` or of the same shape; white is drawn anew, black stays.

    Raises:
        UsageError: the family draws from noise alone, or there is a mask or a strength and no picture.
        DataError: a file is no picture.
    """
    strength = getattr(options, "strength", None)
    if picture is None:
        if mask is not None or strength not in (None, 1.0):
            raise UsageError("--mask and --strength say what happens to a given picture. Give one with --start.")
        return None
    if strength is None:
        raise UsageError(
            f"--start: a {model.family.config.name} model draws from noise alone. Models of diffusion can begin with a "
            "picture; project finds the noise of a picture for others."
        )
    family, channels = model.family, model.family.picture_shape[0]
    image_1CHW = _read(Path(picture), model, channels, model.recipe.data.background)
    with torch.inference_mode():
        begins = image_1CHW if family.codec is None else family.codec.encode(image_1CHW)
    keep = torch.zeros_like(image_1CHW[:, :1])
    if mask is not None:
        keep = (_read(Path(mask), model, 1, "black") <= 0).float()
    where = model.device
    return Start(image_1CHW.to(where), begins.to(where), keep.to(where))


def _read(path: Path, model: Model, channels: int, background: str) -> Tensor:
    """images_1CHW float32 in [-1, 1] at the model's size, picture and mask cut or padded alike."""
    how: Fit = "pad" if model.recipe.data.fit == "pad" else "crop"  # a smart crop would cut each by its own edges
    return to_float(pictures.read(path, (channels, *model.family.picture_shape[1:]), how, background)[None])
