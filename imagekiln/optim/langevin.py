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

import warnings
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from imagekiln.core import mix
from imagekiln.errors import UsageError
from imagekiln.optim import dials as conversions
from imagekiln.optim.dials import Dials, not_negative, to_diffusion
from imagekiln.optim.kicks import Group, heat, kick_of, memory, steps_taken
from imagekiln.optim.noise import Addition, Stream, add, check_law
from imagekiln.optim.temperature import Schedule

_KNOWN = (SGD, Adam, AdamW, RMSprop)
_IMPOSSIBLE = {
    "nesterov": "has no temperature: the gradient passes the momentum buffer by",
    "differentiable": "is differentiated through, which noise added in place forbids",
}
_STOPPED = 0.01
"""The share of its highest value below which a learning rate counts as gone."""


def langevin(
    optimizer: Optimizer,
    *,
    diffusion: float | None = None,
    temperature: float | None = None,
    noise_ratio: float | None = None,
    loss_budget: float | None = None,
    num_data: int | None = None,
    gradient_variance: float | None = None,
    seed: int = 0,
    law: str = "gauss",
    schedule: Schedule | None = None,
    num_steps: int | None = None,
    report: Callable[[Dials], object] | None = None,
) -> Optimizer:
    """Make a stock SGD, Adam, AdamW or RMSprop sample from exp(-L / D). Returns the same optimizer.

    Exactly one dial says how hot (see `imagekiln.optim.dials`): diffusion, D in units of the mean loss; temperature
        with num_data, D = T / num_data; loss_budget, the most that the noise may cost; or noise_ratio with
        gradient_variance, the noise in units of what minibatches make. All >= 0. A group of parameters that has a
        "noise_diffusion" keeps its own. With 0 the optimizer does what it did, bit for bit.
    seed: of the noise. Optimizers of one training need different seeds, replicas of one model the same.
    law: "gauss", or "matched", which is faster and has the same first seven moments (see `imagekiln.optim.noise`).
    schedule: factor of D as a function of progress, the steps taken over num_steps. It is code and not saved: give it
        again. A trainer that keeps progress itself calls `place` before each step instead, and may train parts of its
        network later than others.
    report: called after the first step with all four dials; `describe` gives them at any time.

    Every step uses the rates its groups have then, so schedulers are respected; with momentum, raise the rate over more
    than 1 / (1 - mu) steps. "noise_diffusion", "noise_seed" and "noise_step" stand in `param_groups` and so in
    `state_dict()`, and a continued training repeats bit for bit. Noise is keyed by the name of a parameter where the
    optimizer knows it, else by its place among all; a parameter that is a piece of a larger tensor says where it starts
    there in an attribute `noise_start`. Steps that mixed precision skips get no noise. With maximize, L is minus what
    is climbed.

    Warns once when the learning rate has fallen to 1 % of its highest while there is noise: the weights then hardly
    move, and neither does the law they have by then. Raises `UsageError` for what has no such law (nesterov, other
    optimizers, half precision, complex or sparse tensors), for wrong numbers, frozen parameters, parameters without a
    gradient in the first step, another list of parameters in a saved state, and an optimizer that has noise already.

    >>> weight = torch.nn.Parameter(torch.zeros(3))
    >>> optimizer = langevin(torch.optim.SGD([weight], lr=0.1, momentum=0.9), temperature=1.0, num_data=1000)
    >>> optimizer.param_groups[0]["noise_diffusion"]
    0.001
    """
    _check(optimizer)
    if (schedule is None) != (num_steps is None) or (num_steps is not None and num_steps < 1):
        raise UsageError("A schedule is a function of progress: give it together with num_steps, at least 1.")
    conversions.check_num_data(num_data)
    value = _diffusion_of(
        optimizer, diffusion, temperature, noise_ratio, loss_budget, num_data=num_data, variance=gradient_variance
    )
    started = {"noise_diffusion": value, "noise_seed": int(seed), "noise_step": 0, "noise_law": check_law(law)}
    # Groups that are added later start from these too.
    optimizer.defaults.update(started)
    _complete(optimizer)
    _attached[optimizer] = _Attachment(optimizer, schedule, num_steps, num_data, gradient_variance, report)
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
        for key in (*_KEYS, "noise_factor"):
            entries.pop(key, None)
    return optimizer


def describe(optimizer: Optimizer) -> Dials:
    """All four dials of an optimizer with Langevin noise as they are now, factors of a schedule included.

    Groups with several diffusions are averaged over their weights. `UsageError` when there is no noise.

    >>> weight = torch.nn.Parameter(torch.zeros(1000))
    >>> dials = describe(langevin(torch.optim.SGD([weight], lr=0.1), temperature=1.0, num_data=50_000))
    >>> dials.diffusion, dials.loss_budget, dials.num_params
    (2e-05, 0.01, 1000)
    """
    if optimizer not in _attached:
        raise UsageError("This optimizer has no Langevin noise to describe: give it to langevin first.")
    return _attached[optimizer].dials(optimizer)


def place(optimizer: Optimizer, *, step: int, factor: float = 1.0, seed: int | None = None) -> None:
    """Say where a training stands, before its step, instead of counting: for a trainer that keeps progress itself.

    step: of the noise, so that the same step gets the same noise after a resume. factor: of D, of a schedule that the
    trainer evaluates; >= 0. seed: another seed from now on. An optimizer without noise is left alone.

    >>> optimizer = langevin(torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))], lr=0.1), diffusion=0.01)
    >>> place(optimizer, step=40, factor=0.5)
    >>> describe(optimizer).diffusion, optimizer.param_groups[0]["noise_step"]
    (0.005, 40)
    """
    if optimizer not in _attached:
        return
    not_negative("The factor of the diffusion", factor)
    for group in optimizer.param_groups:
        group["noise_step"], group["noise_factor"] = step, factor
        if seed is not None:
            group["noise_seed"] = seed


def _diffusion_of(
    optimizer: Optimizer,
    diffusion: float | None,
    temperature: float | None,
    noise_ratio: float | None,
    loss_budget: float | None,
    *,
    num_data: int | None,
    variance: float | None,
) -> float:
    given = (diffusion, temperature, noise_ratio, loss_budget)
    if sum(dial is not None for dial in given) != 1:
        raise UsageError(
            f"Exactly one dial says how much noise, and {sum(dial is not None for dial in given)} were given: either "
            "diffusion, temperature with num_data, noise_ratio with gradient_variance, or loss_budget."
        )
    if loss_budget is not None:
        return conversions.budget_to_diffusion(loss_budget, _num_params(optimizer))
    if noise_ratio is not None:
        return conversions.ratio_to_diffusion(noise_ratio, variance, heat(optimizer))
    return to_diffusion(diffusion, temperature, num_data)


def _num_params(optimizer: Optimizer) -> int:
    return sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])


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


def stream_of(parameter: Tensor, group: Group, key: int | str, ahead: int = 0) -> Stream:
    """The noise of a parameter at this step, or so many steps ahead."""
    start = int(getattr(parameter, "noise_start", 0))
    return Stream(group["noise_seed"], group["noise_step"] + ahead, key, start, group.get("noise_law", "gauss"))


def has_closure(args: tuple, kwargs: dict) -> bool:
    """Whether a step's arguments, as torch hands them to hooks with the optimizer first, hold a closure."""
    return any(argument is not None for argument in (*args[1:], *kwargs.values()))


# -- the hooks --------------------------------------------------------------------------------------------------------

_KEYS = ("noise_diffusion", "noise_seed", "noise_step", "noise_law")


class _Attachment:
    """The hooks of one optimizer. Whatever a continuation needs stands in the optimizer's groups."""

    def __init__(
        self,
        optimizer: Optimizer,
        schedule: Schedule | None,
        num_steps: int | None,
        num_data: int | None,
        gradient_variance: float | None,
        report: Callable[[Dials], object] | None,
    ) -> None:
        self._schedule, self._num_steps = schedule, num_steps
        self._num_data, self._variance = num_data, gradient_variance
        self._report = report
        self._highest: dict[int, float] = {}
        self._first, self._warned = True, False
        self._hooks = (
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
            optimizer.register_state_dict_post_hook(_sign),
            optimizer.register_load_state_dict_pre_hook(_check_signature),
            optimizer.register_load_state_dict_post_hook(_complete),
        )

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def dials(self, optimizer: Optimizer) -> Dials:
        num = _num_params(optimizer)
        each = [(self._diffusion(group), sum(p.numel() for p in group["params"])) for group in optimizer.param_groups]
        diffusion = sum(value * n for value, n in each) / max(1, num)
        if len({value for value, _ in each}) == 1:
            diffusion = each[0][0]
        made = heat(optimizer) if self._variance else None
        return Dials(
            diffusion,
            None if self._num_data is None else diffusion * self._num_data,
            None if made is None or not self._variance else diffusion * made / self._variance,
            diffusion * num / 2,
            num,
        )

    @torch.no_grad()
    def _before(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        # A closure makes the gradients inside the step, so that none can be missed before it.
        closure = has_closure(args, kwargs)
        if _overflowed(optimizer):
            return
        if self._first and not closure and not any(map(_is_placed, optimizer.param_groups)):
            _check_unused(optimizer)
        self._kick(optimizer, before=True, closure=closure)

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        if _overflowed(optimizer):
            return
        self._kick(optimizer, before=False, closure=False)
        self._warn_when_stopped(optimizer)
        if self._first:
            self._first = False
            if self._report is not None:
                self._report(self.dials(optimizer))
        for group in optimizer.param_groups:
            group["noise_step"] += 1

    def _diffusion(self, group: Group) -> float:
        diffusion = group["noise_diffusion"] * group.get("noise_factor", 1.0)
        if diffusion and self._schedule is not None and self._num_steps is not None:
            step = group["noise_step"]
            factor = self._schedule(min(1.0, step / self._num_steps))
            diffusion *= not_negative(f"The schedule's factor at step {step}", factor)
        return diffusion

    def _kick(self, optimizer: Optimizer, *, before: bool, closure: bool) -> None:
        additions = []
        rates = {id(group): self._diffusion(group) for group in optimizer.param_groups}
        hot = any(rates[id(group)] and (memory(group) > 0) == before for group in optimizer.param_groups)
        steps = steps_taken(optimizer) if hot else {}
        for group, parameter, key in named(optimizer):
            check_gradient(parameter)
            diffusion = rates[id(group)]
            moves = parameter.requires_grad and (closure or parameter.grad is not None)
            if not diffusion or not moves or float(group["lr"]) == 0 or (memory(group) > 0) != before:
                continue
            kick = kick_of(optimizer, group, parameter, steps)
            if kick is not None:
                stream = stream_of(parameter, group, key)
                scale = (kick.variance * diffusion) ** 0.5
                additions.append(Addition(kick.target, stream, scale, kick.weight, kick.adam))
        add(additions)

    def _warn_when_stopped(self, optimizer: Optimizer) -> None:
        for place, group in enumerate(optimizer.param_groups):
            rate = float(group["lr"])
            self._highest[place] = max(rate, self._highest.get(place, 0.0))
            if _is_placed(group) or self._warned or not group["noise_diffusion"]:
                continue
            if rate < _STOPPED * self._highest[place]:
                self._warned = True
                warnings.warn(
                    f"The learning rate is {rate / self._highest[place]:.2g} of its highest: it anneals the noise "
                    "already, so leave the temperature as it is, or keep the rate up while you collect samples.",
                    stacklevel=4,
                )


_attached: WeakKeyDictionary[Optimizer, _Attachment] = WeakKeyDictionary()


def _is_placed(group: Group) -> bool:
    """Whether a trainer keeps the progress: it knows the schedules of rate and heat, and which parts learn when."""
    return "noise_factor" in group


def _overflowed(optimizer: Optimizer) -> bool:
    """Whether this step is one a fused optimizer leaves out: the gradient scaler saw an infinity."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def _complete(optimizer: Optimizer) -> None:
    """Groups that were saved without noise get the noise this optimizer was given."""
    for group in optimizer.param_groups:
        group.pop("noise_tensors", None)
        for key in _KEYS:
            group.setdefault(key, optimizer.defaults[key])


def _signature(group: Group) -> int:
    """What the noise of a group is keyed by: names where there are any, order and shapes."""
    names = group.get("param_names") or range(len(group["params"]))
    return mix(*(f"{name} {tuple(p.shape)}" for name, p in zip(names, group["params"], strict=True)))


def _sign(optimizer: Optimizer, state: dict[str, Any]) -> None:
    for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True):
        saved["noise_tensors"] = _signature(group)


def _check_signature(optimizer: Optimizer, state: dict[str, Any]) -> None:
    saved = [group.get("noise_tensors") for group in state["param_groups"]]
    ours = [_signature(group) for group in optimizer.param_groups]
    if len(saved) != len(ours) or any(a is not None and a != b for a, b in zip(saved, ours, strict=True)):
        raise UsageError(
            "The saved optimizer has other parameters (names, shapes, order or groups) than this one, so its noise and "
            "its memory belong to other weights: build the optimizer as it was built then."
        )


# -- what is refused --------------------------------------------------------------------------------------------------


def _check(optimizer: Optimizer) -> None:
    if type(optimizer) not in _KNOWN:
        names = ", ".join(kind.__name__ for kind in _KNOWN)
        raise UsageError(
            f"langevin was given {type(optimizer).__name__}, for which no noise gives exp(-L/D): use {names}."
        )
    if optimizer in _attached:
        raise UsageError(
            "This optimizer has Langevin noise already: set `noise_diffusion` in its parameter groups instead."
        )
    for group in optimizer.param_groups:
        _check_group({"noise_diffusion": 0.0, **group})


def _check_group(group: Group) -> None:
    for option, why in _IMPOSSIBLE.items():
        if group.get(option):
            raise UsageError(f"An optimizer with {option} {why}.")
    if memory(group) >= 1:
        raise UsageError(f"A momentum of {memory(group)} never forgets, so it has no temperature: give less than 1.")
    not_negative("The noise_diffusion of a parameter group", group["noise_diffusion"])
    for parameter in group["params"]:
        check_dtype(parameter)
        if not parameter.requires_grad:
            raise UsageError(
                f"A parameter of shape {tuple(parameter.shape)} is frozen (requires_grad is False), so no loss would "
                "hold it against the noise: leave it out of the optimizer."
            )


def _check_unused(optimizer: Optimizer) -> None:
    if all(parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"]):
        return
    for _, parameter, key in named(optimizer):
        if parameter.grad is None:
            raise UsageError(
                f"The parameter {key} (shape {tuple(parameter.shape)}) has no gradient in the first step: the loss "
                "does not use it, so leave it out of the optimizer."
            )


def check_dtype(parameter: Tensor) -> None:
    """`UsageError` unless float32 or float64: below, a step's noise is smaller than the rounding and would be lost."""
    if parameter.dtype not in (torch.float32, torch.float64):
        raise UsageError(
            f"A parameter is {str(parameter.dtype).removeprefix('torch.')}, which rounds a step's noise away: keep "
            "the weights in float32 and use autocast for speed."
        )
