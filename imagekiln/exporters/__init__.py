"""Writers of other formats, each of which loads back what it wrote. The format's name is the module's name."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from imagekiln.engine.models import open_model
from imagekiln.engine.run import Run, made_folder, write_whole
from imagekiln.errors import UsageError, did_you_mean


def names() -> list[str]:
    """The formats there are.

    >>> names()
    ['comfyui', 'diffusers', 'safetensors']
    """
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_"))


def write(run: Run, to: str, out: Path) -> dict[str, Any]:
    """Export a run's best weights; the receipt, also in receipt.json, has the largest difference after loading back.

    Raises:
        UsageError: no such format, or this model does not fit it. DiskError: `out` cannot be written.
    """
    if to not in names():
        raise UsageError(f"--to {to!r}: no such format. {did_you_mean(to, names())}")
    model = open_model(run, device="cpu")
    made_folder(out)
    receipt: dict[str, Any] = importlib.import_module(f"imagekiln.exporters.{to}").write(model, out)
    write_whole(out / "receipt.json", json.dumps(receipt, indent=2) + "\n")
    return receipt
