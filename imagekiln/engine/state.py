"""What a run remembers besides tensors, and who is told how it goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from imagekiln.engine.doctor.chart import Chart


class Listener(Protocol):
    """Who is told how it goes: the console, stats.jsonl, TensorBoard (see `engine.tracker`)."""

    def tick(self, row: Mapping[str, Any]) -> None: ...
    def say(self, sentence: str) -> None: ...
    def preview(self, nimg: int, picture: Any) -> None: ...


@dataclass
class State:
    """Plain values, all of them in every checkpoint."""

    nimg: int = 0
    attempt: int = 0  # mixed into every seed, so that a window that was rolled back is not repeated as it was
    lr_scale: float = 1.0
    rollbacks: int = 0
    accumulate: int = 1
    skipped_nimg: list[int] = field(default_factory=list)
    best_loss: float | None = None
    best_nimg: int | None = None
    best_average: str | None = None
    stale_validations: int = 0
    train_sec: float = 0.0
    doctor: Chart = field(default_factory=Chart)

    def __post_init__(self) -> None:
        if isinstance(self.doctor, Mapping):  # as a checkpoint keeps it
            self.doctor = Chart(**self.doctor)


def parts_of(batch: int, least: int) -> int:
    """The fewest equal parts a batch can be computed in, at least so many where it has as many pictures.

    >>> parts_of(12, 1), parts_of(12, 5), parts_of(7, 2), parts_of(8, 100)
    (1, 6, 7, 8)
    """
    return next((parts for parts in range(least, batch) if batch % parts == 0), batch)
