"""The named resizing filters against their definitions in float64, and exact small cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from imagekiln.errors import DataError, UsageError
from imagekiln.metrics.resize import FILTERS, resize


def triangle(t):
    return max(0.0, 1 - abs(t))


def cubic(t):
    """Keys 1981 with a = -1/2."""
    t, a = abs(t), -0.5
    if t < 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0


def matrix(name, n, m):
    """out = matrix @ in, from the sampling positions and kernels alone."""
    rows = np.zeros((m, n))
    for i in range(m):
        if name == "tf1-bilinear":
            s = float(np.float32(i) * (np.float32(n) / np.float32(m)))
            for j in (math.floor(s), math.floor(s) + 1):
                rows[i, min(j, n - 1)] += triangle(s - j)
        elif name == "torch-bilinear":
            s = max(0.0, (i + 0.5) * n / m - 0.5)
            for j in (math.floor(s), math.floor(s) + 1):
                rows[i, min(j, n - 1)] += triangle(s - j)
        else:
            kernel, radius = (triangle, 1) if name == "antialias-bilinear" else (cubic, 2)
            width = max(1.0, n / m)
            s = (i + 0.5) * n / m
            first, last = max(0, int(s - radius * width + 0.5)), min(n, int(s + radius * width + 0.5))
            taps = [kernel((j + 0.5 - s) / width) for j in range(first, last)]
            rows[i, first:last] = np.array(taps) / sum(taps)
    return rows


def expected(name, images, height, width):
    rows, columns = matrix(name, images.shape[2], height), matrix(name, images.shape[3], width)
    out = np.einsum("hr,bcrs,ws->bchw", rows, images.double().numpy(), columns)
    return torch.from_numpy(np.clip(out, 0, 255) if name == "pil-bicubic" else out)


SIZES = [
    ((5, 7), (5, 7)),
    ((32, 32), (299, 299)),
    ((8, 5), (13, 31)),
    ((40, 33), (7, 9)),
    ((64, 9), (9, 64)),
    ((1, 1), (3, 2)),
]


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize(("before", "after"), SIZES)
def test_equals_its_definition(name, before, after):
    generator = torch.Generator().manual_seed(sum(before))
    images = torch.randint(0, 256, (2, 3, *before), generator=generator, dtype=torch.uint8)
    found = resize(images, after, name)
    assert found.shape == (2, 3, *after) and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected(name, images, *after), rtol=0, atol=2e-3)
    assert torch.equal(resize(images.float(), after, name), found), "uint8 and the same floats are one"
    channels_last = images.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(resize(channels_last, after, name), found, rtol=0, atol=1e-4)


def line(*values):
    return torch.tensor(values, dtype=torch.uint8).view(1, 1, 1, -1)


@pytest.mark.parametrize(
    ("name", "values", "width", "result"),
    [
        ("tf1-bilinear", (0, 8), 4, [0, 4, 8, 8]),
        ("tf1-bilinear", (0, 10, 20, 30), 2, [0, 20]),
        ("torch-bilinear", (0, 8), 4, [0, 2, 6, 8]),
        ("torch-bilinear", (0, 10, 20, 30), 2, [5, 25]),
        ("torch-bilinear", (80, 0, 0, 80, 80, 0, 0, 80), 2, [0, 0]),
        ("antialias-bilinear", (0, 10, 20, 30), 4, [0, 10, 20, 30]),
        ("antialias-bilinear", (0, 72, 72, 0), 1, [42]),
        ("pil-bicubic", (0, 0, 255, 255), 4, [0, 0, 255, 255]),
    ],
)
def test_exact_small_cases(name, values, width, result):
    torch.testing.assert_close(
        resize(line(*values), (1, width), name).flatten(), torch.tensor(result, dtype=torch.float32), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("name", FILTERS)
def test_a_flat_picture_stays_flat(name):
    for side in (3, 17):
        found = resize(torch.full((1, 1, 9, 9), 200, dtype=torch.uint8), side, name)
        torch.testing.assert_close(found, torch.full((1, 1, side, side), 200.0), rtol=1e-6, atol=0)


def test_bicubic_clips_what_overshoots_and_rounds_only_when_told():
    edge = line(*[0] * 6, *[255] * 6).expand(1, 1, 12, 12)
    found = resize(edge, 31, "pil-bicubic")
    assert float(found.min()) == 0 and float(found.max()) == 255
    assert bool((found != found.round()).any()), "nothing is rounded by itself"
    assert torch.equal(resize(edge, 31, "pil-bicubic", quantise=True), found.round())


def test_only_antialiasing_sees_every_pixel():
    image = torch.zeros(1, 1, 12, 12)
    image[0, 0, 3, 3] = 255.0
    seen = {name: float(resize(image, 3, name).sum()) for name in FILTERS}
    assert seen["tf1-bilinear"] == seen["torch-bilinear"] == 0
    assert seen["antialias-bilinear"] > 5 and seen["pil-bicubic"] > 5


def test_no_pictures_are_no_pictures():
    for name in FILTERS:
        assert resize(torch.zeros(0, 3, 4, 4), 8, name).shape == (0, 3, 8, 8)


def test_refuses_what_it_cannot_do():
    with pytest.raises(UsageError, match="Did you mean 'pil-bicubic'"):
        resize(torch.zeros(1, 1, 2, 2), 3, "pill-bicubic")
    with pytest.raises(UsageError, match="0x3"):
        resize(torch.zeros(1, 1, 2, 2), (0, 3), "tf1-bilinear")
    with pytest.raises(DataError, match="needs"):
        resize(torch.zeros(1, 2, 2), 3, "tf1-bilinear")
