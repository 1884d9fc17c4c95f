"""Diffusion and rectified flow in pixels: a U-Net learns to take noise away, with or without class labels.

Path (variance preserving or rectified flow), target (v, x or eps) and the density of noise levels are three independent
choices; with path "vp", target "v" and a log-normal density this is EDM (Karras et al. 2022, arXiv:2206.00364), with
path "rf" it is rectified flow (Liu et al. 2023, arXiv:2209.03003). Labels are dropped at random in training, so that
classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598) is possible and unlabelled pictures are of use: both
are the null class, the last row of the embedding.

With a `teacher` it learns to draw in a step or two what that one draws in many, guidance included, with a discriminator
on that one's maps (see `diffusion.distillation`).

With `augment_condition` the net hears what was done to each training picture (EDM, appendix F.2) and draws as if
nothing had been done, so that turned or shifted training pictures do not make it draw turned or shifted ones.

Shapes: B images, C channels, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from imagekiln.config import AUGMENT_LABELS, FamilyConfig, Fraction
from imagekiln.core import Batch, Condition, Family, HeldOut, Loss, Phase, Progress, seeded_noise
from imagekiln.diffusion import densities, distillation, paths, samplers
from imagekiln.diffusion.distillation import Distillation, Lesson
from imagekiln.diffusion.drawing import Drawing, draw, guided_by
from imagekiln.errors import RecipeError, UsageError
from imagekiln.nets.feature_heads import FeatureHeads
from imagekiln.nets.unet import UNet, UNetConfig

DENOISING_SIGMA = 0.5
"""Noise level at which `reconstruct` denoises: the picture is still recognisable, its texture is gone."""

HELD_OUT_LEVELS = 8
"""Noise levels of the held-out loss."""


class DiffusionConfig(FamilyConfig):
    """Settings of the diffusion family."""

    name: str = "diffusion"
    path: Literal["rf", "vp"] = "rf"
    target: Literal["v", "x", "eps"] = "v"
    density_mean: float = Field(-0.5, description="mean of ln sigma in training")
    density_std: float = Field(1.2, gt=0, description="standard deviation of ln sigma in training")
    widths: tuple[int, ...] = Field((32, 64, 128), min_length=1, description="channels by level, fine to coarse")
    layers: int = Field(1, ge=1, le=8, description="residual blocks a level")
    attention: tuple[bool, ...] = Field((False, False, True), description="self-attention by level")
    dropout: Fraction = 0.0
    label_dropout: Fraction = Field(0.1, description="share of labels hidden in training")
    augment_condition: bool = Field(
        False, description="tell the net what data.augment did to each picture, so that drawn ones do not show it"
    )
    teacher: str = Field("", description="run that it learns to draw like, in few steps; empty = from pictures alone")
    distillation: Distillation = Distillation()
    sample: Drawing = Drawing()


class Diffusion(Family):
    """A denoiser on a path from pictures to noise."""

    Config = DiffusionConfig
    optimizers = {
        "unet": {"name": "adamw", "lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.01},
        "heads": {"name": "adam", "lr": 1e-3, "betas": (0.0, 0.99)},
    }
    companions = ("teacher",)
    guidable = True
    latents = True
    monitor = "denoise"
    phases: Sequence[Phase] = (Phase("denoise", trains=("unet",)),)
    averaged = ("unet",)

    def __init__(self, config: DiffusionConfig, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__(config, image_shape, num_classes)
        self.path = paths.path(config.path)
        head = min(64, *config.widths)
        try:
            self.unet = UNet(
                UNetConfig(
                    sample_size=image_shape[1],
                    in_channels=image_shape[0],
                    out_channels=image_shape[0],
                    block_out_channels=config.widths,
                    layers_per_block=config.layers,
                    attention=config.attention,
                    attention_head_dim=head,
                    norm_num_groups=min(32, *config.widths),
                    resnet_time_scale_shift="scale_shift",
                    dropout=config.dropout,
                    num_class_embeds=num_classes + 1 if num_classes else None,
                    num_augment=len(AUGMENT_LABELS) if config.augment_condition else 0,
                )
            )
        except UsageError as error:
            raise RecipeError(f"family.widths = {list(config.widths)}: {error}") from error
        if config.teacher:
            config.distillation.check(config.sample)
        if config.teacher and config.distillation.adversarial_weight:
            self.heads = FeatureHeads(self.unet.map_widths)
            self.phases = (*self.phases, Phase("discriminate", trains=("heads",)))

    def loss(self, phase: str, batch: Batch, progress: Progress) -> Loss:
        x, config = batch.images, self.config
        spread = densities.stratified(torch.rand((), device=x.device), len(x))
        sigma_B = densities.log_normal(spread, config.density_mean, config.density_std)
        eps = torch.randn_like(x)
        labels_B = self._labels(batch.labels, len(x), x.device)
        if labels_B is not None and self.training:
            hidden_B = torch.rand(len(x), device=x.device) < config.label_dropout
            labels_B = torch.where(hidden_B, self.num_classes, labels_B)
        if phase == "discriminate":
            return distillation.discrimination(self._lesson(labels_B), config.distillation, self.path, x, sigma_B)
        if config.teacher:
            return distillation.imitation(self._lesson(labels_B), config.distillation, self.path, x, sigma_B, progress)
        z = self.path.diffuse(x, eps, sigma_B)
        augment_BA = batch.augment if config.augment_condition else None
        output = self.unet(z, self.path.time(sigma_B), labels_B, augment_BA)
        error = output.float() - self.path.target(config.target, x, eps, sigma_B)
        return Loss(error.square().mean())

    @torch.no_grad()
    def held_out(self, batch: Batch, progress: Progress) -> Mapping[str, HeldOut]:
        """The loss of each picture at one of `HELD_OUT_LEVELS` noise levels, which divide the density evenly; with a
        teacher the distance from what that one draws."""
        x, config = batch.images, self.config
        labels_B = self._labels(batch.labels, len(x), x.device)
        if config.teacher:
            return {"denoise": distillation.held_out(self._lesson(labels_B), config.distillation, self.path, x)}
        sigma_B = densities.log_normal(densities.even(x, HELD_OUT_LEVELS), config.density_mean, config.density_std)
        eps = torch.randn_like(x)
        output = self.unet(self.path.diffuse(x, eps, sigma_B), self.path.time(sigma_B), labels_B)
        error = output.float() - self.path.target(config.target, x, eps, sigma_B)
        return {"denoise": HeldOut(error.square().flatten(1).mean(1), sigma_B)}

    def drawing_cost(self) -> float:
        return self.config.sample.cost(guided=self.num_classes > 0)

    @torch.no_grad()
    def sample(self, noise: Tensor, condition: Condition, options: Drawing | None = None) -> Tensor:
        options = options or self.config.sample
        labels_B = self._labels(condition.labels, len(noise), noise.device)
        null_B = None if labels_B is None else torch.full_like(labels_B, self.num_classes)
        weaker = None if null_B is None else self._denoiser(null_B)
        if self.guide is not None:
            weaker = self.guide._denoiser(labels_B)
        told = self._denoiser(labels_B)
        grid = self.config.distillation.grid(options) if self.config.teacher else None
        return draw(noise, self.path, options, told, weaker, grid=grid, start=condition.start, keep=condition.keep)

    def noise_shape(self) -> tuple[int, ...]:
        return self.image_shape

    def fits(self, rows: int, columns: int) -> bool:
        return True

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Held-out pictures with noise of `DENOISING_SIGMA` added and taken away again, labels hidden."""
        sigma_B = images.new_full((len(images),), DENOISING_SIGMA)
        eps = seeded_noise(range(len(images)), self.image_shape).to(images)
        labels_B = self._labels(None, len(images), images.device)
        return self._denoiser(labels_B)(self.path.diffuse(images, eps, sigma_B), sigma_B)

    def _denoiser(self, labels_B: Tensor | None) -> samplers.Denoiser:
        def denoise(z: Tensor, sigma_B: Tensor) -> Tensor:
            output = self.unet(z, self.path.time(sigma_B), labels_B).float()
            return self.path.to_x(self.config.target, output, z, sigma_B)

        return denoise

    def _lesson(self, labels_B: Tensor | None) -> Lesson:
        """What the teacher draws of these labels with its own guidance, and what the heads say of its maps."""
        teacher = distillation.teacher_of(self)
        null_B = None if labels_B is None else torch.full_like(labels_B, self.num_classes)
        weaker = None if null_B is None else teacher._denoiser(null_B)

        def judge(z: Tensor, sigma_B: Tensor) -> list[Tensor]:
            return self.heads(teacher.unet.maps(z, teacher.path.time(sigma_B), labels_B))

        guided = guided_by(teacher.config.sample, teacher._denoiser(labels_B), weaker)
        return Lesson(self._denoiser(labels_B), guided, judge)

    def _labels(self, labels_B: Tensor | None, count: int, device: torch.device) -> Tensor | None:
        """Rows of the embedding: the null class for pictures without a label; None for a net without labels."""
        if not self.num_classes:
            return None
        if labels_B is None:
            return torch.full((count,), self.num_classes, dtype=torch.int64, device=device)
        return torch.where(labels_B < 0, self.num_classes, labels_B)
