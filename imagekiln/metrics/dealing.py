"""A random order of pictures that depends on what they are, not on where they stand.

Subsets of a set must be random, or a folder sorted by class biases them; and the result must not depend on the order
in which the pictures came. Both hold when rows are sorted by a keyed hash of their bytes. Equal rows stand together.

Shapes: N pictures, D features, P parts.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def content_order(features_ND: Tensor, seed: int = 0) -> Tensor:
    """order_N int64: positions of the rows, sorted by blake2b of their float32 bytes under the key `seed`.

    >>> rows = torch.tensor([[1.0], [2.0], [3.0]])
    >>> bool((rows[content_order(rows)] == rows.flip(0)[content_order(rows.flip(0))]).all())
    True
    """
    key = str(seed).encode()
    rows = features_ND.contiguous().numpy()
    keys = [hashlib.blake2b(row.tobytes(), digest_size=16, key=key).digest() for row in rows]
    return torch.tensor(sorted(range(len(keys)), key=keys.__getitem__), dtype=torch.int64)


def content_parts(features_ND: Tensor, parts: int, seed: int = 0) -> Tensor:
    """part_N int64 in [0, parts): every part gets N / parts pictures, give or take one."""
    part_N = torch.empty(len(features_ND), dtype=torch.int64)
    part_N[content_order(features_ND, seed)] = torch.arange(len(features_ND)) % parts
    return part_N
