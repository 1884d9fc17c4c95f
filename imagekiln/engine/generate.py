"""From weights to pictures: one seed, one picture, whatever the batch size."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from imagekiln.config import Recipe, parse
from imagekiln.core import UNLABELLED, Condition, Family, Source, mix, seeded_noise
from imagekiln.data import to_uint8
from imagekiln.engine import device as devices
from imagekiln.engine import recipe as recipes
from imagekiln.engine.run import Run, write_whole
from imagekiln.errors import RecipeError, UsageError, did_you_mean

MAX_IMAGES = 1_000_000


@dataclass
class Model:
    """A trained family, ready to draw."""

    family: Family
    recipe: Recipe
    class_names: tuple[str, ...]
    weights: Path
    device: torch.device

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """The autocast context the model was trained in, as far as this device has it."""
        dtype = devices.autocast_dtype(self.recipe.train.precision, self.device)
        return contextlib.nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    def label(self, name: str) -> int:
        """The number of a class given by name or number.

        Raises:
            UsageError: the model knows no classes, or not this one.
        """
        if not self.class_names:
            raise UsageError(f"--label {name!r}: this model was trained without labels. Leave --label out.")
        if name in self.class_names:
            return self.class_names.index(name)
        if name.isdecimal() and int(name) < len(self.class_names):
            return int(name)
        raise UsageError(f"--label {name!r}: no such class. {did_you_mean(name, self.class_names)}")


def save_weights(path: Path, family: Family, recipe: Recipe, source: Source) -> None:
    """Write the averaged modules with everything needed to use them in the file's own metadata."""
    prefixes = tuple(f"{name}." for name in family.averaged)
    tensors = {k: v.detach().cpu().contiguous() for k, v in family.state_dict().items() if k.startswith(prefixes)}
    metadata = {
        "format": "imagekiln",
        "recipe": json.dumps(recipe.model_dump(mode="json")),
        "image_shape": json.dumps(list(family.image_shape)),
        "class_names": json.dumps(list(source.class_names)),
        "num_classes": str(family.num_classes),
    }
    write_whole(path, to_bytes(tensors, metadata))


def load_model(path: Path, device: str = "auto") -> Model:
    """A model from a weights file.

    Raises:
        UsageError: the file is not one of ours, or its family is not here.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
        recipe = recipes.complete(json.loads(metadata["recipe"]))
        shape = json.loads(metadata["image_shape"])
        family = recipes.build(recipe, tuple(shape), int(metadata["num_classes"]))
        missing = family.load_state_dict(tensors, strict=False)
        if missing.unexpected_keys:
            raise KeyError(missing.unexpected_keys[0])
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise UsageError(f"{path} is not a weights file of this version of imagekiln ({error}).") from error
    chosen = devices.choose(device)
    family = devices.place(family, chosen).eval().requires_grad_(False)
    return Model(family, recipe, tuple(json.loads(metadata["class_names"])), path, chosen)


def open_model(run: Run, nimg: int | None = None, average: str | None = None, device: str = "auto") -> Model:
    """The model of a run: its best moment and first average unless told otherwise."""
    return load_model(run.weights(nimg, average), device)


def labels_for(count: int, num_classes: int) -> list[int]:
    """Labels of a grid that shows every class equally often (0, 1, 2, ..., 0, 1, ...); -1 without classes."""
    if num_classes < 1:
        return [UNLABELLED] * count
    whole = count - count % num_classes if num_classes <= count else count
    return [index % num_classes for index in range(whole)]


def options_for(family: Family, given: dict[str, Any]) -> Any:
    """The family's sampling options with the given ones laid over them.

    Raises:
        UsageError: the family has no such option.
    """
    sample = getattr(family.config, "sample", None)
    given = {key: value for key, value in given.items() if value is not None}
    if not given or sample is None:
        for key in given:
            raise UsageError(f"--{key}: a {family.config.name} model has no sampling options.")
        return sample
    known = list(type(sample).model_fields)
    for key in given:
        if key not in known:
            raise UsageError(f"--{key}: a {family.config.name} model has no such option. {did_you_mean(key, known)}")
    try:
        return parse(type(sample), {**sample.model_dump(), **given}, "sample")
    except RecipeError as error:
        raise UsageError(str(error)) from None


@torch.inference_mode()
def draw(family: Family, seeds: Sequence[int], labels: Sequence[int], options: Any = None, batch: int = 64) -> Tensor:
    """Pictures of these seeds and labels: (N, C, H, W) uint8 on the CPU."""
    parts = list(stream(family, seeds, labels, options, batch))
    return torch.cat(parts) if parts else torch.empty(0, *family.image_shape, dtype=torch.uint8)


def stream(
    family: Family, seeds: Sequence[int], labels: Sequence[int], options: Any = None, batch: int = 64
) -> Iterator[Tensor]:
    """Like `draw`, a batch at a time; an allocation that fails is retried in halves."""
    where = next(family.parameters()).device

    def part(some: slice) -> Tensor:
        noise = seeded_noise(seeds[some], family.noise_shape()).to(where)
        return family.sample(noise, asked_for(family, labels[some]), options)

    yield from in_parts(part, len(seeds), batch)


@torch.inference_mode()
def in_parts(part: Callable[[slice], Tensor], count: int, batch: int = 64) -> Iterator[Tensor]:
    """`count` pictures as uint8 on the CPU, a batch at a time; an allocation that fails is retried in halves.

    part: makes the pictures of a slice, images_BCHW float in [-1, 1].
    """
    start = 0
    while start < count:
        try:
            images = part(slice(start, min(count, start + batch)))
        except (torch.OutOfMemoryError, MemoryError):
            if batch == 1:
                raise
            batch = max(1, batch // 2)
            continue
        start += len(images)
        yield to_uint8(images.float()).cpu()


def asked_for(family: Family, labels: Sequence[int]) -> Condition:
    """These labels as a family takes them."""
    if not family.num_classes:
        return Condition()
    return Condition(labels=torch.tensor(labels, dtype=torch.int64, device=next(family.parameters()).device))


def seeds_for(seed: int, count: int) -> list[int]:
    """The seeds of the pictures 0, 1, 2, ... of `generate`."""
    return [mix(seed, "generate", index) for index in range(count)]
