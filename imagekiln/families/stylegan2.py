"""StyleGAN2: a style enters every layer of the generator by scaling its channels, and noise makes the details.

Karras et al. 2020 (arXiv:1912.04958): non-saturating loss; R1 on every 16th step (Mescheder et al. 2018,
arXiv:1801.04406); path length regularisation on every 4th, that pulls ||J_w^T y|| to its own moving mean; labels as in
Karras et al. 2020 (arXiv:2006.06676). A penalty on every k-th step is k times as strong, and it adds a step in k:
the learning rate is that of the paper times c = k / (k + 1) and its betas are to the power of c: the discriminator's
below hold c = 16 / 17.

The settings are small. The papers' networks, with z_dim = widest = 512: CIFAR-10 width 512, discriminator "plain",
stddev_group 32; 64 pixels width 256, gamma 0.0128; FFHQ-256 width 64, mapping_layers 8, gamma 1; FFHQ-1024 width 32,
mapping_layers 8, gamma 10; the last three have path_weight 2 and mixing 0.9. With path length set optim.generator.lr to
0.002 and its betas to [0, 0.992], which hold c = 4 / 5. What differs from the papers: styles are mixed picture by
picture, not batch by batch; a picture without a label gets the mean of the labels' vectors.

noise_shape() holds z and the noise of all layers, so that nothing else is random.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from imagekiln.config import AugmentConfig, FamilyConfig, Fraction, Section, StabilizeConfig
from imagekiln.core import Batch, Condition, Family, Loss, Phase, Progress
from imagekiln.nets.adversarial import cross_entropy_critic, non_saturating_generator, zero_centred_penalty
from imagekiln.nets.augmentation import Augmentation
from imagekiln.nets.stabilizers import Stabilizers
from imagekiln.nets.stylegan2 import Discriminator, Generator, path_lengths

R1_EVERY, PATH_EVERY = 16, 4

PATH_SHARE = 2
"""Path lengths are measured on one picture in two."""

PATH_DECAY = 0.01
"""How far the mean path length moves at a time."""


class Options(Section):
    """How pictures are drawn."""

    truncation: float = Field(1.0, ge=0, le=2, description="below 1 more typical and less different pictures")


class StyleGan2Config(FamilyConfig):
    """Settings of the StyleGAN2 family."""

    name: str = "stylegan2"
    z_dim: int = Field(128, ge=1, description="length of the noise vector and of the styles (paper: 512)")
    width: int = Field(32, ge=4, description="channels next to the picture, doubled at each halving")
    widest: int = Field(128, ge=4, description="most channels of a layer (paper: 512)")
    mapping_layers: int = Field(2, ge=1, le=16, description="layers of the mapping network")
    discriminator: Literal["residual", "plain"] = Field("residual", description="whether its blocks have shortcuts")
    stddev_group: int = Field(4, ge=1, description="pictures compared in the minibatch deviation")
    gamma: float = Field(0.01, ge=0, description="R1 weight; about 0.0002 pixels / batch, more where it is unstable")
    path_weight: float = Field(0.0, ge=0, description="weight of the path length penalty (paper: 2); 0 = none")
    mixing: Fraction = Field(0.0, description="share of the fakes in training that have two styles (paper: 0.9)")
    augment: AugmentConfig = AugmentConfig()
    stabilize: StabilizeConfig = StabilizeConfig()
    sample: Options = Options()


class StyleGan2(Family):
    """A generator controlled by styles against a discriminator with lazy penalties."""

    Config = StyleGan2Config
    optimizers = {
        "discriminator": {"name": "adam", "lr": 0.0025 * 16 / 17, "betas": (0.0, 0.99 ** (16 / 17))},
        "generator": {"name": "adam", "lr": 0.0025, "betas": (0.0, 0.99)},
    }
    # torch.compile cannot differentiate twice
    train_defaults = {"schedule": "constant", "warmup_fraction": 0.0, "clip_norm": 0.0, "compile": "off"}
    check_settings = {"width": 8, "widest": 32, "z_dim": 32, "path_weight": 2.0, "mixing": 0.9}
    averaged = ("generator",)
    gamma: Tensor
    mean_length: Tensor

    def __init__(self, config: StyleGan2Config, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__(config, image_shape, num_classes)
        phases = [
            Phase("discriminator", trains=("discriminator",)),
            Phase("r1", trains=("discriminator",), every=R1_EVERY),
            Phase("generator", trains=("generator",)),
        ]
        if config.path_weight:
            phases.append(Phase("path", trains=("generator",), every=PATH_EVERY))
        self.phases = tuple(phases)
        self.generator = Generator(
            config.z_dim, image_shape, config.width, config.widest, config.mapping_layers, num_classes
        )
        self.discriminator = Discriminator(
            image_shape,
            config.width,
            config.widest,
            num_classes,
            stddev_group=config.stddev_group,
            residual=config.discriminator == "residual",
        )
        self.augment = Augmentation(config.augment, image_shape[0])
        self.stabilize = Stabilizers(config.stabilize)
        self.register_buffer("gamma", torch.tensor(config.gamma))
        self.register_buffer("mean_length", torch.zeros(()))

    def loss(self, phase: str, batch: Batch, progress: Progress) -> Loss:
        real, labels = batch.images, batch.labels

        def seen(images: Tensor) -> Tensor:
            return self.stabilize.seen(self.augment(images), progress.fraction)

        def judged(images: Tensor) -> Tensor:
            return self.discriminator(images, labels).float()

        if phase == "r1":
            penalty = zero_centred_penalty(lambda images: judged(seen(images)), real)
            return Loss(self.gamma / 2 * penalty, {"penalty": penalty})
        if phase == "path":
            return self._path(real, labels)
        if phase == "generator":
            styles, noise = self._styles(real, labels, track=self.training)
            return Loss(non_saturating_generator(judged(seen(self.generator.synthesize(styles, noise)))))
        with torch.no_grad():
            fake = self.generator.synthesize(*self._styles(real, labels))
        seen_real, seen_fake = seen(real), seen(fake)
        # one by one, so that the minibatch deviation compares real pictures with real ones
        on_real, on_fake = judged(seen_real), judged(seen_fake)
        self.augment.observe(on_real)
        total = cross_entropy_critic(*self.stabilize.exchanged(on_real, on_fake))
        total = total + self.stabilize.penalty(judged, (seen_real, seen_fake), (on_real, on_fake))
        return Loss(total, {"on_real": on_real.mean(), "on_fake": on_fake.mean()})

    def after_step(self, progress: Progress) -> None:
        self.augment.adapt(progress.fraction)

    def dials(self) -> Mapping[str, Tensor]:
        return {"gamma": self.gamma, **self.augment.dials()}

    def sample(self, noise: Tensor, condition: Condition, options: Options | None = None) -> Tensor:
        return self.from_styles(self.styles(noise, condition, options), noise).clamp(-1, 1)

    def styles(self, noise: Tensor, condition: Condition, options: Options | None = None) -> Tensor:
        """styles_BLZ: a style a place, from coarse to fine, of noise as for `sample`."""
        net, truncation = self.generator, (options or self.config.sample).truncation
        style_BZ = net.mapping(noise[:, : net.z_dim], condition.labels)
        if truncation != 1:
            style_BZ = net.pulled(style_BZ, truncation)
        return style_BZ[:, None].expand(-1, net.num_styles, -1)

    def from_styles(self, styles: Tensor, noise: Tensor) -> Tensor:
        """images_BCHW, around [-1, 1], of styles_BLZ and of noise as for `sample`, whose layers' part is used."""
        return self.generator.synthesize(styles, noise[:, self.generator.z_dim :])

    def noise_shape(self) -> tuple[int, ...]:
        return (self.generator.noise_size,)

    def _styles(self, real: Tensor, labels: Tensor | None, *, track: bool = False) -> tuple[Tensor, Tensor]:
        """Styles and layer noise for as many fakes as there are real pictures, some of them with two styles."""
        net, count = self.generator, len(real)
        noise_BN = torch.randn(count, net.noise_size, device=real.device)
        first_BZ = net.mapping(noise_BN[:, : net.z_dim], labels)
        if track:
            net.track(first_BZ)
        if not self.config.mixing:
            return first_BZ[:, None].expand(-1, net.num_styles, -1), noise_BN[:, net.z_dim :]
        second_BZ = net.mapping(torch.randn(count, net.z_dim, device=real.device), labels)
        place_B = torch.randint(1, net.num_styles, (count,), device=real.device)
        mixed_B = torch.rand(count, device=real.device) < self.config.mixing
        crossover_B = torch.where(mixed_B, place_B, net.num_styles)
        return net.mixed(first_BZ, second_BZ, crossover_B), noise_BN[:, net.z_dim :]

    def _path(self, real: Tensor, labels: Tensor | None) -> Loss:
        count = max(1, len(real) // PATH_SHARE)
        styles, noise = self._styles(real[:count], None if labels is None else labels[:count])
        lengths_B = path_lengths(lambda styles_BLZ: self.generator.synthesize(styles_BLZ, noise), styles)
        with torch.no_grad():
            mean = self.mean_length.lerp(lengths_B.mean().to(self.mean_length), PATH_DECAY)
            if self.training:
                self.mean_length.copy_(torch.where(mean.isfinite(), mean, self.mean_length))
        penalty = (lengths_B - mean).square().mean()
        return Loss(self.config.path_weight * penalty, {"length": lengths_B.mean()})
