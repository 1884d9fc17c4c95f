"""Every check of a set on pictures made for it, and the search for pairs against looking at all of them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter
from scenes import scene

from imagekiln.config import parse
from imagekiln.data import checks, measures, source
from imagekiln.data.checks import CheckName, CleanConfig, Finding, duplicates, features, labels, registration
from imagekiln.data.survey import MEASURES, THUMB, Survey
from imagekiln.errors import RecipeError

CONFIG = CleanConfig()


def surveyed(
    images: Sequence[Image.Image | None],
    given: Sequence[str | None] | None = None,
    texts: Sequence[str | None] | None = None,
) -> Survey:
    """A survey of these pictures; None is a file that could not be read."""
    count = len(images)
    measured, thumbs = np.zeros(count, MEASURES), np.zeros((count, THUMB, THUMB, 3), np.uint8)
    for index, image in enumerate(images):
        if image is not None:
            measured[index], thumbs[index] = measures.measure(image)
    measures.add_hashes(measured, thumbs)
    return Survey(
        [f"{index}.png" for index in range(count)],
        list(given or [None] * count),
        list(texts or [None] * count),
        ["" if image else "truncated" for image in images],
        [source.digest(np.asarray(image)) if image else "" for image in images],
        measured,
        thumbs,
    )


def found(check: str, survey: Survey, config: CleanConfig = CONFIG) -> list[int]:
    findings = checks.CHECKS[check][0](survey, config)
    assert all(finding.check == check and finding.reason for finding in findings)
    return [finding.index for finding in findings]


def written(text: str) -> Survey:
    return surveyed([scene(0, (32, 32))], texts=[text])


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return Image.open(stream).convert("RGB")


def cropped(image: Image.Image, left: float, top: float, share: float = 0.95) -> Image.Image:
    width, height = round(share * image.width), round(share * image.height)
    x, y = round(left * (image.width - width)), round(top * (image.height - height))
    return image.crop((x, y, x + width, y + height))


# -- the whole --------------------------------------------------------------------------------------------------------


def test_every_check_has_a_name_that_may_leave_out_and_a_sentence() -> None:
    assert tuple(checks.CHECKS) == get_args(CheckName)
    assert all(sentence.endswith(".") and len(sentence) > 30 for _, sentence in checks.CHECKS.values())
    assert set(CONFIG.leave_out) < set(checks.CHECKS)


def test_an_unknown_check_cannot_leave_out() -> None:
    with pytest.raises(RecipeError, match="leave_out"):
        parse(CleanConfig, {"leave_out": ["blury"]}, "clean")
    assert parse(CleanConfig, {"leave_out": []}, "clean").leave_out == ()


@pytest.mark.parametrize("images", [[], [None, None]])
def test_nothing_is_found_where_there_is_nothing(images: list[None]) -> None:
    survey = surveyed(images)
    assert checks.run(survey, CONFIG) == []
    assert checks.groups(survey, []).tolist() == list(range(len(images)))


def test_good_pictures_are_left_in_peace() -> None:
    names = ["a"] * 20 + ["b"] * 20
    survey = surveyed([scene(seed) for seed in range(40)], names, [f"a scene number {seed}" for seed in range(40)])
    assert checks.run(survey, CONFIG) == []


def test_findings_come_in_the_order_of_the_checks_and_the_survey_stays_as_it_was() -> None:
    survey = surveyed([Image.new("L", (9, 40)), None, scene(1), scene(1)])
    before = survey.measured.copy(), survey.thumbs.copy()
    findings = checks.run(survey, CONFIG)
    assert [(f.check, f.index) for f in findings] == [
        ("small", 0), ("narrow", 0), ("blank", 0), ("dark", 0), ("duplicate", 3)
    ]  # fmt: skip
    assert findings[-1].other == 2 and "2.png" in findings[-1].reason
    assert (survey.measured == before[0]).all() and (survey.thumbs == before[1]).all()


# -- single pictures --------------------------------------------------------------------------------------------------


def test_small_is_absolute_or_against_the_others() -> None:
    sizes = [(400, 300)] * 5 + [(70, 90), (60, 90), (80, 15)]
    survey = surveyed([scene(at, size) for at, size in enumerate(sizes)])
    assert found("small", survey) == [6, 7]  # a quarter of 300 is more than 64, and 64 is large enough
    assert found("small", survey, CleanConfig(min_side_ratio=0, min_side=16)) == [7]
    assert found("small", survey, CleanConfig(min_side_ratio=0)) == []
    assert found("small", surveyed([scene(at, (28, 28)) for at in range(5)])) == []


def test_narrow_counts_both_ways() -> None:
    survey = surveyed([scene(0, (100, 30)), scene(1, (30, 100)), scene(2, (90, 30))])
    assert found("narrow", survey) == [0, 1]
    assert checks.CHECKS["narrow"][0](survey, CONFIG)[0].value == pytest.approx(100 / 30)


def test_blank_is_one_tone_with_noise_or_a_speck_but_not_two_colours_of_equal_luma() -> None:
    rng = np.random.default_rng(0)
    noisy = Image.fromarray(np.clip(200 + rng.normal(0, 3, (64, 64)), 0, 255).astype(np.uint8))
    speck = Image.new("L", (64, 64), 255)
    speck.putpixel((30, 30), 0)
    colours = Image.new("RGB", (64, 64), (200, 0, 0))
    colours.paste((0, 102, 0), (0, 0, 64, 32))  # both of luma 60
    lines = Image.new("L", (64, 64), 255)
    ImageDraw.Draw(lines).ellipse((10, 10, 54, 54), outline=0, width=2)
    survey = surveyed([Image.new("RGB", (64, 64), "teal"), noisy, speck, colours, lines, scene(0)])
    assert survey.measured["contrast"][3] < 0.01
    assert found("blank", survey, CleanConfig(min_entropy=0.2)) == [0, 1, 2]
    assert duplicates.near_pairs(survey, CONFIG).first.size == 0


def test_dark_and_bright_judge_the_whole_picture() -> None:
    light = np.asarray(scene(0)).astype(float) / 255
    night = Image.fromarray((light * 40).astype(np.uint8))
    snow = Image.fromarray((225 + light * 30).astype(np.uint8))
    lamp = night.copy()
    lamp.paste((255, 255, 255), (0, 0, 48, 36))
    survey = surveyed([night, snow, lamp, scene(1)])
    assert found("dark", survey) == [0]
    assert found("bright", survey) == [1]


def test_blurred_are_found_and_blank_ones_are_not_blurred() -> None:
    images = [scene(seed) for seed in range(12)]
    images[3:6] = [image.filter(ImageFilter.GaussianBlur(3)) for image in images[3:6]]
    survey = surveyed([*images, Image.new("RGB", (60, 60), "white")])
    assert found("blurred", survey) == [3, 4, 5]


# -- duplicates -------------------------------------------------------------------------------------------------------


def test_duplicates_are_all_but_the_first_and_never_of_unusable_files() -> None:
    survey = surveyed([None, scene(0), scene(1), scene(0), None, scene(0)])
    assert [(f.index, f.other) for f in duplicates.duplicate(survey, CONFIG)] == [(3, 1), (5, 1)]


def test_near_duplicates_of_every_kind_are_found_and_nothing_else() -> None:
    images = [scene(seed) for seed in range(40)]
    copies = [
        cropped(images[0], 0, 0),
        cropped(images[1], 1, 1),
        cropped(images[2], 0.5, 0.2),
        jpeg(images[3], 30),
        images[4].transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        jpeg(cropped(images[5].transpose(Image.Transpose.FLIP_LEFT_RIGHT), 0.3, 0.9), 60),
        ImageEnhance.Brightness(images[6]).enhance(0.7),
        ImageEnhance.Brightness(images[7]).enhance(1.25),
        images[8].resize((48, 36), Image.Resampling.LANCZOS),
    ]
    survey = surveyed([*copies, *images])
    findings = duplicates.near_duplicate(survey, CONFIG)
    assert [(f.other, f.index) for f in findings] == [(at, at + 9) for at in range(9)]
    assert ["mirrored" in finding.reason for finding in findings] == [at in (4, 5) for at in range(9)]
    assert all(finding.value <= finding.threshold for finding in findings)


def test_groups_join_exact_and_near_duplicates_of_any_degree() -> None:
    a, b = scene(0), scene(1)
    survey = surveyed([b, jpeg(a, 40), scene(2), a, jpeg(b, 35), a, jpeg(b, 60), None])
    group = checks.groups(survey, checks.run(survey, CONFIG))
    assert group.dtype == np.int64 and group.tolist() == [0, 1, 2, 1, 0, 1, 0, 7]


@pytest.mark.parametrize("bits", [0, 3, 9, 16])
def test_the_search_finds_exactly_the_pairs_within_the_bits(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "_ROWS", 7)
    monkeypatch.setattr(duplicates, "_COLUMNS", 10)
    rng = np.random.default_rng(bits)
    hashes, others = (rng.integers(0, 2**20, 53, dtype=np.uint64) for _ in range(2))
    others[30:40] = hashes[:10]
    expected = [
        (i, j) for i in range(53) for j in range(i + 1, 53) if (int(hashes[i]) ^ int(others[j])).bit_count() <= bits
    ]
    pairs = duplicates.within(hashes, others, bits)
    assert sorted(zip(*(side.tolist() for side in pairs), strict=True)) == expected
    assert all(pairs.size == 0 for pairs in duplicates.within(hashes[:0], others[:0], bits))


def test_fewer_bits_are_allowed_where_all_pictures_are_alike() -> None:
    rng = np.random.default_rng(0)
    apart = rng.integers(0, 2**63, 400, dtype=np.uint64)
    assert duplicates.affordable_bits(apart, apart[::-1], 12) == 12
    alike = np.uint64(1) << rng.integers(0, 64, 400).astype(np.uint64)  # any two differ in 2 bits, if at all
    assert duplicates.affordable_bits(alike, apart, 12) == 1


@given(st.integers(1, 30).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.tuples(*[st.integers(0, n - 1)] * 2)))))
@settings(max_examples=50, deadline=None)
def test_joined_is_reachability(case: tuple[int, list[tuple[int, int]]]) -> None:
    count, edges = case
    reach = np.eye(count, dtype=bool)
    for one, other in edges:
        reach[one, other] = reach[other, one] = True
    for _ in range(count):
        reach = reach @ reach
    assert duplicates.joined(count, edges).tolist() == reach.argmax(1).tolist()


def test_registration_explains_small_moves_and_refuses_large_ones() -> None:
    large = np.asarray(scene(0, (44, 44)).filter(ImageFilter.GaussianBlur(1)), np.float32)
    whole = large[6:38, 6:38]
    moved = [large[6 + dy : 38 + dy, 6 + dx : 38 + dx] for dy, dx in ((1, 0), (0, -2), (1, 1), (6, 0), (0, -6))]
    agreement = registration.agreement(np.stack([whole] * 5), np.stack(moved))
    assert (agreement.residual[:3] < 0.01).all() and (agreement.detail[:3] > 0.95).all()
    assert (agreement.residual[3:] > 0.2).all()


def test_registration_does_not_care_for_order_gain_and_offset() -> None:
    a, b = (np.stack([np.asarray(scene(seed, (32, 32)), np.float32) for seed in seeds]) for seeds in ((0, 1), (0, 2)))
    forth, back = registration.agreement(a, 0.6 * b + 30), registration.agreement(0.6 * b + 30, a)
    assert np.allclose(forth.residual, back.residual) and np.allclose(forth.detail, back.detail)
    assert forth.residual[0] < 1e-4 and forth.detail[0] > 0.99
    assert forth.residual[1] > 0.5 and forth.detail[1] < 0.5


def test_what_pairs_share_is_computed_once_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    thumbs = np.stack([measures.measure(scene(seed))[1] for seed in range(3)])
    thumbs = np.concatenate([thumbs, thumbs[:, ::-1], np.roll(thumbs, 1, 1)])
    first, second = np.triu_indices(len(thumbs), 1)
    alone = [registration.agreement(thumbs[[one]], thumbs[[two]]) for one, two in zip(first, second, strict=True)]
    for block in (64, 5):
        monkeypatch.setattr(registration, "_BLOCK", block)
        together = registration.agreement_of(thumbs, first, second)
        for found, expected in zip(together, zip(*alone, strict=True), strict=True):
            assert np.abs(found - np.concatenate(expected)).max() < 1e-6
    assert (together.residual < 1).sum() == 3 and len(np.unique(together.residual)) == 4


def test_pairs_do_not_depend_on_how_many_are_looked_at_together(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [scene(seed) for seed in range(6)]
    survey = surveyed([jpeg(image, quality) for image in kinds for quality in (95, 60, 30)])
    expected = duplicates.near_pairs(survey, CONFIG)
    assert len(expected.first) >= 18
    for pairs, threads in ((1, 1), (7, 3), (1000, 2)):
        monkeypatch.setattr(duplicates, "_PAIRS", pairs)
        monkeypatch.setattr(duplicates, "_THREADS", threads)
        duplicates._remembered.clear()
        found = duplicates.near_pairs(survey, CONFIG)
        assert all((mine == theirs).all() for mine, theirs in zip(found[:2], expected[:2], strict=True))
        assert np.allclose(found.residual, expected.residual, atol=1e-6)


def test_pairs_that_start_far_apart_are_not_followed() -> None:
    a, b = (np.stack([np.asarray(scene(seed, (32, 32)), np.float32) for seed in seeds]) for seeds in ((0, 1), (0, 2)))
    mixed = registration.agreement(a, b)
    alone = registration.agreement(a[:1], b[:1])
    assert (mixed.residual[1], mixed.detail[1]) == (1, 0)
    assert np.allclose((mixed.residual[0], mixed.detail[0]), (alone.residual[0], alone.detail[0]), atol=1e-5)


# -- outliers ---------------------------------------------------------------------------------------------------------


def test_an_outlier_is_what_the_rest_is_not() -> None:
    def face(seed: int) -> Image.Image:
        place = np.random.default_rng(seed).integers(-4, 5, 2)
        image = Image.new("RGB", (64, 64), (40, 60, 90))
        ImageDraw.Draw(image).ellipse(
            (16 + place[0], 12 + place[1], 48 + place[0], 52 + place[1]), fill=(220, 180, 150)
        )
        return image

    chart = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(chart).line((0, 60, 20, 20, 40, 50, 63, 5), fill=(0, 0, 0), width=4)
    images = [face(seed) for seed in range(60)]
    assert found("outlier", surveyed([*images, chart])) == [60]
    assert found("outlier", surveyed(images)) == []
    assert found("outlier", surveyed([*images[:20], chart])) == []  # too few to say what is usual


# -- labels -----------------------------------------------------------------------------------------------------------


def test_a_class_needs_pictures() -> None:
    survey = surveyed([scene(0)] * 5 + [None], ["a", "a", "b", None, "b", "b"])
    assert found("few_in_class", survey, CleanConfig(min_in_class=2)) == []
    assert found("few_in_class", survey, CleanConfig(min_in_class=3)) == [0, 1, 2, 4]


def test_one_picture_under_two_labels_is_found_also_when_it_is_only_nearly_the_same() -> None:
    a, b, c = scene(0), scene(1), scene(2)
    survey = surveyed([a, a, jpeg(b, 40), b, c, c, a], ["x", "y", "x", "y", "x", "x", None])
    assert found("two_labels", survey) == [0, 1, 2, 3]
    assert [f.other for f in labels.two_labels(survey, CONFIG)] == [1, 0, 3, 2]


def two_kinds(count: int) -> tuple[list[Image.Image], list[str]]:
    """Stripes across in warm colours and stripes down in cold ones, noisy."""
    images = []
    for at in range(count):
        rng = np.random.default_rng(at)
        wave = np.sin(np.arange(32) * rng.uniform(0.5, 1.0) + rng.uniform(0, 6))
        pixels = np.zeros((32, 32, 3)) + 128 + 60 * (wave[:, None, None] if at % 2 else wave[None, :, None])
        pixels += rng.normal(0, 25, pixels.shape) + ((30, 0, -30) if at % 2 else (-30, 0, 30))
        images.append(Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)))
    return images, ["across" if at % 2 else "down" for at in range(count)]


def test_swapped_labels_lead_the_ranking() -> None:
    images, given = two_kinds(100)
    swapped = [5, 20, 61, 98]
    wrong: list[str | None] = [
        {"across": "down", "down": "across"}[g] if at in swapped else g for at, g in enumerate(given)
    ]
    wrong[7] = None
    survey = surveyed([*images, scene(0)], [*wrong, "alone"])
    suspicion = labels.suspicion(survey)
    assert np.flatnonzero(np.isnan(suspicion)).tolist() == [7, 100]
    ranked = np.argsort(-np.nan_to_num(suspicion))
    assert sorted(ranked[:4].tolist()) == swapped
    findings = labels.suspicious_label(survey, CleanConfig(label_probability=0.4))
    assert [finding.index for finding in findings] == ranked[: len(findings)].tolist()
    assert swapped == sorted(found("suspicious_label", survey, CleanConfig(label_probability=0.4)))
    assert "looks like" in findings[0].reason


def test_labels_are_not_judged_by_too_few_others() -> None:
    images, given = two_kinds(labels.FEWEST - 2)
    assert labels.suspicious_label(surveyed(images, given), CONFIG) == []
    images, _ = two_kinds(60)
    assert np.isnan(labels.suspicion(surveyed(images, ["one"] * 60))).all()


def test_a_classifier_sees_a_sample_of_a_large_set(monkeypatch: pytest.MonkeyPatch) -> None:
    images, given = two_kinds(120)
    monkeypatch.setattr(labels, "FITTED_ON", 60)
    monkeypatch.setattr(labels, "_BLOCK", 17)
    suspicion = labels.suspicion(surveyed(images, given))
    assert (suspicion < 0.5).mean() > 0.95


def test_features_see_direction_colour_and_place() -> None:
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[:, ::8] = stripes[:, 1::8] = 255
    left = np.zeros((32, 32, 3), np.uint8)
    left[:, :16] = (255, 0, 0)
    seen = features.features(np.stack([stripes, stripes.transpose(1, 0, 2), left, left[:, ::-1]]))
    assert seen.shape == (4, features.NUM_FEATURES) and seen.dtype == np.float32 and np.isfinite(seen).all()
    edges = seen[:2, : 16 * 9].reshape(2, 4, 4, 9).sum((1, 2))
    assert edges[0].argmax() == 0 and edges[1].argmax() == 4  # across, and down: 4.5 of 9 directions
    colours = seen[2:, -144:]
    assert np.allclose(colours[0], colours[1]) and not np.allclose(seen[2], seen[3])


def test_labels_are_missing_only_where_others_have_one() -> None:
    images = [scene(seed, (32, 32)) for seed in range(3)]
    assert found("missing_label", surveyed(images)) == []
    assert found("missing_label", surveyed([*images, None], ["cat", None, "dog", None])) == [1]


# -- captions ---------------------------------------------------------------------------------------------------------


def test_captions_are_missing_only_where_others_have_one() -> None:
    images = [scene(seed, (32, 32)) for seed in range(3)]
    assert found("missing_caption", surveyed(images)) == []
    survey = surveyed([*images, None], texts=["a", None, "", None])
    assert found("missing_caption", survey) == [1]
    assert found("empty_caption", survey) == [2]
    assert found("empty_caption", written(" \t\n")) == [0]


def test_one_caption_for_most_pictures_is_found() -> None:
    images = [scene(seed, (32, 32)) for seed in range(12)]
    assert found("repeated_caption", surveyed(images, texts=["a photo"] * 7 + [str(at) for at in range(5)])) == list(
        range(7)
    )
    assert found("repeated_caption", surveyed(images, texts=["a cat"] * 6 + ["a dog"] * 6)) == []
    assert found("repeated_caption", surveyed(images[:3], texts=["a photo"] * 3)) == []


def test_long_captions_are_counted_in_characters() -> None:
    assert found("long_caption", written("貓" * 1000)) == []
    assert found("long_caption", written("貓" * 1001)) == [0]


@pytest.mark.parametrize(
    "text",
    ["a\0b", "bell\x07", "\x1b[31mred", "cafÃ©", "itâ€™s", "Â©2020", "\ufeff".encode().decode("cp1252"), "a \ufffd b"],
)
def test_damaged_captions_are_found(text: str) -> None:
    assert found("odd_caption", written(text)) == [0]


@pytest.mark.parametrize(
    "text",
    [
        "café, naïve, São Paulo, NÃO, Ângela, Île-de-France",
        "貓坐在墊子上",
        "👩‍👩‍👧 🏳️‍🌈",
        "قطة",
        "line one\nline two\ttab",
        "it\u2019s \u201cquoted\u201d \u2013 5 °C",
    ],
)
def test_captions_of_any_script_are_not_damaged(text: str) -> None:
    assert found("odd_caption", written(text)) == []


def test_findings_are_values() -> None:
    finding = Finding("blurred", 3, 0.1, 0.3, "blurred")
    assert finding == replace(finding) and finding.other == -1


def test_of_too_many_alike_pairs_the_most_alike_are_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [scene(seed) for seed in range(2)]
    survey = surveyed([*images, *(jpeg(image, quality) for quality in (95, 80, 60, 40) for image in images)])
    assert duplicates.near_pairs(survey, CONFIG).first.size == 2 * 10  # all pairs of five, twice
    monkeypatch.setattr(duplicates, "_REGISTERED_A_PICTURE", 1)
    duplicates._remembered.clear()
    pairs = duplicates.near_pairs(survey, CONFIG)
    assert pairs.first.size == 10
    assert {(0, 2), (1, 3)} <= set(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))
    duplicates._remembered.clear()
