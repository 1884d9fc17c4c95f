"""Noise densities: quantile functions of the right distributions, and stratification that spreads."""

from __future__ import annotations

import math

import pytest
import torch

from imagekiln.diffusion.densities import log_normal, stratified, uniform_time
from imagekiln.diffusion.paths import path


def grid(n: int = 100_000) -> torch.Tensor:
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


def test_log_normal_has_its_moments():
    log_sigma = log_normal(grid(), mean=-0.5, std=1.2).log()
    assert log_sigma.mean().item() == pytest.approx(-0.5, abs=1e-6)
    assert log_sigma.std().item() == pytest.approx(1.2, abs=1e-3)


def test_log_normal_is_logit_normal_in_rectified_flow_time():
    t = path("rf").time(log_normal(grid(), mean=0.3, std=0.7)) / 1000
    assert torch.logit(t).mean().item() == pytest.approx(0.3, abs=1e-6)
    assert torch.logit(t).std().item() == pytest.approx(0.7, abs=1e-3)


@pytest.mark.parametrize("name", ["vp", "rf"])
def test_uniform_time_is_uniform(name):
    t = path(name).time(uniform_time(grid(), path(name))) / 1000
    assert t.mean().item() == pytest.approx(0.5, abs=1e-6)
    assert t.var().item() == pytest.approx(1 / 12, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ends_of_the_range_are_finite_and_positive(dtype):
    ends = torch.tensor([0.0, 1.0], dtype=dtype)
    for sigma in (log_normal(ends), uniform_time(ends, path("vp")), uniform_time(ends, path("rf"))):
        assert sigma.dtype == dtype
        assert sigma.isfinite().all() and (sigma > 0).all()


def test_stratified_numbers_put_one_in_every_stratum():
    uniform = stratified(torch.rand((), generator=torch.Generator().manual_seed(1)), 16)
    assert sorted((uniform * 16).long().tolist()) == list(range(16))


def test_every_stratified_number_is_uniform_by_itself():
    offsets = grid(1000)
    third = torch.stack([stratified(offset, 7)[3] for offset in offsets])
    assert third.mean().item() == pytest.approx(0.5, abs=2e-3)
    assert third.var().item() == pytest.approx(1 / 12, rel=1e-2)


def test_stratification_lowers_the_variance_of_a_batch_mean():
    """The mean of ln sigma over a batch of 64: std / sqrt(64) with independent numbers, far less with spread ones."""
    generator = torch.Generator().manual_seed(0)
    independent = torch.rand(500, 64, generator=generator, dtype=torch.float64)
    spread = torch.stack([stratified(row[0], 64) for row in independent])
    plain, low = (log_normal(u, 0.0, 1.0).log().mean(1).std().item() for u in (independent, spread))
    assert plain == pytest.approx(1 / math.sqrt(64), rel=0.1)
    assert low**2 < plain**2 / 16
