"""Measurements that a run keeps, each with the options its pictures were drawn with."""

from __future__ import annotations

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


def keep(run: Run, rows: Sequence[Measurement], options: Mapping[str, Any]) -> None:
    """Add measurements of pictures that were drawn with these options."""
    for row in rows:
        run.append_measurement(json.loads(row.to_json()) | {"options": dict(options), "unix_sec": round(time.time())})


def kept(run: Run) -> list[Kept]:
    """All measurements of a run, oldest first; a row that is none is left out."""
    found = []
    for row in run.measurements():
        if isinstance(row, Mapping):
            fields = {key: value for key, value in row.items() if key not in ("options", "unix_sec")}
            try:
                found.append(Kept(Measurement.from_json(json.dumps(fields)), row.get("options") or {}))
            except UsageError:
                continue
    return found
