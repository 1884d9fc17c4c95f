"""The league and the toys of GANs: presets, what is counted where the truth is known, small runs from end to end."""

from __future__ import annotations

import argparse
import doctest
import importlib
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from imagekiln.config import parse
from imagekiln.core import Family
from imagekiln.engine import recipe as recipes
from imagekiln.engine import registry
from imagekiln.engine.generate import invents
from imagekiln.metrics import Measurement, Provenance

pytestmark = pytest.mark.usefixtures("beside_the_benchmarks")
GREY_32 = (1, 32, 32)


@pytest.fixture(scope="module")
def league() -> ModuleType:
    return importlib.import_module("gan_league")


@pytest.fixture(scope="module")
def toys() -> ModuleType:
    return importlib.import_module("gan_toys")


def _adversarial(name: str) -> bool:
    """Whether a family draws from noise, and learns it from modules that it does not draw with."""
    kind = registry.load(name)
    config = parse(kind.Config, {"name": name, **kind.check_settings}, "family")
    family: Family = kind(config, (3, 16, 16), 3)
    opponents = [phase for phase in family.phases if not set(phase.trains) & set(family.averaged)]
    return invents(family) and bool(opponents)


def test_every_adversarial_family_takes_part_in_both(league: ModuleType, toys: ModuleType) -> None:
    adversarial = {name for name in registry.names() if _adversarial(name)}
    assert len(adversarial) >= 11
    assert set(league.PRESETS) == adversarial | set(league.REFERENCES)
    assert set(toys.PRESETS) == adversarial


@pytest.mark.parametrize("name", ["gan_league", "gan_toys"])
def test_the_examples_are_true(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert (result.failed, result.attempted > 0) == (0, True)


def test_presets_have_the_sizes_they_claim(league: ModuleType) -> None:
    for name, preset in league.PRESETS.items():
        family = recipes.build(recipes.resolve(name, assignments=preset.settings), GREY_32, 10)
        found = league.sides_of(family)
        assert [round(found[side] / 1e6, 2) for side in ("draws", "opposes")] == list(preset.million), name
        assert preset.why, name


def test_presets_of_the_toys_fit_both_toys(toys: ModuleType) -> None:
    options = argparse.Namespace(steps=10, set=[])
    for toy in toys.TOYS:
        for name in toys.PRESETS:
            recipe = toys.recipe_of(options, toy, name, "act", 3)
            assert (recipe.train.doctor, recipe.train.seed) == ("act", 3)
            steps = recipe.train.total_kimg * 1000 / recipe.train.batch
            assert steps % 10 == 0, f"{name}: ten steps of the generator, and of the critic as many times more"


# -- the league's numbers ---------------------------------------------------------------------------------------------


def _run(fd: float, seed: int, ratio: float | None = 1.2) -> dict[str, Any]:
    rows = [
        Measurement("frechet", fd, 50, 50, Provenance("classifier"), low=fd - 0.5, high=fd + 0.5, floor=0.1),
        Measurement("precision", 0.5 + seed / 10, 50, 50, Provenance("classifier"), lower_is_better=False),
    ]
    run = {
        "kimg": 10.0,
        "seconds": {"wall": 20.0, "cpu": 10.0},
        "images_per_sec": 500.0,
        "parameters": {"draws": 1_000_000, "opposes": 500_000},
        "rows": [json.loads(row.to_json()) for row in rows],
    }
    return run if ratio is None else run | {"moments": {"900": 2.0, "10000": 2.0 * ratio, "80": 9.0}}


def test_rows_of_the_league(league: ModuleType) -> None:
    found = {
        "dcgan": {0: _run(4.0, 0), 1: _run(6.0, 1, 1.0)},
        "r3gan": {1: _run(3.0, 1)},
        "vae": {0: _run(8.0, 0, None)},
    }
    rows = {row.what: row for row in league.record_rows(found, 50, "cpu")}
    two = rows["dcgan, FD[classifier]"]
    assert (two.value, two.raw, two.seeds, two.interval, two.n) == (5.0, (4.0, 6.0), (0, 1), None, 50)
    one = rows["r3gan, FD[classifier]"]
    assert (one.value, one.interval, list(one.seeds), one.n) == (3.0, (2.5, 3.5), [1], 50)
    assert rows["dcgan, FD[classifier], real pictures"].value == 0.1
    assert rows["dcgan, FD at the end / at the best moment"].raw == pytest.approx((1.2, 1.0))
    assert "vae, FD at the end / at the best moment" not in rows
    assert rows["r3gan / dcgan, FD"].raw == (0.5,), "only the seed that both have"
    assert rows["vae / dcgan, FD"].raw == (2.0,)
    assert "dcgan / dcgan, FD" not in rows
    assert rows["vae, training (cpu)"].value == 10.0 and rows["vae, training"].value == 500.0
    assert [line.split()[0] for line in league.standings(found, "cpu")[1:]] == ["r3gan", "dcgan", "vae"]


def test_the_end_is_the_moment_of_the_most_images(league: ModuleType) -> None:
    assert league.end_over_best({"1000": 1.0, "200": 3.0}) == 1.0
    assert league.end_over_best({"9": 2.0, "10": 5.0}) == 2.5, "9 images come before 10"


# -- where the truth is known -----------------------------------------------------------------------------------------


def test_a_mode_is_covered_by_a_tenth_of_its_share(toys: ModuleType) -> None:
    modes, n = toys.MODES_M2, 1000
    near = modes[torch.arange(n) % 25]
    assert toys.covered(near, torch.ones(n).bool()) == {"modes": 25.0, "good": 1.0}
    for count, expected in ((n // 250, 2.0), (n // 250 - 1, 1.0)):
        points = modes[torch.tensor([0] * (n - count) + [13] * count)]
        assert toys.covered(points, torch.ones(n).bool())["modes"] == expected
    beyond = near + 3.01 * toys.SIGMA * torch.tensor([1.0, 0.0])
    assert toys.covered(beyond, torch.ones(n).bool()) == {"modes": 0.0, "good": 0.0}
    within = near + 2.99 * toys.SIGMA * torch.tensor([0.6, -0.8])
    assert toys.covered(within, torch.ones(n).bool()) == {"modes": 25.0, "good": 1.0}
    assert toys.covered(near, torch.zeros(n).bool()) == {"modes": 0.0, "good": 0.0}


def test_blobs_are_found_where_they_are(toys: ModuleType) -> None:
    truth, _ = toys.points(500, 0)
    images, rows = toys.gaussians(500, 0)
    found, one_blob = toys.located(images)
    assert bool(one_blob.all())
    assert float((found - truth).abs().max()) < toys.SIGMA / 10
    assert torch.equal(rows, ((truth[:, 0] - toys.FIRST) / toys.SPACING).round().long())
    grey = images.clamp(min=10)
    assert float((toys.located(grey)[0] - truth).abs().max()) < toys.SIGMA / 2, "a background not quite black"


def test_what_shows_no_blob_is_not_good(toys: ModuleType) -> None:
    blob = toys.blobs(toys.MODES_M2)
    two = ((blob[0] + blob[2]) * 127).to(torch.uint8)  # a mode lies in the middle between them
    nothing, noise = torch.zeros(8, 8).byte(), torch.randint(256, (8, 8), generator=torch.Generator()).byte()
    wide = (255 * blob[12] ** 0.3).to(torch.uint8)
    one_blob = toys.located(torch.stack([two, nothing, noise, wide])[:, None])[1]
    assert one_blob.tolist() == [False] * 4


def test_real_gaussians_score_what_theory_says(toys: ModuleType) -> None:
    n, share = 5000, 1 - math.exp(-4.5)  # a point of the plane within three deviations
    found = toys.judge_gaussians(toys.gaussians(n, 1)[0])
    assert found["modes"] == 25
    assert abs(found["good"] - share) < 4 * math.sqrt(share * (1 - share) / n) + 0.002


def test_modes_and_divergence_of_triples(toys: ModuleType) -> None:
    everything = torch.cartesian_prod(*[torch.arange(10)] * 3)
    good = torch.ones(1000).bool()
    zero = pytest.approx(0.0, abs=1e-12)
    assert toys.triples(everything, good) == {"modes": 1000.0, "any": 1000.0, "kl": zero, "good": 1.0}
    one = toys.triples(everything[:1].repeat(1000, 1), ~good)
    assert one == {"modes": 0.0, "any": 1.0, "kl": pytest.approx(math.log(1000)), "good": 0.0}
    half = toys.triples(everything[:500].repeat(2, 1), torch.arange(1000) < 30)
    assert (half["modes"], half["any"], half["good"]) == (30, 500, 0.03) and half["kl"] == pytest.approx(math.log(2))


def test_stacked_digits_are_read_as_they_were_laid(toys: ModuleType) -> None:
    n = 4000
    images, first = toys.stacks(n, 5)
    assert images.shape == (n, 3, 8, 8)
    digit_N3, good = toys.read_digits(images)
    assert torch.equal(digit_N3[:, 0], first) and bool(good.all())
    found = toys.triples(digit_N3, good)
    expected, deviation = 999 / (2 * n), math.sqrt(2 * 999) / (2 * n)  # n KL is half a chi-square of 999 degrees
    assert abs(found["kl"] - expected) < 6 * deviation + 0.02, "and a little more: cells of four are few for that law"
    assert found["modes"] == pytest.approx(1000 * (1 - math.exp(-n / 1000)), abs=20)
    noise = torch.randint(256, (50, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    assert toys.read_digits(noise)[1].sum() == 0


def test_held_out_digits_are_read_right(toys: ModuleType) -> None:
    known = toys.digits()
    _, row_N = toys._nearest(known.held_out_NHW, known.images_NHW)
    assert float((known.labels_N[row_N] == known.held_out_labels_N).double().mean()) > 0.95


def test_rows_of_the_toys(toys: ModuleType) -> None:
    def run(modes: float, acts: float) -> dict[str, float]:
        return {"modes": modes, "good": 0.5, "acts": acts, "seconds": 3.0}

    found = {"gaussians": {"dcgan": {"off": [run(20, 0), run(10, 0)], "act": [run(22, 1), run(9, 2)]}}}
    real = {"gaussians": {"modes": 25.0, "good": 0.99}}
    rows = {row.what: row for row in toys.record_rows(found, real, [0, 1], 100)}
    assert rows["gaussians, real pictures, modes"].value == 25
    assert rows["gaussians, dcgan, doctor off, modes"].raw == (20, 10)
    assert rows["gaussians, dcgan, modes, doctor act - off"].raw == (2, -1)
    assert rows["gaussians, dcgan, acts of the doctor"].raw == (1, 2)
    assert any("dcgan" in line and "15.5" in line for line in toys.table(found, real))


# -- from end to end --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 pictures without labels."""
    path = tmp_path_factory.mktemp("pictures")
    for index, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (300, 16, 16), dtype=np.uint8)):
        Image.fromarray(pixels).save(path / f"{index:03d}.png")
    return path


def test_a_small_league(
    league: ModuleType,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks/gan_league.py"])
    command = ["--data", str(folder), "--size", "16", "--kimg", "0.32", "--n", "24", "--moments", "3"]
    command += ["--families", "vanilla_gan", "cgan", "vae", "--out", str(tmp_path / "runs")]
    command += ["--set", "train.batch=16", "--set", "train.checkpoint_kimg=0.08", "--set", "train.device=cpu"]
    record = ["--record", "--records", str(tmp_path / "records")]
    assert league.main([*command, "--train-only"]) == 0
    runs = tmp_path / "runs"
    kept = {int(file.stem.split("-")[0]) for file in (runs / "vanilla_gan-0.moments").glob("*.safetensors")}
    assert {80, 160, 240, 320} <= kept, "also those that the run deleted"
    assert not (runs / "vae-0.moments").exists()
    assert league.main([*command, "--skip-train", "--seeds", "0", "1", *record]) == 0
    told = capsys.readouterr().out
    assert "cgan was left out: A conditional GAN needs to know" in told
    assert "vae, seed 1, was left out: its run is missing." in told
    (file,) = (tmp_path / "records").glob("*.json")
    written = json.loads(file.read_text())
    values = {row["what"]: row["value"] for row in written["rows"]}
    assert values["vanilla_gan, images seen"] == 0.32 and values["vanilla_gan, training"] > 0
    assert values["vanilla_gan, FD at the end / at the best moment"] >= 1
    assert "320" in written["facts"]["runs"]["vanilla_gan"]["0"]["moments"]
    assert any("its run is missing" in note for note in written["notes"])
    for name in ("vanilla_gan-0.png", "vae-0.png", "league-0.png"):
        assert (runs / name).is_file()
    before = {file: file.stat().st_mtime_ns for file in runs.rglob("*.measured.json")}
    assert league.main(command) == 0, "nothing is left to do"
    assert {file: file.stat().st_mtime_ns for file in runs.rglob("*.measured.json")} == before and len(before) >= 5
    assert league.main([*command, "--skip-train", "--seeds", "7"]) == 2


def test_small_toys(
    toys: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks/gan_toys.py"])
    command = ["--out", str(tmp_path / "runs"), "--families", "cgan", "--seeds", "0", "--steps", "6"]
    command += ["--n", "60", "--record", "--records", str(tmp_path / "records")]
    assert toys.main(command) == 0
    results = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").glob("*.json")}
    assert len(results) == 2, "the doctor did not act, so the runs without it are the same"
    assert not any(path.is_dir() for path in (tmp_path / "runs").iterdir()), "results and sheets are what stays"
    assert toys.main(command) == 0, "nothing is left to do"
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").glob("*.json")} == results
    written = [json.loads(file.read_text()) for file in sorted((tmp_path / "records").glob("*.json"))]
    assert written[0]["rows"] == written[1]["rows"]
    values = {row["what"]: row["value"] for row in written[0]["rows"]}
    assert values["gaussians, real pictures, modes"] > 20
    assert 0 <= values["digits, cgan, doctor act, modes"] <= 60
    assert values["held-out digits that are read right"] > 0.95
    assert "cgan          act" in capsys.readouterr().out


def test_a_toy_that_was_stopped_goes_on(toys: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits, so the same result, as of a run that was not stopped."""
    from imagekiln.engine.trainer import Trainer
    from imagekiln.errors import Interrupted

    def options(name: str) -> argparse.Namespace:
        return argparse.Namespace(out=tmp_path / name, steps=8, set=[], n=40)

    whole = toys.outcome(options("whole"), "gaussians", "vanilla_gan", "off", 0)
    step = Trainer.step

    def stopping(trainer: Trainer) -> None:
        step(trainer)
        if trainer.state.nimg == 5 * 64:
            trainer.save()
            raise Interrupted("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stopping)
        with pytest.raises(Interrupted):
            toys.outcome(options("parts"), "gaussians", "vanilla_gan", "off", 0)
    assert [file.suffixes for file in (tmp_path / "parts").glob("*.json")] == [[".seconds", ".json"]]
    parts = toys.outcome(options("parts"), "gaussians", "vanilla_gan", "off", 0)
    assert {**parts, "seconds": 0} == {**whole, "seconds": 0}
    pictures = [next((tmp_path / name).glob("*.png")).read_bytes() for name in ("whole", "parts")]
    assert pictures[0] == pictures[1]


def test_a_doctor_that_does_not_act_changes_nothing(toys: ModuleType, tmp_path: Path) -> None:
    """So a run without it need not be trained again."""

    def options(name: str) -> argparse.Namespace:
        return argparse.Namespace(out=tmp_path / name, steps=8, set=[], n=40)

    outcomes = [toys.outcome(options(doctor), "digits", "dcgan", doctor, 0) for doctor in ("act", "off")]
    assert {**outcomes[0], "seconds": 0} == {**outcomes[1], "seconds": 0} and not outcomes[0]["acts"]
    act, off = (next((tmp_path / doctor).glob("*.png")).read_bytes() for doctor in ("act", "off"))
    assert act == off
    acted = next((tmp_path / "act").glob("*.json"))
    acted.write_text(json.dumps({**outcomes[0], "acts": 1}))
    assert toys.outcome(options("act"), "digits", "dcgan", "off", 0)["acts"] == 0
    assert len(list((tmp_path / "act").glob("*.json"))) == 2, "where it acted, both are trained"
