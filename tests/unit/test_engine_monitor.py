"""Monitoring: planted drift is seen, its absence is not, and generation is compared with the day of release."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from imagekiln import api, data
from imagekiln.config import DataConfig
from imagekiln.engine import monitor as monitoring
from imagekiln.engine.monitor import BOTH, CHANGED, DRIFTED, Labels, Sample, compare_pictures, monitor
from imagekiln.engine.run import Run
from imagekiln.errors import UsageError
from imagekiln.metrics import RandomConv

REAL = Path(os.environ.get("IMAGEKILN_TEST_DATA", "/nowhere"))
SETS = {"digits": "builtin:digits", "fashion-mnist": "fashion-mnist", "cifar10": "cifar-10-batches-bin"}


class Pictures:
    """A labelled set to draw samples from without overlap."""

    def __init__(self, path: str) -> None:
        source = data.load(DataConfig(path=path, validation_fraction=0.0)).train
        rows = torch.randperm(len(source), generator=torch.Generator().manual_seed(1))[:4000].tolist()
        self.images, labels = source.read(rows)[:2]
        self.labels = torch.zeros(0) if labels is None else labels
        self.names = list(source.class_names)
        self.network = RandomConv(source.image_shape)

    def deal(self, seed: int, n: int = 500, without: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(seed))
        known = order if without is None else order[self.labels[order] != without]
        return known[:n], known[n : 2 * n]

    def sample(self, rows: torch.Tensor) -> Sample:
        return Sample(self.images[rows], self.labels[rows], [str(row) for row in rows.tolist()])

    def ask(self, new: Sample, reference: Sample, seed: int = 0, sheet: Path | None = None) -> monitoring.Drift:
        counts = [s.labels.bincount(minlength=len(self.names)).tolist() for s in (new, reference)]
        labels = Labels(new.labels, reference.labels, self.names, *counts)
        return compare_pictures(new, reference, self.network, "randconv-v1", labels, seed=seed, sheet=sheet)


@pytest.fixture(scope="module", params=list(SETS))
def pictures(request: pytest.FixtureRequest) -> Pictures:
    path = SETS[request.param]
    if not path.startswith("builtin:"):
        path = str(REAL / path)
        if not Path(path).exists():
            pytest.skip(f"{request.param} is not here; IMAGEKILN_TEST_DATA names the folder that holds it")
    return Pictures(path)


def p_values(drift: monitoring.Drift) -> dict[str, float]:
    return {row["question"]: row["adjusted"] for row in drift.questions}


def test_a_changed_mix_of_classes_is_seen(pictures: Pictures) -> None:
    new, reference = pictures.deal(0)
    replaced = new.clone()
    zeros = (pictures.labels == 0).nonzero().flatten()
    zeros = zeros[~torch.isin(zeros, torch.cat([new, reference]))][:100]
    replaced[: len(zeros)] = zeros
    drift = pictures.ask(pictures.sample(replaced), pictures.sample(reference))
    assert drift.drifted and p_values(drift)["mix of classes"] < 0.01
    assert any(f"class {pictures.names[0]!r}" in sentence for sentence in drift.sentences)


def test_brightness_is_seen_and_said(pictures: Pictures) -> None:
    new, reference = (pictures.sample(rows) for rows in pictures.deal(1))
    darker = (new.images.float() * 0.75).round().to(torch.uint8)
    drift = pictures.ask(new._replace(images=darker), reference)
    assert drift.drifted and p_values(drift)["brightness, contrast, ..."] < 0.01
    row = drift.qualities[0]
    own = float(reference.images.float().mean())
    assert row["quality"] == "brightness" and row["percent"] == pytest.approx(-25, abs=10)
    assert row["reference"] == pytest.approx(own, rel=0.1)
    assert any(s.startswith(f"The new pictures are darker by {abs(row['percent']):.0f} %") for s in drift.sentences)


def test_a_new_class_is_seen_and_named(pictures: Pictures, tmp_path: Path) -> None:
    new, reference = pictures.deal(2, without=9)
    unknown = (pictures.labels == 9).nonzero().flatten()[:50]
    new = torch.cat([unknown, new[50:]])
    drift = pictures.ask(pictures.sample(new), pictures.sample(reference), sheet=tmp_path / "novel.png")
    assert drift.drifted and p_values(drift)["mix of classes"] < 0.01
    assert any("were not there before" in s and repr(pictures.names[9]) in s for s in drift.sentences)
    assert drift.sheet and (tmp_path / "novel.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_unlike_any_other_comes_first() -> None:
    pictures = Pictures("builtin:digits")
    new, reference = (pictures.sample(rows) for rows in pictures.deal(3, n=200))
    new.images[7] = torch.tensor([0, 255], dtype=torch.uint8).repeat(32).view(1, 8, 8)
    drift = pictures.ask(new, reference)
    assert drift.novel[0]["file"] == new.files[7] and drift.novel[0]["p_value"] == pytest.approx(1 / 201)
    ratios = [row["ratio"] for row in drift.novel]
    assert len(ratios) == 20 and ratios == sorted(ratios, reverse=True)


def false_alarms(pictures: Pictures, draws: int) -> None:
    """The alarm is at alpha = 0.01; the band leaves out less than 1 in 10,000."""
    raised = 0
    for seed in range(draws):
        new, reference = (pictures.sample(rows) for rows in pictures.deal(100 + seed, n=100))
        found = compare_pictures(new, reference, pictures.network, "randconv-v1", None, alpha=0.05, seed=seed)
        raised += found.drifted
    assert raised <= 0.05 * draws + 4 * math.sqrt(draws * 0.05 * 0.95)


def test_no_false_alarms() -> None:
    false_alarms(Pictures("builtin:digits"), 20)


@pytest.mark.slow
def test_no_false_alarms_in_200_draws(pictures: Pictures) -> None:
    false_alarms(pictures, 200)


def test_qualities_of_known_pictures() -> None:
    red = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    red[:, 0] = 200
    brightness, contrast, sharpness, colour = monitoring.qualities(red)[0].tolist()
    assert (brightness, contrast, sharpness) == pytest.approx((0.299 * 200, 0, 0), abs=1e-9)
    assert colour == pytest.approx(200 * math.sqrt(2) / 3)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    settings = {
        "family": {"width": 8, "z_dim": 8},
        "train": {"total_kimg": 0.1, "batch": 32, "precision": "fp32"},
        "data": {"validation_fraction": 0.3},
    }
    return api.train("vae", "builtin:digits", tmp_path_factory.mktemp("run") / "run", settings=settings)


def test_generation_is_recorded_then_equal_then_changed(run: Run) -> None:
    first = monitor(run, release=True)
    assert first.generation is not None and first.generation["state"] == "recorded" and first.exit_code == 0
    again = monitor(run)
    assert again.generation is not None and again.generation["state"] == "equal"
    assert again.generation["max_difference"] == 0 and again.generation["feature_shift"] == pytest.approx(0, abs=1e-6)
    weights = run.weights()
    kept = weights.read_bytes()
    try:
        for factor, state, code in ((1 + 1e-5, "rounding", 0), (1.5, "changed", CHANGED)):
            _scale(weights, factor)
            found = monitor(run)
            assert found.generation is not None and found.exit_code == code
            assert found.generation["state"] in (state, "equal" if state == "rounding" else state)
            assert "weights_hash" in found.generation["different"]
            weights.write_bytes(kept)
    finally:
        weights.write_bytes(kept)
    states = [json.loads(json.dumps(monitoring.facts(w)))["generation"]["state"] for w in (first, again)]
    assert states == ["recorded", "equal"]


def _scale(path: Path, factor: float) -> None:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        about = file.metadata()
    scaled = {key: value * factor for key, value in load_file(path).items()}
    save_file(scaled, path, about)


def test_a_damaged_release_record_is_said(run: Run) -> None:
    monitor(run, release=True)
    path = next(run.path.glob("release.*"))
    tensors = {key: value.clone() for key, value in load_file(path).items()}  # no map of a file that is cut short
    kept = path.read_bytes()
    path.write_bytes(kept[: len(kept) // 2])
    with pytest.raises(UsageError, match="--release"):
        monitor(run)
    save_file({**tensors, "images": 255 - tensors["images"]}, path, {"about": '{"sha256": "0", "weights_hash": "0"}'})
    with pytest.raises(UsageError, match="damaged"):
        monitor(run)
    assert monitor(run, release=True).exit_code == 0


def test_codes_of_drift_and_change() -> None:
    def watch(drifted: bool, state: str) -> int:
        drift = monitoring.Drift(drifted, 0.01, 1, 1, "", [])
        return monitoring.Watch("run", "new", drift, {"state": state}).exit_code

    codes = [watch(False, "equal"), watch(True, "rounding"), watch(False, "changed"), watch(True, "changed")]
    assert codes == [0, DRIFTED, CHANGED, BOTH] == [0, 10, 11, 12]


def test_wrong_settings_are_refused(run: Run) -> None:
    with pytest.raises(UsageError, match="alpha"):
        monitor(run, "builtin:digits", alpha=0.0)
    with pytest.raises(UsageError, match="inception-v9"):
        monitor(run, "builtin:digits", features="inception-v9")
