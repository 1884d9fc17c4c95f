"""Noise densities: quantile functions of the right distributions, and stratification that spreads."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from imagekiln.diffusion.densities import log_normal, stratified, uniform_time
from imagekiln.diffusion.paths import SteppedVP, path


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


class NoFloat64(TorchDispatchMode):
    """What MPS refuses: float64 there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            refused = isinstance(tensor, torch.Tensor) and tensor.device.type == "mps" and tensor.dtype == torch.float64
            assert not refused, func
        return made


def test_devices_without_float64_get_float32():
    """Tensors without numbers stand for those of MPS."""
    with FakeTensorMode(), NoFloat64():
        stepped, uniform_B = SteppedVP(torch.full((20,), 0.1)), torch.rand(4, device="mps")
        made = [log_normal(uniform_B), uniform_time(uniform_B, path("vp")), uniform_time(uniform_B, path("rf"))]
        made.append(stepped.time(uniform_B))
    assert {(tensor.device.type, tensor.dtype) for tensor in made} == {("mps", torch.float32)}
