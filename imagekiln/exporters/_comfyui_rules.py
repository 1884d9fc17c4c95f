"""What ComfyUI makes of a file of weights, told from names and shapes alone, as it does.

ComfyUI reads no config. It recognises a network by names in the file, takes sizes from shapes, builds its own network
of these sizes and fills it. Sizes that it does not take from the file are fixed. So a file is accepted when its names
and shapes are exactly those of one of the networks below; what is missing keeps random numbers there, and what differs
in shape is an error. These rules are stated for what is exported here:

    SD3    a transformer under the names of diffusers or of its first publication, 16 latent channels, patches of 2, as
           many layers as heads of 64
    SD15   a U-Net under the names of its first publication, 4 latent channels, 320 channels at the finest level,
           words of 768 numbers, 8 heads, projections by 1x1 convolutions
    SDXL   the same with words of 2048 numbers, heads of 64, linear projections, told 2816 numbers of the whole text and
           of sizes, and 0, 2 and 10 layers of attention at its levels
    TAESD  the tiny autoencoder, 64 channels wide, 3 blocks a level, 8 pixels a latent, colour pictures
    KL     `AutoencoderKL` under the names of diffusers, 128 channels at the finest level, 2 blocks a level, 8 or 4
           pixels a latent, colour pictures

What it makes of a whole model in one file, `_comfyui_whole` tells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from imagekiln.errors import UsageError

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

HEAD, PATCH, TIME = 64, 2, 256
SD3_CHANNELS, SD15_CHANNELS = 16, 4
UNET_WIDTH, SD15_WORDS = 320, 768
TINY_WIDTH, TINY_BLOCKS, TINY_LEVELS = 64, 3, 3
KL_WIDTH, KL_BLOCKS = 128, 2
KL_LEVELS = {8: (1, 2, 4, 4), 4: (1, 2, 4)}

LATENTS = {"SD15": (0.18215, 0.0), "SDXL": (0.13025, 0.0), "SD3": (1.5305, 0.0609)}
"""What it multiplies latents by and what it has taken off before."""


class UNet(NamedTuple):
    """What ComfyUI fixes of a kind of U-Net. heads: their number, or 0 where `head` numbers are one."""

    words: int
    linear: bool
    told: int = 0
    depths: tuple[int, ...] | None = None
    heads: int = 0
    head: int = HEAD


UNETS = {
    "SD15": UNet(SD15_WORDS, linear=False, heads=8),
    "SDXL": UNet(2048, linear=True, told=2816, depths=(0, 2, 10)),
}


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
    if "joint_blocks.0.context_block.attn.qkv.weight" in shapes:
        return _joint(shapes)
    if "input_blocks.0.0.weight" in shapes:
        return _unet(shapes)
    raise UsageError("ComfyUI would not recognise this file: it has the names of none of the networks it knows.")


def autoencoder(shapes: Shapes) -> dict[str, Any]:
    """Likewise for a file of an autoencoder: `model`, `channels` of its latents, `factor` pixels a latent."""
    if "taesd_decoder.1.weight" in shapes:
        channels = shapes["taesd_decoder.1.weight"][1]
        agree("TAESD", shapes, tiny_shapes(channels))
        return {"model": "TAESD", "channels": channels, "factor": 2**TINY_LEVELS}
    if "decoder.up_blocks.0.resnets.0.norm1.weight" in shapes:
        channels = shapes["post_quant_conv.weight"][1]
        deep = "encoder.down_blocks.2.downsamplers.0.conv.weight" in shapes
        factor = 8 if deep else 4
        agree("KL", shapes, kl_shapes(factor, shapes["decoder.conv_in.weight"][1], channels))
        return {"model": "KL", "channels": channels, "factor": factor}
    raise UsageError("ComfyUI would not recognise this file: it has the names of none of the autoencoders it knows.")


# -- the transformer --------------------------------------------------------------------------------------------------


def _transformer(shapes: Shapes) -> dict[str, Any]:
    patches, told = "pos_embed.proj.weight", "time_text_embed.text_embedder.linear_1.weight"
    sizes = _sizes(shapes, patches, "context_embedder.weight", told, "pos_embed.pos_embed")
    agree("SD3", shapes, transformer_shapes(*sizes))
    return _found(sizes)


def _joint(shapes: Shapes) -> dict[str, Any]:
    sizes = _sizes(shapes, "x_embedder.proj.weight", "context_embedder.weight", "y_embedder.mlp.0.weight", "pos_embed")
    normed = "joint_blocks.0.context_block.attn.ln_q.weight" in shapes
    alone = [layer for layer in range(sizes[0]) if f"joint_blocks.{layer}.x_block.attn2.qkv.weight" in shapes]
    agree("SD3", shapes, joint_shapes(*sizes, normed, alone))
    return _found(sizes)


def _sizes(shapes: Shapes, *names: str) -> tuple[int, int, int, int]:
    """Layers, numbers of a word and of a whole text, places: from the shapes of these weights."""
    missing = [name for name in names if name not in shapes]
    if missing:
        raise UsageError(f"ComfyUI would take this file for SD3 and not load it: {missing[0]} is missing.")
    (width, channels, patch, _), words, whole, places = (shapes[name] for name in names)
    if channels != SD3_CHANNELS or patch != PATCH:
        raise UsageError(
            f"ComfyUI would refuse this file: {names[0]} has {channels} channels and patches of {patch}; it knows "
            f"Stable Diffusion 3 with {SD3_CHANNELS} and patches of {PATCH}."
        )
    return width // HEAD, words[1], whole[1], places[1]


def _found(sizes: tuple[int, int, int, int]) -> dict[str, Any]:
    known = zip(("depth", "words", "whole", "patches"), sizes, strict=True)
    return {"model": "SD3", "channels": SD3_CHANNELS, **dict(known)}


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
    return shapes | with_biases(linears)


def joint_shapes(
    depth: int, words: int, whole: int, patches: int, normed: bool = False, alone: Sequence[int] = ()
) -> dict[str, Shape]:
    """Every name and shape of the same transformer under the names of its first publication.

    normed: whether queries and keys are normalised. alone: layers in which pictures look at themselves once more.
    """
    width = HEAD * depth
    shapes: dict[str, Shape] = {"pos_embed": (1, patches, width)}
    linears: dict[str, Shape] = {
        "x_embedder.proj": (width, SD3_CHANNELS, PATCH, PATCH),
        "t_embedder.mlp.0": (width, TIME),
        "t_embedder.mlp.2": (width, width),
        "y_embedder.mlp.0": (width, whole),
        "y_embedder.mlp.2": (width, width),
        "context_embedder": (width, words),
        "final_layer.adaLN_modulation.1": (2 * width, width),
        "final_layer.linear": (SD3_CHANNELS * PATCH**2, width),
    }
    for layer in range(depth):
        for side in ("x_block", "context_block"):
            where, last = f"joint_blocks.{layer}.{side}.", side == "context_block" and layer == depth - 1
            twice = side == "x_block" and layer in alone
            linears[f"{where}adaLN_modulation.1"] = ((2 if last else 9 if twice else 6) * width, width)
            for attention in ("attn", "attn2") if twice else ("attn",):
                linears[f"{where}{attention}.qkv"] = (3 * width, width)
                if not last:  # nobody asks what became of the words
                    linears[f"{where}{attention}.proj"] = (width, width)
                if normed:
                    shapes |= {f"{where}{attention}.ln_{one}.weight": (HEAD,) for one in "qk"}
            if not last:
                linears |= {f"{where}mlp.fc1": (4 * width, width), f"{where}mlp.fc2": (width, 4 * width)}
    return shapes | with_biases(linears)


# -- the U-Net --------------------------------------------------------------------------------------------------------


def _unet(shapes: Shapes) -> dict[str, Any]:
    width, channels = shapes["input_blocks.0.0.weight"][:2]
    if width != UNET_WIDTH or channels != SD15_CHANNELS:
        raise UsageError(
            f"ComfyUI would refuse this file: input_blocks.0.0.weight makes {width} channels of {channels}; it knows "
            f"Stable Diffusion 1.5 and XL with {UNET_WIDTH} of {SD15_CHANNELS}."
        )
    levels, words, linear = _levels(shapes)
    widths, depths = [level[0] for level in levels], tuple(level[2] for level in levels)
    told = shapes["label_emb.0.0.weight"][1] if "label_emb.0.0.weight" in shapes else 0
    fitting = [
        (model, known)
        for model, known in UNETS.items()
        if (known.words, known.linear, known.told) == (words, linear, told) and known.depths in (None, depths)
    ]
    if not fitting:
        raise UsageError(
            f"ComfyUI would refuse this file: words of {words} numbers, {told} numbers told of the whole, and {depths} "
            f"layers of attention at the levels; it knows Stable Diffusion 1.5 with words of {SD15_WORDS} numbers, and "
            f"XL with {UNETS['SDXL'].words}, {UNETS['SDXL'].told} and {UNETS['SDXL'].depths}."
        )
    [(model, known)] = fitting
    if any(width % UNET_WIDTH for width in widths):
        raise UsageError(
            f"ComfyUI would refuse this file: levels of {widths} channels; it knows multiples of {UNET_WIDTH}."
        )
    middle = sum(name.startswith("middle_block.1.") and name.endswith(".attn2.to_k.weight") for name in shapes)
    agree(model, shapes, unet_shapes(widths, levels[0][1], depths, middle, known))
    return {"model": model, "channels": channels, "widths": widths, "words": words}


def _levels(shapes: Shapes) -> tuple[list[tuple[int, int, int]], int | None, bool]:
    """(channels, blocks, layers of attention in one) of every level; numbers of a word; whether projections are
    linear."""
    levels, blocks, depth, width, place = [], 0, 0, 0, 0
    words, linear = None, False
    while True:
        place += 1
        outgoing = shapes.get(f"input_blocks.{place}.0.out_layers.3.weight")
        if outgoing is None:
            levels.append((width, blocks, depth))
            blocks = 0
            if f"input_blocks.{place}.0.op.weight" not in shapes:
                return levels, words, linear
            continue
        width, blocks, depth, inside = outgoing[0], blocks + 1, 0, f"input_blocks.{place}.1."
        while heard := shapes.get(f"{inside}transformer_blocks.{depth}.attn2.to_k.weight"):
            words, linear = heard[1], len(shapes[f"{inside}proj_in.weight"]) == 2
            depth += 1


def unet_shapes(
    widths: Sequence[int],
    blocks: int = 1,
    depths: Sequence[int] = (),
    middle: int = 1,
    known: UNet = UNETS["SD15"],
) -> dict[str, Shape]:
    """Every name and shape of a U-Net.

    widths: channels of levels. blocks: a level, on the way down. depths: layers of attention of a block, by level; ()
    = one, but none at the finest. middle: those of the block in the middle.
    """
    first, last, time = widths[0], widths[-1], 4 * widths[0]
    depths = depths or [min(level, 1) for level in range(len(widths))]
    shapes: dict[str, Shape] = {}
    linears: dict[str, Shape] = {
        "time_embed.0": (time, first),
        "time_embed.2": (time, time),
        "input_blocks.0.0": (first, SD15_CHANNELS, 3, 3),
        "out.0": (first,),
        "out.2": (SD15_CHANNELS, first, 3, 3),
    }
    if known.told:
        linears |= {"label_emb.0.0": (time, known.told), "label_emb.0.2": (time, time)}

    def block(where: str, before: int, after: int, depth: int) -> None:
        linears.update(_residual_shapes(f"{where}.0", before, after, time))
        if depth:
            attention, bare = _attention_shapes(f"{where}.1", after, depth, known)
            linears.update(attention)
            shapes.update(bare)

    kept, place = [first], 1
    for level, width in enumerate(widths):
        for _ in range(blocks):
            block(f"input_blocks.{place}", kept[-1], width, depths[level])
            kept.append(width)
            place += 1
        if level < len(widths) - 1:
            linears[f"input_blocks.{place}.0.op"] = (width, width, 3, 3)
            kept.append(width)
            place += 1
    block("middle_block", last, last, middle)
    linears.update(_residual_shapes("middle_block.2", last, last, time))
    before, place = last, 0
    for level in reversed(range(len(widths))):
        width = widths[level]
        for turn in range(blocks + 1):
            block(f"output_blocks.{place}", before + kept.pop(), width, depths[level])
            if level and turn == blocks:
                linears[f"output_blocks.{place}.{1 + (depths[level] > 0)}.conv"] = (width, width, 3, 3)
            before, place = width, place + 1
    return shapes | with_biases(linears)


def _residual_shapes(where: str, before: int, after: int, time: int) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {
        f"{where}.in_layers.0": (before,),
        f"{where}.in_layers.2": (after, before, 3, 3),
        f"{where}.emb_layers.1": (after, time),
        f"{where}.out_layers.0": (after,),
        f"{where}.out_layers.3": (after, after, 3, 3),
    }
    return shapes | ({f"{where}.skip_connection": (after, before, 1, 1)} if before != after else {})


def _attention_shapes(where: str, width: int, depth: int, known: UNet) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """Layers with biases, and weights without."""
    projection: Shape = (width, width) if known.linear else (width, width, 1, 1)
    linears: dict[str, Shape] = {f"{where}.norm": (width,)}
    linears |= {f"{where}.proj_in": projection, f"{where}.proj_out": projection}
    bare: dict[str, Shape] = {}
    for layer in range(depth):
        inner = f"{where}.transformer_blocks.{layer}."
        for turn, heard in (("attn1", width), ("attn2", known.words)):
            bare[f"{inner}{turn}.to_q.weight"] = (width, width)
            bare[f"{inner}{turn}.to_k.weight"] = bare[f"{inner}{turn}.to_v.weight"] = (width, heard)
            linears[f"{inner}{turn}.to_out.0"] = (width, width)
        linears[f"{inner}ff.net.0.proj"] = (8 * width, width)
        linears[f"{inner}ff.net.2"] = (width, 4 * width)
        linears |= {f"{inner}norm{number}": (width,) for number in (1, 2, 3)}
    return linears, bare


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
    shapes = {key: shape for key, shape in with_biases(linears).items() if key.removesuffix(".bias") not in bare}
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


def with_biases(linears: Mapping[str, Shape]) -> dict[str, Shape]:
    """Weights of these shapes, and biases of their rows."""
    shapes = {f"{name}.weight": shape for name, shape in linears.items()}
    return shapes | {f"{name}.bias": shape[:1] for name, shape in linears.items()}


def agree(model: str, found: Shapes, expected: Shapes) -> None:
    """Raise `UsageError` unless names and shapes are exactly the expected ones of this model."""
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
