"""StyleGAN: a style sets the mean and deviation of every map of the generator, and noise makes the details.

Karras et al. 2019 (arXiv:1812.04948): non-saturating loss, with gamma / 2 E[||dD/d real||^2] (R1, Mescheder et al.
2018, arXiv:1801.04406) as a part of the discriminator's loss on every step and not in a phase of its own, which would
be a step of Adam of its own. Some fakes have two styles, one up to a layer drawn at random and another after it. It
grows as in the paper: the part `growing_fraction` of a run is divided evenly among the stages, `fade_fraction` of each
goes into fading in the next, real pictures are halved to the stage's size and blended, and all that is a function of
the images seen. It never goes back when a finished run is made longer. The weights hold how far they have grown
(`generator.level`), so an earlier checkpoint draws its own size, pixels repeated.

The settings are small. The paper's networks have z_dim = widest = 512, mapping_layers 8 and width 512 at 32 pixels, 256
at 64, 64 at 256, 16 at 1024. What differs from the paper: stages last a share of the run instead of 1.2 million
pictures; the batch and the learning rate are the same at every size; an optimizer is not emptied when a stage begins,
but what it holds of the new layers begins there; styles are mixed picture by picture, not batch by batch; labels, where
there are any: a learned vector beside z and a projection in the discriminator, and a picture without a label gets the
mean of the labels' vectors. `grow_from` of the picture's height trains all layers from the first step.

noise_shape() holds z and the noise of all layers, so that nothing else is random.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from imagekiln.config import AugmentConfig, FamilyConfig, Fraction, Section, StabilizeConfig
from imagekiln.core import Batch, Condition, Family, Loss, Phase, Progress
from imagekiln.nets.adversarial import cross_entropy_critic, non_saturating_generator, zero_centred_penalty
from imagekiln.nets.augmentation import Augmentation
from imagekiln.nets.pggan import Discriminator, enlarged, held, hold, level_at, shrunk
from imagekiln.nets.stabilizers import Stabilizers
from imagekiln.nets.stylegan1 import Generator


class Options(Section):
    """How pictures are drawn."""

    truncation: float = Field(1.0, ge=0, le=2, description="below 1 more typical and less different (paper: 0.7)")
    truncated_layers: int = Field(8, ge=0, description="layers it is applied to, from the coarsest")


class StyleGan1Config(FamilyConfig):
    """Settings of the StyleGAN family."""

    name: str = "stylegan1"
    z_dim: int = Field(128, ge=1, description="length of the noise vector and of the styles (paper: 512)")
    width: int = Field(32, ge=4, description="channels next to the full picture, doubled at each halving")
    widest: int = Field(128, ge=4, description="most channels of a layer (paper: 512)")
    mapping_layers: int = Field(4, ge=1, le=16, description="layers of the mapping network (paper: 8)")
    stddev_group: int = Field(4, ge=1, description="pictures compared in the minibatch deviation")
    gamma: float = Field(10.0, ge=0, description="R1 weight; less for small pictures")
    mixing: Fraction = Field(0.9, description="share of the fakes in training that have two styles")
    grow_from: int = Field(8, ge=4, description="height in pixels to begin with; the picture's own = no growing")
    growing_fraction: Fraction = Field(0.5, description="share of the run until all layers are in use")
    fade_fraction: Fraction = Field(0.5, description="share of a stage's time in which the next one is faded in")
    augment: AugmentConfig = AugmentConfig()
    stabilize: StabilizeConfig = StabilizeConfig()
    sample: Options = Options()


class StyleGan1(Family):
    """A generator controlled by styles, grown layer by layer."""

    Config = StyleGan1Config
    optimizers = {
        "discriminator": {"name": "adam", "lr": 1e-3, "betas": (0.0, 0.99)},
        "generator": {"name": "adam", "lr": 1e-3, "betas": (0.0, 0.99)},
    }
    # torch.compile cannot differentiate twice
    train_defaults = {"schedule": "constant", "warmup_fraction": 0.0, "clip_norm": 0.0, "compile": "off"}
    phases = (Phase("discriminator", trains=("discriminator",)), Phase("generator", trains=("generator",)))
    # not growing: what is not yet in use does not learn
    check_settings = {"width": 8, "widest": 32, "z_dim": 32, "grow_from": 16}
    averaged = ("generator",)
    gamma: Tensor

    def __init__(self, config: StyleGan1Config, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__(config, image_shape, num_classes)
        widths = image_shape, config.width, config.widest
        self.generator = Generator(config.z_dim, *widths, config.mapping_layers, num_classes, config.grow_from)
        self.discriminator = Discriminator(
            *widths, num_classes, config.grow_from, stddev_group=config.stddev_group, blur=True
        )
        self.augment = Augmentation(config.augment, image_shape[0])
        self.stabilize = Stabilizers(config.stabilize)
        self.register_buffer("gamma", torch.tensor(config.gamma))

    def loss(self, phase: str, batch: Batch, progress: Progress) -> Loss:
        labels, level = batch.labels, self.level(progress)

        def seen(images: Tensor) -> Tensor:
            return self.stabilize.seen(self.augment(images), progress.fraction)

        def judged(images: Tensor) -> Tensor:
            return self.discriminator(images, labels, level=level).float()

        if phase == "generator":
            return Loss(non_saturating_generator(judged(seen(self._fakes(batch, level, track=self.training)))))
        real = shrunk(batch.images, level, self.generator.plan.last)
        with torch.no_grad():
            fake = self._fakes(batch, level)
        seen_real, seen_fake = seen(real), seen(fake)
        # one by one, so that the minibatch deviation compares real pictures with real ones
        on_real, on_fake = judged(seen_real), judged(seen_fake)
        self.augment.observe(on_real)
        penalty = zero_centred_penalty(lambda images: judged(seen(images)), real)
        total = cross_entropy_critic(*self.stabilize.exchanged(on_real, on_fake)) + self.gamma / 2 * penalty
        total = total + self.stabilize.penalty(judged, (seen_real, seen_fake), (on_real, on_fake))
        return Loss(total, {"on_real": on_real.mean(), "on_fake": on_fake.mean(), "penalty": penalty})

    def sample(self, noise: Tensor, condition: Condition, options: Options | None = None) -> Tensor:
        return self.from_styles(self.styles(noise, condition, options), noise).clamp(-1, 1)

    def styles(self, noise: Tensor, condition: Condition, options: Options | None = None) -> Tensor:
        """styles_BLZ: a style a place, from coarse to fine, of noise as for `sample`."""
        options, net = options or self.config.sample, self.generator
        style_BZ = net.mapping(noise[:, : net.z_dim], condition.labels)
        if options.truncation == 1:
            return style_BZ[:, None].expand(-1, net.num_styles, -1)
        places_B = torch.full((len(style_BZ),), options.truncated_layers, device=style_BZ.device)
        return net.mixed(net.pulled(style_BZ, options.truncation), style_BZ, places_B)

    def from_styles(self, styles: Tensor, noise: Tensor) -> Tensor:
        """images_BCHW, around [-1, 1], of styles_BLZ and of noise as for `sample`, whose layers' part is used."""
        net = self.generator
        images = net.synthesize(styles, noise[:, net.z_dim :], level=float(net.level))
        return enlarged(images, self.image_shape)

    def noise_shape(self) -> tuple[int, ...]:
        return (self.generator.noise_size,)

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

    def _fakes(self, batch: Batch, level: float, *, track: bool = False) -> Tensor:
        """As many fakes as there are real pictures, some of them with two styles."""
        net, count, device = self.generator, len(batch.images), batch.images.device
        noise_BN = torch.randn(count, net.noise_size, device=device)
        first_BZ = net.mapping(noise_BN[:, : net.z_dim], batch.labels)
        if track:
            net.track(first_BZ)
        styles_BLZ = first_BZ[:, None].expand(-1, net.num_styles, -1)
        if self.config.mixing:
            second_BZ = net.mapping(torch.randn(count, net.z_dim, device=device), batch.labels)
            place_B = torch.randint(1, net.styles_at(level), (count,), device=device)
            mixed_B = torch.rand(count, device=device) < self.config.mixing
            styles_BLZ = net.mixed(first_BZ, second_BZ, torch.where(mixed_B, place_B, net.num_styles))
        return net.synthesize(styles_BLZ, noise_BN[:, net.z_dim :], level=level)
