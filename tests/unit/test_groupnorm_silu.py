"""The fused group normalisation against float64, and every road to its fallback."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagekiln import native as machinery
from imagekiln.nets import kernels, layers
from imagekiln.nets.layers import group_norm_silu

native = pytest.mark.skipif(
    layers.fused_norm_available().startswith("no"), reason="no native kernel here: " + layers.fused_norm_available()
)
NAMES = ("offset_BC", "scale_BC", "shift_BC")


def reference(x: Tensor, norm: nn.GroupNorm, modulation: dict[str, Tensor], silu: bool) -> Tensor:
    """The definition, written with reductions only."""
    B, C, H, W = x.shape
    offset, scale, shift = (modulation.get(name, torch.zeros(B, C, dtype=x.dtype))[:, :, None, None] for name in NAMES)
    grouped = (x + offset).reshape(B, norm.num_groups, -1)
    centred = grouped - grouped.mean(-1, keepdim=True)
    unit = (centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()).reshape(B, C, H, W)
    y = (unit * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)) * (1 + scale) + shift
    return y * torch.sigmoid(y) if silu else y


def case(shape: tuple[int, int, int, int], groups: int, names: tuple[str, ...], dtype: torch.dtype, mean: float = 0.5):
    """Inputs, a norm with random weights, and the gradient of the output."""
    generator = torch.Generator().manual_seed(3)
    x = (torch.randn(shape, generator=generator) + mean).to(dtype).contiguous(memory_format=torch.channels_last)
    dy = torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
    norm = nn.GroupNorm(groups, shape[1], eps=1e-5)
    with torch.no_grad():
        norm.weight.normal_(1, 0.3, generator=generator)
        norm.bias.normal_(0, 0.3, generator=generator)
    modulation = {name: torch.randn(shape[:2], generator=generator).requires_grad_() for name in names}
    return x.requires_grad_(), dy, norm, modulation


def outputs(x: Tensor, dy: Tensor, norm: nn.GroupNorm, modulation: dict[str, Tensor], silu: bool) -> list[Tensor]:
    """The result and all its gradients."""
    y = group_norm_silu(x, norm, silu=silu, **modulation)
    return [y.detach(), *torch.autograd.grad(y, [x, norm.weight, norm.bias, *modulation.values()], dy)]


def exact(x: Tensor, dy: Tensor, norm: nn.GroupNorm, modulation: dict[str, Tensor], silu: bool) -> list[Tensor]:
    """The same in float64 by the definition."""
    doubled = nn.GroupNorm(norm.num_groups, norm.num_channels, eps=norm.eps, dtype=torch.float64)
    doubled.load_state_dict(norm.state_dict())
    x64 = x.detach().double().requires_grad_()
    modulation64 = {name: value.detach().double().requires_grad_() for name, value in modulation.items()}
    y = reference(x64, doubled, modulation64, silu)
    leaves = [x64, doubled.weight, doubled.bias, *modulation64.values()]
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.double())]


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted).norm() / wanted.norm()).item()


SHAPES = [((3, 32, 5, 7), 8), ((2, 48, 9, 9), 16), ((1, 6, 3, 2), 3), ((2, 64, 1, 1), 8), ((5, 33, 16, 4), 11)]
KINDS = [(), ("offset_BC",), ("scale_BC", "shift_BC"), ("scale_BC",), NAMES]


@native
@pytest.mark.parametrize("shape, groups", SHAPES)
@pytest.mark.parametrize("names", KINDS)
@pytest.mark.parametrize("silu", [True, False])
def test_the_kernel_is_the_definition_in_float32(shape, groups, names, silu):
    given = case(shape, groups, names, torch.float32)
    assert layers._fits_kernel(given[0])
    for found, wanted in zip(outputs(*given, silu), exact(*given, silu), strict=True):
        assert relative(found, wanted) < 3e-6


@native
@pytest.mark.parametrize("names", KINDS)
def test_the_kernel_in_bfloat16_errs_by_the_rounding_of_its_output_only(names):
    given = case((3, 64, 12, 12), 32, names, torch.bfloat16)
    found, wanted = outputs(*given, True), exact(*given, True)
    assert found[0].dtype == found[1].dtype == torch.bfloat16
    for one, other in zip(found, wanted, strict=True):
        limit = 2.5e-3 if one.dtype == torch.bfloat16 else 1e-5  # bf16 rounds by 2^-9 at most; sums are kept in float
        assert relative(one, other) < limit


@native
def test_a_large_mean_does_not_cancel_the_variance():
    given = case((2, 32, 32, 32), 8, (), torch.float32, mean=300.0)
    assert relative(outputs(*given, True)[0], exact(*given, True)[0]) < 1e-4


@native
def test_extreme_inputs_stay_finite_and_nan_is_not_hidden():
    x = torch.full((1, 4, 2, 2), 3e4).contiguous(memory_format=torch.channels_last)
    x[0, 0] = -3e4
    norm = nn.GroupNorm(1, 4)
    with torch.no_grad():
        norm.weight.fill_(1e4)
    assert group_norm_silu(x, norm).isfinite().all()
    x[0, 1, 0, 0] = torch.nan
    assert group_norm_silu(x, norm).isnan().all()
    assert group_norm_silu(x.bfloat16(), norm).isnan().all()


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_bit_equal_for_every_number_of_threads(dtype):
    given = case((7, 64, 16, 16), 32, NAMES, dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            found.append(outputs(*given, True))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


@native
def test_a_gradient_in_another_layout_gives_the_same():
    x, dy, norm, modulation = case((3, 32, 6, 6), 8, (), torch.float32)
    one = outputs(x, dy, norm, modulation, True)
    two = outputs(x, dy.contiguous(), norm, modulation, True)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@native
@pytest.mark.parametrize("names", KINDS)
def test_second_derivatives_are_those_of_the_definition(names):
    x, _, norm, modulation = case((2, 8, 3, 3), 4, names, torch.float32)

    def penalty(function, x: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), x)[0]

    found = penalty(lambda x: group_norm_silu(x, norm, **modulation), x)
    wanted = penalty(lambda x: reference(x, norm, modulation, True), x)
    assert relative(found, wanted.double()) < 1e-4


@pytest.mark.parametrize("names", KINDS)
@pytest.mark.parametrize("layout", ["contiguous", "float64"])
def test_the_fallback_is_the_definition(names, layout):
    x, _, norm, modulation = case((2, 16, 4, 6), 4, names, torch.float32)
    x = x.detach().contiguous() if layout == "contiguous" else x.detach().double()
    if layout == "float64":
        norm, modulation = norm.double(), {name: value.detach().double() for name, value in modulation.items()}
    assert not layers._fits_kernel(x)
    found = group_norm_silu(x, norm, **modulation)
    assert found.dtype == x.dtype
    assert relative(found, reference(x, norm, modulation, True).double()) < 1e-6


@native
def test_autocast_keeps_bfloat16_and_gives_float32_gradients_to_the_weights():
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16))
    images = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        h = net[0](images)
        y = group_norm_silu(h, net[1], offset_BC=torch.zeros(2, 16, dtype=torch.bfloat16, requires_grad=True))
    assert y.dtype == torch.bfloat16 and y.grad_fn.name() == "_FusedNormBackward"
    y.float().square().mean().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in net.parameters())
    assert all(parameter.grad.norm() > 0 for parameter in net[1].parameters())


def test_the_environment_variable_switches_the_kernel_off():
    script = (
        "import torch; from imagekiln.nets import layers;"
        "x = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last);"
        "print(layers._fits_kernel(x), layers.fused_norm_available())"
    )
    environment = {**os.environ, "IMAGEKILN_NO_NATIVE": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False no: IMAGEKILN_NO_NATIVE is set")


@pytest.fixture
def fresh_kernels(monkeypatch):
    """Forget the loaded library before and after."""
    monkeypatch.delenv("IMAGEKILN_NO_NATIVE", raising=False)
    kernels.library.cache_clear()
    layers._kernel_fault.cache_clear()
    yield
    kernels.library.cache_clear()
    layers._kernel_fault.cache_clear()


def test_without_a_compiler_there_is_a_reason_and_a_fallback(fresh_kernels, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    assert layers.fused_norm_available().startswith("no: there is no C compiler")
    x = torch.randn(1, 4, 2, 2).contiguous(memory_format=torch.channels_last)
    norm = nn.GroupNorm(2, 4)
    assert torch.equal(group_norm_silu(x, norm), F.silu(norm(x)))


def test_a_broken_compiler_is_quoted(fresh_kernels, monkeypatch, tmp_path):
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho out of ink >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert "out of ink" in layers.fused_norm_available()


@native
def test_a_cache_that_is_damaged_or_cannot_be_written_is_survived(fresh_kernels, monkeypatch, tmp_path):
    monkeypatch.setattr(machinery, "_FLAGS", ("-O0", "-fopenmp-simd", "-fPIC", "-shared"))
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("IMAGEKILN_CACHE", str(blocked))
    assert layers.fused_norm_available().startswith("yes")
    kernels.library.cache_clear()
    layers._kernel_fault.cache_clear()
    monkeypatch.setenv("IMAGEKILN_CACHE", str(tmp_path / "imagekiln"))
    assert layers.fused_norm_available().startswith("yes")
    (built,) = (tmp_path / "imagekiln").iterdir()
    built.unlink()
    built.write_bytes(b"half a file")
    kernels.library.cache_clear()
    layers._kernel_fault.cache_clear()
    assert layers.fused_norm_available().startswith("yes")


def test_nearest_upsampling_repeats_pixels():
    x = torch.arange(6.0).view(1, 1, 2, 3)
    assert torch.equal(layers.upsample_nearest(x, (4, 6)), x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    for size in itertools.product((3, 4), (5, 6)):
        assert layers.upsample_nearest(x, size).shape[-2:] == size
