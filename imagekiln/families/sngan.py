"""SNGAN: a discriminator with spectrally normalised weights plays the hinge game.

Miyato et al. 2018 (arXiv:1802.05957): five discriminator steps a generator step, Adam 2e-4 with betas 0 and 0.9; with
labels conditional batch normalisation and projection (Miyato & Koyama 2018, arXiv:1802.05637). The paper's residual
networks are generator_width 256 and width 128 at 32 pixels, 64 and 64 above; its plain convolutional ones 64 and 64.
What differs: the generator's batch is as large as the discriminator's; the moving average of the generator draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from imagekiln.config import AugmentConfig, FamilyConfig, StabilizeConfig
from imagekiln.core import Batch, Condition, Family, Loss, Phase, Progress
from imagekiln.nets import conv_gan, resnet_gan
from imagekiln.nets.adversarial import hinge_critic, linear_generator
from imagekiln.nets.augmentation import Augmentation
from imagekiln.nets.stabilizers import Stabilizers


class SnganConfig(FamilyConfig):
    """Settings of the SNGAN family."""

    name: str = "sngan"
    z_dim: int = Field(128, ge=1, description="length of the noise vector")
    generator_width: int = Field(16, ge=4, description="generator's channels next to the picture (paper: 256 or 64)")
    width: int = Field(16, ge=4, description="discriminator's channels next to the picture (paper: 128 or 64)")
    networks: Literal["residual", "convolutional"] = Field("residual", description="which of the paper's networks")
    critic_steps: int = Field(5, ge=1, description="discriminator updates a generator update")
    augment: AugmentConfig = AugmentConfig()
    stabilize: StabilizeConfig = StabilizeConfig()


class Sngan(Family):
    """A discriminator no layer of which stretches by more than one, and a generator."""

    Config = SnganConfig
    optimizers = {
        "discriminator": {"name": "adam", "lr": 2e-4, "betas": (0.0, 0.9)},
        "generator": {"name": "adam", "lr": 2e-4, "betas": (0.0, 0.9)},
    }
    train_defaults = {"schedule": "linear", "warmup_fraction": 0.0, "clip_norm": 0.0}
    averaged = ("generator",)

    def __init__(self, config: SnganConfig, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__(config, image_shape, num_classes)
        self.phases = (
            Phase("discriminator", trains=("discriminator",), repeat=config.critic_steps),
            Phase("generator", trains=("generator",)),
        )
        nets = resnet_gan if config.networks == "residual" else conv_gan
        self.generator = nets.Generator(config.z_dim, image_shape, config.generator_width, num_classes)
        self.discriminator = nets.Discriminator(image_shape, config.width, num_classes, spectral=True)
        self.augment = Augmentation(config.augment, image_shape[0])
        self.stabilize = Stabilizers(config.stabilize)

    def loss(self, phase: str, batch: Batch, progress: Progress) -> Loss:
        real, labels = batch.images, batch.labels
        z = torch.randn(len(real), self.config.z_dim, device=real.device)
        if phase == "generator":
            fake = self.stabilize.seen(self.augment(self.generator(z, labels)), progress.fraction)
            return Loss(linear_generator(self.discriminator(fake, labels).float()))
        with torch.no_grad():
            fake = self.generator(z, labels)
        both = None if labels is None else labels.repeat(2)
        seen = self.stabilize.seen(self.augment(torch.cat([real, fake])), progress.fraction)
        on_real, on_fake = self.discriminator(seen, both).float().chunk(2)
        self.augment.observe(on_real)
        total = hinge_critic(*self.stabilize.exchanged(on_real, on_fake)) + self.stabilize.penalty(
            lambda images: self.discriminator(images, labels), seen.chunk(2), (on_real, on_fake)
        )
        return Loss(total, {"on_real": on_real.mean(), "on_fake": on_fake.mean()})

    def after_step(self, progress: Progress) -> None:
        self.augment.adapt(progress.fraction)

    def dials(self) -> Mapping[str, Tensor]:
        return self.augment.dials()

    def sample(self, noise: Tensor, condition: Condition, options: None = None) -> Tensor:
        return self.generator(noise, condition.labels)

    def noise_shape(self) -> tuple[int, ...]:
        return (self.config.z_dim,)
