"""Choosing D by what it costs: from a budget of training loss, corrected by the loss that is measured.

Near a minimum every weight that the loss holds costs D / 2 (see `imagekiln.optim.dials`), so D = 2 budget / d spends a
budget if the loss holds all d of them. It seldom does, so the loop is closed. Measurements come in blocks of `window`.
With theta the noisy weights and m their mean over the block before, in which the noise has averaged out,

    excess e = L(theta) - L(m),  both on one minibatch        cost of a unit of D: c = mean e / mean D
    D <- budget / c,  by at most a factor of 1 + 1 / (2 window) a measurement

with exponential means over `window` measurements that begin at the open loop, c = d / 2. At equilibrium mean e = c D,
and this is its only fixed point. What minibatches heat is in the excess as well: mean e = e_0 + c D, and then the fixed
point is e = budget all the same, noise being given what minibatches leave of it; where they leave nothing, D falls.
Directions that a block is too short for count as places, not as noise: they are neither in the excess nor in the
budget. What the training gains from one block to the next is missing from the excess; as long as that is more than the
noise costs, the loop stays open.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer, RMSprop

from imagekiln.errors import UsageError
from imagekiln.optim.dials import budget_to_diffusion
from imagekiln.optim.langevin import describe, langevin

MOST, LEAST = 1000.0, 1e-6
"""D stays between these multiples of what it started with."""

WILD = 10.0
"""A measured excess counts as at most so many budgets, so that one bad minibatch cannot move D far."""

SILENT = 0.01
"""A schedule's factor below which an excess says nothing about noise."""


def auto(
    optimizer: Optimizer, loss_budget: float, *, every: int = 10, window: int = 100, **options: Any
) -> BudgetControl:
    """Let an optimizer's diffusion follow a budget of training loss. Call `step` of the result after every step.

    optimizer: one without noise, which `langevin` is called for with `options` (seed, law, schedule ...), or one that
        has noise already, a sampler for one, whose D starts anew; groups keep the ratio of their diffusions.
    loss_budget: what the noise may cost, > 0, in units of the mean loss. every: steps from one measurement to the next,
        which takes two evaluations of the loss. window: measurements of a block; every * window steps should hold many
        relaxation times 1 / (eta h) of the weights that matter.

    All that it remembers stands in the optimizer: numbers "auto_..." in the groups and two means in each parameter's
    state. So `state_dict()` holds it, and a training continued by `auto` with the same arguments followed by
    `load_state_dict` repeats bit for bit. Raises `UsageError` for a budget that is not above 0, and every or window
    below 1.

    >>> weight = torch.nn.Parameter(torch.ones(1000))
    >>> optimizer = torch.optim.SGD([weight], lr=0.1)
    >>> control = auto(optimizer, loss_budget=0.5, every=1)
    >>> control.diffusion
    0.001
    >>> weight.grad = weight.detach().clone()
    >>> optimizer.step()
    >>> control.step(lambda: weight.square().sum() / 2)
    """
    if not loss_budget > 0 or every < 1 or window < 1:
        raise UsageError(
            f"loss_budget {loss_budget}, every {every}, window {window}: a budget is above 0, every and window at "
            "least 1. Without a budget there is no noise to choose."
        )
    num_params = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
    start = budget_to_diffusion(loss_budget, num_params)
    if any("noise_diffusion" not in group for group in optimizer.param_groups):
        langevin(optimizer, loss_budget=loss_budget, **options)
    elif options:
        raise UsageError(f"This optimizer has noise already, so {sorted(options)} cannot be given: set them there.")
    return BudgetControl(optimizer, loss_budget, start, every, window)


class BudgetControl:
    """What `auto` returns: `step` after every step of the optimizer; `excess` and `diffusion` say how it stands."""

    def __init__(self, optimizer: Optimizer, loss_budget: float, start: float, every: int, window: int) -> None:
        self.optimizer, self.loss_budget = optimizer, loss_budget
        self._start, self._every, self._window = start, every, window
        old = self.diffusion
        for group in optimizer.param_groups:
            group["noise_diffusion"] = start * (group["noise_diffusion"] / old if old else 1.0)
        self._write(auto_step=0, auto_num=0, auto_excess=loss_budget, auto_diffusion=start)

    @property
    def diffusion(self) -> float:
        """D of now, without factors of a schedule; groups are averaged over their weights."""
        each = [(group["noise_diffusion"], sum(p.numel() for p in group["params"])) for group in self._groups]
        if len({value for value, _ in each}) == 1:
            return float(each[0][0])
        return sum(value * num for value, num in each) / max(1, sum(num for _, num in each))

    @property
    def excess(self) -> float | None:
        """The measured excess of the loss, averaged over the window; None before there is one."""
        return float(self._groups[0]["auto_excess"]) if self._groups[0]["auto_num"] > self._window else None

    @torch.no_grad()
    def step(self, loss_of: Callable[[], Any]) -> None:
        """Take the weights after a step into account; every so many steps, measure and correct D.

        loss_of: the loss on the minibatch of this step, a number or a scalar, for the weights the parameters have when
            it is called. It is called twice without gradients, both times with the same random numbers, and torch's
            generators are left as they were. It must change nothing, such as statistics of batch normalisation.
        """
        first = self._groups[0]
        self._write(auto_step=first["auto_step"] + 1)
        if first["auto_step"] % self._every:
            return
        self._write(auto_num=first["auto_num"] + 1)
        references = self._take_in(first["auto_num"] - 1)
        if first["auto_num"] <= self._window:
            return
        parameters = list(references)
        noisy = self._evaluate(loss_of)
        kept = [parameter.detach().clone() for parameter in parameters]
        torch._foreach_copy_(parameters, list(references.values()))
        try:
            quiet = self._evaluate(loss_of)
        finally:
            torch._foreach_copy_(parameters, kept)
        self._correct(noisy - quiet)

    def _take_in(self, before: int) -> dict[Tensor, Tensor]:
        """Take weights into the mean of this block, `before` measurements after the first; the means of the last."""
        place = before % self._window
        means: dict[Tensor, Tensor] = {}
        references: dict[Tensor, Tensor] = {}
        for parameter in (p for group in self._groups for p in group["params"]):
            state = self.optimizer.state.get(parameter, {})
            if isinstance(self.optimizer, Adam | RMSprop) and not state:
                continue  # these take a state that is not empty for one of theirs
            if "auto_mean" not in state:
                state = self.optimizer.state[parameter]
                state["auto_mean"], state["auto_reference"] = parameter.detach().clone(), parameter.detach().clone()
            elif place == 0:
                state["auto_reference"].copy_(state["auto_mean"])
            means[parameter], references[parameter] = state["auto_mean"], state["auto_reference"]
        if means:
            torch._foreach_lerp_(list(means.values()), [p.detach() for p in means], 1 / (place + 1))
        return references

    def _evaluate(self, loss_of: Callable[[], Any]) -> float:
        devices = {p.device.index for group in self._groups for p in group["params"] if p.device.type == "cuda"}
        with torch.random.fork_rng(devices=sorted(index for index in devices if index is not None)):
            return float(loss_of())

    def _correct(self, excess: float) -> None:
        first, base = self._groups[0], self.diffusion
        acting = self._acting()
        if math.isnan(excess) or acting < SILENT * base:
            return
        share, limit = 1 / self._window, WILD * self.loss_budget
        mean_excess = first["auto_excess"] + share * (min(limit, max(-limit, excess)) - first["auto_excess"])
        mean_diffusion = first["auto_diffusion"] + share * (acting - first["auto_diffusion"])
        if mean_excess <= 0:  # the training descends and the mean lags behind: as if nothing had been measured
            mean_excess, mean_diffusion = self.loss_budget * acting / self._start, acting
        self._write(auto_excess=mean_excess, auto_diffusion=mean_diffusion)
        wanted = self.loss_budget * mean_diffusion / mean_excess
        most = 1 + share / 2
        wanted = min(base * most, max(base / most, wanted))
        wanted = min(MOST * self._start, max(LEAST * self._start, wanted))
        for group in self._groups:
            group["noise_diffusion"] *= wanted / base

    def _acting(self) -> float:
        """D as it acts now, with the factor of a schedule."""
        try:
            return describe(self.optimizer).diffusion
        except UsageError:  # a sampler: it has no schedule
            return self.diffusion

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def _write(self, **numbers: float) -> None:
        for group in self._groups:
            group.update(numbers)
