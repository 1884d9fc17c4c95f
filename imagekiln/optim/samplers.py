"""Samplers of exp(-L / D) as torch optimizers: SGLD, SGHMC, BAOAB and Leimkuhler-Matthews.

One gradient a step each, L the mean loss, g its gradient with weight_decay theta added, xi standard normal:

    SGLD                  theta <- theta - eta g + sqrt(2 eta D) xi                                 Welling, Teh 2011
    SGHMC                 v <- mu v + g + sqrt(2 D (1 - mu) / eta) xi,  theta <- theta - eta v      Chen et al. 2014
    BAOAB                 p <- p - s g,  theta <- theta + s p / 2,  p <- mu p + sqrt(D (1 - mu^2)) xi,
                          theta <- theta + s p / 2,  with s = sqrt(2 eta / (1 + mu))                Leimkuhler, Matthews
    LeimkuhlerMatthews    theta <- theta - eta g + sqrt(eta D / 2) (xi_k + xi_k+1)                  2013

Of the variance D/h on a quadratic of curvature h they make 1 / (1 - eta h / 2), 1 / (1 - eta h / (2 (1 + mu))), 1 and
1, as long as they are stable: eta h < 2, or < 2 (1 + mu) with momentum. The order of SGHMC is symplectic: the gradient
is taken at the new weights. With D = 0 all are gradient descent, BAOAB with rate and momentum of `torch.optim.SGD`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from imagekiln.errors import UsageError
from imagekiln.optim.langevin import Group, State, check_dtype, check_gradient, named, not_negative, to_diffusion
from imagekiln.optim.noise import normal_like

Draw = Callable[[int], Tensor]
"""Noise of this parameter so many steps from now."""


class _Sampler(Optimizer, ABC):
    """What the samplers share: checked dials in the groups, and noise by seed, step and parameter."""

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        diffusion: float | None = None,
        temperature: float | None = None,
        num_data: int | None = None,
        weight_decay: float = 0.0,
        seed: int = 0,
        **own: float,
    ) -> None:
        value = to_diffusion(diffusion, temperature, num_data)
        noise = {"noise_diffusion": value, "noise_seed": int(seed), "noise_step": 0}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **own, **noise})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with settings of their own, `noise_diffusion` among them."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name in ("lr", "weight_decay", "noise_diffusion"):
            not_negative(name, group[name])
        if not 0 <= group.get("momentum", 0.0) < 1:
            raise UsageError(f"momentum is {group['momentum']}; expected at least 0 and less than 1, the share kept.")
        for parameter in group["params"]:
            check_dtype(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the diffusion, for every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, parameter, key in named(self):
            check_gradient(parameter)
            if parameter.grad is not None:
                drift = parameter.grad.add(parameter, alpha=group["weight_decay"])
                self._move(parameter, drift, group, self.state[parameter], _drawer(parameter, group, key))
        for group in self.param_groups:
            group["noise_step"] += 1
        return loss

    @abstractmethod
    def _move(self, theta: Tensor, drift: Tensor, group: Group, state: State, draw: Draw) -> None:
        """Change one parameter in place. `drift` may be overwritten."""


class SGLD(_Sampler):
    """Stochastic gradient Langevin dynamics: gradient descent with noise of variance 2 eta D.

    params: as for any torch optimizer, float32 or float64. lr: eta. diffusion, or temperature with num_data, and seed:
    as for `langevin`; both may be set by group and are saved in `state_dict()`. weight_decay: precision of a normal
    prior, in units of the mean loss. Raises `UsageError` for wrong numbers and sparse gradients.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> sampler = SGLD([weight], lr=0.1, temperature=1.0, num_data=100)
    >>> weight.grad = torch.zeros(2)
    >>> sampler.step()
    >>> bool((weight != 0).all())
    True
    """

    def _move(self, theta: Tensor, drift: Tensor, group: Group, state: State, draw: Draw) -> None:
        theta.sub_(drift, alpha=group["lr"])
        if group["noise_diffusion"]:
            theta.add_(draw(0), alpha=(2 * group["lr"] * group["noise_diffusion"]) ** 0.5)


class LeimkuhlerMatthews(_Sampler):
    """SGLD with the average of two steps' noise: exact on quadratics at any stable rate, for the same gradients.

    Arguments are those of `SGLD`. Leimkuhler and Matthews 2013, "Rational construction of stochastic numerical methods
    for molecular sampling"; the noise of the next step is made ahead, not stored.
    """

    def _move(self, theta: Tensor, drift: Tensor, group: Group, state: State, draw: Draw) -> None:
        theta.sub_(drift, alpha=group["lr"])
        if group["noise_diffusion"]:
            theta.add_(draw(0).add_(draw(1)), alpha=(group["lr"] * group["noise_diffusion"] / 2) ** 0.5)


class SGHMC(_Sampler):
    """Langevin dynamics with momentum, in the units of `torch.optim.SGD`, gradient at the new weights.

    momentum: mu in [0, 1), what is kept of the velocity in a step; 1 - mu is the friction. Other arguments are those of
    `SGLD`.
    """

    def __init__(self, params: ParamsT, lr: float, *, momentum: float = 0.9, **dials: Any) -> None:
        super().__init__(params, lr, momentum=momentum, **dials)

    def _move(self, theta: Tensor, drift: Tensor, group: Group, state: State, draw: Draw) -> None:
        lr, mu, diffusion = group["lr"], group["momentum"], group["noise_diffusion"]
        if lr == 0:
            return
        velocity = _remembered(state, "momentum_buffer", theta).mul_(mu).add_(drift)
        if diffusion:
            velocity.add_(draw(0), alpha=(2 * diffusion * (1 - mu) / lr) ** 0.5)
        theta.sub_(velocity, alpha=lr)


class BAOAB(_Sampler):
    """Langevin dynamics with momentum by splitting: exact on quadratics at any stable rate.

    Kick, half a drift, friction with noise, half a drift: the scheme of Leimkuhler and Matthews with the two half kicks
    at equal weights made one. Arguments are those of `SGHMC`; the path of D = 0 is that of `torch.optim.SGD` with this
    momentum up to rounding. The momentum p starts at 0 and has the variance D after about 1 / (1 - mu) steps.
    """

    def __init__(self, params: ParamsT, lr: float, *, momentum: float = 0.9, **dials: Any) -> None:
        super().__init__(params, lr, momentum=momentum, **dials)

    def _move(self, theta: Tensor, drift: Tensor, group: Group, state: State, draw: Draw) -> None:
        mu, diffusion = group["momentum"], group["noise_diffusion"]
        stride = (2 * group["lr"] / (1 + mu)) ** 0.5
        momentum = _remembered(state, "momentum", theta).sub_(drift, alpha=stride)
        theta.add_(momentum, alpha=stride / 2)
        momentum.mul_(mu)
        if diffusion:
            momentum.add_(draw(0), alpha=(diffusion * (1 - mu**2)) ** 0.5)
        theta.add_(momentum, alpha=stride / 2)


def _drawer(parameter: Tensor, group: Group, key: int | str) -> Draw:
    def draw(ahead: int) -> Tensor:
        return normal_like(parameter, seed=group["noise_seed"], step=group["noise_step"] + ahead, tensor=key)

    return draw


def _remembered(state: State, name: str, like: Tensor) -> Tensor:
    if name not in state:
        state[name] = torch.zeros_like(like)
    return state[name]
