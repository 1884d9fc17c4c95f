"""The doctor's memory of a run: numbers so far, what was told and what was turned. It is in every checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Haven:
    """A moment when nothing was wrong.

    criterion: held-out, lower is better; None where nothing was measured. left_for: illnesses for which the training
    went back here.
    """

    nimg: int
    criterion: float | None = None
    left_for: list[str] = field(default_factory=list)


@dataclass
class Chart:
    """Everything the doctor remembers; plain values, so that JSON holds it exactly.

    rows: one a look. sums, counts: of what was logged since the last look. heard: from a validation since then.
    kinds: histograms of the last drawn pictures. seen_nimg, treated_nimg: when an illness last showed, or was treated.
    lr, dials: factors on what the recipe says. havens: at most two moments worth going back to, oldest first; where
    there is a criterion, the best one and the best before it.
    """

    rows: list[dict[str, float]] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    heard: dict[str, float] = field(default_factory=dict)
    kinds: list[list[int]] = field(default_factory=list)
    seen_nimg: dict[str, int] = field(default_factory=dict)
    treated_nimg: dict[str, int] = field(default_factory=dict)
    lr: dict[str, float] = field(default_factory=dict)
    dials: dict[str, float] = field(default_factory=dict)
    havens: list[Haven] = field(default_factory=list)
    restores: int = 0
    stopped: bool = False

    def __post_init__(self) -> None:
        self.havens = [_haven(one) for one in self.havens]

    def keep(self, haven: Haven) -> bool:
        """Remember a healthy moment if it is the best so far; without a criterion the last one is. False if it is not.

        >>> chart = Chart()
        >>> [chart.keep(Haven(nimg, value)) for nimg, value in ((8, 5.0), (16, 3.0), (24, 4.0), (32, 2.0))]
        [True, True, False, True]
        >>> [haven.nimg for haven in chart.havens]
        [16, 32]
        """
        best = self.havens[-1].criterion if self.havens else None
        if haven.criterion is None:
            better = best is None
        else:
            better = haven.criterion < (math.inf if best is None else best)  # NaN never is
        if better:
            self.havens = [*self.havens[-1:], haven]
        return better

    def haven(self, illness: str) -> Haven | None:
        """Where to go back to: the best moment, unless the same illness came again from there, else the one before.

        Without a criterion it is the older one at once, because a diagnosis comes late.
        """
        if self.havens and self.havens[-1].criterion is not None and illness not in self.havens[-1].left_for:
            return self.havens[-1]
        return self.havens[0] if self.havens else None


def _haven(kept: Haven | Mapping[str, Any] | int) -> Haven:
    """From what a checkpoint keeps; in older ones it is the images seen alone."""
    if isinstance(kept, int):
        return Haven(kept)
    return kept if isinstance(kept, Haven) else Haven(**kept)
