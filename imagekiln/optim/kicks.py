"""Where a step's noise enters a stock optimizer, and how much of it: the table of `imagekiln.optim.langevin`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer, RMSprop

Group = dict[str, Any]
State = dict[str, Any]


@dataclass(frozen=True)
class Kick:
    """Where a step's noise goes, and its variance for a diffusion of 1.

    The variance of element i is `variance` alone, or times weight_i^2, or with adam = (correction, eps) times
    sqrt(weight_i * correction) + eps, which is 1 / P_i.
    """

    target: Tensor
    variance: float
    weight: Tensor | None = None
    adam: tuple[float, float] | None = None

    @property
    def shape(self) -> Tensor | float:
        """The variance of each element for a diffusion of 1: a number, or one an element."""
        if self.weight is None:
            return self.variance
        if self.adam is None:
            return self.variance * self.weight.square()
        correction, eps = self.adam
        return self.variance * ((self.weight * correction).sqrt() + eps)


def memory(group: Group) -> float:
    """The share of the optimizer's velocity that survives a step: momentum, or Adam's first beta."""
    return float(group["betas"][0] if "betas" in group else group["momentum"])


def steps_taken(optimizer: Optimizer) -> dict[Tensor, float]:
    """The steps of each parameter, where the optimizer counts them: one wait for a device, not one a parameter."""
    counts: dict[torch.device, dict[Tensor, Tensor]] = {}
    for parameter, state in optimizer.state.items():
        if "step" in state:
            counts.setdefault(state["step"].device, {})[parameter] = state["step"]
    taken: dict[Tensor, float] = {}
    for steps in counts.values():
        taken.update(zip(steps, torch.stack(list(steps.values())).tolist(), strict=True))
    return taken


def kick_of(optimizer: Optimizer, group: Group, parameter: Tensor, steps: Mapping[Tensor, float]) -> Kick | None:
    """What the table says for one parameter now, or None before the first step, when there is no memory yet.

    steps: of `steps_taken` now.
    """
    lr, mu, state = float(group["lr"]), memory(group), optimizer.state.get(parameter, {})
    if isinstance(optimizer, SGD) and mu == 0:
        return Kick(parameter, 2 * lr)
    target = parameter if mu == 0 else state.get("exp_avg" if "betas" in group else "momentum_buffer")
    if target is None or steps.get(parameter) == 0:
        return None
    if isinstance(optimizer, Adam):
        return _adam_kick(group, state, target, steps[parameter], mu=mu, lr=lr)
    if isinstance(optimizer, RMSprop):
        # P enters the buffer itself, so that its variance is proportional to P and not to 1 / P.
        root = _rmsprop_preconditioner(group, state).sqrt_()
        return Kick(target, 2 * lr if mu == 0 else 2 * (1 - mu) / mu**2 / lr, root)
    return Kick(target, 2 * (1 - mu) * (1 - float(group["dampening"])) / mu**2 / lr)


def heat(optimizer: Optimizer) -> float | None:
    """Summed variance of the noise of D = 1 where the gradient enters, sum_i 2 (1 - mu) / (eta P_i); None if unknown.

    For Adam the share 1 - mu is in the first moment and cancels, and P has the correction of the next step's first
    moment. A learning rate of 0 has none.
    """
    total, steps = 0.0, steps_taken(optimizer)
    for group in optimizer.param_groups:
        lr, mu = float(group["lr"]), memory(group)
        if lr == 0:
            continue
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if isinstance(optimizer, SGD):
                dampening = float(group["dampening"]) if mu else 0.0
                total += 2 * (1 - mu) / (lr * (1 - dampening)) * parameter.numel()
            elif not state or steps.get(parameter) == 0:
                return None
            elif isinstance(optimizer, RMSprop):
                total += 2 * (1 - mu) / lr * float((1 / _rmsprop_preconditioner(group, state)).sum())
            else:
                weight, (correction, eps) = _second_moment(group, state, steps[parameter])
                corrected = 1 - mu ** (steps[parameter] + 1)
                total += 2 / lr * corrected * float((weight * correction).sqrt().add(eps).sum())
    return total


def _adam_kick(group: Group, state: State, target: Tensor, step: float, *, mu: float, lr: float) -> Kick:
    weight, adam = _second_moment(group, state, step)
    # The kick is seen by the next step, which corrects the first moment for one step more.
    corrected = 1 - mu ** (step + 1)
    if mu == 0:
        return Kick(target, 2 * lr, ((weight * adam[0]).sqrt_() + adam[1]).rsqrt_())
    return Kick(target, 2 * ((1 - mu) / mu) ** 2 / lr * corrected, weight, adam)


def _second_moment(group: Group, state: State, step: float) -> tuple[Tensor, tuple[float, float]]:
    weight = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
    return weight, (1 / (1 - float(group["betas"][1]) ** step), float(group["eps"]))


def _rmsprop_preconditioner(group: Group, state: State) -> Tensor:
    second = state["square_avg"]
    if group["centered"]:
        second = (second - state["grad_avg"].square()).clamp_min(0)
    return (second.sqrt() + group["eps"]).reciprocal()
