"""Measurements for people: the newest number of every metric, its interval, its floor, and one sentence each.

Rows are read as they lie in the run (`Run.measurements`); a row that is not a measurement is left out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

MEANINGS = {
    "frechet": (
        "Distance between drawn and real pictures",
        "Compares the average and the spread of both sets of pictures; 0 would be no difference.",
    ),
    "kernel": (
        "Distance, second opinion",
        "Compares both sets picture by picture, in pairs; around 0 (even slightly below) means no difference is seen.",
    ),
    "precision": ("Look real", "Share of drawn pictures that lie among the real ones; low means many odd pictures."),
    "recall": ("Variety", "Share of real pictures that lie among the drawn ones; low means kinds are missing."),
    "density": (
        "Look typical",
        "How many real pictures each drawn one has around it; 1 is what real pictures have, more is safe but bland.",
    ),
    "coverage": ("Kinds reached", "Share of real pictures with a drawn one close by; low means kinds are missing."),
    "vendi": (
        "Variety, beside real pictures",
        "How many different pictures there effectively are, divided by the same for real ones; 1 is as varied.",
    ),
    "gaussian_kernel": ("Distance, third opinion", "Like the second, with another measure of what is alike; near 0."),
    "sliced": ("Distance, direction by direction", "Compares both sets along many directions one by one; 0 is equal."),
    "frechet_infinity": (
        "Distance, freed from chance",
        "What the first distance would be with endless pictures, so that small samples do not make it look worse.",
    ),
    "intra_class_frechet": (
        "Distance within classes",
        "The first distance for every class by itself, then their mean; it sees one class standing for all.",
    ),
    "inception_score": ("Inception score", "Clear and varied classes score high; it looks at no real picture at all."),
    "spectrum": (
        "Coarse and fine",
        "How far the mix of coarse and fine detail is from that of real pictures, in decibels; shows blur and grids.",
    ),
    "copy_ratio": (
        "Own ideas or copies",
        "How far drawn pictures keep from the training pictures, beside how far new real ones do; "
        "about 1 is right, well below 1 means copying.",
    ),
    "authenticity": (
        "Own pictures",
        "Share of drawn pictures further from their nearest training picture than that one is from its own neighbours; "
        "read it beside what new real pictures give.",
    ),
    "copies_per_thousand": (
        "Copies in a thousand",
        "Drawn pictures nearer to a training picture than 99 % of new real ones are, less the ten expected by chance; "
        "below 0 there are fewer than that.",
    ),
    "copy_test": (
        "Test for copying",
        "Around 0 is right; below -3 the drawn pictures lie too close to training pictures, far above 3 too far away.",
    ),
    "label_accuracy": (
        "Draws what is asked for",
        "Share of drawn pictures in which an independent classifier sees the class that was asked for.",
    ),
    "mse": ("Mean squared error", "Average squared difference of a pixel, on a scale from -1 (black) to 1 (white)."),
    "rmse": ("Root mean squared error", "Typical difference of a pixel, on the same scale; large ones weigh more."),
    "mae": ("Mean absolute error", "Average difference of a pixel, on a scale from -1 (black) to 1 (white)."),
    "psnr": ("Signal to noise", "The squared error in decibels: 20 is rough, 30 is good, 40 is hard to tell apart."),
    "ssim": ("Structure kept", "Likeness of structure, brightness and contrast in small windows: 1 is the same."),
    "ms_ssim": ("Structure kept, coarse to fine", "The same at several sizes of window: 1 is the same."),
    "r2": ("Explained", "Share of what makes pictures differ that is given back: 1 is all, 0 no more than their mean."),
}
BEST = {
    "copy_ratio": "about 1 is best",
    "density": "about 1 is best",
    "kernel": "near 0 is best",
    "gaussian_kernel": "near 0 is best",
    "copy_test": "about 0 is best",
    "vendi": "about 1 is best",
    "authenticity": "as real ones is best",
}
"""Where neither "lower" nor "higher is better" is true all the way."""

PIXEL_ERRORS = ("mse", "rmse", "mae", "psnr", "r2", "ssim", "ms_ssim")


@dataclass(frozen=True)
class Measured:
    """One metric as the page shows it; numbers are text already, "" where there is none.

    features: what sees the pictures, "" where only one such row is shown.
    """

    metric: str
    features: str
    name: str
    meaning: str
    better: str
    value: str
    interval: str
    floor: str
    ratio: str
    n: str
    origin: Mapping[str, str]


def tables(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Measured]]:
    """The newest measurement of every metric and feature space, by what it looks at; no empty tables.

    >>> row = {"metric": "precision", "value": 0.5, "n": 100, "n_reference": 100, "features": "classifier"}
    >>> [(m.name, m.value) for m in tables([{**row, "value": 0.1}, row])["drawn"]]
    [('Look real', '0.5')]
    """
    newest = {
        (row["metric"], row.get("features")): row
        for row in rows
        if isinstance(row.get("metric"), str) and _number(row.get("value")) is not None
    }
    often = Counter(metric for metric, _ in newest)
    found: dict[str, list[Measured]] = {}
    for row in newest.values():
        table = found.setdefault("given back" if row["metric"] in PIXEL_ERRORS else "drawn", [])
        table.append(_measured(row, str(row.get("features")) if often[row["metric"]] > 1 else ""))
    return found


def _measured(row: Mapping[str, Any], features: str) -> Measured:
    metric = row["metric"]
    name, meaning = MEANINGS.get(metric, (metric.replace("_", " "), ""))
    low, high = _text(row.get("low")), _text(row.get("high"))
    ratio = _number(row.get("ratio"))
    counts = [f"{row[key]:,}" for key in ("n", "n_reference") if isinstance(row.get(key), int)]
    return Measured(
        metric=metric,
        features=features,
        name=name,
        meaning=meaning,
        better=BEST.get(metric, "lower is better" if row.get("lower_is_better", True) else "higher is better"),
        value=_text(row["value"]),
        interval=f"{low} to {high}" if low and high else "",
        floor=_text(row.get("floor")),
        ratio="" if ratio is None else f"{ratio:.2f}",
        n=counts[0] if len(set(counts)) == 1 else " / ".join(counts),
        origin=_origin(row),
    )


def _origin(row: Mapping[str, Any]) -> dict[str, str]:
    """Where a number comes from; hashes are cut to 12 digits, as comparing needs no more."""
    details, options = (found if isinstance(found := row.get(key), Mapping) else {} for key in ("details", "options"))
    measured_sec = _number(row.get("unix_sec"))
    origin = {
        "seen by": row.get("features"),
        "its weights": str(row.get("features_hash") or "")[:12],
        "reference": row.get("reference"),
        "its pixels": str(row.get("reference_hash") or "")[:12],
        "model weights": str(row.get("weights_hash") or "")[:12],
        "floor from": details.get("floor"),
        "seed": row.get("seed"),
        "drawn with": ", ".join(f"{key} {value}" for key, value in options.items()),
        "took": f"{seconds:.1f} s" if (seconds := _number(row.get("seconds"))) is not None else "",
        "measured": datetime.fromtimestamp(measured_sec, UTC).strftime("%Y-%m-%d %H:%M UTC") if measured_sec else "",
    }
    return {key: str(value) for key, value in origin.items() if value not in (None, "")}


def _number(value: Any) -> float | None:
    """A number as a measurement stores it: what is not finite is text there; NaN is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return None if math.isnan(number) else number


def _text(value: Any) -> str:
    number = _number(value)
    return "" if number is None else f"{number:.4g}"
