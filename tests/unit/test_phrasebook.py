"""Prompts in the words of training captions: what is found, and what a model with a phrasebook draws."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import imagekiln
from imagekiln.data import phrasebook
from imagekiln.data.phrasebook import Phrasebook, words
from imagekiln.engine.models import open_model
from imagekiln.errors import RecipeError

TOLD = ["red apple, fruit, food", "green apple, fruit", "red heart, love", "man: red hair, adult", "蛋糕, 甜"]
FAMILY = {"depth": 1, "text": {"width": 32, "layers": 2, "context": 8, "vocabulary": 520}, "sample": {"steps": 2}}


# -- what is found ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("red apple", "red apple"),
        ("please draw a RED apple for me!", "red apple"),
        ("apple red", "red apple"),
        ("food and fruit", "red apple"),
        ("an apple that is green", "green apple"),
        ("love", "red heart"),
        ("hair, red", "man: red hair"),
        ("蛋", "蛋糕"),
        ("我要一块甜蛋糕", "蛋糕"),
        ("a bicycle", None),
        ("", None),
    ],
)
def test_the_nearest_caption_is_said(prompt: str, said: str | None) -> None:
    assert Phrasebook(TOLD, kept=1).say(prompt) == said


def test_a_name_that_is_asked_for_as_a_whole_comes_before_a_part_of_one() -> None:
    """ "me" is rarer than "camera", and still the caption that is asked for completely is meant."""
    told = ["camera, photo", "video camera, film", "call me hand", *(f"thing {number}" for number in range(10))]
    assert Phrasebook(told, kept=1).say("draw camera for me") == "camera"


def test_rare_words_decide() -> None:
    told = [*(f"picture {name}" for name in ("one", "two", "three", "four")), "boat"]
    assert Phrasebook(told).say("picture of a boat") == "boat"


def test_of_the_same_words_those_in_order_are_said() -> None:
    told = ["blue house boat", "blue boat house"]
    assert [Phrasebook(told).say(f"draw a {text}") for text in told] == told


def test_without_kept_the_whole_caption_is_said() -> None:
    assert Phrasebook(TOLD).say("food") == "red apple, fruit, food"


def test_captions_without_words_are_never_said() -> None:
    assert len(Phrasebook(["!!!", "", ", ,", "a cat", "a cat"])) == 1
    assert Phrasebook(["!!!"]).say("!!!") is None


TEXTS = st.lists(st.text(max_size=30), max_size=8)


@given(TEXTS, st.text(max_size=60), st.sampled_from([None, 1, 2]))
def test_any_text_is_answered_with_a_caption_that_shares_a_word(told: list[str], prompt: str, kept: int | None) -> None:
    book = Phrasebook(told, kept)
    said = book.say(prompt)
    shares = any(set(words(prompt)) & set(words(text)) for text in told if Phrasebook([text], kept))
    assert (said is not None) == shares
    assert said is None or set(words(said)) <= {word for text in told for word in words(text)}


@given(st.lists(st.text("abcde ", min_size=1, max_size=12), min_size=1, max_size=8))
def test_every_caption_says_itself(told: list[str]) -> None:
    """Or one of the same words."""
    book = Phrasebook(told)
    for text in told:
        if words(text):
            assert set(words(book.say(text) or "")) == set(words(text))


# -- what a model draws -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures of three captions."""
    folder = tmp_path_factory.mktemp("named")
    lines = ["file_name,text"]
    for index in range(12):
        noise = np.random.default_rng(index).integers(0, 255, (8, 8, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{index}.png")
        lines.append(f'{index}.png,"{TOLD[index % 3]}"')
    (folder / "metadata.csv").write_text("\n".join(lines))
    return folder


def settings(**data: object) -> dict[str, dict[str, object]]:
    train = {"batch": 4, "total_kimg": 0.008, "precision": "fp32"}
    return {"family": FAMILY, "data": {"size": 8, **data}, "train": train}


@pytest.fixture(scope="module")
def run(named: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    imagekiln.train("stable_diffusion", named, folder, settings=settings(phrasebook=True, tag_dropout=0.5))
    return folder


def test_a_model_understands_by_its_own_captions(run: Path, tmp_path: Path) -> None:
    model = open_model(imagekiln.Run.open(run), device="cpu")
    assert model.phrasebook is not None
    assert model.understood("draw me a red apple") == "red apple"
    assert model.understood("a bicycle") == "a bicycle"
    asked, plain = (
        imagekiln.generate(run, 2, tmp_path / name, prompt=prompt)
        for name, prompt in (("asked", "draw me a red apple"), ("plain", "red apple"))
    )
    written = imagekiln.generate(run, 2, tmp_path / "written", prompt="draw me a red apple", as_written=True)
    assert asked.understood == {"draw me a red apple": "red apple"}
    assert written.understood == {}
    same = [one.read_bytes() == other.read_bytes() for one, other in zip(asked.pictures, plain.pictures, strict=True)]
    assert all(same)


def test_the_command_says_what_it_understood(run: Path, tmp_path: Path, cli: Any) -> None:
    command = ["generate", run, "-n", 1, "--prompt", "draw me a red apple", "--out", tmp_path / "a"]
    assert '"draw me a red apple" was understood as "red apple".' in cli(*command).ok().out
    assert json.loads(cli(*command, "--json").ok().out)["understood"] == {"draw me a red apple": "red apple"}
    assert "understood" not in cli(*command, "--as-written").ok().out


def test_a_model_without_a_phrasebook_takes_words_as_they_stand(named: Path, tmp_path: Path) -> None:
    run = imagekiln.train("stable_diffusion", named, tmp_path / "run", settings=settings())
    model = open_model(run, device="cpu")
    assert model.phrasebook is None
    assert model.understood("draw me a red apple") == "draw me a red apple"


def test_a_model_that_reads_no_text_has_none(named: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"data\.phrasebook: a vae model reads no text"):
        imagekiln.train("vae", named, tmp_path / "run", settings={"data": {"size": 8, "phrasebook": True}})


def test_too_many_captions_are_refused(named: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from imagekiln.engine import inputs

    monkeypatch.setattr(inputs, "MOST_SIGNS", 40)
    with pytest.raises(RecipeError, match="55 characters, and a model keeps 40 at most"):
        imagekiln.train("stable_diffusion", named, tmp_path / "run", settings=settings(phrasebook=True))
    assert phrasebook.MOST_SIGNS == 4_000_000
