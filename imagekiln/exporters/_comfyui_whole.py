"""What ComfyUI makes of one file of a whole model: the denoiser, the full autoencoder and the text encoders.

    SD15   cond_stage_model.transformer                    the smaller encoder of CLIP
    SDXL   conditioner.embedders.0.transformer, .1.model   that, and the largest one of OpenCLIP
    SD3    text_encoders.clip_l, .clip_g, .t5xxl           these, both under the names of transformers, and T5, or not

The denoiser lies behind "model.diffusion_model", the autoencoder behind "first_stage_model"; that of SD3 has no 1x1
convolutions next to the latents. The rules are stated as in `_comfyui_rules`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from imagekiln.errors import UsageError
from imagekiln.exporters import _comfyui_rules as rules
from imagekiln.exporters._comfyui_rules import Shape, Shapes, agree, with_biases

TOKENS, PLACES = 49408, 77


class Text(NamedTuple):
    """Sizes of a text encoder; the width within its layers is four times that of a token."""

    width: int
    layers: int


class Third(NamedTuple):
    """Sizes of T5. inner: of its layers. distances: how many kinds of them its attention tells apart."""

    width: int = 4096
    layers: int = 24
    inner: int = 10240
    heads: int = 64
    head: int = 64
    tokens: int = 32128
    distances: int = 32


TEXTS = {
    "SD15": (Text(768, 12),),
    "SDXL": (Text(768, 12), Text(1280, 32)),
    "SD3": (Text(768, 12), Text(1280, 32)),
}
THIRD = Third()


def checkpoint(shapes: Shapes) -> dict[str, Any]:
    """The model that ComfyUI takes one file of all parts for: what `denoiser` says of its denoiser.

    Raises:
        UsageError: it would refuse the file, leave numbers of the text encoders or of the autoencoder random, or have
            other words than the denoiser reads.
    """
    start = "model.diffusion_model."
    found = rules.denoiser(
        {name.removeprefix(start): shape for name, shape in shapes.items() if name.startswith(start)}
    )
    rest = {name: shape for name, shape in shapes.items() if not name.startswith(start)}
    coder = first_stage_shapes(found["channels"], convolutions=found["model"] != "SD3")
    expected = {f"first_stage_model.{name}": shape for name, shape in coder.items()}
    texts = TEXTS[found["model"]]
    if found["model"] == "SD3":
        expected |= _texts_of_sd3(found, rest)
    elif len(texts) == 1:
        expected |= clip_shapes("cond_stage_model.transformer.", texts[0])
    else:
        expected |= clip_shapes("conditioner.embedders.0.transformer.", texts[0])
        expected |= open_clip_shapes("conditioner.embedders.1.model.", texts[1])
    agree(found["model"], rest, expected)
    return found


def _texts_of_sd3(found: dict[str, Any], rest: Shapes) -> dict[str, Shape]:
    first, second = TEXTS["SD3"]
    if (found["words"], found["whole"]) != (THIRD.width, first.width + second.width):
        raise UsageError(
            f"ComfyUI would refuse this file: its denoiser reads words of {found['words']} numbers and "
            f"{found['whole']} of a whole text; the text encoders of Stable Diffusion 3 say {THIRD.width} and "
            f"{first.width + second.width}."
        )
    start = "text_encoders."
    shapes = clip_shapes(f"{start}clip_l.transformer.", first) | clip_shapes(f"{start}clip_g.transformer.", second)
    shapes[f"{start}clip_g.transformer.text_projection.weight"] = (second.width, second.width)
    third = f"{start}t5xxl.transformer."
    return shapes | (t5_shapes(third, THIRD) if any(name.startswith(third) for name in rest) else {})


def clip_shapes(start: str, size: Text) -> dict[str, Shape]:
    """Every name and shape of a text encoder of CLIP, under the names of transformers."""
    inside, width = f"{start}text_model.", size.width
    linears: dict[str, Shape] = {f"{inside}final_layer_norm": (width,)}
    for layer in range(size.layers):
        where = f"{inside}encoder.layers.{layer}."
        linears |= {f"{where}layer_norm1": (width,), f"{where}layer_norm2": (width,)}
        linears |= {f"{where}self_attn.{name}_proj": (width, width) for name in ("q", "k", "v", "out")}
        linears |= {f"{where}mlp.fc1": (4 * width, width), f"{where}mlp.fc2": (width, 4 * width)}
    return with_biases(linears) | {
        f"{inside}embeddings.token_embedding.weight": (TOKENS, width),
        f"{inside}embeddings.position_embedding.weight": (PLACES, width),
    }


def open_clip_shapes(start: str, size: Text) -> dict[str, Shape]:
    """Every name and shape of a text encoder of OpenCLIP."""
    width = size.width
    linears: dict[str, Shape] = {f"{start}ln_final": (width,)}
    shapes: dict[str, Shape] = {
        f"{start}token_embedding.weight": (TOKENS, width),
        f"{start}positional_embedding": (PLACES, width),
        f"{start}text_projection": (width, width),
    }
    for layer in range(size.layers):
        where = f"{start}transformer.resblocks.{layer}."
        shapes |= {f"{where}attn.in_proj_weight": (3 * width, width), f"{where}attn.in_proj_bias": (3 * width,)}
        linears |= {f"{where}ln_1": (width,), f"{where}ln_2": (width,), f"{where}attn.out_proj": (width, width)}
        linears |= {f"{where}mlp.c_fc": (4 * width, width), f"{where}mlp.c_proj": (width, 4 * width)}
    return shapes | with_biases(linears)


def t5_shapes(start: str, size: Third) -> dict[str, Shape]:
    """Every name and shape of T5's encoder with gates, under the names of transformers."""
    width, inside = size.width, size.heads * size.head
    shapes: dict[str, Shape] = {
        f"{start}shared.weight": (size.tokens, width),
        f"{start}encoder.embed_tokens.weight": (size.tokens, width),  # the same; some programs read only this one
        f"{start}encoder.final_layer_norm.weight": (width,),
    }
    for layer in range(size.layers):
        where = f"{start}encoder.block.{layer}.layer."
        shapes |= {f"{where}{place}.layer_norm.weight": (width,) for place in (0, 1)}
        shapes |= {f"{where}0.SelfAttention.{one}.weight": (inside, width) for one in "qkv"}
        shapes |= {f"{where}1.DenseReluDense.{one}.weight": (size.inner, width) for one in ("wi_0", "wi_1")}
        shapes[f"{where}0.SelfAttention.o.weight"] = (width, inside)
        shapes[f"{where}1.DenseReluDense.wo.weight"] = (width, size.inner)
    first = f"{start}encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return shapes | {first: (size.distances, size.heads)}


def first_stage_shapes(channels: int, convolutions: bool = True) -> dict[str, Shape]:
    """Every name and shape of the full autoencoder with 8 pixels a latent, under the names of its first publication.

    convolutions: whether it has those of 1x1 next to the latents.
    """
    widths = [rules.KL_WIDTH * times for times in rules.KL_LEVELS[8]]
    first, last, top = widths[0], widths[-1], len(widths) - 1
    linears: dict[str, Shape] = {
        "encoder.conv_in": (first, 3, 3, 3),
        "encoder.conv_out": (2 * channels, last, 3, 3),
        "encoder.norm_out": (last,),
        "decoder.conv_in": (last, channels, 3, 3),
        "decoder.conv_out": (3, first, 3, 3),
        "decoder.norm_out": (first,),
    }
    if convolutions:
        linears["quant_conv"] = (2 * channels, 2 * channels, 1, 1)
        linears["post_quant_conv"] = (channels, channels, 1, 1)

    def block(where: str, before: int, after: int) -> None:
        linears.update({f"{where}.norm1": (before,), f"{where}.conv1": (after, before, 3, 3)})
        linears.update({f"{where}.norm2": (after,), f"{where}.conv2": (after, after, 3, 3)})
        if before != after:
            linears[f"{where}.nin_shortcut"] = (after, before, 1, 1)

    for side in ("encoder", "decoder"):
        for number in (1, 2):
            block(f"{side}.mid.block_{number}", last, last)
        linears[f"{side}.mid.attn_1.norm"] = (last,)
        linears |= {f"{side}.mid.attn_1.{name}": (last, last, 1, 1) for name in ("q", "k", "v", "proj_out")}
    before = first
    for level, width in enumerate(widths):
        for turn in range(rules.KL_BLOCKS):
            block(f"encoder.down.{level}.block.{turn}", width if turn else before, width)
        if level < top:
            linears[f"encoder.down.{level}.downsample.conv"] = (width, width, 3, 3)
        before = width
    for level in range(top, -1, -1):
        width = widths[level]
        for turn in range(rules.KL_BLOCKS + 1):
            block(f"decoder.up.{level}.block.{turn}", width if turn else before, width)
        if level:
            linears[f"decoder.up.{level}.upsample.conv"] = (width, width, 3, 3)
        before = width
    return with_biases(linears)
