"""Denoisers that read text, of the shapes that diffusers and ComfyUI know, built from few settings.

"sd3" is `SD3Transformer2DModel` (Esser et al. 2024, arXiv:2403.03206) of depth d with d heads of 64 numbers: pictures
and words are tokens of one transformer. "unet" is `UNet2DConditionModel` (Rombach et al. 2022, arXiv:2112.10752), a
U-Net whose coarser levels look at the words. Both are the classes of diffusers, so their weights need no conversion.

Shapes: B pictures, C channels, H rows, W columns, L tokens a text, D numbers a token, P numbers of a whole text,
A numbers that tell what was done to a picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from imagekiln.errors import RecipeError
from imagekiln.nets.clip_text import Encoded
from imagekiln.nets.layers import attention
from imagekiln.nets.libraries import diffusers

HEAD = 64
SECOND = 8
"""Width that an empty second text encoder has, which the pipeline of Stable Diffusion 3 expects; see `Transformer`."""


WIDER = 2
"""Sides that the transformer has places for, in sides of its own pictures; the shapes of `data.buckets` reach 1.6."""


class Places(nn.Module):
    """`PatchEmbed` of diffusers, under the same names, for pictures of other shapes too.

    As in Stable Diffusion 3 places are cut from the middle of a larger table (diffusers' `cropped_pos_embed`). Here its
    middle is the table of the network's own pictures, which it continues on all sides by the same formula, so that it
    need not be kept with the weights.

    stock: of a network for square pictures of `side` patches.
    """

    pos_embed: Tensor
    wide_MMD: Tensor

    def __init__(self, stock: Any, side: int) -> None:
        super().__init__()
        self.proj = stock.proj
        self.register_buffer("pos_embed", stock.pos_embed)
        self.side, self.most = side, WIDER * side
        places_M = torch.arange(self.most, dtype=torch.float32) - (self.most - side) // 2
        grid = torch.stack(torch.meshgrid(places_M, places_M, indexing="xy"))  # columns first, as in diffusers
        embed = diffusers().models.embeddings.get_2d_sincos_pos_embed_from_grid
        wide_MMD = embed(stock.pos_embed.shape[-1], grid, output_type="pt").float().unflatten(0, (self.most, -1))
        self.register_buffer("wide_MMD", wide_MMD, persistent=False)

    def forward(self, z_BCHW: Tensor) -> Tensor:
        patches_BDHW = self.proj(z_BCHW)
        patches_BLD = patches_BDHW.flatten(2).transpose(1, 2)
        return (patches_BLD + self._of(*patches_BDHW.shape[2:])).to(patches_BLD.dtype)

    def _of(self, rows: int, columns: int) -> Tensor:
        """The places of so many patches: (1, rows columns, D)."""
        if rows == columns == self.side:
            return self.pos_embed
        top, left = (self.most - rows) // 2, (self.most - columns) // 2
        return self.wide_MMD[top : top + rows, left : left + columns].flatten(0, 1)[None]


class Transformer(nn.Module):
    """`SD3Transformer2DModel` behind one text encoder.

    Words are the encoder's state before its last layer, and the whole text its pooled answer, as in Stable Diffusion 3;
    both are filled up with zeros where the network expects the second encoder of that model.

    depth: layers, heads, and width over 64. text_width, whole_width: numbers a token of the encoder, and a whole text.
    num_augment: numbers that tell what was done to a training picture, which are added to the whole text; 0 for a
    network that is not told.
    """

    def __init__(
        self, shape: tuple[int, int, int], depth: int, text_width: int, whole_width: int, num_augment: int = 0
    ) -> None:
        super().__init__()
        channels, rows, columns = shape
        if rows != columns or rows % 2:
            raise RecipeError(
                f"family.denoiser = 'sd3': it takes square pictures or latents of an even size, not {rows}x{columns}."
            )
        self.net = diffusers().SD3Transformer2DModel(
            sample_size=rows,
            patch_size=2,
            in_channels=channels,
            out_channels=channels,
            num_layers=depth,
            num_attention_heads=depth,
            attention_head_dim=HEAD,
            caption_projection_dim=HEAD * depth,
            joint_attention_dim=text_width + SECOND,
            pooled_projection_dim=whole_width + SECOND,
            pos_embed_max_size=rows // 2,
        )
        self.net.pos_embed = Places(self.net.pos_embed, rows // 2)
        hasten(self.net)
        self._initialise()
        if num_augment:
            self.augment_embedding = nn.Linear(num_augment, whole_width, bias=False)

    def _initialise(self) -> None:
        """As in DiT (Peebles & Xie 2023, arXiv:2212.09748, section 3.2): every block begins as the identity, because
        the scales of its normalisations and its gates are zero, and the answer begins at zero."""
        for name, module in self.net.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
                if ".norm" in f".{name}" or name == "proj_out":
                    nn.init.zeros_(module.weight)
        for module in (self.net.time_text_embed.timestep_embedder, self.net.time_text_embed.text_embedder):
            nn.init.normal_(module.linear_1.weight, std=0.02)
            nn.init.normal_(module.linear_2.weight, std=0.02)

    def forward(self, z_BCHW: Tensor, time_B: Tensor, text: Encoded, augment_BA: Tensor | None = None) -> Tensor:
        """What the network answers, of the shape of z. time_B: in [0, 1000]. augment_BA: None = nothing was done."""
        words = nn.functional.pad(text.before_BLW, (0, SECOND))
        pooled_BP = text.pooled_BP if augment_BA is None else text.pooled_BP + self.augment_embedding(augment_BA)
        whole = nn.functional.pad(pooled_BP, (0, SECOND))
        said = self.net(z_BCHW, encoder_hidden_states=words, pooled_projections=whole, timestep=time_B)
        answer: Tensor = said.sample
        return answer

    def fits(self, rows: int, columns: int) -> bool:
        """Whether it has places for pictures of so many rows and columns."""
        return rows % 2 == columns % 2 == 0 and max(rows, columns) <= 2 * self.net.pos_embed.most

    def wide(self) -> Any:
        """A copy as a network of diffusers alone that keeps the places of all shapes, and cuts them out itself."""
        places = self.net.pos_embed
        net = type(self.net).from_config(dict(self.net.config) | {"pos_embed_max_size": places.most})
        net.load_state_dict(self.net.state_dict() | {"pos_embed.pos_embed": places.wide_MMD.flatten(0, 1)[None]})
        return net.to(places.pos_embed.device).eval()

    @property
    def map_widths(self) -> list[int]:
        """Channels of `maps`."""
        return [HEAD * len(self.net.transformer_blocks)] * len(self.net.transformer_blocks)

    def maps(self, z_BCHW: Tensor, time_B: Tensor, text: Encoded) -> list[Tensor]:
        """What every layer sees in pictures: (B, patches, D) each."""
        return _heard(self.net.transformer_blocks, 1, lambda: self(z_BCHW, time_B, text))


class _JointAttention:
    """What diffusers' `JointAttnProcessor2_0` computes for plain layers, faster on the CPU."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: None = None
    ) -> Any:
        parts = [_projected(attn, (attn.to_q, attn.to_k, attn.to_v), hidden_states)]
        if encoder_hidden_states is not None:
            layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            parts.append(_projected(attn, layers, encoder_hidden_states))
        q, k, v = (torch.cat(each, dim=2) for each in zip(*parts, strict=True))
        seen_BLD = attention(q, k, v).transpose(1, 2).flatten(2)
        pixels_BLD, words_BLD = seen_BLD.split([hidden_states.shape[1], seen_BLD.shape[1] - hidden_states.shape[1]], 1)
        answer = attn.to_out[0](pixels_BLD)
        if encoder_hidden_states is None:
            return answer
        return answer, words_BLD if attn.context_pre_only else attn.to_add_out(words_BLD)


class _CrossAttention:
    """What diffusers' `AttnProcessor2_0` computes for plain layers, which look at words or at themselves."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: None = None
    ) -> Tensor:
        seen = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        (q,), (k, v) = _projected(attn, (attn.to_q,), hidden_states), _projected(attn, (attn.to_k, attn.to_v), seen)
        answer: Tensor = attn.to_out[1](attn.to_out[0](attention(q, k, v).transpose(1, 2).flatten(2)))
        return answer


def _projected(attn: Any, layers: Sequence[nn.Module], x_BLD: Tensor) -> list[Tensor]:
    """What these layers make of x, divided among the heads: (B, heads, L, D / heads)."""
    return [layer(x_BLD).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for layer in layers]


def hasten(net: nn.Module) -> None:
    """Let a network of diffusers compute attention as `imagekiln.nets.layers.attention` does, wherever it is plain:
    without masks, normalised queries and keys, or shared heads."""
    for layer in net.modules():
        if isinstance(layer, diffusers().models.attention_processor.Attention) and _is_plain(layer):
            layer.set_processor(_CrossAttention() if layer.add_k_proj is None else _JointAttention())


def _is_plain(layer: Any) -> bool:
    extras = ("spatial_norm", "group_norm", "norm_cross", "norm_q", "norm_k", "norm_added_q", "norm_added_k")
    if any(getattr(layer, name, None) is not None for name in extras) or layer.residual_connection:
        return False
    return layer.rescale_output_factor == 1 and layer.to_q.out_features == layer.to_k.out_features


class ConditionedUnet(nn.Module):
    """`UNet2DConditionModel`; the finest level does not look at the words.

    widths: channels by level, fine to coarse. num_augment: as for `Transformer`; they are added to every word.
    """

    def __init__(
        self, shape: tuple[int, int, int], widths: Sequence[int], text_width: int, num_augment: int = 0
    ) -> None:
        super().__init__()
        channels, rows, columns = shape
        halvings = 2 ** (len(widths) - 1)
        if rows % halvings or columns % halvings or any(width % 32 for width in widths):
            raise RecipeError(
                f"family.widths = {list(widths)}: expected multiples of 32, and {rows}x{columns} to be divisible by "
                f"{halvings}."
            )
        looking = [level > 0 for level in range(len(widths))]
        self.net = diffusers().UNet2DConditionModel(
            sample_size=rows,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=tuple(widths),
            down_block_types=tuple("CrossAttnDownBlock2D" if look else "DownBlock2D" for look in looking),
            up_block_types=tuple("CrossAttnUpBlock2D" if look else "UpBlock2D" for look in reversed(looking)),
            layers_per_block=1,
            cross_attention_dim=text_width,
            attention_head_dim=8,  # heads, by an old mistake in this class
        )
        hasten(self.net)
        if num_augment:
            self.augment_embedding = nn.Linear(num_augment, text_width, bias=False)

    def forward(self, z_BCHW: Tensor, time_B: Tensor, text: Encoded, augment_BA: Tensor | None = None) -> Tensor:
        """What the network answers, of the shape of z. time_B: in [0, 1000]. augment_BA: None = nothing was done."""
        words_BLW = text.last_BLW
        if augment_BA is not None:
            words_BLW = words_BLW + self.augment_embedding(augment_BA)[:, None]
        answer: Tensor = self.net(z_BCHW, time_B, encoder_hidden_states=words_BLW).sample
        return answer

    def fits(self, rows: int, columns: int) -> bool:
        """Whether it takes pictures of so many rows and columns: of any."""
        return True

    @property
    def map_widths(self) -> list[int]:
        """Channels of `maps`."""
        widths = list(self.net.config.block_out_channels)
        return [*widths, widths[-1]]

    def maps(self, z_BCHW: Tensor, time_B: Tensor, text: Encoded) -> list[Tensor]:
        """What the way down and the middle see in pictures: (B, D, rows, columns) each."""
        return _heard([*self.net.down_blocks, self.net.mid_block], 0, lambda: self(z_BCHW, time_B, text))


def _heard(modules: Iterable[nn.Module], place: int, call: Callable[[], Any]) -> list[Tensor]:
    """What these modules answer during a call; of an answer with several parts the one at `place`."""
    found: list[Tensor] = []

    def note(module: nn.Module, given: Any, answer: Any) -> None:
        found.append(answer[place] if isinstance(answer, tuple) else answer)

    hooks = [module.register_forward_hook(note) for module in modules]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def denoiser(
    kind: str,
    shape: tuple[int, int, int],
    depth: int,
    widths: Sequence[int],
    text_width: int,
    whole_width: int | None = None,
    num_augment: int = 0,
) -> Transformer | ConditionedUnet:
    """A denoiser for pictures or latents of this shape (channels, rows, columns).

    text_width, whole_width: numbers a token, and of a whole text; None = as many.

    >>> net = denoiser("sd3", (4, 8, 8), depth=1, widths=(), text_width=32)
    >>> text = Encoded(torch.zeros(2, 5, 32), torch.zeros(2, 5, 32), torch.zeros(2, 32))
    >>> net(torch.zeros(2, 4, 8, 8), torch.tensor([10.0, 900.0]), text).shape
    torch.Size([2, 4, 8, 8])
    """
    if kind == "sd3":
        return Transformer(shape, depth, text_width, text_width if whole_width is None else whole_width, num_augment)
    return ConditionedUnet(shape, widths, text_width, num_augment)
