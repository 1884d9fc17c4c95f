"""Whether a model draws today what it drew at release: pictures of fixed seeds, kept in the run and compared later.

The release record holds the pictures (uint8), their sha256 and mean features, the hash of the weights, and what drew
them. One seed is one picture, so the same weights on the same machine give the same bits; another processor, number of
threads or torch version may round differently.

Shapes: N pictures, F features.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from imagekiln.core import mix
from imagekiln.data import to_float
from imagekiln.engine import device as devices
from imagekiln.engine.generate import draw, options_for
from imagekiln.engine.models import Model, hash_of
from imagekiln.engine.run import Run, write_whole
from imagekiln.engine.tracker import Say
from imagekiln.errors import UsageError
from imagekiln.metrics import RandomConv, extract

RELEASE_PICTURES = 64
ROUNDING_LEVELS = 2
"""Largest difference of a pixel, of 255, that is put down to rounding (another processor, another version)."""


def check(run: Run, model: Model, release: bool, say: Say) -> dict[str, Any] | None:
    """Draw the pictures of the fixed seeds and compare them with the release record, or write it where there is none.

    release: write it anew. The answer has `state` (recorded, equal, rounding or changed) and a `sentence`; None for a
    family that draws nothing.

    Raises:
        UsageError: the record is damaged. DiskError: it cannot be written.
    """
    if not model.family.draws:
        return None
    path = run.release_path
    known = None if release else _read_release(path)
    say(f"Drawing {RELEASE_PICTURES} pictures of fixed seeds.")
    seeds = [mix("release", index) for index in range(RELEASE_PICTURES)]
    wanted = model.wishes(RELEASE_PICTURES)
    with model.precision():
        images = draw(model.family, seeds, wanted, options_for(model.family, {}), RELEASE_PICTURES).contiguous()
    about = {
        "sha256": hashlib.sha256(images.numpy().tobytes()).hexdigest(),
        "weights_hash": hash_of(model.weights),
        "weights": model.weights.name,
        "torch": torch.__version__,
        "device": devices.describe(model.device),
        "num_pictures": len(images),
    }
    channels, height, width = images.shape[1:]
    features_NF = extract(RandomConv((channels, height, width)), [to_float(images)])
    if known is None:
        tensors = {"images": images, "mean_features": features_NF.double().mean(0)}
        write_whole(path, to_bytes(tensors, {"format": "imagekiln release", "about": json.dumps(about)}))
        sentence = f"A release record of {len(images)} pictures was written; later calls compare with it."
        return {"state": "recorded", "sentence": sentence, "now": about}
    return _compared(images, features_NF, about, *known)


def _compared(
    images: Tensor, features_NF: Tensor, now: dict[str, Any], then_images: Tensor, then_mean_F: Tensor, then: dict
) -> dict[str, Any]:
    """The state of generation against the record: equal, rounding or changed, and what else is different."""
    same_shape = images.shape == then_images.shape
    levels = int((images.int() - then_images.int()).abs().max()) if same_shape else 255
    state = "equal" if now["sha256"] == then["sha256"] else "rounding" if levels <= ROUNDING_LEVELS else "changed"
    spread_F = features_NF.double().std(0)
    moved_F = (features_NF.double().mean(0) - then_mean_F) / spread_F.where(spread_F > 0, 1.0)
    said = {
        "equal": "Generation is what it was at release, bit for bit.",
        "rounding": f"Generation is what it was at release up to rounding (at most {levels} of 255).",
        "changed": f"Generation changed since release: pixels of the same seeds differ by up to {levels} of 255.",
    }[state]
    reasons = [key for key in ("weights_hash", "torch", "device") if now[key] != then.get(key)]
    if reasons:
        names = {"weights_hash": "the weights", "torch": "the torch version", "device": "the device"}
        said += f" Different since then: {', '.join(names[key] for key in reasons)}."
    return {
        "state": state,
        "sentence": said + (" If that is meant, --release writes a new record." if state == "changed" else ""),
        "max_difference": levels,
        "feature_shift": float(moved_F.square().mean().sqrt()),
        "different": reasons,
        "now": now,
        "release": then,
    }


def _read_release(path: Path) -> tuple[Tensor, Tensor, dict[str, Any]] | None:
    """Pictures, their mean features and facts of the release record; None where there is none.

    Raises:
        UsageError: it is damaged.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["about"])
            images, mean_F = file.get_tensor("images"), file.get_tensor("mean_features")
        if (
            not {"sha256", "weights_hash"} <= about.keys()
            or hashlib.sha256(images.numpy().tobytes()).hexdigest() != about["sha256"]
        ):
            raise ValueError("its pictures are not those it names")
        return images, mean_F, about
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise UsageError(f"The release record {path} is damaged ({error}): write a new one with --release.") from None
