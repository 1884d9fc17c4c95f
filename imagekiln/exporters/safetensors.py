"""One safetensors file whose metadata says how to use it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from imagekiln.engine.generate import Model, load_model
from imagekiln.engine.run import disk_faults


def write(model: Model, out: Path) -> dict[str, Any]:
    """Copy the weights file, load it back, and compare every tensor."""
    path = out / "model.safetensors"
    with disk_faults(path):
        shutil.copyfile(model.weights, path)
    again, ours = load_model(path, "cpu").family.state_dict(), model.family.state_dict()
    prefixes = tuple(f"{name}." for name in model.family.averaged)
    difference = max(
        float((ours[key].double() - again[key].double()).abs().max()) for key in ours if key.startswith(prefixes)
    )
    same = "equal to" if difference == 0 else f"up to {difference:.2g} away from"
    return {
        "format": "safetensors",
        "path": str(path),
        "difference": difference,
        "sentence": f"Wrote {path}; loaded back, its weights are {same} the run's.",
    }
