"""All that the doctor may do: turn a dial or a learning rate within x4 of the recipe, clamp p, go back, or stop.

Turning is done here: an act changes the chart's factors and the family's dials, says what it did, and returns None when
it is at its limit or there is nothing to turn. Going back and stopping are the practice's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from imagekiln.engine.doctor.chart import Chart
from imagekiln.engine.doctor.illnesses import HIGHEST_P, ROUNDING

LIMIT = 4.0
"""Nothing is turned farther from the recipe than by this factor."""

STEP = 2.0
"""How far one act turns."""

MOST_RESTORES = 3

Dials = Mapping[str, Tensor]
Act = Callable[[Chart, Dials, Sequence[str], Sequence[str]], "str | None"]
"""(chart, dials, all optimizers, those of critics) -> what was done, or None."""


def lower_lr(chart: Chart, dials: Dials, optimizers: Sequence[str], critics: Sequence[str]) -> str | None:
    """Halve every learning rate."""
    return _slow_down(chart, optimizers, "all learning rates")


def lower_critic_lr(chart: Chart, dials: Dials, optimizers: Sequence[str], critics: Sequence[str]) -> str | None:
    """Halve the learning rate of who tells real pictures from drawn ones."""
    return _slow_down(chart, critics, "the discriminator's learning rate")


def raise_gamma(chart: Chart, dials: Dials, optimizers: Sequence[str], critics: Sequence[str]) -> str | None:
    """Double the gradient penalty, whichever of its two names it has."""
    return _double(chart, dials, "gamma") or _double(chart, dials, "penalty_weight")


def clamp_p(chart: Chart, dials: Dials, optimizers: Sequence[str], critics: Sequence[str]) -> str | None:
    """Keep probabilities of augmentation where they do not leak."""
    high = [name for name, dial in dials.items() if name.endswith("_p") and float(dial) > HIGHEST_P + ROUNDING]
    for name in high:
        dials[name].fill_(HIGHEST_P)
    return f"{' and '.join(high)} set to {HIGHEST_P}" if high else None


TURNS: dict[str, Act] = {act.__name__: act for act in (lower_lr, lower_critic_lr, raise_gamma, clamp_p)}
"""Acts by the names that `Illness.acts` uses; "restore" and "stop" are the practice's."""


def within(factor: float) -> float:
    """A factor on the recipe, brought into its limits.

    >>> within(1 / 8), within(2.0)
    (0.25, 2.0)
    """
    return min(LIMIT, max(1 / LIMIT, factor))


def _slow_down(chart: Chart, optimizers: Sequence[str], what: str) -> str | None:
    before = dict(chart.lr)
    chart.lr |= {key: within(chart.lr.get(key, 1.0) / STEP) for key in optimizers}
    return f"{what} halved" if chart.lr != before else None


def _double(chart: Chart, dials: Dials, name: str) -> str | None:
    before = chart.dials.get(name, 1.0)
    factor = within(before * STEP)
    if name not in dials or factor == before or not float(dials[name]):
        return None
    dials[name].mul_(factor / before)
    chart.dials[name] = factor
    return f"{name} doubled"
