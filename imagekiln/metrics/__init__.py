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

from imagekiln.metrics.conditional import ClassScore, IntraClass, intra_class
from imagekiln.metrics.extrapolation import Extrapolation, FrechetInfinity, frechet_infinity
from imagekiln.metrics.features import FeatureNetwork, RandomConv, extract, weights_hash
from imagekiln.metrics.frechet import FrechetDistance
from imagekiln.metrics.gaussian_kernel import GaussianKernelDistance, median_distance
from imagekiln.metrics.inception_score import InceptionScore, inception_score
from imagekiln.metrics.interval import Halves, Interval, interval
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
    precision_recall_curve,
)
from imagekiln.metrics.memorization import (
    Authenticity,
    CopyRatio,
    CopyTest,
    Memorization,
    Neighbours,
    Search,
    Share,
    authenticity,
    copies_per_thousand,
    copy_ratios,
    copy_test,
    memorization,
    nearest,
    search,
)
from imagekiln.metrics.path_length import PathLength, PathLengthSetting, path_length
from imagekiln.metrics.pyramid import PyramidDistance, pyramid_distance
from imagekiln.metrics.regression import Regression
from imagekiln.metrics.share import wilson
from imagekiln.metrics.similarity import Similarity
from imagekiln.metrics.sliced import SlicedDistance
from imagekiln.metrics.spectrum import Spectrum, SpectrumComparison, compare_spectra
from imagekiln.metrics.statistics import Statistics, remarks
from imagekiln.metrics.suite import BUNDLES, DEFAULT, measure, metrics_named
from imagekiln.metrics.tables import table
from imagekiln.metrics.vendi import Vendi, vendi_of_kernel, vendi_score

__all__ = [
    "BUNDLES",
    "DEFAULT",
    "Authenticity",
    "ClassScore",
    "CopyRatio",
    "CopyTest",
    "Coverage",
    "Density",
    "Extrapolation",
    "FeatureNetwork",
    "FrechetDistance",
    "FrechetInfinity",
    "GaussianKernelDistance",
    "Halves",
    "InceptionScore",
    "Interval",
    "IntraClass",
    "KernelDistance",
    "ManifoldScores",
    "Measurement",
    "Memorization",
    "Neighbours",
    "PathLength",
    "PathLengthSetting",
    "Precision",
    "Provenance",
    "PyramidDistance",
    "RandomConv",
    "Recall",
    "Regression",
    "Search",
    "Share",
    "Similarity",
    "SlicedDistance",
    "Spectrum",
    "SpectrumComparison",
    "Statistics",
    "Vendi",
    "authenticity",
    "comparable",
    "compare_spectra",
    "copies_per_thousand",
    "copy_ratios",
    "copy_test",
    "expected_coverage",
    "extract",
    "frechet_infinity",
    "inception_score",
    "interval",
    "intra_class",
    "manifold_scores",
    "measure",
    "median_distance",
    "memorization",
    "metrics_named",
    "nearest",
    "path_length",
    "precision_recall_curve",
    "pyramid_distance",
    "remarks",
    "search",
    "table",
    "vendi_of_kernel",
    "vendi_score",
    "weights_hash",
    "wilson",
]
