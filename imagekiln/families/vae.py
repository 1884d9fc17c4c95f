"""Variational autoencoder: pictures become points in a small space and back; beta weighs order against sharpness.

Kingma & Welling 2014 (arXiv:1312.6114); beta as in Higgins et al. 2017. The likelihood is a Gaussian whose one standard
deviation is learned (Rybkin et al. 2021, arXiv:2006.13202), so reconstruction and divergence balance themselves and
both are in nats per picture. Against a latent space that stays unused: warm-up of beta (Bowman et al. 2016,
arXiv:1511.06349) and free bits (Kingma et al. 2016, arXiv:1606.04934, appendix C.8); for order at a given amount of
information: a capacity that grows, weight * |divergence - C(t)| (Burgess et al. 2018, arXiv:1804.03599, eq. 8).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from imagekiln.config import FamilyConfig, Fraction
from imagekiln.core import Batch, Condition, Family, Loss, Phase, Progress
from imagekiln.errors import RecipeError
from imagekiln.nets.autoencoder import ConvDecoder, ConvEncoder, VaeDecoder, VaeEncoder

NETWORKS = {"residual": (VaeEncoder, VaeDecoder), "convolutional": (ConvEncoder, ConvDecoder)}

LOWEST_LOG_STD = math.log(1 / 255)
"""Half an 8-bit grey level in [-1, 1]: no picture is known more exactly than that."""


class VaeConfig(FamilyConfig):
    """Settings of the VAE family."""

    name: str = "vae"
    z_dim: int = Field(32, ge=1, description="dimensions of the latent space")
    width: int = Field(32, ge=8, description="channels of the finest level")
    networks: Literal["residual", "convolutional"] = Field(
        "residual", description="blocks with group normalisation, or plain layers with batch normalisation"
    )
    beta: float = Field(1.0, ge=0, description="weight of the divergence from the prior; above 1 = beta-VAE")
    warmup_fraction: Fraction = Field(0.0, description="share of the run in which beta rises from 0")
    free_nats: float = Field(0.0, ge=0, description="divergence of every dimension that costs nothing")
    capacity_nats: float = Field(0.0, ge=0, description="divergence of a picture aimed at instead of 0; 0 = off")
    capacity_weight: float = Field(1000.0, ge=0, description="price of a nat above or below the capacity")
    capacity_fraction: Fraction = Field(0.5, description="share of the run in which the capacity rises from 0")


class Vae(Family):
    """An encoder to a Gaussian, a decoder from it, and the scale of the decoder's error."""

    Config = VaeConfig
    optimizers = {"decoder-encoder-noise": {"name": "adamw", "lr": 1e-3, "betas": (0.9, 0.99)}}
    monitor = "elbo"
    phases = (Phase("elbo", trains=("encoder", "decoder", "noise")),)
    averaged = ("encoder", "decoder", "noise")

    def __init__(self, config: VaeConfig, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__(config, image_shape, num_classes)
        if config.capacity_nats and (config.beta != 1 or config.warmup_fraction or config.free_nats):
            raise RecipeError(
                f"family.capacity_nats = {config.capacity_nats}: a capacity replaces beta, warmup_fraction and "
                "free_nats; leave these at their defaults, or capacity_nats at 0."
            )
        encoder, decoder = NETWORKS[config.networks]
        self.encoder = encoder(image_shape, config.width, config.z_dim, num_classes)
        self.decoder = decoder(image_shape, config.width, config.z_dim, num_classes)
        self.noise = nn.ParameterDict({"log_std": nn.Parameter(torch.tensor(-1.0))})

    def loss(self, phase: str, batch: Batch, progress: Progress) -> Loss:
        x = batch.images
        mean, logvar = (part.float() for part in self.encoder(x, batch.labels))
        z = mean + torch.exp(logvar / 2) * torch.randn_like(mean)
        log_std = self.noise["log_std"].clamp(min=LOWEST_LOG_STD)
        error = (x - self.decoder(z, batch.labels).float()).flatten(1).square()
        nats = (error / (2 * torch.exp(2 * log_std)) + log_std + math.log(2 * math.pi) / 2).sum(1).mean()
        surplus = mean.square() + logvar.exp() - 1 - logvar
        divergence = surplus.sum(1).mean() / 2
        objective = nats + self._price(divergence, surplus, progress)
        parts = {"elbo_nats": -(nats + divergence), "reconstruction_nats": nats, "divergence_nats": divergence}
        # Differentiated per pixel, so that one learning rate and clipping norm suit all picture sizes.
        return Loss(objective / x[0].numel(), parts)

    def _price(self, divergence: Tensor, surplus_BZ: Tensor, progress: Progress) -> Tensor:
        """What the divergence costs now. Held-out pictures pay the price of the run's end: it ranks checkpoints."""
        config = self.config
        fraction = progress.fraction if self.training else 1.0
        if config.capacity_nats:
            share = min(1.0, fraction / config.capacity_fraction) if config.capacity_fraction else 1.0
            return config.capacity_weight * (divergence - share * config.capacity_nats).abs()
        if config.free_nats:
            divergence = (surplus_BZ.mean(0) / 2).clamp(min=config.free_nats).sum()
        beta = config.beta * min(1.0, fraction / config.warmup_fraction) if config.warmup_fraction else config.beta
        return beta * divergence

    def sample(self, noise: Tensor, condition: Condition, options: None = None) -> Tensor:
        return self.decoder(noise, condition.labels).clamp(-1, 1)

    def noise_shape(self) -> tuple[int, ...]:
        return (self.config.z_dim,)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """The decoder's answer to the middle of what the encoder says, labels hidden."""
        return self.sample(self.noise_of(images, Condition()), Condition())

    @torch.no_grad()
    def noise_of(self, images: Tensor, condition: Condition) -> Tensor:
        """The noise that draws given pictures, as far as the encoder knows: the middle of what it says."""
        return self.encoder(images, condition.labels)[0]
