"""The benchmark of emoji and their names: held-out wordings, chances, intervals, and a matcher that learns."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
from PIL import Image

from imagekiln.data.captions import reworded, tags, varied
from imagekiln.errors import UsageError

pytestmark = pytest.mark.usefixtures("beside_the_benchmarks")
CAPTIONS = ["red apple, fruit, food, red, sweet thing", "sweet, food, sugar", "apple, fruit", "man: bald, hair, no"]


def _concepts() -> list:
    from emoji_wordings import Concept

    names = ["red apple", "apple red", "tall tree", "old house", "cat", "big dog", "sun", "moon, new", "star"]
    own = [("fruit", "food", f"{name} sign", f"only {place}", "thing") for place, name in enumerate(names)]
    own[-1] = ("fruit", "food", "thing", "starry")  # no more than what others have too
    return [Concept(row, name, some, "ab"[row % 2]) for row, (name, some) in enumerate(zip(names, own, strict=True))]


# -- wordings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_every_text_of_training_is_known_as_one(kept: int) -> None:
    from emoji_wordings import Trained

    trained = Trained(CAPTIONS, kept)
    for caption, position in itertools.product(CAPTIONS, range(60)):
        told = varied(caption, 3, position, dropout=0.5, shuffle=True, keep=kept)
        assert not told or trained.holds(told)
        assert not told or trained.holds(told.replace(",", "").upper())


def test_texts_that_training_cannot_make_are_held_out() -> None:
    from emoji_wordings import Trained

    trained = Trained(CAPTIONS)
    held_out = [
        "a picture of red apple",
        "apple red",
        "fruit, red apple",
        "fruit, food",
        "red apple, fruit, fruit",
        "man",
    ]
    assert [text for text in held_out if trained.holds(text)] == []
    assert Trained(CAPTIONS, kept=0).holds("fruit, red apple")


def test_prompts_are_held_out_tell_the_concept_and_do_not_depend_on_the_order_of_the_set() -> None:
    from emoji_wordings import KINDS, Trained, bag, choose

    concepts = _concepts()
    asked = choose(concepts, 100)
    # a name with a comma has no wording of one part, and the tags of the last one tell nothing
    assert {one.concept.name for one in asked} == {one.name for one in concepts} - {"moon, new", "star"}
    trained = Trained([", ".join([one.name, *one.tags]) for one in concepts])
    for concept, prompts in asked:
        assert not any(trained.holds(prompts[kind]) for kind in KINDS)
        assert concept.name in prompts["template"]
        named = set(bag(concept.name))
        assert named <= set(prompts["reworded"].replace(",", "").split())
        if len(prompts["reworded"].split()) == len(named) > 1:  # another order, which is nobody else's name
            assert prompts["reworded"] not in {one.name for one in concepts}
        told = set(tags(prompts["tags"]))
        assert not any(named <= set(tag.split()) for tag in told)
        assert [other.name for other in concepts if told <= {other.name, *other.tags}] == [concept.name]
    mixed = random.Random(0).sample(concepts, len(concepts))
    assert [one.prompts for one in choose(mixed, 100)] == [one.prompts for one in asked]


def test_a_run_that_may_have_seen_a_prompt_is_refused() -> None:
    from emoji_wordings import Trained, choose, refuse_trained

    concepts = _concepts()
    told = [", ".join([one.name, *one.tags]) for one in concepts]
    asked = choose(concepts, 100)
    refuse_trained(asked, Trained(told))
    loose = Trained(told, 0, ["a picture of {caption}"], drops_words=True)
    with pytest.raises(UsageError, match="not held out"):
        refuse_trained(asked, loose)
    others = choose(concepts, 100, loose)
    assert {one.concept.name for one in others} < {one.concept.name for one in asked}, "a third had that template"
    refuse_trained(others, loose)


def test_every_text_of_a_training_with_wordings_is_known_as_one() -> None:
    from emoji_wordings import Trained

    wordings = ["a picture of {caption}", "{caption} emoji", "small {caption} icon"]
    trained = Trained(CAPTIONS, 0, wordings, drops_words=True)
    for caption, position in itertools.product(CAPTIONS, range(60)):
        told = varied(caption, 3, position, dropout=0.5, shuffle=True, keep=0)
        told = reworded(told, 3, position, dropout=0.3, wordings=wordings)
        assert not told or trained.holds(told)
    assert not any(trained.holds(text) for text in ("this shows red apple", "thing sweet", "a picture of pear"))


# -- judging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ahead", "free", "drawn"), [(0, 6, 3), (1, 6, 3), (2, 6, 3), (4, 6, 3), (1, 2, 3), (0, 0, 3)])
def test_the_chance_of_coming_first_is_that_of_all_draws(ahead: int, free: int, drawn: int) -> None:
    from emoji_text import first_of

    draws = list(itertools.combinations(range(free), min(drawn, free)))
    assert first_of(ahead, free, drawn) == pytest.approx(fmean(min(draw, default=ahead) >= ahead for draw in draws))


def _lineup(generator: torch.Generator, concepts: int, names: int):
    from emoji_text import NAMES, Lineup

    own_K = torch.arange(concepts)
    allowed_KN = torch.ones(concepts, names, dtype=torch.bool)
    allowed_KN[own_K, own_K] = False
    others = [row.nonzero()[:, 0][torch.randperm(names - 1, generator=generator)[: NAMES - 1]] for row in allowed_KN]
    return Lineup(own_K, allowed_KN, torch.arange(names).expand(concepts, -1) % 4 == 0, torch.stack(others))


def test_the_expected_share_is_the_mean_over_draws_of_names() -> None:
    from emoji_text import EXPECTED, TOP, WITHIN, retrieved

    generator = torch.Generator().manual_seed(0)
    scores_KN = torch.randn(40, 60, generator=generator)
    scores_KN[torch.arange(40), torch.arange(40)] += 1.5
    found = [retrieved(scores_KN, _lineup(generator, 40, 60)) for _ in range(400)]
    mean_K = torch.stack([one[TOP] for one in found]).mean(0)
    expected_K = found[0][EXPECTED]
    variance_K = expected_K * (1 - expected_K) / 400
    assert float((mean_K - expected_K).abs().max()) < 5 * 0.5 / 400**0.5
    assert abs(float((mean_K - expected_K).sum())) < 5 * float(variance_K.sum()) ** 0.5
    assert found[0][WITHIN].mean() > expected_K.mean()  # 14 or 15 other names instead of 19


def test_equal_scores_are_no_hits() -> None:
    from emoji_text import retrieved

    found = retrieved(torch.zeros(5, 60), _lineup(torch.Generator().manual_seed(0), 5, 60))
    assert all(value_K.sum() == 0 for value_K in found.values())


def test_nearly_identical_pictures_and_names_of_the_same_words_never_stand_beside_a_concept() -> None:
    from emoji_text import NAMES, Lineup
    from emoji_wordings import Concept

    images = torch.randint(0, 256, (30, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images[1] = images[0] ^ 1
    concepts = [Concept(row, f"name {row}", (), str(row % 2)) for row in range(30)]
    concepts[2] = concepts[2]._replace(name="0: NAME")
    lineup = Lineup.of(concepts[:1], concepts, images)
    assert (~lineup.allowed_KN[0]).nonzero()[:, 0].tolist() == [0, 1, 2]
    assert len(set(lineup.others_KM[0].tolist()) - {0, 1, 2}) == NAMES - 1
    assert lineup.same_KN[0].nonzero()[:, 0].tolist() == list(range(0, 30, 2))


def test_the_interval_is_wilsons_and_copies_of_a_concept_do_not_narrow_it() -> None:
    from emoji_text import REACH, share

    values_K1 = np.array([1.0] * 30 + [0.0] * 10)[:, None]
    mean, (low, high) = share(values_K1)
    # the two places where |p - mean| = z sqrt(p (1 - p) / n), n one less because the variance is estimated
    for place in (low, high):
        assert abs(place - mean) == pytest.approx(REACH * math.sqrt(place * (1 - place) / 39))
    copied = share(np.repeat(values_K1, 3, 1))
    assert (copied[0], *copied[1]) == pytest.approx((mean, low, high))
    independent = np.random.default_rng(0).random((40, 3)) < 0.75
    narrow = share(independent.astype(float))[1]
    assert narrow[1] - narrow[0] < 0.8 * (high - low)
    assert share(np.ones((20, 2)))[1] == pytest.approx((20 / (20 + REACH**2), 1.0))


# -- the matcher ------------------------------------------------------------------------------------------------------


def test_a_matcher_learns_which_name_is_whose_and_is_trained_once(tmp_path: Path) -> None:
    from emoji_matcher import matcher_of

    colours = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
    shapes = {"bar": (slice(8, 24), slice(None)), "box": (slice(8, 24), slice(8, 24))}
    images, texts = [], []
    for (colour, value), (shape, where) in itertools.product(colours.items(), shapes.items()):
        image = torch.full((3, 32, 32), 128, dtype=torch.uint8)
        image[(slice(None), *where)] = torch.tensor(value, dtype=torch.uint8)[:, None, None]
        images.append(image)
        texts.append([f"{colour} {shape}", colour, "thing"])
    pictures, said = torch.stack(images), []
    first = matcher_of(pictures, texts, 0, steps=60, folder=tmp_path)
    scores = first.of_pictures(pictures) @ first.of_texts([name for name, *_ in texts]).T
    assert scores.argmax(1).tolist() == list(range(8))
    again = matcher_of(pictures, texts, 0, steps=60, folder=tmp_path, say=said.append)
    assert len(list(tmp_path.iterdir())) == 1
    assert torch.equal(again.of_pictures(pictures), first.of_pictures(pictures))
    matcher_of(pictures, texts, 1, steps=1, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_names_are_told_more_often_than_not_and_no_text_is_empty() -> None:
    from emoji_matcher import NAME_ALONE, WITH_NAME, bags

    told = bags([["a", "b", "c"]] * 4000, {"a": 0, "b": 1, "c": 2})
    on_NP = told.chosen(torch.Generator().manual_seed(0)).view(-1, 3)
    assert on_NP.any(1).all()
    # without the name unless no tag was left: a quarter of those
    assert float(on_NP[:, 0].float().mean()) == pytest.approx(WITH_NAME + (1 - WITH_NAME) / 4, abs=0.03)
    assert float(on_NP[:, 1].float().mean()) == pytest.approx((1 - NAME_ALONE) / 2, abs=0.03)


# -- the phrasebook ---------------------------------------------------------------------------------------------------


def test_understanding_is_counted_on_real_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from phrasebook import main

    from imagekiln.data import captions

    (tmp_path / "emoji").mkdir()
    lines = ["file_name,text,group,subgroup,tags"]
    for row, concept in enumerate(_concepts() * 3):
        name = f"{captions.clean(concept.name)} {'abc'[row // len(_concepts())]}"
        noise = np.random.default_rng(row).integers(0, 255, (16, 16, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "emoji" / f"{row}.png")
        lines.append(
            f'{row}.png,"{name}",{concept.group},,{"|".join([*concept.tags[:2], f"only {row}", f"mark {row}"])}'
        )
    (tmp_path / "emoji" / "metadata.csv").write_text("\n".join(lines))
    assert main(["--data", str(tmp_path / "emoji"), "--concepts", "4", "--records", str(tmp_path), "--record"]) == 0
    assert "benchmark concepts understood, name" in capsys.readouterr().out
    (record,) = tmp_path.glob("phrasebook-*.json")
    rows = {row["what"]: row for row in json.loads(record.read_text())["rows"]}
    assert [rows[f"{kind} concepts understood, name"]["value"] for kind in ("benchmark", "other")] == [1.0, 1.0]
    assert rows["benchmark concepts understood, template"]["n"] == 4
