r"""AdamW whose two moments take a byte a number each, instead of four.

Block-wise dynamic quantization (Dettmers et al. 2022, arXiv:2110.02861): a moment is divided into blocks of `BLOCK`
numbers, each block by its largest magnitude, and every number becomes the nearest of 256 fixed ones between -1 and 1
(0 and 1 for the second moment). These are dense near zero over seven decades, section 1.2 and 2.2: with n zeros before
the first one, the rest of the bits say where between 0.1 and 1 times 10^-n. A step, with g a parameter's gradient,

    m = beta1 m + (1 - beta1) g,   v = beta2 v + (1 - beta2) g^2
    w = w - lr (weight_decay w + (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps))

is AdamW's own in float32 (Loshchilov & Hutter 2019, arXiv:1711.05101); only what is kept until the next one is rounded.
Parameters of fewer than `SMALLEST` numbers keep float32, as in the paper's code: they take little, and need it most.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

BLOCK = 256
"""Numbers that share a largest magnitude: the smaller, the nearer are the rounded ones."""

SMALLEST = 4096

_SIGNED = {"exp_avg": True, "exp_avg_sq": False}

AT_ONCE = 2**22
"""Numbers of a parameter that are worked on at once: what is not rounded yet takes memory for these alone."""


class AdamW8bit(Optimizer):
    """See the module. Parameters are float32; state entries are uint8 of the parameter's shape, and float32 scales.

    >>> w = torch.nn.Parameter(torch.ones(64, 64))
    >>> optimizer = AdamW8bit([w], lr=0.1)
    >>> w.grad = torch.ones_like(w)
    >>> optimizer.step()
    >>> round(w[0, 0].item(), 4), optimizer.state[w]["exp_avg"].dtype
    (0.9, torch.uint8)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step on the gradients that the parameters hold."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self._step(parameter, group)

    def _step(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2), gradient = self.state[parameter], group["betas"], parameter.grad
        if gradient is None:
            return
        if not state:
            state["step"] = torch.zeros(())
            _begin(state, parameter)
        state["step"] += 1
        step = int(state["step"])
        size, root = group["lr"] / (1 - beta1**step), (1 - beta2**step) ** 0.5
        weights, slopes = _flat(parameter), _flat(gradient, parameter)
        moments = [_Moment(state, name, parameter) for name in _SIGNED]
        for start in range(0, len(weights), AT_ONCE):
            part = slice(start, min(len(weights), start + AT_ONCE))
            w, g = weights[part], slopes[part]
            m, v = (moment.read(part) for moment in moments)
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            w.mul_(1 - group["lr"] * group["weight_decay"])
            w.addcdiv_(m, v.sqrt().div_(root).add_(group["eps"]), value=-size)
            for moment, numbers in zip(moments, (m, v), strict=True):
                moment.write(part, numbers)


class _Moment:
    """One moment of a parameter as a row of float32, whatever it is kept as."""

    def __init__(self, state: dict[str, Any], name: str, parameter: Tensor) -> None:
        self.scales: Tensor | None = state.get(f"{name}_scale")
        if self.scales is not None and state[name].dtype != torch.uint8:  # torch's own loading makes floats of all
            state[name] = state[name].to(torch.uint8)
        self.kept, self.signed = _flat(state[name], parameter), _SIGNED[name]
        if self.scales is not None and self.scales.device != parameter.device:
            self.scales = state[f"{name}_scale"] = self.scales.to(parameter.device)

    def read(self, part: slice) -> Tensor:
        if self.scales is None:
            return self.kept[part].clone()
        return dequantized(self.kept[part], self.scales[_blocks(part)], self.signed)

    def write(self, part: slice, numbers: Tensor) -> None:
        if self.scales is None:
            self.kept[part] = numbers
        else:
            self.kept[part], self.scales[_blocks(part)] = quantized(numbers, self.signed)


def quantized(numbers_N: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """(codes_N uint8, scales float32, one a block of `BLOCK`) of float32 numbers.

    >>> codes_N, scales = quantized(torch.tensor([0.0, -4.0, 2.0]), signed=True)
    >>> dequantized(codes_N, scales, signed=True)[:2].tolist()
    [0.0, -4.0]
    """
    blocks = torch.nn.functional.pad(numbers_N, (0, -len(numbers_N) % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    _, between = _table(signed, numbers_N.device)
    shares = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(shares, between, out_int32=True).to(torch.uint8)
    return codes.view(-1)[: len(numbers_N)], scales


def dequantized(codes_N: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """The float32 numbers that codes stand for."""
    values, _ = _table(signed, codes_N.device)
    return values[codes_N.int()] * scales.repeat_interleave(BLOCK)[: len(codes_N)]


def levels(signed: bool) -> Tensor:
    """The 256 numbers that a code can stand for, rising, float32.

    >>> levels(signed=True)[[0, 127, 255]].tolist(), levels(signed=False)[[0, 255]].tolist()
    ([-1.0, 0.0, 1.0], [0.0, 1.0])
    """
    bits = 7 if signed else 8
    rows = []
    for zeros in range(bits):
        edges = torch.linspace(0.1, 1, 2 ** (bits - 1 - zeros) + 1, dtype=torch.float64)
        rows.append((edges[1:] + edges[:-1]) / 2 * 10.0**-zeros)
    found = torch.cat(rows).sort().values
    if signed:  # 2 x 127, 0, and 1 itself
        found = torch.cat([-found.flip(0), found.new_zeros(1), found, found.new_ones(1)])
        found[0] = -1.0
    else:
        found = torch.cat([found.new_zeros(1), found])
        found[-1] = 1.0
    return found.float()


@functools.cache
def _table(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The levels, and the bounds between which a number is nearest to one of them.

    What is above zero in a second moment does not become zero, for it is divided by.
    """
    values = levels(signed)
    between = (values[1:] + values[:-1]) / 2
    if not signed:
        between[0] = 0
    return values.to(device), between.to(device)


def _begin(state: dict[str, Any], parameter: Tensor) -> None:
    small, blocks = parameter.numel() < SMALLEST, -(-parameter.numel() // BLOCK)
    for name, signed in _SIGNED.items():
        if small:
            state[name] = torch.zeros_like(parameter)
            continue
        zero = int((levels(signed) == 0).nonzero()[0, 0])
        state[name] = torch.full_like(parameter, zero, dtype=torch.uint8)
        state[f"{name}_scale"] = torch.zeros(blocks, device=parameter.device)


def _flat(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """All numbers in a row, in the order of memory of `like`: a view wherever that is the tensor's own order too."""
    like = tensor if like is None else like
    if tensor.stride() != like.stride():
        tensor = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
    strides = like.stride()
    order = sorted(range(like.ndim), key=lambda axis: (-strides[axis], axis))
    return tensor.permute(order).view(-1)


def _blocks(part: slice) -> slice:
    return slice(part.start // BLOCK, -(-part.stop // BLOCK))
