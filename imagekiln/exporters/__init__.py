"""Writers of other formats, each of which loads back what it wrote. The format's name is the module's name."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from imagekiln.engine.generate import open_model
from imagekiln.engine.run import Run, disk_faults
from imagekiln.errors import UsageError, did_you_mean


def names() -> list[str]:
    """The formats there are.

    >>> names()
    ['diffusers', 'safetensors']
    """
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_"))


def write(run: Run, to: str, out: Path) -> dict[str, Any]:
    """Export a run's best weights; the receipt holds the largest difference after loading back.

    Raises:
        UsageError: no such format, or this model does not fit it. DiskError: `out` cannot be written.
    """
    if to not in names():
        raise UsageError(f"--to {to!r}: no such format. {did_you_mean(to, names())}")
    model = open_model(run, device="cpu")
    with disk_faults(out):
        out.mkdir(parents=True, exist_ok=True)
    return importlib.import_module(f"imagekiln.exporters.{to}").write(model, out)
