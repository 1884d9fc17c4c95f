"""What each verb answers, to people and to programs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagekiln.engine import recipe as recipes
from imagekiln.engine import registry

DRAWING = [name for name in registry.names() if registry.load(name).draws]
SCRIPT = Path(sys.executable).with_name("imagekiln")


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture).astype(int)


@pytest.mark.skipif(not SCRIPT.exists(), reason="not installed")
def test_the_console_script() -> None:
    ended = subprocess.run([str(SCRIPT), "--version"], capture_output=True, text=True, timeout=60, check=True)
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", ended.stdout)


@pytest.mark.parametrize(("verb", "code"), [("--version", 0), ("fly", 2)])
def test_the_package_is_the_command_too(verb: str, code: int) -> None:
    ended = subprocess.run([sys.executable, "-m", "imagekiln", verb], capture_output=True, text=True, timeout=60)
    assert ended.returncode == code
    assert "imagekiln" in ended.stderr if code else re.fullmatch(r"\d+\.\d+\.\d+\n", ended.stdout)


def test_json_is_one_object_on_stdout(cli, tiny, reference, tmp_path: Path) -> None:
    run = reference("vae")
    for arguments in (
        [*tiny("vae", tmp_path / "run", nimg=32), "--json"],
        [*tiny("vae", tmp_path / "dry"), "--dry-run", "--json"],
        ["generate", run, "-n", 2, "--out", tmp_path / "out", "--json"],
        ["compare", run, "--json"],
        ["list", "--json"],
        ["doctor", "--json"],
        ["recipe", "show", "vae", "--json"],
        ["recipe", "schema", "vae"],
    ):
        answered = cli(*arguments).ok()
        assert answered.out.count("\n") == 1, arguments
        assert isinstance(answered.json(), dict | list), arguments


def test_no_escape_codes_and_no_bar_without_a_terminal(cli, tiny, tmp_path: Path) -> None:
    ended = cli(*tiny("vae", tmp_path / "run", nimg=32)).ok()
    assert not re.search(r"[\x1b\r\b]", ended.out + ended.err)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp950"])
def test_a_narrow_console_does_not_end_a_training(cli, tiny, tmp_path: Path, encoding: str) -> None:
    cli(*tiny("vae", tmp_path / "运行", nimg=32), env={"PYTHONIOENCODING": encoding, "COLUMNS": "20"}).ok()


def test_dry_run_writes_nothing(cli, tiny, tmp_path: Path) -> None:
    ended = cli(*tiny("vae", tmp_path / "run"), "--dry-run", cwd=tmp_path).ok()
    assert "Parameters" in ended.out and not list(tmp_path.iterdir())


def test_a_finished_run_stays_as_it_is(cli, tiny, tmp_path: Path) -> None:
    cli(*tiny("vae", tmp_path / "run", nimg=32)).ok()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.safetensors")}
    cli(*tiny("vae", tmp_path / "run", nimg=32)).ok()
    assert {p: p.read_bytes() for p in tmp_path.rglob("*.safetensors")} == before


def test_a_finished_run_can_be_made_longer(cli, tiny, tmp_path: Path) -> None:
    cli(*tiny("vae", tmp_path / "run", nimg=32)).ok()
    longer = cli(*tiny("vae", tmp_path / "run", nimg=64), "--json").ok().json()
    assert longer["state"] == "finished" and longer["nimg"] == 64
    assert (tmp_path / "run" / "checkpoints" / "000000064").is_dir()


@pytest.mark.parametrize("family", DRAWING)
def test_picture_i_does_not_depend_on_how_many_are_drawn(cli, reference, tmp_path: Path, family: str) -> None:
    run = reference(family)
    cli("generate", run, "-n", 3, "--batch", 1, "--out", tmp_path / "few", "--seed", 4).ok()
    cli("generate", run, "-n", 8, "--batch", 8, "--out", tmp_path / "many", "--seed", 4).ok()
    cli("generate", run, "-n", 3, "--out", tmp_path / "other", "--seed", 5).ok()
    assert len(list((tmp_path / "many").glob("0*.png"))) == 8 and (tmp_path / "many" / "grid.png").exists()
    names = [f"{index:06d}.png" for index in range(3)]
    few, many, other = (
        np.stack([pixels(tmp_path / folder / name) for name in names]) for folder in ("few", "many", "other")
    )
    assert few.shape == (3, 8, 8) and np.abs(few - many).max() <= 1
    assert (few != other).mean() > 5 * (few != many).mean(), "another seed draws other pictures"


def test_a_hot_training_says_its_dials_and_that_it_anneals_twice(cli, tiny, tmp_path: Path) -> None:
    key = f"optim.{registry.load('vae').phases[0].optimizer}.langevin"
    hot = ["--set", f"{key}.temperature=0.5", "--set", f"{key}.schedule=cosine", "--set", "train.schedule=cosine"]
    said = cli(*tiny("vae", tmp_path / "run", nimg=32), *hot).ok().err
    assert "annealed twice" in said and "diffusion 0.0003119, temperature 0.5," in said  # 0.5 / 1603 pictures
    assert "annealed twice" in cli(*tiny("vae", tmp_path / "dry", nimg=32), *hot, "--dry-run").ok().out
    cold = cli(*tiny("vae", tmp_path / "cold", nimg=32)).ok()
    assert "Langevin" not in cold.err


def test_a_label_by_name_and_by_number(cli, tmp_path: Path, tiny) -> None:
    for index, shade in enumerate((20, 120, 220)):
        folder = tmp_path / "photos" / ("cat", "dog", "emu")[index]
        folder.mkdir(parents=True)
        for number in range(8):
            Image.new("L", (8, 8), shade + number).save(folder / f"{number}.png")
    arguments = tiny("vae", tmp_path / "run", nimg=64)
    arguments[arguments.index("builtin:digits")] = str(tmp_path / "photos")
    cli(*arguments).ok()
    for name, label in (("by name", "dog"), ("by number", "1"), ("another", "emu")):
        cli("generate", tmp_path / "run", "-n", 2, "--label", label, "--out", tmp_path / name).ok()
    by_name, by_number, another = (
        (tmp_path / name / "000001.png").read_bytes() for name in ("by name", "by number", "another")
    )
    assert by_name == by_number != another
    cli("generate", tmp_path / "run", "--label", "dgo", "--out", tmp_path / "x").refused(2, "'dog'")


def test_recipe_show_can_be_trained(cli, tmp_path: Path) -> None:
    """Every recipe and family, written out, reads as itself."""
    for name in [*recipes.names(), *registry.names()]:
        if name in recipes.names() and recipes.goes_on(name):
            cli("recipe", "show", name).refused(2, "--from")
            continue
        shown = cli("recipe", "show", name, "--set", "train.batch=16").ok()
        file = tmp_path / f"{name}.toml"
        file.write_text(shown.out)
        assert tomllib.loads(shown.out)["train"]["batch"] == 16
        again = cli("recipe", "show", file, "--json").ok().json()
        assert again == cli("recipe", "show", name, "--set", "train.batch=16", "--json").ok().json()


def test_a_recipe_file_trains_like_its_settings(cli, tiny, reference, ends_like, tmp_path: Path) -> None:
    out, whole = tmp_path / "run", reference("vae")
    cli("train", whole / "recipe.toml", "--data", "builtin:digits", "--out", out, "--no-report").ok()
    ends_like(whole, out)


def test_list_names_everything(cli) -> None:
    listed = cli("list").ok().out
    for name in [*registry.names(), *recipes.names()]:
        assert re.search(rf"^  {name} +\S", listed, re.MULTILINE), name


def test_doctor(cli) -> None:
    findings = {row["what"]: row for row in cli("doctor", "--json").ok().json()}
    assert {"torch", "device", "disk", "cache"} <= findings.keys()
    assert findings["cache"]["fine"]


def test_compare(cli, reference, tmp_path: Path) -> None:
    runs = [reference("vae"), reference("dcgan")]
    answered = cli("compare", *runs, "--out", tmp_path / "sheet.png").ok()
    assert all(run.name in answered.out for run in runs) and "dcgan" in answered.out
    assert pixels(tmp_path / "sheet.png").ndim == 3
    rows = cli("compare", *runs, "--json").ok().json()
    assert [row["family"] for row in rows] == ["vae", "dcgan"] and {row["kimg"] for row in rows} == {0.24}


def test_prepare_then_train(cli, tiny, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for index in range(20):
        coarse = np.random.default_rng(index).integers(0, 256, (3, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((20, 12)).save(tmp_path / "photos" / f"{index}.png")
    cli("prepare", tmp_path / "photos", "--size", 8, "--out", tmp_path / "set").ok()
    arguments = tiny("vae", tmp_path / "run", nimg=32)
    arguments[arguments.index("builtin:digits")] = str(tmp_path / "set")
    cli(*arguments).ok()
    assert json.loads((tmp_path / "run" / "meta.json").read_text())["data_fingerprint"]
    assert pixels(sorted((tmp_path / "run" / "samples").glob("0*.png"))[-1]).shape[2] == 3


def test_minutes_fix_the_length_once(cli, tiny, tmp_path: Path) -> None:
    arguments = [*tiny("vae", tmp_path / "run", checkpoint_nimg=1_000_000), "--minutes", "0.05"]
    cli(*arguments).ok()
    length = tomllib.loads((tmp_path / "run" / "recipe.toml").read_text())["train"]["total_kimg"]
    assert length > 0.016
    assert cli(*arguments, "--json").ok().json()["total_nimg"] == round(length * 1000)
