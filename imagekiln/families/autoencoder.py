"""Autoencoder, the first stage of latent diffusion: pictures become small maps of latents and back.

Rombach et al. 2022 (arXiv:2112.10752, section 3.1 and appendix G); adversarial term and adaptive weight as in Esser et
al. 2021 (arXiv:2012.09841, eq. 6 and 7). With a picture x of P numbers, its reconstruction y and its posterior q,

  total = mean |x - y| + w_p d(x, y) + w_kl KL(q || N(0, 1)) / P + w_a lambda (-mean D(y))
  lambda = ||dR/dL|| / (||dA/dL|| + 1e-4), at most `adversarial_cap`,

R the first two terms, A = -mean D(y), L the decoder's last weight. Everything is per number of a picture, so that one
learning rate suits all sizes; times P it is the paper's sum, and `kl_weight` is a price of nats a picture as there. d
compares maps of a network (`perceptual`): every map's channels scaled to length 1, squared differences summed over
channels, averaged over pixels and maps. In a judge's maps, or in VGG-16's alone, it is not to be compared with LPIPS
(Zhang et al. 2018); with the weights that LPIPS learned, and maps summed as there, it is LPIPS. D is a hinge PatchGAN
without normalisation; it learns for `RAMP` of the run before the decoder hears it, more and more during another `RAMP`.
"tiny" has no posterior and pays nothing. "vq" pays commitment.

What differs from the paper: no learned scale of the error, and D's loss is not halved. The latents of "kl" and "tiny"
are brought to mean 0 and deviation 1, channel by channel, by those of the batch in training and of all batches later
(Ioffe & Szegedy 2015, arXiv:1502.03167), so that what learns them meets channels of one scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from imagekiln.config import FamilyConfig, Fraction
from imagekiln.core import Batch, Condition, Family, HeldOut, Loss, Phase, Progress
from imagekiln.errors import RecipeError
from imagekiln.nets import latent_autoencoder as nets
from imagekiln.nets.adversarial import hinge_critic, linear_generator
from imagekiln.nets.codebook import Codebook
from imagekiln.nets.patch_discriminator import PatchDiscriminator, smallest_side
from imagekiln.nets.vgg import Vgg16

RAMP = 0.05
"""Share of the run in which the discriminator learns alone, and then of that in which its weight rises."""

RESTARTS_UNTIL = 0.75
"""Share of the run in which unused codes start anew."""

COMMITMENT = 0.25
"""How strongly the encoder is pulled to its codes."""

LATENT_DECAY = 0.98
"""Of the moving averages of the latents' mean and square."""

MANY_PIXELS = 128
"""Shorter side from which the discriminator has three strided layers instead of two."""

LEAST_PATCH_WIDTH = 32
"""Channels of the discriminator's first layer; from a width of 64 on they are half of it, as in the paper."""

LEAST_NORM = 1e-4
"""Added to the adversary's gradient norm, so that a discriminator without slope is not divided by zero."""

SMALLEST_ERROR = (1 / 255) ** 2 / 3
"""Mean squared error of rounding to 8 bits in [-1, 1]: a decibel above it would be of no picture."""


class AutoencoderConfig(FamilyConfig):
    """Settings of the autoencoder family."""

    name: str = "autoencoder"
    kind: Literal["tiny", "kl", "vq"] = Field(
        "tiny", description="tiny = TAESD's shape, kl = AutoencoderKL, vq = codes"
    )
    factor: Literal[2, 4, 8, 16, 32] = Field(4, description="height and width of a picture over those of its latents")
    latent_channels: int = Field(4, ge=1, le=256, description="channels of the latents (Stable Diffusion: 4 or 16)")
    width: int = Field(32, ge=8, multiple_of=4, description="channels of the finest level (paper: 128; TAESD: 64)")
    blocks: int = Field(1, ge=1, le=8, description="residual blocks a level (paper: 2; TAESD: 3)")
    num_codes: int = Field(1024, ge=2, description="codes in the book (vq)")
    kl_weight: float = Field(1e-6, ge=0, description="price of a nat a picture, in summed absolute errors (kl)")
    perceptual: str = Field(
        "", description="run folder of a judge, or file of VGG-16, in whose maps pictures are compared; empty = none"
    )
    perceptual_weight: float = Field(1.0, ge=0, description="weight of that distance beside the mean absolute error")
    adversarial_weight: float = Field(0.25, ge=0, description="of the discriminator, times the adaptive one; 0 = off")
    adversarial_start_fraction: Fraction = Field(0.6, description="share of the run before the decoder hears it")
    adversarial_cap: float = Field(1.0, gt=0, description="largest adaptive weight")


class Encoded(NamedTuple):
    """Latents as the decoder takes them, their means, and what they cost beside the error: name, value, its weight."""

    latents: Tensor
    mean: Tensor
    price: tuple[str, Tensor, float]


class Autoencoder(Family):
    """An encoder and a decoder of diffusers' making, and a discriminator of patches."""

    Config = AutoencoderConfig
    optimizers = {
        "network": {"name": "adam", "lr": 1e-3, "betas": (0.9, 0.99)},
        "discriminator": {"name": "adam", "lr": 2e-3, "betas": (0.5, 0.9)},
    }
    # torch.compile frees what a second gradient through the same graph needs. The best moment by errors of pixels and
    # maps is the last one before the discriminator is heard.
    train_defaults = {"batch": 16, "compile": "off", "choose": "last"}
    check_settings = {"width": 8, "blocks": 1, "adversarial_start_fraction": 0.0}
    companions = ("perceptual",)
    published = {"perceptual": Vgg16.load}
    monitor = "reconstruction"

    def __init__(self, config: AutoencoderConfig, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__(config, image_shape, num_classes)
        _, rows, columns = image_shape
        if rows % config.factor or columns % config.factor:
            nearest = max(config.factor, min(rows, columns) // config.factor * config.factor)
            raise RecipeError(
                f"family.factor = {config.factor}: pictures of {rows} x {columns} pixels cannot be divided by it; "
                f"sides must be multiples of {config.factor}. Set data.size, for example to {nearest}."
            )
        self.network = nets.build(
            config.kind,
            image_shape,
            nets.widths_of(config.kind, config.width, config.factor),
            latent_channels=config.latent_channels,
            blocks=config.blocks,
            num_codes=config.num_codes,
        )
        self.phases = (Phase("reconstruct", trains=("network",)),)
        self.moments = nets.LatentMoments(config.latent_channels, LATENT_DECAY)
        self.averaged = ("network", "moments")
        if config.kind == "vq":
            self.codebook = Codebook(config.num_codes, config.latent_channels)
            self.averaged = (*self.averaged, "codebook")
        if config.adversarial_weight:
            self.discriminator = _discriminator(image_shape, config.width)
            self.phases = (*self.phases, Phase("discriminate", trains=("discriminator",)))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(latent channels, rows, columns) of one picture's latents."""
        _, rows, columns = self.image_shape
        return self.config.latent_channels, rows // self.config.factor, columns // self.config.factor

    # -- learning -----------------------------------------------------------------------------------------------------

    def loss(self, phase: str, batch: Batch, progress: Progress) -> Loss:
        if phase == "discriminate":
            return self._critic_loss(batch.images, progress)
        x = batch.images
        latents, _, (name, price, weight) = self._encode(x)
        y = nets.pictures(self.network, latents)
        absolute, distance = (x - y).abs().mean(), self._distance(x, y)
        parts = {"absolute_error": absolute, name: price}
        error = absolute
        if distance is not None:
            parts["perceptual"] = distance.mean()
            error = error + self.config.perceptual_weight * distance.mean()
        if strength := self._strength(progress):
            answer = linear_generator(self.discriminator(y).float())
            error, adaptive = self._with_adversary(error, answer, y, strength * self.config.adversarial_weight)
            parts |= {"adversarial": answer, "adaptive_weight": adaptive}
        return Loss(error + weight * price, parts)

    def _with_adversary(self, error: Tensor, answer: Tensor, y: Tensor, weight: float) -> tuple[Tensor, Tensor]:
        """error + weight lambda answer, and lambda. Slopes are taken at the picture y, from where one pass through the
        decoder is left to do: judge and discriminator are differentiated once and not twice."""
        last = nets.last_layer(self.network)
        slopes = [torch.autograd.grad(part, y)[0] for part in (error, answer)]
        norms = [torch.autograd.grad(y, last, slope, retain_graph=True)[0].norm() for slope in slopes]
        adaptive = (norms[0] / (norms[1] + LEAST_NORM)).clamp(max=self.config.adversarial_cap)
        slope = slopes[0] + weight * adaptive * slopes[1]
        value = error.detach() + weight * adaptive * answer.detach()
        return value + (slope * (y - y.detach())).sum(), adaptive

    def _critic_loss(self, x: Tensor, progress: Progress) -> Loss:
        if progress.fraction < self.config.adversarial_start_fraction - RAMP:
            return Loss(0.0 * next(self.discriminator.parameters()).sum())
        with torch.no_grad():
            y = nets.pictures(self.network, self._encode(x, note=False).latents)
        on_real, on_fake = (self.discriminator(images).float() for images in (x, y))
        return Loss(hinge_critic(on_real, on_fake), {"on_real": on_real.mean(), "on_fake": on_fake.mean()})

    def _strength(self, progress: Progress) -> float:
        """How much of its weight the discriminator has, from 0 to 1."""
        if not self.config.adversarial_weight:
            return 0.0
        return min(1.0, max(0.0, (progress.fraction - self.config.adversarial_start_fraction) / RAMP))

    def after_step(self, progress: Progress) -> None:
        if self.config.kind == "vq":
            self.codebook.update(restart=progress.fraction < RESTARTS_UNTIL)
        self.moments.update()

    # -- measuring ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def held_out(self, batch: Batch, progress: Progress) -> Mapping[str, HeldOut]:
        """Errors of each picture's reconstruction from its latents' mean; what the discriminator says has no part."""
        x = batch.images
        y = nets.pictures(self.network, self._decodable(self._encode(x, note=False).mean))
        difference = (x - y.clamp(-1, 1)).flatten(1)
        squared, absolute = difference.square().mean(1), difference.abs().mean(1)
        distance = self._distance(x, y)
        found = {"reconstruction": (x - y).abs().flatten(1).mean(1)}
        if distance is not None:
            found |= {"perceptual": distance}
            found["reconstruction"] = found["reconstruction"] + self.config.perceptual_weight * distance
        found |= {"mse": squared, "rmse": squared.sqrt(), "mae": absolute}
        found["psnr_db"] = 10 * torch.log10(4 / squared.clamp(min=SMALLEST_ERROR))
        return {name: HeldOut(values) for name, values in found.items()}

    def _distance(self, x: Tensor, y: Tensor) -> Tensor | None:
        """distance_B of pictures in the judge's maps; None without one."""
        if not self.config.perceptual:
            return None
        judge = self._judge()
        with torch.no_grad():
            wanted = [_unit(each) for each in judge.maps(x)]
        pairs = zip(wanted, judge.maps(y.to(x.dtype)), strict=True)
        squares = ((a - _unit(b)).square() for a, b in pairs)
        if learned := getattr(judge, "channel_weights", None):
            parts = zip(learned, squares, strict=False)  # small pictures have fewer maps
            return torch.stack([(weights * square).sum(1).mean((1, 2)) for weights, square in parts]).sum(0)
        return torch.stack([square.sum(1).mean((1, 2)) for square in squares]).mean(0)

    def _judge(self) -> Any:
        judge, where = self.companion.get("perceptual"), f"family.perceptual = {self.config.perceptual!r}"
        if judge is None:
            raise RecipeError(f"{where}: it was not loaded; name a folder that holds a finished run of a judge.")
        if not hasattr(judge, "maps"):
            raise RecipeError(f"{where}: a {judge.config.name} model has no maps to compare pictures in; name a judge.")
        if judge.image_shape[0] != self.image_shape[0]:
            raise RecipeError(
                f"{where}: it judges pictures with {judge.image_shape[0]} channels, these have {self.image_shape[0]}. "
                "Train a judge on this set."
            )
        return judge

    # -- pictures and latents -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """latents_BZhw float32 of images_BCHW in [-1, 1]: the middle of what the encoder says; before codes for vq."""
        return self._encode(images, note=False).mean

    def decode(self, latents: Tensor) -> Tensor:
        """images_BCHW float32 in [-1, 1] of latents_BZhw; for vq, of the codes nearest to them."""
        return nets.pictures(self.network, self._decodable(latents)).clamp(-1, 1)

    def reconstruct(self, images: Tensor) -> Tensor:
        return self.decode(self.encode(images))

    def sample(self, noise: Tensor, condition: Condition, options: None = None) -> Tensor:
        """Decoded noise with the latents' mean and spread of each channel: it shows the decoder's textures, no scenes.
        What draws is a model of the latents."""
        return self.decode(noise if self.config.kind != "vq" else self.moments.spread(noise))

    def noise_shape(self) -> tuple[int, ...]:
        return self.latent_shape

    def drawing_cost(self) -> float:
        """Infinite: pictures of mere noise say nothing about the training, so none are drawn to be looked at."""
        return math.inf

    def _encode(self, x: Tensor, note: bool = True) -> Encoded:
        """In training a draw from the posterior. note: whether the code-book learns from these pictures."""
        mean, logvar = nets.moments(self.network, x)
        if self.config.kind == "vq":
            if not note:
                return Encoded(self._decodable(mean), mean, ("commitment", mean.new_zeros(()), 0.0))
            if self.training:
                self.moments.see(mean)
            quantised = self.codebook(mean)
            return Encoded(quantised.codes, mean, ("commitment", quantised.commitment, COMMITMENT))
        weight = self.config.kl_weight / x[0].numel()
        if note and self.training:
            self.moments.see(mean)
            mean = nets.standardised(mean, *nets.moments_of(mean))
        else:
            mean = nets.standardised(mean, self.moments.mean, self.moments.square)
        if logvar is None:
            return Encoded(mean, mean, ("latent_nats", mean.new_zeros(()), 0.0))
        nats = (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean() / 2
        noise = torch.randn(mean.shape, device=mean.device)  # one order of numbers for all memory layouts
        return Encoded(mean + torch.exp(logvar / 2) * noise, mean, ("latent_nats", nats, weight))

    def _decodable(self, latents: Tensor) -> Tensor:
        if self.config.kind != "vq":
            return latents
        index = self.codebook.nearest(latents.movedim(1, -1).flatten(0, 2))
        return self.codebook.lookup(index.unflatten(0, (len(latents), *latents.shape[2:])))


def _discriminator(image_shape: tuple[int, int, int], width: int) -> PatchDiscriminator:
    channels, *sides = image_shape
    layers = 3 if min(sides) >= MANY_PIXELS else 2
    while layers > 1 and min(sides) < smallest_side(layers):
        layers -= 1
    if min(sides) < smallest_side(layers):
        raise RecipeError(
            f"family.adversarial_weight: pictures of {sides[0]} x {sides[1]} pixels have no patches to judge; expected "
            f"sides of at least {smallest_side(layers)}. Set it to 0, or data.size higher."
        )
    return PatchDiscriminator(channels, max(LEAST_PATCH_WIDTH, width // 2), layers, normalised=False)


def _unit(map_BCHW: Tensor) -> Tensor:
    """Every pixel's channels scaled to length 1; smooth where all of them are 0."""
    map_BCHW = map_BCHW.float()
    return map_BCHW * torch.rsqrt(map_BCHW.square().sum(1, keepdim=True) + 1e-6)
