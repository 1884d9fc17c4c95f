"""An autoencoder that loses nothing: 2x2 pixels become four channels, times 3 plus 1. Its one weight learns to be 3."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from imagekiln.config import FamilyConfig
from imagekiln.core import Batch, Condition, Family, Loss, Phase, Progress


class FoldingConfig(FamilyConfig):
    """Settings of the folding family."""

    name: str = "folding"


class Folding(Family):
    """Folds pictures."""

    Config = FoldingConfig
    optimizers = {"net": {"name": "sgd", "lr": 1e-3}}
    phases = (Phase("fold", trains=("net",)),)
    averaged = ("net",)

    def __init__(self, config: FoldingConfig, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__(config, image_shape, num_classes)
        self.net = nn.ParameterDict({"factor": nn.Parameter(torch.tensor(3.0))})

    def loss(self, phase: str, batch: Batch, progress: Progress) -> Loss:
        return Loss((self.net["factor"] - 3).square() + 0 * batch.images.mean())

    def encode(self, images: Tensor) -> Tensor:
        return nn.functional.pixel_unshuffle(images, 2) * self.net["factor"] + 1

    def decode(self, latents: Tensor) -> Tensor:
        return nn.functional.pixel_shuffle((latents - 1) / self.net["factor"], 2)

    def sample(self, noise: Tensor, condition: Condition, options: None = None) -> Tensor:
        return self.decode(noise)

    def noise_shape(self) -> tuple[int, ...]:
        channels, rows, columns = self.image_shape
        return (4 * channels, rows // 2, columns // 2)
