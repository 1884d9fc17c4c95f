"""Samplers against exact solutions of the probability-flow ODE."""

from __future__ import annotations

import math

import pytest
import torch

from imagekiln.diffusion.paths import PATHS, expand, path
from imagekiln.diffusion.samplers import SAMPLERS, even_sigmas, flow_sigmas, sampler, sigmas
from imagekiln.errors import UsageError

MEAN, STD = 0.3, 0.5
ORDERS = {"euler": 1, "ddim": 1, "heun": 2, "dpmpp_2m": 2}


def gaussian_denoiser(on, mean=MEAN, std=STD):
    """E[x | z] for x ~ N(mean, std^2): the shrinkage of y = z / a towards the mean."""

    def denoise(z, sigma_B):
        sigma = expand(sigma_B, z)
        a, b = on.scales(sigma)
        # (std^2 y + sigma^2 mean) / (std^2 + sigma^2) with y = z / a, multiplied by a^2 so that sigma = inf is finite.
        return (std**2 * a * z + b**2 * mean) / (std**2 * a**2 + b**2)

    return denoise


def exact(noise, sigma_from, sigma_to, on):
    """The ODE's solution for Gaussian data: y - mean grows like sqrt(std^2 + sigma^2). Returns z at sigma_to."""
    ratio = math.sqrt((STD**2 + sigma_to**2) / (STD**2 + sigma_from**2))
    y = MEAN + (sigma_from * noise - MEAN) * ratio
    return y * on.scales(torch.tensor(sigma_to, dtype=torch.float64))[0]


def noise(n=64, dtype=torch.float64):
    return torch.randn(n, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=dtype)


def test_every_sampler_has_a_known_order():
    assert set(ORDERS) == set(SAMPLERS)


@pytest.mark.parametrize("on", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_error_falls_with_the_order_of_the_method(name, on):
    errors = []
    for steps in (64, 128):
        levels = sigmas(steps + 1, 0.05, 20.0, rho=math.inf)[:-1]  # stop at sigma_min: the last step has its own order
        x = SAMPLERS[name](gaussian_denoiser(on), noise(), levels, on)
        errors.append((x - exact(noise(), 20.0, 0.05, on)).abs().max().item())
    order = math.log2(errors[0] / errors[1])
    assert ORDERS[name] - 0.2 < order < ORDERS[name] + 0.4
    assert errors[1] < {1: 0.1, 2: 0.005}[ORDERS[name]]


@pytest.mark.parametrize("on", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_full_grids_reproduce_the_distribution(name, on):
    x = SAMPLERS[name](gaussian_denoiser(on), noise(), sigmas(100), on)
    torch.testing.assert_close(x, exact(noise(), 160.0, 0.0, on), rtol=0, atol={1: 0.1, 2: 0.01}[ORDERS[name]])


@pytest.mark.parametrize("name", SAMPLERS)
def test_all_paths_draw_the_same_picture_from_the_same_noise(name):
    """The ODE in y = z / a does not depend on the path, and neither does any sampler."""
    vp, rf = (SAMPLERS[name](gaussian_denoiser(on), noise(), sigmas(9), on) for on in (path("vp"), path("rf")))
    torch.testing.assert_close(vp, rf, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", SAMPLERS)
def test_two_points_are_both_found(name):
    """Data that is +1 or -1 with equal chance: D = tanh(y / sigma^2); noise of either sign ends at its own point."""

    def denoise(z, sigma_B):
        a, _ = path("vp").scales(expand(sigma_B, z))
        return torch.tanh(z / a / expand(sigma_B, z) ** 2)

    x = SAMPLERS[name](denoise, noise(), sigmas(40), path("vp"))
    torch.testing.assert_close(x, noise().sign(), rtol=0, atol=0.05)


@pytest.mark.parametrize("on", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_one_step_is_the_denoiser_at_the_top(name, on):
    levels = sigmas(1)
    denoise = gaussian_denoiser(on)
    top_B = torch.full((64,), 160.0, dtype=torch.float64)
    z = noise() * on.scales(levels[0])[1]
    torch.testing.assert_close(SAMPLERS[name](denoise, noise(), levels, on), denoise(z, top_B))


@pytest.mark.parametrize("name", SAMPLERS)
def test_pictures_do_not_depend_on_their_batch(name):
    run = lambda n: SAMPLERS[name](gaussian_denoiser(path("rf")), n, sigmas(7), path("rf"))  # noqa: E731
    torch.testing.assert_close(run(noise())[3:5], run(noise()[3:5]), rtol=0, atol=0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_keep_dtype_and_shape(name):
    x = SAMPLERS[name](gaussian_denoiser(path("rf")), noise(dtype=torch.float32), sigmas(5), path("rf"))
    assert x.dtype == torch.float32 and x.shape == (64, 1, 2, 2)


@pytest.mark.parametrize(("name", "evaluations"), [("euler", 10), ("ddim", 10), ("heun", 19), ("dpmpp_2m", 10)])
def test_number_of_evaluations(name, evaluations):
    seen = []
    denoise = gaussian_denoiser(path("vp"))
    SAMPLERS[name](lambda z, s: (seen.append(s[0].item()), denoise(z, s))[1], noise(), sigmas(10), path("vp"))
    assert len(seen) == evaluations
    assert all(level > 0 for level in seen)


def test_euler_is_ddim_as_it_is_written_in_alpha_and_s():
    on, levels = path("vp"), sigmas(8)
    denoise = gaussian_denoiser(on)
    a, b = on.scales(levels)
    z = b[0] * noise()
    for i in range(8):
        x = denoise(z, levels[i].expand(64))
        eps = (z - a[i] * x) / b[i]
        z = a[i + 1] * x + b[i + 1] * eps
    torch.testing.assert_close(SAMPLERS["ddim"](denoise, noise(), levels, on), z)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_on_rectified_flow_is_euler_in_t_from_pure_noise(shift):
    on, levels = path("rf"), flow_sigmas(10, shift)
    denoise = gaussian_denoiser(on)
    t = torch.where(levels.isinf(), 1, levels / (1 + levels))
    z = noise()
    for i in range(10):
        x = denoise(z, levels[i].expand(64))
        z = z + (t[i + 1] - t[i]) * on.from_x("v", x, z, levels[i].expand(64))
    torch.testing.assert_close(SAMPLERS["euler"](denoise, noise(), levels, on), z)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_grid_and_euler_agree_with_diffusers(shift):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(10)
    on, levels = path("rf"), flow_sigmas(10, shift)
    torch.testing.assert_close(on.time(levels)[:-1].float(), scheduler.timesteps, rtol=1e-5, atol=1e-3)
    denoise = gaussian_denoiser(on)
    z = noise(dtype=torch.float32)
    for timestep in scheduler.timesteps:
        sigma_B = on.sigma(timestep.expand(64))
        v = on.from_x("v", denoise(z, sigma_B), z, sigma_B)
        z = scheduler.step(v, timestep, z).prev_sample
    x = SAMPLERS["euler"](denoise, noise(dtype=torch.float32), levels, on)
    torch.testing.assert_close(x, z, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_can_start_from_pure_noise(name):
    on = path("rf")
    x = SAMPLERS[name](gaussian_denoiser(on), noise(), flow_sigmas(100), on)
    torch.testing.assert_close(x, MEAN + STD * noise(), rtol=0, atol=0.03)


def test_the_karras_grid_is_equation_5():
    grid = sigmas(5, 0.1, 10.0, rho=3.0)
    roots = grid[:-1] ** (1 / 3)
    assert grid[-1] == 0 and len(grid) == 6
    assert grid[0].item() == pytest.approx(10) and grid[4].item() == pytest.approx(0.1)
    torch.testing.assert_close(roots.diff(), roots.diff()[:1].expand(4))


@pytest.mark.parametrize("arguments", [(0,), (5, 0.0), (5, 2.0, 1.0), (5, 0.1, 1.0, 0.0), (5, 0.1, math.inf)])
def test_impossible_grids_are_refused(arguments):
    with pytest.raises(UsageError):
        sigmas(*arguments)


def test_impossible_flow_grids_are_refused():
    with pytest.raises(UsageError, match="at least 1 step"):
        flow_sigmas(0)
    with pytest.raises(UsageError, match="positive"):
        flow_sigmas(3, shift=-1)


def test_an_unknown_sampler_is_named_with_the_nearest_known_one():
    with pytest.raises(UsageError, match="Did you mean 'dpmpp_2m'"):
        sampler("dpmpp2m")


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_an_even_grid_steps_equally_through_the_time_of_a_flow(steps):
    grid = even_sigmas(steps, 3.0)
    times = grid / (1 + grid)
    assert grid[0] == pytest.approx(3.0) and grid[-1] == 0 and len(grid) == steps + 1
    assert (times[:-1] - times[1:]).tolist() == pytest.approx([0.75 / steps] * steps)


def test_an_even_grid_on_a_straight_flow_needs_one_step():
    """Where the data is one point the flow is straight: Euler lands on it at once, from any level."""
    point = torch.full((4, 1, 2, 2), 0.3, dtype=torch.float64)
    for steps in (1, 3):
        x = SAMPLERS["euler"](
            lambda z, sigma_B: point.expand(len(z), -1, -1, -1), noise(4), even_sigmas(steps), path("rf")
        )
        torch.testing.assert_close(x, point)


@pytest.mark.parametrize(("steps", "sigma_max"), [(0, 1.0), (2, 0.0), (2, math.inf)])
def test_an_even_grid_is_refused_in_words(steps, sigma_max):
    with pytest.raises(UsageError, match=r"at least 1 step|must be positive"):
        even_sigmas(steps, sigma_max)
