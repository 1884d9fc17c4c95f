"""R3GAN: fakes are judged relative to real pictures, with gradient penalties on both, and no other tricks.

Huang et al. 2024 (arXiv:2501.05441): the discriminator minimises, for pairs of a real and a fake picture,

  softplus(-(D(real) - D(fake))) + gamma / 2 (||dD/d real||^2 + ||dD/d fake||^2),

squares summed over pixels, on every step; the generator minimises softplus(-(D(fake) - D(real))). Along half a cosine
over the run gamma falls from `gamma` to `gamma_end`, the learning rate to a quarter; the second beta rises from 0.9.

The settings are small. The paper's networks: 32 pixels width = widest = 768, gamma 0.05 to 0.005, batch 512; FFHQ-64
width 384, widest 768, gamma 2 to 0.2, batch 256; FFHQ-256 width 96, widest 768, gamma 150 to 15; ImageNet width =
widest = 1536, group_width 32. What differs from the paper: augmentation (augment.policy = "ramp"; largest 0.55 on
CIFAR-10, 0.3 on FFHQ) is off, and a picture without a label gets the mean of the labels' vectors.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from imagekiln.config import AugmentConfig, FamilyConfig, StabilizeConfig
from imagekiln.core import Batch, Condition, Family, Loss, Phase, Progress, half_cosine
from imagekiln.nets.augmentation import Augmentation
from imagekiln.nets.r3gan import (
    Discriminator,
    Generator,
    penalized_logits,
    relativistic_critic,
    relativistic_generator,
)
from imagekiln.nets.stabilizers import Stabilizers


class R3GanConfig(FamilyConfig):
    """Settings of the R3GAN family."""

    name: str = "r3gan"
    z_dim: int = Field(64, ge=1, description="length of the noise vector")
    width: int = Field(48, ge=4, description="channels next to the picture, doubled at each halving")
    widest: int = Field(96, ge=4, description="most channels of a stage (paper: 768)")
    blocks: int = Field(1, ge=1, le=16, description="residual blocks a stage (paper: 2)")
    expansion: int = Field(2, ge=1, le=8, description="inner channels of a block for each outer one")
    group_width: int = Field(16, ge=1, description="channels of a group in the 3x3 convolutions (paper: 16 or 32)")
    gamma: float = Field(0.05, ge=0, description="weight of both penalties at the start of the run")
    gamma_end: float = Field(0.005, ge=0, description="and at its end")
    augment: AugmentConfig = AugmentConfig()
    stabilize: StabilizeConfig = StabilizeConfig()


class R3Gan(Family):
    """Two plain residual networks and a loss that needs no tricks."""

    Config = R3GanConfig
    optimizers = {
        "discriminator": {"name": "adam", "lr": 2e-4, "betas": (0.0, 0.99), "beta2_start": 0.9},
        "generator": {"name": "adam", "lr": 2e-4, "betas": (0.0, 0.99), "beta2_start": 0.9},
    }
    # torch.compile cannot differentiate twice
    train_defaults = {
        "schedule": "cosine",
        "end_lr_ratio": 0.25,
        "warmup_fraction": 0.0,
        "clip_norm": 0.0,
        "compile": "off",
    }
    phases = (Phase("discriminator", trains=("discriminator",)), Phase("generator", trains=("generator",)))
    check_settings = {"width": 16, "widest": 32}
    averaged = ("generator",)
    gamma: Tensor

    def __init__(self, config: R3GanConfig, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__(config, image_shape, num_classes)
        size = {"blocks": config.blocks, "group": config.group_width, "expansion": config.expansion}
        widths = config.width, config.widest
        self.generator = Generator(config.z_dim, image_shape, *widths, num_classes, **size)
        self.discriminator = Discriminator(image_shape, *widths, num_classes, **size)
        self.augment = Augmentation(config.augment, image_shape[0])
        self.stabilize = Stabilizers(config.stabilize)
        self.register_buffer("gamma", torch.tensor(config.gamma))

    def loss(self, phase: str, batch: Batch, progress: Progress) -> Loss:
        real, labels = batch.images, batch.labels
        z = torch.randn(len(real), self.config.z_dim, device=real.device)

        def seen(images: Tensor) -> Tensor:
            return self.stabilize.seen(self.augment(images), progress.fraction)

        if phase == "generator":
            with torch.no_grad():
                on_real = self.discriminator(seen(real), labels).float()
            on_fake = self.discriminator(seen(self.generator(z, labels)), labels).float()
            return Loss(relativistic_generator(on_real, on_fake))
        with torch.no_grad():
            fake = self.generator(z, labels).to(real.dtype)
        both = None if labels is None else labels.repeat(2)
        shown: list[Tensor] = []

        def judged(images: Tensor) -> Tensor:
            shown.append(seen(images))  # within the pass: the slopes are those of the pictures before it
            return self.discriminator(shown[0], both)

        logits, squares = penalized_logits(judged, torch.cat([real, fake]))
        on_real, on_fake = logits.chunk(2)
        r1, r2 = (part.mean() for part in squares.chunk(2))
        self.augment.observe(on_real - on_fake)  # only the difference of two answers means something here
        total = relativistic_critic(*self.stabilize.exchanged(on_real, on_fake))
        total = total + self._gamma(progress) / 2 * (r1 + r2)
        total = total + self.stabilize.penalty(
            lambda images: self.discriminator(images, labels), shown[0].detach().chunk(2), (on_real, on_fake)
        )
        return Loss(total, {"on_real": on_real.mean(), "on_fake": on_fake.mean(), "r1": r1, "r2": r2})

    def after_step(self, progress: Progress) -> None:
        self.augment.adapt(progress.fraction)

    def dials(self) -> Mapping[str, Tensor]:
        return {"gamma": self.gamma, **self.augment.dials()}

    def _gamma(self, progress: Progress) -> Tensor | float:
        """The weight of this moment: the schedule of the settings, as many times as strong as `gamma` was turned up."""
        scheduled = half_cosine(self.config.gamma, self.config.gamma_end, progress.fraction)
        return scheduled * (self.gamma / self.config.gamma) if self.config.gamma else scheduled

    def sample(self, noise: Tensor, condition: Condition, options: None = None) -> Tensor:
        return self.generator(noise, condition.labels).clamp(-1, 1)

    def noise_shape(self) -> tuple[int, ...]:
        return (self.config.z_dim,)
