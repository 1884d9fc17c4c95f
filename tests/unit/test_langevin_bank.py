"""The sample bank and what samples predict together, against entropies and regressions whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import Parameter

from imagekiln.errors import CheckpointError, UsageError
from imagekiln.optim.bank import SampleBank, calibration_error, function_r_hat, predictive
from imagekiln.optim.samplers import BAOAB


def test_uncertainty_splits_into_what_all_are_unsure_of_and_what_they_disagree_about():
    sure_SBK = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]])
    torn_SBK = torch.tensor([[[0.5, 0.5]], [[0.5, 0.5]]])
    apart_SBK = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    got = [predictive(p) for p in (sure_SBK, torn_SBK, apart_SBK)]
    ln2 = math.log(2)
    assert [float(g.aleatoric) for g in got] == pytest.approx([0, ln2, 0])
    assert [float(g.epistemic) for g in got] == pytest.approx([0, 0, ln2])
    p_SBK = torch.rand(5, 7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p_SBK /= p_SBK.sum(-1, keepdim=True)
    found = predictive(p_SBK)
    mean_BK = p_SBK.mean(0)
    divergence_B = (p_SBK * (p_SBK / mean_BK).log()).sum(-1).mean(0)  # mutual information as a mean divergence
    assert torch.allclose(found.epistemic, divergence_B)
    assert torch.allclose(found.total, found.aleatoric + found.epistemic)
    assert torch.equal(found.mean, mean_BK)


@pytest.mark.parametrize("wrong", [torch.ones(2, 3), torch.ones(1, 2, 3), torch.tensor([[[1.5, -0.5]]])])
def test_what_is_no_probability_is_refused(wrong):
    with pytest.raises(UsageError, match="with sum 1"):
        predictive(wrong)


def test_the_calibration_error_is_the_gap_of_every_bin_by_its_weight():
    confident = torch.tensor([[0.95, 0.05]] * 10 + [[0.35, 0.65]] * 30)
    labels = torch.tensor([0] * 8 + [1] * 2 + [1] * 18 + [0] * 12)  # right 0.8 and 0.6 of the time
    assert calibration_error(confident, labels, 10) == pytest.approx(0.25 * 0.15 + 0.75 * 0.05, abs=1e-6)
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(200_000, generator=generator, dtype=torch.float64)
    labels = (torch.rand(200_000, generator=generator, dtype=torch.float64) < p).long()
    assert calibration_error(torch.stack([1 - p, p], 1), labels) < 0.01
    assert calibration_error(torch.tensor([[1.0, 0.0]]), torch.tensor([1])) == 1.0
    with pytest.raises(UsageError, match="expected"):
        calibration_error(p, labels)


def test_the_calibration_error_is_computed_where_the_probabilities_are():
    with torch.device("meta"):  # stands for another device than theirs
        assert calibration_error(*(torch.tensor(rows, device="cpu") for rows in ([[1.0, 0.0]], [1]))) == 1.0


def test_r_hat_is_one_for_chains_that_agree_and_grows_with_their_distance():
    generator = torch.Generator().manual_seed(0)
    chains_CSB = torch.randn(4, 2000, 3, generator=generator, dtype=torch.float64)
    assert torch.allclose(function_r_hat(chains_CSB), torch.ones(3, dtype=torch.float64), atol=0.01)
    # Two pairs of chains 2 delta apart: between the 8 halves the variance of the means is 8 / 7 delta^2.
    delta = 1.5
    apart_CSB = chains_CSB + torch.tensor([delta, delta, -delta, -delta])[:, None, None]
    expected = math.sqrt(1 + 8 / 7 * delta**2)
    assert torch.allclose(function_r_hat(apart_CSB), torch.full((3,), expected, dtype=torch.float64), rtol=0.03)
    drift_CSB = chains_CSB[:1] + torch.linspace(0, 10, 2000)[None, :, None]
    assert (function_r_hat(drift_CSB) > 1.5).all(), "one chain that drifts disagrees with itself"
    assert torch.isinf(function_r_hat(torch.tensor([0.0, 1.0])[:, None, None].expand(2, 4, 1))).all()
    with pytest.raises(UsageError, match="at least 4"):
        function_r_hat(torch.zeros(2, 3, 1))


def test_a_bank_keeps_the_newest_and_predicts_with_each():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    bank, expected = SampleBank(capacity=3), []
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    for _ in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)
            expected.append(model.eval()(x))
        bank.add(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert len(bank) == 3
    assert torch.equal(bank.predict(model, x), torch.stack(expected[-3:]))
    seen = []
    bank.predict(model, x, refresh=lambda player: seen.append(player.training))
    assert seen == [True] * 3
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    middle = bank.mean()["0.weight"]
    assert torch.allclose(middle, model[0].weight.detach() - 0.1, atol=1e-6)


def test_a_bank_is_saved_whole_and_what_is_none_is_refused(tmp_path):
    model, bank = nn.Linear(2, 2), SampleBank(dtype=torch.bfloat16)
    for _ in range(2):
        bank.add(model)
    bank.save(tmp_path / "bank.safetensors")
    other = SampleBank()
    other.load(tmp_path / "bank.safetensors")
    assert torch.equal(bank.predict(model, torch.ones(1, 2)), other.predict(model, torch.ones(1, 2)))
    (tmp_path / "broken").write_bytes(b"no bank")
    with pytest.raises(CheckpointError, match="not a bank"):
        other.load(tmp_path / "broken")
    with pytest.raises(UsageError, match="empty"):
        SampleBank().predict(model, torch.ones(1, 2))
    with pytest.raises(UsageError, match="at least 1"):
        SampleBank(capacity=0)


def test_the_spread_of_a_sampled_regression_is_that_of_bayes():
    """Predictions of BAOAB samples of a linear model: mean and variance x' S x of the posterior, chain by chain."""
    generator = torch.Generator().manual_seed(0)
    x_NK = torch.randn(30, 2, generator=generator, dtype=torch.float64)
    y_N = x_NK @ torch.tensor([1.0, -1.0], dtype=torch.float64) + 0.5 * torch.randn(
        30, generator=generator, dtype=torch.float64
    )
    precision = x_NK.T @ x_NK / 0.25 + torch.eye(2, dtype=torch.float64)
    mean = torch.linalg.solve(precision, x_NK.T @ y_N / 0.25)
    theta_CK = Parameter(mean.repeat(2000, 1))
    sampler = BAOAB([theta_CK], lr=0.05, temperature=1.0, num_data=30, weight_decay=1 / 30, law="matched")
    asked = torch.tensor([[3.0, 1.0], [0.1, -0.2]], dtype=torch.float64)
    outputs = []
    for step in range(500):
        theta_CK.grad = (theta_CK.detach() @ x_NK.T - y_N) @ x_NK / (30 * 0.25)
        sampler.step()
        if step >= 100 and step % 10 == 0:
            outputs.append(theta_CK.detach() @ asked.T)
    outputs_SCB = torch.stack(outputs)
    expected = torch.stack([row @ torch.linalg.solve(precision, row) for row in asked])
    spread_CB = (outputs_SCB - asked @ mean).square().mean(0)
    assert ((spread_CB.mean(0) - expected).abs() < 4 * spread_CB.std(0) / 2000**0.5).all()
    centre_CB = outputs_SCB.mean(0)
    assert ((centre_CB.mean(0) - asked @ mean).abs() < 4 * centre_CB.std(0) / 2000**0.5).all()
    assert (function_r_hat(outputs_SCB[:, :50].transpose(0, 1)) < 1.1).all()
