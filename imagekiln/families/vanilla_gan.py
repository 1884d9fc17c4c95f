"""Vanilla GAN: two fully connected networks play the first adversarial game, minimax or non-saturating.

Goodfellow et al. 2014 (arXiv:1406.2661), with label smoothing, feature matching and minibatch discrimination (Salimans
et al. 2016, arXiv:1606.03498) and labels as in Mirza & Osindero 2014 (arXiv:1411.1784). What differs from the first
paper: leaky ReLU for maxout and dropout, Adam for SGD with momentum; the moving average of the generator draws. Small
and quick, made for seeing how the game goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from imagekiln.config import AugmentConfig, FamilyConfig, StabilizeConfig
from imagekiln.core import Batch, Condition, Family, Loss, Phase, Progress
from imagekiln.nets.adversarial import cross_entropy_critic, minimax_generator, non_saturating_generator
from imagekiln.nets.augmentation import Augmentation
from imagekiln.nets.mlp_gan import Discriminator, Generator
from imagekiln.nets.stabilizers import Stabilizers, feature_matching

GENERATOR_LOSSES = {"non-saturating": non_saturating_generator, "minimax": minimax_generator}


class VanillaGanConfig(FamilyConfig):
    """Settings of the vanilla GAN family."""

    name: str = "vanilla_gan"
    z_dim: int = Field(100, ge=1, description="length of the noise vector")
    width: int = Field(256, ge=4, description="units of a hidden layer")
    objective: Literal["non-saturating", "minimax", "feature-matching"] = Field(
        "non-saturating", description="the generator's loss; minimax has no slope where the discriminator is sure"
    )
    smooth_real: float = Field(0.0, ge=0, lt=0.5, description="the target of real pictures is 1 minus this (try 0.1)")
    smooth_fake: float = Field(
        0.0, ge=0, lt=0.5, description="the target of fakes; above 0 it holds bad fakes in place"
    )
    minibatch_kernels: int = Field(
        0, ge=0, le=1000, description="numbers that tell the discriminator how alike a batch is (try 32); 0 = none"
    )
    augment: AugmentConfig = AugmentConfig()
    stabilize: StabilizeConfig = StabilizeConfig()


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
        self.discriminator = Discriminator(
            image_shape, config.width, num_classes, minibatch_kernels=config.minibatch_kernels
        )
        self.augment = Augmentation(config.augment, image_shape[0])
        self.stabilize = Stabilizers(config.stabilize)

    def loss(self, phase: str, batch: Batch, progress: Progress) -> Loss:
        real, labels = batch.images, batch.labels
        z = torch.randn(len(real), self.config.z_dim, device=real.device)

        def seen(images: Tensor) -> Tensor:
            return self.stabilize.seen(self.augment(images), progress.fraction)

        def judged(images: Tensor) -> Tensor:
            return self.discriminator(images, labels).float()

        if phase == "generator":
            seen_fake = seen(self.generator(z, labels))
            if self.config.objective == "feature-matching":
                features = (self.discriminator.features(images, labels).float() for images in (seen(real), seen_fake))
                return Loss(feature_matching(*features))
            return Loss(GENERATOR_LOSSES[self.config.objective](judged(seen_fake)))
        with torch.no_grad():
            fake = self.generator(z, labels)
        seen_real, seen_fake = seen(real), seen(fake)
        on_real, on_fake = judged(seen_real), judged(seen_fake)
        self.augment.observe(on_real)
        total = cross_entropy_critic(
            *self.stabilize.exchanged(on_real, on_fake),
            smooth_real=self.config.smooth_real,
            smooth_fake=self.config.smooth_fake,
        )
        total = total + self.stabilize.penalty(judged, (seen_real, seen_fake), (on_real, on_fake))
        return Loss(total, {"on_real": on_real.mean(), "on_fake": on_fake.mean()})

    def after_step(self, progress: Progress) -> None:
        self.augment.adapt(progress.fraction)

    def dials(self) -> Mapping[str, Tensor]:
        return self.augment.dials()

    def sample(self, noise: Tensor, condition: Condition, options: None = None) -> Tensor:
        return self.generator(noise, condition.labels)

    def noise_shape(self) -> tuple[int, ...]:
        return (self.config.z_dim,)
