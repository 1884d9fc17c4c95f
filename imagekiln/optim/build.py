"""Optimizers by name: an `OptimizerConfig` and named parameters become a torch optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from imagekiln.config import OptimizerConfig
from imagekiln.errors import RecipeError, did_you_mean
from imagekiln.optim.adamw_8bit import AdamW8bit
from imagekiln.optim.langevin import langevin

_ADAMS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
NAMES = (*_ADAMS, "adamw_8bit", "sgd", "rmsprop")

_FUSED_DEVICES = {"cpu", "cuda", "mps", "xpu"}
"""Where torch has one kernel for a whole step of Adam, AdamW and SGD."""


def build(
    config: OptimizerConfig, named_parameters: Iterable[tuple[str, Tensor]], num_data: int | None = None
) -> torch.optim.Optimizer:
    """The optimizer of this name over these parameters, with their names kept in its groups.

    Parameters of fewer than two dimensions (biases, gains) are not decayed. One fused kernel does a step where torch
    has it for the device; elsewhere torch chooses: grouped kernels on CUDA, a loop on the CPU, where that is faster.
    With a temperature it is a Langevin diffusion for a set of `num_data` pictures (see `optim.langevin`).
    Raises `RecipeError` for an unknown name, for heat where there can be none, and when there is nothing to train.

    >>> layer = torch.nn.Linear(2, 2)
    >>> optimizer = build(OptimizerConfig(weight_decay=0.1), layer.named_parameters())
    >>> [(group["param_names"], group["weight_decay"]) for group in optimizer.param_groups]
    [(['weight'], 0.1), (['bias'], 0.0)]
    """
    optimizer = _bare(config, list(named_parameters))
    if config.langevin.temperature and config.name == "adamw_8bit":
        raise RecipeError("adamw_8bit with a temperature: what it rounds is more than the noise. Use adamw.")
    if config.langevin.temperature:
        langevin(optimizer, temperature=config.langevin.temperature, num_data=num_data, law=config.langevin.law)
    return optimizer


def _bare(config: OptimizerConfig, parameters: list[tuple[str, Tensor]]) -> torch.optim.Optimizer:
    if not parameters:
        raise RecipeError(f"The optimizer {config.name} was given no parameters: its modules have nothing to train.")
    groups: list[dict[str, Any]] = [
        {"params": [(name, p) for name, p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [(name, p) for name, p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    fusible = all(p.device.type in _FUSED_DEVICES and p.is_floating_point() for _, p in parameters)
    kernels = {"fused": True} if fusible else {}
    if config.name in _ADAMS:
        return _ADAMS[config.name](groups, lr=config.lr, betas=config.betas, eps=config.eps, **kernels)
    if config.name == "adamw_8bit":
        return AdamW8bit(groups, lr=config.lr, betas=config.betas, eps=config.eps)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, **kernels)
    if config.name == "rmsprop":
        return torch.optim.RMSprop(groups, lr=config.lr, alpha=config.alpha, eps=config.eps, momentum=config.momentum)
    raise RecipeError(f"No optimizer is called {config.name!r}. {did_you_mean(config.name, NAMES)}")
