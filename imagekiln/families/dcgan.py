"""DCGAN: two convolutional networks play against each other, in Radford's layers, initialisation and optimizer.

Radford, Metz & Chintala 2016 (arXiv:1511.06434) with the non-saturating loss of Goodfellow et al. 2014
(arXiv:1406.2661); label smoothing, feature matching and minibatch discrimination are those of Salimans et al. 2016
(arXiv:1606.03498). The networks are those of pytorch/examples; a width of 128 and a kernel of 5 make them the paper's.
What differs from the paper: normal noise; with labels the generator takes an embedding beside its noise and the
discriminator is a projection (Miyato & Koyama 2018, arXiv:1802.05637); the moving average of the generator draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from imagekiln.config import AugmentConfig, FamilyConfig, StabilizeConfig
from imagekiln.core import Batch, Condition, Family, Loss, Phase, Progress
from imagekiln.nets.adversarial import cross_entropy_critic, non_saturating_generator
from imagekiln.nets.augmentation import Augmentation
from imagekiln.nets.dcgan import Discriminator, Generator, Kernel
from imagekiln.nets.stabilizers import Stabilizers, feature_matching


class DcganConfig(FamilyConfig):
    """Settings of the DCGAN family."""

    name: str = "dcgan"
    z_dim: int = Field(100, ge=1, description="length of the noise vector")
    width: int = Field(64, ge=4, description="channels of the layer next to the picture")
    kernel: Kernel = Field(4, description="side of the convolutions (paper: 5, with a width of 128)")
    objective: Literal["non-saturating", "feature-matching"] = Field(
        "non-saturating", description="the generator's loss; feature-matching asks for the mean features of real ones"
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


class Dcgan(Family):
    """A generator and a discriminator, updated in turn."""

    Config = DcganConfig
    optimizers = {
        "discriminator": {"name": "adam", "lr": 2e-4, "betas": (0.5, 0.999)},
        "generator": {"name": "adam", "lr": 2e-4, "betas": (0.5, 0.999)},
    }
    train_defaults = {"schedule": "constant", "warmup_fraction": 0.0, "clip_norm": 0.0}
    phases = (Phase("discriminator", trains=("discriminator",)), Phase("generator", trains=("generator",)))
    averaged = ("generator",)

    def __init__(self, config: DcganConfig, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__(config, image_shape, num_classes)
        self.generator = Generator(config.z_dim, image_shape, config.width, num_classes, kernel=config.kernel)
        self.discriminator = Discriminator(
            image_shape, config.width, num_classes, kernel=config.kernel, minibatch_kernels=config.minibatch_kernels
        )
        self.augment = Augmentation(config.augment, image_shape[0])
        self.stabilize = Stabilizers(config.stabilize)

    def loss(self, phase: str, batch: Batch, progress: Progress) -> Loss:
        real, labels = batch.images, batch.labels
        fake = self.generator(torch.randn(len(real), self.config.z_dim, device=real.device), labels)

        def seen(images: Tensor) -> Tensor:
            return self.stabilize.seen(self.augment(images), progress.fraction)

        def judged(images: Tensor) -> Tensor:
            return self.discriminator(images, labels).float()

        if phase == "generator":
            seen_fake = seen(fake)
            if self.config.objective == "feature-matching":
                features = (self.discriminator.features(images, labels).float() for images in (seen(real), seen_fake))
                return Loss(feature_matching(*features))
            return Loss(non_saturating_generator(judged(seen_fake)))
        seen_real, seen_fake = seen(real), seen(fake.detach())
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
