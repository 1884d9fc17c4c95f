"""Progressive GAN: both networks begin with tiny pictures, and layers for larger ones are faded in one by one.

Karras et al. 2018 (arXiv:1710.10196): the critic minimises

  E[D(fake)] - E[D(real)] + gamma E[(||dD/dx|| - 1)^2] + 0.001 E[D(real)^2],

x on the lines between real pictures and fakes (Gulrajani et al. 2017, arXiv:1704.00028), the generator -E[D(fake)], one
step of each. Real pictures are halved to the size of the stage, and blended while it fades in. What is in use is a
function of the images seen: the part `growing_fraction` of a run is divided evenly among the stages, and
`fade_fraction` of each goes into fading in the next. It never goes back when a finished run is made longer. The
weights hold how far they have grown (`generator.level`), so an earlier checkpoint draws its own size, pixels repeated.

The settings are small. The paper's networks have z_dim = widest = 512 and width 512 at 32 pixels, 256 at 64, 64 at 256,
16 at 1024. What differs from the paper: stages last a share of the run instead of 1.2 million pictures; the batch and
the learning rate are the same at every size; an optimizer is not emptied when a stage begins, but what it holds of the
new layers begins there; labels, where there are any: a learned vector beside z in the generator and a projection in the
critic (Miyato & Koyama 2018, arXiv:1802.05637) instead of an auxiliary classifier; a picture without a label gets the
mean of the labels' vectors.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from imagekiln.config import AugmentConfig, FamilyConfig, Fraction, StabilizeCriticConfig
from imagekiln.core import Batch, Condition, Family, Loss, Phase, Progress
from imagekiln.nets.adversarial import drift, gradient_penalty, linear_generator, wasserstein_critic
from imagekiln.nets.augmentation import Augmentation
from imagekiln.nets.pggan import Discriminator, Generator, enlarged, held, hold, level_at, shrunk
from imagekiln.nets.stabilizers import Stabilizers

DRIFT_WEIGHT = 1e-3


class PgGanConfig(FamilyConfig):
    """Settings of the progressive GAN family."""

    name: str = "pggan"
    z_dim: int = Field(128, ge=1, description="length of the noise vector (paper: 512)")
    width: int = Field(32, ge=4, description="channels next to the full picture, doubled at each halving")
    widest: int = Field(128, ge=4, description="most channels of a layer (paper: 512)")
    stddev_group: int = Field(4, ge=1, description="pictures compared in the minibatch deviation")
    gamma: float = Field(10.0, ge=0, description="weight of the gradient penalty")
    grow_from: int = Field(4, ge=4, description="height in pixels to begin with; the picture's own = no growing")
    growing_fraction: Fraction = Field(0.5, description="share of the run until all layers are in use")
    fade_fraction: Fraction = Field(0.5, description="share of a stage's time in which the next one is faded in")
    augment: AugmentConfig = AugmentConfig()
    stabilize: StabilizeCriticConfig = StabilizeCriticConfig()


class PgGan(Family):
    """A Wasserstein GAN that learns the large before the small."""

    Config = PgGanConfig
    optimizers = {
        "critic": {"name": "adam", "lr": 1e-3, "betas": (0.0, 0.99)},
        "generator": {"name": "adam", "lr": 1e-3, "betas": (0.0, 0.99)},
    }
    # torch.compile cannot differentiate twice
    train_defaults = {"schedule": "constant", "warmup_fraction": 0.0, "clip_norm": 0.0, "compile": "off"}
    phases = (Phase("critic", trains=("critic",)), Phase("generator", trains=("generator",)))
    # not growing: what is not yet in use does not learn
    check_settings = {"width": 8, "widest": 32, "z_dim": 32, "grow_from": 16}
    averaged = ("generator",)
    gamma: Tensor

    def __init__(self, config: PgGanConfig, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__(config, image_shape, num_classes)
        settings = image_shape, config.width, config.widest, num_classes, config.grow_from
        self.generator = Generator(config.z_dim, *settings)
        self.critic = Discriminator(*settings, stddev_group=config.stddev_group)
        self.augment = Augmentation(config.augment, image_shape[0])
        self.stabilize = Stabilizers(config.stabilize)
        self.register_buffer("gamma", torch.tensor(config.gamma))

    def loss(self, phase: str, batch: Batch, progress: Progress) -> Loss:
        labels, level = batch.labels, self.level(progress)
        z = torch.randn(len(batch.images), self.config.z_dim, device=batch.images.device)

        def seen(images: Tensor) -> Tensor:
            return self.stabilize.seen(self.augment(images), progress.fraction)

        def judged(images: Tensor) -> Tensor:
            return self.critic(images, labels, level=level).float()

        if phase == "generator":
            return Loss(linear_generator(judged(seen(self.generator(z, labels, level=level)))))
        real = shrunk(batch.images, level, self.generator.plan.last)
        with torch.no_grad():
            fake = self.generator(z, labels, level=level)
        seen_real, seen_fake = seen(real), seen(fake)
        # one by one, so that the minibatch deviation compares real pictures with real ones
        on_real, on_fake = judged(seen_real), judged(seen_fake)
        self.augment.observe(on_real - on_fake)  # only the difference of two answers means something here
        minus_distance = wasserstein_critic(on_real, on_fake)
        # between what the critic sees, since it compares the distributions of that
        penalty = gradient_penalty(judged, seen_real, seen_fake)
        total = minus_distance + self.gamma * penalty + DRIFT_WEIGHT * drift(on_real)
        total = total + self.stabilize.penalty(judged, (seen_real, seen_fake), (on_real, on_fake))
        parts = {"on_real": on_real.mean(), "on_fake": on_fake.mean(), "distance": -minus_distance, "penalty": penalty}
        return Loss(total, parts)

    def sample(self, noise: Tensor, condition: Condition, options: None = None) -> Tensor:
        images = self.generator(noise, condition.labels, level=float(self.generator.level))
        return enlarged(images, self.image_shape).clamp(-1, 1)

    def noise_shape(self) -> tuple[int, ...]:
        return (self.config.z_dim,)

    def dials(self) -> Mapping[str, Tensor]:
        return {"gamma": self.gamma, **self.augment.dials()}

    def after_step(self, progress: Progress) -> None:
        self.augment.adapt(progress.fraction)
        hold(self.generator.level, self.level(progress))

    def level(self, progress: Progress) -> float:
        """What is in use: as many stages as are due, and never fewer than there were."""
        stages, config = self.generator.plan, self.config
        due = level_at(progress.fraction, stages.first, stages.last, config.growing_fraction, config.fade_fraction)
        return max(due, held(self.generator.level))
