r"""What a pretrained model learned, in the files that other programs add to it, each proven with its stock pipeline.

    lora, dora  `pytorch_lora_weights.safetensors`: A, B alpha / rank and lengths under diffusers' names of layers; and
                under the names of kohya's scripts, which ComfyUI reads, A, B and alpha, or for DoRA whole differences
    word        `learned_embeds.safetensors`: the word and its numbers
    full        the whole pipeline, as `save_pretrained` writes it; for ComfyUI one file, see `_checkpoint`

The proof: the pipeline of `family.base` with the file loaded draws what our own sampler draws. U-Nets step there
through `DDIMScheduler` with trailing steps, whose levels are exactly those of the network's steps; transformers through
the `FlowMatchEulerDiscreteScheduler` of their folder.

DoRA in ComfyUI: its rule divides by the lengths of W where DoRA divides by those of W + s B A, and under diffusers'
names it looks for no lengths at all. So it is given W' - W of every changed layer, in general of full rank, which it
adds to W (`LAYER.diff`). The proof of that is layer by layer, as no pipeline of diffusers reads such a file.

Shapes: B pictures, r rank, V tokens of a word, W numbers a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from imagekiln.diffusion import guidance, samplers
from imagekiln.engine import bases
from imagekiln.engine.models import Model
from imagekiln.engine.run import disk_faults
from imagekiln.errors import UsageError
from imagekiln.exporters import _checkpoint, _comfyui_workflow, _folder
from imagekiln.exporters._card import write_card
from imagekiln.nets.adapters import Adapters, LowRank, NewWord
from imagekiln.nets.libraries import quietly
from imagekiln.nets.pretrained import PIPELINES, RANDOM, Pretrained

TOLERANCE = 1e-4
"""Largest difference of a pixel, in [0, 1], between the pipeline's picture and ours."""

LORA, WORD = "pytorch_lora_weights.safetensors", "learned_embeds.safetensors"
STEPS, SCALE, NEGATIVE = 4, 3.0, "x"


def is_tuned(family: Any) -> bool:
    """Whether this family holds what a pretrained model learned."""
    return isinstance(getattr(family, "base", None), Pretrained)


def write(model: Model, out: Path, to: Literal["diffusers", "comfyui"]) -> dict[str, Any]:
    """Write what was learned to `out` with a model card, prove it, and return the receipt.

    Raises:
        UsageError: the base has random weights, the format has no place for what was learned, or pictures differ.
    """
    family: Any = model.family
    if family.base.folder.startswith(RANDOM):
        raise UsageError(f"family.base = {family.base.folder!r} is nobody else's model, so nothing can be added to it.")
    name = PIPELINES[family.base.kind]
    path, code = _write_files(model, out, to)
    difference, said = _proof(family, model.prompts, path, out, to)
    if not difference <= TOLERANCE:
        raise UsageError(
            f"{path}: {said} That is more than {TOLERANCE:g}. Please report this with the versions `imagekiln doctor` "
            "prints."
        )
    example = f"from diffusers import {name}\n\n{_opening(family, name, path)}{code}"
    base, commit = bases.called(family.base.folder)
    known = f"{base!r}, revision={commit!r}" if commit else repr(base)
    shown = example.replace(repr(family.base.folder), known)  # where they lie here is nobody's business
    shown, base = shown.replace(str(out), "."), f"{base} at commit {commit}" if commit else base
    use = f"```python\n{shown}```"
    if _as_differences(family, to):
        name, example, use = "", "", ""  # no pipeline of diffusers reads it
    if to == "comfyui":
        use = f"{_comfyui_workflow.write(family, model.prompts, path, out)}\n\n{use}".strip()
    limits = [f"It belongs to the model it was learned from ({base}); with others it draws something else."]
    limits = limits if isinstance(family.tuned, Adapters | NewWord) else []
    limits += _comfyui_workflow.limits(family.base) if to == "comfyui" else []
    write_card(model, out, use, [said], limits)
    return {
        "format": to,
        "path": str(path),
        "difference": difference,
        "pipeline": name,
        "call": example,
        "sentence": f"Written to {path}. {said}",
    } | ({"detected": _checkpoint.detected(path)} if _is_checkpoint(family, path) else {})


def _write_files(model: Model, out: Path, to: str) -> tuple[Path, str]:
    """What was written, and Python that adds it to a pipeline."""
    family: Any = model.family
    tuned, comfy = family.tuned, to == "comfyui"
    if isinstance(tuned, Adapters):
        path = out / "models" / "loras" / f"{out.name}.safetensors" if comfy else out / LORA
        _folder.write_tensors(path, comfyui_tensors(family) if comfy else lora_tensors(family))
        return path, f"pipeline.load_lora_weights({str(path.parent)!r}, weight_name={path.name!r})\n"
    if isinstance(tuned, NewWord):
        path = out / "models" / "embeddings" / f"{out.name}.safetensors" if comfy else out / WORD
        _folder.write_tensors(path, word_tensors(tuned))
        return path, _word_example(tuned, path)
    if comfy:
        path = out / _checkpoint.FOLDER / f"{out.name}.safetensors"
        _checkpoint.write(family, path)
        return path, ""
    pipeline = _pipeline(family, family.base.folder, out)
    with quietly(), disk_faults(out):
        for network, trained in tuned.items():
            setattr(pipeline, _diffusers_name(family.base, network), trained)
        pipeline.save_pretrained(out)
    return out, ""


def _proof(family: Any, prompts: Sequence[str], path: Path, out: Path, to: str) -> tuple[float, str]:
    """The difference, and what was compared."""
    if _as_differences(family, to):
        difference = _merged_difference(family, path)
        return difference, (
            "ComfyUI adds it to the weights of layers, which then answer as ours do, but for "
            f"{difference:.2g}; it was not started for this."
        )
    pipeline = _loaded(family, path, out)
    difference = _difference(family, prompts, pipeline)
    if _is_checkpoint(family, path):
        found, encoded = _checkpoint.detected(path)["model"], _checkpoint.encoded_difference(family, pipeline)
        return max(difference, encoded), (
            f"ComfyUI takes it for {found}; it was not started for this. {PIPELINES[family.base.kind]} opens it too "
            f"and draws what the model draws: with equal noise, {STEPS} steps and guidance {SCALE:g}, pixels in [0, 1] "
            f"differ by at most {difference:.2g}, and what the autoencoder encodes by at most {encoded:.2g}."
        )
    same = f"{PIPELINES[family.base.kind]} draws with it what the model draws: with equal noise, {STEPS} steps and "
    return difference, f"{same}guidance {SCALE:g}, pixels in [0, 1] differ by at most {difference:.2g}."


# -- files ------------------------------------------------------------------------------------------------------------


def lora_tensors(family: Any) -> dict[str, Tensor]:
    """Changes of layers under diffusers' names; their scale is within B."""
    found: dict[str, Tensor] = {}
    for key, part in _parts(family):
        network, layer = key.split(".", 1)
        name = f"{_diffusers_name(family.base, network)}.{layer}"
        found[f"{name}.lora_A.weight"], found[f"{name}.lora_B.weight"] = part.down, part.up * part.scale
        if part.length is not None:
            found[f"{name}.lora_magnitude_vector"] = part.length
    return found


def comfyui_tensors(family: Any) -> dict[str, Tensor]:
    """Changes of layers under names that ComfyUI reads: kohya's, and diffusers' for Stable Diffusion 3."""
    if family.tuned.lengths:
        return {f"{_comfyui_name(family.base, key)}.diff": found for key, found in _differences(family).items()}
    if family.base.kind == "sd3":
        return lora_tensors(family)
    found: dict[str, Tensor] = {}
    for key, part in _parts(family):
        name = _comfyui_name(family.base, key)
        found |= {f"{name}.lora_down.weight": part.down, f"{name}.lora_up.weight": part.up}
        found[f"{name}.alpha"] = torch.tensor(part.scale * len(part.down))
    return found


def _comfyui_name(base: Any, key: str) -> str:
    network, layer = key.split(".", 1)
    if base.kind == "sd3":
        return f"{_diffusers_name(base, network)}.{layer}"
    places = {"denoiser": "lora_unet", "text": "lora_te1" if base.kind == "sdxl" else "lora_te", "text_2": "lora_te2"}
    inside = layer if network == "denoiser" else f"text_model.{layer.removeprefix('text_model.')}"
    return f"{places[network]}_{inside.replace('.', '_')}"


@torch.no_grad()
def _differences(family: Any) -> dict[str, Tensor]:
    """W' - W by layer."""
    layers = {key: _layer(family, key) for key, _ in _parts(family)}
    return {key: part.merged(layers[key]) - layers[key].weight for key, part in _parts(family)}


def _layer(family: Any, key: str) -> Any:
    network, name = key.split(".", 1)
    return family.base.networks()[network].get_submodule(name)


def word_tensors(word: NewWord) -> dict[str, Tensor]:
    """The word's numbers: under the word itself, or by encoder where there are two."""
    rows = dict(word.vectors.items())
    if len(rows) == 1:
        return {word.token: rows["text"]}
    return {"clip_l": rows["text"], "clip_g": rows["text_2"]}


def _word_example(word: NewWord, path: Path) -> str:
    if len(word.vectors) == 1:
        return f"pipeline.load_textual_inversion({str(path)!r})\n"
    lines = [f"word = safetensors.torch.load_file({str(path)!r})"]
    for name, number in (("clip_l", ""), ("clip_g", "_2")):
        lines.append(
            f"pipeline.load_textual_inversion(word[{name!r}], token={word.token!r}, "
            f"text_encoder=pipeline.text_encoder{number}, tokenizer=pipeline.tokenizer{number})"
        )
    return "\n".join(lines) + "\n"


def _as_differences(family: Any, to: str) -> bool:
    """Whether the file holds differences of whole weights, which ComfyUI alone reads."""
    return to == "comfyui" and isinstance(family.tuned, Adapters) and family.tuned.lengths


def _is_checkpoint(family: Any, path: Path) -> bool:
    """Whether this is one file of a whole model."""
    return path.is_file() and isinstance(family.tuned, nn.ModuleDict)


def _opening(family: Any, name: str, path: Path) -> str:
    """Python that opens the model that files are added to, or the whole one."""
    if _is_checkpoint(family, path):
        return _checkpoint.example(family, name, path)
    folder = str(path) if path.is_dir() else family.base.folder
    absent = "".join(f", {part}=None" for part in _checkpoint.absent(family.base))
    return f"pipeline = {name}.from_pretrained({folder!r}{absent})\n"


def _parts(family: Any) -> list[tuple[str, LowRank]]:
    return list(family.tuned.added().items())


def _diffusers_name(base: Any, network: str) -> str:
    if network == "denoiser":
        return "transformer" if base.kind == "sd3" else "unet"
    return f"text_encoder{network.removeprefix('text')}"


# -- the proof --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _difference(family: Any, known: Sequence[str], pipeline: Any) -> float:
    """Largest difference of a pixel in [0, 1] between pictures of the stock pipeline and our own."""
    prompts = [*known, "a", ""][:2]
    start = torch.randn(2, *family.image_shape, generator=torch.Generator().manual_seed(0))
    _, rows, columns = family.picture_shape
    with quietly():
        theirs = pipeline(
            prompts,
            negative_prompt=[NEGATIVE] * 2,
            num_inference_steps=STEPS,
            guidance_scale=SCALE,
            latents=start.clone(),
            height=rows,
            width=columns,
            output_type="pt",
        ).images
    return float((_drawn(family, prompts, start) - theirs).abs().max())


@torch.no_grad()
def _merged_difference(family: Any, path: Path) -> float:
    """Largest difference of what changed layers answer to random numbers, ours and those with W + `LAYER.diff`."""
    tensors, worst = load_file(path), 0.0
    family.base.added = {}  # the layer as it was
    for key, part in _parts(family):
        layer = _layer(family, key)
        weight = layer.weight + tensors[f"{_comfyui_name(family.base, key)}.diff"]
        x = torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(0))
        worst = max(worst, _folder.apart(part(x, layer(x), layer), nn.functional.linear(x, weight, layer.bias)))
    return worst


def _drawn(family: Any, prompts: list[str], start: Tensor) -> Tensor:
    """images_BCHW in [0, 1] of our own sampler, along the pipeline's levels and in float32."""
    if family.base.noise.betas is None:
        grid = family.grid(STEPS)
    else:
        last = len(family.path.sigma_T)
        steps = [round(last - last * place / STEPS) - 1 for place in range(STEPS)]
        grid = torch.cat([family.path.sigma_T[steps], torch.zeros(1, dtype=torch.float64)])
    denoise = guidance.guide(
        family.denoiser(family.read(prompts)), family.denoiser(family.read([NEGATIVE] * len(prompts))), SCALE
    )
    noise = start / family.path.scales(grid[:1])[1].item()
    latents = samplers.euler(denoise, noise, grid, family.path)
    images: Tensor = family.codec.decode(latents)
    return images.clamp(-1, 1) / 2 + 0.5


def _loaded(family: Any, path: Path, out: Path) -> Any:
    """The stock pipeline with this file, or from this folder."""
    tuned = family.tuned
    if _is_checkpoint(family, path):
        pipeline = _checkpoint.opened(family, path, out)
    else:
        pipeline = _pipeline(family, str(path) if path.is_dir() else family.base.folder, out)
    with quietly():
        if isinstance(tuned, Adapters):
            pipeline.load_lora_weights(path.parent, weight_name=path.name)
        if isinstance(tuned, NewWord):
            rows = list(word_tensors(tuned).values())
            for number, row in zip(("", "_2"), rows, strict=False):
                encoder, tokenizer = (getattr(pipeline, f"{part}{number}") for part in ("text_encoder", "tokenizer"))
                pipeline.load_textual_inversion(row, token=tuned.token, text_encoder=encoder, tokenizer=tokenizer)
    if family.base.noise.betas is not None:
        library = _folder.library(out)
        about = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False}
        pipeline.scheduler = library.DDIMScheduler.from_config(pipeline.scheduler.config, **about)
    return pipeline


def _pipeline(family: Any, folder: str, out: Path) -> Any:
    library, absent = _folder.library(out), dict.fromkeys(_checkpoint.absent(family.base))
    with quietly():  # the class is only imported now, and what it imports has remarks
        kind = getattr(library, PIPELINES[family.base.kind])
        pipeline = kind.from_pretrained(folder, local_files_only=True, **absent).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
