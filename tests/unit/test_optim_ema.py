"""Moving averages against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from imagekiln.config import AverageConfig
from imagekiln.errors import CheckpointError
from imagekiln.optim.ema import RAMPUP, Average, decay, power_gamma, power_width

BATCH = 64
KINDS = [AverageConfig(sigma_rel=0.1), AverageConfig(kind="exponential", halflife_kimg=1.0)]
BY_KIND = pytest.mark.parametrize("config", KINDS, ids=lambda config: config.name)


def ramp(config: AverageConfig, steps: int, power: int = 1) -> float:
    """The average at the end of weights that were (step / steps)^power after each step."""
    weights = {"w": torch.zeros((), dtype=torch.float64)}
    average = Average(config, weights)
    for step in range(1, steps + 1):
        weights["w"] = torch.tensor((step / steps) ** power, dtype=torch.float64)
        average.update(weights, nimg=step * BATCH, batch=BATCH)
    return average.state_dict()["w"].item()


@given(st.floats(0.01, 0.28))
def test_gamma_and_width_are_inverse(sigma_rel):
    gamma = power_gamma(sigma_rel)
    assert gamma > 0
    assert power_width(gamma) == pytest.approx(sigma_rel, rel=1e-9)


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_gamma_of_the_widths_of_the_paper(sigma_rel, gamma):
    """EDM2 tracks sigma_rel = 0.05 and 0.10 and states the exponents."""
    assert power_gamma(sigma_rel) == pytest.approx(gamma, abs=0.005)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.25])
def test_power_average_of_a_ramp_is_its_closed_form(sigma_rel):
    """Weights tau^gamma on [0, 1] average tau to (gamma + 1) / (gamma + 2), with standard deviation sigma_rel."""
    gamma, config = power_gamma(sigma_rel), AverageConfig(sigma_rel=sigma_rel)
    mean, square = ramp(config, 2000), ramp(config, 2000, power=2)
    assert mean == pytest.approx((gamma + 1) / (gamma + 2), abs=1e-3)
    assert math.sqrt(square - mean**2) == pytest.approx(sigma_rel, rel=1e-2)


def test_power_average_does_not_depend_on_batch_size():
    config = AverageConfig(sigma_rel=0.1)
    assert ramp(config, 500) == pytest.approx(ramp(config, 2000), abs=2e-3)


def test_exponential_average_of_a_ramp_lags_by_its_mean_age():
    """Long after the ramp-up the average of t is t - halflife / ln 2, in images."""
    halflife_nimg, steps = 1000, 2000
    lag = (1 - ramp(AverageConfig(kind="exponential", halflife_kimg=1.0), steps)) * steps * BATCH
    assert lag == pytest.approx(halflife_nimg / math.log(2), abs=BATCH)


def test_exponential_half_life_is_a_half_life():
    config = AverageConfig(kind="exponential", halflife_kimg=2.0)
    assert decay(config, nimg=10**9, batch=2000) == pytest.approx(0.5)
    assert decay(config, nimg=1000, batch=64) == pytest.approx(0.5 ** (64 / (RAMPUP * 1000)))


@BY_KIND
@given(nimg=st.integers(0, 10**9), batch=st.integers(1, 10**6))
def test_decay_is_a_share(config, nimg, batch):
    assert 0 <= decay(config, nimg, batch) < 1 or batch < 1e-9 * nimg


@BY_KIND
def test_the_initial_weights_are_forgotten_soon(config):
    average = Average(config, {"w": torch.full((3,), 1e6)})
    for step in range(1, 400):
        average.update({"w": torch.ones(3)}, nimg=step * BATCH, batch=BATCH)
    torch.testing.assert_close(average.state_dict()["w"], torch.ones(3), rtol=0, atol=0.05)


@BY_KIND
def test_buffers_and_integers_are_copied(config):
    start = {"w": torch.zeros(2), "running_mean": torch.zeros(2), "num_batches": torch.tensor(0)}
    average = Average(config, start, copied={"running_mean"})
    new = {"w": torch.ones(2), "running_mean": torch.ones(2), "num_batches": torch.tensor(7)}
    average.update(new, nimg=1000 * BATCH, batch=BATCH)
    state = average.state_dict()
    assert state["running_mean"].tolist() == [1, 1]
    assert state["num_batches"].item() == 7
    assert 0 < state["w"][0].item() < 0.2


@BY_KIND
def test_continuing_from_a_saved_state_is_bit_equal(config):
    generator = torch.Generator().manual_seed(0)
    trajectory = [{"w": torch.randn(5, generator=generator), "n": torch.tensor(i)} for i in range(20)]
    whole, first = Average(config, trajectory[0]), Average(config, trajectory[0])
    for step, weights in enumerate(trajectory, start=1):
        whole.update(weights, nimg=step * BATCH, batch=BATCH)
    for step, weights in enumerate(trajectory[:10], start=1):
        first.update(weights, nimg=step * BATCH, batch=BATCH)
    second = Average(config, trajectory[5])
    second.load_state_dict({name: tensor.clone() for name, tensor in first.state_dict().items()})
    for step, weights in enumerate(trajectory[10:], start=11):
        second.update(weights, nimg=step * BATCH, batch=BATCH)
    assert all(torch.equal(second.state_dict()[name], tensor) for name, tensor in whole.state_dict().items())


def test_the_average_is_a_copy_and_leaves_the_weights_alone():
    weights = {"w": torch.nn.Parameter(torch.zeros(2))}
    average = Average(AverageConfig(), weights)
    with torch.no_grad():
        weights["w"].fill_(1)
    assert average.state_dict()["w"].tolist() == [0, 0]
    average.update(weights, nimg=10 * BATCH, batch=BATCH)
    assert weights["w"].tolist() == [1, 1]
    assert not average.state_dict()["w"].requires_grad


def test_half_precision_weights_are_averaged_in_single_precision():
    average = Average(AverageConfig(), {"w": torch.zeros(2, dtype=torch.bfloat16)})
    average.update({"w": torch.ones(2, dtype=torch.bfloat16)}, nimg=10**7, batch=1)
    assert average.state_dict()["w"].dtype == torch.float32
    assert 0 < average.state_dict()["w"][0].item() < 1e-5


@pytest.mark.parametrize("state", [{"v": torch.zeros(2)}, {"w": torch.zeros(3)}, {}])
def test_a_state_that_does_not_fit_is_refused(state):
    with pytest.raises(CheckpointError, match="does not fit this model"):
        Average(AverageConfig(), {"w": torch.zeros(2)}).load_state_dict(state)
