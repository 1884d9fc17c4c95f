"""Noise without a state: element i of tensor t at step k is a function of (seed, k, t, i).

A counter-based generator (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): a 64-bit counter is mixed
into 64 random bits by the finaliser of SplitMix64 (Steele, Lea and Flood 2014), keyed twice so that two streams neither
coincide nor run behind one another. Two laws are made of these bits:

    "gauss"     normal numbers, two from a counter (Box and Muller 1958):
                r = sqrt(-2 log u),  z_2j = r cos(2 pi w),  z_2j+1 = r sin(2 pi w),  u and w uniform of 32 bits each
    "matched"   the first seven moments of a normal number, four from a counter, of 16 bits each:
                z = a u + b u^3 + c u^5,  u uniform on (-1, 1), with a, b, c such that E z^2, z^4, z^6 are 1, 3, 15

A scheme of weak order one, which all samplers here are at least, needs no more than the first three moments (Kloeden
and Platen 1992, chapter 14): "matched" gives the same stationary variances in less time. Its numbers are
bounded by 2.83, so it is not the law to draw initial weights or pictures from.

Nothing has to be saved for an exact continuation, noise of the past can be made again, and an element gets the same
noise however tensors are grouped, cut or ordered. torch's global generator is neither used nor moved. On the CPU a
compiled kernel (`kernels/noise.c`) makes and adds noise in one pass; without a compiler, and elsewhere, torch does.
"matched" is the same bit for bit everywhere; for "gauss", log and cos of another device or of the kernel may differ in
the last places.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from imagekiln.core import mix
from imagekiln.errors import UsageError, did_you_mean
from imagekiln.native import parallel
from imagekiln.optim import kernels

LAWS = ("gauss", "matched")

MATCHED = (2.7899967197876698, -6.6748231852864143, 6.7111773882902117)
"""a, b, c of the matched law."""

_WEYL = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB
_LOW_32 = 0xFFFFFFFF
_ALL_64 = 0xFFFFFFFFFFFFFFFF

CHUNK = 1 << 17
"""Elements torch makes at once, a multiple of 4: the intermediate results stay in the processor's cache."""


@dataclass(frozen=True)
class Stream:
    """Which noise: its seed, step and tensor (a name or a position), the element it starts at, and its law."""

    seed: int
    step: int
    tensor: int | str
    start: int = 0
    law: str = "gauss"

    @property
    def keys(self) -> tuple[int, int]:
        """The two keys of the bits: those of (seed, step) and those of the tensor, mixed."""
        (a, b), (c, d) = _step_keys(self.seed, self.step), _tensor_keys(self.tensor)
        return _finalised(a + c * _WEYL), _finalised(b ^ (d * _FIRST & _ALL_64))


@dataclass(frozen=True)
class Addition:
    """target += scale * weight * z, in place.

    target: floating point, any shape and strides. weight: None, or like target.
    adam: (correction, eps): the factor is sqrt(sqrt(weight * correction) + eps) instead of weight.
    """

    target: Tensor
    stream: Stream
    scale: float
    weight: Tensor | None = None
    adam: tuple[float, float] | None = None


def check_law(law: str) -> str:
    """The law, or `UsageError` when there is none of this name."""
    if law not in LAWS:
        raise UsageError(f"No noise has the law {law!r}. {did_you_mean(law, LAWS)}")
    return law


def normal(
    num: int,
    *,
    seed: int,
    step: int,
    tensor: int | str,
    start: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    law: str = "gauss",
) -> Tensor:
    """Independent standard normal numbers: elements start .. start + num - 1 of one tensor's noise at one step.

    tensor: what tells this tensor from others, a position or a name.
    start: index of the first element in the whole tensor, for who holds a part of it.
    dtype: float64 is computed in float64, everything else in float32 and rounded. Returns shape (num,). The largest
        magnitude of "gauss" is sqrt(2 log 2^33) = 6.76; a true normal number exceeds it once in 7e10.

    >>> whole = normal(10, seed=0, step=5, tensor="weight")
    >>> bool((whole[3:7] == normal(4, seed=0, step=5, tensor="weight", start=3)).all())
    True
    """
    work = torch.float64 if dtype == torch.float64 else torch.float32
    z = torch.zeros(num, dtype=work, device=device)
    add([Addition(z, Stream(seed, step, tensor, start, check_law(law)), 1.0)])
    return z.to(dtype)


def normal_like(like: Tensor, *, seed: int, step: int, tensor: int | str, law: str = "gauss") -> Tensor:
    """`normal` with shape, dtype and device of a tensor; elements are counted in row-major order whatever its strides.

    >>> normal_like(torch.zeros(2, 3), seed=0, step=0, tensor=0).shape
    torch.Size([2, 3])
    """
    flat = normal(
        like.numel(), seed=seed, step=step, tensor=tensor, dtype=like.dtype, device=like.device, law=check_law(law)
    )
    return flat.view(like.shape)


def add(additions: Sequence[Addition], *, native: bool = True) -> None:
    """Make noise and add it, all tensors in one go. `native=False` leaves the compiled kernel out.

    >>> z = torch.zeros(4)
    >>> add([Addition(z, Stream(0, 0, "w", law="matched"), 0.5)])
    >>> bool((z == 0.5 * normal(4, seed=0, step=0, tensor="w", law="matched")).all())
    True
    """
    library = kernels.library() if native else "not wanted"
    jobs = []
    for item in additions:
        if not isinstance(library, str) and _is_native(item):
            jobs.append(_job(item))
        else:
            _add_in_torch(item, native and item.target.device.type == "cpu")
    if jobs and not isinstance(library, str):
        array = (kernels.Job * len(jobs))(*jobs)
        library.imagekiln_add_noise(array, len(jobs), parallel(), torch.get_num_threads())


def round_randomly(values: Tensor, *, seed: int, step: int, tensor: int | str, start: int = 0) -> Tensor:
    """float32 to bfloat16, up or down with probabilities that keep the mean (stochastic rounding).

    The 16 bits that are cut off are compared with 16 random bits of the element. The rounding adds heat of its own: of
    variance f (1 - f) ulp^2, f the share of a unit in the last place that is cut off, ulp^2 / 6 on average.

    >>> ones = round_randomly(torch.full((10_000,), 1 + 2**-9), seed=0, step=0, tensor="w").float()
    >>> round(float(ones.double().mean() - 1) * 2**9, 1)
    1.0
    """
    stream = Stream(seed, step, f"{tensor} rounding", start)
    first = stream.start // 4
    words = bits(first, (stream.start + values.numel() + 3) // 4 - first, stream.keys, values.device)
    low = words.view(torch.int16)[stream.start - 4 * first :][: values.numel()].to(torch.int32).bitwise_and_(0xFFFF)
    raised = values.contiguous().view(torch.int32).flatten() + low
    cut = raised.bitwise_and_(-0x10000).view(torch.float32).view(values.shape)
    # What is not finite has no neighbours to choose from.
    return torch.where(values.isfinite(), cut, values).to(torch.bfloat16)


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


# -- the compiled kernel ----------------------------------------------------------------------------------------------


def _is_native(item: Addition) -> bool:
    tensors = [item.target] if item.weight is None else [item.target, item.weight]
    dtype = item.target.dtype
    return dtype in (torch.float32, torch.float64) and all(
        t.device.type == "cpu" and t.dtype == dtype and t.is_contiguous() and t.layout == torch.strided for t in tensors
    )


def _job(item: Addition) -> kernels.Job:
    stream, (first, second) = item.stream, item.stream.keys
    mode = 0 if item.weight is None else 1 if item.adam is None else 2
    correction, eps = item.adam or (1.0, 0.0)
    return kernels.Job(
        item.target.data_ptr(),
        None if item.weight is None else item.weight.data_ptr(),
        item.target.numel(),
        stream.start,
        first,
        second * _WEYL & _ALL_64,
        item.scale,
        correction,
        eps,
        LAWS.index(stream.law),
        mode,
        item.target.dtype == torch.float64,
    )


# -- the same in torch ------------------------------------------------------------------------------------------------


def _add_in_torch(item: Addition, native: bool) -> None:
    target, stream = item.target, item.stream
    work = torch.float64 if target.dtype == torch.float64 else torch.float32
    if native and not isinstance(kernels.library(), str):
        z = torch.zeros(target.numel(), dtype=work)
        add([Addition(z, stream, 1.0)])
    else:
        z = _made_in_torch(target.numel(), stream, work, target.device)
    z = z.view(target.shape)
    if item.adam is not None and item.weight is not None:
        correction, eps = item.adam
        target.add_(z.mul_((item.weight * correction).sqrt_().add_(eps).sqrt_().mul_(item.scale)))
    elif item.weight is not None:
        target.add_(z.mul_(item.weight * item.scale))
    else:
        target.add_(z.mul_(item.scale))


def _made_in_torch(num: int, stream: Stream, dtype: torch.dtype, device: torch.device) -> Tensor:
    make = _pairs if stream.law == "gauss" else _fours
    z = torch.empty(num, dtype=dtype, device=device)
    for at in range(0, num, CHUNK):
        part = z[at : at + CHUNK]
        first = (stream.start + at) // 4 * 4
        skip = stream.start + at - first
        part.copy_(make(first, len(part) + skip, stream.keys, dtype, device)[skip : skip + len(part)])
    return z


def _pairs(first: int, num: int, keys: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Elements of the law "gauss" from an even one on; one more may come than was asked for."""
    z = bits(first // 2, (num + 1) // 2, keys, device)
    radius = _shifted(z, 32).to(dtype).add_(0.5).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
    angle = z.bitwise_and_(_LOW_32).to(dtype).mul_(2 * math.pi * 2.0**-32)
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=1).flatten()


def _fours(first: int, num: int, keys: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Elements of the law "matched" from a multiple of 4 on; up to three more may come than were asked for."""
    a, b, c = MATCHED
    u = bits(first // 4, (num + 3) // 4, keys, device).view(torch.int16).to(dtype).add_(0.5).mul_(1 / 32768)
    square = u * u
    return u.mul_((square * c).add_(b).mul_(square).add_(a))


def _shifted(z: Tensor, places: int) -> Tensor:
    return (z >> places).bitwise_and_((1 << (64 - places)) - 1)


def _signed(number: int) -> int:
    number &= _ALL_64
    return number - (1 << 64) if number >= 1 << 63 else number


# -- keys -------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _step_keys(seed: int, step: int) -> tuple[int, int]:
    return mix("langevin", seed, step), mix("langevin, second key", seed, step)


@lru_cache(maxsize=65536)
def _tensor_keys(tensor: int | str) -> tuple[int, int]:
    return mix("langevin, tensor", tensor), mix("langevin, tensor, second key", tensor)


def _finalised(z: int) -> int:
    z &= _ALL_64
    z = (z ^ (z >> 30)) * _FIRST & _ALL_64
    z = (z ^ (z >> 27)) * _SECOND & _ALL_64
    return z ^ (z >> 31)
