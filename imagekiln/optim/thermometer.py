"""How hot an optimizer is: two thermometers for a training, and a test on springs whose answer is known.

A system at temperature D (in units of the mean loss L) obeys, theta and L's gradient g over its stationary law,

    configurational    E[(theta - E theta) g] = D     for every coordinate
    kinetic            E[v^2] = s^2 / (1 - mu^2)      for a velocity that keeps mu and gets noise of variance s^2 ~ D

Wenzel et al. 2020 ("How good is the Bayes posterior in deep neural networks really?") use both. `verify` runs an
optimizer on many independent springs L = h theta^2 / 2, the Ornstein-Uhlenbeck process, and reads h E[theta^2], which
is D at any h; what depends on h is no temperature.

Shapes: R curvatures, N chains, S samples, D coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Adam, Optimizer, RMSprop

from imagekiln.errors import UsageError
from imagekiln.optim.kicks import Group, kick_of, memory, steps_taken
from imagekiln.optim.noise import normal
from imagekiln.optim.samplers import BAOAB, SGHMC

SHARES_OF_STABILITY = (0.02, 0.1)
"""eta h of the two springs: small enough for any integrator, apart enough to tell noise that has no temperature."""

_MAX_SLOPE = 0.1
_MAX_BIAS = 0.03


@dataclass(frozen=True)
class Reading:
    """A measured diffusion D, in units of the mean loss, and its standard error."""

    diffusion: float
    standard_error: float


@dataclass(frozen=True)
class Verdict:
    """What `verify` found.

    requested: the diffusion asked for, or None where nobody said. curvatures: h of the springs, softest first.
    readings: the diffusion measured on each; infinite where the optimizer ran away.
    """

    requested: float | None
    curvatures: tuple[float, ...]
    readings: tuple[Reading, ...]

    @property
    def diffusion(self) -> float:
        """The diffusion measured on the softest spring, where the error of a finite step is smallest."""
        return self.readings[0].diffusion

    @property
    def standard_error(self) -> float:
        """The standard error of `diffusion`."""
        return self.readings[0].standard_error

    @property
    def stable(self) -> bool:
        """Whether no spring ran away."""
        return all(math.isfinite(reading.diffusion) for reading in self.readings)

    @property
    def has_temperature(self) -> bool:
        """Whether all springs agree to 10 % and 4 standard errors; if not, there is no law exp(-L / D) for any D."""
        first = self.readings[0]
        return self.stable and all(
            abs(other.diffusion - first.diffusion)
            <= _MAX_SLOPE * max(other.diffusion, first.diffusion) + 4 * _apart(first, other)
            for other in self.readings[1:]
        )

    @property
    def agrees(self) -> bool:
        """Whether there is a temperature and it is the requested one, to 3 % and 4 standard errors."""
        if self.requested is None or not self.has_temperature:
            return False
        return abs(self.diffusion - self.requested) <= _MAX_BIAS * self.requested + 4 * self.standard_error

    def __str__(self) -> str:
        if not self.stable:
            return "It runs away: the step is too large for the springs of this test, or there is no restoring force."
        measured = f"D = {self.diffusion:.4g} ± {self.standard_error:.1g}"
        if not self.has_temperature:
            spread = ", ".join(
                f"{r.diffusion:.3g} at h = {h:.3g}" for h, r in zip(self.curvatures, self.readings, strict=True)
            )
            return f"It has no temperature: the diffusion depends on the curvature h ({spread})."
        if self.requested is None:
            return f"{measured}; none was asked for."
        if self.agrees:
            return f"{measured}, as asked for ({self.requested:.4g})."
        ratio = f"{self.diffusion / self.requested:.3g} times" if self.requested else "not"
        return f"{measured} is {ratio} what was asked for ({self.requested:.4g})."


class Steps(Protocol):
    """What `verify` needs of an optimizer: a step that reads `.grad` and changes the parameters in place."""

    def step(self) -> object: ...


def verify(
    make_optimizer: Callable[[list[Parameter]], Steps],
    *,
    diffusion: float | None = None,
    curvatures: Sequence[float] | None = None,
    num_chains: int = 2000,
    num_steps: int = 1200,
) -> Verdict:
    """Measure the temperature of any optimizer on springs, in about a second.

    make_optimizer: builds what is tested over one float64 parameter of shape (R, num_chains): a torch optimizer, with
        or without `langevin`, or a home-made object with `step()`.
    diffusion: the D that was asked for; taken from the optimizer's groups where it stands there.
    curvatures: h of the springs, all > 0; by default those that move by 2 % and 10 % in a step of the learning rate in
        `param_groups` (for Adam and RMSprop: at the size that gradients have at temperature D).
    num_steps: the first third is not measured. Weight decay is switched off, since it is part of L. torch's global
        generator is seeded inside and put back. Raises `UsageError` when the springs cannot be chosen.

    >>> from imagekiln.optim.samplers import BAOAB
    >>> verify(lambda parameters: BAOAB(parameters, lr=0.1, diffusion=0.01)).agrees
    True
    """
    theta_RN = Parameter(torch.zeros(len(curvatures or SHARES_OF_STABILITY), num_chains, dtype=torch.float64))
    optimizer = make_optimizer([theta_RN])
    groups: list[Group] = getattr(optimizer, "param_groups", [])
    if diffusion is None and groups:
        diffusion = groups[0].get("noise_diffusion")
    springs = sorted(curvatures or _default_curvatures(optimizer, groups, diffusion))
    if not springs[0] > 0:
        raise UsageError(f"A spring's curvature is {springs[0]}; expected numbers greater than 0.")
    for group in groups:
        group["weight_decay"] = 0.0
    h_R1 = torch.tensor(springs, dtype=torch.float64)[:, None]
    if diffusion:
        start = normal(theta_RN.numel(), seed=0, step=0, tensor="start", dtype=torch.float64).view_as(theta_RN)
        theta_RN.data.copy_(start * (diffusion / h_R1).sqrt())
    energy_RN = _mean_energy(optimizer, theta_RN, h_R1, num_steps)
    readings = tuple(_reading(energy_N) for energy_N in energy_RN)
    return Verdict(diffusion, tuple(springs), readings)


def kinetic(optimizer: Optimizer) -> Reading:
    """The diffusion that the optimizer's velocity has now, averaged over all weights.

    For SGD and RMSprop with momentum, Adam, AdamW, `SGHMC` and `BAOAB`, with noise or without: what minibatches
    heat is in it, and so is a velocity that moves steadily (early in a training). The standard error takes the weights
    as independent. Raises `UsageError` when nothing has a velocity.

    >>> weight = torch.nn.Parameter(torch.zeros(1000))
    >>> sampler = BAOAB([weight], lr=0.1, diffusion=0.01)
    >>> for _ in range(100):
    ...     weight.grad = weight.detach().clone()
    ...     sampler.step()
    >>> abs(kinetic(sampler).diffusion - 0.01) < 0.002
    True
    """
    total, num, steps = 0.0, 0, steps_taken(optimizer)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            energy = _kinetic_energy(optimizer, group, parameter, steps)
            if energy is not None:
                total, num = total + float(energy.double().sum()), num + energy.numel()
    if num == 0:
        raise UsageError(
            f"{type(optimizer).__name__} has no velocity to measure: it needs momentum and at least one step."
        )
    return Reading(total / num, total / num * math.sqrt(2 / num))


def configurational(positions_SD: Tensor, gradients_SD: Tensor) -> Reading:
    """The diffusion that samples of weights have: the mean of (theta - mean theta) times the gradient.

    positions_SD, gradients_SD: at least two samples of D coordinates, flattened, and the gradients of L there. The
    standard error takes coordinates as independent, so it is right for correlated samples. Raises `UsageError` for
    shapes that do not fit.

    >>> theta = torch.tensor([[1.0], [-1.0]])
    >>> configurational(theta, 3 * theta).diffusion
    6.0
    """
    if positions_SD.shape != gradients_SD.shape or positions_SD.ndim != 2 or len(positions_SD) < 2:
        raise UsageError(
            f"Positions of shape {tuple(positions_SD.shape)} and gradients of shape {tuple(gradients_SD.shape)}; "
            "expected two equal shapes (samples, coordinates) with at least two samples."
        )
    num = len(positions_SD)
    centred_SD = (positions_SD - positions_SD.mean(0)).double()
    return _reading((centred_SD * gradients_SD).sum(0) / (num - 1))


def _mean_energy(optimizer: Steps, theta_RN: Parameter, h_R1: Tensor, num_steps: int) -> Tensor:
    """h theta^2 of every chain, averaged over the last two thirds of the steps."""
    energy_RN = torch.zeros_like(theta_RN)
    burn_in = num_steps // 3
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for step in range(num_steps):
            theta_RN.grad = h_R1 * theta_RN
            optimizer.step()
            if step >= burn_in:
                energy_RN.add_(h_R1 * theta_RN.square())
    return energy_RN / (num_steps - burn_in)


def _default_curvatures(optimizer: Steps, groups: list[Group], diffusion: float | None) -> list[float]:
    lr = float(groups[0].get("lr", 0.0)) if groups else 0.0
    if not lr > 0:
        raise UsageError("This optimizer has no positive lr in its param_groups: give verify the curvatures to test.")
    if not isinstance(optimizer, Adam | RMSprop):
        return [share / lr for share in SHARES_OF_STABILITY]
    if not diffusion:
        raise UsageError("An adaptive optimizer needs a diffusion above 0, or else curvatures, to choose springs.")
    # With P = 1 / sqrt(h D), the root mean square of the gradient, a step is eta P h = eta sqrt(h / D).
    return [diffusion * (share / lr) ** 2 for share in SHARES_OF_STABILITY]


def _kinetic_energy(
    optimizer: Optimizer, group: Group, parameter: Tensor, steps: Mapping[Tensor, float]
) -> Tensor | None:
    state = optimizer.state.get(parameter, {})
    if isinstance(optimizer, BAOAB):
        return state["momentum"].square() if state else None
    if isinstance(optimizer, SGHMC):
        return state["momentum_buffer"].square() * (group["lr"] * (1 + group["momentum"]) / 2) if state else None
    if not ("betas" in group or "momentum" in group) or memory(group) == 0:
        return None
    kick = kick_of(optimizer, group, parameter, steps)
    if kick is None:
        return None
    mu = memory(group)
    return kick.target.square() * ((1 - mu**2) / mu**2) / kick.shape


def _reading(values: Tensor) -> Reading:
    if not bool(values.isfinite().all()):
        return Reading(math.inf, math.inf)
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return Reading(float(values.mean()), error)


def _apart(one: Reading, other: Reading) -> float:
    return math.hypot(one.standard_error, other.standard_error)
