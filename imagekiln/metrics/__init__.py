"""Metrics of generated and reconstructed pictures: pure functions of features and pixels, with intervals and floors.

Features come from a network (`extract`), statistics are gathered once (`Statistics`), a metric is a formula over two
finished statistics, and `measure` computes them all with a 95 % interval, a real-versus-real floor and provenance.
Nothing here trains, reads runs or downloads weights.

>>> import torch
>>> from imagekiln.metrics import FrechetDistance, RandomConv, Statistics, extract
>>> network, pictures = RandomConv((1, 8, 8)), torch.zeros(4, 1, 8, 8)
>>> statistics = Statistics.of(extract(network, [pictures]))
>>> FrechetDistance()(statistics, statistics)
0.0
"""

from imagekiln.metrics.features import FeatureNetwork, RandomConv, extract, weights_hash
from imagekiln.metrics.frechet import FrechetDistance
from imagekiln.metrics.interval import Interval, interval
from imagekiln.metrics.kernel import KernelDistance
from imagekiln.metrics.manifest import Measurement, Provenance, comparable
from imagekiln.metrics.manifold import (
    Coverage,
    Density,
    ManifoldScores,
    Precision,
    Recall,
    expected_coverage,
    manifold_scores,
)
from imagekiln.metrics.memorization import CopyRatio, Neighbours, copy_ratios, nearest
from imagekiln.metrics.regression import Regression
from imagekiln.metrics.share import wilson
from imagekiln.metrics.statistics import Statistics
from imagekiln.metrics.suite import DEFAULT, measure

__all__ = [
    "DEFAULT",
    "CopyRatio",
    "Coverage",
    "Density",
    "FeatureNetwork",
    "FrechetDistance",
    "Interval",
    "KernelDistance",
    "ManifoldScores",
    "Measurement",
    "Neighbours",
    "Precision",
    "Provenance",
    "RandomConv",
    "Recall",
    "Regression",
    "Statistics",
    "comparable",
    "copy_ratios",
    "expected_coverage",
    "extract",
    "interval",
    "manifold_scores",
    "measure",
    "nearest",
    "weights_hash",
    "wilson",
]
