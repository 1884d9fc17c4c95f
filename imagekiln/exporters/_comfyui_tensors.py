"""Weights under the names and in the sizes that ComfyUI knows, filled up so that nothing is computed differently.

See `comfyui` for why that is exact. Names of Stable Diffusion 1.5 are those of its first publication (`_classical`),
those of the tiny autoencoder count the layers of two plain sequences.

Shapes: B pictures, Z latent channels, h rows, w columns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from imagekiln.errors import UsageError
from imagekiln.exporters import _classical
from imagekiln.exporters import _comfyui_rules as rules
from imagekiln.exporters._coder import folded

Coding = Callable[[Tensor], Tensor]


def filled(tensor: Tensor, *sizes: int) -> Tensor:
    """The tensor in a corner of zeros of these sizes; the axes behind them stay.

    >>> filled(torch.ones(1, 2), 2, 3).tolist()
    [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    """
    wide = tensor.new_zeros(*sizes, *tensor.shape[len(sizes) :])
    wide[tuple(slice(size) for size in tensor.shape)] = tensor
    return wide


# -- denoisers --------------------------------------------------------------------------------------------------------


def transformer(net: Any, words: int, whole: int) -> dict[str, Tensor]:
    """`SD3Transformer2DModel` for words of `words` numbers, whole texts of `whole`, and 16 latent channels."""
    tensors = dict(net.state_dict())
    hidden = tensors["context_embedder.weight"].shape[0]
    channels, cells = net.config.in_channels, net.config.patch_size**2
    for name, width in (("context_embedder", words), ("time_text_embed.text_embedder.linear_1", whole)):
        tensors[f"{name}.weight"] = filled(tensors[f"{name}.weight"], hidden, width)
    tensors["pos_embed.proj.weight"] = filled(tensors["pos_embed.proj.weight"], hidden, rules.SD3_CHANNELS)
    for name in ("proj_out.weight", "proj_out.bias"):  # rows: cells of a patch, in each of them the channels
        rows = tensors[name].unflatten(0, (cells, channels))
        tensors[name] = filled(rows, cells, rules.SD3_CHANNELS).flatten(0, 1)
    return tensors


def unet(net: Any, words: int) -> dict[str, Tensor]:
    """`UNet2DConditionModel` under the names of Stable Diffusion 1.5, for words of `words` numbers, 4 channels."""
    tensors = dict(net.state_dict())
    for name, tensor in tensors.items():
        if re.search(r"attn2\.to_[kv]\.weight$", name):
            tensors[name] = filled(tensor, len(tensor), words)
    tensors["conv_in.weight"] = filled(tensors["conv_in.weight"], len(tensors["conv_in.bias"]), rules.SD15_CHANNELS)
    for name in ("conv_out.weight", "conv_out.bias"):
        tensors[name] = filled(tensors[name], rules.SD15_CHANNELS)
    return _classical.unet(tensors, net.config.layers_per_block)


# -- autoencoders -----------------------------------------------------------------------------------------------------


def autoencoder(
    network: Any, tensors: dict[str, Tensor], gain: float, offset: float, channels: int
) -> dict[str, Tensor]:
    """The file of an autoencoder for latents c of so many channels, with raw = gain c + offset in its own.

    tensors: its weights under the keys of the network's class, which may have taken up what stands behind the encoder.

    Raises:
        UsageError: ComfyUI has no autoencoder of that class, or of these sizes.
    """
    kind, config = type(network).__name__, network.config
    own = config.latent_channels
    if kind == "AutoencoderTiny":
        widths, blocks = config.encoder_block_out_channels, config.num_encoder_blocks[-1]
        if len(widths) != rules.TINY_LEVELS + 1 or max(widths) > rules.TINY_WIDTH or blocks > rules.TINY_BLOCKS:
            raise UsageError(
                f"ComfyUI's tiny autoencoder makes 8 pixels of a latent, {rules.TINY_WIDTH} channels wide with "
                f"{rules.TINY_BLOCKS} blocks a level; this one makes {2 ** (len(widths) - 1)} with {max(widths)} and "
                f"{blocks}. Train it with factor = 8, width <= {rules.TINY_WIDTH} and blocks <= {rules.TINY_BLOCKS}."
            )
        return _tiny(tensors, blocks, channels) | {
            "vae_scale": torch.tensor(gain),
            "vae_shift": torch.tensor(-offset / gain),
        }
    known = {tuple(rules.KL_WIDTH * times for times in levels) for levels in rules.KL_LEVELS.values()}
    widths, blocks = tuple(config.block_out_channels), config.layers_per_block
    if kind != "AutoencoderKL" or widths not in known or blocks != rules.KL_BLOCKS:
        raise UsageError(
            f"ComfyUI has no autoencoder of class {kind} with levels of {list(widths)} channels and {blocks} blocks; "
            f"it has AutoencoderKL with {' or '.join(str(list(one)) for one in sorted(known))} and {rules.KL_BLOCKS}. "
            "Train the codec with kind = 'kl', width = 128, blocks = 2 and factor = 8 or 4, or with kind = 'tiny' and "
            "factor = 8."
        )
    return fill_kl(folded(tensors, gain, offset), own, channels)


def fill_kl(tensors: dict[str, Tensor], own: int, channels: int) -> dict[str, Tensor]:
    """`AutoencoderKL` for more latent channels than its own, which it neither looks at nor says anything about."""
    halves = {name: tensors[f"quant_conv.{name}"].chunk(2) for name in ("weight", "bias")}
    wide = {f"quant_conv.{k}": torch.cat([filled(half, channels) for half in v]) for k, v in halves.items()}
    return tensors | wide | {"post_quant_conv.weight": filled(tensors["post_quant_conv.weight"], own, channels)}


def _tiny(own: Mapping[str, Tensor], blocks: int, channels: int) -> dict[str, Tensor]:
    """The tiny autoencoder in ComfyUI's sizes; layers that this one does not have are 0."""
    wanted = rules.tiny_shapes(channels)
    tensors = {name: torch.zeros(shape) for name, shape in wanted.items() if not name.startswith("vae_")}
    for name, tensor in own.items():
        side, _, layer, rest = name.split(".", 3)
        place = _tiny_place(side, int(layer), blocks)
        wide = f"taesd_{side}.{place}.{rest}"
        tensors[wide] = filled(tensor, *wanted[wide][:2])
    return tensors


def _tiny_place(side: str, layer: int, blocks: int) -> int:
    """Where a layer of a network with so many blocks a level stands among ComfyUI's."""
    ahead = 0 if side == "encoder" else 1  # the decoder begins with a layer that diffusers does not count
    if layer < 2:
        return layer + ahead
    span = blocks + (1 if side == "encoder" else 2)
    level, within = divmod(layer - 2, span)
    level, within = (rules.TINY_LEVELS - 1, within + span) if level > rules.TINY_LEVELS - 1 else (level, within)
    missing = rules.TINY_BLOCKS - blocks
    behind = within > blocks if side == "encoder" else within >= blocks
    return 2 + ahead + level * (span + missing) + within + (missing if behind else 0)


def reader(tensors: Mapping[str, Tensor], network: Any) -> tuple[Coding, Coding]:
    """(encode, decode) of pictures in [-1, 1] from a file that `autoencoder` made of this network, as ComfyUI reads it:
    with classes of diffusers in the sizes that the file's shapes say."""
    kind = type(network)
    if "vae_scale" in tensors:
        channels = tensors["taesd_decoder.1.weight"].shape[1]
        widths, counts = (rules.TINY_WIDTH,) * 4, (1, *[rules.TINY_BLOCKS] * rules.TINY_LEVELS)
        tiny = kind(
            latent_channels=channels,
            encoder_block_out_channels=widths,
            decoder_block_out_channels=widths,
            num_encoder_blocks=counts,
            num_decoder_blocks=counts[::-1],
        )
        for side, ahead in (("encoder", 0), ("decoder", 1)):
            named = ((n.split(".", 2), t) for n, t in tensors.items() if n.startswith(f"taesd_{side}."))
            getattr(tiny, side).load_state_dict({f"layers.{int(n) - ahead}.{rest}": t for (_, n, rest), t in named})
        scale, shift = tensors["vae_scale"], tensors["vae_shift"]
        return lambda x: tiny.encoder(x) / scale + shift, lambda c: tiny.decoder((c - shift) * scale)
    full = kind.from_config(network.config)
    inner, channels = tensors["post_quant_conv.weight"].shape[:2]
    full.quant_conv, full.post_quant_conv = nn.Conv2d(2 * inner, 2 * channels, 1), nn.Conv2d(channels, inner, 1)
    full.load_state_dict(dict(tensors))
    full.eval()
    return (
        lambda x: full.quant_conv(full.encoder(x)).chunk(2, dim=1)[0],
        lambda c: full.decoder(full.post_quant_conv(c)),
    )
