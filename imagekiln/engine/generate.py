"""From weights to pictures: one seed, one picture, whatever the batch size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from imagekiln.config import parse
from imagekiln.core import UNLABELLED, Condition, Family, mix, seeded_noise
from imagekiln.data import to_uint8
from imagekiln.errors import RecipeError, UsageError, did_you_mean, is_out_of_memory

MAX_IMAGES = 1_000_000

Wish = int | str
"""What a picture should show: a label (-1 = anything), or words."""


class Beginning(Protocol):
    """A picture that drawing begins with (`imagekiln.engine.starting`)."""

    def condition(self, condition: Condition, count: int) -> Condition:
        """The condition of so many pictures, with this beginning."""
        ...

    def restored(self, images_BCHW: Tensor) -> Tensor:
        """Drawn pictures with what is kept put back."""
        ...


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
def draw(family: Family, seeds: Sequence[int], wishes: Sequence[Wish], options: Any = None, batch: int = 64) -> Tensor:
    """Pictures of these seeds that show what is wished for: (N, C, H, W) uint8 on the CPU."""
    parts = list(stream(family, seeds, wishes, options, batch))
    return torch.cat(parts) if parts else torch.empty(0, *family.picture_shape, dtype=torch.uint8)


def stream(
    family: Family,
    seeds: Sequence[int],
    wishes: Sequence[Wish],
    options: Any = None,
    batch: int = 64,
    start: Beginning | None = None,
) -> Iterator[Tensor]:
    """Like `draw`, a batch at a time; an allocation that fails is retried in halves. start: where drawing begins."""
    where = next(family.parameters()).device

    def part(some: slice) -> Tensor:
        noise = seeded_noise(seeds[some], family.noise_shape()).to(where)
        condition = asked_for(family, wishes[some])
        if start is None:
            return pictured(family, noise, condition, options)
        return start.restored(pictured(family, noise, start.condition(condition, len(noise)), options))

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
        except Exception as error:
            if batch == 1 or not is_out_of_memory(error):
                raise
            batch = max(1, batch // 2)
            continue
        start += len(images)
        yield to_uint8(images.float()).cpu()


def pictured(family: Family, noise: Tensor, condition: Condition, options: Any = None) -> Tensor:
    """What a family makes of noise, as pictures: images_BCHW float in [-1, 1]; latents are decoded."""
    return _decoded(family, family.sample(noise, condition, options))


def invents(family: Family) -> bool:
    """Whether what a family draws of noise shows what it learned; an autoencoder only gives pictures back."""
    return family.draws and math.isfinite(family.drawing_cost())


def reconstructed(family: Family, images: Tensor) -> Tensor | None:
    """What a family makes of given pictures, images_BCHW in [-1, 1], through its codec; None where it makes nothing."""
    made = family.reconstruct(images if family.codec is None else family.codec.encode(images))
    return None if made is None else _decoded(family, made)


def _decoded(family: Family, drawn: Tensor) -> Tensor:
    return (drawn if family.codec is None else family.codec.decode(drawn)).clamp(-1, 1)


def asked_for(family: Family, wishes: Sequence[Wish]) -> Condition:
    """These wishes as a family takes them. Raises `UsageError` for words to a family that reads none."""
    where = next(family.parameters()).device
    if any(isinstance(wish, str) for wish in wishes):
        return Condition(text=read(family, [wish if isinstance(wish, str) else "" for wish in wishes]).to(where))
    return Condition(labels=torch.tensor(wishes, dtype=torch.int64, device=where) if family.num_classes else None)


def read(family: Family, captions: Sequence[str]) -> Tensor:
    """Captions as a family takes them, on the CPU. Raises `UsageError` for a family that reads none."""
    text = family.read(captions)
    if text is None:
        raise UsageError(f"A {family.config.name} model reads no text.")
    return text.cpu()


def seeds_for(seed: int, count: int) -> list[int]:
    """The seeds of the pictures 0, 1, 2, ... of `generate`."""
    return [mix(seed, "generate", index) for index in range(count)]
