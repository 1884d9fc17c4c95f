"""Statistics: streaming, order, batch size, refusal of what is not a number."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from imagekiln.errors import DataError
from imagekiln.metrics import Statistics
from imagekiln.metrics.statistics import remarks

ROWS = hnp.arrays(
    "float32",
    st.tuples(st.integers(2, 40), st.integers(1, 6)),
    elements=st.floats(-1e3, 1e3, width=32),
)


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, seed=st.integers(0, 2**31), batch=st.integers(1, 50))
def test_order_and_batch_size_do_not_show(rows, seed, batch):
    features = torch.from_numpy(rows)
    whole = Statistics.of(features)
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    streamed = Statistics(features.shape[1])
    for part in features[order].split(batch):
        streamed.update(part)
    scale = 1e-9 * (1.0 + float(features.double().square().max()))
    assert streamed.n == whole.n
    torch.testing.assert_close(streamed.mean, whole.mean, rtol=0, atol=scale)
    torch.testing.assert_close(streamed.covariance, whole.covariance, rtol=0, atol=scale)


@settings(max_examples=40, deadline=None)
@given(rows=ROWS)
def test_moments_are_the_textbook_ones(rows):
    features = torch.from_numpy(rows)
    statistics, n, d = Statistics.of(features), *features.shape
    mean = [sum(float(features[i, a]) for i in range(n)) / n for a in range(d)]
    tolerance = 1e-9 * (1.0 + float(features.double().square().max()))
    for a in range(d):
        assert float(statistics.mean[a]) == pytest.approx(mean[a], abs=tolerance)
        for b in range(d):
            product = sum((float(x[a]) - mean[a]) * (float(x[b]) - mean[b]) for x in features) / (n - 1)
            assert float(statistics.covariance[a, b]) == pytest.approx(product, abs=tolerance)


def test_a_large_offset_does_not_cancel():
    noise = torch.randint(-4, 5, (3000, 3), generator=torch.Generator().manual_seed(0)).float()
    offset = 2.0**20  # float32 holds offset + noise exactly
    torch.testing.assert_close(
        Statistics.of(noise + offset).covariance, Statistics.of(noise).covariance, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_refuses_what_is_not_a_number(bad):
    rows = torch.zeros(5, 2)
    rows[3, 1] = bad
    with pytest.raises(DataError, match=r"1 of 5 pictures are NaN or infinite, the first of them picture 3 \("):
        Statistics(2).update(rows)
    named = Statistics(2, "generated").update(torch.zeros(4, 2))
    with pytest.raises(DataError, match=r"of the generated set are NaN or infinite, the first of them picture 7 \("):
        named.update(rows)
    assert named.n == 4, "a refused update leaves nothing behind"


def test_remarks_name_what_makes_numbers_odd():
    rows = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    whole, repeated = Statistics.of(rows), Statistics.of(torch.cat([rows[:250], rows[:50]]))
    assert remarks(whole, whole) == [] and repeated.num_distinct == 250
    (said,) = remarks(repeated, whole)
    assert said.startswith("50 of 300 generated pictures repeat")
    (said,) = remarks(whole, Statistics.of(torch.ones(40, 2)))
    assert said.startswith("All 40 reference pictures have the same features")
    (said,) = remarks(Statistics.of(torch.eye(3)), Statistics.of(torch.eye(3)))
    assert "3 pictures do not span the space of 3 features" in said


@pytest.mark.parametrize("shape", [(5,), (5, 3), (1, 5, 2)])
def test_refuses_another_shape(shape):
    with pytest.raises(DataError, match=r"needs \(pictures, 2\)"):
        Statistics(2).update(torch.zeros(shape))


def test_empty_and_single_have_no_covariance():
    with pytest.raises(DataError, match="There are 0 pictures"):
        _ = Statistics(2).mean
    with pytest.raises(DataError, match="There are 1 pictures"):
        _ = Statistics(2).update(torch.zeros(1, 2)).covariance


def test_subset_keeps_order_and_takes_masks():
    statistics = Statistics(1).update(torch.arange(3.0)[:, None]).update(torch.arange(3.0, 6.0)[:, None])
    assert statistics.subset([4, 0]).features.flatten().tolist() == [4.0, 0.0]
    assert statistics.subset(torch.tensor([0, 1, 0, 0, 0, 1]).bool()).features.flatten().tolist() == [1.0, 5.0]


def test_update_after_reading_moments_counts_and_copies_its_input():
    rows = torch.zeros(2, 1)
    statistics = Statistics(1).update(rows)
    assert float(statistics.mean) == 0.0
    rows += 7.0
    assert float(statistics.features.sum()) == 0.0
    assert float(statistics.update(torch.full((2, 1), 4.0)).mean) == 2.0


def test_hash_names_the_contents():
    rows = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    split = Statistics(2).update(rows[:2]).update(rows[2:])
    assert Statistics.of(rows).hash == split.hash != Statistics.of(rows.flip(0)).hash
    assert Statistics.of(rows.reshape(4, 3)).hash != split.hash
