"""The exact batch of pictures a training sees first, as they are and as they are changed, to look at before it starts.

Four files: `before.png` and `after.png` have one picture at one place, `batch.png` has them in pairs, and `batch.json`
says of every picture its position, file, class and caption, and what was done to it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imagekiln.config import Recipe
from imagekiln.core import Batch, Source, mix
from imagekiln.data import Loader, load, to_uint8
from imagekiln.data.augment import draw
from imagekiln.engine import augment, device, pictures
from imagekiln.engine.run import made_folder, write_whole
from imagekiln.engine.state import parts_of

MOST_SHOWN = 64
"""Pictures of a larger batch that are shown."""


def batches(recipe: Recipe, source: Source, position: int = 0) -> tuple[Batch, Batch]:
    """The batch that a run computes on after `position` pictures: (as the pictures are, as the run sees them).

    Both are whole batches as the trainer's loader makes them, images_BCHW float32 in [-1, 1] on the recipe's device;
    with `train.accumulate` it is the first part of a step. A run that was rolled back sees others.
    """
    train = recipe.train
    seed, size = mix(train.seed, 0), train.batch // parts_of(train.batch, train.accumulate)
    where = device.choose(train.device)
    after = augment.loader(recipe.data, source, seed, size, where, train.batch)
    return Loader(source, seed, size, where, stretch=train.batch).batch(position), after.batch(position)


def write(
    recipe: Recipe,
    out: Path,
    source: Any = None,
    position: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write the batch after `position` pictures into the folder `out`; returns what `batch.json` holds.

    source: pictures to train on; None reads those of the recipe. At most `MOST_SHOWN` are shown.

    Raises:
        DataError: there are no pictures. UsageError: no such data or device. DiskError: `out` cannot be written.
    """
    source = source if source is not None else load(recipe.data, progress=progress).train
    if recipe.data.buckets:
        source, position = source.shaped(), position - position % recipe.train.batch  # a step holds one shape
    before, after = (to_uint8(batch.images[:MOST_SHOWN]).cpu() for batch in batches(recipe, source, position))
    made_folder(out)
    columns = pictures.columns_for(len(before), 0)
    pairs = torch.stack([before, after], dim=1).flatten(0, 1)
    for name, images, width in (("before", before, columns), ("after", after, columns), ("batch", pairs, 2 * columns)):
        pictures.write(pictures.grid(images, width), out / f"{name}.png")
    told = {"position": position, "columns": columns, "pictures": _told(recipe, source, position, before)}
    write_whole(out / "batch.json", json.dumps(told, ensure_ascii=False, indent=1) + "\n")
    return told


def _told(recipe: Recipe, source: Source, position: int, images_BCHW: Tensor) -> list[dict[str, Any]]:
    """One entry a picture; what is not known of it is left out."""
    data, seed, count = recipe.data, mix(recipe.train.seed, 0), len(images_BCHW)
    loader = augment.loader(data, source, seed, count, "cpu", recipe.train.batch)
    indices = loader.order(position, count).tolist()
    labels = source.read(indices).labels
    files, captions = getattr(source, "files", None), getattr(source, "captions", None)
    mirrored = loader._mirrored(position) if data.flip else np.zeros(count, np.bool_)
    changes = draw(data.augment, seed, position, count, (images_BCHW.shape[2], images_BCHW.shape[3]))
    found = []
    for place, index in enumerate(indices):
        label = -1 if labels is None else int(labels[place])
        entry: dict[str, Any] = {"position": position + place, "index": index}
        entry |= {"file": files[index]} if files else {}
        entry |= {"label": label, "class": source.class_names[label]} if label >= 0 else {}
        entry |= {"caption": captions[index]} if captions and captions[index] else {}
        made = {name: changes[name][place].item() for name in changes.dtype.names or ()}
        made = {"mirrored": bool(mirrored[place])} | made
        entry["changes"] = {name: round(value, 4) for name, value in made.items() if value}
        found.append(entry)
    return found
