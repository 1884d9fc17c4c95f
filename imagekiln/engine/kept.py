"""Measurements that a run keeps, each with the options its pictures were drawn with."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from imagekiln.engine.run import Run
from imagekiln.errors import UsageError
from imagekiln.metrics import Measurement


class Kept(NamedTuple):
    """options: how the pictures were drawn, where that is not as the run draws by default; {} = by default."""

    measurement: Measurement
    options: Mapping[str, Any]

    def record(self) -> dict[str, Any]:
        """As plain values."""
        return json.loads(self.measurement.to_json()) | {"options": dict(self.options)}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Kept:
        """What `record` gave. Raises `UsageError` for anything else."""
        fields = {key: value for key, value in record.items() if key not in ("options", "unix_sec")}
        return cls(Measurement.from_json(json.dumps(fields)), record.get("options") or {})

    @property
    def drawn_with(self) -> str:
        """The options in words, "" where there are none."""
        return ", ".join(f"{key} {value}" for key, value in self.options.items())


def keep(run: Run, rows: Sequence[Measurement], options: Mapping[str, Any]) -> None:
    """Add measurements of pictures that were drawn with these options."""
    for row in rows:
        run.append_measurement(Kept(row, options).record() | {"unix_sec": round(time.time())})


def newest(run: Run) -> dict[str, Kept]:
    """The newest measurement of every label; one with options of drawing only where there is none without.

    Trying options on a run says nothing about how it draws by default, which is what it is known by.
    """
    found: dict[str, Kept] = {}
    for row in kept(run):
        label = row.measurement.label
        if label not in found or not row.options or found[label].options:
            found[label] = row
    return found


def kept(run: Run) -> list[Kept]:
    """All measurements of a run, oldest first; a row that is none is left out."""
    found = []
    for row in run.measurements():
        with contextlib.suppress(UsageError, AttributeError):
            found.append(Kept.of(row))
    return found
