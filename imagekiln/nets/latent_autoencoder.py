"""Autoencoders from pictures to small maps of latents and back: three classes of diffusers, built from few settings.

"kl" is `AutoencoderKL`, the first stage of latent diffusion (Rombach et al. 2022, arXiv:2112.10752): residual blocks
with group normalisation and SiLU, one level a halving, self-attention in the middle, and an encoder that ends in the
mean and log-variance of a Gaussian. "vq" is `VQModel`, the same layers around a book of codes, which is kept outside.
"tiny" is `AutoencoderTiny`, small residual blocks with ReLU and no normalisation: at a width of 64, three blocks and a
factor of 8 it is TAESD (2,445,063 parameters with 4 latent channels). At widths of 128, 256, 512, 512 and two blocks
"kl" is the autoencoder of Stable Diffusion (83,653,863 with 4). At a factor of 16 or 32 levels that are a 16th of the
picture or less have self-attention, too: with a width of 128 and two blocks the paper's (69,610,963 with 16 latent
channels, 103,880,131 with 64), and as "vq" VQGAN (Esser et al. 2021, arXiv:2012.09841; 72,141,699 with 1,024 codes of
256 numbers).

The networks are instances of diffusers' classes, so weights and config are what diffusers reads. What differs is the
speed on the CPU: group normalisation and SiLU are one pass, and activations lie with the channels last.

Shapes: B pictures, C channels, H rows, W columns, Z latent channels, h = H / factor, w = W / factor, K codes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from imagekiln.nets.layers import group_norm_silu, prefers_channels_last
from imagekiln.nets.libraries import diffusers

Kind = Literal["kl", "tiny", "vq"]

SMALLEST_VARIANCE = 1e-5
"""Added to a channel's variance before it is divided by."""

LOGVAR_RANGE = (-30.0, 20.0)
"""Log-variances are kept in here, as diffusers does when it reads them."""

WIDEST = 4
"""Channels of the coarsest level over those of the finest ("kl", "vq")."""

ATTENTION_FROM = 4
"""Halvings from which a level has self-attention, too ("kl", "vq"); with as many the channels grow half as fast."""

GROUPS, PAPER_WIDTH, CHANNELS_A_GROUP = 32, 128, 16
"""Groups of a normalisation from the paper's width on, and channels in each below it: a group of few channels forgets
how bright and how colourful a picture is, and a narrow network takes long to say it in another way."""


def widths_of(kind: Kind, width: int, factor: int) -> tuple[int, ...]:
    """Channels of the levels from the finest to the coarsest; one level more than there are halvings.

    >>> widths_of("kl", 128, 8), widths_of("kl", 128, 16), widths_of("tiny", 64, 4)
    ((128, 256, 512, 512), (128, 128, 256, 256, 512), (64, 64, 64))
    """
    levels = factor.bit_length()
    slower = 2 if levels > ATTENTION_FROM else 1
    return tuple(width if kind == "tiny" else width * min(2 ** (n // slower), WIDEST) for n in range(levels))


def build(
    kind: Kind,
    image_shape: tuple[int, int, int],
    widths: Sequence[int],
    *,
    latent_channels: int = 4,
    blocks: int = 2,
    num_codes: int = 0,
) -> Any:
    """A network of diffusers, freshly initialised from torch's global generator.

    image_shape: (C, H, W); the sides are to be multiples of 2 ** (len(widths) - 1). blocks: residual blocks a level of
    the encoder; the decoder has one more ("kl", "vq"), or as many, and one at the finest level ("tiny").
    num_codes: K of "vq"; the network itself then has no `quantize`.

    Raises UsageError when diffusers is not installed.

    >>> network = build("kl", (3, 16, 16), (8, 16), blocks=1)
    >>> moments(network, torch.zeros(2, 3, 16, 16))[0].shape
    torch.Size([2, 4, 8, 8])
    """
    channels, rows, columns = image_shape
    settings: dict[str, Any] = {
        "in_channels": channels,
        "out_channels": channels,
        "latent_channels": latent_channels,
    }
    if kind == "tiny":
        counts = (1, *[blocks] * (len(widths) - 1))
        settings |= {
            "encoder_block_out_channels": tuple(widths),
            "decoder_block_out_channels": tuple(reversed(widths)),
            "num_encoder_blocks": counts,
            "num_decoder_blocks": counts[::-1],
        }
        return diffusers().AutoencoderTiny(**settings)
    attends = ["Attn" if level >= ATTENTION_FROM else "" for level in range(len(widths))]
    settings |= {
        "down_block_types": tuple(f"{prefix}DownEncoderBlock2D" for prefix in attends),
        "up_block_types": tuple(f"{prefix}UpDecoderBlock2D" for prefix in reversed(attends)),
        "block_out_channels": tuple(widths),
        "layers_per_block": blocks,
        "norm_num_groups": _groups(widths[0]),
        "sample_size": max(rows, columns),
    }
    if kind == "vq":
        settings |= {"num_vq_embeddings": num_codes, "vq_embed_dim": latent_channels}
        network = diffusers().VQModel(**settings)
        del network.quantize
    else:
        network = diffusers().AutoencoderKL(**settings)
    _speed_up(network)
    return network


def moments(network: Any, images_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
    """(mean_BZhw, logvar_BZhw) float32 of pictures in [-1, 1]; no log-variance where the encoder says none."""
    if prefers_channels_last(images_BCHW):
        images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
    z, conv = network.encoder(images_BCHW), getattr(network, "quant_conv", None)
    z = (z if conv is None else conv(z)).float()
    if "use_quant_conv" not in network.config:  # AutoencoderTiny and VQModel
        return z, None
    mean, logvar = z.chunk(2, dim=1)
    return mean, logvar.clamp(*LOGVAR_RANGE)


def pictures(network: Any, latents_BZhw: Tensor) -> Tensor:
    """images_BCHW float32 of latents, about in [-1, 1]; of codes for "vq"."""
    if prefers_channels_last(latents_BZhw):
        latents_BZhw = latents_BZhw.contiguous(memory_format=torch.channels_last)
    if getattr(network, "post_quant_conv", None) is not None:
        latents_BZhw = network.post_quant_conv(latents_BZhw)
    return network.decoder(latents_BZhw).float()


def last_layer(network: Any) -> nn.Parameter:
    """Weight of the convolution that makes the picture."""
    decoder = network.decoder
    return (decoder.conv_out if hasattr(decoder, "conv_out") else decoder.layers[-1]).weight


def diffusers_state_dict(
    network: Any, codes_KZ: Tensor | None = None, moments: LatentMoments | None = None
) -> dict[str, Tensor]:
    """The weights under the keys of the network's class; `VQModel` holds its codes too, so they are given here.

    moments: of latents that are standardised behind the encoder; its last convolution then does so itself.
    """
    tensors = dict(network.state_dict())
    if codes_KZ is not None:
        tensors["quantize.embedding.weight"] = codes_KZ.detach()
    if moments is not None:
        last = "quant_conv" if hasattr(network, "quant_conv") else f"encoder.layers.{len(network.encoder.layers) - 1}"
        weight, bias = (tensors[f"{last}.{name}"].clone() for name in ("weight", "bias"))
        rows = slice(len(moments.mean))  # a log-variance behind them is that of standardised latents already
        scale_Z = _scale(moments.mean, moments.square)
        weight[rows] *= scale_Z[:, None, None, None]
        bias[rows] = (bias[rows] - moments.mean) * scale_Z
        tensors |= {f"{last}.weight": weight, f"{last}.bias": bias}
    return tensors


def _groups(width: int) -> int:
    return math.gcd(width, GROUPS if width >= PAPER_WIDTH else max(1, width // CHANNELS_A_GROUP))


def moments_of(latents_BZhw: Tensor) -> tuple[Tensor, Tensor]:
    """(mean_Z, square_Z): mean and mean square of every channel."""
    return latents_BZhw.mean((0, 2, 3)), latents_BZhw.square().mean((0, 2, 3))


def standardised(latents_BZhw: Tensor, mean_Z: Tensor, square_Z: Tensor) -> Tensor:
    """Latents with channels of mean 0 and standard deviation 1, if these are their mean and mean square.

    >>> standardised(torch.tensor([[[[1.0, 3.0]]]]), torch.tensor([2.0]), torch.tensor([5.0])).flatten().tolist()
    [-0.9999949932098389, 0.9999949932098389]
    """
    return (latents_BZhw - mean_Z[:, None, None]) * _scale(mean_Z, square_Z)[:, None, None]


def _scale(mean_Z: Tensor, square_Z: Tensor) -> Tensor:
    return torch.rsqrt((square_Z - mean_Z.square()).clamp(min=0) + SMALLEST_VARIANCE)


class LatentMoments(nn.Module):
    """Moving averages of the latents' mean and square, channel by channel. Seeing only notes; `update` applies it, once
    a step, so that a step computed in parts teaches the same.

    channels: Z. decay: of the averages, which start as the first batch's; before it they are 0 and 1.

    >>> moments = LatentMoments(1, decay=0.5)
    >>> for value in (4.0, 6.0):
    ...     moments.see(torch.full((2, 1, 3, 3), value))
    ...     moments.update()
    >>> moments.mean.tolist(), moments.spread(torch.ones(1, 1, 1, 1)).item()
    ([5.0], 6.0)
    """

    mean: Tensor
    square: Tensor
    started: Tensor

    def __init__(self, channels: int, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("square", torch.ones(channels))
        self.register_buffer("started", torch.tensor(False))
        self._seen: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def see(self, latents_BZhw: Tensor) -> None:
        """Note the latents of a batch."""
        self._seen.append(moments_of(latents_BZhw.detach()))

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages by what was seen since the last time; what is not finite teaches nothing."""
        if not self._seen:
            return
        fresh = [torch.stack(values).mean(0) for values in zip(*self._seen, strict=True)]
        self._seen = []
        finite = torch.stack(fresh).isfinite().all()
        share = torch.where(self.started, 1 - self.decay, 1.0)
        for average, value in zip((self.mean, self.square), fresh, strict=True):
            average.lerp_(torch.where(finite, value, average), share.to(average))
        self.started.logical_or_(finite)

    def spread(self, noise_BZhw: Tensor) -> Tensor:
        """Standard normal noise brought to the latents' mean and standard deviation."""
        std = (self.square - self.mean.square()).clamp(min=0).sqrt()
        return noise_BZhw * std[:, None, None] + self.mean[:, None, None]


# -- speed ------------------------------------------------------------------------------------------------------------


class _NormSilu(nn.GroupNorm):
    """Group normalisation and SiLU in one pass; takes the place of a norm whose block then has no activation."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return group_norm_silu(x_BCHW, self)


class _Shortcut(nn.Conv2d):
    """The 1x1 convolution of a shortcut, which diffusers feeds with the channels first: back to last."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if prefers_channels_last(x_BCHW):
            x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
        return super().forward(x_BCHW)


def _speed_up(network: nn.Module) -> None:
    """Fuse every normalisation with the SiLU behind it. Parameters, their names and the result stay the same."""
    for module in list(network.modules()):
        kind = type(module).__name__
        if kind == "ResnetBlock2D":
            norms, activation = [module.norm1, module.norm2], "nonlinearity"
            if module.conv_shortcut is not None:
                module.conv_shortcut.__class__ = _Shortcut
        elif kind in ("Encoder", "Decoder"):
            norms, activation = [module.conv_norm_out], "conv_act"
        else:
            continue
        setattr(module, activation, nn.Identity())
        for norm in norms:
            norm.__class__ = _NormSilu
