"""Building optimizers: groups, names, kernels and refusals."""

from __future__ import annotations

import pytest
import torch

from imagekiln.config import OptimizerConfig
from imagekiln.errors import RecipeError
from imagekiln.optim.build import build


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.GroupNorm(2, 4))


def test_one_dimensional_parameters_are_not_decayed():
    optimizer = build(OptimizerConfig(weight_decay=0.3), network().named_parameters())
    decays = {name: group["weight_decay"] for group in optimizer.param_groups for name in group["param_names"]}
    assert decays == {"0.weight": 0.3, "0.bias": 0.0, "1.weight": 0.0, "1.bias": 0.0}


def test_settings_reach_the_optimizer():
    config = OptimizerConfig(name="adam", lr=0.02, betas=(0.5, 0.9), eps=1e-6)
    optimizer = build(config, network().named_parameters())
    assert type(optimizer) is torch.optim.Adam
    for group in optimizer.param_groups:
        assert (group["lr"], tuple(group["betas"]), group["eps"]) == (0.02, (0.5, 0.9), 1e-6)
    optimizer = build(OptimizerConfig(name="rmsprop", alpha=0.9, momentum=0.1), network().named_parameters())
    assert (optimizer.defaults["alpha"], optimizer.defaults["momentum"]) == (0.9, 0.1)


def test_a_network_without_matrices_can_be_trained():
    optimizer = build(OptimizerConfig(), torch.nn.GroupNorm(2, 4).named_parameters())
    assert len(optimizer.param_groups) == 1


def test_nothing_to_train_is_an_error():
    with pytest.raises(RecipeError, match="nothing to train"):
        build(OptimizerConfig(), [])


def test_an_unknown_name_is_named_with_the_nearest_known_one():
    config = OptimizerConfig.model_construct(name="adamww", lr=1e-3, weight_decay=0.0)
    with pytest.raises(RecipeError, match="Did you mean 'adamw'"):
        build(config, network().named_parameters())


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_fused_steps_agree_with_plain_ones(name):
    fused_net, plain_net = network(), network()
    fused = build(OptimizerConfig(name=name, lr=0.01, weight_decay=0.1), fused_net.named_parameters())
    plain = build(OptimizerConfig(name=name, lr=0.01, weight_decay=0.1), plain_net.named_parameters())
    for group in plain.param_groups:
        group["fused"], group["foreach"] = False, False
    images = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    for _ in range(5):
        for optimizer, net in ((fused, fused_net), (plain, plain_net)):
            optimizer.zero_grad()
            net(images).square().mean().backward()
            optimizer.step()
    for ours, theirs in zip(fused_net.parameters(), plain_net.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
