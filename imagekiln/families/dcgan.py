"""DCGAN: two convolutional networks play against each other, in Radford's layers, initialisation and optimizer.

Radford, Metz & Chintala 2016 (arXiv:1511.06434) with the non-saturating loss of Goodfellow et al. 2014
(arXiv:1406.2661). What differs from the paper: with labels the generator takes an embedding beside its noise and the
discriminator is a projection (Miyato & Koyama 2018, arXiv:1802.05637); the moving average of the generator draws.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import softplus

from imagekiln.config import FamilyConfig
from imagekiln.core import Batch, Condition, Family, Loss, Phase, Progress
from imagekiln.nets.dcgan import Discriminator, Generator


class DcganConfig(FamilyConfig):
    """Settings of the DCGAN family."""

    name: str = "dcgan"
    z_dim: int = Field(100, ge=1, description="length of the noise vector")
    width: int = Field(64, ge=4, description="channels of the layer next to the picture")


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
        self.generator = Generator(config.z_dim, image_shape, config.width, num_classes)
        self.discriminator = Discriminator(image_shape, config.width, num_classes)

    def loss(self, phase: str, batch: Batch, progress: Progress) -> Loss:
        real, labels = batch.images, batch.labels
        fake = self.generator(torch.randn(len(real), self.config.z_dim, device=real.device), labels)
        if phase == "generator":
            return Loss(softplus(-self.discriminator(fake, labels).float()).mean())
        on_real = self.discriminator(real, labels).float()
        on_fake = self.discriminator(fake.detach(), labels).float()
        total = softplus(-on_real).mean() + softplus(on_fake).mean()
        return Loss(total, {"on_real": on_real.mean(), "on_fake": on_fake.mean()})

    @torch.no_grad()
    def sample(self, noise: Tensor, condition: Condition, options: None = None) -> Tensor:
        return self.generator(noise, condition.labels)

    def noise_shape(self) -> tuple[int, ...]:
        return (self.config.z_dim,)
