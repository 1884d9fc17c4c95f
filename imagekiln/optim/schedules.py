"""Learning-rate schedules as pure functions of the share of the run that is done."""

from __future__ import annotations

from imagekiln.core import half_cosine
from imagekiln.errors import RecipeError, did_you_mean

SCHEDULES = ("constant", "linear", "cosine")


def multiplier(schedule: str, fraction: float, warmup_fraction: float = 0.0, end_ratio: float = 0.0) -> float:
    """What the peak learning rate is multiplied with, in [0, 1].

    It rises linearly from 0 to 1 during the first `warmup_fraction` of the run, then stays ("constant") or falls to
    `end_ratio` at the end of it, along a line or half a cosine. `fraction` is images seen over images in total, so the
    schedule does not depend on batch size, accumulation or resumption. Raises `RecipeError` for an unknown name.

    >>> [round(multiplier("cosine", fraction, 0.2), 3) for fraction in (0.1, 0.2, 0.6, 1.0)]
    [0.5, 1.0, 0.5, 0.0]
    """
    if schedule not in SCHEDULES:
        raise RecipeError(f"No schedule is called {schedule!r}. {did_you_mean(schedule, SCHEDULES)}")
    fraction = min(1.0, max(0.0, fraction))
    if fraction < warmup_fraction:
        return fraction / warmup_fraction
    if schedule == "constant" or warmup_fraction >= 1:
        return 1.0
    rest = (fraction - warmup_fraction) / (1 - warmup_fraction)
    return 1 - (1 - end_ratio) * rest if schedule == "linear" else half_cosine(1.0, end_ratio, rest)
