"""A pixel U-Net whose weights and config are those of diffusers' `UNet2DModel`.

Residual blocks with a time embedding and self-attention at chosen levels (Ho et al. 2020, arXiv:2006.11239; Dhariwal &
Nichol 2021, arXiv:2105.05233). `state_dict()` has the keys and shapes of `UNet2DModel`, and `diffusers_config()` is its
`config.json`, so exporting is writing two files. What differs is the start (the last layer of every residual branch is
zero, as in ADM, so the net starts as the identity plumbing) and the speed: on the CPU the activations are channels-last
and normalisation, modulation and SiLU are one pass.

Shapes: B images, C channels, H rows, W columns, L = H*W tokens, N heads, D channels a head, E width of the embedding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagekiln.errors import UsageError
from imagekiln.nets.layers import attention, group_norm_silu, prefers_channels_last, upsample_nearest


@dataclass(frozen=True)
class UNetConfig:
    """What a `UNet` is made of.

    Attributes:
        sample_size: Height and width in pixels the net is meant for; other sizes work too.
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        block_out_channels: Channels of each level, from the finest to the coarsest; each level halves the size.
        layers_per_block: Residual blocks of each level on the way down; one more on the way up.
        attention: Whether each level has self-attention after every residual block.
        add_attention: Whether the middle has self-attention.
        attention_head_dim: Channels of an attention head. Below 32 attention dominates the time of a step on the CPU.
        norm_num_groups: Groups of every normalisation; must divide all channel counts.
        resnet_time_scale_shift: How a residual block hears the time: "default" adds it before the second
            normalisation, "scale_shift" scales and shifts after it.
        dropout: Probability of dropping an activation inside a residual block.
        num_class_embeds: Rows of the class embedding; None for a net without labels.
        num_augment: Numbers that tell what was done to a training picture; 0 for a net that is not told.

    Raises:
        UsageError: The numbers do not fit together.
    """

    sample_size: int = 32
    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (64, 128, 256)
    layers_per_block: int = 2
    attention: tuple[bool, ...] = (False, True, True)
    add_attention: bool = True
    attention_head_dim: int = 64
    norm_num_groups: int = 32
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    dropout: float = 0.0
    num_class_embeds: int | None = None
    num_augment: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_out_channels", tuple(self.block_out_channels))
        object.__setattr__(self, "attention", tuple(bool(has) for has in self.attention))
        levels = len(self.block_out_channels)
        if levels == 0 or len(self.attention) != levels:
            raise UsageError(
                f"attention has {len(self.attention)} entries and block_out_channels has {levels}: "
                "give one entry for each level, and at least one level."
            )
        if self.layers_per_block < 1:
            raise UsageError(f"layers_per_block = {self.layers_per_block}: expected at least 1.")
        for channels in self.block_out_channels:
            if channels < 2 or channels % self.norm_num_groups:
                raise UsageError(
                    f"block_out_channels = {self.block_out_channels}: every entry must be a multiple of "
                    f"norm_num_groups = {self.norm_num_groups}."
                )
        attended = [channels for channels, has in zip(self.block_out_channels, self.attention, strict=True) if has]
        for channels in attended + [self.block_out_channels[-1]] * self.add_attention:
            if channels % self.attention_head_dim:
                raise UsageError(
                    f"attention_head_dim = {self.attention_head_dim} does not divide a level of {channels} channels "
                    "that has attention. Choose a divisor of all of them."
                )
        if self.resnet_time_scale_shift not in ("default", "scale_shift"):
            raise UsageError(
                f'resnet_time_scale_shift = {self.resnet_time_scale_shift!r}: expected "default" or "scale_shift".'
            )

    @property
    def embedding_dim(self) -> int:
        """Width E of the time and class embedding."""
        return 4 * self.block_out_channels[0]


class UNet(nn.Module):
    """Maps noisy pictures, times and labels to a prediction of the pictures' shape.

    >>> net = UNet(UNetConfig(sample_size=8, block_out_channels=(8, 16), attention=(False, True),
    ...                       attention_head_dim=8, norm_num_groups=4, num_class_embeds=10))
    >>> net(torch.zeros(2, 3, 8, 8), torch.tensor([0.0, 500.0]), torch.tensor([1, 9])).shape
    torch.Size([2, 3, 8, 8])
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = _TimeEmbedding(widths[0], config.embedding_dim)
        if config.num_class_embeds is not None:
            self.class_embedding = nn.Embedding(config.num_class_embeds, config.embedding_dim)
        if config.num_augment:
            self.augment_embedding = nn.Linear(config.num_augment, config.embedding_dim, bias=False)
        self.down_blocks = nn.ModuleList()
        skips = [widths[0]]
        for level, width in enumerate(widths):
            inputs = [skips[-1]] + [width] * (config.layers_per_block - 1)
            halves = level < len(widths) - 1
            self.down_blocks.append(_DownLevel(config, inputs, width, config.attention[level], halves))
            skips += [width] * (config.layers_per_block + halves)
        self.mid_block = _Middle(config, widths[-1], config.add_attention)
        self.up_blocks = nn.ModuleList()
        below = widths[-1]
        for level in reversed(range(len(widths))):
            inputs = []
            for _ in range(config.layers_per_block + 1):
                inputs.append(below + skips.pop())
                below = widths[level]
            self.up_blocks.append(_UpLevel(config, inputs, widths[level], config.attention[level], level > 0))
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=1e-5)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights, zero biases, and zero at the end of every residual branch and of the net (ADM)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.3)  # about the size of the time embedding it is added to
        for module in self.modules():
            if isinstance(module, _ResidualBlock):
                nn.init.zeros_(module.conv2.weight)
            elif isinstance(module, _SelfAttention):
                nn.init.zeros_(module.to_out[0].get_parameter("weight"))
        nn.init.zeros_(self.conv_out.weight)

    def forward(
        self,
        images_BCHW: Tensor,
        timestep_B: Tensor,
        class_labels_B: Tensor | None = None,
        augment_BA: Tensor | None = None,
    ) -> Tensor:
        """Predict; float32 in and out, computed in the precision of the surrounding autocast.

        Args:
            images_BCHW: Noisy pictures.
            timestep_B: Time of each picture, any float; diffusers' convention is 0 to 1000.
            class_labels_B: int64 rows of the class embedding; exactly when the config has `num_class_embeds`.
            augment_BA: What was done to the pictures, A = `num_augment`; zeros, or None, where nothing was. It goes
                through a linear map without a bias, so zeros add exactly nothing (Karras et al. 2022, appendix F.2).

        Raises:
            UsageError: Labels are missing, or given to a net without labels; likewise what was done to the pictures.
        """
        if (class_labels_B is None) != (self.config.num_class_embeds is None):
            given = "no labels were given" if class_labels_B is None else "labels were given"
            raise UsageError(f"num_class_embeds = {self.config.num_class_embeds}, but {given} to the U-Net.")
        if augment_BA is not None and augment_BA.shape[1] != self.config.num_augment:
            raise UsageError(
                f"num_augment = {self.config.num_augment}, but {augment_BA.shape[1]} numbers a picture were given."
            )
        embedding_BE = self._embedding(timestep_B, class_labels_B, augment_BA)
        x_BCHW, skips = self._begun(images_BCHW)
        for block in self.down_blocks:
            x_BCHW = block(x_BCHW, embedding_BE, skips)
        x_BCHW = self.mid_block(x_BCHW, embedding_BE)
        for block in self.up_blocks:
            x_BCHW = block(x_BCHW, embedding_BE, skips)
        return self.conv_out(group_norm_silu(x_BCHW, self.conv_norm_out)).to(images_BCHW.dtype)

    @property
    def map_widths(self) -> list[int]:
        """Channels of `maps`."""
        return [*self.config.block_out_channels, self.config.block_out_channels[-1]]

    def maps(self, images_BCHW: Tensor, timestep_B: Tensor, class_labels_B: Tensor | None = None) -> list[Tensor]:
        """What the way down and the middle see in pictures, maps (B, D, rows, columns); cheaper than an answer."""
        embedding_BE = self._embedding(timestep_B, class_labels_B, None)
        x_BCHW, skips = self._begun(images_BCHW)
        found = []
        for block in self.down_blocks:
            x_BCHW = block(x_BCHW, embedding_BE, skips)
            found.append(x_BCHW)
        return [*found, self.mid_block(x_BCHW, embedding_BE)]

    def _embedding(self, timestep_B: Tensor, class_labels_B: Tensor | None, augment_BA: Tensor | None) -> Tensor:
        """What every residual block hears."""
        embedding_BE = self.time_embedding(_sinusoids(timestep_B, self.config.block_out_channels[0]))
        if class_labels_B is not None:
            embedding_BE = embedding_BE + self.class_embedding(class_labels_B)
        if augment_BA is not None:
            embedding_BE = embedding_BE + self.augment_embedding(augment_BA)
        return F.silu(embedding_BE)

    def _begun(self, images_BCHW: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The first layer's answer, which is also the first skip."""
        if prefers_channels_last(images_BCHW):
            images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
        x_BCHW = self.conv_in(images_BCHW)
        return x_BCHW, [x_BCHW]

    def diffusers_state_dict(self) -> dict[str, Tensor]:
        """The weights that `UNet2DModel` has: the map that hears what was done, which drawing does not use, stays out.

        >>> net = UNet(UNetConfig(block_out_channels=(8,), attention=(False,), add_attention=False, norm_num_groups=4,
        ...                       num_augment=2))
        >>> set(net.state_dict()) - set(net.diffusers_state_dict())
        {'augment_embedding.weight'}
        """
        return {key: value for key, value in self.state_dict().items() if not key.startswith("augment_embedding.")}

    def diffusers_config(self) -> dict[str, Any]:
        """The `config.json` with which diffusers' `UNet2DModel` loads `diffusers_state_dict()` strictly."""
        config, has = self.config, self.config.attention
        return {
            "_class_name": "UNet2DModel",
            "sample_size": config.sample_size,
            "in_channels": config.in_channels,
            "out_channels": config.out_channels,
            "center_input_sample": False,
            "time_embedding_type": "positional",
            "freq_shift": 0,
            "flip_sin_to_cos": True,
            "down_block_types": ["AttnDownBlock2D" if attended else "DownBlock2D" for attended in has],
            "mid_block_type": "UNetMidBlock2D",
            "up_block_types": ["AttnUpBlock2D" if attended else "UpBlock2D" for attended in reversed(has)],
            "block_out_channels": list(config.block_out_channels),
            "layers_per_block": config.layers_per_block,
            "mid_block_scale_factor": 1,
            "downsample_padding": 1,
            "downsample_type": "conv",
            "upsample_type": "conv",
            "dropout": config.dropout,
            "act_fn": "silu",
            "attention_head_dim": config.attention_head_dim,
            "norm_num_groups": config.norm_num_groups,
            "attn_norm_num_groups": config.norm_num_groups,
            "norm_eps": 1e-5,
            "resnet_time_scale_shift": config.resnet_time_scale_shift,
            "add_attention": config.add_attention,
            "class_embed_type": None,
            "num_class_embeds": config.num_class_embeds,
        }


class _Level(nn.Module):
    """The residual blocks of one resolution and, where `attended`, the attention that follows them."""

    def __init__(self, config: UNetConfig, inputs: list[int], width: int, attended: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(_ResidualBlock(config, channels, width) for channels in inputs)
        if attended:
            self.attentions = nn.ModuleList(_SelfAttention(config, width) for _ in inputs)
        self.attended = attended

    def _block(self, index: int, x_BCHW: Tensor, embedding_BE: Tensor) -> Tensor:
        x_BCHW = self.resnets[index](x_BCHW, embedding_BE)
        return self.attentions[index](x_BCHW) if self.attended else x_BCHW


class _DownLevel(_Level):
    """Leaves every result behind as a skip; halves the size unless it is the coarsest level."""

    def __init__(self, config: UNetConfig, inputs: list[int], width: int, attended: bool, halves: bool) -> None:
        super().__init__(config, inputs, width, attended)
        if halves:
            self.downsamplers = nn.ModuleList([_Conv(width, stride=2)])
        self.halves = halves

    def forward(self, x_BCHW: Tensor, embedding_BE: Tensor, skips: list[Tensor]) -> Tensor:
        for index in range(len(self.resnets)):
            x_BCHW = self._block(index, x_BCHW, embedding_BE)
            skips.append(x_BCHW)
        if self.halves:
            x_BCHW = self.downsamplers[0](x_BCHW)
            skips.append(x_BCHW)
        return x_BCHW


class _Middle(_Level):
    """Two residual blocks with attention between them."""

    def __init__(self, config: UNetConfig, width: int, attended: bool) -> None:
        super().__init__(config, [width], width, attended)
        self.resnets.append(_ResidualBlock(config, width, width))

    def forward(self, x_BCHW: Tensor, embedding_BE: Tensor) -> Tensor:
        return self.resnets[1](self._block(0, x_BCHW, embedding_BE), embedding_BE)


class _UpLevel(_Level):
    """Takes the skips back; doubles the size unless it is the finest level."""

    def __init__(self, config: UNetConfig, inputs: list[int], width: int, attended: bool, doubles: bool) -> None:
        super().__init__(config, inputs, width, attended)
        if doubles:
            self.upsamplers = nn.ModuleList([_Conv(width, stride=1)])
        self.doubles = doubles

    def forward(self, x_BCHW: Tensor, embedding_BE: Tensor, skips: list[Tensor]) -> Tensor:
        for index in range(len(self.resnets)):
            x_BCHW = self._block(index, torch.cat([x_BCHW, skips.pop()], dim=1), embedding_BE)
        if self.doubles:
            # the size of the next skip, because halving an odd size rounds up and doubling does not undo it
            x_BCHW = self.upsamplers[0](upsample_nearest(x_BCHW, skips[-1].shape[-2:]))
        return x_BCHW


class _ResidualBlock(nn.Module):
    """norm, SiLU, conv, time, norm, SiLU, conv, plus the input."""

    def __init__(self, config: UNetConfig, inputs: int, width: int) -> None:
        super().__init__()
        self.scale_shift = config.resnet_time_scale_shift == "scale_shift"
        self.norm1 = nn.GroupNorm(config.norm_num_groups, inputs, eps=1e-5)
        self.conv1 = nn.Conv2d(inputs, width, 3, padding=1)
        self.time_emb_proj = nn.Linear(config.embedding_dim, width * (2 if self.scale_shift else 1))
        self.norm2 = nn.GroupNorm(config.norm_num_groups, width, eps=1e-5)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        if inputs != width:
            self.conv_shortcut = nn.Conv2d(inputs, width, 1)
        self.projects = inputs != width

    def forward(self, x_BCHW: Tensor, embedding_BE: Tensor) -> Tensor:
        h_BCHW = self.conv1(group_norm_silu(x_BCHW, self.norm1))
        time_BC = self.time_emb_proj(embedding_BE)
        if self.scale_shift:
            scale_BC, shift_BC = time_BC.chunk(2, dim=1)
            h_BCHW = group_norm_silu(h_BCHW, self.norm2, scale_BC=scale_BC, shift_BC=shift_BC)
        else:
            h_BCHW = group_norm_silu(h_BCHW, self.norm2, offset_BC=time_BC)
        h_BCHW = self.conv2(self.dropout(h_BCHW))
        return h_BCHW + (self.conv_shortcut(x_BCHW) if self.projects else x_BCHW)


class _SelfAttention(nn.Module):
    """Multi-head self-attention over the pixels, plus the input."""

    def __init__(self, config: UNetConfig, width: int) -> None:
        super().__init__()
        self.head_dim = config.attention_head_dim
        self.group_norm = nn.GroupNorm(config.norm_num_groups, width, eps=1e-5)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        B, C, H, W = x_BCHW.shape
        h_BCHW = group_norm_silu(x_BCHW, self.group_norm, silu=False)
        tokens_BLC = h_BCHW.permute(0, 2, 3, 1).reshape(B, H * W, C)
        q_BNLD, k_BNLD, v_BNLD = (
            project(tokens_BLC).view(B, H * W, -1, self.head_dim).transpose(1, 2)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        mixed_BNLD = attention(q_BNLD, k_BNLD, v_BNLD)
        out_BLC = self.to_out[0](mixed_BNLD.transpose(1, 2).reshape(B, H * W, C))
        return x_BCHW + out_BLC.view(B, H, W, C).permute(0, 3, 1, 2)


class _TimeEmbedding(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(inputs, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, waves_BC: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(waves_BC)))


class _Conv(nn.Module):
    """A 3x3 convolution under the key `conv`, as diffusers names its resamplers' weights."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=stride, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(x_BCHW)


def _sinusoids(timestep_B: Tensor, width: int) -> Tensor:
    """Cosines then sines of the time at geometric frequencies from 1 to 1/10000: (B, width) float32."""
    half = width // 2
    octaves = torch.arange(half, dtype=torch.float32, device=timestep_B.device)
    angles_BF = timestep_B.float()[:, None] * torch.exp(-math.log(10_000) / half * octaves)
    return F.pad(torch.cat([angles_BF.cos(), angles_BF.sin()], dim=1), (0, width % 2))
