"""The benchmark of latents against pixels: sizes, minutes, who is compared with whom, and a small run to its end."""

from __future__ import annotations

import argparse
import doctest
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imagekiln.engine import recipe as recipes
from imagekiln.engine.run import Run
from imagekiln.metrics import Measurement, Provenance

pytestmark = pytest.mark.usefixtures("beside_the_benchmarks")


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return importlib.import_module("latent_or_pixels")


def test_the_examples_are_true(bench: ModuleType) -> None:
    result = doctest.testmod(bench)
    assert (result.failed, result.attempted > 0) == (0, True)


def test_presets_have_the_sizes_they_claim(bench: ModuleType) -> None:
    """And learn what they are to learn: latents of 16 x 16 x 8, or the pixels themselves, mirrored in both cases."""
    for arm, preset in bench.PRESETS.items():
        recipe = recipes.resolve(preset.recipe, assignments=preset.settings)
        over_latents = arm.startswith("latents")
        assert bool(recipe.data.codec) == over_latents and recipe.data.flip, arm
        assert recipe.family.sample.steps == recipes.resolve("flowers-latent").family.sample.steps, arm
        family = recipes.build(recipe, (8, 16, 16) if over_latents else (3, 64, 64), 102)
        assert round(sum(p.numel() for p in family.parameters()) / 1e6, 2) == preset.million, arm
        assert preset.why


def test_who_has_which_minutes(bench: ModuleType) -> None:
    def minutes(arm: str, kimg: float | None = None, **seconds: float) -> float | str:
        options = argparse.Namespace(minutes=30.0, kimg=kimg, budget="cpu")
        return bench.minutes_of(options, arm, bench.Coder(Run(Path("codec")), seconds))

    for arm in ("latents", "pixels", "pixels-narrow"):
        assert minutes(arm, cpu=1200.0) == 30.0
    assert minutes(bench.COUNTED, cpu=1200.0) == 10.0
    assert "leave nothing of 30" in minutes(bench.COUNTED, cpu=1800.0)
    assert "not known (cpu)" in minutes(bench.COUNTED, wall=1200.0)
    assert "as many images" in minutes(bench.COUNTED, kimg=4.0, cpu=1200.0)


def _run(fd: float) -> dict[str, Any]:
    row = Measurement("frechet", fd, 50, 50, Provenance("classifier"), low=fd - 0.5, high=fd + 0.5, floor=0.25)
    seconds = {"wall": 20.0, "cpu": 10.0}
    rows = [json.loads(row.to_json())]
    return {"kimg": 10.0, "seconds": seconds, "images_per_sec": 500.0, "parameters": 1_000_000, "rows": rows}


def test_the_better_width_of_pixels_is_the_opponent(bench: ModuleType) -> None:
    found = {
        "latents": {0: _run(2.0), 1: _run(3.0)},
        bench.COUNTED: {1: _run(6.0)},
        "pixels": {0: _run(4.0), 1: _run(4.0)},
        "pixels-narrow": {0: _run(5.0), 1: _run(5.0)},
    }
    rows = {row.what: row for row in bench.record_rows(found, 50, "cpu")}
    assert rows["latents / pixels, FD"].raw == (0.5, 0.75)
    assert rows[f"{bench.COUNTED} / pixels, FD"].raw == (1.5,), "only the seed that both have"
    assert not any("/ pixels-narrow" in what for what in rows)
    assert rows["latents, training (cpu)"].value == 10.0
    assert rows["latents, FD[classifier]"].raw == (2.0, 3.0)
    one = rows[f"{bench.COUNTED}, FD[classifier]"]
    assert (one.value, one.interval) == (6.0, (5.5, 6.5))
    assert rows["pixels, FD[classifier], real pictures"].value == 0.25
    first = [line.split()[0] for line in bench.standings(found, "cpu")[1:]]
    assert first == ["latents", "pixels", "pixels-narrow", bench.COUNTED]
    alone = {"latents": found["latents"]}
    assert not any("/ pixels" in row.what for row in bench.record_rows(alone, 50, "cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 pictures without labels."""
    path = tmp_path_factory.mktemp("pictures")
    for index, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (300, 16, 16, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(path / f"{index:03d}.png")
    return path


def test_a_small_comparison(
    bench: ModuleType,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks/latent_or_pixels.py"])
    runs = tmp_path / "runs"
    command = ["--data", str(folder), "--size", "16", "--kimg", "0.064", "--n", "24", "--out", str(runs)]
    for setting in ("family.widths=[8,8]", "family.attention=[false,false]", "family.sample.steps=2", "train.batch=16"):
        command += ["--set", setting]
    for setting in ("family.width=8", "train.total_kimg=0.064"):
        command += ["--codec-set", setting]
    for key in ("--set", "--codec-set"):
        command += [key, "train.device=cpu"]
    assert bench.main([*command, "--skip-train"]) == 2, "there is no autoencoder yet"
    assert bench.main([*command, "--train-only"]) == 0
    assert Run(runs / "codec").status()["nimg"] == 64
    for arm in ("latents-0", "pixels-0", "pixels-narrow-0"):
        assert Run(runs / arm).status()["state"] == "finished"
        assert Run(runs / arm).codec_path.is_file() == (arm == "latents-0")
    assert not Run(runs / f"{bench.COUNTED}-0").exists()
    record = ["--skip-train", "--seeds", "0", "1", "--record", "--records", str(tmp_path / "records")]
    assert bench.main([*command, *record]) == 0
    told = capsys.readouterr().out
    assert "latents, seed 1, was left out: its run is missing." in told
    assert f"{bench.COUNTED}, seed 0, was left out: --kimg gives everybody as many images" in told
    (file,) = (tmp_path / "records").glob("*.json")
    written = json.loads(file.read_text())
    values = {row["what"]: row["value"] for row in written["rows"]}
    assert values["latents, images seen"] == values["pixels, images seen"] == 0.064
    assert any(what.startswith("latents / pixels") for what in values)
    assert any(what.startswith("training pictures given back by the autoencoder, FD") for what in values)
    assert "latents-0.png" in {file.name for file in runs.glob("*.png")} and (runs / "all-0.png").is_file()
    before = {file: file.stat().st_mtime_ns for file in runs.rglob("*.measured.json")}
    assert bench.main([*command, "--codec", str(runs / "codec")]) == 0, "nothing is left to do"
    assert {file: file.stat().st_mtime_ns for file in runs.rglob("*.measured.json")} == before and len(before) == 4
