"""Intervals, measurements and the suite."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imagekiln.errors import DataError, UsageError
from imagekiln.metrics import (
    Coverage,
    FrechetDistance,
    KernelDistance,
    Measurement,
    Provenance,
    Statistics,
    comparable,
    interval,
    measure,
)


def pair(seed, n=150, d=6, scale=1.2, shift=0.3):
    generator = torch.Generator().manual_seed(seed)
    return [Statistics.of(torch.randn(n, d, generator=generator) * s + m) for s, m in ((scale, shift), (1.0, 0.0))]


class MeanGap:
    """A linear statistic, for which the jackknife's standard error is the textbook one."""

    name = "gap"
    lower_is_better = True

    def __call__(self, generated, reference):
        return float((generated.mean - reference.mean)[0])


def test_standard_error_of_a_mean_is_the_textbook_one():
    generated, reference = pair(0, n=4000, d=1)
    found = interval(MeanGap(), generated, reference, parts=200)
    textbook = float((generated.covariance + reference.covariance)[0, 0] / 4000) ** 0.5
    assert found.standard_error == pytest.approx(textbook, rel=0.12)
    assert found.low < found.value < found.high


@pytest.mark.parametrize("metric", [FrechetDistance(), KernelDistance()])
def test_covers_the_expectation_at_this_n_in_about_95_of_100(metric):
    expectation = sum(metric(*pair(10_000 + seed)) for seed in range(300)) / 300
    found = [interval(metric, *pair(seed)) for seed in range(100)]
    assert 90 <= sum(i.low <= expectation <= i.high for i in found) <= 99
    spread = float(torch.tensor([i.value for i in found]).std())
    mean_error = sum(i.standard_error for i in found) / 100
    assert 0.85 * spread < mean_error < 1.5 * spread


def test_coverage_interval_is_not_too_narrow_and_stays_in_bounds():
    metric = Coverage()
    expectation = sum(metric(*pair(10_000 + seed)) for seed in range(60)) / 60
    found = [interval(metric, *pair(seed)) for seed in range(40)]
    assert sum(i.low <= expectation <= i.high for i in found) >= 36
    assert all(0.0 <= i.low <= i.value <= i.high <= 1.0 for i in found)


def test_interval_needs_a_picture_a_part():
    generated, reference = pair(0, n=19)
    with pytest.raises(DataError, match="needs at least 20"):
        interval(FrechetDistance(), generated, reference)


def test_measure_cuts_to_one_size_and_says_so():
    generated, reference = pair(0, n=80)[0], pair(0, n=60)[1]
    real = pair(1, n=50, scale=1.0, shift=0.0)[0]
    found = measure(generated, reference, real, Provenance("classifier", "abc", "digits"), seed=3)
    assert [m.metric for m in found] == ["frechet", "kernel", "precision", "recall", "density", "coverage"]
    assert {(m.n, m.n_reference) for m in found} == {(50, 50)}
    for m in found:
        assert m.details["generated_given"] == 80 and m.details["reference_given"] == 60
        assert m.low <= m.value <= m.high and math.isfinite(m.floor) and m.seconds > 0.0
        assert m.ratio is None if m.floor <= 0 else m.ratio == m.value / m.floor
        assert m.provenance.reference_hash == reference.hash
        assert Measurement.from_json(m.to_json()) == m
    assert found[0].label == "FD[classifier]" and found[0].ratio > 1.0
    again = measure(generated, reference, real, Provenance("classifier", "abc", "digits"), seed=3)
    assert [(m.value, m.low, m.floor) for m in again] == [(m.value, m.low, m.floor) for m in found]


def test_floor_is_the_metric_between_real_sets():
    generated, reference = pair(0, n=60)
    real = pair(1, n=60, scale=1.0, shift=0.0)[1]
    for metric, m in zip((FrechetDistance(), Coverage()), measure(generated, reference, real)[::5], strict=True):
        assert (m.value, m.floor) == (metric(generated, reference), metric(real, reference))
    assert measure(generated, reference)[0].floor is None


A = Measurement("frechet", 3.0, 100, 100, Provenance("classifier", "abc", "digits", "def", "w1"), seed=1)


def test_only_like_is_comparable():
    assert comparable(A, dataclasses.replace(A, value=9.0, seed=2, floor=1.0)) is None
    others = [
        dataclasses.replace(A, metric="kernel"),
        dataclasses.replace(A, n=99),
        dataclasses.replace(A, n_reference=99),
        dataclasses.replace(A, details={"settings": {"k": 3}}),
        *(
            dataclasses.replace(A, provenance=dataclasses.replace(A.provenance, **{name: "x"}))
            for name in ("features", "features_hash", "reference", "reference_hash")
        ),
    ]
    reasons = [comparable(A, other) for other in others]
    assert all(reason.startswith("different ") for reason in reasons) and len(set(reasons)) == len(reasons)
    assert (
        comparable(A, dataclasses.replace(A, provenance=dataclasses.replace(A.provenance, weights_hash="w2"))) is None
    )


NUMBERS = st.one_of(st.none(), st.floats(allow_nan=False))


@settings(deadline=None)
@given(value=st.floats(allow_nan=False), low=NUMBERS, ratio=NUMBERS, text=st.text(), n=st.integers(0, 10**9))
def test_json_line_round_trip(value, low, ratio, text, n):
    m = dataclasses.replace(A, value=value, low=low, ratio=ratio, n=n, details={"note": text})
    line = m.to_json()
    assert "\n" not in line and Measurement.from_json(line) == m
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@settings(deadline=None)
@given(line=st.one_of(st.text(), st.sampled_from(["[]", "{}", "1", "null", '{"metric": "frechet"}'])))
def test_any_other_line_is_a_clear_error(line):
    with pytest.raises(UsageError, match="not a measurement"):
        Measurement.from_json(line)


def test_never_called_fid():
    assert "FID" not in A.label and "KID" not in dataclasses.replace(A, metric="kernel").label
