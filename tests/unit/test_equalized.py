"""Equalised layers, minibatch deviation, smoothing filters, penalizable convolutions: against written-out sums."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import conv2d

from imagekiln.nets import equalized
from imagekiln.nets.equalized import Blur, EqualConv2d, EqualLinear


def double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# -- layers -----------------------------------------------------------------------------------------------------------


def test_layers_keep_unit_variance_and_their_stored_weights_have_it():
    linear, conv = EqualLinear(400, 300), EqualConv2d(40, 200, 3)
    x, maps = torch.randn(500, 400), torch.randn(8, 40, 12, 12)
    for value in (linear.weight, conv.weight, linear(x), conv(maps)[:, :, 1:-1, 1:-1]):
        assert value.std().item() == pytest.approx(1.0, abs=0.05)
    assert EqualLinear(400, 300, gain=3.0)(x).std().item() == pytest.approx(3.0, abs=0.15)


def test_a_learning_rate_multiplier_changes_the_speed_alone():
    layer = EqualLinear(50, 40, lr_multiplier=0.01, bias_start=2.0)
    assert layer.weight.std().item() == pytest.approx(100, rel=0.1)
    x = torch.randn(7, 50)
    before = layer(x)
    assert torch.allclose(before, x @ layer.weight.T * 0.01 / math.sqrt(50) + 2.0, atol=1e-5)
    with torch.no_grad():  # one step of Adam moves every value by the learning rate
        layer.weight += 0.1
        layer.bias += 0.1
    moved = 0.1 * 0.01 * (x.sum(1, keepdim=True) / math.sqrt(50) + 1)
    assert torch.allclose(layer(x) - before, moved.expand(-1, 40), atol=1e-5)


def test_pixel_norm_gives_unit_mean_square_and_forgets_the_length():
    x = double(3, 5, 2, 2)
    assert torch.allclose(equalized.pixel_norm(x).square().mean(1), torch.ones(3, 2, 2, dtype=x.dtype))
    assert torch.allclose(equalized.pixel_norm(x), equalized.pixel_norm(7 * x))
    assert gradgradcheck(equalized.pixel_norm, (x,))


@pytest.mark.parametrize(("batch", "group", "actual"), [(8, 4, 4), (6, 4, 3), (5, 4, 1), (2, 4, 2), (4, 32, 4)])
def test_minibatch_deviation_is_the_written_out_one(batch, group, actual):
    x = double(batch, 3, 2, 5)
    y = equalized.minibatch_stddev(x, group)
    assert torch.equal(y[:, :3], x)
    groups = batch // actual
    for picture in range(batch):
        members = x.detach().float()[picture % groups :: groups]
        variance = ((members - members.mean(0)) ** 2).mean(0)
        assert torch.allclose(y[picture, 3].float(), (variance + 1e-8).sqrt().mean(), atol=1e-6)


def test_minibatch_deviation_of_equal_pictures_is_nearly_zero_and_has_finite_slopes():
    x = torch.ones(4, 3, 2, 2, requires_grad=True)
    deviation = equalized.minibatch_stddev(x)[:, -1]
    assert deviation.max().item() == pytest.approx(1e-4)
    (slope,) = torch.autograd.grad(deviation.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(slope.square().sum() + slope.sum(), x)
    assert slope.isfinite().all() and second.isfinite().all()


def test_minibatch_deviation_can_have_several_channels():
    x = torch.randn(4, 6, 2, 2)
    several = equalized.minibatch_stddev(x, 4, channels=2)
    assert several.shape == (4, 8, 2, 2)
    assert torch.allclose(several[:, 6:].mean(1), equalized.minibatch_stddev(x, 4)[:, 6])


def test_labels_become_rows_and_anything_their_mean():
    layer = EqualLinear(3, 4, bias_start=None)
    like = layer.weight
    rows = layer(equalized.class_shares(torch.tensor([0, 1, 2]), 3, 3, like))
    anything = layer(equalized.class_shares(torch.tensor([-1, 2]), 3, 2, like))
    assert torch.allclose(anything, torch.stack([rows.mean(0), rows[2]]), atol=1e-6)
    assert torch.equal(equalized.class_shares(None, 3, 1, like), equalized.class_shares(torch.tensor([-1]), 3, 1, like))


# -- filters ----------------------------------------------------------------------------------------------------------


def matrix(taps, size: int, offset: int) -> torch.Tensor:
    """Rows of a one-dimensional filter of unit sum: row j holds the taps from place j + offset on."""
    result = torch.zeros(size, size, dtype=torch.float64)
    for row in range(size):
        for index, tap in enumerate(taps):
            if 0 <= row + offset + index < size:
                result[row, row + offset + index] = tap / sum(taps)
    return result


@pytest.mark.parametrize("taps", [(1, 2, 1), (1, 3, 3, 1)], ids=str)
def test_halving_and_doubling_are_the_filter_on_every_second_pixel(taps):
    blur, x = Blur(taps), double(2, 3, 6, 8)
    filters = [matrix(taps, size, -1) for size in (6, 8)]
    down = (filters[0] @ x @ filters[1].T)[:, :, ::2, ::2]
    assert torch.allclose(blur.down(x), down, atol=1e-6)
    # Doubling is the adjoint of halving, times four: <down(x), y> = <x, up(y)> / 4.
    y = double(2, 3, 3, 4)
    assert torch.allclose((blur.down(x) * y).sum(), (x * blur.up(y)).sum() / 4)
    assert blur.up(torch.ones(1, 1, 6, 6))[0, 0, 2:-2, 2:-2].allclose(torch.ones(8, 8))


def test_smoothing_keeps_size_with_an_odd_filter():
    x = double(1, 2, 4, 5)
    assert torch.allclose(Blur((1, 2, 1))(x), matrix((1, 2, 1), 4, -1) @ x @ matrix((1, 2, 1), 5, -1).T, atol=1e-6)


@pytest.mark.parametrize("taps", [(1, 2, 1), (1, 3, 3, 1)], ids=str)
def test_filters_can_be_differentiated_twice(taps):
    blur, x = Blur(taps).double(), double(1, 2, 4, 4)
    for function in (blur.down, blur.up, lambda maps: blur(maps, padding=1, gain=4.0)):
        assert gradcheck(function, (x,)) and gradgradcheck(lambda maps, f=function: f(maps).square(), (x,))


# -- convolutions for penalties ---------------------------------------------------------------------------------------

CONVOLUTIONS = [(1, 1, 1, 3, 4), (1, 1, 2, 3, 4), (1, 0, 1, 1, 3), (2, 0, 1, 3, 5), (2, 0, 1, 3, 6), (2, 1, 2, 4, 6)]


@pytest.mark.parametrize(("stride", "padding", "groups", "kernel", "side"), CONVOLUTIONS)
def test_values_and_two_derivatives_are_those_of_a_convolution(stride, padding, groups, kernel, side):
    x, weight = double(2, 4, side, side), double(4, 4 // groups, kernel, kernel)

    def ours(x, weight):
        return equalized.penalizable_conv2d(x, weight, stride=stride, padding=padding, groups=groups)

    assert torch.equal(ours(x, weight), conv2d(x, weight, None, stride, padding, 1, groups))
    assert gradcheck(ours, (x, weight)) and gradgradcheck(ours, (x, weight))


def test_slopes_of_inputs_alone_leave_the_penalty_as_it_is():
    x, weight = double(2, 4, 5, 5), double(6, 4, 3, 3)

    def by_weight(context) -> torch.Tensor:
        value = equalized.penalizable_conv2d(x, weight, padding=1).square().sum()
        with context:
            (slope,) = torch.autograd.grad(value, x, create_graph=True)
        return torch.autograd.grad(value + slope.square().sum(), weight)[0]

    assert torch.allclose(by_weight(equalized.slopes_of_inputs_alone()), by_weight(torch.enable_grad()))
    with equalized.slopes_of_inputs_alone():
        value = equalized.penalizable_conv2d(x, weight).sum()
        assert torch.autograd.grad(value, weight, allow_unused=True) == (None,)


def test_autocast_gives_its_dtype_and_gradients_outside_of_it():
    x, weight = torch.randn(2, 4, 5, 5, requires_grad=True), torch.randn(6, 4, 3, 3, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = equalized.penalizable_conv2d(x, weight)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == weight.grad.dtype == torch.float32
