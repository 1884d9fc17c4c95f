"""WGAN-GP: a residual critic estimates the Wasserstein distance, kept smooth by a penalty on its gradient.

Gulrajani et al. 2017 (arXiv:1704.00028): lambda 10, five critic steps a generator step, Adam 2e-4 with betas 0 and 0.9,
no normalisation in the critic. At 32 pixels with a width of 128 the networks are the paper's. What differs from it:
labels by conditional batch normalisation and projection (arXiv:1802.05637) instead of an auxiliary classifier, no noise
added to 8-bit pictures, the generator's batch is as large as the critic's; the moving average of the generator draws.
For the paper's linear decay set train.schedule.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from imagekiln.config import FamilyConfig
from imagekiln.core import Batch, Condition, Family, Loss, Phase, Progress
from imagekiln.nets.adversarial import gradient_penalty, linear_generator, wasserstein_critic
from imagekiln.nets.resnet_gan import Discriminator, Generator


class WganGpConfig(FamilyConfig):
    """Settings of the WGAN-GP family."""

    name: str = "wgan_gp"
    z_dim: int = Field(128, ge=1, description="length of the noise vector")
    width: int = Field(16, ge=4, description="channels of the blocks next to the picture (paper: 128 at 32 pixels)")
    penalty_weight: float = Field(10.0, ge=0, description="lambda, weight of the gradient penalty")
    critic_steps: int = Field(5, ge=1, description="critic updates a generator update")


class WganGp(Family):
    """A critic that is trained nearly to its optimum, and a generator that follows its slope."""

    Config = WganGpConfig
    optimizers = {
        "critic": {"name": "adam", "lr": 2e-4, "betas": (0.0, 0.9)},
        "generator": {"name": "adam", "lr": 2e-4, "betas": (0.0, 0.9)},
    }
    train_defaults = {"schedule": "linear", "warmup_fraction": 0.0, "clip_norm": 0.0, "compile": "off"}
    averaged = ("generator",)
    penalty_weight: Tensor

    def __init__(self, config: WganGpConfig, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__(config, image_shape, num_classes)
        self.phases = (
            Phase("critic", trains=("critic",), repeat=config.critic_steps),
            Phase("generator", trains=("generator",)),
        )
        self.generator = Generator(config.z_dim, image_shape, config.width, num_classes)
        self.critic = Discriminator(image_shape, config.width, num_classes, pool="mean")
        self.register_buffer("penalty_weight", torch.tensor(config.penalty_weight))

    def loss(self, phase: str, batch: Batch, progress: Progress) -> Loss:
        real, labels = batch.images, batch.labels
        z = torch.randn(len(real), self.config.z_dim, device=real.device)
        if phase == "generator":
            return Loss(linear_generator(self.critic(self.generator(z, labels), labels).float()))
        with torch.no_grad():
            fake = self.generator(z, labels)
        both = None if labels is None else labels.repeat(2)
        on_real, on_fake = self.critic(torch.cat([real, fake]), both).float().chunk(2)
        minus_distance = wasserstein_critic(on_real, on_fake)
        penalty = gradient_penalty(lambda images: self.critic(images, labels), real, fake)
        total = minus_distance + self.penalty_weight * penalty
        parts = {"on_real": on_real.mean(), "on_fake": on_fake.mean(), "distance": -minus_distance, "penalty": penalty}
        return Loss(total, parts)

    def dials(self) -> Mapping[str, Tensor]:
        return {"penalty_weight": self.penalty_weight}

    def sample(self, noise: Tensor, condition: Condition, options: None = None) -> Tensor:
        return self.generator(noise, condition.labels)

    def noise_shape(self) -> tuple[int, ...]:
        return (self.config.z_dim,)
