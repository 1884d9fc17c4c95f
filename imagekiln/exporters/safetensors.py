"""One safetensors file whose metadata says how to use it; beside it the codec of a model that draws latents."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from imagekiln.core import Family
from imagekiln.engine.codec import Codec
from imagekiln.engine.models import Model, load_model
from imagekiln.engine.run import Run, disk_faults


def write(model: Model, out: Path) -> dict[str, Any]:
    """Copy the weights file, load it back, and compare every tensor.

    A model on latents finds its codec as it does in a run: the file lies in `weights/`, the codec in a folder beside.
    """
    codec = model.family.codec
    latent = isinstance(codec, Codec)
    path = out / "weights" / "model.safetensors" if latent else out / "model.safetensors"
    with disk_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(model.weights, path)
    if isinstance(codec, Codec):
        codec.keep(Run.of_weights(path))
    again = load_model(path, "cpu").family
    difference = _difference(model.family, again)
    beside = ""
    if isinstance(codec, Codec) and isinstance(again.codec, Codec):
        theirs = again.codec
        parts = [abs((codec.shift or 0) - (theirs.shift or 0)), abs((codec.scale or 0) - (theirs.scale or 0))]
        difference = max(difference, *parts, _difference(codec.model.family, theirs.model.family))
        beside = f" Its codec lies in {Run.of_weights(path).codec_path.parent}; keep the two folders side by side."
    same = "equal to" if difference == 0 else f"up to {difference:.2g} away from"
    return {
        "format": "safetensors",
        "path": str(path),
        "difference": difference,
        "codec": str(Run.of_weights(path).codec_path) if latent else "",
        "sentence": f"Wrote {path}; loaded back, its weights are {same} the run's.{beside}",
    }


def _difference(ours: Family, theirs: Family) -> float:
    """Largest difference of a number in the averaged modules."""
    prefixes = tuple(f"{name}." for name in ours.averaged)
    one, other = ours.state_dict(), theirs.state_dict()
    return max(float((one[k].double() - other[k].double()).abs().max()) for k in one if k.startswith(prefixes))
