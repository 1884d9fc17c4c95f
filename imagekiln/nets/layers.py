"""Layers shared by the networks: group normalisation with modulation and SiLU, attention, nearest upsampling.

Group normalisation: Wu & He 2018 (arXiv:1803.08494). PyTorch's own is slow on the CPU when the channels are last, which
is the layout convolutions are fastest in; the native kernel (`kernels/group_norm_silu.c`) mends that, and the plain
formula stands in wherever the kernel does not apply, with the same result up to rounding.

Shapes: B images, C channels, H rows, W columns, G groups, N heads, L tokens that look at S, D channels a head.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagekiln import native
from imagekiln.errors import OutOfMemory
from imagekiln.nets import kernels

MOST_WRITTEN_OUT = 2**19
"""Weights of a head of attention: of no more than these a bfloat16 matrix is made on the CPU."""


def group_norm_silu(
    x_BCHW: Tensor,
    norm: nn.GroupNorm,
    *,
    offset_BC: Tensor | None = None,
    scale_BC: Tensor | None = None,
    shift_BC: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """silu(norm(x + offset) * (1 + scale) + shift); every modulation may be absent.

    Differentiable as often as one likes. Rounding of the result does not depend on the number of threads.

    Args:
        x_BCHW: Any floating dtype; the native kernel takes float32 and bfloat16 on the CPU with channels last.
        norm: Its groups, eps, weight and bias are used.
        offset_BC: Added to every pixel before the normalisation.
        scale_BC: Modulation after the normalisation; 0 changes nothing.
        shift_BC: Modulation after the normalisation.
        silu: Whether to apply x * sigmoid(x) at the end.

    >>> group_norm_silu(torch.zeros(1, 4, 2, 2), nn.GroupNorm(2, 4), shift_BC=torch.ones(1, 4))[0, :, 0, 0]
    tensor([0.7311, 0.7311, 0.7311, 0.7311], grad_fn=<SelectBackward0>)
    """
    if not _fits_kernel(x_BCHW):
        offset = None if offset_BC is None else offset_BC[:, :, None, None]
        y_BCHW = F.group_norm(
            x_BCHW if offset is None else x_BCHW + offset, norm.num_groups, norm.weight, norm.bias, norm.eps
        )
        if scale_BC is not None:
            y_BCHW = y_BCHW * (1 + scale_BC[:, :, None, None])
        if shift_BC is not None:
            y_BCHW = y_BCHW + shift_BC[:, :, None, None]
        return F.silu(y_BCHW) if silu else y_BCHW
    gain, bias = norm.weight.float(), norm.bias.float()
    if scale_BC is not None:
        scale_BC = 1 + scale_BC.float()
        gain, bias = gain * scale_BC, bias * scale_BC
    if shift_BC is not None:
        bias = bias + shift_BC.float()
    if gain.ndim != bias.ndim:
        gain = gain.expand_as(bias)
    offset_BC = None if offset_BC is None else offset_BC.float().contiguous()
    return _FusedNorm.apply(x_BCHW, offset_BC, gain.contiguous(), bias.contiguous(), norm.num_groups, norm.eps, silu)


def attention(q_BNLD: Tensor, k_BNSD: Tensor, v_BNSD: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for every head: (B, N, L, D), dtype of the input.

    >>> q, k, v = torch.randn(3, 1, 2, 5, 8)
    >>> torch.allclose(attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
    True
    """
    B, N, L, D = q_BNLD.shape
    # PyTorch's CPU attention computes the bfloat16 gradient up to 9 times slower than these two products do, so as long
    # as the L x S weights are few they are written out; beyond that it is as fast, and needs no memory for them.
    few = L * k_BNSD.shape[2] <= MOST_WRITTEN_OUT
    if q_BNLD.device.type != "cpu" or q_BNLD.dtype != torch.bfloat16 or not few or torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(q_BNLD, k_BNSD, v_BNSD)
    q, k, v = (tensor.reshape(B * N, -1, D) for tensor in (q_BNLD, k_BNSD, v_BNSD))
    weights = torch.softmax(torch.bmm(q * D**-0.5, k.transpose(1, 2)), dim=-1)
    return torch.bmm(weights, v).view(B, N, L, D)


def upsample_nearest(x_BCHW: Tensor, size: Sequence[int]) -> Tensor:
    """Nearest-neighbour resize to (rows, columns)."""
    return F.interpolate(x_BCHW, size=tuple(size), mode="nearest")


def fused_norm_available() -> str:
    """A sentence about the native kernel for the environment check; begins with "yes" or "no".

    >>> fused_norm_available().split(":")[0] in ("yes", "no")
    True
    """
    reason = _kernel_fault()
    if reason:
        return f"no: {reason}, so group normalisation on the CPU is PyTorch's own, which is slower."
    threads = "PyTorch's threads" if native.parallel().value else "one thread, because PyTorch's OpenMP was not found"
    return f"yes: the native group normalisation is compiled, checked, and runs on {threads}."


def prefers_channels_last(images_BCHW: Tensor) -> bool:
    """Whether a network should lay out its activations with the channels last for these pictures."""
    return images_BCHW.dtype in _DTYPES and _may_use_kernel(images_BCHW)


_DTYPES = (torch.float32, torch.bfloat16)


def _may_use_kernel(x: Tensor) -> bool:
    if x.device.type != "cpu" or type(x) is not Tensor or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return not _kernel_fault()


def _fits_kernel(x_BCHW: Tensor) -> bool:
    dense = x_BCHW.ndim == 4 and x_BCHW.numel() > 0 and x_BCHW.is_contiguous(memory_format=torch.channels_last)
    return dense and x_BCHW.dtype in _DTYPES and _may_use_kernel(x_BCHW)


class _FusedNorm(torch.autograd.Function):
    """y = act((x + offset - mean) * rstd * gain + bias), gain and bias (C) or (B, C), on the native kernel."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, offset: Tensor | None, gain: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
    ) -> Tensor:
        y = torch.empty_like(x, memory_format=torch.channels_last)
        mean = torch.empty(x.shape[0], groups)
        rstd = torch.empty(x.shape[0], groups)
        _run(x=x, out=y, offset=offset, gain=gain, bias=bias, mean=mean, rstd=rstd, eps=eps, silu=silu)
        ctx.save_for_backward(x, offset, gain, bias, mean, rstd)
        ctx.settings = groups, eps, silu
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, offset, gain, bias, mean, rstd = ctx.saved_tensors
        groups, eps, silu = ctx.settings
        if torch.is_grad_enabled():  # someone will differentiate again
            inputs = [tensor for tensor in (x, offset, gain, bias) if tensor is not None and tensor.requires_grad]
            y = _formula(x, offset, gain, bias, groups, eps, silu)
            grads = iter(torch.autograd.grad(y, inputs, dy, create_graph=True))
            chosen = [tensor is not None and tensor.requires_grad for tensor in (x, offset, gain, bias)]
            return (*(next(grads) if has else None for has in chosen), None, None, None)
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx = torch.empty_like(x, memory_format=torch.channels_last)
        dgain, dbias = (torch.empty(x.shape[:2]) for _ in range(2))
        doffset = None if offset is None else torch.empty(x.shape[:2])
        forward = {"x": x, "offset": offset, "gain": gain, "bias": bias, "mean": mean, "rstd": rstd}
        _run(**forward, dy=dy, out=dx, dgain=dgain, dbias=dbias, doffset=doffset, eps=eps, silu=silu)
        if gain.ndim == 1:
            dgain, dbias = dgain.sum(0), dbias.sum(0)
        return dx, doffset, dgain, dbias, None, None, None


def _formula(
    x: Tensor, offset: Tensor | None, gain: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> Tensor:
    """What `_FusedNorm` computes, in PyTorch."""
    C = x.shape[1]
    v = x.float() if offset is None else x.float() + offset[:, :, None, None]
    z = F.group_norm(v, groups, eps=eps) * gain.view(-1, C, 1, 1) + bias.view(-1, C, 1, 1)
    return (F.silu(z) if silu else z).to(x.dtype)


def _run(*, x: Tensor, gain: Tensor, mean: Tensor, eps: float, silu: bool, **others: Tensor | None) -> None:
    """Call the kernel: backward when `dy` is among the others. The names are those of the C struct."""
    tensors = {"x": x, "gain": gain, "mean": mean, **others}
    B, C, H, W = x.shape
    job = kernels.Job(
        images=B,
        pixels=H * W,
        channels=C,
        groups=mean.shape[1],
        row_stride=C if gain.ndim == 2 else 0,
        eps=eps,
        is_bf16=x.dtype == torch.bfloat16,
        is_silu=silu,
        **{name: tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None},
    )
    library = kernels.library()
    if isinstance(library, str):
        raise RuntimeError(library)  # unreachable through group_norm_silu, which asks _kernel_fault first
    if library.imagekiln_group_norm_silu(ctypes.byref(job), native.parallel(), torch.get_num_threads()):
        raise OutOfMemory(f"Normalising {B} x {C} x {H} x {W} activations ran out of memory. Use a smaller batch.")


@functools.cache
def _kernel_fault() -> str:
    """Why the native kernel must not be used, or "": compiles it, and compares it with the formula on a small case."""
    library = kernels.library()
    if isinstance(library, str):
        return library
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        x, dy = (torch.randn(2, 24, 5, 3).contiguous(memory_format=torch.channels_last) for _ in range(2))
        inputs = [x, *(torch.randn(2, 24) for _ in range(3))]
        for tensor in inputs:
            tensor.requires_grad_()
        results = []
        for function in (_formula, _FusedNorm.apply):
            y = function(*inputs, 3, 1e-5, True)  # type: ignore[call-arg, arg-type]
            results.append([y, *torch.autograd.grad(y, inputs, dy)])
    same = all(torch.allclose(one, other, atol=1e-4, rtol=1e-4) for one, other in zip(*results, strict=True))
    return "" if same else "the compiled kernel gave wrong numbers on this machine"
