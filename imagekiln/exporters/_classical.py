"""Pretrained models under the names of their first publication, all parts in one file.

Denoiser and autoencoder are named as in latent diffusion (Rombach et al. 2022, arXiv:2112.10752), XL (Podell et al.
2023, arXiv:2307.01952) and Stable Diffusion 3 (Esser et al. 2024, arXiv:2403.03206), text encoders as in transformers,
and the second one of XL as in OpenCLIP, where the layers for queries, keys and values are one, and the projection of a
whole text is applied from the right, x P. In the transformer these layers are one, too, and where a norm is told scale
and shift alone, the shift comes first.

Tables say what is called otherwise; what they leave out keeps its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

Places = Sequence[tuple[str, str]]
"""Beginnings of names, in diffusers and in the first publication."""

RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
MIDDLE = {
    "resnets.0": "block_1",
    "resnets.1": "block_2",
    "attentions.0.group_norm": "attn_1.norm",
    "attentions.0.to_q": "attn_1.q",
    "attentions.0.to_k": "attn_1.k",
    "attentions.0.to_v": "attn_1.v",
    "attentions.0.to_out.0": "attn_1.proj_out",
}
WORDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
JOINT = {
    "pos_embed.proj": "x_embedder.proj",
    "pos_embed.pos_embed": "pos_embed",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
JOINT_LAYER = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_add_out": "context_block.attn.proj",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
THREE = {
    "attn.to_{}": "x_block.attn.qkv",
    "attn2.to_{}": "x_block.attn2.qkv",
    "attn.add_{}_proj": "context_block.attn.qkv",
}
"""Layers for queries, keys and values that are one."""


def checkpoint(
    denoiser: Mapping[str, Tensor],
    blocks: int,
    coder: Mapping[str, Tensor],
    encoders: Sequence[Mapping[str, Tensor]],
) -> dict[str, Tensor]:
    """One file of `UNet2DConditionModel` with so many blocks a level, `AutoencoderKL`, and one text encoder or two."""
    parts = {"model.diffusion_model": unet(denoiser, blocks), "first_stage_model": autoencoder(coder)}
    if len(encoders) == 1:
        parts["cond_stage_model.transformer"] = clip(encoders[0])
    else:
        parts["conditioner.embedders.0.transformer"] = clip(encoders[0])
        parts["conditioner.embedders.1.model"] = open_clip(encoders[1])
    return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def joint_checkpoint(
    denoiser: Mapping[str, Tensor], coder: Mapping[str, Tensor], encoders: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """One file of `SD3Transformer2DModel`, `AutoencoderKL`, two `CLIPTextModelWithProjection` and, where it is, T5.

    The first text encoder has no projection there. What it says of a whole text goes into a linear layer, which takes
    up the projection: W (P x) = (W P) x.
    """
    told, projection = "time_text_embed.text_embedder.linear_1.weight", encoders[0]["text_projection.weight"]
    first, second = denoiser[told].tensor_split([len(projection)], 1)
    parts = {
        "model.diffusion_model": transformer({**denoiser, told: torch.cat([first @ projection, second], 1)}),
        "first_stage_model": autoencoder(coder),
        "text_encoders.clip_l.transformer": clip(encoders[0]),
        "text_encoders.clip_g.transformer": clip(encoders[1])
        | {"text_projection.weight": encoders[1]["text_projection.weight"]},
    }
    if len(encoders) > 2:
        parts["text_encoders.t5xxl.transformer"] = dict(encoders[2])
    return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


# -- denoisers --------------------------------------------------------------------------------------------------------


def unet(tensors: Mapping[str, Tensor], blocks: int) -> dict[str, Tensor]:
    """`UNet2DConditionModel` with so many blocks a level."""
    looking = [f"up_blocks.{level}.attentions.0.norm.weight" in tensors for level in range(_levels(tensors))]
    return _renamed(tensors, list(_unet_places(looking, blocks)))


def unet_back(tensors: Mapping[str, Tensor], levels: int, blocks: int) -> dict[str, Tensor]:
    """The same weights under the names of diffusers again."""
    firsts = range(0, levels * (blocks + 1), blocks + 1)
    looking = [f"output_blocks.{place}.1.norm.weight" in tensors for place in firsts]
    return _renamed(tensors, [(theirs, ours) for ours, theirs in _unet_places(looking, blocks)])


def _unet_places(looking: Sequence[bool], blocks: int) -> Iterator[tuple[str, str]]:
    """looking: whether each level looks at the words, beginning with the coarsest."""
    for one, other in ENDS.items():
        yield f"{one}.", f"{other}."

    def residual(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
        for one, other in RESIDUAL.items():
            yield f"{ours}.{one}.", f"{theirs}.{other}."

    for level in range(len(looking)):
        first = 1 + (blocks + 1) * level
        for turn in range(blocks):
            yield from residual(f"down_blocks.{level}.resnets.{turn}", f"input_blocks.{first + turn}.0")
            yield f"down_blocks.{level}.attentions.{turn}.", f"input_blocks.{first + turn}.1."
        yield f"down_blocks.{level}.downsamplers.0.conv.", f"input_blocks.{first + blocks}.0.op."
    yield from residual("mid_block.resnets.0", "middle_block.0")
    yield "mid_block.attentions.0.", "middle_block.1."
    yield from residual("mid_block.resnets.1", "middle_block.2")
    for level, looks in enumerate(looking):
        first = (blocks + 1) * level
        # layers of a block are counted, so what follows is one further where it looks at the words
        yield f"up_blocks.{level}.upsamplers.0.conv.", f"output_blocks.{first + blocks}.{1 + looks}.conv."
        for turn in range(blocks + 1):
            yield from residual(f"up_blocks.{level}.resnets.{turn}", f"output_blocks.{first + turn}.0")
            yield f"up_blocks.{level}.attentions.{turn}.", f"output_blocks.{first + turn}.1."


def transformer(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`SD3Transformer2DModel`."""
    own, depth = dict(tensors), _levels(tensors, "transformer_blocks.")
    for name in ("norm_out.linear", f"transformer_blocks.{depth - 1}.norm1_context.linear"):
        for part in ("weight", "bias"):
            scale, shift = own[f"{name}.{part}"].chunk(2)
            own[f"{name}.{part}"] = torch.cat([shift, scale])
    found, places = {}, [(one, other) for one, other in JOINT.items()]
    for layer in range(depth):
        inside, there = f"transformer_blocks.{layer}.", f"joint_blocks.{layer}."
        places += [(f"{inside}{one}.", f"{there}{other}.") for one, other in JOINT_LAYER.items()]
        for one, other in THREE.items():
            for part in ("weight", "bias"):
                names = [f"{inside}{one.format(asked)}.{part}" for asked in "qkv"]
                if names[0] in own:
                    found[f"{there}{other}.{part}"] = torch.cat([own.pop(name) for name in names])
    return found | _renamed(own, places)


# -- autoencoders -----------------------------------------------------------------------------------------------------


def autoencoder(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`AutoencoderKL`; its layers of attention are 1x1 convolutions there."""
    found = _renamed(tensors, list(_coder_places(_levels(tensors, "encoder.down_blocks."))))
    return {
        name.replace(".conv_shortcut.", ".nin_shortcut."): t[:, :, None, None] if _is_matrix(name, t) else t
        for name, t in found.items()
    }


def _is_matrix(name: str, tensor: Tensor) -> bool:
    return ".attn_1." in name and tensor.ndim == 2


def _coder_places(levels: int) -> Iterator[tuple[str, str]]:
    for level in range(levels):
        there = levels - 1 - level  # the first publication counts from the finest level on both sides
        yield f"encoder.down_blocks.{level}.resnets.", f"encoder.down.{level}.block."
        yield f"encoder.down_blocks.{level}.downsamplers.0.", f"encoder.down.{level}.downsample."
        yield f"decoder.up_blocks.{level}.resnets.", f"decoder.up.{there}.block."
        yield f"decoder.up_blocks.{level}.upsamplers.0.", f"decoder.up.{there}.upsample."
    for side in ("encoder", "decoder"):
        for one, other in MIDDLE.items():
            yield f"{side}.mid_block.{one}.", f"{side}.mid.{other}."
        yield f"{side}.conv_norm_out.", f"{side}.norm_out."


# -- text encoders ----------------------------------------------------------------------------------------------------


def clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`CLIPTextModel`, whose names some versions of transformers begin with "text_model." and others do not."""
    return {f"text_model.{name}": tensor for name, tensor in _weights(tensors).items() if "projection" not in name}


def open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`CLIPTextModelWithProjection` under the names of OpenCLIP.

    Rows of the joint layer are those of queries, keys and values, in this order; the projection is transposed.
    """
    ours = _weights(tensors)
    found = {other: ours[one] for one, other in WORDS.items()}
    for layer in range(1 + max(int(name.split(".")[2]) for name in ours if name.startswith("encoder.layers."))):
        inside, there = f"encoder.layers.{layer}.", f"transformer.resblocks.{layer}."
        for part in ("weight", "bias"):
            joint = [ours[f"{inside}self_attn.{one}_proj.{part}"] for one in "qkv"]
            found[f"{there}attn.in_proj_{part}"] = torch.cat(joint)
            found |= {f"{there}{other}.{part}": ours[f"{inside}{one}.{part}"] for one, other in LAYER.items()}
    return found | {"text_projection": ours["text_projection.weight"].T}


def _weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without "text_model.", and without the numbers 0, 1, 2 ... that old versions keep."""
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("position_ids")}
    return {name.removeprefix("text_model."): tensor for name, tensor in kept.items()}


def _levels(tensors: Mapping[str, Tensor], start: str = "down_blocks.") -> int:
    return 1 + max(int(name.removeprefix(start).split(".")[0]) for name in tensors if name.startswith(start))


def _renamed(tensors: Mapping[str, Tensor], places: Places) -> dict[str, Tensor]:
    found = {}
    for name, tensor in tensors.items():
        theirs = (other + name.removeprefix(one) for one, other in places if name.startswith(one))
        found[next(theirs, name)] = tensor
    return found
