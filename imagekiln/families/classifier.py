"""Image classifier: judges pictures, and its features are what pictures are compared in.

A small convolutional network with label smoothing (Szegedy et al. 2016, arXiv:1512.00567). It draws nothing.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from imagekiln.config import FamilyConfig, Fraction
from imagekiln.core import UNLABELLED, Batch, Condition, Family, Loss, Phase, Progress
from imagekiln.errors import RecipeError
from imagekiln.nets.classifier import Classifier as Network


class ClassifierConfig(FamilyConfig):
    """Settings of the classifier family."""

    name: str = "classifier"
    width: int = Field(32, ge=8, description="channels of the finest level")
    label_smoothing: Fraction = Field(0.1, description="share of certainty given to all classes alike")
    shift: int = Field(1, ge=0, le=16, description="training pictures are moved by up to this many pixels")


class Classifier(Family):
    """Predicts the class of a picture; pictures without a label do not count in its loss."""

    Config = ClassifierConfig
    draws = False
    optimizers = {"network": {"name": "adamw", "lr": 2e-3, "betas": (0.9, 0.99), "weight_decay": 0.01}}
    monitor = "classify"
    phases = (Phase("classify", trains=("network",)),)
    averaged = ("network",)

    def __init__(self, config: ClassifierConfig, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__(config, image_shape, num_classes)
        if num_classes < 2:
            raise RecipeError(f"A classifier needs pictures with at least 2 labels; this set has {num_classes}.")
        self.network = Network(image_shape, num_classes, config.width)

    def loss(self, phase: str, batch: Batch, progress: Progress) -> Loss:
        images = batch.images
        labels = (
            images.new_full((len(images),), UNLABELLED, dtype=torch.int64) if batch.labels is None else batch.labels
        )
        if self.training and self.config.shift:
            images = _shifted(images, self.config.shift)
        logits = self.network(images).float()
        count = torch.ne(labels, UNLABELLED).sum().clamp(min=1)
        smoothing = self.config.label_smoothing if self.training else 0.0
        total = (
            cross_entropy(logits, labels, ignore_index=UNLABELLED, label_smoothing=smoothing, reduction="sum") / count
        )
        correct = torch.eq(logits.argmax(1), labels).sum() / count
        return Loss(total, {"accuracy": correct})

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        return self.network.features(images).float()

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        return self.network(images).float()

    def maps(self, images: Tensor) -> list[Tensor]:
        """Intermediate maps, finest first, for distances between pictures; differentiable by the pictures."""
        return self.network.maps(images)

    def sample(self, noise: Tensor, condition: Condition, options: None = None) -> Tensor:
        raise NotImplementedError("A classifier draws nothing.")

    def noise_shape(self) -> tuple[int, ...]:
        return ()


def _shifted(images: Tensor, most: int) -> Tensor:
    """Each picture moved by its own whole number of pixels; what enters at the border repeats the edge."""
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (most,) * 4, mode="replicate")
    top, left = torch.randint(0, 2 * most + 1, (2, count, 1), device=images.device)
    rows = top + torch.arange(height, device=images.device)
    columns = left + torch.arange(width, device=images.device)
    picked = torch.arange(count, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[picked, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
