"""`imagekiln monitor` on the command line: what it answers, its exit codes, and what people get wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

QUICK = ("--features", "randconv")


@pytest.fixture(scope="module")
def run(reference, tmp_path_factory) -> Path:
    return Path(shutil.copytree(reference("vae"), tmp_path_factory.mktemp("monitored") / "run"))


def write(
    folder: Path, count: int, factor: float = 1.0, labelled: bool = False, mode: str = "L", side: int = 8
) -> Path:
    """Digits at random: the set is sorted by writer, so its first and its last pictures do differ."""
    digits, order = load_digits(), np.random.default_rng(0).permutation(1797)
    for index, row in enumerate(order[:count]):
        pixels = np.uint8(np.rint(np.clip(digits.images[row] * (255 / 16) * factor, 0, 255)))
        place = folder / str(digits.target[row]) if labelled else folder
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).convert(mode).resize((side, side)).save(place / f"{index:03d}.png")
    return folder


def test_nothing_then_drift_then_json(cli, run: Path, tmp_path: Path) -> None:
    same, darker = write(tmp_path / "same", 300, labelled=True), write(tmp_path / "darker", 300, 0.6, labelled=True)
    calm = cli("monitor", run, "--data", same, *QUICK).ok()
    assert "No drift" in calm.out and "Traceback" not in calm.err
    alarm = cli("monitor", run, "--data", darker, *QUICK)
    assert alarm.code == 10 and "darker by" in alarm.out
    assert "bit for bit" in alarm.out, "the first call wrote the release record"
    answered = cli("monitor", run, "--data", darker, *QUICK, "--json")
    assert answered.code == 10 and answered.out.count("\n") == 1
    found = answered.json()
    assert found["exit_code"] == 10 and found["drift"]["drifted"] and found["generation"]["state"] == "equal"
    assert found["drift"]["n"] == 300 and len(found["drift"]["novel"]) == 20
    assert Path(found["drift"]["sheet"]).read_bytes().startswith(b"\x89PNG")


def test_generation_alone(cli, run: Path) -> None:
    cli("monitor", run, "--release").ok()
    found = cli("monitor", run, "--json").ok().json()
    assert found["drift"] is None and found["generation"]["max_difference"] == 0


def test_unlabelled_pictures_and_a_broken_one(cli, run: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "new", 100)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    ended = cli("monitor", run, "--data", folder, *QUICK, "--json").ok()
    assert "no labels" in ended.err
    found = ended.json()["drift"]
    assert found["left_out"] == 1 and found["classes"] == [] and found["n"] == 100
    assert any("broken.png" in sentence for sentence in found["sentences"])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"side": 12}, ["(1, 12, 12)", "(1, 8, 8)", "imagekiln prepare"]),
        ({"mode": "RGB", "colour": True}, ["(3, 8, 8)", "(1, 8, 8)"]),
        ({"count": 19}, ["19 pictures", "at least 20"]),
        ({"count": 0}, ["new"]),
    ],
    ids=["size", "channels", "few", "empty"],
)
def test_pictures_that_do_not_fit(cli, run: Path, tmp_path: Path, given: dict, words: list[str]) -> None:
    colour = given.pop("colour", False)
    folder = write(tmp_path / "new", **{"count": 30, **given})
    folder.mkdir(exist_ok=True)
    if colour:
        Image.new("RGB", (8, 8), (255, 0, 0)).save(folder / "red.png")
    cli("monitor", run, "--data", folder, *QUICK).refused(3, *words)


def test_names_and_settings_that_are_wrong(cli, run: Path, tmp_path: Path) -> None:
    cli("monitor", tmp_path / "none", "--data", "builtin:digits").refused(2, "not a run folder")
    cli("monitor", run, "--data", tmp_path / "none").refused(2, "none")
    cli("monitor", run, "--data", "builtin:digits", "--features", "x").refused(2, "--features")
    bare = Path(shutil.copytree(run, tmp_path / "bare"))
    shutil.rmtree(bare / "weights")
    cli("monitor", bare, "--data", "builtin:digits", *QUICK).refused(2, "has no weights")
    assert "Traceback" not in cli("monitor", run, "--alpha", "2").err
