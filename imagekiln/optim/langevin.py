"""Langevin diffusion for torch's own optimizers: the noise that makes a training sample from exp(-L / D).

    d theta = -grad L dt + sqrt(2 D) dW          stationary law: p(theta) ~ exp(-L(theta) / D)

L is the mean loss as it is differentiated, D the diffusion in its units. With N examples and the negative log posterior
N L, the posterior tempered by T is exp(-L / D) with D = T / N (Welling and Teh 2011; Wenzel et al. 2020).

The noise enters where the gradient enters the optimizer's memory: the weights where there is none, the momentum buffer
or the first moment where there is one, never the gradient itself, where it would be clipped or inflate second moments.
With rate eta, momentum mu, dampening t, decay b1 of the first moment and preconditioner P, variances of a step's noise:

    SGD, RMSprop without momentum     weights           2 eta P D                            (P = 1 for SGD)
    SGD with momentum                 momentum buffer   2 D (1 - mu) (1 - t) / eta           (Chen et al. 2014)
    RMSprop with momentum             momentum buffer   2 D (1 - mu) P / eta
    Adam, AdamW                       first moment      2 D (1 - b1)^2 / (eta P)

A buffer is kicked before the step, divided by mu or b1, which the step multiplies it with. On a quadratic of curvature
h the variance is D/h over 1 - eta h / 2 without momentum and over 1 - eta h / (2 (1 + mu)) with it, eta standing for
eta (1 - t) or eta (1 - b1) P where these are. A moving P makes the law approximate: on quadratics Adam is 1 to 5 % too
hot, RMSprop 10 to 20 % with alpha = 0.99 and 4 % with 0.999. A weight that never has a gradient has P = 1 / eps and
wanders by sqrt(2 eta D / eps) a step: give Adam and RMSprop a larger eps. Decoupled weight decay is a drift beside L,
not part of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from imagekiln.errors import UsageError
from imagekiln.optim.noise import normal_like

Group = dict[str, Any]
State = dict[str, Any]

_KNOWN = (SGD, Adam, AdamW, RMSprop)
_IMPOSSIBLE = {
    "nesterov": "has no temperature: the gradient passes the momentum buffer by",
    "maximize": "climbs, and exp(-L / D) is about descent: negate the loss instead",
    "differentiable": "is differentiated through, which noise added in place forbids",
}


def langevin(
    optimizer: Optimizer,
    *,
    diffusion: float | None = None,
    temperature: float | None = None,
    num_data: int | None = None,
    seed: int = 0,
    schedule: Callable[[int], float] | None = None,
) -> Optimizer:
    """Make a stock SGD, Adam, AdamW or RMSprop sample from exp(-L / D). Returns the same optimizer.

    diffusion: D in units of the mean loss, >= 0; or else temperature T >= 0 with num_data, D = T / num_data. A group
        of parameters that has a "noise_diffusion" keeps its own. With 0 the optimizer does what it did, bit for bit.
    seed: of the noise. Optimizers of one training need different seeds, replicas of one model the same.
    schedule: factor of D as a function of the number of steps taken; a learning rate that falls needs none, the noise
        follows it. It is code and not saved: give it again.

    Every step uses the rates its groups have then, so schedulers are respected; with momentum, raise the rate over more
    than 1 / (1 - mu) steps. "noise_diffusion", "noise_seed" and "noise_step" stand in `param_groups` and so in
    `state_dict()`, and a continued training repeats bit for bit. Noise is keyed by the name of a parameter where the
    optimizer knows it, else by its place among all. Steps that mixed precision skips get no noise.

    Raises `UsageError` for what has no such law (nesterov, maximize, other optimizers, half precision, complex or
    sparse tensors), for wrong numbers, and for an optimizer that has noise already.

    >>> weight = torch.nn.Parameter(torch.zeros(3))
    >>> optimizer = langevin(torch.optim.SGD([weight], lr=0.1, momentum=0.9), temperature=1.0, num_data=1000)
    >>> optimizer.param_groups[0]["noise_diffusion"]
    0.001
    """
    if type(optimizer) not in _KNOWN:
        names = ", ".join(kind.__name__ for kind in _KNOWN)
        raise UsageError(
            f"langevin was given {type(optimizer).__name__}, for which no noise gives exp(-L/D): use {names}."
        )
    if optimizer in _attached:
        raise UsageError(
            "This optimizer has Langevin noise already: set `noise_diffusion` in its parameter groups instead."
        )
    value = to_diffusion(diffusion, temperature, num_data)
    started = {"noise_diffusion": value, "noise_seed": int(seed), "noise_step": 0}
    for group in optimizer.param_groups:
        _check_group({**started, **group})
    # Groups that are added later start from these too.
    optimizer.defaults.update(started)
    _complete(optimizer)
    _attached[optimizer] = _Attachment(optimizer, schedule)
    return optimizer


def detach(optimizer: Optimizer) -> Optimizer:
    """Take the noise away again; the optimizer goes on as it is. `UsageError` when it has none.

    >>> plain = torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))], lr=0.1)
    >>> "noise_diffusion" in detach(langevin(plain, diffusion=0.01)).param_groups[0]
    False
    """
    if optimizer not in _attached:
        raise UsageError("This optimizer has no Langevin noise to take away.")
    _attached.pop(optimizer).remove()
    for entries in (optimizer.defaults, *optimizer.param_groups):
        for key in _KEYS:
            entries.pop(key, None)
    return optimizer


def to_diffusion(diffusion: float | None, temperature: float | None, num_data: int | None) -> float:
    """D from the two dials, `diffusion` or `temperature` with `num_data`; `UsageError` for anything else.

    >>> to_diffusion(None, 0.5, 50_000)
    1e-05
    """
    if (diffusion is None) == (temperature is None):
        raise UsageError("Give either diffusion, or temperature and num_data.")
    if temperature is None:
        if num_data is not None:
            raise UsageError("num_data belongs to temperature: diffusion is in units of the mean loss already.")
        return not_negative("The diffusion", diffusion)
    if num_data is None:
        raise UsageError("A temperature needs num_data, the number of training examples: D = temperature / num_data.")
    if not num_data >= 1:
        raise UsageError(f"num_data is {num_data}; it is the number of training examples, at least 1.")
    return not_negative("The temperature", temperature) / num_data


def named(optimizer: Optimizer) -> Iterator[tuple[Group, Tensor, int | str]]:
    """Groups, parameters and what their noise is keyed by: the name if the optimizer knows it, else the place."""
    place = 0
    for group in optimizer.param_groups:
        names = group.get("param_names")
        for index, parameter in enumerate(group["params"]):
            yield group, parameter, names[index] if names else place
            place += 1


def check_gradient(parameter: Tensor) -> None:
    """`UsageError` for a sparse gradient: where it is zero the noise is not."""
    if parameter.grad is not None and parameter.grad.layout != torch.strided:
        raise UsageError("A gradient is sparse, but noise is dense: build the embedding with sparse=False.")


# -- the hooks --------------------------------------------------------------------------------------------------------

_KEYS = ("noise_diffusion", "noise_seed", "noise_step")


class _Attachment:
    """The hooks of one optimizer. Whatever changes stands in the optimizer's groups."""

    def __init__(self, optimizer: Optimizer, schedule: Callable[[int], float] | None) -> None:
        self._schedule = schedule
        self._started = {key: optimizer.defaults[key] for key in _KEYS}
        self._hooks = (
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
            optimizer.register_load_state_dict_post_hook(_complete),
        )

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _before(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        # A closure makes the gradients inside the step, so that none can be missed before it.
        closure = bool(args or kwargs)
        if not _overflowed(optimizer):
            self._kick(optimizer, before=True, closure=closure)

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        if not _overflowed(optimizer):
            self._kick(optimizer, before=False, closure=False)
            for group in optimizer.param_groups:
                group["noise_step"] += 1

    def _kick(self, optimizer: Optimizer, *, before: bool, closure: bool) -> None:
        for group, parameter, key in named(optimizer):
            check_gradient(parameter)
            step = group["noise_step"]
            diffusion = group["noise_diffusion"]
            if diffusion and self._schedule is not None:
                diffusion *= not_negative(f"The schedule's factor at step {step}", self._schedule(step))
            moves = parameter.requires_grad and (closure or parameter.grad is not None)
            if not diffusion or not moves or float(group["lr"]) == 0 or (memory(group) > 0) != before:
                continue
            kick = kick_of(optimizer, group, parameter)
            if kick is not None:
                noise = normal_like(parameter, seed=group["noise_seed"], step=step, tensor=key)
                kick.target.add_(noise.mul_((kick.variance * diffusion) ** 0.5))


_attached: WeakKeyDictionary[Optimizer, _Attachment] = WeakKeyDictionary()


def _overflowed(optimizer: Optimizer) -> bool:
    """Whether this step is one a fused optimizer leaves out: the gradient scaler saw an infinity."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def _complete(optimizer: Optimizer) -> None:
    """Groups that were saved without noise get the noise this optimizer was given."""
    for group in optimizer.param_groups:
        for key in _KEYS:
            group.setdefault(key, optimizer.defaults[key])


# -- where it enters, and how much ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kick:
    """Where a step's noise goes, and its variance for a diffusion of 1 (a number, or one an element)."""

    target: Tensor
    variance: Tensor | float


def memory(group: Group) -> float:
    """The share of the optimizer's velocity that survives a step: momentum, or Adam's first beta."""
    return float(group["betas"][0] if "betas" in group else group["momentum"])


def kick_of(optimizer: Optimizer, group: Group, parameter: Tensor) -> Kick | None:
    """What the table above says for one parameter now, or None before the first step, when there is no memory yet."""
    lr, mu, state = float(group["lr"]), memory(group), optimizer.state.get(parameter, {})
    if mu == 0:
        return Kick(parameter, 2 * lr * _preconditioner(optimizer, group, state))
    target = state.get("exp_avg" if "betas" in group else "momentum_buffer")
    if target is None or not _has_stepped(state):
        return None
    if isinstance(optimizer, Adam):
        return Kick(target, 2 * ((1 - mu) / mu) ** 2 / (lr * _preconditioner(optimizer, group, state)))
    if isinstance(optimizer, RMSprop):
        return Kick(target, 2 * (1 - mu) / mu**2 / lr * _preconditioner(optimizer, group, state))
    return Kick(target, 2 * (1 - mu) * (1 - group["dampening"]) / mu**2 / lr)


def _has_stepped(state: State) -> bool:
    return "step" not in state or float(state["step"]) > 0


def _preconditioner(optimizer: Optimizer, group: Group, state: State) -> Tensor | float:
    """What the step multiplies the velocity with besides lr, one number an element; 1 for SGD."""
    if isinstance(optimizer, SGD):
        return 1.0
    if isinstance(optimizer, RMSprop):
        second = state["square_avg"]
        if group["centered"]:
            second = (second - state["grad_avg"].square()).clamp_min(0)
        return (second.sqrt() + group["eps"]).reciprocal()
    b1, b2 = (float(beta) for beta in group["betas"])
    num_steps = float(state["step"])
    second = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"] / (1 - b2**num_steps)
    # The kick is seen by the next step, which corrects the first moment for one step more.
    return (second.sqrt() + group["eps"]).reciprocal() / (1 - b1 ** (num_steps + 1))


# -- what is refused --------------------------------------------------------------------------------------------------


def _check_group(group: Group) -> None:
    for option, why in _IMPOSSIBLE.items():
        if group.get(option):
            raise UsageError(f"An optimizer with {option} {why}.")
    if memory(group) >= 1:
        raise UsageError(f"A momentum of {memory(group)} never forgets, so it has no temperature: give less than 1.")
    not_negative("The noise_diffusion of a parameter group", group["noise_diffusion"])
    for parameter in group["params"]:
        check_dtype(parameter)


def check_dtype(parameter: Tensor) -> None:
    """`UsageError` unless float32 or float64: below, a step's noise is smaller than the rounding and would be lost."""
    if parameter.dtype not in (torch.float32, torch.float64):
        raise UsageError(
            f"A parameter is {str(parameter.dtype).removeprefix('torch.')}, which rounds a step's noise away: keep "
            "the weights in float32 and use autocast for speed."
        )


def not_negative(name: str, value: Any) -> float:
    """The number, or `UsageError` with its name when it is negative, infinite or none at all."""
    number = float(value)
    if not (number >= 0 and math.isfinite(number)):
        raise UsageError(f"{name} is {number}; expected a finite number that is not negative.")
    return number
