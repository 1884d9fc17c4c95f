"""DCGAN: two convolutional networks play against each other, in Radford's layers, initialisation and optimizer.

Radford, Metz & Chintala 2016 (arXiv:1511.06434) with the non-saturating loss of Goodfellow et al. 2014
(arXiv:1406.2661). The networks are those of pytorch/examples; a width of 128 and a kernel of 5 make them the paper's.
What differs from the paper: normal noise; with labels the generator takes an embedding beside its noise and the
discriminator is a projection (Miyato & Koyama 2018, arXiv:1802.05637); the moving average of the generator draws.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from imagekiln.config import AugmentConfig, FamilyConfig
from imagekiln.core import Batch, Condition, Family, Loss, Phase, Progress
from imagekiln.nets.adversarial import cross_entropy_critic, non_saturating_generator
from imagekiln.nets.augmentation import Augmentation
from imagekiln.nets.dcgan import Discriminator, Generator, Kernel
from imagekiln.nets.stabilizers import LeCam, fading, instance_noise


class DcganConfig(FamilyConfig):
    """Settings of the DCGAN family."""

    name: str = "dcgan"
    z_dim: int = Field(100, ge=1, description="length of the noise vector")
    width: int = Field(64, ge=4, description="channels of the layer next to the picture")
    kernel: Kernel = Field(4, description="side of the convolutions (paper: 5, with a width of 128)")
    smooth_real: float = Field(0.0, ge=0, lt=0.5, description="the target of real pictures is 1 minus this (try 0.1)")
    smooth_fake: float = Field(
        0.0, ge=0, lt=0.5, description="the target of fakes; above 0 it holds bad fakes in place"
    )
    instance_noise: float = Field(0.0, ge=0, description="deviation of noise on all pictures, fades to 0 (try 0.1)")
    lecam: float = Field(0.0, ge=0, description="weight of the LeCam penalty (try 0.3); 0 = none")
    augment: AugmentConfig = AugmentConfig()


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
        self.discriminator = Discriminator(image_shape, config.width, num_classes, kernel=config.kernel)
        self.augment = Augmentation(config.augment, image_shape[0])
        self.lecam = LeCam() if config.lecam else None

    def loss(self, phase: str, batch: Batch, progress: Progress) -> Loss:
        real, labels = batch.images, batch.labels
        fake = self.generator(torch.randn(len(real), self.config.z_dim, device=real.device), labels)
        if phase == "generator":
            return Loss(non_saturating_generator(self._judged(fake, labels, progress)))
        on_real = self._judged(real, labels, progress)
        on_fake = self._judged(fake.detach(), labels, progress)
        self.augment.observe(on_real)
        total = cross_entropy_critic(
            on_real, on_fake, smooth_real=self.config.smooth_real, smooth_fake=self.config.smooth_fake
        )
        if self.lecam is not None:
            total = total + self.config.lecam * self.lecam(on_real, on_fake)
        return Loss(total, {"on_real": on_real.mean(), "on_fake": on_fake.mean()})

    def _judged(self, images: Tensor, labels: Tensor | None, progress: Progress) -> Tensor:
        """The discriminator's logits of pictures, augmented and under noise where that is asked for."""
        noise = fading(self.config.instance_noise, progress.fraction)
        return self.discriminator(instance_noise(self.augment(images), noise), labels).float()

    def after_step(self, progress: Progress) -> None:
        self.augment.adapt(progress.fraction)

    def dials(self) -> Mapping[str, Tensor]:
        return self.augment.dials()

    def sample(self, noise: Tensor, condition: Condition, options: None = None) -> Tensor:
        return self.generator(noise, condition.labels)

    def noise_shape(self) -> tuple[int, ...]:
        return (self.config.z_dim,)
