"""Small judges on the maps of a frozen network: of every place of every map whether it comes of a real picture.

The discriminator of Sauer et al. 2024 (arXiv:2403.12015, section 3): maps are those of a denoiser that looks at
pictures under noise, and only these heads learn. What differs: a head is two layers at every place, without a
convolution over places and without a condition, because the maps hear noise level, label and words.

Shapes: B pictures, D channels, L places.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class FeatureHeads(nn.Module):
    """logits_BL of each of a network's maps, positive for real.

    widths: channels D of each map. A map is (B, L, D), as of a transformer, or (B, D, rows, columns).

    >>> import torch
    >>> heads = FeatureHeads([8, 16])
    >>> [logits_BL.shape for logits_BL in heads([torch.zeros(2, 5, 8), torch.zeros(2, 16, 3, 3)])]
    [torch.Size([2, 5]), torch.Size([2, 9])]
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width, elementwise_affine=False), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
            )
            for width in widths
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """A map each: losses are meant to be means over the maps of means over the places."""
        logits = []
        for head, one in zip(self.heads, maps, strict=True):
            places_BLD = one if one.ndim == 3 else one.flatten(2).transpose(1, 2)
            logits.append(head(places_BLD.float())[..., 0])
        return logits
