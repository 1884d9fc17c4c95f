"""WGAN-GP: a residual critic estimates the Wasserstein distance, kept smooth by a penalty on its gradient.

Gulrajani et al. 2017 (arXiv:1704.00028): lambda 10, five critic steps a generator step, Adam 2e-4 with betas 0 and 0.9,
no normalisation in the critic. The paper's networks are "residual" with a width of 128 at 32 pixels, "layer-norm" with
64 at 64 pixels, and "convolutional", its small ones, with 128 at 32. Labels go into the generator's norms, as in the
paper, or with "convolutional" beside z. The critic is told them by projection (arXiv:1802.05637) or, as in the paper,
names them: an auxiliary classifier (Odena et al. 2017, arXiv:1610.09585), with "residual" only. What differs from the
paper: no noise added to 8-bit pictures, the generator's batch is as large as the critic's, no gains in the layer
normalisation; the moving average of the generator draws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from imagekiln.config import AugmentConfig, FamilyConfig, StabilizeCriticConfig
from imagekiln.core import UNLABELLED, Batch, Condition, Family, Loss, Phase, Progress
from imagekiln.errors import RecipeError
from imagekiln.nets import dcgan, layer_norm_gan, resnet_gan
from imagekiln.nets.adversarial import gradient_penalty, linear_generator, wasserstein_critic
from imagekiln.nets.augmentation import Augmentation
from imagekiln.nets.stabilizers import Stabilizers

NETWORKS: Mapping[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "residual": (resnet_gan.Generator, partial(resnet_gan.Discriminator, pool="mean")),
    "layer-norm": (layer_norm_gan.Generator, layer_norm_gan.Discriminator),
    "convolutional": (
        partial(dcgan.Generator, kernel=5, bias=True),
        partial(dcgan.Discriminator, kernel=5, bias=True, normalised=False),
    ),
}

GENERATOR_CLASS_WEIGHT = 0.1
"""Weight of the classifier's error in the generator's loss, as in the paper's code; in the critic's it is 1."""


class WganGpConfig(FamilyConfig):
    """Settings of the WGAN-GP family."""

    name: str = "wgan_gp"
    z_dim: int = Field(128, ge=1, description="length of the noise vector")
    width: int = Field(16, ge=4, description="channels of the blocks next to the picture (paper: 128 at 32 pixels)")
    networks: Literal["residual", "layer-norm", "convolutional"] = Field(
        "residual", description="which of the paper's networks"
    )
    labels: Literal["projection", "classifier"] = Field(
        "projection", description="the critic is told the class, or names it as in the paper (residual networks)"
    )
    penalty_weight: float = Field(10.0, ge=0, description="lambda, weight of the gradient penalty")
    critic_steps: int = Field(5, ge=1, description="critic updates a generator update")
    augment: AugmentConfig = AugmentConfig()
    stabilize: StabilizeCriticConfig = StabilizeCriticConfig()


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
        generator, critic = NETWORKS[config.networks]
        if config.labels == "classifier":
            if config.networks != "residual":
                raise RecipeError(
                    f"family.labels = 'classifier': the critic of family.networks = '{config.networks}' has no "
                    "classifier. Set family.networks = 'residual', or family.labels = 'projection'."
                )
            if not num_classes:
                raise RecipeError(
                    "family.labels = 'classifier': these pictures have no labels that could be named. Put them into a "
                    "folder a class, or set family.labels = 'projection'."
                )
            critic = partial(critic, classifier=True)
        self.generator = generator(config.z_dim, image_shape, config.width, num_classes)
        self.critic = critic(image_shape, config.width, num_classes)
        self.augment = Augmentation(config.augment, image_shape[0])
        self.stabilize = Stabilizers(config.stabilize)
        self.register_buffer("penalty_weight", torch.tensor(config.penalty_weight))

    def loss(self, phase: str, batch: Batch, progress: Progress) -> Loss:
        real, labels = batch.images, batch.labels
        z = torch.randn(len(real), self.config.z_dim, device=real.device)

        def critic(images: Tensor) -> Tensor:
            return self.critic(images, labels)

        if phase == "generator":
            fake = self.stabilize.seen(self.augment(self.generator(z, labels)), progress.fraction)
            on_fake, class_nats = self._judged(fake, labels)
            total = linear_generator(on_fake)
            return Loss(total if class_nats is None else total + GENERATOR_CLASS_WEIGHT * class_nats.mean())
        with torch.no_grad():
            fake = self.generator(z, labels)
        both = None if labels is None else labels.repeat(2)
        seen = self.stabilize.seen(self.augment(torch.cat([real, fake])), progress.fraction)
        answers, class_nats = self._judged(seen, both)
        on_real, on_fake = answers.chunk(2)
        self.augment.observe(on_real - on_fake)  # only the difference of two answers means something here
        minus_distance = wasserstein_critic(on_real, on_fake)
        # between what the critic sees, since it compares the distributions of that
        penalty = gradient_penalty(critic, *seen.chunk(2))
        total = minus_distance + self.penalty_weight * penalty
        total = total + self.stabilize.penalty(critic, seen.chunk(2), (on_real, on_fake))
        parts = {"on_real": on_real.mean(), "on_fake": on_fake.mean(), "distance": -minus_distance, "penalty": penalty}
        if class_nats is not None:
            parts["class_nats"] = class_nats[: len(real)].mean()
            total = total + parts["class_nats"]
        return Loss(total, parts)

    def _judged(self, images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """logits_B; and, of a critic that names classes, cross-entropies nats_B, 0 where there is no label."""
        if self.config.labels == "projection":
            return self.critic(images, labels).float(), None
        logits, classes = self.critic.classify(images)
        if labels is None:
            labels = torch.full((len(images),), UNLABELLED, device=images.device)
        return logits.float(), cross_entropy(classes.float(), labels, ignore_index=UNLABELLED, reduction="none")

    def after_step(self, progress: Progress) -> None:
        self.augment.adapt(progress.fraction)

    def dials(self) -> Mapping[str, Tensor]:
        return {"penalty_weight": self.penalty_weight, **self.augment.dials()}

    def sample(self, noise: Tensor, condition: Condition, options: None = None) -> Tensor:
        return self.generator(noise, condition.labels)

    def noise_shape(self) -> tuple[int, ...]:
        return (self.config.z_dim,)
