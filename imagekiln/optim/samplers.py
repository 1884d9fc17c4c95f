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
from imagekiln.optim.dials import not_negative, to_diffusion
from imagekiln.optim.kicks import Group, State
from imagekiln.optim.langevin import check_dtype, check_gradient, named, stream_of
from imagekiln.optim.noise import Addition, add, check_law, round_randomly

Shake = Callable[..., None]
"""shake(target, scale, ahead=0, weight=None): add scale * weight * noise of this parameter so many steps from now."""


class Sampler(Optimizer, ABC):
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
        **own: Any,
    ) -> None:
        value = to_diffusion(diffusion, temperature, num_data)
        law = check_law(own.pop("law", "gauss"))
        noise = {"noise_diffusion": value, "noise_seed": int(seed), "noise_step": 0, "noise_law": law}
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
            if parameter.dtype != torch.bfloat16:
                check_dtype(parameter)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state; the memory of bfloat16 weights stays in float32, which torch would round."""
        super().load_state_dict(state_dict)
        places = [place for group in state_dict["param_groups"] for place in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for place, parameter in zip(places, parameters, strict=True):
            if parameter.dtype == torch.bfloat16 and place in state_dict["state"]:
                for name, value in state_dict["state"][place].items():
                    if isinstance(value, Tensor):
                        self.state[parameter][name] = value.to(parameter.device, copy=True)

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
                self._move_one(parameter, parameter.grad, group, key)
        for group in self.param_groups:
            group["noise_step"] += 1
        return loss

    def _move_one(self, parameter: Tensor, gradient: Tensor, group: Group, key: int | str) -> None:
        stream = stream_of(parameter, group, key)

        def shake(target: Tensor, scale: float, ahead: int = 0, weight: Tensor | None = None) -> None:
            if group["noise_diffusion"]:
                add([Addition(target, stream_of(parameter, group, key, ahead), scale, weight)])

        rounded = parameter.dtype == torch.bfloat16
        theta = parameter.float() if rounded else parameter
        decay = group["weight_decay"]
        drift = gradient.float() if rounded else gradient
        self._move(theta, drift.add(theta, alpha=decay) if decay else drift, group, self.state[parameter], shake)
        if rounded:
            parameter.copy_(
                round_randomly(theta, seed=stream.seed, step=stream.step, tensor=stream.tensor, start=stream.start)
            )

    @abstractmethod
    def _move(self, theta: Tensor, drift: Tensor, group: Group, state: State, shake: Shake) -> None:
        """Change one parameter in place. `drift` may be the gradient itself and is not to be changed."""


class SGLD(Sampler):
    """Stochastic gradient Langevin dynamics: gradient descent with noise of variance 2 eta D.

    params: as for any torch optimizer, float32 or float64, or bfloat16, which is computed in float32 and rounded up or
    down at random, so that steps below a unit in the last place are right on average (`noise.round_randomly`; memory
    stays in float32). lr: eta. diffusion, or temperature with num_data, seed and law: as for `langevin`; they may be
    set by group and are saved in `state_dict()`. weight_decay: precision of a normal prior, in units of the mean loss.
    Raises `UsageError` for wrong numbers and sparse gradients.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> sampler = SGLD([weight], lr=0.1, temperature=1.0, num_data=100)
    >>> weight.grad = torch.zeros(2)
    >>> sampler.step()
    >>> bool((weight != 0).all())
    True
    """

    def _move(self, theta: Tensor, drift: Tensor, group: Group, state: State, shake: Shake) -> None:
        theta.sub_(drift, alpha=group["lr"])
        shake(theta, (2 * group["lr"] * group["noise_diffusion"]) ** 0.5)


class LeimkuhlerMatthews(Sampler):
    """SGLD with the average of two steps' noise: exact on quadratics at any stable rate, for the same gradients.

    Arguments are those of `SGLD`. Leimkuhler and Matthews 2013, "Rational construction of stochastic numerical methods
    for molecular sampling"; the noise of the next step is made ahead, not stored.
    """

    def _move(self, theta: Tensor, drift: Tensor, group: Group, state: State, shake: Shake) -> None:
        theta.sub_(drift, alpha=group["lr"])
        for ahead in (0, 1):
            shake(theta, (group["lr"] * group["noise_diffusion"] / 2) ** 0.5, ahead)


class SGHMC(Sampler):
    """Langevin dynamics with momentum, in the units of `torch.optim.SGD`, gradient at the new weights.

    momentum: mu in [0, 1), what is kept of the velocity in a step; 1 - mu is the friction. Other arguments are those of
    `SGLD`.
    """

    def __init__(self, params: ParamsT, lr: float, *, momentum: float = 0.9, **dials: Any) -> None:
        super().__init__(params, lr, momentum=momentum, **dials)

    def _move(self, theta: Tensor, drift: Tensor, group: Group, state: State, shake: Shake) -> None:
        lr, mu, diffusion = group["lr"], group["momentum"], group["noise_diffusion"]
        if lr == 0:
            return
        velocity = remembered(state, "momentum_buffer", theta).mul_(mu).add_(drift)
        shake(velocity, (2 * diffusion * (1 - mu) / lr) ** 0.5)
        theta.sub_(velocity, alpha=lr)


class BAOAB(Sampler):
    """Langevin dynamics with momentum by splitting: exact on quadratics at any stable rate.

    Kick, half a drift, friction with noise, half a drift: the scheme of Leimkuhler and Matthews with the two half kicks
    at equal weights made one. Arguments are those of `SGHMC`; the path of D = 0 is that of `torch.optim.SGD` with this
    momentum up to rounding. The momentum p starts at 0 and has the variance D after about 1 / (1 - mu) steps.
    """

    def __init__(self, params: ParamsT, lr: float, *, momentum: float = 0.9, **dials: Any) -> None:
        super().__init__(params, lr, momentum=momentum, **dials)

    def _move(self, theta: Tensor, drift: Tensor, group: Group, state: State, shake: Shake) -> None:
        mu, diffusion = group["momentum"], group["noise_diffusion"]
        stride = (2 * group["lr"] / (1 + mu)) ** 0.5
        momentum = remembered(state, "momentum", theta).sub_(drift, alpha=stride)
        theta.add_(momentum, alpha=stride / 2)
        momentum.mul_(mu)
        shake(momentum, (diffusion * (1 - mu**2)) ** 0.5)
        theta.add_(momentum, alpha=stride / 2)


def remembered(state: State, name: str, like: Tensor) -> Tensor:
    """A tensor of the sampler's memory, zero at first."""
    if name not in state:
        state[name] = torch.zeros_like(like)
    return state[name]
