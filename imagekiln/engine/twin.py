"""A family's twin: what draws and is measured while the family itself trains, without memory of its own for weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from imagekiln.core import Family


def twin_of(family: Family) -> Family:
    """A copy in evaluation mode that shares all that is large: weights, companions, codec."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in family.parameters()}
    memo[id(family.companion)] = family.companion
    return copy.deepcopy(family, memo).eval()


@torch.no_grad()
def follow(twin: Family, family: Family, averages: Mapping[str, Tensor]) -> None:
    """Give a twin the family's buffers, the averages' weights, and the family's own where there is no average.

    Weights are given as the very tensors, so the twin is right until the next step.
    """
    values = {**family.state_dict(), **averages}
    for name, own in twin.state_dict(keep_vars=True).items():
        if isinstance(own, nn.Parameter) and own.dtype == values[name].dtype:
            own.data = values[name]
        else:
            own.copy_(values[name])
