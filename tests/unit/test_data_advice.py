"""Advice: the right words at the right numbers; whether pictures may be mirrored, where the truth is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scenes import scene

from imagekiln.data import advice, builtin, mirror, prepared
from imagekiln.data.advice import Facts

LARGE = Facts(50_000, (3, 32, 32), {"cat": 25_000, "dog": 27_000}, num_held_out=2000)


def by_rule(facts: Facts) -> dict[str, advice.Advice]:
    return {one.rule: one for one in advice.advise(facts)}


def thumbs_of_digits(n: int = 400) -> np.ndarray:
    small = builtin.load("digits", Path("unused")).images_NHWC[:n]
    return np.repeat(small.repeat(4, 1).repeat(4, 2), 3, 3)


# -- rules ------------------------------------------------------------------------------------------------------------


def test_a_large_even_set_has_no_warnings():
    found = by_rule(LARGE)
    assert {one.severity for one in found.values()} == {"fine"}
    assert set(found) == {"size", "classes"}


@pytest.mark.parametrize(
    ("facts", "rule", "severity", "words"),
    [
        (replace(LARGE, num_train=300), "size", "warning", "300 pictures to learn from are few"),
        (replace(LARGE, num_train=300), "start", "warning", "fine-tune"),
        (replace(LARGE, num_train=4000), "size", "hint", "GAN with augmentation or for a small diffusion model"),
        (replace(LARGE, num_train=4000), "augment", "hint", "family.augment.policy=ada"),
        (replace(LARGE, counts_by_class={"a": 9, "b": 60}), "classes", "warning", "1 of 2 classes"),
        (replace(LARGE, counts_by_class={"a": 90, "b": 60}), "classes", "hint", "smallest class has 60"),
        (replace(LARGE, counts_by_class={"a": 6000, "b": 600}), "balance", "warning", "10 times as many"),
        (replace(LARGE, num_enlarged=40_000), "resolution", "warning", "77% of the pictures are smaller than 32"),
        (replace(LARGE, num_enlarged=6000), "resolution", "hint", "were enlarged"),
        (replace(LARGE, num_train=3000, image_shape=(3, 256, 256)), "resolution", "hint", "16 times less work"),
        (replace(LARGE, num_copies=2600), "copies", "warning", "2,600 pictures that are copies"),
        (replace(LARGE, largest_group=5200), "crowd", "warning", "5,200 pictures, 10% of the set, are near copies"),
        (replace(LARGE, num_unlabelled=70), "unlabelled", "hint", "--propagate-labels"),
        (replace(LARGE, num_captions=51_000), "captions", "hint", "1,000 of 52,000 pictures have no caption"),
        (replace(LARGE, num_held_out=120), "held out", "hint", "120 pictures are held out"),
    ],
)
def test_what_is_said_when(facts, rule, severity, words):
    said = by_rule(facts)[rule]
    assert said.severity == severity
    assert words in said.sentence
    assert said.numbers


def test_nothing_is_said_without_a_reason():
    found = by_rule(replace(LARGE, num_copies=3, num_captions=52_000, num_enlarged=10, largest_group=2600))
    assert set(found) == {"size", "classes"}
    assert "crowd" not in by_rule(replace(LARGE, num_train=20, num_held_out=0, largest_group=4))
    assert not {"classes", "balance"} & set(by_rule(replace(LARGE, counts_by_class={})))


def test_an_empty_class_divides_by_nothing():
    found = by_rule(replace(LARGE, counts_by_class={"a": 0, "b": 700, "c": 800}))
    assert found["classes"].severity == "warning" and "balance" not in found


def test_warnings_come_first():
    order = [one.severity for one in advice.advise(Facts(120, (3, 128, 128), {"a": 10, "b": 110}))]
    assert order == sorted(order, key=("warning", "hint", "fine").index) and order[0] == "warning"


def test_every_sentence_is_whole():
    sets = (LARGE, Facts(120, (3, 128, 128), {"a": 10, "b": 110}, 5, 50, 10, 10, 60), Facts(0, (1, 8, 8)))
    for facts in sets:
        for one in advice.advise(facts):
            assert one.sentence[0].isupper() or one.sentence[0].isdigit()
            assert one.sentence.endswith(".") and (not one.evidence or one.evidence.endswith("."))


def test_a_crowd_of_near_copies_is_seen_in_a_prepared_set(tmp_path: Path):
    (tmp_path / "photos").mkdir()
    for seed in range(14):
        scene(seed, (64, 64)).save(tmp_path / "photos" / f"{seed:02d}.png")
    for quality in range(30, 70, 10):
        scene(0, (64, 64)).save(tmp_path / "photos" / f"again-{quality}.jpg", quality=quality)
    found = prepared.prepare([str(tmp_path / "photos")], tmp_path / "set", prepared.PrepareConfig(size=32))
    facts = advice.facts_of(found)
    assert (facts.num_pictures, facts.largest_group) == (18, 5)
    assert by_rule(facts)["crowd"].numbers["pictures in the largest group"] == 5


# -- mirroring --------------------------------------------------------------------------------------------------------


def test_digits_are_handed():
    found = mirror.handedness(thumbs_of_digits())
    assert found.verdict == "handed" and found.accuracy > 0.75
    said = by_rule(replace(LARGE, handed=found))["mirror"]
    assert "Do not mirror" in said.sentence


@pytest.mark.parametrize("seed", [0, 1])
def test_pictures_mirrored_by_a_coin_are_symmetric(seed):
    """Each picture and its mirror image are equally likely, so that no classifier can do better than chance."""
    thumbs = thumbs_of_digits(1500)
    turned = np.random.default_rng(seed).random(len(thumbs)) < 0.5
    thumbs[turned] = thumbs[turned][:, :, ::-1]
    found = mirror.handedness(thumbs)
    assert found.verdict == "symmetric" and abs(found.accuracy - 0.5) < 4 * found.error
    said = by_rule(replace(LARGE, num_train=5000, handed=found))["mirror"]
    assert "data.flip=true" in said.sentence


def test_strokes_are_seen_wherever_they_stand():
    """A small letter L at a random place: no mean picture tells its hand, only what lies beside what."""
    generator = np.random.default_rng(0)
    thumbs = np.full((400, 32, 32, 3), 230, np.uint8)
    for picture, (top, left) in zip(thumbs, generator.integers(1, 20, (400, 2)), strict=True):
        picture[top : top + 10, left : left + 2] = picture[top + 8 : top + 10, left : left + 8] = 20
    assert mirror.handedness(thumbs).accuracy > 0.9


def test_mirroring_a_set_changes_nothing_about_it():
    thumbs = thumbs_of_digits(200)
    assert mirror.handedness(thumbs).accuracy == pytest.approx(mirror.handedness(thumbs[:, :, ::-1]).accuracy, abs=0.02)


def test_equal_on_both_sides_is_chance():
    thumbs = np.concatenate([half := thumbs_of_digits(100), half[:, :, ::-1]], 2)[:, :, ::2]
    symmetric = np.concatenate([thumbs[:, :, :16], thumbs[:, :, :16][:, :, ::-1]], 2)
    assert mirror.handedness(symmetric).accuracy == 0.5


def test_of_few_pictures_nothing_is_said():
    found = mirror.handedness(thumbs_of_digits(mirror.FEWEST - 1))
    assert found.verdict == "unknown" and "mirror" not in by_rule(replace(LARGE, handed=found))
    assert mirror.handedness(np.zeros((0, 32, 32, 3), np.uint8)).verdict == "unknown"


def test_a_near_thing_is_left_open():
    assert mirror.Handedness(0.55, 0.01, 1500).verdict == "unknown"
    assert mirror.Handedness(0.52, 0.05, 100).verdict == "unknown"
