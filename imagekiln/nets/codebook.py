"""Code-book of vector quantisation: moving averages, k-means start, dead-code restart, straight-through gradients.

van den Oord et al. 2017 (arXiv:1711.00937, section 3 and appendix A.1). A vector z becomes the nearest code e. With
n_k vectors of a batch at code k and m_k their sum, each step does

  N_k <- decay N_k + (1 - decay) n_k      M_k <- decay M_k + (1 - decay) m_k      e_k <- M_k / N_k

The codes follow their vectors this way and need no gradient; the encoder is pulled by beta ||z - sg(e)||^2, whose
weight beta belongs to the encoder's side alone. A code nearly nobody uses is put where a vector of the batch is
(Dhariwal et al. 2020, arXiv:2005.00341, section 3.1). Computing a loss only notes what was seen; `update` applies it,
once a step, so a step that was left out or computed in parts teaches the same. After the start nothing is read from the
device: what is decided, whether vectors are finite and which codes are dead, is decided there.

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
        self._known_to_have_started = False
        self.register_load_state_dict_post_hook(_forget_the_start)
        self._seen: tuple[Tensor, Tensor] | None = None
        self._pool: tuple[Tensor, Tensor] | None = None

    def forward(self, z_BDHW: Tensor) -> Quantised:
        """The nearest codes. In training mode also notes what was seen, drawing from torch's global generator."""
        z_BDHW = z_BDHW.float()
        z_ND = z_BDHW.detach().movedim(1, -1).flatten(0, 2)
        index_N = self.nearest(z_ND)
        index_BHW = index_N.unflatten(0, (len(z_BDHW), *z_BDHW.shape[2:]))
        codes_BDHW = self.lookup(index_BHW).detach()
        usage_K = _count(index_N, len(self.codes))
        share_K = usage_K / len(index_N)
        if self.training:
            self._note(z_ND, index_N, usage_K)
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
        (usage_K, total_KD), (share_P, pool_PD) = self._seen, self._pool
        self._seen = self._pool = None
        self._known_to_have_started = self._known_to_have_started or bool(self.started)
        if self._known_to_have_started:
            self._follow(usage_K, total_KD, share_P.isfinite().sum(), pool_PD, restart and self.restart_below > 0)
        else:
            self._start(usage_K, pool_PD[share_P.isfinite()])

    def _start(self, usage_K: Tensor, pool_PD: Tensor) -> None:
        if not len(pool_PD):
            return
        self.codes.copy_(_k_means(pool_PD, len(self.codes)))
        self.usage.copy_(_count(self.nearest(pool_PD), len(self.codes)) / len(pool_PD))
        self.usage.mul_(usage_K.sum())
        self.total.copy_(self.codes * self.usage[:, None])
        self.started.fill_(True)
        self._known_to_have_started = True

    def _follow(self, usage_K: Tensor, total_KD: Tensor, num_pool: Tensor, pool_PD: Tensor, restart: bool) -> None:
        """One step of the moving averages; with `num_pool` = 0 nothing changes."""
        usage_K, total_KD = self.usage.lerp(usage_K, 1 - self.decay), self.total.lerp(total_KD, 1 - self.decay)
        if restart:
            mean = usage_K.mean()
            dead_K = usage_K < self.restart_below * mean
            place_K = dead_K.cumsum(0) - 1  # the first dead code takes the pool's first vector, and so on
            dead_K &= place_K < num_pool
            anew_KD = mean * pool_PD[place_K.clamp(0, len(pool_PD) - 1)]
            usage_K, total_KD = torch.where(dead_K, mean, usage_K), torch.where(dead_K[:, None], anew_KD, total_KD)
        count = usage_K.sum()
        smooth_K = (usage_K + SMOOTHING) / (count + len(usage_K) * SMOOTHING) * count
        codes_KD = torch.where(usage_K[:, None] > 0, total_KD / smooth_K[:, None], self.codes)
        for kept, new in ((self.usage, usage_K), (self.total, total_KD), (self.codes, codes_KD)):
            kept.copy_(torch.where(num_pool > 0, new, kept))

    def _note(self, z_ND: Tensor, index_N: Tensor, usage_K: Tensor) -> None:
        finite = torch.isfinite(z_ND).all()
        usage_K = torch.where(finite, usage_K, 0.0)
        total_KD = torch.where(finite, torch.zeros_like(self.codes).index_add_(0, index_N, z_ND), 0.0)
        if self._seen is not None:
            usage_K, total_KD = usage_K + self._seen[0], total_KD + self._seen[1]
        self._seen = usage_K, total_KD
        size = POOL * len(self.codes)
        order = torch.randperm(len(z_ND), device=z_ND.device)[:size]
        share_P, pool_PD = torch.arange(len(order), device=z_ND.device) / len(z_ND), z_ND[order]
        share_P = torch.where(finite, share_P, torch.inf)  # so vectors that are not come last and are not counted
        if self._pool is not None:
            # Shuffled parts are dealt into one another, so that the front of the pool holds a fair share of each.
            share_P, order = torch.cat([self._pool[0], share_P]).sort(stable=True)
            pool_PD = torch.cat([self._pool[1], pool_PD])[order]
        self._pool = share_P[:size], pool_PD[:size]


def _forget_the_start(book: Codebook, _: object) -> None:
    book._known_to_have_started = False


def _count(index_N: Tensor, num_codes: int) -> Tensor:
    """How often each code is named, as float32; `torch.bincount` makes the host wait for the largest number."""
    ones_N = torch.ones(len(index_N), device=index_N.device)
    return torch.zeros(num_codes, device=index_N.device).scatter_add_(0, index_N, ones_N)


def _nearest(z_ND: Tensor, codes_KD: Tensor) -> Tensor:
    with torch.autocast(z_ND.device.type, enabled=False):  # rounded distances have other minima
        return (codes_KD.square().sum(1) - 2 * z_ND @ codes_KD.T).argmin(1)


def _k_means(pool_PD: Tensor, num_codes: int) -> Tensor:
    """Lloyd's algorithm from the pool's first vectors, which are in random order; repeated where there are too few."""
    codes_KD = pool_PD[torch.arange(num_codes, device=pool_PD.device) % len(pool_PD)].clone()
    for _ in range(ROUNDS):
        index_P = _nearest(pool_PD, codes_KD)
        count_K1 = _count(index_P, num_codes)[:, None]
        total_KD = torch.zeros_like(codes_KD).index_add_(0, index_P, pool_PD)
        codes_KD = torch.where(count_K1 > 0, total_KD / count_K1.clamp(min=1), codes_KD)
    return codes_KD
