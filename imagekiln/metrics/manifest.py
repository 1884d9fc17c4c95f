"""Measurements: a number with everything needed to believe it, reproduce it, and know what it may be ranked against.

One measurement is one line of JSON. Its label names the feature space, "FD[classifier]", since a Frechet distance on
one network says nothing about another; "FID" and "KID" are reserved for the 2015 Inception features, and name the
protocol that brought the pictures there.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from imagekiln.errors import UsageError

SHORT_NAMES = {
    "frechet": "FD",
    "kernel": "KD",
    "frechet_infinity": "FD-infinity",
    "intra_class_frechet": "intra-class FD",
}
INCEPTION = "inception-2015"
PUBLISHED_NAMES = {"frechet": "FID", "kernel": "KID", "frechet_infinity": "FID-infinity"}
"""Names that only numbers on the 2015 Inception features may have."""
FLOATS = ("value", "low", "high", "floor", "ratio", "seconds")
NOT_FINITE = ("inf", "-inf", "nan")


@dataclass(frozen=True)
class Provenance:
    """Where the features of a measurement came from.

    features: name of the network; features_hash: sha256 of its weights.
    reference: name of the reference set; reference_hash: its fingerprint, or the hash of its features.
    weights_hash: of the weights that made the generated pictures; "" for a folder of pictures.
    """

    features: str
    features_hash: str = ""
    reference: str = ""
    reference_hash: str = ""
    weights_hash: str = ""


@dataclass(frozen=True)
class Measurement:
    """One metric, measured.

    value, low, high: the number and its 95 % interval (for the expected value at this n); None where there is none.
    n, n_reference: pictures on both sides that the number is computed from.
    floor: the same metric between two sets of real pictures, at the same n; ratio: value / floor, None where the floor
        is missing or not positive. 1 is as good as real pictures, whichever way the metric points.
    seconds: time the number took, its interval and floor included.
    """

    metric: str
    value: float
    n: int
    n_reference: int
    provenance: Provenance
    low: float | None = None
    high: float | None = None
    floor: float | None = None
    ratio: float | None = None
    lower_is_better: bool = True
    seed: int = 0
    seconds: float = 0.0
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The metric with its feature space.

        >>> Measurement("frechet", 3.5, 1000, 1000, Provenance("classifier")).label
        'FD[classifier]'
        >>> Measurement("frechet", 3.5, 1000, 1000, Provenance("inception-2015-clean-fid")).label
        'FID[clean-fid]'
        """
        features = self.provenance.features
        published = features.partition(INCEPTION)
        if published[1] and not published[0] and "float16" not in features:
            name = PUBLISHED_NAMES.get(self.metric, self.metric)
            return f"{name}[{published[2].removeprefix('-') or 'tf'}]"
        return f"{SHORT_NAMES.get(self.metric, self.metric)}[{features}]"

    def to_json(self) -> str:
        """One line of JSON; provenance is flattened into it, numbers that are not finite become strings.

        >>> line = Measurement("kernel", 0.25, 100, 100, Provenance("randconv-v1")).to_json()
        >>> Measurement.from_json(line).value
        0.25
        """
        record = dataclasses.asdict(self)
        record |= record.pop("provenance")
        return json.dumps(_finite(record), allow_nan=False, sort_keys=True)

    @classmethod
    def from_json(cls, line: str) -> Measurement:
        """The measurement `to_json` wrote. Raises UsageError for a line that is not one."""
        try:
            record = json.loads(line)
            origin = {f.name: record.pop(f.name) for f in dataclasses.fields(Provenance)}
            numbers = {name: None if record[name] is None else float(record[name]) for name in FLOATS}
            record["details"] = _numbers(record["details"])
            return cls(**{**record, **numbers}, provenance=Provenance(**origin))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UsageError(f"This line is not a measurement ({error}): {line[:80]!r}; evaluate again.") from error


def _finite(value: Any) -> Any:
    """Plain values in which floats that are not finite are text, as JSON has no numbers for them."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(value: Any) -> Any:
    """The inverse of `_finite`."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return float(value) if value in NOT_FINITE else value


def comparable(a: Measurement, b: Measurement) -> str | None:
    """Why two measurements may not be ranked against each other, or None when they may.

    >>> a = Measurement("frechet", 3.5, 1000, 1000, Provenance("classifier", "abc"))
    >>> comparable(a, dataclasses.replace(a, value=9.0)), comparable(a, dataclasses.replace(a, n=500))
    (None, 'different numbers of generated pictures: 1000 and 500; the metric depends on it')
    """
    questions = (
        ("metrics", a.metric, b.metric, ""),
        ("feature networks", a.provenance.features, b.provenance.features, ""),
        ("weights of the feature network", a.provenance.features_hash[:12], b.provenance.features_hash[:12], ""),
        ("reference sets", a.provenance.reference, b.provenance.reference, ""),
        ("contents of the reference set", a.provenance.reference_hash[:12], b.provenance.reference_hash[:12], ""),
        ("numbers of generated pictures", a.n, b.n, "; the metric depends on it"),
        ("numbers of reference pictures", a.n_reference, b.n_reference, "; the metric depends on it"),
        ("settings of the metric", a.details.get("settings"), b.details.get("settings"), ""),
    )
    for what, one, other, why in questions:
        if one != other:
            return f"different {what}: {one} and {other}{why}"
    return None
