r"""Text to picture in stock pipelines of diffusers, each proven by drawing with it what our own sampler draws.

`StableDiffusion3Pipeline` for the transformer. It wants three text encoders. The second is here one that says nothing
(`_folder.write_silent_encoder`), whose zeros are those that `nets.conditioned.Transformer` was trained with. The third
is absent; in its place the pipeline puts `max_sequence_length` tokens of zeros behind the words, which the transformer
would read, so it must be called with `max_sequence_length=0`.

`StableDiffusionPipeline` for the U-Net. It takes no scheduler of flows by name, but two that compute the same:

    rf   `DPMSolverMultistepScheduler`, order 1, over sigmas of a flow. The network is told whole thousandths of time,
         rounded down, so numbers of steps that divide 999 are exact. `FLOW_SHIFT` keeps 110.99999999999999 at 111.
    vp   `DDIMScheduler` with a^2 = cos^2(pi i / 2000) at time i; numbers of steps that divide 1000 are exact.

Both start from noise of strength 1 where time is 0.999.

Shapes: B pictures, L tokens a text.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imagekiln.diffusion import guidance, samplers
from imagekiln.engine import bases
from imagekiln.engine.codec import Codec
from imagekiln.engine.models import Model
from imagekiln.errors import UsageError
from imagekiln.exporters import _coder, _folder
from imagekiln.nets.conditioned import SECOND, ConditionedUnet, Transformer
from imagekiln.nets.libraries import quietly

TOLERANCE = 1e-4
"""Largest difference of a pixel, in [0, 1], between the pipeline's picture and ours."""

FLOW_SHIFT = 1 + 1e-9

PROMPTS = ["", "a"]
"""Said to a model that kept no captions of its own."""

NEGATIVE = "x"

TIMES = 1000


class Stock(NamedTuple):
    """A pipeline of diffusers and how it is called.

    absent: parts that are handed over as None when loading. given: what a call needs beside the prompt. exact: a number
    of steps at which it computes what `grid` says. steps: a number of steps to recommend. folds: whether it does not
    shift latents. sigmas: the scheduler's, where a model of few steps has its own; () = as the scheduler makes them.
    """

    pipeline: str
    absent: tuple[str, ...]
    given: dict[str, Any]
    exact: int
    steps: int
    folds: bool = False
    sigmas: tuple[float, ...] = ()

    def load(self, folder: Path) -> Any:
        """The pipeline from a folder."""
        library = _folder.library(folder)
        with quietly():  # the class is only imported now, and what it imports has remarks
            pipeline = getattr(library, self.pipeline).from_pretrained(folder, **dict.fromkeys(self.absent))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def example(self, folder: str, prompt: str, scale: float) -> str:
        """Python that draws a picture."""
        loading = "".join(f", {name}=None" for name in self.absent)
        stepping = {"sigmas": list(self.sigmas)} if self.sigmas else {"num_inference_steps": self.steps}
        given = stepping | {"guidance_scale": scale} | self.given
        called = "".join(f", {key}={value!r}" for key, value in given.items())
        return (
            f"from diffusers import {self.pipeline}\n\n"
            f"pipeline = {self.pipeline}.from_pretrained({folder!r}{loading})\n"
            f"picture = pipeline({prompt!r}{called}).images[0]\n"
        )


def reads_text(family: Any) -> bool:
    """Whether this family draws from words with one of the networks that are told here."""
    return isinstance(getattr(family, "denoiser", None), Transformer | ConditionedUnet)


def origin_of_text(family: Any) -> list[str]:
    """The sentence on a text encoder that was not trained with the model."""
    if not family.text.base:
        return []
    name, commit = bases.called(family.text.base)
    return [f"Its text encoder is that of {name}{f' at commit {commit}' if commit else ''}, unchanged."]


def network_of(model: Model) -> Any:
    """The denoiser as a network of diffusers, which draws other shapes too where it learned them."""
    denoiser: Any = model.family.denoiser
    wide = isinstance(denoiser, Transformer) and model.recipe.data.buckets
    return denoiser.wide() if wide else denoiser.net


def write(model: Model, out: Path) -> Stock:
    """Write every part of the pipeline to `out`.

    Raises:
        UsageError: no stock pipeline computes what this model computes; the sentence says why.
    """
    family: Any = model.family
    if not isinstance(family.codec, Codec):
        raise UsageError(
            f"{model.weights} draws pixels from words, and the stock pipelines of diffusers draw latents. Train with "
            "data.codec, or use --to safetensors."
        )
    coder = type(_coder.network_of(_coder.family_of(family.codec))).__name__
    net = network_of(model)
    if isinstance(family.denoiser, Transformer):
        stock = _write_flow(family, out, coder)
        _folder.write_network(out / "transformer", _folder.config_of(net), net.state_dict())
    else:
        stock = _write_unet(family, out, coder)
        _folder.write_network(out / "unet", _folder.config_of(net), net.state_dict())
    _folder.write_tokenizer(out / "tokenizer", family.text)
    return stock


def _write_flow(family: Any, out: Path, coder: str) -> Stock:
    config = family.config
    if (config.path, config.target) != ("rf", "v"):
        raise UsageError(
            f"family.path = {config.path!r} with family.target = {config.target!r}: StableDiffusion3Pipeline follows "
            "the velocity of a rectified flow. Train with path = 'rf' and target = 'v', or use --to safetensors."
        )
    _refuse_codes(coder, "StableDiffusion3Pipeline")
    _folder.write_text_encoder(out / "text_encoder", family.text)
    _folder.write_silent_encoder(out / "text_encoder_2", family.text, SECOND)
    _folder.write_tokenizer(out / "tokenizer_2", family.text)
    _coder.write_with_scales(family.codec.model.family, out / _coder.FOLDER, family.codec.shift, family.codec.scale)
    _write_scheduler(
        out,
        "FlowMatchEulerDiscreteScheduler",
        {"num_train_timesteps": TIMES, "shift": 1.0, "use_dynamic_shifting": False},
    )
    encoder = ["transformers", "CLIPTextModelWithProjection"]
    _write_index(
        out,
        "StableDiffusion3Pipeline",
        {
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": encoder,
            "text_encoder_2": encoder,
            "text_encoder_3": [None, None],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "tokenizer_3": [None, None],
            "transformer": ["diffusers", "SD3Transformer2DModel"],
            _coder.FOLDER.name: ["diffusers", coder],
        },
    )
    return Stock(
        "StableDiffusion3Pipeline",
        absent=("text_encoder_3", "tokenizer_3"),
        given=_sides(family) | {"max_sequence_length": 0},
        exact=3,
        steps=28,
        sigmas=tuple(round(level / (1 + level), 6) for level in config.distillation.levels) if config.teacher else (),
    )


def _write_unet(family: Any, out: Path, coder: str) -> Stock:
    _refuse_codes(coder, "StableDiffusionPipeline")
    if coder == "AutoencoderTiny":
        raise UsageError(
            "The run's codec is of kind 'tiny': StableDiffusionPipeline scales latents but does not shift them, and "
            "AutoencoderTiny squashes them first, so that the shift has no place in its weights. Train the codec with "
            "kind = 'kl', or the model with denoiser = 'sd3', or use --to safetensors."
        )
    config = family.config
    named = {"eps": "epsilon", "x": "sample"}
    if config.path == "rf":
        scheduler = "DPMSolverMultistepScheduler"
        settings = {
            "use_flow_sigmas": True,
            "flow_shift": FLOW_SHIFT,
            "solver_order": 1,
            "steps_offset": 1,  # without effect on these levels; the pipeline warns of any other
            "prediction_type": named.get(config.target, "flow_prediction"),
        }
        exact, steps = 3, 37
    else:
        scheduler = "DDIMScheduler"
        settings = {
            "trained_betas": angular_betas(),
            "clip_sample": False,
            "set_alpha_to_one": True,
            "steps_offset": 1,  # likewise
            "timestep_spacing": "trailing",
            "prediction_type": named.get(config.target, "v_prediction"),
        }
        exact, steps = 4, 40
    _folder.write_text_encoder(out / "text_encoder", family.text, projected=False)
    _coder.write_with_scale(family.codec.model.family, out / _coder.FOLDER, family.codec.shift, family.codec.scale)
    _write_scheduler(out, scheduler, {"num_train_timesteps": TIMES} | settings)
    _write_index(
        out,
        "StableDiffusionPipeline",
        {
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", scheduler],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            _coder.FOLDER.name: ["diffusers", coder],
        },
    )
    return Stock("StableDiffusionPipeline", absent=(), given=_sides(family), exact=exact, steps=steps, folds=True)


def angular_betas() -> list[float]:
    """betas of 1000 steps whose products of 1 - beta are cos^2(pi i / 2000) at step i.

    Each beta is rounded to float32, as the scheduler does, and makes good what those before it were rounded by. The
    first would be 0; it is the smallest that float32 tells from it, so that ln sigma stays finite.
    """
    betas, product = [], 1.0
    for step in range(TIMES):
        wanted = min(math.cos(math.pi / 2 * step / TIMES) ** 2, 1 - 2**-24)
        beta = float(torch.tensor(1 - wanted / product, dtype=torch.float32))
        betas.append(beta)
        product *= 1 - beta
    return betas


def grid(family: Any, steps: int) -> Tensor:
    """The noise levels that the exported pipeline steps through: (steps + 1,) float64, falling to 0."""
    if isinstance(family.denoiser, Transformer):
        return samplers.flow_sigmas(steps)
    last = 1 - 1 / TIMES
    times = [last - last * k / steps if family.config.path == "rf" else last - k / steps for k in range(steps)]
    sigma = family.path.sigma(TIMES * torch.tensor(times, dtype=torch.float64))
    return torch.cat([sigma, sigma.new_zeros(1)])


@torch.no_grad()
def draw(model: Model, prompts: list[str], negative: str, start: Tensor, steps: int, scale: float) -> Tensor:
    """images_BCHW in [0, 1] of our own sampler, along the levels of the exported pipeline and in float32.

    start: latents that the first step begins with.
    """
    family: Any = model.family
    sigmas = grid(family, steps)

    def denoiser(captions: list[str]) -> samplers.Denoiser:
        told = family.text(family.read(captions))

        def denoise(z: Tensor, sigma_B: Tensor) -> Tensor:
            output = family.denoiser(z, family.path.time(sigma_B), told)
            return family.path.to_x(family.config.target, output, z, sigma_B)

        return denoise

    guided = guidance.guide(denoiser(prompts), denoiser([negative] * len(prompts)), scale)
    noise = start / family.path.scales(sigmas[:1])[1].item()
    z = samplers.euler(guided, noise, sigmas, family.path)
    images: Tensor = family.codec.model.family.decode(z * family.codec.scale + family.codec.shift)
    return images.clamp(-1, 1) / 2 + 0.5


def difference(model: Model, stock: Stock, out: Path) -> float:
    """Largest difference of a pixel in [0, 1] between pictures of the pipeline loaded from `out` and our own."""
    prompts = (list(model.prompts) + PROMPTS)[:2]
    start = torch.randn(2, *model.family.image_shape, generator=torch.Generator().manual_seed(0))
    pipeline = stock.load(out)
    with quietly():
        theirs = pipeline(
            prompts,
            negative_prompt=[NEGATIVE] * 2,
            num_inference_steps=stock.exact,
            guidance_scale=3.0,
            latents=start.clone(),
            output_type="pt",
            **stock.given,
        ).images
    return float((draw(model, prompts, NEGATIVE, start, stock.exact, 3.0) - theirs).abs().max())


def _sides(family: Any) -> dict[str, Any]:
    _, rows, columns = family.picture_shape
    return {"height": rows, "width": columns}


def _refuse_codes(coder: str, pipeline: str) -> None:
    if coder == "VQModel":
        raise UsageError(
            f"The run's codec is of kind 'vq', and {pipeline} works with autoencoders without codes. Train the codec "
            "with kind = 'kl', or use --to safetensors."
        )


def _write_scheduler(out: Path, name: str, settings: dict[str, Any]) -> None:
    _folder.write_json(out / "scheduler" / "scheduler_config.json", {"_class_name": name} | settings)


def _write_index(out: Path, name: str, parts: dict[str, Any]) -> None:
    _folder.write_json(out / "model_index.json", {"_class_name": name} | dict(sorted(parts.items())))
