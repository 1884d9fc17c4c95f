"""Samplers that adapt: the SGNHT thermostat and pSGLD, SGLD with the preconditioner of RMSprop.

Units are those of `imagekiln.optim.samplers`: L is the mean loss, g its gradient, D the diffusion, xi standard normal.

SGNHT (Ding et al. 2014, "Bayesian sampling using stochastic gradient thermostats", algorithm 2, one thermostat a
tensor). With eta the rate, A the friction and v the change of theta in a step:

    v <- v - z v - eta g + sqrt(2 A eta D) xi,    theta <- theta + v
    z <- z + eta (mean(v^2) (1 - z / 2) / (eta D) - 1),    z_0 = A

The friction z settles where the kinetic temperature is D: gradient noise of variance s^2, equal everywhere, only raises
it to about A + eta s^2 / (2 D). The factor 1 - z / 2, which the paper's small steps do not need, makes mean(h theta^2)
exactly D on quadratics at any stable rate. The mean is over the elements of a tensor, so z is quiet when there are many
and the law is approximate when there are few. When gradient noise is several times what the sampler makes itself, z
overshoots at the start and the weights can run away: begin with a friction near the sum above.

pSGLD (Li et al. 2016, "Preconditioned stochastic gradient Langevin dynamics"):

    V <- a V + (1 - a) g^2,    G = 1 / (eps + sqrt V),    theta <- theta - eta G g + sqrt(2 eta D G) xi

A preconditioner that depends on theta needs the drift eta D Gamma, Gamma_i = dG_i / d theta_i. It is left out here, as
in the paper's experiments, because it takes the diagonal of the Hessian; with a live G the law is therefore biased, by
the less the closer a is to 1. After `freeze()` G stands still, Gamma is 0, and the law is that of SGLD with the rates
eta G: exact up to the error of a finite step. Freeze after the burn-in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from imagekiln.errors import UsageError
from imagekiln.optim.kicks import Group, State
from imagekiln.optim.samplers import Sampler, Shake, remembered


class SGNHT(Sampler):
    """Langevin dynamics with a friction that takes unknown gradient noise out.

    friction: A in (0, 1), what the noise of the sampler itself is damped by. Other arguments are those of `SGLD`; a
    diffusion of 0 is refused, since a thermostat cannot hold it. The friction of the moment is `state[p]["friction"]`.

    >>> weight = torch.nn.Parameter(torch.zeros(1000))
    >>> sampler = SGNHT([weight], lr=0.01, friction=0.1, diffusion=0.1)
    >>> weight.grad = torch.zeros(1000)
    >>> sampler.step()
    >>> sampler.state[weight]["friction"].shape
    torch.Size([])
    """

    def __init__(self, params: ParamsT, lr: float, *, friction: float = 0.1, **dials: Any) -> None:
        super().__init__(params, lr, friction=friction, **dials)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with settings of their own."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if not 0 < group["friction"] < 1:
            raise UsageError(f"friction is {group['friction']}; expected more than 0 and less than 1.")
        if not group["noise_diffusion"] > 0:
            raise UsageError("A thermostat holds a temperature above 0: give SGNHT a diffusion, or use SGD.")

    def _move(self, theta: Tensor, drift: Tensor, group: Group, state: State, shake: Shake) -> None:
        lr, diffusion = group["lr"], group["noise_diffusion"]
        if lr == 0:
            return
        velocity = remembered(state, "velocity", theta)
        if "friction" not in state:
            state["friction"] = torch.full((), float(group["friction"]), dtype=theta.dtype, device=theta.device)
        velocity.mul_(1 - state["friction"]).sub_(drift, alpha=lr)
        shake(velocity, (2 * group["friction"] * lr * diffusion) ** 0.5)
        theta.add_(velocity)
        hotness = velocity.square().mean() * (1 - state["friction"] / 2) / (lr * diffusion)
        state["friction"] += (hotness - 1) * lr


class PSGLD(Sampler):
    """SGLD with a rate for each weight, from the size of its gradients.

    alpha: a in (0, 1), what is kept of the squared gradients in a step. eps: added to their root. Other arguments are
    those of `SGLD`. Frozen or live is a setting of the group, saved in `state_dict()`.

    >>> weight = torch.nn.Parameter(torch.ones(3))
    >>> sampler = PSGLD([weight], lr=0.01, diffusion=0.001)
    >>> weight.grad = torch.ones(3)
    >>> sampler.step()
    >>> sampler.freeze()
    >>> sampler.param_groups[0]["frozen"]
    True
    """

    def __init__(self, params: ParamsT, lr: float, *, alpha: float = 0.99, eps: float = 1e-5, **dials: Any) -> None:
        super().__init__(params, lr, alpha=alpha, eps=eps, frozen=False, **dials)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with settings of their own."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if not 0 < group["alpha"] < 1 or not group["eps"] > 0:
            raise UsageError(
                f"alpha is {group['alpha']} and eps is {group['eps']}; expected alpha in (0, 1), eps above 0."
            )

    def freeze(self) -> None:
        """Let the preconditioner stand still from now on: the law is exact then. `UsageError` before the first step."""
        if not self.state:
            raise UsageError("There is no preconditioner to freeze before the first step.")
        for group in self.param_groups:
            group["frozen"] = True

    def _move(self, theta: Tensor, drift: Tensor, group: Group, state: State, shake: Shake) -> None:
        alpha = group["alpha"]
        square = remembered(state, "square_avg", theta)
        if not group["frozen"] or "num" not in state:
            state["num"] = state.get("num", 0) + 1
            square.mul_(alpha).addcmul_(drift, drift, value=1 - alpha)
        # The average starts at 0; divided by what it has taken in, it is one of gradients only.
        root = (square / (1 - alpha ** state["num"])).sqrt_().add_(group["eps"]).rsqrt_()
        theta.addcmul_(drift, root.square(), value=-group["lr"])
        shake(theta, (2 * group["lr"] * group["noise_diffusion"]) ** 0.5, weight=root)
