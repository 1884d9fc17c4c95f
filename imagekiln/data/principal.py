"""Principal components: the directions a set's pictures vary in most, a map of the set in two of them, and its spread.

A picture x is x ~ mean + sum_k a_k v_k with orthonormal v_k, the leading eigenvectors of C = E (x - mean)(x - mean)^T.
C is never formed: block power iteration, V <- orthonormal basis of C V, then Rayleigh-Ritz in the last block, needs
one pass over the pictures an iteration and memory for the block and one batch (Halko, Martinsson, Tropp 2011,
arXiv:0909.4061, algorithms 4.4 and 5.3). Values are those a model sees: float in [-1, 1].

Shapes: N pictures, C channels, H rows, W columns, D = C H W, K components, P = K and what is computed beyond them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from imagekiln.data.measures import small_copies
from imagekiln.errors import DataError

FORMAT = "imagekiln principal components"

MOST_VALUES = 2**27
"""Numbers looked at in a pass: of a set with more, an even sample of its pictures is taken (44,000 of 32 px in RGB)."""

BATCH_VALUES, BLOCK_VALUES = 2**21, 2**24
PASSES = 24
CLOSE = 1e-5
"""The iteration ends when no variance changes by more than this share of the largest one."""


@dataclass(frozen=True)
class Principal:
    """What `fit` found.

    mean_D, components_KD: float32; the components are orthonormal rows. variance_K: along each of them, float64.
    total: variance of all directions together. num_pictures: how many were looked at.
    """

    image_shape: tuple[int, int, int]
    mean_D: np.ndarray
    components_KD: np.ndarray
    variance_K: np.ndarray
    total: float
    num_pictures: int

    @property
    def explained(self) -> np.ndarray:
        """Share of the variance that each component explains: (K,) float64."""
        return self.variance_K / self.total if self.total else np.zeros(len(self.variance_K))

    def needed(self, share: float) -> int | None:
        """How many components explain this share of the variance together; None where more than K are needed."""
        enough = np.flatnonzero(np.cumsum(self.explained) >= share)
        return int(enough[0]) + 1 if len(enough) else None

    def transform(self, images_NCHW: np.ndarray, rows: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """Coordinates (N, K) float32 of uint8 pictures; rows: which of them, all by default."""
        rows = np.arange(len(images_NCHW)) if rows is None else np.asarray(rows, np.int64)
        parts = [(part_BD - self.mean_D) @ self.components_KD.T for part_BD in _batches(images_NCHW, rows)]
        return np.concatenate(parts) if parts else np.zeros((0, len(self.components_KD)), np.float32)

    def inverse(self, coordinates_NK: np.ndarray) -> np.ndarray:
        """The pictures nearest to the mean that have these coordinates: images_NCHW float32, about [-1, 1]."""
        flat_ND = np.asarray(coordinates_NK, np.float32) @ self.components_KD + self.mean_D
        return flat_ND.reshape(-1, *self.image_shape)

    def save(self, path: Path) -> None:
        """Write everything as one safetensors file."""
        tensors = {"mean": self.mean_D, "components": self.components_KD, "variance": self.variance_K}
        about = {"image_shape": self.image_shape, "total": self.total, "num_pictures": self.num_pictures}
        path.write_bytes(save(tensors, {"format": FORMAT, "about": json.dumps(about)}))


def load(path: Path) -> Principal:
    """What `Principal.save` wrote. Raises `DataError` for any other file."""
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in ("mean", "components", "variance")}
        about = json.loads(metadata["about"])
        channels, height, width = map(int, about["image_shape"])
        K, D = tensors["components"].shape
        if metadata["format"] != FORMAT or channels * height * width != D or tensors["mean"].shape != (D,):
            raise ValueError("its parts do not fit together")
        total, count = float(about["total"]), int(about["num_pictures"])
    except (SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
        raise DataError(f"{path} holds no principal components of this program ({error}). Prepare again.") from None
    shape = (channels, height, width)
    return Principal(shape, tensors["mean"], tensors["components"], tensors["variance"][:K], total, count)


def fit(
    images_NCHW: np.ndarray, rows: Sequence[int] | np.ndarray | None = None, num_components: int = 50, seed: int = 0
) -> Principal:
    """Leading principal components of uint8 pictures, in memory or mapped from disk.

    rows: which pictures, all by default. num_components: K is this, or fewer where the set has no more directions.
    seed: of the first block and of the sample. Variances are divided by N - 1.

    Raises `DataError` for fewer than two pictures.

    >>> ramp = np.arange(0, 250, 10, dtype=np.uint8)[:, None, None, None] * np.ones((1, 3, 2, 2), np.uint8)
    >>> found = fit(ramp, num_components=2)
    >>> found.explained.round(6).tolist(), found.transform(ramp).shape
    ([1.0, 0.0], (25, 2))
    """
    rows = np.arange(len(images_NCHW)) if rows is None else np.asarray(rows, np.int64)
    if len(rows) < 2:
        raise DataError(f"Principal components need at least two pictures; there are {len(rows)}.")
    shape = tuple(int(side) for side in images_NCHW.shape[1:])
    D = int(np.prod(shape))
    generator = np.random.default_rng(seed)
    most = max(2, MOST_VALUES // D)
    if len(rows) > most:
        rows = np.sort(generator.choice(rows, most, replace=False))
    mean_D, total = _mean_and_total(images_NCHW, rows, D)
    K = max(1, min(num_components, D, len(rows) - 1))
    P = min(max(K + 10, min(2 * K + 10, BLOCK_VALUES // D)), D, len(rows))
    block_DP = np.linalg.qr(generator.standard_normal((D, P)))[0].astype(np.float32)
    variance_P = np.zeros(P)
    for _ in range(PASSES):
        product_DP = np.zeros((D, P), np.float32)
        for part_BD in _batches(images_NCHW, rows):
            part_BD -= mean_D
            product_DP += part_BD.T @ (part_BD @ block_DP)
        product_DP /= len(rows) - 1
        small_PP = (block_DP.T @ product_DP).astype(np.float64)
        values_P, turns_PP = np.linalg.eigh((small_PP + small_PP.T) / 2)
        leading_PK, before_P = turns_PP[:, ::-1][:, :K].astype(np.float32), variance_P
        variance_P = np.maximum(values_P[::-1], 0)
        if P == D or np.abs(variance_P - before_P)[:K].max() <= CLOSE * max(variance_P[0], 1e-30):
            break
        block_DP = np.linalg.qr(product_DP)[0]
    components_KD = _signed((block_DP @ leading_PK).T)
    return Principal(shape, mean_D, components_KD, variance_P[:K].copy(), total, len(rows))  # type: ignore[arg-type]


def channel_statistics(
    images_NCHW: np.ndarray, rows: Sequence[int] | np.ndarray | None = None
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of every channel over all pixels, of values in [-1, 1]; sums are exact.

    >>> channel_statistics(np.array([0, 255], np.uint8).reshape(2, 1, 1, 1))
    ([0.0], [1.0])
    """
    rows = np.arange(len(images_NCHW)) if rows is None else np.asarray(rows, np.int64)
    counts = np.zeros((images_NCHW.shape[1], 256), np.int64)
    step = max(1, BATCH_VALUES // max(1, int(np.prod(images_NCHW.shape[1:]))))
    for start in range(0, len(rows), step):
        part_BCHW = small_copies(images_NCHW, rows[start : start + step])
        counts += np.stack([np.bincount(part_BCHW[:, c].ravel(), minlength=256) for c in range(len(counts))])
    if not counts.any():
        raise DataError("Statistics of the channels need at least one picture.")
    levels = np.arange(256) / 127.5 - 1
    share_CV = counts / counts.sum(1, keepdims=True)
    mean_C = share_CV @ levels
    spread_C = np.sqrt((share_CV * (levels - mean_C[:, None]) ** 2).sum(1))
    return mean_C.tolist(), spread_C.tolist()


def _batches(images_NCHW: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Pictures of these rows in order, float32 in [-1, 1], a batch (B, D) at a time."""
    D = int(np.prod(images_NCHW.shape[1:]))
    step = max(1, BATCH_VALUES // D)
    for start in range(0, len(rows), step):
        part_BCHW = small_copies(images_NCHW, rows[start : start + step])
        yield part_BCHW.reshape(len(part_BCHW), D).astype(np.float32) / np.float32(127.5) - 1


def _mean_and_total(images_NCHW: np.ndarray, rows: np.ndarray, D: int) -> tuple[np.ndarray, float]:
    """The mean picture, and the variance of all values together."""
    sum_D = np.zeros(D)
    for part_BD in _batches(images_NCHW, rows):
        sum_D += part_BD.sum(0, dtype=np.float64)
    mean_D = (sum_D / len(rows)).astype(np.float32)
    total = sum(float(((p - mean_D) ** 2).sum(dtype=np.float64)) for p in _batches(images_NCHW, rows))
    return mean_D, total / (len(rows) - 1)


def _signed(components_KD: np.ndarray) -> np.ndarray:
    """The same directions with their largest entry positive, so that a map does not change sides between runs."""
    largest = np.take_along_axis(components_KD, np.abs(components_KD).argmax(1)[:, None], 1)
    return np.ascontiguousarray(components_KD * np.where(largest < 0, -1, 1), np.float32)
