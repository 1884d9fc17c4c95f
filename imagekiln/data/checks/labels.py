"""Checks of labels: classes with too few pictures, one picture under two labels, labels that look wrong.

A label is suspicious when a classifier that never saw the picture thinks it improbable: every fifth of the pictures is
judged by a logistic regression on `features`, fitted to the other four. With p(c | x) its probabilities and t_c the
mean of p(c | x) over the pictures labelled c ("confident learning", Northcutt, Jiang and Chuang 2021, arXiv
1911.00068), a picture labelled c is found when p(c | x) is below a threshold and another class has p > t. `suspicion`
ranks all.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator

import numpy as np

from imagekiln.data.checks.duplicates import duplicate, joined, near_pairs
from imagekiln.data.checks.features import BALANCE_F, NUM_FEATURES, features
from imagekiln.data.checks.thresholds import CleanConfig, Finding
from imagekiln.data.measures import small_copies
from imagekiln.data.survey import Survey

FOLDS = 5
FEWEST = 50
"""Labelled pictures a set must have, and `FOLDS` each class, before labels are judged by others."""
FITTED_ON = 8000
"""Pictures a classifier is fitted to at most; more hold it up and hardly make it better."""

_INVERSE_PENALTY = 3.0  # 10 and 30 put fewer planted swaps first, of flowers and of CIFAR-10
_MAX_ITERATIONS = 200
_BLOCK = 64
_LEAST_SPREAD = 1e-3


def few_in_class(survey: Survey, config: CleanConfig) -> list[Finding]:
    """The class has fewer than `min_in_class` pictures. value: pictures in the class."""
    labels = {index: label for index in survey.usable.tolist() if (label := survey.labels[index]) is not None}
    counts, least = Counter(labels.values()), config.min_in_class
    return [
        Finding("few_in_class", index, counts[label], least, f"class {label} has only {counts[label]} pictures")
        for index, label in labels.items()
        if counts[label] < least
    ]


def two_labels(survey: Survey, config: CleanConfig) -> list[Finding]:
    """The same or nearly the same picture under another label; both are found. value: labels of the group."""
    pairs = near_pairs(survey, config)
    equal = [(finding.index, finding.other) for finding in duplicate(survey, config)]
    near = list(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))
    group = joined(len(survey), equal + near)
    members: dict[int, list[int]] = {}
    for index in survey.usable.tolist():
        if survey.labels[index] is not None:
            members.setdefault(int(group[index]), []).append(index)
    found = []
    for rows in members.values():
        first: dict[str | None, int] = {}
        for index in rows:
            first.setdefault(survey.labels[index], index)
        if len(first) < 2:
            continue
        for index in rows:
            other = next(at for label, at in first.items() if label != survey.labels[index])
            reason = f"{survey.names[other]} is the same picture and labelled {survey.labels[other]}"
            found.append(Finding("two_labels", index, len(first), 1.0, reason, other))
    return sorted(found, key=lambda finding: finding.index)


def suspicious_label(survey: Survey, config: CleanConfig) -> list[Finding]:
    """A label less probable than `label_probability`, with another class beyond doubt. value: the label's probability.
    The most suspicious come first."""
    judged = _judged(survey)
    if judged is None:
        return []
    rows, given, probability, names = judged
    own = probability[np.arange(len(rows)), given]
    usual = np.array([own[given == each].mean() for each in range(len(names))])
    doubted = np.flatnonzero(own < config.label_probability)
    confident = np.where(probability[doubted] >= usual, probability[doubted], 0.0)
    confident[np.arange(len(doubted)), given[doubted]] = 0.0
    best = np.zeros(len(rows), np.int64)
    best[doubted] = confident.argmax(1)
    found = doubted[confident.max(1, initial=0.0) > 0]
    return [
        Finding(
            "suspicious_label",
            int(rows[at]),
            float(own[at]),
            config.label_probability,
            f"labelled {names[given[at]]}, looks like {names[best[at]]}",
        )
        for at in found[np.argsort(own[found], kind="stable")]
    ]


def suspicion(survey: Survey) -> np.ndarray:
    """1 - the probability of every given label: (N,) float32; NaN where there is no label to be judged."""
    out = np.full(len(survey), np.nan, np.float32)
    if (judged := _judged(survey)) is not None:
        rows, given, probability, _ = judged
        out[rows] = 1 - probability[np.arange(len(rows)), given]
    return out


def _judged(survey: Survey) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]] | None:
    """(files, given class of each, probability of every class, names); None where there is too little to learn from."""
    labels = {index: label for index in survey.usable.tolist() if (label := survey.labels[index]) is not None}
    counts = Counter(labels.values())
    names = sorted(label for label, count in counts.items() if count >= FOLDS)
    number = {name: at for at, name in enumerate(names)}
    rows = np.array([index for index, label in labels.items() if label in number], np.int64)
    if len(names) < 2 or len(rows) < FEWEST:
        return None
    given = np.array([number[labels[index] or ""] for index in rows.tolist()])
    fold = _folds(given)
    models = [_fitted(survey, rows[fold != each], given[fold != each]) for each in range(FOLDS)]
    probability = np.zeros((len(rows), len(names)), np.float32)
    for part, seen in _blocks(survey, rows):
        for each, (weights, offset, present) in enumerate(models):
            mine = np.flatnonzero(fold[part] == each)
            logits = seen[mine] @ weights + offset
            odds = np.exp(logits - logits.max(1, keepdims=True))
            probability[np.ix_(part[mine], present)] = odds / odds.sum(1, keepdims=True)
    return rows, given, probability, names


def _folds(given: np.ndarray) -> np.ndarray:
    """A fold for each picture, every class dealt evenly in a fixed random order."""
    order = np.random.default_rng(0).permutation(len(given))
    order = order[np.argsort(given[order], kind="stable")]
    fold = np.empty(len(given), np.int64)
    fold[order] = np.arange(len(given)) % FOLDS
    return fold


def _fitted(survey: Survey, rows: np.ndarray, given: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights, offset and classes of a logistic regression on standardised features, for features as they are."""
    from sklearn.exceptions import ConvergenceWarning  # imported late: scikit-learn takes a second to load
    from sklearn.linear_model import LogisticRegression

    if len(rows) > FITTED_ON:
        chosen = np.random.default_rng(1).choice(len(rows), FITTED_ON, replace=False)
        rows, given = rows[chosen], given[chosen]
    seen = np.empty((len(rows), NUM_FEATURES), np.float32)
    for part, block in _blocks(survey, rows):
        seen[part] = block
    mean = seen.mean(0)
    seen -= mean
    scale = BALANCE_F / (np.sqrt(np.einsum("nf,nf->f", seen, seen) / len(seen)) + _LEAST_SPREAD)
    seen *= scale
    model = LogisticRegression(C=_INVERSE_PENALTY, max_iter=_MAX_ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # stopped early it is a smoother classifier, no worse here
        model.fit(seen, given)
    weights, offset = model.coef_.T, model.intercept_
    if weights.shape[1] == 1:  # two classes: scikit-learn keeps the weights of the second alone
        weights, offset = np.concatenate([-weights, weights], 1) / 2, np.array([-offset[0], offset[0]]) / 2
    weights = weights * scale[:, None]
    return weights, offset - mean @ weights, model.classes_


def _blocks(survey: Survey, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(positions in rows, their features) block by block."""
    for start in range(0, len(rows), _BLOCK):
        part = np.arange(start, min(start + _BLOCK, len(rows)))
        yield part, features(small_copies(survey.thumbs, rows[part]))
