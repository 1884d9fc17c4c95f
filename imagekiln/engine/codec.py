"""Codecs: a trained autoencoder between pictures and the latents that a family learns from.

`data.codec` names the run of a family that encodes and decodes. Latents are made once, kept in the cache, and scaled by
one shift and one factor to mean 0 and standard deviation 1 over the training set (Rombach et al. 2022, section 3.3):
the numbers behind `shift_factor` and `scaling_factor` of diffusers' autoencoders. A run keeps a copy of its codec, so
that it draws without the autoencoder's run.

Shapes: N pictures, B of them in a batch, C channels, H rows, W columns; a latent has its own C, H and W.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from imagekiln.core import Batch
from imagekiln.data import cache_folder, to_float
from imagekiln.data.buckets import Buckets, in_groups
from imagekiln.engine.run import Run, aside_of, disk_faults, write_whole

BATCH, PIXELS = 64, 2**19
"""Pictures encoded or decoded at once, and the most pixels of them: memory is bounded for large ones."""


@runtime_checkable
class Coder(Protocol):
    """What a family offers that can be a codec."""

    def encode(self, images: Tensor) -> Tensor:
        """latents_BCHW float32 of images_BCHW float32 in [-1, 1]; nothing random."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """images_BCHW float32 of latents_BCHW."""
        ...


class Codec:
    """An autoencoder with the two numbers that bring its latents to mean 0 and standard deviation 1.

    model: an opened model whose family is a `Coder` (`imagekiln.engine.models.Model`). data: the bytes of its weights
    file. shift, scale: None until `latents` takes them from a training set.
    """

    def __init__(self, model: Any, data: bytes, shift: float | None = None, scale: float | None = None) -> None:
        self.model, self.data = model, data
        self.shift, self.scale = shift, scale
        self.image_shape: tuple[int, int, int] = model.family.image_shape
        self.fingerprint = hashlib.blake2b(data, digest_size=16).hexdigest()

    def __deepcopy__(self, memo: Any) -> Codec:
        return self  # it does not change; a family's twin shares it

    @property
    def at_once(self) -> int:
        """Pictures that are encoded or decoded at once."""
        return max(1, min(BATCH, PIXELS // (self.image_shape[1] * self.image_shape[2])))

    def encode(self, images: Tensor) -> Tensor:
        """latents_BCHW float32 as a family learns them, of images_BCHW in [-1, 1]; on the codec's device."""
        return self.standard(self.raw(images))

    @torch.inference_mode()
    def raw(self, images: Tensor) -> Tensor:
        """latents_BCHW as the autoencoder makes them."""
        with self.model.precision():
            parts = images.to(self.model.device).split(self.at_once)
            return torch.cat([self._coder.encode(part).float() for part in parts])

    def standard(self, latents: Tensor) -> Tensor:
        """Raw latents as a family learns them."""
        shift, scale = self._scales
        return (latents - shift) / scale

    def decode(self, latents: Tensor) -> Tensor:
        """images_BCHW float32 of latents as a family draws them, on their device."""
        self.model.family.to(latents.device)
        shift, scale = self._scales
        with self.model.precision():
            parts = (latents * scale + shift).split(self.at_once)
            return torch.cat([self._coder.decode(part).float() for part in parts])

    def keep(self, run: Run) -> None:
        """Copy this codec into a run."""
        shift, scale = self._scales
        write_whole(run.codec_path, self.data)
        write_whole(run.codec_scales_path, json.dumps({"shift": shift, "scale": scale}) + "\n")

    def measure(self, parts: Callable[[], Iterable[np.ndarray]]) -> None:
        """Take shift and scale from a training set's raw latents. parts: gives all of them, part by part."""
        total = sum(part.size for part in parts())
        shift = float(sum(part.astype(np.float64).sum() for part in parts()) / total)
        variance = float(sum(((part.astype(np.float64) - shift) ** 2).sum() for part in parts()) / total)
        self.shift, self.scale = shift, variance**0.5 or 1.0

    @property
    def _scales(self) -> tuple[float, float]:
        if self.shift is None or self.scale is None:
            raise RuntimeError("A codec has no scales before a training set's latents were made.")
        return self.shift, self.scale

    @property
    def _coder(self) -> Any:
        return self.model.family


# -- latents as a source ----------------------------------------------------------------------------------------------


class Latents:
    """The latents of a source's pictures, after them those of the mirrored ones where there are any.

    pictures: the source they were made of. raw_NCHW: as the autoencoder made them; of pictures in shapes of their own
        as in `imagekiln.data.buckets`. shapes_N2: rows and columns of each, None where all are alike.
    """

    def __init__(self, pictures: Any, raw_NCHW: np.ndarray, codec: Codec) -> None:
        self.pictures, self.codec, self._raw_NCHW = pictures, codec, raw_NCHW
        self._copies = len(raw_NCHW) // max(1, len(pictures))
        self.image_shape: tuple[int, int, int] = raw_NCHW.shape[1:]
        self._buckets: Buckets | None = None
        self.shapes_N2: np.ndarray | None = None
        if (shapes_N2 := getattr(pictures, "shapes_N2", None)) is not None:
            side = math.isqrt(raw_NCHW.shape[-1])
            self.image_shape = raw_NCHW.shape[1], side, side
            self.shapes_N2 = np.tile(shapes_N2 // (pictures.image_shape[1] // side), (self._copies, 1))
            self._buckets = Buckets(raw_NCHW, self.shapes_N2)
        self.num_classes, self.class_names = pictures.num_classes, pictures.class_names
        both = f"{pictures.fingerprint}:{codec.fingerprint}:{self._copies}"
        self.fingerprint = hashlib.blake2b(both.encode(), digest_size=16).hexdigest()
        captions, labels = getattr(pictures, "captions", None), getattr(pictures, "labels_N", None)
        self.captions: Sequence[str] | None = None if captions is None else list(captions) * self._copies
        self.labels_N: Tensor | None = None if labels is None else labels.repeat(self._copies)

    def __len__(self) -> int:
        return len(self._raw_NCHW)

    def read(self, indices: Sequence[int]) -> Batch:
        """The latents at these indices: latents_BCHW float32 with mean 0 and standard deviation 1 over the set."""
        chosen = np.asarray(indices, np.int64)
        raw_BCHW = self._raw_NCHW[chosen] if self._buckets is None else self._buckets.read(chosen)
        labels = None if self.labels_N is None else self.labels_N[torch.from_numpy(chosen)]
        return Batch(self.codec.standard(torch.from_numpy(raw_BCHW.astype(np.float32))), labels)

    def parts(self) -> Iterator[np.ndarray]:
        """All raw latents, a few thousand of one shape at a time."""
        if self._buckets is not None:
            yield from (self._buckets.read(rows) for rows in in_groups(self._buckets.shapes_N2, 4096))
        else:
            yield from (self._raw_NCHW[start : start + 4096] for start in range(0, len(self), 4096))


def latents(codec: Codec, source: Any, mirrored: bool = False) -> Latents:
    """The latents of a source, from the cache or made now; a codec without scales takes them from these.

    mirrored: also those of the pictures mirrored left to right, as pictures of their own.

    Raises:
        DiskError: the cache cannot be written.
    """
    key = hashlib.blake2b(f"{codec.fingerprint}:{source.fingerprint}:{mirrored}".encode(), digest_size=16).hexdigest()
    path = cache_folder() / "latents" / f"{key}.npy"
    if not path.is_file():
        _encode_all(codec, source, path, mirrored)
    made = Latents(source, np.load(path, mmap_mode="r", allow_pickle=False), codec)
    if codec.scale is None:
        codec.measure(made.parts)
    return made


def _encode_all(codec: Codec, source: Any, path: Path, mirrored: bool) -> None:
    """Write the latents of every picture, then those of the mirrored ones: (N, C, H, W) float16, or (N, C, 1, P) of
    pictures in shapes of their own."""
    count, shapes_N2 = len(source), getattr(source, "shapes_N2", None)
    groups = in_groups(np.zeros((count, 2), np.int64) if shapes_N2 is None else shapes_N2, codec.at_once)
    with disk_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = aside_of(path)
        try:
            stored = None
            for copy in range(1 + mirrored):
                for group in groups:
                    images = to_float(source.read(group.tolist()).images)
                    raw = codec.raw(images.flip(-1) if copy else images).cpu().numpy().astype(np.float16)
                    if shapes_N2 is not None:
                        side = source.image_shape[1] // (images.shape[2] // raw.shape[2])
                        raw = raw.reshape(*raw.shape[:2], 1, -1)
                        raw = np.pad(raw, ((0, 0), (0, 0), (0, 0), (0, side * side - raw.shape[-1])))
                    if stored is None:
                        shape = (count * (1 + mirrored), *raw.shape[1:])
                        stored = np.lib.format.open_memmap(aside, "w+", np.float16, shape)
                    stored[copy * count + group] = raw
            if stored is not None:
                stored.flush()
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
