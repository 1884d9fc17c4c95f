r"""Files that stock ComfyUI loads, with a workflow that draws: the denoiser, the autoencoder and the words.

The folder lies like ComfyUI's own, so that copying it there puts everything in its place. What ComfyUI fixes is filled
up exactly, so that nothing is computed differently:

    words, whole texts   columns of zeros for numbers that are always 0
    latent channels      the network does not look at those beyond its own and answers 0 for them; the autoencoder
                         does not look at them either
    narrow autoencoders  (tiny) channels that are always 0, and blocks that change nothing: relu(0 + x) = x, as x >= 0

ComfyUI scales latents with numbers of its own, c = z / 1.5305 + 0.0609 for Stable Diffusion 3 and c = z / 0.18215 for
1.5. That is taken back inside the autoencoder's file (`_coder.folded`; the tiny one has two numbers for it).

Its text encoders have fixed sizes and tokens, so ours comes as a node, one file of Python without further needs.

The files are loaded back with the classes of diffusers and compared; that ComfyUI takes them for what they are is told
by `_comfyui_rules`. ComfyUI itself is not run here.

Shapes: B pictures, Z latent channels, h rows, w columns.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from imagekiln.core import Family
from imagekiln.engine.codec import Codec
from imagekiln.engine.models import Model
from imagekiln.engine.run import Run, write_whole
from imagekiln.errors import UsageError
from imagekiln.exporters import (
    _classical,
    _coder,
    _comfyui_node,
    _comfyui_rules,
    _comfyui_tensors,
    _folder,
    _pipelines,
    _tuned,
)
from imagekiln.exporters._card import sizes, write_card
from imagekiln.nets.conditioned import Transformer
from imagekiln.nets.libraries import quietly

TOLERANCE = 1e-4

WORDS, WHOLE = 4096, 2048
"""Numbers a token and numbers of a whole text that ComfyUI's own nodes give to Stable Diffusion 3."""

PIXELS_A_LATENT = 8
"""What its nodes for empty latents divide sides by, whatever the autoencoder does."""

STEPS = 28


def write(model: Model, out: Path) -> dict[str, Any]:
    """Write the folder, with a workflow and a model card, and load it back.

    Raises:
        UsageError: ComfyUI would not take this model; the sentence says why. Or what is loaded back differs.
    """
    if _tuned.is_tuned(model.family):
        return _tuned.write(model, out, "comfyui")
    if _pipelines.reads_text(model.family):
        return _write_text_to_picture(model, out)
    if _coder.network_of(model.family) is None:
        raise UsageError(
            f"ComfyUI has no network for a {model.family.config.name} model: it draws latents from words. Use "
            "--to safetensors."
        )
    path = out / "models" / _coder.FOLDER / f"{_name(model)}.safetensors"
    found, difference = _write_autoencoder(model.family, path, 1.0, 0.0, model.family.noise_shape()[0])
    _agree(difference, path)
    use = f"Copy `models/` into ComfyUI's folder and choose `{path.name}` in *Load VAE*."
    write_card(model, out, use, [f"Loaded back, latents and pictures differ by at most {difference:.2g}."], [])
    return {
        "format": "comfyui",
        "path": str(out),
        "difference": difference,
        "detected": found,
        "sentence": f"{path} is an autoencoder that ComfyUI takes for {found['model']}; loaded back, latents and "
        f"pictures differ by at most {difference:.2g}.",
    }


# -- text to picture --------------------------------------------------------------------------------------------------


def _write_text_to_picture(model: Model, out: Path) -> dict[str, Any]:
    family: Any = model.family
    _refuse(family)
    name, flow = _name(model), isinstance(family.denoiser, Transformer)
    kind = "SD3" if flow else "SD15"
    width = max(family.text.width, family.text.whole_width) if flow else family.text.width
    words, whole = (WORDS, WHOLE) if flow else (_comfyui_rules.SD15_WORDS, 0)
    if width + (_pipelines.SECOND if flow else 0) > (whole or words):
        raise UsageError(
            f"The text encoder (family.text) is {width} numbers wide, and ComfyUI's {kind} reads at most "
            f"{whole or words}. Train with a narrower one, or use --to diffusers."
        )
    net = _pipelines.network_of(model)
    tensors = _comfyui_tensors.transformer(net, words, whole) if flow else _comfyui_tensors.unet(net, words)
    found = _comfyui_rules.denoiser(_comfyui_rules.shapes_of(tensors))  # before anything is written
    factor, lower = _comfyui_rules.LATENTS[kind]
    gain = factor * family.codec.scale
    vae = out / "models" / _coder.FOLDER / f"{name}.safetensors"
    coder, decoded = _write_autoencoder(
        family.codec.model.family, vae, gain, family.codec.shift - lower * gain, found["channels"]
    )
    path = out / "models" / "diffusion_models" / f"{name}.safetensors"
    _folder.write_tensors(path, tensors)
    node = out / "custom_nodes" / f"imagekiln_{name}"
    _write_node(family, node, f"Prompt of {name}", words, whole)
    _folder.write_json(out / "workflow.json", workflow(model, name, kind))
    denoised = _difference(model, path, node, found)
    _agree(denoised, path)
    _agree(decoded, vae)
    _write_card(model, out, denoised, decoded)
    return {
        "format": "comfyui",
        "path": str(out),
        "difference": max(denoised, decoded),
        "differences": {"denoiser": denoised, "codec": decoded},
        "detected": {"denoiser": found, "codec": coder},
        "sentence": f"Written to {out} for ComfyUI, which takes the denoiser for {found['model']} and the autoencoder "
        f"for {coder['model']}; loaded back, they differ by at most {denoised:.2g} and {decoded:.2g}. Copy models/ and "
        "custom_nodes/ into ComfyUI's folder and drop workflow.json on its window.",
    }


def _refuse(family: Any) -> None:
    """What no node of ComfyUI computes."""
    config = family.config
    if not isinstance(family.codec, Codec):
        raise UsageError(
            "This model draws pixels, and ComfyUI draws latents. Train with data.codec, or use --to safetensors."
        )
    if (config.path, config.target) != ("rf", "v"):
        raise UsageError(
            f"family.path = {config.path!r} with family.target = {config.target!r}: ComfyUI's node ModelSamplingSD3 "
            "follows the velocity of a rectified flow, and it has no node for this schedule. Train with path = 'rf' "
            "and target = 'v', or use --to safetensors."
        )
    _coder.family_of(family.codec)
    limit = _comfyui_rules.SD3_CHANNELS if isinstance(family.denoiser, Transformer) else _comfyui_rules.SD15_CHANNELS
    if family.image_shape[0] > limit:
        raise UsageError(
            f"The latents have {family.image_shape[0]} channels, and ComfyUI's network has {limit}. Train a codec with "
            f"latent_channels = {limit} or fewer."
        )


def _write_node(family: Any, folder: Path, node: str, words: int, whole: int) -> None:
    source = Path(_comfyui_node.__file__).read_text(encoding="utf-8")
    write_whole(folder / "__init__.py", source)
    sizes = {"node": node, "words": words, "whole": whole, "before_last": bool(whole)}
    _folder.write_json(folder / "sizes.json", sizes)
    _folder.write_text_encoder(folder / "text_encoder", family.text)
    _folder.write_tokenizer(folder / "tokenizer", family.text)


def workflow(model: Model, name: str, kind: str) -> dict[str, Any]:
    """The graph, in the form of ComfyUI's API, which its window also opens: nodes by number, links as [node, output].

    The sampler "euler" with the scheduler "normal" steps through the same levels as `diffusion.samplers.flow_sigmas`.
    """
    family: Any = model.family
    _, rows, columns = family.image_shape
    sample = family.config.sample
    empty = "EmptySD3LatentImage" if kind == "SD3" else "EmptyLatentImage"
    sides = {"width": columns * PIXELS_A_LATENT, "height": rows * PIXELS_A_LATENT, "batch_size": 1}
    say, file = f"Prompt of {name}", f"{name}.safetensors"
    drawing = {
        "model": ["2", 0],
        "positive": ["3", 0],
        "negative": ["4", 0],
        "latent_image": ["5", 0],
        "seed": 0,
        "steps": STEPS,
        "cfg": sample.guidance,
        "sampler_name": "euler",
        "scheduler": "normal",
        "denoise": 1.0,
    }
    nodes: list[tuple[str, dict[str, Any]]] = [
        ("UNETLoader", {"unet_name": file, "weight_dtype": "default"}),
        ("ModelSamplingSD3", {"model": ["1", 0], "shift": 1.0}),
        (say, {"text": next(iter(model.prompts), "")}),
        (say, {"text": sample.negative_prompt}),
        (empty, sides),
        ("KSampler", drawing),
        ("VAELoader", {"vae_name": file}),
        ("VAEDecode", {"samples": ["6", 0], _coder.FOLDER.name: ["7", 0]}),
        ("SaveImage", {"images": ["8", 0], "filename_prefix": name}),
    ]
    return {str(number): {"class_type": kind, "inputs": given} for number, (kind, given) in enumerate(nodes, 1)}


@torch.no_grad()
def _difference(model: Model, path: Path, node: Path, found: dict[str, Any]) -> float:
    """Largest difference of a velocity between the denoiser and what is read from the files, words included.

    Latent channels beyond the model's own are filled with noise, and the largest number answered there counts too.
    """
    family: Any = model.family
    net, tensors = _pipelines.network_of(model), load_file(path)
    wanted = {"in_channels": found["channels"], "out_channels": found["channels"]}
    if found["model"] == "SD3":
        wanted |= {"joint_attention_dim": found["words"], "pooled_projection_dim": found["whole"]}
    else:
        wanted["cross_attention_dim"] = found["words"]
        tensors = _classical.unet_back(tensors, len(found["widths"]), net.config.layers_per_block)
    with quietly():
        theirs = type(net).from_config(dict(net.config) | wanted).eval()
        theirs.load_state_dict(tensors)
        prompt = next(iter(model.prompts), "a")
        reader = type("Written", (_comfyui_node.Prompt,), {"folder": node, "loaded": None})()
        [[words, more]] = reader.encode(prompt)[0]
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(2, found["channels"], *family.image_shape[1:], generator=generator)
    own = family.image_shape[0]
    times = torch.tensor([900.0, 90.0])
    ours = family.denoiser(wide[:, :own], times, family.text(family.read([prompt] * 2)))
    given = {"timestep": times, "encoder_hidden_states": words.expand(2, -1, -1)}
    if found["model"] == "SD3":
        given["pooled_projections"] = more["pooled_output"].expand(2, -1)
    beyond = (0, 0, 0, 0, 0, found["channels"] - own)
    return _folder.apart(torch.nn.functional.pad(ours, beyond), theirs(wide, **given).sample)


def _write_card(model: Model, out: Path, denoised: float, decoded: float) -> None:
    family: Any = model.family
    write_card(
        model,
        out,
        "Copy `models/` and `custom_nodes/` into ComfyUI's folder, start it, and drop `workflow.json` on its window.",
        [
            f"Loaded back, the denoiser with its words differs by at most {denoised:.2g} and the autoencoder by "
            f"{decoded:.2g}. Names and shapes are those that ComfyUI recognises; it was not started for this.",
            *_pipelines.origin_of_text(family),
        ],
        [
            sizes(model),
            f"It reads {family.text.context} tokens of a text with the node that comes with it, and not with ComfyUI's "
            "own nodes for text.",
            "`ModelSamplingSD3` must stand at shift 1, as in the workflow.",
        ],
    )


# -- autoencoders -----------------------------------------------------------------------------------------------------


def _write_autoencoder(
    family: Family, path: Path, gain: float, offset: float, channels: int
) -> tuple[dict[str, Any], float]:
    """Write the file of an autoencoder for latents c with raw = gain c + offset, of this many channels.

    Returns what ComfyUI takes it for, and the largest difference of latents and pictures after loading it back.
    """
    network = _coder.network_of(family)
    if family.image_shape[0] != 3:
        raise UsageError(
            f"The autoencoder makes pictures with {family.image_shape[0]} channels; ComfyUI's make colour pictures. "
            "Train it on colour pictures."
        )
    tensors = _comfyui_tensors.autoencoder(network, _coder.tensors_of(family), gain, offset, channels)
    found = _comfyui_rules.autoencoder(_comfyui_rules.shapes_of(tensors))
    _folder.write_tensors(path, tensors)
    return found, _autoencoder_difference(family, path, gain, offset, channels)


@torch.no_grad()
def _autoencoder_difference(family: Family, path: Path, gain: float, offset: float, channels: int) -> float:
    coder: Any = family
    encode, decode = _comfyui_tensors.reader(load_file(path), _coder.network_of(family))
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, *family.image_shape, generator=generator) * 2 - 1
    raw: Tensor = coder.encode(x)
    own = raw.shape[1]
    c = torch.randn(2, channels, *raw.shape[2:], generator=generator)
    c[:, :own] = (raw - offset) / gain
    pictures = _folder.apart(coder.decode(raw), decode(c).clamp(-1, 1))
    return max(pictures, _folder.apart(c[:, :own], encode(x)[:, :own]))


def _name(model: Model) -> str:
    """The run's name as a file's name."""
    name = Run.of_weights(model.weights).path.resolve().name
    return "".join(sign if sign.isalnum() or sign in "-_" else "-" for sign in name)


def _agree(difference: float, path: Path) -> None:
    if not difference <= TOLERANCE:
        raise UsageError(
            f"What is loaded back from {path} differs by {difference:.2g}, more than {TOLERANCE:g}. Please report this "
            "with the versions `imagekiln doctor` prints."
        )
