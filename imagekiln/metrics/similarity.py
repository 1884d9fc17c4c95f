"""Structural similarity of predicted pictures with targets: SSIM and MS-SSIM, one number a picture.

With mu, s^2 and s_pt weighted by a Gaussian window of 11 x 11 pixels and standard deviation 1.5 around each pixel,

l = (2 mu_p mu_t + C1) / (mu_p^2 + mu_t^2 + C1)      cs = (2 s_pt + C2) / (s_p^2 + s_t^2 + C2)
SSIM = mean l cs                                     MS-SSIM = (mean l cs)_M^w_M  prod_{j<M} (mean cs)_j^w_j

(Wang et al. 2004; Wang, Simoncelli & Bovik 2003.) C1 = 0.01^2, C2 = 0.03^2 for pixels in [0, 1]: pictures in [-1, 1]
are brought there first, for SSIM changes with an offset. Only windows that lie inside the picture count. Scale j + 1 is
the 2 x 2 mean of scale j. Five scales need sides of 176 pixels; smaller pictures use as many scales as hold a window,
their weights normalised to sum 1, so only pictures of one size compare. A negative factor counts as 0.

Shapes: B pictures, C channels, H rows, W columns.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from imagekiln.errors import DataError

WINDOW = 11
SIGMA = 1.5
C1 = 0.01**2
C2 = 0.03**2
WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


class Similarity:
    """SSIM and MS-SSIM over any number of batches.

    >>> pictures = torch.rand(2, 3, 22, 22, generator=torch.Generator().manual_seed(0)) * 2 - 1
    >>> similarity = Similarity().update(pictures, pictures)
    >>> similarity.scores(), similarity.num_scales
    ({'ssim': 1.0, 'ms_ssim': 1.0}, 2)
    """

    def __init__(self) -> None:
        self.num_scales = 0
        self._ssim: list[Tensor] = []
        self._ms_ssim: list[Tensor] = []
        self._shape: tuple[int, ...] = ()

    def update(self, predictions_BCHW: Tensor, targets_BCHW: Tensor) -> Similarity:
        """Add pictures, any float dtype, in [-1, 1]; returns itself.

        Raises DataError for shapes that differ, an empty batch, sides under 11 pixels, or NaN or infinity.
        """
        shape = tuple(targets_BCHW.shape)
        known = self._shape or shape[1:]
        if tuple(predictions_BCHW.shape) != shape or len(shape) != 4 or not shape[0] or shape[1:] != known:
            raise DataError(
                f"Similarity got predictions {tuple(predictions_BCHW.shape)} and targets {shape}; it needs the same "
                "(pictures, channels, height, width) for both in every update."
            )
        if min(shape[2:]) < WINDOW:
            raise DataError(
                f"Similarity got pictures of {shape[2]} x {shape[3]} pixels; its window needs sides of at least "
                f"{WINDOW}: compare larger pictures, or by pixel errors."
            )
        ssim_B, ms_ssim_B = similarities(predictions_BCHW, targets_BCHW)
        self._shape = shape[1:]
        self.num_scales = num_scales(*shape[2:])
        self._ssim.append(ssim_B)
        self._ms_ssim.append(ms_ssim_B)
        return self

    @property
    def n(self) -> int:
        """Number of pictures."""
        return sum(len(values_B) for values_B in self._ssim)

    @property
    def ssim_by_picture(self) -> Tensor:
        """SSIM of every picture, float64, in [-1, 1], in the order they came. Raises DataError without pictures."""
        return self._all(self._ssim)

    @property
    def ms_ssim_by_picture(self) -> Tensor:
        """MS-SSIM of every picture, float64, in [0, 1], in the order they came. Raises DataError without pictures."""
        return self._all(self._ms_ssim)

    def scores(self) -> dict[str, float]:
        """Means over the pictures. Raises DataError without pictures."""
        return {"ssim": float(self.ssim_by_picture.mean()), "ms_ssim": float(self.ms_ssim_by_picture.mean())}

    @staticmethod
    def _all(values: list[Tensor]) -> Tensor:
        if not values:
            raise DataError("Similarity has no pictures yet; call update(predictions, targets) first.")
        return torch.cat(values)


def num_scales(height: int, width: int) -> int:
    """How many scales hold a window, at most five.

    >>> num_scales(32, 32), num_scales(176, 200)
    (2, 5)
    """
    return sum(min(height, width) >> j >= WINDOW for j in range(len(WEIGHTS)))


def similarities(predictions_BCHW: Tensor, targets_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """(ssim_B, ms_ssim_B) float64 of pictures in [-1, 1] whose sides have 11 pixels or more.

    Raises DataError for NaN or infinity.
    """
    p, t = (0.5 * (x.detach().cpu().double() + 1.0) for x in (predictions_BCHW, targets_BCHW))
    if not torch.isfinite(p - t).all():
        raise DataError("Similarity got NaN or infinite pixels; look at the pictures, the model may have diverged.")
    scales = num_scales(*p.shape[2:])
    weights = torch.tensor(WEIGHTS[:scales], dtype=torch.float64)
    ms_ssim_B = ssim_B = torch.ones(len(p), dtype=torch.float64)
    if scales < len(WEIGHTS):
        weights = weights / weights.sum()  # all five sum to 1.0001, as published
    for scale, weight in enumerate(weights):
        full_B, contrast_B = _one_scale(p, t)
        ssim_B = ssim_B if scale else full_B
        factor_B = full_B if scale == scales - 1 else contrast_B
        ms_ssim_B = ms_ssim_B * factor_B.clamp(min=0.0).pow(weight)
        p, t = functional.avg_pool2d(p, 2), functional.avg_pool2d(t, 2)
    return ssim_B, ms_ssim_B


def _one_scale(p_BCHW: Tensor, t_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Means over channels and pixels of (l cs, cs)."""
    down, across = (_filter_matrix(side) for side in p_BCHW.shape[2:])
    moments = torch.stack([p_BCHW, t_BCHW, p_BCHW.square(), t_BCHW.square(), p_BCHW * t_BCHW])
    mu_p, mu_t, pp, tt, pt = down @ moments @ across.T
    contrast = (2.0 * (pt - mu_p * mu_t) + C2) / (pp - mu_p.square() + tt - mu_t.square() + C2)
    luminance = (2.0 * mu_p * mu_t + C1) / (mu_p.square() + mu_t.square() + C1)
    return (luminance * contrast).mean((1, 2, 3)), contrast.mean((1, 2, 3))


def _filter_matrix(side: int) -> Tensor:
    """(side - 10, side) float64: row i holds the window at i. Two matrix products filter all pictures."""
    offset = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    line = (-0.5 * (offset / SIGMA).square()).exp()
    rows = torch.zeros(side - WINDOW + 1, side, dtype=torch.float64)
    position = torch.arange(len(rows))[:, None] + torch.arange(WINDOW)
    return rows.scatter_(1, position, (line / line.sum()).expand(len(rows), -1))
