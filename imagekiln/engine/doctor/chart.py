"""The doctor's memory of a run: numbers so far, what was told and what was turned. It is in every checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Chart:
    """Everything the doctor remembers; plain values, so that JSON holds it exactly.

    rows: one a look. sums, counts: of what was logged since the last look. heard: from a validation since then.
    kinds: histograms of the last drawn pictures. seen_nimg, treated_nimg: when an illness last showed, or was treated.
    lr, dials: factors on what the recipe says. havens: moments worth going back to, oldest first.
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
    havens: list[int] = field(default_factory=list)
    restores: int = 0
    stopped: bool = False
