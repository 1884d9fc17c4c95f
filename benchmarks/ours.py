"""Our side of the benchmarks: the real trainer on pictures that lie in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from imagekiln.config import write_toml
from imagekiln.core import mix
from imagekiln.data.source import MemmapSource, Table, digest
from imagekiln.engine import recipe as recipes
from imagekiln.engine.run import Run
from imagekiln.engine.tracker import Silent
from imagekiln.engine.trainer import Trainer


def random_pictures(count: int, channels: int, size: int, seed: int = 0) -> np.ndarray:
    """images_NCHW uint8, uniform: the time of a step does not depend on what pictures show."""
    generator = np.random.Generator(np.random.PCG64(seed))
    return generator.integers(0, 256, (count, channels, size, size), dtype=np.uint8)


def in_memory(images_NCHW: np.ndarray) -> MemmapSource:
    """An unlabelled source of these pictures: the class that every training reads from."""
    count = len(images_NCHW)
    digests = [digest(image) for image in images_NCHW]
    table = Table(images_NCHW, np.full(count, -1), (), digests, [f"{index:06d}" for index in range(count)])
    return MemmapSource(table, np.arange(count))


@contextmanager
def trainer(values: dict[str, Any], source: MemmapSource) -> Iterator[Trainer]:
    """A trainer of the recipe with these values, in a run folder that is thrown away."""
    recipe = recipes.complete(values)
    torch.manual_seed(mix(recipe.train.seed, "initialisation"))
    family = recipes.build(recipe, source.image_shape, source.num_classes)
    with tempfile.TemporaryDirectory() as folder:
        run = Run.create(Path(folder) / "run", write_toml(recipe), {})
        yield Trainer(recipe, family, source, source, run, Silent())


def parameters(module: torch.nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(parameter.numel() for parameter in module.parameters())
