"""Fine-tuning of pretrained Stable Diffusion 1, 2, XL and 3: whole, by LoRA or DoRA, by a new word, as DreamBooth.

`family.base` is a folder in the layout of diffusers; its autoencoder is the codec unless the recipe names another. What
is learned is one module, `tuned`: low-rank changes of the layers of attention, the denoiser itself, or the numbers of a
new word. The rest stays in the folder, and a run's checkpoints and weights hold only what was learned.

A network that answers noise learns at all of its steps alike (Ho et al. 2020, arXiv:2006.11239, eq. 14), where
`min_snr` takes weight from those with little noise (Hang et al. 2023, arXiv:2303.09556), and `noise_offset` shifts
whole channels of the noise, so that bright and dark pictures can be drawn. A flow learns at log-normal levels, shifted
as it was when it was made (Esser et al. 2024, arXiv:2403.03206, eq. 23).

DreamBooth (Ruiz et al. 2023, arXiv:2208.12242, section 3.2): with `prior.prompt` the model draws pictures of the whole
class before the first step, and learns them beside those it is given, so that it does not forget the class.

Shapes: B pictures, C channels, H rows, W columns, L tokens a text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from imagekiln.config import FamilyConfig, Fraction, Section
from imagekiln.core import Batch, Condition, Family, HeldOut, Loss, Phase, Progress, mix, seeded_noise
from imagekiln.diffusion import densities, noising, paths, samplers
from imagekiln.diffusion.drawing import Drawing, draw
from imagekiln.errors import RecipeError
from imagekiln.nets.adapters import Adapters, NewWord
from imagekiln.nets.pretrained import Pretrained, Words

HELD_OUT_LEVELS = 8
"""Noise levels of the held-out loss."""

AT_ONCE = 4
"""Pictures drawn at a time for `prior.prompt`."""


class Options(Drawing):
    """How pictures are drawn."""

    steps: int = Field(25, ge=1, le=1000)
    guidance: float = Field(5.0, ge=0, le=20, description="1 = none; larger follows the words more closely")
    guidance_rescale: Fraction = Field(0.0, description="how much of the contrast that guidance adds is taken back")
    negative_prompt: str = Field("", description="what the pictures should not show")


class Word(Section):
    """The new word of `method = "word"`."""

    token: str = Field("<new>", min_length=1, description="the word, as captions write it")
    start: str = Field("object", min_length=1, description="a common word that it begins as")
    count: int = Field(1, ge=1, le=16, description="tokens that it is made of")


class Prior(Section):
    """What DreamBooth keeps."""

    prompt: str = Field("", description="words for the class that must not be forgotten; empty = none")
    pictures: int = Field(64, ge=1, description="pictures drawn of it before the first step")
    weight: float = Field(1.0, gt=0, description="weight of these beside the pictures it is given")


class FineTuneConfig(FamilyConfig):
    """Settings of the fine-tuning family."""

    name: str = "fine_tune"
    base: str = Field("", description="pretrained model: folder of diffusers, .safetensors file, OWNER/NAME@COMMIT")
    method: Literal["lora", "dora", "full", "word"] = Field("lora", description="what is learned")
    rank: int = Field(16, ge=1, le=1024, description="rank of the changes (lora, dora)")
    alpha: float = Field(16.0, gt=0, description="changes are multiplied by alpha / rank (lora, dora)")
    train_text: bool = Field(False, description="also change the CLIP text encoders (lora, full)")
    word: Word = Word()
    prior: Prior = Prior()
    text_dropout: Fraction = Field(0.05, description="share of captions hidden in training")
    min_snr: float = Field(
        0.0, ge=0, description="largest weight of a step in units of noise; 0 = all alike (paper: 5)"
    )
    noise_offset: float = Field(0.0, ge=0, le=1, description="how far whole channels of the noise are shifted")
    checkpointing: bool = Field(False, description="compute layers twice to save memory")
    sample: Options = Options()


class FineTune(Family):
    """A pretrained model, and what it learns anew."""

    Config = FineTuneConfig
    optimizers = {"tuned": {"name": "adamw", "lr": 1e-4, "betas": (0.9, 0.999), "weight_decay": 0.01}}
    train_defaults = {"batch": 4, "total_kimg": 4.0, "schedule": "constant", "choose": "last"}
    check_settings = {"base": "random:sd1", "method": "full", "sample": {"steps": 8, "guidance": 1}}
    latents = True
    foundation = "base"
    monitor = "denoise"
    phases = (Phase("denoise", trains=("tuned",)),)
    averaged = ("tuned",)
    prior_NCHW: Tensor
    prior_drawn: Tensor

    def __init__(self, config: FineTuneConfig, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__(config, image_shape, num_classes)
        self.base = Pretrained(config.base, image_shape[0])
        if self.base.channels != image_shape[0]:
            raise RecipeError(
                f"family.base = {config.base!r} draws latents of {self.base.channels} channels, and it is given "
                f"{image_shape[0]}. Leave data.codec out, or name an autoencoder of as many."
            )
        betas = self.base.noise.betas
        self.path = paths.path("rf") if betas is None else paths.SteppedVP(betas)
        self.tuned = self._tuned()
        if config.checkpointing:
            self._network("denoiser").enable_gradient_checkpointing()
        if config.prior.prompt:
            self.register_buffer("prior_NCHW", torch.zeros(config.prior.pictures, *image_shape))
            self.register_buffer("prior_drawn", torch.zeros((), dtype=torch.bool))

    def _tuned(self) -> nn.Module:
        config, names = self.config, list(self.base.networks())
        if config.train_text and config.method in ("dora", "word"):
            raise RecipeError(
                f"family.train_text with family.method = {config.method!r}: text encoders are changed by lora or full."
            )
        chosen = names[:3] if config.train_text else names[:1]  # T5 stays as it is
        if config.method == "word":
            return NewWord(self.base, config.word.token, config.word.start, config.word.count)
        if config.method == "full":
            return nn.ModuleDict({name: self.base.networks()[name] for name in chosen})
        return Adapters(self.base, chosen, config.rank, config.alpha, lengths=config.method == "dora")

    # -- learning -----------------------------------------------------------------------------------------------------

    def read(self, captions: Sequence[str]) -> Tensor:
        """tokens_BL int64 on the CPU."""
        return self.base.read(captions)

    def cuts(self, caption: str) -> bool:
        return self.base.cuts(caption)

    def loss(self, phase: str, batch: Batch, progress: Progress) -> Loss:
        x, tokens_BL = batch.images, self._tokens(batch.text, len(batch.images))
        if self.training:
            hidden_B1 = torch.rand(len(x), 1, device=x.device) < self.config.text_dropout
            tokens_BL = torch.where(hidden_B1, self._tokens(None, len(x)), tokens_BL)
        if not self.config.prior.prompt:
            return Loss(self._error(x, self._levels(x), tokens_BL).mean())
        if not self.prior_drawn:
            self._draw_prior(x.device)
        chosen_B = torch.randint(len(self.prior_NCHW), (len(x),), device=x.device)
        both = torch.cat([x, self.prior_NCHW[chosen_B]])
        told = torch.cat([tokens_BL, self.read([self.config.prior.prompt]).to(x.device).expand(len(x), -1)])
        sigma_B = torch.cat([self._levels(x), self._levels(x)])  # each half is spread over all levels
        given, prior = self._error(both, sigma_B, told).chunk(2)
        return Loss(
            given.mean() + self.config.prior.weight * prior.mean(), {"given": given.mean(), "prior": prior.mean()}
        )

    @torch.no_grad()
    def held_out(self, batch: Batch, progress: Progress) -> Mapping[str, HeldOut]:
        """The loss of each picture at one of `HELD_OUT_LEVELS` noise levels, which divide the density evenly."""
        x = batch.images
        sigma_B = self._density(densities.even(x, HELD_OUT_LEVELS))
        error = self._error(x, sigma_B, self._tokens(batch.text, len(x)))
        return {"denoise": HeldOut(error.flatten(1).mean(1), sigma_B)}

    @torch.no_grad()
    def _draw_prior(self, device: torch.device) -> None:
        """Pictures of the class by the model as it is before the first step."""
        tokens_1L = self.read([self.config.prior.prompt]).to(device)
        for start in range(0, len(self.prior_NCHW), AT_ONCE):
            seeds = [mix("prior", start + place) for place in range(min(AT_ONCE, len(self.prior_NCHW) - start))]
            noise = seeded_noise(seeds, self.noise_shape()).to(device)
            self.prior_NCHW[start : start + len(seeds)] = self.sample(
                noise, Condition(text=tokens_1L.expand(len(seeds), -1))
            )
        self.prior_drawn.fill_(True)

    def _levels(self, x: Tensor) -> Tensor:
        return self._density(densities.stratified(torch.rand((), device=x.device), len(x)))

    def _density(self, uniform_B: Tensor) -> Tensor:
        betas, shift = self.base.noise.betas, self.base.noise.shift
        if betas is None:
            return densities.shifted(densities.log_normal(uniform_B, 0.0, 1.0), shift)
        return self.path.sigma(uniform_B * len(betas))

    def _error(self, x: Tensor, sigma_B: Tensor, tokens_BL: Tensor) -> Tensor:
        """Weighted squared error of what the network answers to x with this much noise, of the shape of x."""

        def answer(z: Tensor) -> Tensor:
            return self._answer(z, sigma_B, self._words(tokens_BL))

        config, target = self.config, self.base.noise.target
        return noising.error(self.path, target, x, sigma_B, answer, config.noise_offset, config.min_snr)

    # -- drawing ------------------------------------------------------------------------------------------------------

    def drawing_cost(self) -> float:
        return self.config.sample.cost(guided=True)

    @torch.no_grad()
    def sample(self, noise: Tensor, condition: Condition, options: Options | None = None) -> Tensor:
        options = options or self.config.sample
        told = self.denoiser(self._tokens(condition.text, len(noise)))
        negative_BL = self.read([options.negative_prompt]).to(noise.device).expand(len(noise), -1)
        weaker = self.denoiser(negative_BL) if options.guidance != 1 else None
        begin = {"start": condition.start, "keep": condition.keep}
        grid = self.grid(options.steps)
        return draw(noise, self.path, options, told, weaker, options.guidance_rescale, grid, **begin)

    def grid(self, steps: int) -> Tensor:
        """The noise levels that are stepped through: within those that the network has seen."""
        if isinstance(self.path, paths.SteppedVP):
            low, high = float(self.path.sigma_T[0]), float(self.path.sigma_T[-1])
            return samplers.sigmas(steps, low, min(high, 160.0))
        return samplers.flow_sigmas(steps, self.base.noise.shift)

    def noise_shape(self) -> tuple[int, ...]:
        return self.image_shape

    def fits(self, rows: int, columns: int) -> bool:
        """Any shape that the pretrained network takes; pictures drawn for DreamBooth are of one."""
        return super().fits(rows, columns) or (not self.config.prior.prompt and self.base.fits(rows, columns))

    def denoiser(self, tokens_BL: Tensor) -> samplers.Denoiser:
        """The clean latents expected behind noisy ones, told these words."""
        words = self._words(tokens_BL)

        def denoise(z: Tensor, sigma_B: Tensor) -> Tensor:
            return self.path.to_x(self.base.noise.target, self._answer(z, sigma_B, words).float(), z, sigma_B)

        return denoise

    # -- the pretrained model, changed --------------------------------------------------------------------------------

    def _answer(self, z: Tensor, sigma_B: Tensor, words: Words) -> Tensor:
        self._use()
        factor = self.picture_shape[1] // self.image_shape[1]
        size = z.shape[2] * factor, z.shape[3] * factor
        return self.base.answer(self._network("denoiser"), z, self.path.time(sigma_B), words, size)

    def _words(self, tokens_BL: Tensor) -> Words:
        self._use()
        config = self.config
        networks = [self._network(name) for name in list(self.base.networks())[1:]]
        return self.base.words(tokens_BL, networks, learning=config.train_text or config.method == "word")

    def _network(self, name: str) -> Any:
        tuned: Any = self.tuned
        own = isinstance(tuned, nn.ModuleDict) and name in tuned
        return tuned[name] if own else self.base.networks()[name]

    def _use(self) -> None:
        """Hooks of the shared model add what this copy of the family has learned."""
        self.base.added = self.tuned.added() if isinstance(self.tuned, Adapters | NewWord) else {}

    def _tokens(self, text: Tensor | None, count: int) -> Tensor:
        """The tokens of these captions, of the empty one where there are none."""
        if text is not None:
            return text
        return self.read([""]).to(next(self.parameters()).device).expand(count, -1)
