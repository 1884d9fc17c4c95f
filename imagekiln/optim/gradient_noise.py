"""Annealed noise in the gradient, the recipe of Neelakantan et al. 2015, which is not a temperature.

    g <- g + N(0, eta / (1 + t)^gamma)        eta of 0.01, 0.3 or 1, gamma = 0.55

"Adding gradient noise improves learning for very deep networks", equation 1; t counts steps. It helps where a network
starts badly. Under plain SGD of rate lr it is a diffusion D = lr eta / (2 (1 + t)^gamma) that falls with time, under
momentum that over 1 - mu; under Adam the noise also enters the second moments and lowers the rates, so there is no D.
Clip gradients before this adds to them: an optimizer's hooks run after the clipping of a training loop.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from imagekiln.errors import UsageError
from imagekiln.optim.dials import not_negative
from imagekiln.optim.langevin import check_gradient, has_closure, named
from imagekiln.optim.noise import Addition, Stream, add


def gradient_noise(optimizer: Optimizer, *, eta: float = 0.3, gamma: float = 0.55, seed: int = 0) -> Optimizer:
    """Add the noise to the gradients of every step of any optimizer. Returns the same optimizer.

    eta: variance of the noise in the first step, >= 0; 0 changes nothing. gamma: how fast it falls, >= 0. seed: of the
    noise. The number of steps stands in `param_groups` as "gradient_noise_step", so a continued training repeats bit
    for bit. Raises `UsageError` for wrong numbers, sparse gradients, a second call, and steps with a closure, which
    makes its gradients where nothing can be added to them.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> optimizer = gradient_noise(torch.optim.SGD([weight], lr=1.0), eta=0.01)
    >>> weight.grad = torch.zeros(2)
    >>> optimizer.step()
    >>> bool((weight != 0).all())
    True
    """
    not_negative("eta", eta)
    not_negative("gamma", gamma)
    if any("gradient_noise_step" in group for group in optimizer.param_groups):
        raise UsageError("This optimizer has gradient noise already.")
    optimizer.defaults["gradient_noise_step"] = 0
    for group in optimizer.param_groups:
        group["gradient_noise_step"] = 0

    @torch.no_grad()
    def before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if has_closure(args, kwargs):
            raise UsageError("Gradient noise cannot enter a step with a closure: call backward before step().")
        additions = []
        for group, parameter, key in named(optimizer):
            check_gradient(parameter)
            if parameter.grad is not None and eta:
                step = group["gradient_noise_step"]
                stream = Stream(seed, step, f"{key} gradient")
                additions.append(Addition(parameter.grad, stream, (eta / (1 + step) ** gamma) ** 0.5))
        add(additions)
        for group in optimizer.param_groups:
            group["gradient_noise_step"] += 1

    optimizer.register_step_pre_hook(before)
    return optimizer
