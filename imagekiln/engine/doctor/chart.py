"""The doctor's memory of a run: numbers so far, what was told and what was turned. It is in every checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Haven:
    """A moment when nothing was wrong.

    best: whether held-out pictures said that none before was better; False where they were not asked. left_for:
    illnesses for which the training went back here.
    """

    nimg: int
    best: bool = False
    left_for: list[str] = field(default_factory=list)


@dataclass
class Chart:
    """Everything the doctor remembers; plain values, so that JSON holds it exactly.

    rows: one a look. sums, counts: of what was logged since the last look. heard: from a validation since then.
    kinds: histograms of the last drawn pictures. seen_nimg, treated_nimg: when an illness last showed, or was treated.
    lr, dials: factors on what the recipe says. havens: at most two moments worth going back to, oldest first; where
    held-out pictures are asked, the best one and the best before it.
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
        """Remember a healthy moment; False for one that nothing is known of where others are known to be the best.

        >>> chart = Chart()
        >>> [chart.keep(Haven(nimg, best)) for nimg, best in ((8, False), (16, True), (24, False), (32, True))]
        [True, True, False, True]
        >>> [haven.nimg for haven in chart.havens]
        [16, 32]
        """
        kept = haven.best or not any(one.best for one in self.havens)
        if kept:
            self.havens = [*self.havens[-1:], haven]
        return kept

    def haven(self, illness: str) -> Haven | None:
        """Where to go back to: the best moment, unless the same illness came again from there, else the one before.

        Where held-out pictures were not asked it is the older one at once, because a diagnosis comes late.
        """
        if self.havens and self.havens[-1].best and illness not in self.havens[-1].left_for:
            return self.havens[-1]
        return self.havens[0] if self.havens else None


def _haven(kept: Haven | Mapping[str, Any] | int) -> Haven:
    """From what a checkpoint keeps; in older ones it is the images seen alone."""
    if isinstance(kept, int):
        return Haven(kept)
    return kept if isinstance(kept, Haven) else Haven(**kept)
