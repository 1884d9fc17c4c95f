"""Counter-based noise: is it normal, is it independent in every direction, is it the same however it is cut?"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from imagekiln.errors import UsageError
from imagekiln.optim import kernels
from imagekiln.optim.noise import (
    CHUNK,
    LAWS,
    MATCHED,
    Addition,
    Stream,
    add,
    bits,
    normal,
    normal_like,
    round_randomly,
)

MASK = (1 << 64) - 1
NUM = 1 << 18


EVERY_LAW = pytest.mark.parametrize("law", LAWS)


def draw(seed: int = 0, step: int = 0, tensor: int | str = 0, num: int = NUM, law: str = "gauss") -> Tensor:
    return normal(num, seed=seed, step=step, tensor=tensor, law=law).double()


def z_of_correlation(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / math.sqrt(len(a)))


def kolmogorov(values: Tensor) -> float:
    """sqrt(n) times the largest distance between the distribution of the values and the normal one."""
    ordered = torch.special.ndtr(values.double()).sort().values
    n = len(ordered)
    rank = torch.arange(n, dtype=torch.float64)
    distance = torch.maximum((rank + 1) / n - ordered, ordered - rank / n).max()
    return float(distance) * math.sqrt(n)


def test_the_bits_are_those_of_whole_number_arithmetic():
    keys = (0x7123456789ABCDEF, 0x0FEDCBA987654321)

    def expected(counter: int) -> int:
        z = (counter * 0x9E3779B97F4A7C15 + keys[0]) & MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z ^= (keys[1] * 0x9E3779B97F4A7C15) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)

    for first in (0, 7, 2**33, 2**62):
        assert [z & MASK for z in bits(first, 50, keys).tolist()] == [expected(first + i) for i in range(50)]


def test_every_bit_is_a_fair_coin_and_flips_with_any_bit_of_the_counter():
    keys = (1, 2)
    z = bits(0, NUM, keys)
    for place in range(64):
        ones = int(((z >> place) & 1).sum())
        assert abs(ones - NUM / 2) < 5 * math.sqrt(NUM) / 2, place
    for flipped in range(12):
        other = z[torch.arange(NUM) ^ (1 << flipped)]
        changed = z ^ other
        for place in range(0, 64, 7):
            flips = int(((changed >> place) & 1).sum()) / 2  # each pair is counted twice
            assert abs(flips - NUM / 4) < 5 * math.sqrt(NUM / 2) / 2, (flipped, place)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_and_distribution_are_normal(dtype):
    z = normal(4 * NUM, seed=3, step=1, tensor="w", dtype=dtype).double()
    n = len(z)
    for power, mean, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10395 - 225)]:
        assert abs(float((z**power).mean()) - mean) < 4 * math.sqrt(variance / n), power
    assert kolmogorov(z) < 1.95  # one in a thousand
    assert kolmogorov(z[::2]) < 1.95 and kolmogorov(z[1::2]) < 1.95
    tail = int((z.abs() > 4).sum())
    expected = n * math.erfc(4 / math.sqrt(2))
    assert abs(tail - expected) < 4 * math.sqrt(expected)


def test_the_battery_sees_what_is_not_normal():
    uniform = (torch.rand(NUM, generator=torch.Generator().manual_seed(0)) - 0.5) * math.sqrt(12)
    assert kolmogorov(uniform) > 10
    assert kolmogorov(draw() * 1.03) > 1.95


def test_the_matched_law_has_seven_moments_of_a_normal_number_and_the_law_it_says():
    u = (torch.arange(65536, dtype=torch.float64) + 0.5) / 32768 - 1
    a, b, c = MATCHED
    levels = u * (a + b * u**2 + c * u**4)
    for power, moment in [(1, 0), (2, 1), (3, 0), (4, 3), (5, 0), (6, 15), (7, 0)]:
        assert float((levels**power).mean()) == pytest.approx(moment, abs=1e-6), power
    z = draw(num=4 * NUM, law="matched")
    for power in (1, 2, 3, 4, 6):
        expected, spread = float((levels**power).mean()), float((levels**power).std())
        assert abs(float((z**power).mean()) - expected) < 4 * spread / len(z) ** 0.5, power
    # Kolmogorov and Smirnov's distance to the law itself, on its levels
    ordered, levels = z.sort().values, levels.float().double().sort().values
    at = torch.linspace(-2.8, 2.8, 2001, dtype=torch.float64)
    share = torch.searchsorted(ordered, at) / len(ordered) - torch.searchsorted(levels, at) / len(levels)
    assert float(share.abs().max()) * len(z) ** 0.5 < 1.95
    assert kolmogorov(z) > 10, "it is not normal, and says so"


@EVERY_LAW
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_compiled_kernel_does_what_torch_does(law, dtype):
    weight = normal(CHUNK + 1003, seed=9, step=9, tensor="w", dtype=dtype).abs()
    for start in (0, 1, 2, 3, 2**33 + 5):
        for options in ({}, {"weight": weight}, {"weight": weight, "adam": (1.3, 1e-3)}):
            fast, slow = torch.ones_like(weight), torch.ones_like(weight)
            for target, native in ((fast, True), (slow, False)):
                add([Addition(target, Stream(1, 2, "w", start, law), 0.3, **options)], native=native)
            if law == "matched" and "adam" not in options:
                assert torch.equal(fast, slow)
            assert torch.allclose(fast, slow, rtol=0, atol=2e-6 if dtype == torch.float32 else 1e-14)
            assert not torch.equal(fast, torch.ones_like(fast))


def test_without_the_compiled_kernel_the_noise_is_the_same(monkeypatch):
    with_kernel = normal(1001, seed=0, step=0, tensor="w", law="matched")
    monkeypatch.setenv("IMAGEKILN_NO_NATIVE", "1")
    kernels.library.cache_clear()
    try:
        assert kernels.library() == "IMAGEKILN_NO_NATIVE is set"
        assert torch.equal(with_kernel, normal(1001, seed=0, step=0, tensor="w", law="matched"))
    finally:
        kernels.library.cache_clear()


@EVERY_LAW
def test_strides_pieces_and_other_tensors_do_not_change_the_noise(law):
    turned = torch.zeros(40, 30).T
    several = [torch.zeros(30, 40), torch.zeros(50_000), torch.zeros(0), torch.zeros(())]
    add([Addition(turned, Stream(0, 0, 0, law=law), 1.0)])
    add([Addition(target, Stream(0, 0, place, law=law), 1.0) for place, target in enumerate(several)])
    assert torch.equal(turned, several[0])
    assert torch.equal(several[1], normal(50_000, seed=0, step=0, tensor=1, law=law))


def test_an_unknown_law_is_refused():
    with pytest.raises(UsageError, match=r"'gaus'.*Did you mean 'gauss'"):
        normal(3, seed=0, step=0, tensor=0, law="gaus")


def test_rounding_at_random_keeps_the_mean_and_has_the_heat_it_says():
    ulp = 2.0**-7
    for share in (0.0, 0.1, 0.5, 0.9):
        values = torch.full((200_000,), 1 + share * ulp)
        for sign in (1, -1):
            error = (round_randomly(sign * values, seed=0, step=0, tensor="w").double() - sign * values.double()) / ulp
            assert abs(float(error.mean())) < 4 * (0.25 / 200_000) ** 0.5
            assert float(error.var()) == pytest.approx(share * (1 - share), abs=0.005)
    odd = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0])
    kept = round_randomly(odd, seed=0, step=0, tensor="w")
    assert kept[0] == float("inf") and kept[1] == -float("inf") and kept[2].isnan() and kept[3] == 0
    whole = round_randomly(torch.linspace(1, 2, 1000), seed=0, step=0, tensor="w")
    part = round_randomly(torch.linspace(1, 2, 1000)[333:], seed=0, step=0, tensor="w", start=333)
    assert torch.equal(whole[333:], part)


@EVERY_LAW
def test_elements_are_uncorrelated_at_every_distance(law):
    z = draw(num=NUM + 2048, law=law)
    head = z[:NUM]
    scores = [z_of_correlation(head, z[lag : lag + NUM]) for lag in [*range(1, 65), 100, 128, 256, 1000, 1024, 2048]]
    assert max(map(abs, scores)) < 4
    squared = (z.square() - 1) / z.square().std()
    scores = [z_of_correlation(squared[:NUM], squared[lag : lag + NUM]) for lag in range(1, 33)]
    assert max(map(abs, scores)) < 4


@EVERY_LAW
@pytest.mark.parametrize("what", ["seed", "step", "tensor"])
def test_streams_are_uncorrelated_and_not_shifted_copies(what, law):
    first = draw(law=law)
    for other in (1, 2, 3, 64, 10**9):
        second = draw(**{what: other}, law=law)
        assert abs(z_of_correlation(first, second)) < 4
        assert abs(z_of_correlation(first.square() - 1, second.square() - 1)) < 8
        for lag in range(1, 9):  # `hash(2 i + seed)` makes the next stream a copy that runs ahead
            assert abs(z_of_correlation(first[lag:], second[:-lag])) < 4.5
            assert abs(z_of_correlation(first[:-lag], second[lag:])) < 4.5


def test_the_noise_of_one_element_over_time_is_normal_too():
    over_steps = torch.stack([normal(8, seed=0, step=k, tensor=0, dtype=torch.float64) for k in range(4000)])
    assert kolmogorov(over_steps.flatten()) < 1.95
    for lag in range(1, 9):
        assert abs(z_of_correlation(over_steps[lag:].flatten(), over_steps[:-lag].flatten())) < 4
    over_names = torch.stack([normal(8, seed=0, step=0, tensor=f"layer.{k}", dtype=torch.float64) for k in range(4000)])
    assert kolmogorov(over_names.flatten()) < 1.95


@given(start=st.integers(0, 3 * CHUNK), num=st.integers(0, 300), step=st.integers(0, 2**40))
@settings(max_examples=40, deadline=None)
def test_a_part_is_the_part_of_the_whole_bit_for_bit(start, num, step):
    long = normal(start % 1000 + num, seed=1, step=step, tensor="w", start=start - start % 1000)
    part = normal(num, seed=1, step=step, tensor="w", start=start)
    assert torch.equal(long[start % 1000 :], part)


def test_chunks_leave_no_seam():
    whole = normal(2 * CHUNK + 5, seed=0, step=0, tensor=0)
    assert torch.equal(whole[CHUNK - 3 : CHUNK + 4], normal(7, seed=0, step=0, tensor=0, start=CHUNK - 3))
    assert whole.unique().numel() > 0.95 * whole.numel()


def test_a_tensor_counts_in_rows_whatever_its_strides():
    plain = torch.zeros(6, 4)
    turned = torch.zeros(4, 6).T
    keys = {"seed": 0, "step": 0, "tensor": 0}
    assert torch.equal(normal_like(plain, **keys), normal_like(turned, **keys))
    assert normal_like(torch.zeros(3, 0), **keys).shape == (3, 0)
    assert normal_like(torch.zeros(()), **keys).shape == ()


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    draw(num=10)
    assert torch.equal(before, torch.get_rng_state())
