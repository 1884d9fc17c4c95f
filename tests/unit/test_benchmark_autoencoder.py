"""The benchmark of the autoencoder's losses: its distances, and a small run to the end."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from imagekiln.metrics import RandomConv

pytestmark = pytest.mark.usefixtures("beside_the_benchmarks")


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return importlib.import_module("autoencoder")


def test_distances_are_0_for_the_same_pictures_and_grow(bench: ModuleType) -> None:
    torch.manual_seed(0)
    x, network = torch.rand(80, 3, 16, 16) * 2 - 1, RandomConv((3, 16, 16))
    same, near, far, turned = (
        bench.features_distances(network, x, y)
        for y in (x, *((x + e * torch.randn_like(x)).clamp(-1, 1) for e in (0.1, 0.5)), x.flip(0))
    )
    assert same == pytest.approx((0, 0), abs=1e-6)
    assert all(0 < a < b for a, b in zip(near, far, strict=True))
    assert turned[0] > 0.5 and turned[1] == pytest.approx(0, abs=1e-6), (
        "the order is something to pairs, nothing to sets"
    )


def test_a_small_run_says_what_the_discriminator_changed(bench: ModuleType, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for index in range(60):
        folder = tmp_path / "photos" / ("cat", "dog")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    command = ["--data", tmp_path / "photos", "--out", tmp_path / "runs", "--records", tmp_path / "records"]
    command += ["--kimg", 0.064, "--judge-kimg", 0.064, "--seeds", 0, "--arms", "perceptual", "adversarial"]
    command += ["--set", "family.kind=tiny", "--set", "family.width=8", "--set", "train.batch=16"]
    command += ["--equal", "time", "--adversarial", "family.adversarial_weight=0.2", "--first-kimg", 0.032]
    assert bench.main([str(word) for word in command]) == 0
    (record,) = (tmp_path / "records").glob("autoencoder-*.json")
    rows = {row["what"]: row["value"] for row in json.loads(record.read_text())["rows"]}
    assert {"perceptual, psnr", "adversarial, ssim"} <= rows.keys()
    name = "distance of sets in randconv"
    ratio = rows[f"adversarial, {name}"] / rows[f"perceptual, {name}"]
    assert rows[f"adversarial / perceptual, {name}"] == pytest.approx(ratio)
    assert (tmp_path / "runs" / "adversarial-0.png").is_file()
    recipe = (tmp_path / "runs" / "adversarial-0" / "recipe.toml").read_text()
    assert "adversarial_weight = 0.2" in recipe and "first-0" in recipe
    rate = json.loads((tmp_path / "runs" / "rates.json").read_text())
    kimg = [rows[f"{arm}, kimg"] for arm in ("perceptual", "adversarial")]
    assert kimg == pytest.approx([0.064 * rate[arm] / min(rate.values()) for arm in rate], abs=0.016), "whole batches"
