"""Prior over grids of codes: a small causal transformer, one code after the other.

p(c | label) = prod_i p(c_i | c_<i, label), read row by row, with the layers of GPT-2 (Radford et al. 2019): layer norm
before attention and before a GELU network of four times the width, learned positions. Drawing is the inverse of the
distribution function, one uniform number a code, so that the grid is a function of its noise.

Shapes: B pictures, L codes of a picture, T of them at a time, K kinds of codes, E width, N heads, D dimensions a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from imagekiln.nets.labels import LabelEmbedding

HEAD_WIDTH = 32

Past = tuple[Tensor, Tensor]
"""Keys and values of the codes so far, each (B, N, T, D)."""


class TokenPrior(nn.Module):
    """Probabilities of every code given those before it.

    num_codes: K. length: L. width: E, a multiple of `HEAD_WIDTH` or below it. num_classes: 0 for a prior without
    labels.

    >>> prior = TokenPrior(num_codes=5, length=6, width=8, layers=1)
    >>> prior(torch.zeros(2, 6, dtype=torch.int64)).shape
    torch.Size([2, 6, 5])
    >>> prior.draw(torch.randn(2, 6)).shape
    torch.Size([2, 6])
    """

    def __init__(self, num_codes: int, length: int, width: int = 128, layers: int = 3, num_classes: int = 0) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(width) * 0.02)
        self.labels = LabelEmbedding(num_classes, width) if num_classes else None
        self.tokens = nn.Embedding(num_codes, width)
        self.positions = nn.Parameter(torch.randn(length, width) * 0.02)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_codes)
        for table in (self.tokens, *([] if self.labels is None else [self.labels.table])):
            nn.init.normal_(table.weight, 0.0, 0.02)
        nn.init.zeros_(self.head.weight)  # every code alike at first
        nn.init.zeros_(self.head.bias)

    def forward(self, index_BL: Tensor, labels_B: Tensor | None = None) -> Tensor:
        """logits_BLK, float32: those at i depend on index[:, :i]. labels_B: int64, -1 or None = anything."""
        x_BLE = torch.cat([self._first(len(index_BL), labels_B), self.tokens(index_BL[:, :-1])], dim=1)
        x_BLE = x_BLE + self.positions
        for block in self.blocks:
            x_BLE, _ = block(x_BLE, None)
        return self.head(self.norm(x_BLE)).float()

    @torch.no_grad()
    def draw(self, noise_BL: Tensor, labels_B: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        """index_BL of standard normal noise_BL: code i is where the distribution function reaches F(noise_i).

        temperature: below 1 likely codes become likelier; above 0.
        """
        pasts: list[Past | None] = [None] * len(self.blocks)
        token_B1E = self._first(len(noise_BL), labels_B)
        drawn: list[Tensor] = []
        for position, level_B in enumerate(torch.special.ndtr(noise_BL.float()).unbind(1)):
            x_B1E = token_B1E + self.positions[position]
            for layer, block in enumerate(self.blocks):
                x_B1E, pasts[layer] = block(x_B1E, pasts[layer])
            logits_BK = self.head(self.norm(x_B1E)).float()[:, 0]
            reached_BK = torch.softmax(logits_BK / temperature, dim=1).cumsum(1)
            index_B = (reached_BK < level_B[:, None] * reached_BK[:, -1:]).sum(1)
            drawn.append(index_B)
            token_B1E = self.tokens(index_B)[:, None]
        return torch.stack(drawn, dim=1)

    def _first(self, count: int, labels_B: Tensor | None) -> Tensor:
        first_BE = self.start.expand(count, -1)
        if self.labels is not None:
            first_BE = first_BE + self.labels(labels_B, count)
        return first_BE[:, None]


class _Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); knows the past when it is given one code at a time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // HEAD_WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BTE: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        qkv_BTNX = self.qkv(self.norm1(x_BTE)).unflatten(2, (self.heads, -1))
        q_BNTD, k_BNTD, v_BNTD = qkv_BTNX.transpose(1, 2).chunk(3, dim=-1)
        if past is not None:
            k_BNTD, v_BNTD = torch.cat([past[0], k_BNTD], dim=2), torch.cat([past[1], v_BNTD], dim=2)
        seen_BNTD = scaled_dot_product_attention(q_BNTD, k_BNTD, v_BNTD, is_causal=past is None)
        x_BTE = x_BTE + self.out(seen_BNTD.transpose(1, 2).flatten(2))
        return x_BTE + self.down(gelu(self.up(self.norm2(x_BTE)))), (k_BNTD, v_BNTD)
