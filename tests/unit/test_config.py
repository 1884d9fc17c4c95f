"""Recipes: what is read, laid over one another, refused and suggested."""

from __future__ import annotations

import copy
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagekiln.config import AverageConfig, Recipe, Section, TrainConfig, merge, override, parse, read_toml, write_toml
from imagekiln.errors import RecipeError, did_you_mean

words = st.text("abcdefg_", min_size=1, max_size=6)
leaves = st.integers() | st.booleans() | words
nested = st.recursive(st.dictionaries(words, leaves, max_size=3), lambda inner: st.dictionaries(words, inner | leaves))


@given(nested, nested, nested)
def test_merge_is_associative_and_the_last_word_counts(a: dict, b: dict, c: dict) -> None:
    before = copy.deepcopy((a, b, c))
    flat = merge(a, b)
    assert all(flat[key] == value for key, value in b.items() if not isinstance(value, dict))
    assert merge(a, {}) == a == merge({}, a) == merge(a, a)
    if not _clash(a, b, c):
        assert merge(merge(a, b), c) == merge(a, merge(b, c)) == merge(a, b, c)
    assert (a, b, c) == before


def _clash(*layers: dict) -> bool:
    """Whether one layer has a section where another has a value: there the order of merging matters."""
    for key in {key for layer in layers for key in layer}:
        values = [layer[key] for layer in layers if key in layer]
        sections = [isinstance(value, dict) for value in values]
        if any(sections) and (not all(sections) or _clash(*values)):
            return True
    return False


@given(st.lists(words, min_size=1, max_size=3), st.integers() | st.booleans() | st.floats(allow_nan=False))
def test_override_sets_what_it_names(path: list[str], value: object) -> None:
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    result = override({}, [f"{'.'.join(path)}={text}"])
    for part in path:
        result = result[part]
    assert result == value and type(result) is type(value)


@given(nested, st.lists(st.text(max_size=12), max_size=3))
def test_override_refuses_or_answers_and_changes_nothing(values: dict, assignments: list[str]) -> None:
    before = copy.deepcopy(values)
    try:
        assert isinstance(override(values, assignments), dict)
    except RecipeError as error:
        assert "--set" in str(error)
    assert values == before


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("my photos", "my photos"),
        ("'8'", "8"),
        ("[1,2]", [1, 2]),
        ("1e-4", 1e-4),
        ("true", True),
        ("", ""),
        ("9" * 5000, "9" * 5000),
        ("a=b", "a=b"),
    ],
    ids=lambda part: str(part)[:8],
)
def test_values_are_toml_or_text(text: str, value: object) -> None:
    assert override({}, [f"a.b={text}"]) == {"a": {"b": value}}


def test_dates_in_a_recipe_are_not_a_crash() -> None:
    assert override(tomllib.loads("day = 2024-01-01"), ["a=1"])["a"] == 1


@given(words, st.lists(words, max_size=6))
def test_a_suggestion_is_a_known_word(given_word: str, known: list[str]) -> None:
    sentence = did_you_mean(given_word, known)
    assert any(word in sentence for word in known) if known else sentence == "There is none."
    if given_word in known:
        assert sentence == f"Did you mean '{given_word}'?"


@given(st.sampled_from(sorted(TrainConfig.model_fields)), st.integers(0, 20))
def test_one_slip_of_the_finger_is_mended(key: str, place: int) -> None:
    place %= len(key)
    slip = key[:place] + key[place + 1 :]
    if len(key) >= 5 and slip not in TrainConfig.model_fields:
        with pytest.raises(RecipeError, match=f"train.{slip}: no such setting. Did you mean '"):
            parse(TrainConfig, {slip: 1}, "train")


class Inner(Section):
    depth: int = 1


class Outer(Section):
    inner: Inner = Inner()
    count: int


@pytest.mark.parametrize(
    ("values", "words_said"),
    [
        ({"count": 1, "inner": {"dpth": 2}}, "where.inner.dpth: no such setting. Did you mean 'depth'"),
        ({"count": 1, "depth": 2}, "where.depth: no such setting. Did you mean 'where.inner.depth'"),
        ({}, "where.count: this setting is missing"),
        ({"count": "x"}, "where.count = 'x'"),
        ({"count": "x", "inner": {"depth": "y"}}, "1 more after this one"),
    ],
    ids=["unknown", "in a section", "missing", "wrong type", "two"],
)
def test_sentences(values: dict, words_said: str) -> None:
    with pytest.raises(RecipeError, match=words_said):
        parse(Outer, values, "where")


def test_a_recipe_is_frozen_and_survives_the_disk(tmp_path: Path) -> None:
    recipe = Recipe.model_validate({"family": {"name": "x"}, "train": {"averages": [{"kind": "exponential"}]}})
    with pytest.raises(ValueError, match="frozen"):
        recipe.train = TrainConfig()
    (tmp_path / "r.toml").write_text(write_toml(recipe), encoding="utf-8-sig")
    assert Recipe.model_validate(read_toml(tmp_path / "r.toml")) == recipe


@pytest.mark.parametrize(
    "content", [b"a = ", b"\xff\xfe", b"a = 1\na = 2", b"#" * 1_000_001], ids=["cut", "bytes", "twice", "huge"]
)
def test_files_that_are_no_recipe(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "r.toml").write_bytes(content)
    with pytest.raises(RecipeError, match=r"r\.toml"):
        read_toml(tmp_path / "r.toml")
    with pytest.raises(RecipeError, match="cannot be read"):
        read_toml(tmp_path)


@given(st.floats(1e-3, 1e6), st.sampled_from(["checkpoint", "preview", "validate"]))
def test_intervals_are_shares_of_the_run_unless_given(kimg: float, which) -> None:
    config = TrainConfig(total_kimg=kimg)
    assert 1 <= config.interval_nimg(which) <= max(1, config.total_nimg)
    assert TrainConfig(total_kimg=kimg, **{f"{which}_kimg": 2.5}).interval_nimg(which) == 2500


def test_names_of_averages() -> None:
    assert AverageConfig().name == "power-0.100"
    assert AverageConfig(kind="exponential", halflife_kimg=20).name == "exponential-20"
