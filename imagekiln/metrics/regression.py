"""Pixel errors of predicted pictures against targets: MSE, RMSE, MAE, PSNR and R2, gathered batch by batch in float64.

With p a prediction and t its target in [-1, 1], all means over pictures, channels and pixels:

MSE = mean (p - t)^2        RMSE = sqrt(MSE)        MAE = mean |p - t|        PSNR = 10 log10(2^2 / MSE) in dB
R2  = mean over channels c of 1 - sum (p - t)_c^2 / sum (t - m)_c^2,   m the mean picture of the targets

R2 is 1 for exact predictions, 0 for predicting the mean picture every time, and may be negative. A channel in which no
pixel varies over the pictures (opaque alpha) has no R2 and is left out of that mean.

Shapes: B pictures, C channels, H rows, W columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from imagekiln.errors import DataError

PEAK = 2.0
"""Width of the range [-1, 1]."""

CONSTANT = 1e-20
"""Mean squared deviation below which float64 sums cannot tell a channel from a constant one."""


class Regression:
    """Errors over any number of batches.

    >>> targets = torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1)
    >>> regression = Regression().update(targets / 2, targets)
    >>> regression.scores()["mse"], regression.scores()["r2"]
    (0.25, 0.75)
    """

    def __init__(self) -> None:
        self.n = 0
        self._squared_C = self._absolute_C = torch.zeros(())
        self._mean_CHW = self._scatter_CHW = torch.zeros(())
        self._pixels = 0

    def update(self, predictions_BCHW: Tensor, targets_BCHW: Tensor) -> Regression:
        """Add pictures, any float dtype, in [-1, 1]; returns itself.

        Raises DataError for shapes that differ, an empty batch, or NaN or infinity.
        """
        shape = tuple(targets_BCHW.shape)
        known = tuple(self._mean_CHW.shape) if self.n else shape[1:]
        if tuple(predictions_BCHW.shape) != shape or len(shape) != 4 or not shape[0] or shape[1:] != known:
            raise DataError(
                f"Regression got predictions {tuple(predictions_BCHW.shape)} and targets {shape}; it needs the same "
                "(pictures, channels, height, width) for both in every update."
            )
        targets, predictions = (x.detach().cpu().double() for x in (targets_BCHW, predictions_BCHW))
        error = predictions - targets
        if not torch.isfinite(error).all():
            raise DataError("Regression got NaN or infinite pixels; look at the pictures, the model may have diverged.")
        mean_CHW = targets.mean(0)
        total, shift_CHW = self.n + shape[0], mean_CHW - self._mean_CHW  # Chan et al. 1983: merge of two means
        self._scatter_CHW = (
            self._scatter_CHW + (targets - mean_CHW).square().sum(0) + shift_CHW.square() * (self.n * shape[0] / total)
        )
        self._mean_CHW = self._mean_CHW + shift_CHW * (shape[0] / total)
        self._squared_C = self._squared_C + error.square().sum((0, 2, 3))
        self._absolute_C = self._absolute_C + error.abs().sum((0, 2, 3))
        self._pixels += error.numel()
        self.n = total
        return self

    @property
    def mse(self) -> float:
        """Mean squared error, in [0, 4]."""
        return self._mean_of(self._squared_C)

    @property
    def rmse(self) -> float:
        """Root of the mean squared error, in [0, 2]."""
        return math.sqrt(self.mse)

    @property
    def mae(self) -> float:
        """Mean absolute error, in [0, 2]."""
        return self._mean_of(self._absolute_C)

    @property
    def psnr(self) -> float:
        """Peak signal-to-noise ratio of all pixels pooled, in dB; infinite for exact predictions."""
        return 10.0 * math.log10(PEAK**2 / self.mse) if self.mse > 0.0 else math.inf

    @property
    def r2(self) -> float:
        """Explained share of the variance around the mean picture; DataError when the targets do not vary."""
        self._mean_of(self._squared_C)
        total_C = self._scatter_CHW.sum((1, 2))
        varies_C = total_C > CONSTANT * self._pixels / len(total_C)
        if not varies_C.any():
            raise DataError(f"The {self.n} target pictures are all the same; R2 needs targets that differ.")
        return float((1.0 - self._squared_C[varies_C] / total_C[varies_C]).mean())

    def scores(self) -> dict[str, float]:
        """All five by name. Raises DataError without pictures or where `r2` does."""
        return {name: getattr(self, name) for name in ("mse", "rmse", "mae", "psnr", "r2")}

    def _mean_of(self, sum_C: Tensor) -> float:
        if not self.n:
            raise DataError("Regression has no pictures yet; call update(predictions, targets) first.")
        return float(sum_C.sum()) / self._pixels
