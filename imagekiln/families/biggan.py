"""BigGAN: residual networks with spectral norm, orthogonal weights, shared labels and a truncation of the noise.

Brock et al. 2019 (arXiv:1809.11096): hinge loss, Adam with beta1 0, several discriminator steps, hierarchical z, shared
class embedding, orthogonal initialisation and regularisation; self-attention is SAGAN's (Zhang et al. 2019,
arXiv:1805.08318). `nets/biggan.py` lists the settings of the published networks. What differs: labels of fakes are
those of the batch, the generator's batch is as large as the discriminator's, and truncation maps the noise through the
cut distribution's inverse instead of drawing again, so that one seed is one picture. The learning rates are for the
small default; the published networks want 2e-4 or less.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from imagekiln.config import AugmentConfig, FamilyConfig, Section, StabilizeConfig
from imagekiln.core import Batch, Condition, Family, Loss, Phase, Progress, mix, seeded_noise
from imagekiln.nets.adversarial import hinge_critic, linear_generator, orthogonal_penalty
from imagekiln.nets.augmentation import Augmentation
from imagekiln.nets.biggan import Discriminator, Generator, Init, Share, standing, truncate
from imagekiln.nets.stabilizers import Stabilizers

STANDING_BATCH = 64
"""Pictures in a batch of the standing statistics."""


class Options(Section):
    """How pictures are drawn."""

    truncation: float = Field(0.0, ge=0, le=8, description="largest |z|: smaller = more typical, less varied; 0 = off")
    standing: int = Field(8, ge=0, le=1000, description="batches that normalisation is measured on; 0 = as in training")


class BigganConfig(FamilyConfig):
    """Settings of the BigGAN family."""

    name: str = "biggan"
    z_dim: int = Field(80, ge=1, description="length of the noise vector")
    width: int = Field(8, ge=1, description="generator's channels: 4 times as many up to 32 pixels, a pyramid above")
    critic_width: int = Field(8, ge=1, description="discriminator's channels, in the same units")
    shared_dim: int = Field(128, ge=0, description="length of the shared label embedding; 0 = a table for every norm")
    hierarchical: bool = Field(True, description="every block sees a piece of z of its own")
    attention_at: Share = Field("half", description="map with self-attention, as a share of the picture's side")
    init: Init = Field("orthogonal", description="initial weights")
    orthogonal_weight: float = Field(1e-4, ge=0, description="weight of the generator's orthogonal regularisation")
    critic_steps: int = Field(4, ge=1, description="discriminator updates a generator update")
    augment: AugmentConfig = AugmentConfig()
    stabilize: StabilizeConfig = StabilizeConfig()
    sample: Options = Options()


class Biggan(Family):
    """A generator and a discriminator, both with normalised weights."""

    Config = BigganConfig
    optimizers = {
        "discriminator": {"name": "adam", "lr": 1e-3, "betas": (0.0, 0.999), "eps": 1e-6},
        "generator": {"name": "adam", "lr": 1e-3, "betas": (0.0, 0.999), "eps": 1e-6},
    }
    train_defaults = {"schedule": "constant", "warmup_fraction": 0.0, "clip_norm": 0.0}
    check_settings = {"width": 4, "critic_width": 4, "critic_steps": 1, "sample": {"standing": 1}}
    averaged = ("generator",)

    def __init__(self, config: BigganConfig, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__(config, image_shape, num_classes)
        self.phases = (
            Phase("discriminator", trains=("discriminator",), repeat=config.critic_steps),
            Phase("generator", trains=("generator",)),
        )
        self.generator = Generator(
            config.z_dim,
            image_shape,
            config.width,
            num_classes,
            config.shared_dim,
            config.hierarchical,
            config.attention_at,
            config.init,
        )
        self.discriminator = Discriminator(
            image_shape, config.critic_width, num_classes, config.attention_at, config.init
        )
        self.augment = Augmentation(config.augment, image_shape[0])
        self.stabilize = Stabilizers(config.stabilize)
        self._stood: tuple[tuple[float, ...], nn.Module] | None = None

    def loss(self, phase: str, batch: Batch, progress: Progress) -> Loss:
        real, labels = batch.images, batch.labels
        z = torch.randn(len(real), self.config.z_dim, device=real.device)
        if phase == "generator":
            fake = self.stabilize.seen(self.augment(self.generator(z, labels)), progress.fraction)
            adversarial = linear_generator(self.discriminator(fake, labels).float())
            if not self.config.orthogonal_weight:
                return Loss(adversarial)
            penalty = orthogonal_penalty(self.generator.matrices())
            return Loss(
                adversarial + self.config.orthogonal_weight * penalty,
                {"adversarial": adversarial, "orthogonal": penalty},
            )
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

    def sample(self, noise: Tensor, condition: Condition, options: Options | None = None) -> Tensor:
        options = options or self.config.sample
        if options.truncation:
            noise = truncate(noise, options.truncation)
        generator = self._standing(options, noise) if options.standing else self.generator
        return generator(noise, condition.labels)

    def noise_shape(self) -> tuple[int, ...]:
        return (self.config.z_dim,)

    def _standing(self, options: Options, noise: Tensor) -> nn.Module:
        """The generator with statistics of these weights at this truncation, kept until one of them changes."""
        weights = [*self.generator.parameters(), *self.generator.buffers()]
        # PyTorch counts every change of a tensor in place.
        key = (options.truncation, options.standing, *(float(weight._version) for weight in weights))
        if self._stood is None or self._stood[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                self._stood = key, standing(self.generator, self._fixed_inputs(options, noise))
        return self._stood[1]

    def _fixed_inputs(self, options: Options, noise: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The same noise every time, from seeds no picture has, and labels of all classes alike."""
        for number in range(options.standing):
            seeds = [mix("standing", number, index) for index in range(STANDING_BATCH)]
            z = seeded_noise(seeds, self.noise_shape()).to(noise.device)
            labels = torch.tensor([seed % max(1, self.num_classes) for seed in seeds], device=noise.device)
            yield truncate(z, options.truncation) if options.truncation else z, labels if self.num_classes else None
