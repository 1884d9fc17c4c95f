"""Vanilla GAN: two fully connected networks play the first adversarial game, minimax or non-saturating.

Goodfellow et al. 2014 (arXiv:1406.2661), with label smoothing (Salimans et al. 2016, arXiv:1606.03498) and labels as in
Mirza & Osindero 2014 (arXiv:1411.1784). What differs from the first paper: leaky ReLU for maxout and dropout, Adam for
SGD with momentum; the moving average of the generator draws. Small and quick, made for seeing how the game goes.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from imagekiln.config import FamilyConfig
from imagekiln.core import Batch, Condition, Family, Loss, Phase, Progress
from imagekiln.nets.adversarial import cross_entropy_critic, minimax_generator, non_saturating_generator
from imagekiln.nets.mlp_gan import Discriminator, Generator
from imagekiln.nets.stabilizers import fading, instance_noise

GENERATOR_LOSSES = {"non-saturating": non_saturating_generator, "minimax": minimax_generator}


class VanillaGanConfig(FamilyConfig):
    """Settings of the vanilla GAN family."""

    name: str = "vanilla_gan"
    z_dim: int = Field(100, ge=1, description="length of the noise vector")
    width: int = Field(256, ge=4, description="units of a hidden layer")
    objective: Literal["non-saturating", "minimax"] = Field(
        "non-saturating", description="the generator's loss; minimax has no slope where the discriminator is sure"
    )
    smooth_real: float = Field(0.0, ge=0, lt=0.5, description="the target of real pictures is 1 minus this (try 0.1)")
    smooth_fake: float = Field(
        0.0, ge=0, lt=0.5, description="the target of fakes; above 0 it holds bad fakes in place"
    )
    instance_noise: float = Field(0.0, ge=0, description="deviation of noise on all pictures, fades to 0 (try 0.1)")


class VanillaGan(Family):
    """A generator and a discriminator, updated in turn."""

    Config = VanillaGanConfig
    optimizers = {
        "discriminator": {"name": "adam", "lr": 2e-4, "betas": (0.5, 0.999)},
        "generator": {"name": "adam", "lr": 2e-4, "betas": (0.5, 0.999)},
    }
    train_defaults = {"schedule": "constant", "warmup_fraction": 0.0, "clip_norm": 0.0}
    phases = (Phase("discriminator", trains=("discriminator",)), Phase("generator", trains=("generator",)))
    averaged = ("generator",)

    def __init__(self, config: VanillaGanConfig, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__(config, image_shape, num_classes)
        self.generator = Generator(config.z_dim, image_shape, config.width, num_classes)
        self.discriminator = Discriminator(image_shape, config.width, num_classes)

    def loss(self, phase: str, batch: Batch, progress: Progress) -> Loss:
        real, labels = batch.images, batch.labels
        z = torch.randn(len(real), self.config.z_dim, device=real.device)
        if phase == "generator":
            on_fake = self._judged(self.generator(z, labels), labels, progress)
            return Loss(GENERATOR_LOSSES[self.config.objective](on_fake))
        with torch.no_grad():
            fake = self.generator(z, labels)
        on_real, on_fake = (self._judged(images, labels, progress) for images in (real, fake))
        total = cross_entropy_critic(
            on_real, on_fake, smooth_real=self.config.smooth_real, smooth_fake=self.config.smooth_fake
        )
        return Loss(total, {"on_real": on_real.mean(), "on_fake": on_fake.mean()})

    def _judged(self, images: Tensor, labels: Tensor | None, progress: Progress) -> Tensor:
        """The discriminator's logits of pictures, under noise where that is asked for."""
        noise = fading(self.config.instance_noise, progress.fraction)
        return self.discriminator(instance_noise(images, noise), labels).float()

    def sample(self, noise: Tensor, condition: Condition, options: None = None) -> Tensor:
        return self.generator(noise, condition.labels)

    def noise_shape(self) -> tuple[int, ...]:
        return (self.config.z_dim,)
