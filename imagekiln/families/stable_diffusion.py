"""Stable Diffusion: words to pictures, by a denoiser and a text encoder that is trained with it, or pretrained.

Latent diffusion (Rombach et al. 2022, arXiv:2112.10752) with the transformer and the flow of Stable Diffusion 3 (Esser
et al. 2024, arXiv:2403.03206) or a U-Net. With `data.codec` it works on an autoencoder's latents, without one on
pixels. Captions are hidden at random in training, so that classifier-free guidance (Ho & Salimans 2022,
arXiv:2207.12598) is possible; a picture without a caption has the empty one, and what guidance turns away from is the
empty caption or a negative prompt. Guidance above 1 overdrives contrast; `guidance_rescale` takes that back (Lin et
al. 2024, arXiv:2305.08891, eq. 15-16). With a `teacher` it learns to draw in a step or two what that one draws in many,
guidance included (see `diffusion.distillation`). With `augment_condition` the denoiser hears what was done to each
training picture, and draws as if nothing had been done (Karras et al. 2022, arXiv:2206.00364, appendix F.2).

Shapes: B pictures, C channels, H rows, W columns, L tokens a text, A numbers that tell what was done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from imagekiln.config import AUGMENT_LABELS, FamilyConfig, Fraction, Section
from imagekiln.core import Batch, Condition, Family, HeldOut, Loss, Phase, Progress
from imagekiln.diffusion import densities, distillation, noising, paths, samplers
from imagekiln.diffusion.distillation import Distillation, Lesson
from imagekiln.diffusion.drawing import Drawing, draw, guided_by
from imagekiln.diffusion.noising import Noise
from imagekiln.nets.clip_text import BYTES, MARKS, ClipText, TextEncoder
from imagekiln.nets.conditioned import denoiser
from imagekiln.nets.feature_heads import FeatureHeads
from imagekiln.nets.frozen_text import FrozenText

HELD_OUT_LEVELS = 8
"""Noise levels of the held-out loss."""


class Options(Drawing):
    """How pictures are drawn."""

    guidance: float = Field(3.0, ge=0, le=20, description="1 = none; larger follows the words more closely")
    guidance_rescale: Fraction = Field(0.0, description="how much of the contrast that guidance adds is taken back")
    negative_prompt: str = Field("", description="what the pictures should not show")


class TextConfig(Section):
    """The text encoder, trained from nothing; with `base` a pretrained one that stays as it is, of its own sizes."""

    base: str = Field(
        "", description="pretrained, frozen one: folder of a CLIP text model; empty = trained from nothing"
    )
    width: int = Field(256, ge=32, description="numbers a token; multiples of 64 above that")
    layers: int = Field(3, ge=2, le=24)
    context: int = Field(24, ge=4, le=1024, description="tokens a caption; longer ones are cut")
    vocabulary: int = Field(2048, ge=BYTES + MARKS, le=65536, description="tokens; any script can be written with 514")


class StableDiffusionConfig(FamilyConfig):
    """Settings of the Stable Diffusion family."""

    name: str = "stable_diffusion"
    denoiser: Literal["sd3", "unet"] = Field("sd3", description="transformer over patches of 2x2, or U-Net")
    depth: int = Field(4, ge=1, le=38, description="layers and heads of 64 numbers (sd3)")
    widths: tuple[int, ...] = Field((64, 128, 256), min_length=1, description="channels by level (unet)")
    path: Literal["rf", "vp"] = "rf"
    target: Literal["v", "x", "eps"] = "v"
    density_mean: float = Field(0.0, description="mean of ln sigma in training")
    density_std: float = Field(1.0, gt=0, description="standard deviation of ln sigma in training")
    noise: Noise = Noise()
    text: TextConfig = TextConfig()
    text_dropout: Fraction = Field(0.1, description="share of captions hidden in training")
    augment_condition: bool = Field(
        False, description="tell the denoiser what data.augment did to each picture, so that drawn ones do not show it"
    )
    teacher: str = Field("", description="run that it learns to draw like, in few steps; empty = from pictures alone")
    distillation: Distillation = Distillation()
    sample: Options = Options()


class StableDiffusion(Family):
    """A text encoder and a denoiser on a path from pictures or latents to noise."""

    Config = StableDiffusionConfig
    optimizers = {
        "denoiser-text": {"name": "adamw", "lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.01},
        "denoiser": {"name": "adamw", "lr": 3e-4, "betas": (0.9, 0.99)},  # with a teacher
        "heads": {"name": "adam", "lr": 1e-3, "betas": (0.0, 0.99)},
    }
    companions = ("teacher",)
    frozen_text = "text.base"
    guidable = True
    check_settings = {
        "depth": 1,
        "text": {"width": 32, "layers": 2, "context": 8, "vocabulary": 520},
        "sample": {"steps": 4},
    }
    latents = True
    monitor = "denoise"
    phases: Sequence[Phase] = (Phase("denoise", trains=("denoiser", "text")),)
    averaged = ("denoiser", "text")

    def __init__(self, config: StableDiffusionConfig, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__(config, image_shape, num_classes)
        self.path = paths.path(config.path)
        text = config.text
        own = text.width, text.layers, text.context, text.vocabulary
        self.text: ClipText = FrozenText(text.base) if text.base else TextEncoder(*own)
        told = len(AUGMENT_LABELS) if config.augment_condition else 0
        read = self.text.width, self.text.whole_width
        self.denoiser = denoiser(config.denoiser, image_shape, config.depth, config.widths, *read, told)
        if config.teacher:
            config.distillation.check(config.sample)
            self.phases = (Phase("denoise", trains=("denoiser",)),)
        if config.teacher and config.distillation.adversarial_weight:
            self.heads = FeatureHeads(self.denoiser.map_widths)
            self.phases = (*self.phases, Phase("discriminate", trains=("heads",)))

    def study(self, captions: Sequence[str]) -> None:
        """The vocabulary is that of the training set's captions, where the text encoder has none yet."""
        self.text.study(captions)

    def read(self, captions: Sequence[str]) -> Tensor:
        """tokens_BL int64 on the CPU."""
        return self.text.read(captions)

    def cuts(self, caption: str) -> bool:
        return self.text.cuts(caption)

    def loss(self, phase: str, batch: Batch, progress: Progress) -> Loss:
        x, config = batch.images, self.config
        spread = densities.stratified(torch.rand((), device=x.device), len(x))
        sigma_B = self._density(spread)
        tokens_BL = self._tokens(batch.text, len(x))
        if self.training:
            hidden_B1 = torch.rand(len(x), 1, device=x.device) < config.text_dropout
            tokens_BL = torch.where(hidden_B1, self._tokens(None, len(x)), tokens_BL)
        if phase == "discriminate":
            return distillation.discrimination(self._lesson(tokens_BL), config.distillation, self.path, x, sigma_B)
        if config.teacher:
            return distillation.imitation(self._lesson(tokens_BL), config.distillation, self.path, x, sigma_B, progress)
        augment_BA = batch.augment if config.augment_condition else None
        return Loss(self._error(x, sigma_B, tokens_BL, augment_BA).mean())

    @torch.no_grad()
    def held_out(self, batch: Batch, progress: Progress) -> Mapping[str, HeldOut]:
        """The loss of each picture at one of `HELD_OUT_LEVELS` noise levels, which divide the density evenly; with a
        teacher the distance from what that one draws."""
        x, config, tokens_BL = batch.images, self.config, self._tokens(batch.text, len(batch.images))
        if config.teacher:
            return {"denoise": distillation.held_out(self._lesson(tokens_BL), config.distillation, self.path, x)}
        sigma_B = self._density(densities.even(x, HELD_OUT_LEVELS))
        error = self._error(x, sigma_B, tokens_BL)
        return {"denoise": HeldOut(error.flatten(1).mean(1), sigma_B)}

    def drawing_cost(self) -> float:
        return self.config.sample.cost(guided=True)

    @torch.no_grad()
    def sample(self, noise: Tensor, condition: Condition, options: Options | None = None) -> Tensor:
        options = options or self.config.sample
        tokens_BL = self._tokens(condition.text, len(noise))
        told = self._denoiser(tokens_BL)
        negative_BL = self.read([options.negative_prompt]).to(noise.device).expand(len(noise), -1)
        weaker = self._denoiser(negative_BL) if options.guidance != 1 else None
        if self.guide is not None:
            weaker = self.guide._denoiser(tokens_BL)
        grid = self.config.distillation.grid(options) if self.config.teacher else None
        begin = {"start": condition.start, "keep": condition.keep}
        return draw(noise, self.path, options, told, weaker, options.guidance_rescale, grid, **begin)

    def noise_shape(self) -> tuple[int, ...]:
        return self.image_shape

    def fits(self, rows: int, columns: int) -> bool:
        return self.denoiser.fits(rows, columns)

    def _density(self, uniform_B: Tensor) -> Tensor:
        config = self.config
        sigma_B = densities.log_normal(uniform_B, config.density_mean, config.density_std)
        return densities.shifted(sigma_B, config.noise.shift)

    def _error(self, x: Tensor, sigma_B: Tensor, tokens_BL: Tensor, augment_BA: Tensor | None = None) -> Tensor:
        """Weighted squared error of what the network answers to x with this much noise, of the shape of x."""

        def answer(z: Tensor) -> Tensor:
            output: Tensor = self.denoiser(z, self.path.time(sigma_B), self.text(tokens_BL), augment_BA)
            return output

        settings = self.config.noise
        return noising.error(self.path, self.config.target, x, sigma_B, answer, settings.offset, settings.min_snr)

    def _lesson(self, tokens_BL: Tensor) -> Lesson:
        """What the teacher draws of these words with its own guidance, and what the heads say of its maps."""
        teacher = distillation.teacher_of(self)
        options, told = teacher.config.sample, teacher.text(tokens_BL)
        negative_BL = teacher.read([options.negative_prompt]).to(tokens_BL.device).expand(len(tokens_BL), -1)
        weaker = teacher._denoiser(negative_BL) if options.guidance != 1 else None

        def judge(z: Tensor, sigma_B: Tensor) -> list[Tensor]:
            return self.heads(teacher.denoiser.maps(z, teacher.path.time(sigma_B), told))

        guided = guided_by(options, teacher._denoiser(tokens_BL), weaker, options.guidance_rescale)
        return Lesson(self._denoiser(tokens_BL), guided, judge)

    def _denoiser(self, tokens_BL: Tensor) -> samplers.Denoiser:
        told = self.text(tokens_BL)

        def denoise(z: Tensor, sigma_B: Tensor) -> Tensor:
            output = self.denoiser(z, self.path.time(sigma_B), told).float()
            return self.path.to_x(self.config.target, output, z, sigma_B)

        return denoise

    def _tokens(self, text: Tensor | None, count: int) -> Tensor:
        """The tokens of these captions, of the empty one where there are none."""
        if text is not None:
            return text
        return self.read([""]).to(next(self.parameters()).device).expand(count, -1)
