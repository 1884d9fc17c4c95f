"""AdamW with moments of a byte: the rounding, the step, memory, layouts, and going on from a checkpoint."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imagekiln.config import LangevinConfig, OptimizerConfig
from imagekiln.engine import checkpoint
from imagekiln.errors import RecipeError
from imagekiln.optim import adamw_8bit, build
from imagekiln.optim.adamw_8bit import BLOCK, SMALLEST, AdamW8bit, dequantized, levels, quantized

SHAPE = (24, 16, 4, 4)
"""Of a parameter that is not small, and no whole number of blocks with its neighbour."""


def walked(kind: type, parameter: torch.nn.Parameter, steps: int, **options: object) -> torch.Tensor:
    """The parameter after so many steps towards a goal, with noise in its gradients."""
    goal = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    noise = torch.Generator().manual_seed(2)
    optimizer = kind([parameter], **options)
    for _ in range(steps):
        parameter.grad = parameter.detach() - goal + 0.3 * torch.randn(parameter.shape, generator=noise)
        parameter.grad = parameter.grad.to(memory_format=torch.preserve_format)
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("signed", [True, False])
def test_codes_stand_for_256_numbers_over_seven_decades(signed: bool) -> None:
    found = levels(signed)
    assert len(found) == 256 and bool((found[1:] > found[:-1]).all())
    assert (found[0], found[-1]) == (-1.0 if signed else 0.0, 1.0) and bool((found == 0).any())
    assert float(found[found > 0][0]) < 1e-6


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3 * BLOCK), st.integers(-8, 8), st.booleans(), st.integers(0, 2**31))
def test_a_number_becomes_the_nearest(count: int, decade: int, signed: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(count, generator=generator) * 10.0 ** (decade * torch.rand(count, generator=generator))
    numbers = numbers if signed else numbers.abs()
    codes, scales = quantized(numbers, signed)
    back = dequantized(codes, scales, signed)
    largest = scales.repeat_interleave(BLOCK)[:count]
    nearest = (numbers[:, None] - levels(signed) * largest[:, None]).abs().amin(1)
    above = levels(signed)[1] * largest if not signed else torch.zeros(())
    assert bool(((back - numbers).abs() <= torch.maximum(nearest, above) + 1e-6 * largest).all())
    assert codes.dtype == torch.uint8 and len(scales) == -(-count // BLOCK)


def test_what_is_divided_by_is_not_rounded_to_zero() -> None:
    numbers = torch.tensor([1.0, 1e-30, 0.0])
    codes, scales = quantized(numbers, signed=False)
    assert (dequantized(codes, scales, signed=False) > 0).tolist() == [True, True, False]


def test_small_parameters_are_stepped_as_adamw_steps_them() -> None:
    options = {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}
    ours, theirs = (torch.nn.Parameter(torch.ones(30, 5)) for _ in range(2))
    walked(AdamW8bit, ours, 7, **options)
    walked(torch.optim.AdamW, theirs, 7, **options)
    assert torch.allclose(ours, theirs, atol=1e-6) and ours.numel() < SMALLEST


@pytest.mark.parametrize("seed", range(3))
def test_large_ones_go_where_adamw_goes(seed: int) -> None:
    """After 60 steps they are apart by a few percent of the way."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(SHAPE, generator=generator)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    walked(AdamW8bit, ours, 60, lr=0.02, weight_decay=0.01)
    walked(torch.optim.AdamW, theirs, 60, lr=0.02, weight_decay=0.01)
    way = (theirs - start).norm()
    assert 0 < (ours - theirs).norm() / way < 0.05


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_parameter_is_changed_where_it_lies(layout: torch.memory_format) -> None:
    parameter = torch.nn.Parameter(torch.zeros(SHAPE).to(memory_format=layout))
    strides, address = parameter.stride(), parameter.data_ptr()
    optimizer = AdamW8bit([parameter], lr=0.5)
    parameter.grad = torch.ones(SHAPE)
    parameter.grad[3] = -1
    optimizer.step()
    assert (parameter.stride(), parameter.data_ptr()) == (strides, address)
    wanted = torch.full(SHAPE, -0.5)
    wanted[3] = 0.5
    assert torch.allclose(parameter.detach(), wanted, atol=1e-5)


def test_moments_take_a_byte_each() -> None:
    parameter = torch.nn.Parameter(torch.zeros(SHAPE))
    optimizer = AdamW8bit([parameter])
    parameter.grad = torch.ones(SHAPE)
    optimizer.step()
    held = sum(entry.numel() * entry.element_size() for entry in optimizer.state[parameter].values())
    assert held <= 2.05 * parameter.numel()


def test_parts_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = walked(AdamW8bit, torch.nn.Parameter(torch.zeros(SHAPE)), 5)
    monkeypatch.setattr(adamw_8bit, "AT_ONCE", 3 * BLOCK)
    assert torch.equal(walked(AdamW8bit, torch.nn.Parameter(torch.zeros(SHAPE)), 5), whole)


def test_it_goes_on_bit_for_bit() -> None:
    """Through the tensors of a checkpoint, with the channels last."""
    torch.manual_seed(0)
    net = torch.nn.Conv2d(16, 32, 3).to(memory_format=torch.channels_last)
    twin = torch.nn.Conv2d(16, 32, 3).to(memory_format=torch.channels_last)
    config = OptimizerConfig(name="adamw_8bit", lr=0.01, weight_decay=0.1)
    first = build(config, net.named_parameters())

    def step(module: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        images = torch.randn(2, 16, 5, 5, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        module(images).square().sum().backward()
        optimizer.step()

    for seed in range(3):
        step(net, first, seed)
    twin.load_state_dict(net.state_dict())
    second = build(config, twin.named_parameters())
    kept = {k: v.clone() for k, v in checkpoint.optimizer_tensors("net", first, [*net.named_parameters()]).items()}
    checkpoint.load_optimizer("net", second, [*twin.named_parameters()], kept)
    for seed in range(3, 6):
        step(net, first, seed)
        step(twin, second, seed)
    assert torch.equal(net.weight, twin.weight) and torch.equal(net.bias, twin.bias)


def test_a_state_that_torch_loaded_takes_a_byte_again() -> None:
    whole, part = (torch.nn.Parameter(torch.zeros(SHAPE)) for _ in range(2))
    first, second = AdamW8bit([whole]), AdamW8bit([part])
    for optimizer, parameter in ((first, whole), (second, part)):
        parameter.grad = torch.linspace(-1, 1, parameter.numel()).view(SHAPE)
        optimizer.step()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for optimizer in (first, second):
        optimizer.step()
    assert torch.equal(whole, part) and second.state[part]["exp_avg"].dtype == torch.uint8


def test_it_takes_no_heat() -> None:
    config = OptimizerConfig(name="adamw_8bit", langevin=LangevinConfig(temperature=1.0))
    with pytest.raises(RecipeError, match="Use adamw"):
        build(config, torch.nn.Linear(3, 3).named_parameters(), num_data=10)
