"""Perceptual path length: linear generators exactly, spheres, percentiles, what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from imagekiln.errors import DataError, UsageError
from imagekiln.metrics.path_length import PathLengthSetting, path_length, slerp

EVERYTHING = (0.0, 100.0)


def latents(n, width, seed):
    return torch.randn(n, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def same(images):
    return images


@pytest.mark.parametrize("path", ["full", "end"])
@pytest.mark.parametrize("epsilon", [1e-4, 1e-2])
def test_linear_generator_is_exact_in_w(path, epsilon):
    a, b, matrix = latents(40, 6, 0), latents(40, 6, 1), latents(6, 12, 2)
    setting = PathLengthSetting("w", epsilon, path, EVERYTHING)
    found = path_length(lambda w: (w @ matrix).view(-1, 3, 2, 2), same, a, b, setting, batch=7)
    want = ((b - a) @ matrix).square().sum(1)
    assert torch.allclose(found.lengths, want, rtol=1e-6)
    assert found.value == pytest.approx(float(want.mean()), rel=1e-6) and (found.n, found.kept) == (40, 40)
    assert found.standard_error == pytest.approx(float(want.std(correction=0)) / 40**0.5, rel=1e-6)


def test_path_on_the_sphere_has_the_length_of_its_angle():
    """|slerp(t + eps) - slerp(t)| is the chord 2 sin(angle eps / 2), whatever t and the latents' lengths."""
    a, b = 3.0 * latents(30, 5, 0), 0.2 * latents(30, 5, 1)
    found = path_length(same, same, a, b, PathLengthSetting("z", 1e-3, cut=EVERYTHING))
    angle = torch.acos(torch.nn.functional.cosine_similarity(a, b))
    assert torch.allclose(found.lengths, (2 * torch.sin(angle * 5e-4) / 1e-3).square(), rtol=1e-6)


def test_slerp_keeps_to_the_circle():
    a, b = latents(20, 4, 0), latents(20, 4, 1)
    ends = [slerp(a, b, torch.full((20, 1), t, dtype=torch.float64)) for t in (0.0, 0.5, 1.0)]
    assert torch.allclose(ends[0], a / a.norm(dim=1, keepdim=True)) and torch.allclose(
        ends[2], b / b.norm(dim=1, keepdim=True)
    )
    assert torch.allclose(ends[1].norm(dim=1), torch.ones(20).double())
    assert torch.allclose((ends[1] * ends[0]).sum(1), (ends[1] * ends[2]).sum(1))


def test_percentiles_leave_out_the_ends_as_numpy_counts_them():
    ramp = torch.arange(1.0, 201.0, dtype=torch.float64)[:, None].sqrt()
    found = path_length(same, same, torch.zeros_like(ramp), ramp, PathLengthSetting("w"))
    lengths = found.lengths.numpy()
    low, high = np.percentile(lengths, 1, method="lower"), np.percentile(lengths, 99, method="higher")
    kept = lengths[(lengths >= low) & (lengths <= high)]
    assert (found.n, found.kept) == (200, len(kept)) and found.kept < 200
    assert found.value == pytest.approx(kept.mean(), rel=1e-9)


def test_batches_do_not_show_and_the_seed_does():
    a, b = latents(25, 3, 0), latents(25, 3, 1)

    def curved(w):
        return (w**3)[..., None, None]

    values = [
        path_length(curved, same, a, b, PathLengthSetting("w", seed=s), batch=n).value
        for s, n in ((0, 4), (0, 25), (1, 4))
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-9) and values[0] != pytest.approx(values[2], rel=1e-3)


def test_float32_is_close_and_no_gradients_are_kept():
    matrix = torch.nn.Parameter(latents(6, 12, 2).float())
    a, b = latents(50, 6, 0).float(), latents(50, 6, 1).float()
    found = path_length(lambda w: w @ matrix, same, a, b, PathLengthSetting("w", cut=EVERYTHING))
    assert not found.lengths.requires_grad
    want = ((b - a) @ matrix.detach()).square().sum(1).mean()
    assert found.value == pytest.approx(float(want), rel=0.02)


def test_refusals():
    a, b = latents(4, 3, 0), latents(4, 3, 1)
    with pytest.raises(DataError, match="floating point picture"):
        path_length(lambda w: (w * 127).to(torch.uint8), same, a, b)
    with pytest.raises(DataError, match="one floating point picture each"):
        path_length(lambda w: w[:1], same, a, b)
    with pytest.raises(DataError, match="NaN"):
        path_length(lambda w: w * math.nan, same, a, b)
    for wrong in ((a, b[:2]), (a[0], b[0]), (a.long(), b.long()), (a[:0], b[:0])):
        with pytest.raises(DataError, match="got latents"):
            path_length(same, same, *wrong)
    for setting in (PathLengthSetting("x"), PathLengthSetting(epsilon=0.0), PathLengthSetting(cut=(99.0, 1.0))):
        with pytest.raises(UsageError, match="needs space z or w"):
            path_length(same, same, a, b, setting)
