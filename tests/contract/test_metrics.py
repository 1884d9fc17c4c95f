"""What every metric promises: found by listing the package, not by naming them."""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil

import pytest
import torch

import imagekiln.metrics
from imagekiln.core import Metric
from imagekiln.errors import DataError
from imagekiln.metrics import DEFAULT, Statistics, interval


def listed():
    found = {}
    for info in pkgutil.iter_modules(imagekiln.metrics.__path__):
        module = importlib.import_module(f"imagekiln.metrics.{info.name}")
        for name, cls in inspect.getmembers(module, inspect.isclass):
            if cls.__module__ == module.__name__ and hasattr(cls, "lower_is_better") and hasattr(cls, "ideal"):
                found[name] = cls
    return found


METRICS = listed()
every_metric = pytest.mark.parametrize("cls", METRICS.values(), ids=METRICS.keys())


def normal(n, d, seed, shift=0.0):
    return Statistics.of(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift)


def test_the_default_suite_is_listed_and_names_are_unique():
    assert {type(metric) for metric in DEFAULT} <= set(METRICS.values())
    assert len({cls.name for cls in METRICS.values()}) == len(METRICS) >= 6


@every_metric
def test_is_a_metric_that_documents_itself(cls):
    metric = cls()
    assert isinstance(metric, Metric) and cls.__doc__ and metric.name == metric.name.lower()
    assert isinstance(metric.lower_is_better, bool) and metric.bounds[0] <= metric.ideal <= metric.bounds[1]


@every_metric
def test_equal_sets_score_the_ideal(cls):
    """Exactly, up to the 1 / N by which an unbiased estimate of equal sets falls below zero."""
    same = normal(1500, 4, 0)
    assert cls()(same, same) == pytest.approx(cls.ideal, abs=0.05)


@every_metric
def test_points_the_way_it_says(cls):
    reference, near, far = normal(200, 4, 0), normal(200, 4, 1), normal(200, 4, 2, shift=3.0)
    metric = cls()
    assert (metric(near, reference) < metric(far, reference)) == metric.lower_is_better


@every_metric
def test_finite_and_in_bounds_with_fewer_pictures_than_features(cls):
    metric = cls()
    value = metric(normal(12, 64, 0), normal(14, 64, 1))
    assert isinstance(value, float) and math.isfinite(value) and metric.bounds[0] <= value <= metric.bounds[1]


@every_metric
def test_order_does_not_show(cls):
    generated, reference = normal(90, 5, 0, 0.3), normal(80, 5, 1)
    moved = Statistics.of(generated.features.flip(0)), Statistics.of(reference.features.roll(11, 0))
    assert cls()(*moved) == pytest.approx(cls()(generated, reference), rel=1e-6, abs=1e-9)


@every_metric
def test_identical_pictures_give_a_number(cls):
    """A fully collapsed generator must be measurable."""
    collapsed = Statistics.of(torch.ones(40, 3))
    found = interval(cls(), collapsed, normal(40, 3, 0))
    assert all(math.isfinite(x) for x in found)


@every_metric
def test_refuses_too_few_pictures_and_other_features(cls):
    metric, enough = cls(), normal(30, 3, 0)
    few = normal(metric.min_n - 1, 3, 1)
    for sides in ((few, enough), (enough, few), (Statistics(3), enough)):
        with pytest.raises(DataError, match="needs at least"):
            metric(*sides)
    with pytest.raises(DataError, match="same network"):
        metric(enough, normal(30, 4, 0))


@every_metric
def test_interval_holds_the_value(cls):
    found = interval(cls(), normal(60, 4, 0, 0.5), normal(60, 4, 1))
    assert found.low <= found.value <= found.high and found.low < found.high
