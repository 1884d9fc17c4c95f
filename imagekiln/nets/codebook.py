"""Code-book of vector quantisation: moving averages, k-means start, dead-code restart, straight-through gradients.

van den Oord et al. 2017 (arXiv:1711.00937, section 3 and appendix A.1). A vector z becomes the nearest code e. With
n_k vectors of a batch at code k and m_k their sum, each step does

  N_k <- decay N_k + (1 - decay) n_k      M_k <- decay M_k + (1 - decay) m_k      e_k <- M_k / N_k

The codes follow their vectors this way and need no gradient; the encoder is pulled by beta ||z - sg(e)||^2, whose
weight beta belongs to the encoder's side alone. A code nearly nobody uses is put where a vector of the batch is
(Dhariwal et al. 2020, arXiv:2005.00341, section 3.1). Computing a loss only notes what was seen; `update` applies it,
once a step, so a step that was left out or computed in parts teaches the same.

Shapes: B pictures, K codes, D dimensions of a code, H rows, W columns of codes, N vectors, P vectors in the pool.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

SMOOTHING = 1e-5
"""Added to every count, so that a code without vectors does not divide by zero (appendix A.1's epsilon)."""

POOL = 4
"""Vectors kept for the start and for restarts, in units of codes."""

ROUNDS = 10
"""Rounds of k-means at the start."""


class Quantised(NamedTuple):
    """codes_BDHW with the gradient of z; indices_BHW int64; commitment, the mean of (z - sg(e))^2; perplexity."""

    codes: Tensor
    indices: Tensor
    commitment: Tensor
    perplexity: Tensor


class Codebook(nn.Module):
    """K vectors, of which the nearest stands for a vector.

    num_codes: K. code_dim: D. decay: of the moving averages, in [0, 1). restart_below: a code used less often than this
    share of the mean use starts anew; 0 = never.

    >>> book = Codebook(8, 2)
    >>> quantised = book(torch.randn(1, 2, 3, 3))
    >>> bool((book.lookup(quantised.indices) == quantised.codes).all()), quantised.indices.shape
    (True, torch.Size([1, 3, 3]))
    """

    usage: Tensor
    total: Tensor
    started: Tensor

    def __init__(self, num_codes: int, code_dim: int, decay: float = 0.99, restart_below: float = 0.05) -> None:
        super().__init__()
        self.decay, self.restart_below = decay, restart_below
        # A parameter without gradient, not a buffer: the moving averages of the weights average it like the networks.
        self.codes = nn.Parameter(torch.randn(num_codes, code_dim), requires_grad=False)
        self.register_buffer("usage", torch.ones(num_codes))
        self.register_buffer("total", self.codes.detach().clone())
        self.register_buffer("started", torch.tensor(False))
        self._seen: tuple[Tensor, Tensor] | None = None
        self._pool: tuple[Tensor, Tensor] | None = None

    def forward(self, z_BDHW: Tensor) -> Quantised:
        """The nearest codes. In training mode also notes what was seen, drawing from torch's global generator."""
        z_BDHW = z_BDHW.float()
        z_ND = z_BDHW.detach().movedim(1, -1).flatten(0, 2)
        index_N = self.nearest(z_ND)
        index_BHW = index_N.unflatten(0, (len(z_BDHW), *z_BDHW.shape[2:]))
        codes_BDHW = self.lookup(index_BHW).detach()
        share_K = torch.bincount(index_N, minlength=len(self.codes)) / len(index_N)
        if self.training:
            self._note(z_ND, index_N)
        return Quantised(
            # The value is exactly the code's; the gradient passes straight through to z.
            codes_BDHW + (z_BDHW - z_BDHW.detach()),
            index_BHW,
            (z_BDHW - codes_BDHW).square().mean(),
            torch.exp(-torch.special.xlogy(share_K, share_K).sum()),
        )

    def nearest(self, z_ND: Tensor) -> Tensor:
        """index_N of the codes with the smallest Euclidean distance; the first of equals."""
        return _nearest(z_ND.float(), self.codes)

    def lookup(self, index_BHW: Tensor) -> Tensor:
        """codes_BDHW of their numbers."""
        return self.codes[index_BHW].movedim(-1, 1)

    @torch.no_grad()
    def update(self, *, restart: bool = True) -> None:
        """Move the codes by what was seen since the last update: the first time k-means, then the moving averages."""
        if self._seen is None or self._pool is None:
            return
        (usage_K, total_KD), (_, pool_PD) = self._seen, self._pool
        self._seen = self._pool = None
        if not self.started:
            self.codes.copy_(_k_means(pool_PD, len(self.codes)))
            self.usage.copy_(torch.bincount(self.nearest(pool_PD), minlength=len(self.codes)) / len(pool_PD))
            self.usage.mul_(usage_K.sum())
            self.total.copy_(self.codes * self.usage[:, None])
            self.started.fill_(True)
            return
        self.usage.lerp_(usage_K, 1 - self.decay)
        self.total.lerp_(total_KD, 1 - self.decay)
        if restart and self.restart_below:
            self._restart(pool_PD)
        count = self.usage.sum()
        smooth_K = (self.usage + SMOOTHING) / (count + len(self.codes) * SMOOTHING) * count
        used_K = self.usage > 0
        self.codes[used_K] = (self.total / smooth_K[:, None])[used_K]

    def _restart(self, pool_PD: Tensor) -> None:
        mean = self.usage.mean()
        dead = torch.nonzero(self.usage < self.restart_below * mean).flatten()[: len(pool_PD)]
        self.usage[dead] = mean
        self.total[dead] = mean * pool_PD[: len(dead)]

    def _note(self, z_ND: Tensor, index_N: Tensor) -> None:
        if not torch.isfinite(z_ND).all():
            return
        usage_K = torch.bincount(index_N, minlength=len(self.codes)).float()
        total_KD = torch.zeros_like(self.codes).index_add_(0, index_N, z_ND)
        if self._seen is not None:
            usage_K, total_KD = usage_K + self._seen[0], total_KD + self._seen[1]
        self._seen = usage_K, total_KD
        size = POOL * len(self.codes)
        order = torch.randperm(len(z_ND), device=z_ND.device)[:size]
        share_P, pool_PD = torch.arange(len(order), device=z_ND.device) / len(z_ND), z_ND[order]
        if self._pool is not None:
            # Shuffled parts are dealt into one another, so that the front of the pool holds a fair share of each.
            share_P, order = torch.cat([self._pool[0], share_P]).sort(stable=True)
            pool_PD = torch.cat([self._pool[1], pool_PD])[order]
        self._pool = share_P[:size], pool_PD[:size]


def _nearest(z_ND: Tensor, codes_KD: Tensor) -> Tensor:
    with torch.autocast(z_ND.device.type, enabled=False):  # rounded distances have other minima
        return (codes_KD.square().sum(1) - 2 * z_ND @ codes_KD.T).argmin(1)


def _k_means(pool_PD: Tensor, num_codes: int) -> Tensor:
    """Lloyd's algorithm from the pool's first vectors, which are in random order; repeated where there are too few."""
    codes_KD = pool_PD[torch.arange(num_codes, device=pool_PD.device) % len(pool_PD)].clone()
    for _ in range(ROUNDS):
        index_P = _nearest(pool_PD, codes_KD)
        count_K1 = torch.bincount(index_P, minlength=num_codes)[:, None]
        total_KD = torch.zeros_like(codes_KD).index_add_(0, index_P, pool_PD)
        codes_KD = torch.where(count_K1 > 0, total_KD / count_K1.clamp(min=1), codes_KD)
    return codes_KD
