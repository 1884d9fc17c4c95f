"""Structural similarity: explicit loops in float64, closed forms, scales, streaming."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from imagekiln.errors import DataError
from imagekiln.metrics.similarity import WEIGHTS, Similarity, num_scales, similarities

C1, C2 = 0.0001, 0.0009


def pictures(n, seed, side=24, channels=3):
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def loops(p, t):
    """(SSIM, contrast) of one channel, window by window; p, t in [0, 1] as lists."""
    line = [math.exp(-((i - 5) ** 2) / (2 * 1.5**2)) for i in range(11)]
    weight = [[a * b / sum(line) ** 2 for b in line] for a in line]
    full = contrast = count = 0
    for y in range(len(p) - 10):
        for x in range(len(p[0]) - 10):
            cells = [(weight[i][j], p[y + i][x + j], t[y + i][x + j]) for i in range(11) for j in range(11)]
            mp, mt = sum(w * a for w, a, _ in cells), sum(w * b for w, _, b in cells)
            vp, vt = sum(w * (a - mp) ** 2 for w, a, _ in cells), sum(w * (b - mt) ** 2 for w, _, b in cells)
            covariance = sum(w * (a - mp) * (b - mt) for w, a, b in cells)
            cs = (2 * covariance + C2) / (vp + vt + C2)
            full += (2 * mp * mt + C1) / (mp**2 + mt**2 + C1) * cs
            contrast += cs
            count += 1
    return full / count, contrast / count


def test_agrees_with_explicit_loops_at_both_scales():
    t = pictures(1, 0, side=24, channels=2)
    p = (0.8 * t + 0.2 * pictures(1, 1, side=24, channels=2)).clamp(-1, 1)
    fine = [loops(*(((x.double() + 1) / 2)[0, c].tolist() for x in (p, t))) for c in range(2)]
    halved = [functional.avg_pool2d((x.double() + 1) / 2, 2) for x in (p, t)]
    coarse = [loops(*(x[0, c].tolist() for x in halved)) for c in range(2)]
    ssim, ms_ssim = similarities(p, t)
    assert float(ssim) == pytest.approx(sum(f for f, _ in fine) / 2, rel=1e-10)
    total = WEIGHTS[0] + WEIGHTS[1]
    want = (sum(c for _, c in fine) / 2) ** (WEIGHTS[0] / total) * (sum(f for f, _ in coarse) / 2) ** (
        WEIGHTS[1] / total
    )
    assert float(ms_ssim) == pytest.approx(want, rel=1e-10)


def test_equal_pictures_score_one():
    t = pictures(3, 0)
    assert Similarity().update(t, t).scores() == pytest.approx({"ssim": 1.0, "ms_ssim": 1.0}, abs=1e-12)


def test_constants_differ_in_luminance_alone():
    a, b = 0.3, 0.6
    p, t = (torch.full((1, 1, 16, 16), 2 * v - 1, dtype=torch.float64) for v in (a, b))
    assert float(similarities(p, t)[0]) == pytest.approx((2 * a * b + C1) / (a * a + b * b + C1), rel=1e-9)


def test_negatives_and_noise():
    t = pictures(4, 0, side=32)
    assert float(similarities(-t, t)[0].max()) < -0.5
    assert similarities(-t, t)[1].tolist() == [0.0] * 4
    noises = [similarities((t + s * pictures(4, 1, side=32)).clamp(-1, 1), t)[0].mean() for s in (0.05, 0.2, 0.8)]
    assert 1.0 > noises[0] > noises[1] > noises[2]
    assert torch.equal(similarities(t, -t)[0], similarities(-t, t)[0])


def test_five_scales_use_the_published_weights():
    assert [num_scales(side, 300) for side in (11, 21, 22, 44, 88, 175, 176, 1000)] == [1, 1, 2, 3, 4, 4, 5, 5]
    t = functional.interpolate(pictures(1, 0, side=22), size=176, mode="bilinear")
    p = 0.9 * t
    found = Similarity().update(p, t)
    assert found.num_scales == 5 and 0.9 < found.scores()["ms_ssim"] < 1.0
    # far from black, scaling contrast by c gives 2 c / (1 + c^2) at every scale
    assert found.scores()["ms_ssim"] == pytest.approx((2 * 0.9 / (1 + 0.81)) ** 1.0001, abs=0.01)


@pytest.mark.parametrize("batch", [1, 4])
def test_streaming_does_not_show_and_order_is_kept(batch):
    t, p = pictures(9, 0), pictures(9, 1)
    whole, streamed = Similarity().update(p, t), Similarity()
    for part in torch.arange(9).split(batch):
        streamed.update(p[part], t[part])
    assert torch.allclose(streamed.ssim_by_picture, whole.ssim_by_picture, rtol=1e-12) and streamed.n == 9
    assert torch.allclose(streamed.ms_ssim_by_picture, whole.ms_ssim_by_picture, rtol=1e-12)
    assert float(similarities(p[3:4], t[3:4])[0]) == pytest.approx(float(whole.ssim_by_picture[3]), rel=1e-12)


def test_refusals():
    t = pictures(2, 0)
    with pytest.raises(DataError, match="no pictures yet"):
        Similarity().scores()
    with pytest.raises(DataError, match="same"):
        Similarity().update(t[:1], t)
    with pytest.raises(DataError, match="same"):
        Similarity().update(t, t).update(t[..., :20], t[..., :20])
    with pytest.raises(DataError, match="at least 11"):
        Similarity().update(t[..., :10], t[..., :10])
    with pytest.raises(DataError, match="NaN"):
        Similarity().update(t * math.nan, t)
