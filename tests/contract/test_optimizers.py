"""What every optimizer of a recipe must do, found by listing the names a recipe accepts."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from imagekiln.config import OptimizerConfig
from imagekiln.optim.build import NAMES, build

ACCEPTED = get_args(OptimizerConfig.model_fields["name"].annotation)
EVERY = pytest.mark.parametrize("name", ACCEPTED)
LR = {"sgd": 0.1, "adam": 0.05, "adamw": 0.05, "adamw_8bit": 0.05, "rmsprop": 0.01}

GOAL = torch.tensor([[1.0, -2.0], [0.5, 3.0]])


class Parabola(torch.nn.Module):
    """A bowl with axes of different steepness and its lowest point at GOAL and 1."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.zeros(2, 2))
        self.vector = torch.nn.Parameter(torch.zeros(3))

    def forward(self) -> torch.Tensor:
        steepness = torch.tensor([[1.0, 2.0], [4.0, 0.5]])
        return (steepness * (self.matrix - GOAL) ** 2).sum() + (self.vector - 1).square().sum()


def descend(bowl: Parabola, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        bowl().backward()
        optimizer.step()


def test_the_builder_knows_every_name_a_recipe_accepts():
    assert set(NAMES) == set(ACCEPTED)


@EVERY
def test_converges_on_a_parabola(name):
    bowl = Parabola()
    descend(bowl, build(OptimizerConfig(name=name, lr=LR[name]), bowl.named_parameters()), 800)
    torch.testing.assert_close(bowl.matrix, GOAL, rtol=0, atol=0.02)
    torch.testing.assert_close(bowl.vector, torch.ones(3), rtol=0, atol=0.02)


@EVERY
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_saved_state_continues_bit_equal(name, momentum, tmp_path):
    config = OptimizerConfig(name=name, lr=0.01, weight_decay=0.01, momentum=momentum)
    whole = Parabola()
    descend(whole, build(config, whole.named_parameters()), 20)
    first = Parabola()
    optimizer = build(config, first.named_parameters())
    descend(first, optimizer, 9)
    torch.save({"weights": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    second = Parabola()
    second.load_state_dict(saved["weights"])
    optimizer = build(config, second.named_parameters())
    optimizer.load_state_dict(saved["optimizer"])
    descend(second, optimizer, 11)
    assert torch.equal(second.matrix, whole.matrix)
    assert torch.equal(second.vector, whole.vector)


@EVERY
def test_weight_decay_pulls_matrices_towards_zero_and_leaves_vectors(name):
    plain, decayed = Parabola(), Parabola()
    descend(plain, build(OptimizerConfig(name=name, lr=0.01), plain.named_parameters()), 300)
    config = OptimizerConfig(name=name, lr=0.01, weight_decay=0.5)
    optimizer = build(config, decayed.named_parameters())
    assert {group["weight_decay"] for group in optimizer.param_groups if group["param_names"] == ["vector"]} == {0.0}
    descend(decayed, optimizer, 300)
    assert decayed.matrix.norm() < plain.matrix.norm()
    assert torch.equal(decayed.vector, plain.vector)


@EVERY
def test_a_parameter_without_gradient_stays(name):
    bowl = Parabola()
    bowl.vector.requires_grad_(False)
    descend(bowl, build(OptimizerConfig(name=name, weight_decay=0.1), bowl.named_parameters()), 3)
    assert torch.equal(bowl.vector, torch.zeros(3))
    assert not torch.equal(bowl.matrix, torch.zeros(2, 2))
