"""VQ-VAE: pictures become grids of codes from a learned book and back; a small transformer learns which codes follow.

van den Oord et al. 2017 (arXiv:1711.00937). Two kinds of update take turns. "autoencode" trains encoder and decoder on
||x - decoder(e)||^2 / var(x) + beta ||z - sg(e)||^2, and the code-book follows by moving averages. "prior" trains an
autoregressive model of the codes, which draws new pictures. At a width of 128 the networks are the paper's: 662,723
parameters and a book of 32,768. What differs: the prior is a transformer instead of a PixelCNN and learns beside the
autoencoder instead of after it; unused codes start anew; the variance is the batch's instead of the set's.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from imagekiln.config import FamilyConfig, Fraction, Section
from imagekiln.core import UNLABELLED, Batch, Condition, Family, Loss, Phase, Progress
from imagekiln.nets.autoencoder import GridDecoder, GridEncoder, grid_shape
from imagekiln.nets.codebook import Codebook
from imagekiln.nets.token_prior import TokenPrior

LOWEST_VARIANCE = 1e-3
"""Of pictures in [-1, 1]: a batch of one colour must not divide by zero."""

RESTARTS_UNTIL = 0.75
"""Share of the run in which unused codes start anew; afterwards the prior gets to know the book."""


class Options(Section):
    """How pictures are drawn."""

    temperature: float = Field(1.0, gt=0, le=10, description="below 1 = likelier codes, less variety")


class VqvaeConfig(FamilyConfig):
    """Settings of the VQ-VAE family."""

    name: str = "vqvae"
    width: int = Field(64, ge=8, description="channels of encoder and decoder at the grid (paper: 128)")
    num_codes: int = Field(512, ge=2, description="codes in the book")
    code_dim: int = Field(64, ge=1, description="dimensions of a code")
    blocks: int = Field(2, ge=1, le=16, description="residual blocks of encoder and decoder each")
    wide_blocks: bool = Field(False, description="as wide inside as outside, without biases, instead of a quarter")
    halvings: int = Field(2, ge=1, le=6, description="how often the picture is halved to get the grid")
    beta: float = Field(0.25, ge=0, description="how strongly the encoder is pulled to its codes")
    decay: float = Field(0.99, ge=0, lt=1, description="of the moving averages that make the codes")
    restart_below: float = Field(0.05, ge=0, lt=1, description="codes used less than this share of the mean start anew")
    prior_width: int = Field(128, ge=8, multiple_of=8, description="channels of the prior")
    prior_layers: int = Field(3, ge=1, description="layers of the prior")
    label_dropout: Fraction = Field(0.1, description="share of labels hidden from the prior in training")
    sample: Options = Options()


class Vqvae(Family):
    """An encoder to a grid of vectors, a book of codes, a decoder, and a prior over grids."""

    Config = VqvaeConfig
    optimizers = {
        "decoder-encoder": {"name": "adam", "lr": 1e-3, "betas": (0.9, 0.99)},
        "prior": {"name": "adamw", "lr": 1e-3, "betas": (0.9, 0.99)},
    }
    phases = (Phase("autoencode", trains=("encoder", "decoder")), Phase("prior", trains=("prior",)))
    averaged = ("encoder", "codebook", "decoder", "prior")

    def __init__(self, config: VqvaeConfig, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__(config, image_shape, num_classes)
        self.grid = grid_shape(image_shape, config.halvings)
        shape = image_shape, config.width, config.code_dim, config.halvings
        self.encoder = GridEncoder(*shape, blocks=config.blocks, wide=config.wide_blocks)
        self.codebook = Codebook(config.num_codes, config.code_dim, config.decay, config.restart_below)
        self.decoder = GridDecoder(*shape, blocks=config.blocks, wide=config.wide_blocks)
        self.prior = TokenPrior(
            config.num_codes, math.prod(self.grid), config.prior_width, config.prior_layers, num_classes
        )

    def loss(self, phase: str, batch: Batch, progress: Progress) -> Loss:
        if phase == "prior":
            return self._prior_loss(batch)
        x = batch.images
        quantised = self.codebook(self.encoder(x))
        error = (x - self.decoder(quantised.codes).float()).square().mean()
        unexplained = error / x.var().clamp(min=LOWEST_VARIANCE)
        parts = {
            "unexplained_variance": unexplained,
            "commitment": quantised.commitment,
            "perplexity": quantised.perplexity,
        }
        return Loss(unexplained + self.config.beta * quantised.commitment, parts)

    def after_step(self, progress: Progress) -> None:
        self.codebook.update(restart=progress.fraction < RESTARTS_UNTIL)

    @torch.no_grad()
    def sample(self, noise: Tensor, condition: Condition, options: Options | None = None) -> Tensor:
        options = options or self.config.sample
        index_BL = self.prior.draw(noise, condition.labels, options.temperature)
        return self._decode(index_BL.unflatten(1, self.grid))

    def noise_shape(self) -> tuple[int, ...]:
        return (math.prod(self.grid),)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """The decoder's answer to the codes nearest to what the encoder says."""
        return self._decode(self._encode(images))

    def _prior_loss(self, batch: Batch) -> Loss:
        index_BL = self._encode(batch.images).flatten(1)
        labels_B = batch.labels
        if labels_B is not None and self.training:
            hidden_B = torch.rand(len(labels_B), device=labels_B.device) < self.config.label_dropout
            labels_B = torch.where(hidden_B, UNLABELLED, labels_B)
        nats = cross_entropy(self.prior(index_BL, labels_B).flatten(0, 1), index_BL.flatten())
        return Loss(nats, {"nats_a_code": nats})

    @torch.no_grad()
    def _encode(self, images: Tensor) -> Tensor:
        z_BDHW = self.encoder(images)
        return self.codebook.nearest(z_BDHW.movedim(1, -1).flatten(0, 2)).unflatten(0, (len(images), *self.grid))

    def _decode(self, index_BHW: Tensor) -> Tensor:
        return self.decoder(self.codebook.lookup(index_BHW)).float().clamp(-1, 1)
