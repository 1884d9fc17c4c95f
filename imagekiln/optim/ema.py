"""Moving averages of weights: power-function (EDM2) and exponential.

The power function (Karras et al. 2024, "Analyzing and improving the training dynamics of diffusion models", section 3)
weighs the weights of time tau at time t by tau^gamma: its width is a fixed share of the run so far, it forgets the
initial weights at once, and it needs no ramp-up. Time is images seen, so the average does not depend on batch size.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache

import numpy as np
import torch
from torch import Tensor

from imagekiln.config import AverageConfig
from imagekiln.errors import CheckpointError

RAMPUP = 0.05
"""An exponential average is never longer than this share of the run so far (EDM's `ema_rampup_ratio`)."""


@cache
def power_gamma(sigma_rel: float) -> float:
    """The exponent of the power function whose relative standard deviation is sigma_rel (EDM2, algorithm 2).

    The largest real root of sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)); 0 < sigma_rel < 1 / sqrt(12).

    >>> round(power_gamma(0.10), 2)
    6.94
    """
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def power_width(gamma: float) -> float:
    """The inverse of `power_gamma`: standard deviation of the weighting, relative to the run so far."""
    return ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5


def decay(config: AverageConfig, nimg: int, batch: int) -> float:
    """The share the old average keeps in an update, in [0, 1).

    nimg: images seen, this update's `batch` images included. Power: (1 - 1/t)^(gamma + 1) with t = nimg / batch (EDM2,
    equation 3). Exponential: 2^(-batch / half-life), the half-life ramped up with the run.
    """
    if config.kind == "power":
        return max(0.0, 1 - batch / max(nimg, 1)) ** (power_gamma(config.sigma_rel) + 1)
    halflife_nimg = min(config.halflife_kimg * 1000, nimg * RAMPUP)
    return 0.5 ** (batch / halflife_nimg) if halflife_nimg > 0 else 0.0


class Average:
    """One moving average of named tensors. Its whole state is the averaged tensors.

    tensors: the weights to follow, any shapes and devices; averages of floating point numbers are kept in float32 at
        least. The average starts as a copy.
    copied: names that are copied instead of averaged: buffers. Integers are always copied.

    >>> weights = {"w": torch.zeros(2)}
    >>> average = Average(AverageConfig(), weights)
    >>> average.update({"w": torch.ones(2)}, nimg=64, batch=64)
    >>> average.state_dict()["w"].tolist()
    [1.0, 1.0]
    """

    def __init__(self, config: AverageConfig, tensors: Mapping[str, Tensor], copied: Collection[str] = ()) -> None:
        self.config = config
        self._tensors = {name: _start(tensor) for name, tensor in tensors.items()}
        self._averaged = [n for n, t in self._tensors.items() if t.is_floating_point() and n not in set(copied)]
        self._copied = [name for name in self._tensors if name not in set(self._averaged)]

    @torch.no_grad()
    def update(self, tensors: Mapping[str, Tensor], nimg: int, batch: int) -> None:
        """Take in the weights after a step on `batch` images, `nimg` images into the run (these included)."""
        for names, weight in ((self._averaged, 1 - decay(self.config, nimg, batch)), (self._copied, 1.0)):
            ours = [self._tensors[name] for name in names]
            theirs = [tensors[name].detach() for name in names]
            if ours and weight == 1.0:
                torch._foreach_copy_(ours, theirs)
            elif ours:
                theirs = [new.to(old) for new, old in zip(theirs, ours, strict=True)]
                torch._foreach_lerp_(ours, theirs, weight)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged tensors by name: the live ones, not copies."""
        return dict(self._tensors)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict()`; `CheckpointError` when names or shapes are not those this average follows."""
        strange = set(state) ^ set(self._tensors)
        strange |= {name for name in set(state) & set(self._tensors) if state[name].shape != self._tensors[name].shape}
        if strange:
            some = ", ".join(sorted(strange)[:3])
            raise CheckpointError(
                f"The saved average {self.config.name} does not fit this model: {len(strange)} tensors differ in name "
                f"or shape ({some}). Use the recipe the run was made with."
            )
        for name, tensor in self._tensors.items():
            tensor.copy_(state[name])


def _start(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().clone()
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
