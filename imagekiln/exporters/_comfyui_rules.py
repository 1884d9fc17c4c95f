"""What ComfyUI makes of a file of weights, told from names and shapes alone, as it does.

ComfyUI reads no config. It recognises a network by names in the file, takes sizes from shapes, builds its own network
of these sizes and fills it. Sizes that it does not take from the file are fixed. So a file is accepted when its names
and shapes are exactly those of one of the networks below; what is missing keeps random numbers there, and what differs
in shape is an error. These rules are stated for what is exported here:

    SD3    a transformer under the names of diffusers, 16 latent channels, patches of 2, as many layers as heads of 64
    SD15   a U-Net under the names of its first publication, 4 latent channels, 320 channels at the finest level,
           words of 768 numbers, 8 heads, projections by 1x1 convolutions
    TAESD  the tiny autoencoder, 64 channels wide, 3 blocks a level, 8 pixels a latent, colour pictures
    KL     `AutoencoderKL` under the names of diffusers, 128 channels at the finest level, 2 blocks a level, 8 or 4
           pixels a latent, colour pictures
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from typing import Any

import torch

from imagekiln.errors import UsageError

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

HEAD, PATCH, TIME = 64, 2, 256
SD3_CHANNELS, SD15_CHANNELS = 16, 4
SD15_WIDTH, SD15_WORDS = 320, 768
TINY_WIDTH, TINY_BLOCKS, TINY_LEVELS = 64, 3, 3
KL_WIDTH, KL_BLOCKS = 128, 2
KL_LEVELS = {8: (1, 2, 4, 4), 4: (1, 2, 4)}


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, Shape]:
    """The shapes of tensors by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def denoiser(shapes: Shapes) -> dict[str, Any]:
    """The network that ComfyUI takes this file for: its `model` and sizes.

    Raises:
        UsageError: it would refuse the file; the sentence says at which name.
    """
    if "transformer_blocks.0.attn.add_q_proj.weight" in shapes:
        return _transformer(shapes)
    if "input_blocks.0.0.weight" in shapes:
        return _unet(shapes)
    raise UsageError("ComfyUI would not recognise this file: it has the names of none of the networks it knows.")


def autoencoder(shapes: Shapes) -> dict[str, Any]:
    """Likewise for a file of an autoencoder: `model`, `channels` of its latents, `factor` pixels a latent."""
    if "taesd_decoder.1.weight" in shapes:
        channels = shapes["taesd_decoder.1.weight"][1]
        _agree("TAESD", shapes, tiny_shapes(channels))
        return {"model": "TAESD", "channels": channels, "factor": 2**TINY_LEVELS}
    if "decoder.up_blocks.0.resnets.0.norm1.weight" in shapes:
        channels = shapes["post_quant_conv.weight"][1]
        deep = "encoder.down_blocks.2.downsamplers.0.conv.weight" in shapes
        factor = 8 if deep else 4
        _agree("KL", shapes, kl_shapes(factor, shapes["decoder.conv_in.weight"][1], channels))
        return {"model": "KL", "channels": channels, "factor": factor}
    raise UsageError("ComfyUI would not recognise this file: it has the names of none of the autoencoders it knows.")


# -- the transformer --------------------------------------------------------------------------------------------------


def _transformer(shapes: Shapes) -> dict[str, Any]:
    width, channels, patch, _ = shapes["pos_embed.proj.weight"]
    if channels != SD3_CHANNELS or patch != PATCH:
        raise UsageError(
            f"ComfyUI would refuse this file: pos_embed.proj.weight has {channels} channels and patches of {patch}; it "
            f"knows Stable Diffusion 3 with {SD3_CHANNELS} and patches of {PATCH}."
        )
    depth = width // HEAD
    words, whole = shapes["context_embedder.weight"][1], shapes["time_text_embed.text_embedder.linear_1.weight"][1]
    patches = shapes["pos_embed.pos_embed"][1]
    _agree("SD3", shapes, transformer_shapes(depth, words, whole, patches))
    return {"model": "SD3", "channels": channels, "depth": depth, "words": words, "whole": whole, "patches": patches}


def transformer_shapes(depth: int, words: int, whole: int, patches: int) -> dict[str, Shape]:
    """Every name and shape of the transformer with this many layers and heads."""
    width = HEAD * depth
    shapes: dict[str, Shape] = {"pos_embed.pos_embed": (1, patches, width)}
    shapes["pos_embed.proj.weight"] = (width, SD3_CHANNELS, PATCH, PATCH)
    shapes["pos_embed.proj.bias"] = (width,)
    linears = {
        "time_text_embed.timestep_embedder.linear_1": (width, TIME),
        "time_text_embed.timestep_embedder.linear_2": (width, width),
        "time_text_embed.text_embedder.linear_1": (width, whole),
        "time_text_embed.text_embedder.linear_2": (width, width),
        "context_embedder": (width, words),
        "norm_out.linear": (2 * width, width),
        "proj_out": (SD3_CHANNELS * PATCH**2, width),
    }
    for layer in range(depth):
        within, last = f"transformer_blocks.{layer}.", layer == depth - 1
        linears[f"{within}norm1.linear"] = (6 * width, width)
        linears[f"{within}norm1_context.linear"] = ((2 if last else 6) * width, width)
        # after the last layer nobody asks what became of the words
        outgoing = ["to_out.0"] if last else ["to_out.0", "to_add_out"]
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", *outgoing):
            linears[f"{within}attn.{name}"] = (width, width)
        for name in ["ff"] if last else ["ff", "ff_context"]:
            linears[f"{within}{name}.net.0.proj"] = (4 * width, width)
            linears[f"{within}{name}.net.2"] = (width, 4 * width)
    return shapes | _with_biases(linears)


# -- the U-Net --------------------------------------------------------------------------------------------------------


def _unet(shapes: Shapes) -> dict[str, Any]:
    width, channels = shapes["input_blocks.0.0.weight"][:2]
    if width != SD15_WIDTH or channels != SD15_CHANNELS:
        raise UsageError(
            f"ComfyUI would refuse this file: input_blocks.0.0.weight makes {width} channels of {channels}; it knows "
            f"Stable Diffusion 1.5 with {SD15_WIDTH} of {SD15_CHANNELS}."
        )
    widths, looking, words = [], [], None
    for block in count(1):
        outgoing = shapes.get(f"input_blocks.{block}.0.out_layers.3.weight")
        if outgoing is None and f"input_blocks.{block}.0.op.weight" not in shapes:
            break
        if outgoing is None:
            continue
        looks = f"input_blocks.{block}.1.proj_in.weight" in shapes
        if looks and words is None:
            words = shapes[f"input_blocks.{block}.1.transformer_blocks.0.attn2.to_k.weight"][1]
        widths.append(outgoing[0])
        looking.append(looks)
    if words != SD15_WORDS or any(width % SD15_WIDTH for width in widths):
        raise UsageError(
            f"ComfyUI would refuse this file: words of {words} numbers and levels of {widths} channels; it knows "
            f"Stable Diffusion 1.5 with words of {SD15_WORDS} numbers and multiples of {SD15_WIDTH} channels."
        )
    if looking != [level > 0 for level in range(len(widths))]:
        raise UsageError(f"The levels that look at the words are {looking}; every level but the finest was expected.")
    _agree("SD15", shapes, unet_shapes(widths))
    return {"model": "SD15", "channels": channels, "widths": widths, "words": words}


def unet_shapes(widths: list[int]) -> dict[str, Shape]:
    """Every name and shape of a U-Net with one block a level, whose finest level alone does not look at the words."""
    first, last, time = widths[0], widths[-1], 4 * widths[0]
    shapes: dict[str, Shape] = {}
    linears: dict[str, Shape] = {
        "time_embed.0": (time, first),
        "time_embed.2": (time, time),
        "input_blocks.0.0": (first, SD15_CHANNELS, 3, 3),
        "out.0": (first,),
        "out.2": (SD15_CHANNELS, first, 3, 3),
    }

    def block(where: str, before: int, after: int) -> None:
        linears[f"{where}.in_layers.0"] = (before,)
        linears[f"{where}.in_layers.2"] = (after, before, 3, 3)
        linears[f"{where}.emb_layers.1"] = (after, time)
        linears[f"{where}.out_layers.0"] = (after,)
        linears[f"{where}.out_layers.3"] = (after, after, 3, 3)
        if before != after:
            linears[f"{where}.skip_connection"] = (after, before, 1, 1)

    def attention(where: str, width: int) -> None:
        inner = f"{where}.transformer_blocks.0."
        linears[f"{where}.norm"] = (width,)
        linears[f"{where}.proj_in"] = linears[f"{where}.proj_out"] = (width, width, 1, 1)
        for turn, heard in (("attn1", width), ("attn2", SD15_WORDS)):
            shapes[f"{inner}{turn}.to_q.weight"] = (width, width)
            shapes[f"{inner}{turn}.to_k.weight"] = shapes[f"{inner}{turn}.to_v.weight"] = (width, heard)
            linears[f"{inner}{turn}.to_out.0"] = (width, width)
        linears[f"{inner}ff.net.0.proj"] = (8 * width, width)
        linears[f"{inner}ff.net.2"] = (width, 4 * width)
        for norm in ("norm1", "norm2", "norm3"):
            linears[inner + norm] = (width,)

    kept, place = [first], 1
    for level, width in enumerate(widths):
        block(f"input_blocks.{place}.0", kept[-1], width)
        if level:
            attention(f"input_blocks.{place}.1", width)
        kept.append(width)
        place += 1
        if level < len(widths) - 1:
            linears[f"input_blocks.{place}.0.op"] = (width, width, 3, 3)
            kept.append(width)
            place += 1
    block("middle_block.0", last, last)
    attention("middle_block.1", last)
    block("middle_block.2", last, last)
    before, place = last, 0
    for level in reversed(range(len(widths))):
        width = widths[level]
        for turn in range(2):
            block(f"output_blocks.{place}.0", before + kept.pop(), width)
            if level:
                attention(f"output_blocks.{place}.1", width)
            if level and turn:
                linears[f"output_blocks.{place}.2.conv"] = (width, width, 3, 3)
            before, place = width, place + 1
    return shapes | _with_biases(linears)


# -- autoencoders -----------------------------------------------------------------------------------------------------


def tiny_shapes(channels: int) -> dict[str, Shape]:
    """Every name and shape of the tiny autoencoder with this many latent channels, and of its two numbers."""
    wide: Shape = (TINY_WIDTH, TINY_WIDTH, 3, 3)
    encoder: dict[int, Shape | None] = {0: (TINY_WIDTH, 3, 3, 3), 1: None}
    decoder: dict[int, Shape | None] = {1: (TINY_WIDTH, channels, 3, 3)}
    bare = []
    for level in range(TINY_LEVELS):
        start = 2 + level * (TINY_BLOCKS + 1)
        encoder |= {start: wide} | dict.fromkeys(range(start + 1, start + 1 + TINY_BLOCKS))
        bare.append(f"taesd_encoder.{start}")
        start = 3 + level * (TINY_BLOCKS + 2)
        decoder |= dict.fromkeys(range(start, start + TINY_BLOCKS)) | {start + TINY_BLOCKS + 1: wide}
        bare.append(f"taesd_decoder.{start + TINY_BLOCKS + 1}")
    encoder[max(encoder) + 1] = (channels, TINY_WIDTH, 3, 3)
    decoder |= {max(decoder) + 1: None, max(decoder) + 2: (3, TINY_WIDTH, 3, 3)}
    linears: dict[str, Shape] = {}
    for name, layers in (("taesd_encoder", encoder), ("taesd_decoder", decoder)):
        for layer, shape in layers.items():
            if shape is not None:
                linears[f"{name}.{layer}"] = shape
            else:
                linears |= {f"{name}.{layer}.conv.{part}": wide for part in (0, 2, 4)}
    shapes = {key: shape for key, shape in _with_biases(linears).items() if key.removesuffix(".bias") not in bare}
    return shapes | {"vae_scale": (), "vae_shift": ()}


def kl_shapes(factor: int, inner: int, channels: int) -> dict[str, Shape]:
    """Every name and shape of the full autoencoder; between `inner` and `channels` latent channels lie 1x1
    convolutions. Raises `UsageError` when diffusers, whose names these are, is not installed."""
    from imagekiln.nets import latent_autoencoder

    widths = [KL_WIDTH * times for times in KL_LEVELS[factor]]
    with torch.device("meta"):
        network = latent_autoencoder.build("kl", (3, 64, 64), widths, latent_channels=inner, blocks=KL_BLOCKS)
    return shapes_of(network.state_dict()) | {
        "quant_conv.weight": (2 * channels, 2 * inner, 1, 1),
        "quant_conv.bias": (2 * channels,),
        "post_quant_conv.weight": (inner, channels, 1, 1),
        "post_quant_conv.bias": (inner,),
    }


def _with_biases(linears: Mapping[str, Shape]) -> dict[str, Shape]:
    shapes = {f"{name}.weight": shape for name, shape in linears.items()}
    return shapes | {f"{name}.bias": shape[:1] for name, shape in linears.items()}


def _agree(model: str, found: Shapes, expected: Shapes) -> None:
    missing = [name for name in expected if name not in found]
    beyond = [name for name in found if name not in expected]
    other = [name for name in expected if name in found and tuple(found[name]) != expected[name]]
    if missing or beyond or other:
        what = (
            f"{other[0]} has shape {tuple(found[other[0]])} and {expected[other[0]]} is expected"
            if other
            else f"{missing[0]} is missing"
            if missing
            else f"{beyond[0]} is not known there"
        )
        raise UsageError(f"ComfyUI would take this file for {model} and not load it: {what}.")
