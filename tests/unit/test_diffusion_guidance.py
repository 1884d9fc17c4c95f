"""Guidance: extrapolation, and evaluations that are spared."""

from __future__ import annotations

import math

import pytest
import torch

from imagekiln.diffusion.guidance import guide, guided
from imagekiln.diffusion.paths import TARGETS, path


class Constant:
    """A denoiser that always answers the same and counts how often it was asked."""

    def __init__(self, value: float) -> None:
        self.value, self.calls = value, 0

    def __call__(self, z, sigma_B):
        self.calls += 1
        return torch.full_like(z, self.value)


Z = torch.zeros(3, 1, 2, 2)


@pytest.mark.parametrize(("scale", "expected"), [(0.0, 1.0), (1.0, 2.0), (3.0, 4.0)])
def test_guidance_extrapolates(scale, expected):
    x = guide(Constant(2.0), Constant(1.0), scale)(Z, torch.ones(3))
    assert (x == expected).all()


def test_scale_one_asks_the_conditional_model_alone():
    unconditional = Constant(1.0)
    guide(Constant(2.0), unconditional, 1.0)(Z, torch.ones(3))
    assert unconditional.calls == 0


@pytest.mark.parametrize(("sigma", "calls"), [(0.1, 0), (0.5, 0), (0.6, 1), (2.0, 1), (2.1, 0), (math.inf, 0)])
def test_outside_the_interval_the_second_evaluation_is_spared(sigma, calls):
    unconditional = Constant(1.0)
    x = guide(Constant(2.0), unconditional, 3.0, (0.5, 2.0))(Z, torch.full((3,), sigma))
    assert unconditional.calls == calls
    assert (x == (4.0 if calls else 2.0)).all()


def test_a_batch_of_mixed_noise_levels_is_guided_picture_by_picture():
    x = guide(Constant(2.0), Constant(1.0), 3.0, (0.5, 2.0))(Z, torch.tensor([0.1, 1.0, 5.0]))
    assert x[:, 0, 0, 0].tolist() == [2.0, 4.0, 2.0]


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("name", ["vp", "rf"])
def test_guiding_x_is_guiding_any_other_prediction(name, kind):
    on, generator = path(name), torch.Generator().manual_seed(0)
    z, first, second = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64)
    sigma_B = torch.tensor([0.4, 3.0], dtype=torch.float64)
    x = guided(on.to_x(kind, first, z, sigma_B), on.to_x(kind, second, z, sigma_B), 2.5)
    torch.testing.assert_close(x, on.to_x(kind, guided(first, second, 2.5), z, sigma_B))
