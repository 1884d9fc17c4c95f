"""The records tool: one measured result, one JSON file, with everything needed to believe and repeat it.

A record is written whole or not at all, never overwritten, and refuses a number that is not finite. Numbers shown in
the README come from these files and from nowhere else.

    {"name", "date", "command", "hardware", "versions", "commit",
     "rows": [{"what", "value", "unit", "n", "seeds", "interval", "sd", "raw"}], "notes", "facts"}
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "records"
PACKAGES = ("imagekiln", "torch", "numpy", "diffusers", "accelerate")


@dataclass(frozen=True)
class Row:
    """One number of a record.

    value: what is claimed; raw: the single measurements it was made from, in the order of `seeds` where there are any.
    n: pictures, rounds or steps behind every single measurement.
    interval: low and high; `what` or the record's notes say of what kind. sd: over `raw`, n - 1 in the denominator.

    >>> Row.of("FD of ours", [3.0, 4.0, 5.0], seeds=[0, 1, 2], n=5000).sd
    1.0
    """

    what: str
    value: float
    unit: str = ""
    n: int | None = None
    seeds: Sequence[int] = ()
    interval: tuple[float, float] | None = None
    sd: float | None = None
    raw: Sequence[float] = ()

    @classmethod
    def of(
        cls, what: str, values: Sequence[float], unit: str = "", seeds: Sequence[int] = (), n: int | None = None
    ) -> Row:
        """Mean and standard deviation of one measurement a seed."""
        sd = statistics.stdev(values) if len(values) > 1 else None
        return cls(what, statistics.fmean(values), unit, n, tuple(seeds), None, sd, tuple(values))

    @classmethod
    def median(cls, what: str, values: Sequence[float], unit: str = "", n: int | None = None) -> Row:
        """Median of repeated measurements; the interval is their smallest and largest."""
        return cls(what, statistics.median(values), unit, n, (), (min(values), max(values)), None, tuple(values))


def write_record(
    name: str, command: str, rows: Sequence[Row], *, notes: Sequence[str] = (), folder: Path = FOLDER, **facts: Any
) -> Path:
    """Write one record and return its file, `NAME-DATE.json`.

    command: what to type in the repository root to measure again; see `this_command`.
    facts: anything else worth keeping that JSON can say, under the record's key `facts`.

    Raises:
        ValueError: the name is no file name, there are no rows, or a number is not finite. Nothing is written then.
        DiskError: the file cannot be written.
    """
    from imagekiln.engine.run import write_whole

    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", name):
        raise ValueError(f"{name!r} does not name a record: use small letters, digits and dashes.")
    if not rows:
        raise ValueError(f"The record {name!r} has no rows, so there is nothing to write.")
    for row in rows:
        _refuse_non_finite(name, row)
    date = datetime.now(UTC)
    record = {
        "name": name,
        "date": date.isoformat(timespec="seconds"),
        "command": command,
        "hardware": hardware(),
        "versions": versions(),
        "commit": commit(),
        "rows": [asdict(row) for row in rows],
        "notes": list(notes),
        "facts": facts,
    }
    try:
        text = json.dumps(record, indent=1, allow_nan=False)
    except ValueError:
        raise ValueError(f"A fact of the record {name!r} is not a finite number; write null or leave it out.") from None
    path = _free(folder, f"{name}-{date:%Y%m%d-%H%M%S}")
    write_whole(path, text + "\n")
    return path


def newest(name: str, folder: Path = FOLDER) -> dict[str, Any] | None:
    """The latest record of this name, or None."""
    files = [
        path for path in folder.glob("*.json") if re.fullmatch(rf"{re.escape(name)}-\d{{8}}-\d{{6}}(-\d+)?", path.stem)
    ]
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(files, key=_age)]
    return records[-1] if records else None


def this_command() -> str:
    """The command line of this process as typed in the repository root; absolute paths are cut to their last part.

    Where somebody's pictures lie is nobody's business, and of no use on another machine.
    """
    script, *arguments = sys.argv
    return shlex.join(["python", f"benchmarks/{Path(script).name}", *(_without_folder(text) for text in arguments)])


def hardware() -> dict[str, Any]:
    """What it was measured on, and how busy that was."""
    import torch

    from imagekiln.engine import device

    memory_gb = None
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory_gb = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)
    return {
        "device": device.describe(device.choose("auto")),
        "processor": device.describe(torch.device("cpu")).rsplit(",", 1)[0],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": memory_gb,
        "load_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def versions() -> dict[str, str]:
    """Python, the system, and the packages that a measurement may depend on."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of the checkout, with `+changes` when files differ from it; None outside one."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--", ":/imagekiln", ":/benchmarks"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def _refuse_non_finite(name: str, row: Row) -> None:
    numbers = [row.value, *row.raw, *(row.interval or ()), *(() if row.sd is None else (row.sd,))]
    for number in numbers:
        if not math.isfinite(number):
            raise ValueError(f"The record {name!r} was given {row.what} = {number}: only finite numbers are results.")


def _free(folder: Path, stem: str) -> Path:
    """A file that does not exist yet: two records of one second get different names."""
    path, number = folder / f"{stem}.json", 2
    while path.exists():
        path, number = folder / f"{stem}-{number}.json", number + 1
    return path


def _age(path: Path) -> tuple[str, int]:
    stem, _, last = path.stem.rpartition("-")
    return (path.stem, 1) if len(last) == 6 and stem[-8:].isdigit() else (stem, int(last))


def _without_folder(text: str) -> str:
    option, equals, value = text.rpartition("=")
    return f"{option}{equals}{Path(value).name}" if Path(value).is_absolute() else text
