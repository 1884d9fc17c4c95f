"""Gaussian noise without a state: element i of tensor t at step k is a function of (seed, k, t, i).

A counter-based generator (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): a 64-bit counter is mixed
into 64 random bits by the finaliser of SplitMix64 (Steele, Lea and Flood 2014), keyed twice so that two streams neither
coincide nor run behind one another. The bits of one counter become two normal numbers (Box and Muller 1958):

    r = sqrt(-2 log u),  z_2j = r cos(2 pi w),  z_2j+1 = r sin(2 pi w),  u and w uniform of 32 bits each.

Nothing has to be saved for an exact continuation, noise of the past can be made again, and an element gets the same
noise however tensors are grouped, cut or ordered. torch's global generator is neither used nor moved.
Every device makes the same bits; log and cos of another kind of device may differ in the last place.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from imagekiln.core import mix

_WEYL = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB
_LOW_32 = 0xFFFFFFFF

CHUNK = 1 << 17
"""Elements made at once, an even number: the intermediate results stay in the processor's cache."""


def normal(
    num: int,
    *,
    seed: int,
    step: int,
    tensor: int | str,
    start: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Independent standard normal numbers: elements start .. start + num - 1 of one tensor's noise at one step.

    tensor: what tells this tensor from others, a position or a name.
    start: index of the first element in the whole tensor, for who holds a part of it.
    dtype: float64 is computed in float64, everything else in float32 and rounded. Returns shape (num,). The largest
        magnitude is sqrt(2 log 2^33) = 6.76; a true normal number exceeds it once in 7e10.

    >>> whole = normal(10, seed=0, step=5, tensor="weight")
    >>> bool((whole[3:7] == normal(4, seed=0, step=5, tensor="weight", start=3)).all())
    True
    """
    keys = mix("langevin", seed, step, tensor), mix("langevin, second key", seed, step, tensor)
    first = start // 2
    num_pairs = (start + num + 1) // 2 - first
    work = torch.float64 if dtype == torch.float64 else torch.float32
    parts = [
        _pairs(first + at, min(CHUNK // 2, num_pairs - at), keys, work, torch.device(device))
        for at in range(0, num_pairs, CHUNK // 2)
    ]
    if not parts:
        return torch.empty(0, dtype=dtype, device=device)
    flat = parts[0] if len(parts) == 1 else torch.cat(parts)
    return flat[start % 2 : start % 2 + num].to(dtype)


def normal_like(like: Tensor, *, seed: int, step: int, tensor: int | str) -> Tensor:
    """`normal` with shape, dtype and device of a tensor; elements are counted in row-major order whatever its strides.

    >>> normal_like(torch.zeros(2, 3), seed=0, step=0, tensor=0).shape
    torch.Size([2, 3])
    """
    flat = normal(like.numel(), seed=seed, step=step, tensor=tensor, dtype=like.dtype, device=like.device)
    return flat.view(like.shape)


def bits(first: int, num: int, keys: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
    """64 random bits of each counter first .. first + num - 1, as int64.

    torch multiplies and adds int64 modulo 2^64. Its shift to the right copies the sign, which is masked away.
    """
    z = torch.arange(first, first + num, dtype=torch.int64, device=device)
    z.mul_(_signed(_WEYL)).add_(_signed(keys[0]))
    z.bitwise_xor_(_shifted(z, 30)).mul_(_signed(_FIRST))
    # The second key enters between the rounds: two streams whose first keys lie on one orbit differ all the same.
    z.bitwise_xor_(_signed(keys[1] * _WEYL))
    z.bitwise_xor_(_shifted(z, 27)).mul_(_signed(_SECOND))
    return z.bitwise_xor_(_shifted(z, 31))


def _pairs(first: int, num: int, keys: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    z = bits(first, num, keys, device)
    radius = _shifted(z, 32).to(dtype).add_(0.5).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
    angle = z.bitwise_and_(_LOW_32).to(dtype).mul_(2 * math.pi * 2.0**-32)
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=1).flatten()


def _shifted(z: Tensor, places: int) -> Tensor:
    return (z >> places).bitwise_and_((1 << (64 - places)) - 1)


def _signed(number: int) -> int:
    number &= (1 << 64) - 1
    return number - (1 << 64) if number >= 1 << 63 else number
