"""The words: seeds that never change, progress, phases."""

from __future__ import annotations

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from imagekiln.core import Phase, Progress, mix, seeded_noise

keys = st.lists(st.integers() | st.text(), max_size=4)


def test_mix_is_pinned() -> None:
    """Every run ever made depends on these numbers: they may never change."""
    assert mix() == 6510301506637419378
    assert mix(0) == 3581690635855307741
    assert mix("0") == 5199204929721980132
    assert mix(0, "order", 3) == 1855528780364446383


@given(keys)
@example(["caf\udce9.png"])
def test_mix_is_a_63_bit_number_and_repeatable(some: list) -> None:
    assert mix(*some) == mix(*some) and 0 <= mix(*some) < 2**63


@given(keys, keys)
def test_other_keys_other_seeds(some: list, others: list) -> None:
    assert (mix(*some) == mix(*others)) == (some == others) or "\x1f" in "".join(map(str, some + others))


def test_a_number_is_not_its_text() -> None:
    assert len({mix(1), mix("1"), mix(1, 1), mix(11), mix("1", 1)}) == 5


@given(st.lists(st.integers(0, 2**62), min_size=1, max_size=5), st.integers(0, 4))
def test_noise_belongs_to_its_seed(seeds: list[int], index: int) -> None:
    index %= len(seeds)
    together = seeded_noise(seeds, (2, 3))
    assert together.shape == (len(seeds), 2, 3) and together.dtype == torch.float32
    assert torch.equal(together[index], seeded_noise([seeds[index]], (2, 3))[0])


def test_noise_is_standard_normal_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    noise = seeded_noise(range(2000), (8,))
    assert torch.equal(before, torch.get_rng_state())
    assert abs(float(noise.mean())) < 0.03 and abs(float(noise.std()) - 1) < 0.03
    assert seeded_noise([], (4, 4)).shape == (0, 4, 4)


@given(st.integers(0, 10**9), st.integers(0, 10**9))
def test_the_fraction_stays_within_the_run(nimg: int, total: int) -> None:
    assert 0 <= Progress(nimg, total).fraction <= 1


def test_phases_that_train_the_same_modules_share_an_optimizer() -> None:
    assert Phase("a", ("encoder", "decoder")).optimizer == Phase("b", ("decoder", "encoder"), every=4).optimizer
