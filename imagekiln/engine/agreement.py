"""What runs have in common: the recipe they were trained by, and pictures drawn from one seed.

Pictures x_i, y_i that two models draw from one seed belong together, hence the kernel distance

KD = mean_{i != j} h_ij,   h_ij = k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i)

leaves out i = j everywhere (Gretton et al. 2012, eq. 4). If both models draw alike, x_i and y_i may change places,
which turns the sign of a row and a column of h: the 95 % quantile of mean_{i != j} s_i s_j h_ij over random signs s is
what KD stays below then.

Shapes: N pictures of one run, M pictures of a preview, D features, S draws of signs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imagekiln.config import Recipe
from imagekiln.core import mix
from imagekiln.engine import pictures
from imagekiln.engine.generate import labels_for
from imagekiln.engine.previews import PREVIEW_IMAGES
from imagekiln.errors import UsageError

SIGNS = 1000

APART = {"data.path", "data.validation_fraction", "train.seed", "train.device", "train.tensorboard", "train.compile"}
APART |= {"train.checkpoint_kimg", "train.preview_kimg", "train.validate_kimg", "train.prompts", "train.keep"}
"""Settings that do not make two recipes different: which pictures and which luck, and what only watches."""

MUST_AGREE = ("family.name", "data.size", "data.channels")


def differences(settings: Sequence[Recipe], names: Sequence[str]) -> list[tuple[str, ...]]:
    """For every run, its settings that are not those of the recipe most runs share (of the first one in a tie).

    Raises:
        UsageError: families or sizes of pictures differ, so that nothing can be compared.
    """
    flat = [_flat(recipe.model_dump(mode="json", exclude={"eval"})) for recipe in settings]
    for key in MUST_AGREE:
        for name, own in zip(names, flat, strict=True):
            if own[key] != flat[0][key]:
                raise UsageError(
                    f"{names[0]} has {key} = {flat[0][key]!r} and {name} has {own[key]!r}; stability compares runs of "
                    "one recipe. Leave one of them out, or use `imagekiln compare`."
                )
    kept = [{key: value for key, value in own.items() if key not in APART} for own in flat]
    usual = max(kept, key=lambda own: (kept.count(own), -kept.index(own)))
    found = []
    for own in kept:
        keys = sorted({*own, *usual})
        other = [key for key in keys if own.get(key) != usual.get(key)]
        found.append(tuple(f"{key} = {own.get(key)} instead of {usual.get(key)}" for key in other))
    return found


def _flat(values: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {key: values}
    return {k: v for name, item in values.items() for k, v in _flat(item, f"{key}.{name}" if key else name).items()}


def tiles(sheet: np.ndarray, image_shape: tuple[int, ...], num_classes: int) -> Tensor | None:
    """Pictures of a preview sheet, uint8 (M, C, H, W), the inverse of `pictures.grid`; None where it is another layout.

    >>> images = torch.arange(40 * 16).remainder(251).to(torch.uint8).view(40, 1, 4, 4)
    >>> sheet = np.array(pictures.grid(images, pictures.columns_for(40, 10)))
    >>> bool((tiles(sheet, (1, 4, 4), 10) == images).all())
    True
    """
    channels, height, width = image_shape
    count = len(labels_for(PREVIEW_IMAGES, num_classes))
    columns = pictures.columns_for(count, num_classes)
    rows = math.ceil(count / columns)
    size = rows * (height + 1) - 1, columns * (width + 1) - 1
    zoom = sheet.shape[0] // size[0]
    if zoom < 1 or sheet.shape[:2] != (size[0] * zoom, size[1] * zoom):
        return None
    small = sheet[::zoom, ::zoom].reshape(*size, -1)
    if small.shape[2] != channels:
        return None
    padded = np.zeros((size[0] + 1, size[1] + 1, channels), dtype=np.uint8)
    padded[:-1, :-1] = small
    cut = padded.reshape(rows, height + 1, columns, width + 1, channels)[:, :height, :, :width]
    return torch.from_numpy(cut.transpose(0, 2, 4, 1, 3).reshape(-1, channels, height, width)[:count].copy())


def same_seed_distance(a_ND: Tensor, b_ND: Tensor) -> float:
    """Root mean square distance of rows that belong together."""
    return float((a_ND.double() - b_ND.double()).square().sum(1).mean().sqrt())


def unrelated_distance(a_ND: Tensor) -> float:
    """Root mean square distance of two different rows: sqrt(2 tr cov).

    >>> unrelated_distance(torch.tensor([[0.0], [3.0]]))
    3.0
    """
    return max(1e-12, math.sqrt(2 * float(a_ND.double().var(0).sum())))


def paired_distance(x_ND: Tensor, y_ND: Tensor, seed: int = 0) -> tuple[float, float]:
    """(kernel distance, its 95 % quantile if both sets came from one model) of pictures that belong together.

    >>> rows = torch.randn(2, 30, 3, generator=torch.Generator().manual_seed(0))
    >>> distance, same = paired_distance(rows[0], rows[1]); distance < same
    True
    """
    x, y = x_ND.double(), y_ND.double()
    kernel = [(a @ b.T / x.shape[1] + 1).pow(3) for a, b in ((x, x), (y, y), (x, y))]
    h_NN = kernel[0] + kernel[1] - kernel[2] - kernel[2].T
    h_NN.fill_diagonal_(0.0)
    num = len(x) * (len(x) - 1)
    generator = torch.Generator().manual_seed(mix(seed, "signs"))
    signs_SN = torch.randint(0, 2, (SIGNS, len(x)), generator=generator).double() * 2 - 1
    null_S = ((signs_SN @ h_NN) * signs_SN).sum(1) / num
    return float(h_NN.sum()) / num, float(null_S.quantile(0.95))
