"""Conditional GAN: a generator is told the class of the picture, and the discriminator checks that it obeys.

Mirza & Osindero 2014 (arXiv:1411.1784) with one-hot labels beside noise and picture: family.conditioning =
"concatenation", family.objective = "non-saturating", family.spectral = false. The default is its successor, class norms
and a projection discriminator (Miyato & Koyama 2018, arXiv:1802.05637) with spectral normalisation and the hinge loss.
The networks are convolutions of DCGAN's size. Labels are needed; a picture without one in a labelled set teaches the
discriminator what pictures are like. Where no class is asked for, the noise chooses one, each as often as any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from imagekiln.config import AugmentConfig, FamilyConfig, StabilizeConfig
from imagekiln.core import UNLABELLED, Batch, Condition, Family, Loss, Phase, Progress
from imagekiln.errors import RecipeError
from imagekiln.nets.adversarial import cross_entropy_critic, hinge_critic, linear_generator, non_saturating_generator
from imagekiln.nets.augmentation import Augmentation
from imagekiln.nets.cgan import Conditioning, Discriminator, Generator
from imagekiln.nets.stabilizers import Stabilizers

GENERATOR_LOSSES = {"hinge": linear_generator, "non-saturating": non_saturating_generator}


class CganConfig(FamilyConfig):
    """Settings of the conditional GAN family."""

    name: str = "cgan"
    z_dim: int = Field(100, ge=1, description="length of the noise vector")
    width: int = Field(32, ge=4, description="channels of the layer next to the picture")
    conditioning: Conditioning = Field("projection", description="how the networks are told the class")
    objective: Literal["hinge", "non-saturating"] = Field("hinge", description="the loss of both networks")
    spectral: bool = Field(True, description="spectral normalisation of the discriminator")
    critic_steps: int = Field(1, ge=1, description="discriminator updates a generator update")
    smooth_real: float = Field(
        0.0, ge=0, lt=0.5, description="the target of real pictures is 1 minus this (not of hinge; try 0.1)"
    )
    smooth_fake: float = Field(
        0.0, ge=0, lt=0.5, description="the target of fakes (not of hinge); above 0 it holds bad fakes in place"
    )
    augment: AugmentConfig = AugmentConfig()
    stabilize: StabilizeConfig = StabilizeConfig()


class Cgan(Family):
    """A generator and a discriminator that both know the class."""

    Config = CganConfig
    optimizers = {
        "discriminator": {"name": "adam", "lr": 4e-4, "betas": (0.5, 0.999)},
        "generator": {"name": "adam", "lr": 2e-4, "betas": (0.5, 0.999)},
    }
    train_defaults = {"schedule": "constant", "warmup_fraction": 0.0, "clip_norm": 0.0}
    averaged = ("generator",)

    def __init__(self, config: CganConfig, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__(config, image_shape, num_classes)
        if not num_classes:
            raise RecipeError(
                "A conditional GAN needs to know the class of its pictures, and these have no labels: put them into a "
                "folder a class, two folders or more, or train a family that needs none, such as dcgan."
            )
        if config.objective == "hinge" and (config.smooth_real or config.smooth_fake):
            raise RecipeError(
                "family.smooth_real and family.smooth_fake: the hinge loss has no targets that could be smoothed. "
                "Set family.objective = 'non-saturating', or leave them at 0."
            )
        self.phases = (
            Phase("discriminator", trains=("discriminator",), repeat=config.critic_steps),
            Phase("generator", trains=("generator",)),
        )
        self.generator = Generator(config.z_dim, image_shape, config.width, num_classes, config.conditioning)
        self.discriminator = Discriminator(
            image_shape, config.width, num_classes, config.conditioning, spectral=config.spectral
        )
        self.augment = Augmentation(config.augment, image_shape[0])
        self.stabilize = Stabilizers(config.stabilize)

    def loss(self, phase: str, batch: Batch, progress: Progress) -> Loss:
        real, count = batch.images, len(batch.images)
        labels = batch.labels
        if labels is None:
            labels = torch.full((count,), UNLABELLED, device=real.device)
        on_generator = GENERATOR_LOSSES[self.config.objective]
        z = torch.randn(count, self.config.z_dim, device=real.device)
        # A fake beside a picture without a label is of any class, and the discriminator is not told which.
        drawn = torch.where(labels < 0, torch.randint(self.num_classes, (count,), device=real.device), labels)
        if phase == "generator":
            fake = self.stabilize.seen(self.augment(self.generator(z, drawn)), progress.fraction)
            return Loss(on_generator(self.discriminator(fake, labels).float()))
        with torch.no_grad():
            fake = self.generator(z, drawn)
        seen = self.stabilize.seen(self.augment(torch.cat([real, fake])), progress.fraction)
        on_real, on_fake = self.discriminator(seen, labels.repeat(2)).float().chunk(2)
        self.augment.observe(on_real)
        total = self._critic_loss(*self.stabilize.exchanged(on_real, on_fake)) + self.stabilize.penalty(
            lambda images: self.discriminator(images, labels), seen.chunk(2), (on_real, on_fake)
        )
        return Loss(total, {"on_real": on_real.mean(), "on_fake": on_fake.mean()})

    def _critic_loss(self, on_real: Tensor, on_fake: Tensor) -> Tensor:
        if self.config.objective == "hinge":
            return hinge_critic(on_real, on_fake)
        smooth_real, smooth_fake = self.config.smooth_real, self.config.smooth_fake
        return cross_entropy_critic(on_real, on_fake, smooth_real=smooth_real, smooth_fake=smooth_fake)

    def after_step(self, progress: Progress) -> None:
        self.augment.adapt(progress.fraction)

    def dials(self) -> Mapping[str, Tensor]:
        return self.augment.dials()

    def sample(self, noise: Tensor, condition: Condition, options: None = None) -> Tensor:
        # F(z) of the last number is uniform: it chooses the class where none is asked for.
        share = torch.special.ndtr(noise[:, -1])
        chosen = (share * self.num_classes).long().clamp(max=self.num_classes - 1)
        labels = chosen if condition.labels is None else torch.where(condition.labels < 0, chosen, condition.labels)
        return self.generator(noise[:, :-1], labels)

    def noise_shape(self) -> tuple[int, ...]:
        return (self.config.z_dim + 1,)
