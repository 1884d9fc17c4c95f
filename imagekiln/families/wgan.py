"""WGAN: DCGAN's networks play for the Wasserstein distance, the critic's weights clipped to a small box.

Arjovsky, Chintala & Bottou 2017 (arXiv:1701.07875): RMSprop 5e-5, weights in [-0.01, 0.01], five critic steps a
generator step. Its code lets the critic get ahead: 100 steps before each of the first 25 generator steps and before
every 500th. `stretches` does the same; it is off because a short run would hardly move its generator. What differs:
with labels an embedding beside z and projection; the moving average of the generator draws. The paper itself calls
clipping "a clearly terrible way" to bound the slope: WGAN-GP is its successor, this one is here to be compared with.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from imagekiln.config import AugmentConfig, FamilyConfig, StabilizeCriticConfig
from imagekiln.core import Batch, Condition, Family, Loss, Phase, Progress
from imagekiln.nets.adversarial import clip_weights_, linear_generator, wasserstein_critic
from imagekiln.nets.augmentation import Augmentation
from imagekiln.nets.dcgan import Discriminator, Generator
from imagekiln.nets.stabilizers import Stabilizers

STRETCH = 20
"""Steps of which the generator takes part in the last only: with 5 critic updates a step they are the code's 100."""

FIRST, AGAIN = 25, 500
"""Generator updates that have a stretch before them: so many in the beginning, and later every so-and-so-many-th."""


def critic_is_alone(step: int) -> bool:
    """Whether the critic alone learns in this training step, the first of which is 0.

    >>> [step for step in range(503) if not critic_is_alone(step)][-5:]
    [479, 499, 500, 501, 502]
    """
    if step < FIRST * STRETCH:
        return step % STRETCH != STRETCH - 1
    # A round is a stretch and what follows it. Of the first round the updates of the beginning are over.
    within = (step - FIRST * STRETCH + STRETCH - 1 + FIRST) % (STRETCH - 1 + AGAIN)
    return within < STRETCH - 1


class WganConfig(FamilyConfig):
    """Settings of the WGAN family."""

    name: str = "wgan"
    z_dim: int = Field(100, ge=1, description="length of the noise vector")
    width: int = Field(48, ge=4, description="channels of the layer next to the picture (paper: 64)")
    clip: float = Field(0.01, gt=0, description="largest weight of the critic")
    critic_steps: int = Field(5, ge=1, description="critic updates a generator update")
    stretches: bool = Field(False, description="20 times as many before the first 25 and every 500th, as published")
    augment: AugmentConfig = AugmentConfig()
    stabilize: StabilizeCriticConfig = StabilizeCriticConfig()


class Wgan(Family):
    """A critic with weights in a box, and a generator that follows its slope."""

    Config = WganConfig
    optimizers = {"critic": {"name": "rmsprop", "lr": 5e-5}, "generator": {"name": "rmsprop", "lr": 5e-5}}
    train_defaults = {"schedule": "constant", "warmup_fraction": 0.0, "clip_norm": 0.0}
    averaged = ("generator",)

    def __init__(self, config: WganConfig, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__(config, image_shape, num_classes)
        self.phases = (
            Phase("critic", trains=("critic",), repeat=config.critic_steps),
            Phase("generator", trains=("generator",), rests=critic_is_alone if config.stretches else None),
        )
        self.generator = Generator(config.z_dim, image_shape, config.width, num_classes)
        self.critic = Discriminator(image_shape, config.width, num_classes)
        clip_weights_(self.critic.parameters(), config.clip)
        self.augment = Augmentation(config.augment, image_shape[0])
        self.stabilize = Stabilizers(config.stabilize)

    def loss(self, phase: str, batch: Batch, progress: Progress) -> Loss:
        # An optimizer step may have left the box, and `after_step` would be too late for the next of several steps.
        clip_weights_(self.critic.parameters(), self.config.clip)
        real, labels = batch.images, batch.labels
        z = torch.randn(len(real), self.config.z_dim, device=real.device)

        def seen(images: Tensor) -> Tensor:
            return self.stabilize.seen(self.augment(images), progress.fraction)

        def judged(images: Tensor) -> Tensor:
            return self.critic(images, labels).float()

        if phase == "generator":
            return Loss(linear_generator(judged(seen(self.generator(z, labels)))))
        with torch.no_grad():
            fake = self.generator(z, labels)
        seen_real, seen_fake = seen(real), seen(fake)
        on_real, on_fake = judged(seen_real), judged(seen_fake)
        self.augment.observe(on_real - on_fake)  # only the difference of two answers means something here
        minus_distance = wasserstein_critic(on_real, on_fake)
        total = minus_distance + self.stabilize.penalty(judged, (seen_real, seen_fake), (on_real, on_fake))
        return Loss(total, {"on_real": on_real.mean(), "on_fake": on_fake.mean(), "distance": -minus_distance})

    def after_step(self, progress: Progress) -> None:
        self.augment.adapt(progress.fraction)

    def dials(self) -> Mapping[str, Tensor]:
        return self.augment.dials()

    def sample(self, noise: Tensor, condition: Condition, options: None = None) -> Tensor:
        return self.generator(noise, condition.labels)

    def noise_shape(self) -> tuple[int, ...]:
        return (self.config.z_dim,)
