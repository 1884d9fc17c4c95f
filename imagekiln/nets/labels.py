"""Label embeddings in which "anything" is a label too.

Shapes: B pictures, E width of the embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LabelEmbedding(nn.Module):
    """One learned vector a class, and one more, the last row, for pictures without a label (-1).

    >>> embedding = LabelEmbedding(num_classes=3, width=5)
    >>> vectors_BE = embedding(torch.tensor([0, -1]), batch=2)
    >>> vectors_BE.shape, bool((vectors_BE[1] == embedding(None, batch=1)[0]).all())
    (torch.Size([2, 5]), True)
    """

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels_B: Tensor | None, batch: int) -> Tensor:
        """vectors_BE. labels_B: int64 in [-1, num_classes), or None = nobody has a label."""
        if labels_B is None:
            return self.table.weight[-1].expand(batch, -1)
        return self.table(torch.where(labels_B < 0, self.num_classes, labels_B))
