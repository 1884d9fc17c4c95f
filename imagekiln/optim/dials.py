"""How much noise: four dials that say the same, and how to turn one into another.

    diffusion      D, in units of the mean loss L: the law is exp(-L / D)
    temperature    T = D N, of the posterior of N examples (Wenzel et al. 2020); 1 is Bayes
    loss_budget    D d / 2: what d weights cost at equilibrium when the loss holds each of them, in units of L; those it
                   does not hold (yet) cost nothing, so it is the most that the noise can cost near a minimum
    noise_ratio    variance of the noise over that of the minibatch gradient, both summed over the weights and both
                   where the gradient enters:  D sum_i 2 (1 - mu) / (eta P_i) / gradient_variance

gradient_variance is the trace of the covariance of the minibatch gradient of L; `gradient_variance` measures it. With a
noise_ratio of 1 the noise doubles the heat that minibatches make by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imagekiln.errors import UsageError


@dataclass(frozen=True)
class Dials:
    """The four dials of one optimizer at one step; None where what it takes to know it was not given.

    num_params: weights that get noise. num_data, gradient_variance: as given to `langevin`.
    """

    diffusion: float
    temperature: float | None
    noise_ratio: float | None
    loss_budget: float
    num_params: int

    def __str__(self) -> str:
        temperature = "unknown without num_data" if self.temperature is None else f"{self.temperature:.4g}"
        ratio = "unknown without gradient_variance" if self.noise_ratio is None else f"{self.noise_ratio:.4g}"
        return (
            f"diffusion {self.diffusion:.4g}, temperature {temperature}, noise ratio {ratio}, loss budget at most "
            f"{self.loss_budget:.4g} over {self.num_params:,} weights"
        )


def not_negative(name: str, value: Any) -> float:
    """The number, or `UsageError` with its name when it is negative, infinite or none at all."""
    number = float(value)
    if not (number >= 0 and math.isfinite(number)):
        raise UsageError(f"{name} is {number}; expected a finite number that is not negative.")
    return number


def check_num_data(num_data: int | None) -> None:
    """`UsageError` for a number of examples below 1."""
    if num_data is not None and not num_data >= 1:
        raise UsageError(f"num_data is {num_data}; it is the number of training examples, at least 1.")


def to_diffusion(diffusion: float | None, temperature: float | None, num_data: int | None) -> float:
    """D from `diffusion`, or from `temperature` and `num_data`; `UsageError` for anything else.

    >>> to_diffusion(None, 0.5, 50_000)
    1e-05
    """
    if (diffusion is None) == (temperature is None):
        raise UsageError("Give either diffusion, or temperature and num_data.")
    check_num_data(num_data)
    if temperature is None:
        return not_negative("The diffusion", diffusion)
    if num_data is None:
        raise UsageError("A temperature needs num_data, the number of training examples: D = temperature / num_data.")
    return not_negative("The temperature", temperature) / num_data


def budget_to_diffusion(loss_budget: float, num_params: int) -> float:
    """D = 2 loss_budget / num_params, from the equipartition of D / 2 to each weight that the loss holds.

    >>> budget_to_diffusion(0.1, 20_000)
    1e-05
    """
    if num_params < 1:
        raise UsageError("A loss_budget is spread over the weights that get noise, and here there are none.")
    return 2 * not_negative("The loss_budget", loss_budget) / num_params


def ratio_to_diffusion(noise_ratio: float, gradient_variance: float | None, heat: float | None) -> float:
    """D of a noise_ratio. heat: summed variance of the noise of D = 1 where the gradient enters, or None if unknown.

    >>> ratio_to_diffusion(1.0, gradient_variance=0.5, heat=2e6)
    2.5e-07
    """
    value = not_negative("The noise_ratio", noise_ratio)
    if gradient_variance is None:
        raise UsageError(
            "A noise_ratio needs gradient_variance, the summed variance of the minibatch gradient: measure it with "
            "imagekiln.optim.dials.gradient_variance."
        )
    if heat is None:
        raise UsageError(
            "A noise_ratio for Adam or RMSprop needs their second moments: take a few steps first, or give loss_budget."
        )
    return value * not_negative("The gradient_variance", gradient_variance) / heat if heat else 0.0


def gradient_variance(gradients: Sequence[Iterable[Tensor | None]]) -> float:
    """Trace of the covariance of the minibatch gradient, from the gradients of at least two minibatches of one size.

    gradients: for each minibatch the gradients of all parameters, None where there is none, at the same weights.
    Unbiased (n - 1 in the denominator). Raises `UsageError` for fewer than two.

    >>> gradient_variance([[torch.tensor([1.0, 0.0])], [torch.tensor([-1.0, 0.0])]])
    2.0
    """
    if len(gradients) < 2:
        raise UsageError(f"{len(gradients)} minibatches tell nothing about their variance: give at least two.")
    total = 0.0
    for parts in zip(*(list(each) for each in gradients), strict=True):
        known = [part.detach().double() for part in parts if part is not None]
        if len(known) == len(parts):
            total += float(torch.stack(known).var(0).sum())
    return total
