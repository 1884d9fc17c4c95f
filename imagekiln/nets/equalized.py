"""Layers of the ProGAN and StyleGAN line: equalised learning rates, pixel norm, minibatch deviation, smoothing filters.

Karras et al. 2018 (arXiv:1710.10196, section 4) for the first three, Karras et al. 2019 (arXiv:1812.04948) and Zhang
2019 (arXiv:1904.11486) for resampling with a binomial filter. An equalised layer keeps its weights at unit variance and
multiplies them by gain / sqrt(fan-in) when it is used, so that Adam changes every layer at the same relative speed; a
learning-rate multiplier m stores them as w / m and uses them times m. Everything here can be differentiated as often as
one likes.

Shapes: B pictures, C channels, H rows, W columns, I inputs, O outputs, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d, interpolate, leaky_relu, linear
from torch.nn.grad import conv2d_weight

LEAK = 0.2
"""Slope of the leaky ReLUs of this line of networks on the negative side."""

ACTIVATION_GAIN = math.sqrt(2)
"""Makes up for the variance that a leaky ReLU takes away."""

EPSILON = 1e-8


def leaky(x: Tensor, gain: float = ACTIVATION_GAIN) -> Tensor:
    """gain * leaky_relu(x, 0.2), any shape.

    >>> leaky(torch.tensor([-5.0, 1.0]), gain=2.0).tolist()
    [-2.0, 2.0]
    """
    return leaky_relu(x, LEAK) * gain


def pixel_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean over dimension 1 of x^2 + 1e-8): unit length a channel, at every place (ProGAN, section 4.2).

    >>> [round(value, 3) for value in pixel_norm(torch.tensor([[3.0, 4.0]]))[0].tolist()]
    [0.849, 1.131]
    """
    return x * (x.square().mean(dim=1, keepdim=True) + EPSILON).rsqrt()


def minibatch_stddev(x_BCHW: Tensor, group: int = 4, channels: int = 1) -> Tensor:
    """x with maps attached that say how much the pictures of a group differ: (B, C + channels, H, W).

    The standard deviation over the pictures of a group at every place, averaged over places and a share of the channels
    (ProGAN, section 3); picture i is in a group with i + n, i + 2 n, ... where n is the number of groups. A group has
    the largest number of pictures that is at most `group` and divides B. `channels` must divide C.

    >>> pair = torch.stack([torch.zeros(3, 2, 2), 2 * torch.ones(3, 2, 2)])
    >>> minibatch_stddev(pair)[:, -1].flatten().tolist()
    [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """
    B, C, H, W = x_BCHW.shape
    group = next(size for size in range(min(group, B), 0, -1) if B % size == 0)
    grouped = x_BCHW.float().reshape(group, B // group, channels, C // channels, H, W)
    deviation = (grouped.var(dim=0, correction=0) + EPSILON).sqrt().mean(dim=(2, 3, 4))
    maps_BCHW = deviation.repeat(group, 1)[:, :, None, None].expand(-1, -1, H, W)
    return torch.cat([x_BCHW, maps_BCHW.to(x_BCHW.dtype)], dim=1)


class EqualLinear(nn.Module):
    """A linear layer with an equalised learning rate: outputs_BO of inputs_BI.

    bias_start: what the bias begins with; None for a layer without one. lr_multiplier: how fast this layer learns
    compared with the others. gain: standard deviation of the output for inputs of unit variance.

    >>> EqualLinear(3, 2, bias_start=1.0)(torch.zeros(1, 3)).tolist()
    [[1.0, 1.0]]
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        bias_start: float | None = 0.0,
        lr_multiplier: float = 1.0,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.weight_scale, self.bias_scale = gain * lr_multiplier / math.sqrt(inputs), lr_multiplier
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / lr_multiplier)
        self.bias: nn.Parameter | None = None
        if bias_start is not None:
            self.bias = nn.Parameter(torch.full((outputs,), bias_start / lr_multiplier))

    def forward(self, x_BI: Tensor) -> Tensor:
        """outputs_BO."""
        bias_O = None if self.bias is None else self.bias * self.bias_scale
        return linear(x_BI, self.weight * self.weight_scale, bias_O)


class EqualConv2d(nn.Module):
    """A convolution with an equalised learning rate that keeps the size of maps, or, with stride 2, has no padding.

    >>> EqualConv2d(3, 5, 3, stride=2)(torch.zeros(2, 3, 9, 9)).shape
    torch.Size([2, 5, 4, 4])
    """

    def __init__(
        self, before: int, after: int, kernel: int, *, stride: int = 1, bias: bool = True, gain: float = 1.0
    ) -> None:
        super().__init__()
        self.stride, self.padding = stride, kernel // 2 if stride == 1 else 0
        self.weight_scale = gain / math.sqrt(before * kernel**2)
        self.weight = nn.Parameter(torch.randn(after, before, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(after)) if bias else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, after, H, W), or (B, after, (H - kernel) // 2 + 1, ...) with stride 2."""
        weight = self.weight * self.weight_scale
        y_BCHW = penalizable_conv2d(x_BCHW, weight, stride=self.stride, padding=self.padding)
        return y_BCHW if self.bias is None else y_BCHW + self.bias.to(y_BCHW.dtype)[:, None, None]


class Blur(nn.Module):
    """Smoothing with the outer product of a short symmetric filter, alone or while halving or doubling.

    taps: a row of Pascal's triangle: (1, 2, 1) in StyleGAN and R3GAN, (1, 3, 3, 1) in StyleGAN2. Beyond the border
    there are zeros. With an even number of taps halving and doubling are centred; with an odd one they sit on the first
    pixel of a pair.

    >>> blur = Blur((1, 2, 1))
    >>> blur.down(torch.ones(1, 1, 4, 4))[0, 0].tolist()
    [[0.5625, 0.75], [0.75, 1.0]]
    >>> blur.up(torch.ones(1, 1, 2, 2))[0, 0, 0].tolist()
    [1.0, 1.0, 1.0, 0.5]
    """

    kernel: Tensor
    up_kernel: Tensor

    def __init__(self, taps: Sequence[float]) -> None:
        super().__init__()
        self.taps = len(taps)
        # Zeros between the pixels and (1, 1) over them is doubling; what is left of the filter is one tap shorter.
        rest = [float(taps[0])]
        for tap in taps[1:-1]:
            rest.append(tap - rest[-1])
        for name, values in (("kernel", taps), ("up_kernel", rest)):
            row = torch.tensor(values, dtype=torch.float32)
            self.register_buffer(name, row.outer(row) / row.sum() ** 2, persistent=False)

    def forward(self, x_BCHW: Tensor, padding: int | None = None, gain: float = 1.0) -> Tensor:
        """gain times the smoothed map, `padding` zeros around it; None keeps the size (odd number of taps only)."""
        padding = self.taps // 2 if padding is None else padding
        return _depthwise(x_BCHW, self.kernel * gain, padding=padding)

    def down(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H / 2, W / 2) of maps with even H and W."""
        return _depthwise(x_BCHW, self.kernel, stride=2, padding=(self.taps - 1) // 2)

    def up(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, 2 H, 2 W): zeros between the pixels, then the filter, with the mean kept."""
        doubled_BCHW = interpolate(x_BCHW, scale_factor=2.0, mode="nearest")
        smooth_BCHW = _depthwise(doubled_BCHW, self.up_kernel, padding=(self.taps - 1) // 2)
        return smooth_BCHW if self.taps % 2 == 0 else smooth_BCHW[:, :, 1:, 1:]


def _depthwise(x_BCHW: Tensor, kernel: Tensor, *, stride: int = 1, padding: int = 0) -> Tensor:
    channels = x_BCHW.shape[1]
    weight = kernel.to(x_BCHW.dtype).expand(channels, 1, -1, -1).contiguous()
    return penalizable_conv2d(x_BCHW, weight, stride=stride, padding=padding, groups=channels)


def penalizable_conv2d(x_BCHW: Tensor, weight: Tensor, *, stride: int = 1, padding: int = 0, groups: int = 1) -> Tensor:
    """`conv2d` without a bias whose second derivative is as cheap as its first.

    PyTorch's own second derivative of a convolution goes through kernels as large as the map, and group by group; here
    the derivative by the input is itself a convolution, whose derivatives are ordinary ones. Same values, same dtype
    under autocast.

    >>> x, weight = torch.randn(2, 4, 7, 7), torch.randn(6, 2, 3, 3)
    >>> torch.equal(penalizable_conv2d(x, weight, stride=2, groups=2), conv2d(x, weight, stride=2, groups=2))
    True
    """
    if not torch.is_grad_enabled():
        return conv2d(x_BCHW, weight, None, stride, padding, 1, groups)
    kind = x_BCHW.device.type
    if torch.is_autocast_enabled(kind):  # the derivatives are taken where autocast is over
        x_BCHW, weight = x_BCHW.to(torch.get_autocast_dtype(kind)), weight.to(torch.get_autocast_dtype(kind))
    return _PenalizableConv2d.apply(x_BCHW, weight, stride, padding, groups)


class _PenalizableConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: int, groups: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.settings = stride, padding, groups
        return conv2d(x, weight, None, stride, padding, 1, groups)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (stride, padding, groups) = ctx.saved_tensors, ctx.settings
        by_x = by_weight = None
        if ctx.needs_input_grad[0]:
            by_x = _slope_by_input(slope, weight, x.shape[2:], stride, padding, groups)
        if ctx.needs_input_grad[1] and not _inputs_alone:
            by_weight = conv2d_weight(x, weight.shape, slope, stride, padding, 1, groups)
        return by_x, by_weight, None, None, None


def _slope_by_input(
    slope: Tensor, weight: Tensor, size: Sequence[int], stride: int, padding: int, groups: int
) -> Tensor:
    kernel = weight.shape[2:]
    # rows and columns at the end that the stride does not reach
    rest = [(side + 2 * padding - taps) % stride for side, taps in zip(size, kernel, strict=True)]
    if groups == 1:
        return conv_transpose2d(slope, weight, None, stride, padding, rest)
    # A transposed convolution with groups is slow on the CPU, an ordinary one with zeros between the pixels is not.
    if stride > 1:
        rows, columns = ((n - 1) * stride + 1 + more for n, more in zip(slope.shape[2:], rest, strict=True))
        spread = slope.new_zeros(*slope.shape[:2], rows, columns)
        spread[:, :, ::stride, ::stride] = slope
        slope = spread
    turned = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flip(2, 3)
    return conv2d(slope, turned, None, 1, [taps - 1 - padding for taps in kernel], 1, groups)


_inputs_alone = False


@contextmanager
def slopes_of_inputs_alone() -> Iterator[None]:
    """Leave out the derivatives by the weights of `penalizable_conv2d`, which the gradient by a picture does not need.

    PyTorch computes all derivatives of a function of ours or none. To be held around `torch.autograd.grad` by inputs.
    """
    global _inputs_alone
    _inputs_alone = True
    try:
        yield
    finally:
        _inputs_alone = False


def class_shares(labels_B: Tensor | None, num_classes: int, batch: int, like: Tensor) -> Tensor:
    """One-hot rows of labels, and 1 / K everywhere for "anything" (-1, or no labels at all): shares_BK.

    A linear layer of these rows is a table of labels in which "anything" is the mean of all classes; it has no row of
    its own, so the layer has as many parameters as published, and it is trained by every picture.

    like: its dtype and device are taken.

    >>> class_shares(torch.tensor([1, -1]), 2, batch=2, like=torch.zeros(1)).tolist()
    [[0.0, 1.0], [0.5, 0.5]]
    """
    anything = like.new_full((batch, num_classes), 1 / num_classes)
    if labels_B is None:
        return anything
    rows = (labels_B[:, None] == torch.arange(num_classes, device=labels_B.device)).to(like)
    return torch.where((labels_B < 0)[:, None], anything, rows)
