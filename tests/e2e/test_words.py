"""Words to pictures from the command line: an autoencoder on the way, captions, prompts, an export, bad input."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CODER = """
[data]
size = 8
[family]
name = "autoencoder"
kind = "tiny"
factor = 2
width = 8
adversarial_weight = 0.0
[train]
batch = 8
total_kimg = 0.032
precision = "fp32"
"""
WORDS = """
[data]
size = 8
codec = "{coder}"
tag_dropout = 0.3
tag_shuffle = true
word_dropout = 0.1
wordings = ["{{caption}}", "a drawing of {{caption}}"]
fillers = 0.1
phrasebook = true
[family]
name = "stable_diffusion"
depth = 1
[family.text]
width = 32
layers = 2
context = 8
vocabulary = 530
[family.sample]
steps = 2
[train]
batch = 8
total_kimg = 0.032
precision = "fp32"
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with captioned pictures and two recipes."""
    photos = tmp_path / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    rows = ["file_name,text,tags"]
    for index in range(40):
        colour = np.eye(3)[index % 3] * 200 + rng.integers(0, 50, (8, 8, 3))
        Image.fromarray(colour.astype(np.uint8)).save(photos / f"{index:02d}.png")
        rows.append(f"{index:02d}.png,{('red', 'green', 'blue')[index % 3]} picture,square|small")
    (photos / "metadata.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "coder.toml").write_text(CODER)
    (tmp_path / "words.toml").write_text(WORDS.format(coder=tmp_path / "coder.toml"))
    return tmp_path


def test_what_the_second_training_refuses_is_said_before_the_first(cli, place: Path) -> None:
    said = cli(
        "train",
        place / "words.toml",
        "--data",
        place / "photos",
        "--out",
        place / "run",
        "--set",
        "family.text.base=nowhere",
    )
    assert said.code == 2 and "family.text.base = 'nowhere'" in said.err and not (place / "run-codec").exists()


def test_a_model_of_words_is_trained_drawn_with_and_taken_elsewhere(cli, place: Path) -> None:

    def run(*arguments: object):
        """The command with the names of files in `place` as paths."""
        names = ("words.toml", "photos", "run", "p", "q", "exported")
        return cli(*(place / one if one in names else one for one in arguments))

    planned = run("train", "words.toml", "--data", "photos", "--out", "run", "--dry-run").ok()
    assert "coder.toml" in planned.out + planned.err and not (place / "run").exists()
    said = run("train", "words.toml", "--data", "photos", "--out", "run").ok()
    assert "First the autoencoder" in said.out + said.err
    assert (place / "run-codec" / "recipe.toml").is_file() and (place / "run" / "codec").is_dir()
    shutil.rmtree(place / "run-codec")
    run("train", "words.toml", "--data", "photos", "--out", "run", "--set", "train.total_kimg=0.048").ok()
    assert not (place / "run-codec").exists(), "the run has a codec of its own"
    drawn = run("generate", "run", "-n", 4, "--prompt", "a red picture", "--prompt", "猫", "--out", "p", "--json").ok()
    assert len(drawn.json()["pictures"]) == 4 and drawn.json()["understood"]["a red picture"] == "red picture"
    assert not drawn.json()["cut"], "the caption that is drawn for it is short"
    long = ["--as-written", "--prompt", "red " * 20, "--option", f"negative_prompt={'blue ' * 20}"]
    said = run("generate", "run", "-n", 1, *long, "--guidance", 4, "--out", "q").ok()
    assert said.out.count("its end was left out") == 2 and '"red red' in said.out and '"blue blue' in said.out
    exported = run("export", "run", "--to", "diffusers", "--out", "exported", "--json").ok()
    assert exported.json()["difference"] <= 1e-4 and not exported.err, "other libraries have remarks"
    run("evaluate", "run", "-n", 20, "--features", "randconv", "--data", "photos")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["generate", "run", "--prompt", "a", "--label", "b"], 2, "--label and --prompt"),
        (["train", "stable_diffusion", "--data", "plain", "--out", "never"], 2, "neither captions nor classes"),
        (
            ["train", "stable_diffusion", "--data", "photos", "--out", "never", "--set", "data.codec=gone"],
            2,
            "data.codec",
        ),
        (
            ["train", "stable_diffusion", "--data", "photos", "--out", "never", "--set", "data.codec=gone.safetensors"],
            2,
            "data.codec",
        ),
        (["train", "stable_diffusion", "--data", "photos", "--out", "never", "--set", "data.codec=run"], 2, "encode"),
        (["train", "stable_diffusion", "--data", "photos", "--out", "never", "--set", "data.size=9"], 2, "even size"),
        (["train", "autoencoder", "--data", "photos", "--out", "never", "--set", "data.size=10"], 2, "multiples of 4"),
        (
            ["train", "autoencoder", "--data", "photos", "--out", "never", "--set", "family.perceptual=gone"],
            2,
            "perceptual",
        ),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(cli, place: Path, arguments: list[str], code: int, words: str) -> None:
    if "run" in " ".join(arguments):
        small = ["--set", "data.codec=", "--set", "train.total_kimg=0.008"]
        cli("train", place / "words.toml", "--data", place / "photos", "--out", place / "run", *small).ok()
    (place / "plain").mkdir()
    for index in range(12):
        Image.new("RGB", (8, 8), (20 * index, 0, 0)).save(place / "plain" / f"{index}.png")
    names = {name: place / name for name in ("run", "photos", "plain", "never")}
    answer = cli(*(names.get(one, one.replace("=run", f"={place / 'run'}")) for one in arguments))
    assert answer.code == code, answer.err
    assert words in answer.err and "Traceback" not in answer.err and not (place / "never").exists()
