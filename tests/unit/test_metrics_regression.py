"""Pixel errors: hand values, truths of R2, streaming."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import r2_score

from imagekiln.errors import DataError
from imagekiln.metrics import Regression


def pictures(n, seed, channels=3):
    return torch.rand(n, channels, 5, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_hand_values():
    targets = torch.tensor([-1.0, 1.0, 0.0, 0.0]).reshape(2, 1, 2, 1)
    predictions = torch.tensor([0.0, 1.0, 0.5, 0.0]).reshape(2, 1, 2, 1)
    scores = Regression().update(predictions, targets).scores()
    # mean picture (-.5, .5): the targets' scatter is 4 * .25 = 1, the squared error 1 + .25
    assert scores == pytest.approx(
        {"mse": 0.3125, "rmse": 0.3125**0.5, "mae": 0.375, "psnr": 10 * math.log10(4 / 0.3125), "r2": -0.25}
    )


def test_r2_truths():
    targets = pictures(50, 0)
    assert Regression().update(targets, targets).r2 == 1.0
    mean = targets.double().mean(0).expand(50, -1, -1, -1)
    assert Regression().update(mean, targets).r2 == pytest.approx(0.0, abs=1e-12)
    assert Regression().update(-targets, targets).r2 < -2.0


def test_r2_agrees_with_scikit_learn_a_channel():
    targets, predictions = pictures(30, 0), pictures(30, 1)
    rows = [(targets[:, c].flatten(1).numpy(), predictions[:, c].flatten(1).numpy()) for c in range(3)]
    want = sum(r2_score(t, p, multioutput="variance_weighted") for t, p in rows) / 3
    assert Regression().update(predictions, targets).r2 == pytest.approx(want, rel=1e-6)


def test_channels_count_equally_whatever_their_contrast():
    targets = pictures(40, 0, channels=2) * torch.tensor([1.0, 0.01]).reshape(2, 1, 1)
    predictions = targets.clone()
    predictions[:, 1] = targets[:, 1].mean(0)  # the faint channel is not predicted at all
    assert Regression().update(predictions, targets).r2 == pytest.approx(0.5, abs=1e-6)


def test_constant_alpha_is_left_out_and_constant_targets_refused():
    targets, predictions = pictures(20, 0, 4), pictures(20, 1, 4)
    targets[:, 3] = 0.7
    colours = Regression().update(predictions[:, :3], targets[:, :3]).r2
    assert Regression().update(predictions, targets).r2 == pytest.approx(colours, rel=1e-9)
    with pytest.raises(DataError, match="all the same"):
        _ = Regression().update(predictions[:, 3:], targets[:, 3:]).r2


@pytest.mark.parametrize("batch", [1, 7, 50])
def test_streaming_and_order_do_not_show(batch):
    targets, predictions = pictures(50, 0) * 0.1 + 0.8, pictures(50, 1)
    streamed = Regression()
    for part in torch.arange(50).flip(0).split(batch):
        streamed.update(predictions[part], targets[part])
    assert streamed.scores() == pytest.approx(Regression().update(predictions, targets).scores(), rel=1e-11)


def test_exact_prediction_has_infinite_psnr():
    targets = pictures(3, 0)
    assert Regression().update(targets, targets).psnr == math.inf


def test_refusals():
    targets = pictures(2, 0)
    with pytest.raises(DataError, match="no pictures yet"):
        _ = Regression().mse
    with pytest.raises(DataError, match="same"):
        Regression().update(targets[:1], targets)
    with pytest.raises(DataError, match="same"):
        Regression().update(targets, targets).update(targets[..., :2], targets[..., :2])
    with pytest.raises(DataError, match="same"):
        Regression().update(targets[:0], targets[:0])
    with pytest.raises(DataError, match="NaN"):
        Regression().update(targets * float("nan"), targets)
