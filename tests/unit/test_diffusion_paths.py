"""Paths: every target is an exact, invertible view of the same noisy picture."""

from __future__ import annotations

import math

import pytest
import torch

from imagekiln.diffusion.paths import PATHS, TARGETS, path
from imagekiln.errors import RecipeError

SIGMAS = torch.tensor([0.002, 0.05, 0.5, 1.0, 3.0, 80.0], dtype=torch.float64)


def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (len(SIGMAS), 3, 4, 4)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("name", PATHS)
def test_scales_have_the_ratio_sigma(name):
    a, b = path(name).scales(SIGMAS)
    torch.testing.assert_close(b / a, SIGMAS, rtol=1e-12, atol=0)


def test_vp_keeps_the_variance_and_rf_the_sum():
    a, b = path("vp").scales(SIGMAS)
    torch.testing.assert_close(a**2 + b**2, torch.ones_like(a))
    a, b = path("rf").scales(SIGMAS)
    torch.testing.assert_close(a + b, torch.ones_like(a))


@pytest.mark.parametrize("name", PATHS)
def test_scales_and_time_are_finite_at_both_ends(name):
    ends = torch.tensor([0.0, math.inf])
    a, b = path(name).scales(ends)
    assert a.tolist() == [1, 0]
    assert b.tolist() == [0, 1]
    assert path(name).time(ends).tolist() == pytest.approx([0, 1000])


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("kind", TARGETS)
def test_the_picture_is_recovered_from_the_target(name, kind):
    x, eps = pictures()
    z = path(name).diffuse(x, eps, SIGMAS)
    target = path(name).target(kind, x, eps, SIGMAS)
    torch.testing.assert_close(path(name).to_x(kind, target, z, SIGMAS), x, rtol=0, atol=1e-10)
    torch.testing.assert_close(path(name).from_x(kind, x, z, SIGMAS), target, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("kind", TARGETS)
def test_from_x_inverts_to_x_for_any_output(name, kind):
    output, z = pictures()
    x = path(name).to_x(kind, output, z, SIGMAS)
    torch.testing.assert_close(path(name).from_x(kind, x, z, SIGMAS), output, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("kind", TARGETS)
def test_x_weight_turns_an_error_in_x_into_the_error_of_the_target(name, kind):
    x, eps = pictures()
    z = path(name).diffuse(x, eps, SIGMAS)
    wrong = x + 0.1
    error = path(name).from_x(kind, wrong, z, SIGMAS) - path(name).target(kind, x, eps, SIGMAS)
    mse_B = error.square().flatten(1).mean(1)
    torch.testing.assert_close(mse_B, 0.01 * path(name).x_weight(kind, SIGMAS), rtol=1e-8, atol=0)


def test_vp_velocity_is_edm_preconditioning():
    """EDM: D = c_skip y + c_out F with sigma_data = 1; with F = -v and y = z / a it is to_x, and its weight is 1."""
    x, eps = pictures()
    sigma = SIGMAS.reshape(-1, 1, 1, 1)
    y = x + sigma * eps
    c_skip, c_out = 1 / (1 + sigma**2), sigma / (1 + sigma**2).sqrt()
    v = path("vp").target("v", x, eps, SIGMAS)
    torch.testing.assert_close(c_skip * y - c_out * v, x, rtol=0, atol=1e-10)
    edm_weight = (1 + SIGMAS**2) / SIGMAS**2
    torch.testing.assert_close(path("vp").x_weight("v", SIGMAS), edm_weight)


@pytest.mark.parametrize("name", PATHS)
def test_velocity_is_the_derivative_along_the_path(name):
    """The target "v" is dz/d(angle) on VP and dz/dt on RF, by central differences in the path's own time."""
    x, eps = pictures()
    x, eps = x[:1], eps[:1]
    time = torch.tensor([400.0], dtype=torch.float64)
    unit = 1000 * 2 / math.pi if name == "vp" else 1000
    step = 1e-3
    z_plus, z_minus = (path(name).diffuse(x, eps, path(name).sigma(time + d)) for d in (step, -step))
    v = path(name).target("v", x, eps, path(name).sigma(time))
    torch.testing.assert_close((z_plus - z_minus) / (2 * step) * unit, v, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", PATHS)
def test_time_grows_with_sigma_within_its_range_and_is_invertible(name):
    sigma = torch.logspace(-4, 3, 200, dtype=torch.float64)
    time = path(name).time(sigma)
    assert (time.diff() > 0).all()
    assert time.min() > 0 and time.max() < 1000
    torch.testing.assert_close(path(name).sigma(time), sigma, rtol=1e-9, atol=0)


def test_an_unknown_path_is_named_with_the_nearest_known_one():
    with pytest.raises(RecipeError, match="Did you mean 'vp'"):
        path("vpp")
