"""Measuring runs and folders: real pictures score like real ones, broken ones do not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from imagekiln import api, data
from imagekiln.config import DataConfig, write_toml
from imagekiln.engine import compare, evaluate, judges, models
from imagekiln.engine import recipe as recipes
from imagekiln.engine.kept import keep, newest
from imagekiln.engine.run import Run
from imagekiln.errors import UsageError
from imagekiln.metrics import Measurement, Provenance, wilson


@pytest.fixture(scope="module")
def bench() -> evaluate.Bench:
    digits = data.load(DataConfig(path="builtin:digits"))
    return evaluate.Bench(digits, "auto", 0, lambda sentence: None, "nothing")


def by_name(rows: list) -> dict:
    return {row.metric: row for row in rows}


def test_labels_are_asked_for_in_the_shares_of_the_training_set(bench: evaluate.Bench) -> None:
    train = bench.dataset.train
    known = train.read(range(len(train))).labels
    shares = torch.bincount(known, minlength=10).double() / len(known)
    for count in (10, 137, 500):
        labels = torch.tensor(bench.labels(count))
        assert len(labels) == count and labels.tolist() == bench.labels(count)
        assert (torch.bincount(labels, minlength=10) - shares * count).abs().max() < 1
    assert labels.tolist() != sorted(labels.tolist())  # a part of them is a fair sample, too


def test_real_pictures_score_like_real_ones(bench: evaluate.Bench) -> None:
    train = bench.dataset.train
    rows = torch.randperm(len(train), generator=torch.Generator().manual_seed(5))[:400].tolist()
    batch = train.read(rows)
    found = by_name(bench.measure(batch.images, batch.labels.tolist()))
    assert found["label_accuracy"].value > 0.95
    assert found["label_accuracy"].floor > 0.95
    assert found["coverage"].value > 0.85 * found["coverage"].floor
    assert found["copy_ratio"].value == 0.0, "training pictures are copies of training pictures"


def test_held_out_pictures_are_no_copies(bench: evaluate.Bench) -> None:
    found = by_name(bench.measure(bench.dataset.validation.read(range(150)).images, None))
    assert found["copy_ratio"].low <= 1.0 <= found["copy_ratio"].high
    assert "label_accuracy" not in found


def test_noise_and_mode_loss_are_seen(bench: evaluate.Bench) -> None:
    noise = torch.randint(0, 256, (300, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    worse = by_name(bench.measure(noise, None))
    assert worse["frechet"].value > 5 * worse["frechet"].floor
    train = bench.dataset.train
    everything = train.read(range(len(train)))
    zeros = everything.images[everything.labels == 0]
    collapsed = by_name(bench.measure(zeros.repeat(4, 1, 1, 1)[:300], None))
    assert collapsed["coverage"].value < 0.3 * collapsed["coverage"].floor


def test_wrong_labels_are_seen(bench: evaluate.Bench) -> None:
    batch = bench.dataset.validation.read(range(150))
    found = by_name(bench.measure(batch.images, ((batch.labels + 1) % 10).tolist()))
    assert found["label_accuracy"].value < 0.05


def test_judge_is_trained_once_and_two_judges_differ(bench: evaluate.Bench) -> None:
    first, again, second = (judges.judge(bench.dataset, number, lambda sentence: None) for number in (0, 0, 1))
    assert first.weights == again.weights
    assert models.hash_of(first.weights) != models.hash_of(second.weights)


def test_a_run_keeps_its_measurements(tmp_path: Path) -> None:
    settings = {"family": {"width": 8, "z_dim": 8}, "train": {"total_kimg": 0.2, "batch": 32}}
    run = api.train("vae", "builtin:digits", tmp_path / "run", settings=settings)
    rows = api.evaluate(run, n=100, features="randconv")
    assert {"frechet", "coverage", "mse", "r2", "copy_ratio", "label_accuracy"} <= {row.metric for row in rows}
    kept = {label: one.measurement for label, one in newest(Run.open(tmp_path / "run")).items()}
    assert kept["FD[randconv-v1]"].value == next(row.value for row in rows if row.metric == "frechet")
    assert kept["FD[randconv-v1]"].provenance.weights_hash == evaluate.hash_of(run.weights())
    assert run.picture_path("neighbours").is_file()
    assert not any("FID" in label for label in kept), "only Inception features may be called that"
    table = compare.comparison_table(api.compare([run, run]))
    assert "FD[randconv-v1]" in table and "best" not in table, "equal runs must not be ranked"


def test_what_was_drawn_with_options_is_ranked_among_its_like_only(tmp_path: Path) -> None:
    drawn = Measurement("frechet", 2.0, 100, 100, Provenance("randconv-v1"), low=1.9, high=2.1)
    recipe = write_toml(recipes.complete({"family": {"name": "vae"}}))
    runs = [Run.create(tmp_path / name, recipe, {}) for name in ("a", "b")]
    keep(runs[0], [drawn], {})
    keep(runs[0], [replace(drawn, value=9.0, low=8.9, high=9.1)], {"steps": 2})
    keep(runs[1], [replace(drawn, value=5.0, low=4.9, high=5.1)], {"steps": 2})
    rows = api.compare(runs)
    (first,) = rows[0]["measurements"].values()
    assert (first["value"], first["options"]) == (2.0, {}), "trying options is not what a run is known by"
    table = compare.comparison_table(rows)
    assert "not ranked: different options of drawing: none and steps 2" in table and "best" not in table
    assert "5  (4.9 .. 5.1)  drawn with steps 2" in table
    keep(runs[1], [replace(drawn, value=4.0, low=3.9, high=4.1)], {})
    assert "2  (1.9 .. 2.1)  best" in compare.comparison_table(api.compare(runs))


def test_what_only_gives_pictures_back_is_measured_without_a_judge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMAGEKILN_CACHE", str(tmp_path / "cache"))
    settings = {
        "family": {"width": 8, "factor": 2, "adversarial_weight": 0},
        "train": {"total_kimg": 0.064, "batch": 32, "doctor": "off"},
    }
    run = api.train("autoencoder", "builtin:digits", tmp_path / "run", settings=settings)
    sentences: list[str] = []
    found = {row.metric for row in api.evaluate(run, progress=sentences.append)}
    assert {"psnr", "mse"} <= found and not {"label_accuracy", "frechet"} & found
    assert not list((tmp_path / "cache").glob("**/judge*")), "digits have labels, and nothing here needs them"
    assert not sentences
    assert not any(row["options"] for row in run.measurements())
    for option in ({"steps": 3}, {"guide": run.path}, {"n": 20}):
        with pytest.raises(UsageError, match=f"--?{next(iter(option))}: .* without drawing anything"):
            api.evaluate(run, **option)


def test_a_folder_of_pictures_is_measured(tmp_path: Path) -> None:
    from PIL import Image
    from sklearn.datasets import load_digits

    for index, pixels in enumerate(load_digits().images[:60]):
        Image.fromarray(np.uint8(pixels * 15.9)).save(tmp_path / f"{index}.png")
    found = by_name(api.evaluate(tmp_path, "builtin:digits", features="randconv"))
    assert found["frechet"].n == 60
    assert json.loads(found["frechet"].to_json())["features"] == "randconv-v1"
    with pytest.raises(UsageError, match="--data"):
        api.evaluate(tmp_path)
    for option in ({"steps": 3}, {"guide": tmp_path}):
        with pytest.raises(UsageError, match=f"--{next(iter(option))}: the pictures in .* are drawn already"):
            api.evaluate(tmp_path, "builtin:digits", **option)


def test_a_part_of_a_folder_is_of_all_its_classes(tmp_path: Path) -> None:
    from PIL import Image

    for index in range(80):
        (tmp_path / f"{index // 40}").mkdir(exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (8, 8)) * (index >= 40)
        Image.fromarray(np.uint8(pixels)).save(tmp_path / f"{index // 40}" / f"{index}.png")
    asked = {"features": "pixels", "metrics": "vendi"}
    half, again, whole = (
        by_name(api.evaluate(tmp_path, "builtin:digits", n=n, **asked))["vendi"] for n in (40, 40, None)
    )
    assert half.n == 40 and half.value == again.value
    assert half.value > 0.5 * whole.value, "the first 40 are black"


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (5, 10), (10, 10), (95, 100)])
def test_wilson_contains_the_share(successes: int, n: int) -> None:
    low, high = wilson(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
