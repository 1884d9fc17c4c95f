"""Captions: cleaning loses no letter of any script, choices are functions of what they are for, programs may fail."""

from __future__ import annotations

import sys
import time
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from imagekiln.data.captions import (
    MOST_BEFORE,
    MOST_BEHIND,
    caption_with,
    clean,
    cleaned,
    from_template,
    reworded,
    shorten,
    tags,
    varied,
)
from imagekiln.errors import UsageError

texts = st.text(max_size=80)
SCRIPTS = [
    "кошка на стуле",
    "猫が椅子の上にいる",
    "قطة على كرسي",
    "חתול על כיסא",
    "एक बिल्ली",
    "แมวบนเก้าอี้",
    "👩‍👩‍👧 🏳️‍🌈",
    "a\u200fb",
    "<script>alert(1)</script> {{7*7}} %s %(x)d [bold] {0} \\n `rm`",
]


# -- cleaning ---------------------------------------------------------------------------------------------------------


@given(texts, st.booleans())
@example("e\0\u0301", False)
@example("\u1e9e\u0130 ΑΣ", True)
@settings(max_examples=120, deadline=None)
def test_clean_text_is_clean_and_stays_so(text: str, lower: bool) -> None:
    once = clean(text, lower)
    assert clean(once, lower) == once
    assert unicodedata.is_normalized("NFC", once)
    assert once == " ".join(once.split())
    assert not [sign for sign in once if unicodedata.category(sign) in ("Cc", "Cs") or sign == "\ufeff"]
    once.encode("utf-8")


@given(st.text(st.characters(exclude_categories=["Cc", "Cs", "Zs", "Zl", "Zp"], exclude_characters="\ufeff")))
@settings(max_examples=80, deadline=None)
def test_cleaning_changes_no_word(text: str) -> None:
    assert clean(f" {text}\n") == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("text", SCRIPTS)
def test_every_script_and_sign_stands_for_itself(text: str) -> None:
    assert clean(text) == text
    assert from_template(text, ["{label}"], 0, "a") == text
    assert varied(text, 0, 0, shuffle=True) == text


def test_what_is_removed_and_composed() -> None:
    assert clean("\ufeffa\0b\x07c\x1b[31m \u2028d\u00a0e\ud800") == "abc[31m d e"
    assert clean("Caf\u0065\u0301") == "Cafe\u0301".replace("e\u0301", "\u00e9") and clean("ÀB", lower=True) == "àb"
    assert clean(" \0\n") == ""


@given(texts, st.integers(1, 90))
@settings(max_examples=120, deadline=None)
def test_short_text_is_a_beginning_of_the_text(text: str, most: int) -> None:
    text = clean(text)
    short = shorten(text, most)
    assert len(short) <= most and text.startswith(short)
    assert (short == text) == (len(text) <= most)
    assert short or not text


def test_text_is_cut_between_words_and_never_inside_a_character() -> None:
    assert shorten("one two three", 9) == "one two"
    assert shorten("one two three", 7) == "one two"
    assert shorten("猫" * 50, 20) == "猫" * 20
    assert shorten("x" * 12 + "n\u0303", 13) == "x" * 12  # the tilde is the n's
    assert shorten("x" * 8 + "👩\u200d👧", 10) == "x" * 8  # a family is one picture


def test_a_set_of_captions_says_once_how_many_were_cut() -> None:
    found = cleaned(["a " * 60_000, None, "", "\0", "Ein Hund " * 3, "b " * 9000], lower=True)
    assert [len(caption) for caption in found.captions] == [9999, 0, 0, 0, 26, 9999]
    assert found.captions[4] == "ein hund ein hund ein hund"
    assert found.notices == ["2 captions were cut to 10,000 characters."]
    assert cleaned(["a"]).notices == []


# -- templates --------------------------------------------------------------------------------------------------------


@given(st.text(max_size=20), st.text(max_size=20), st.text(max_size=20))
@settings(max_examples=100, deadline=None)
def test_a_label_is_never_interpreted(before: str, label: str, after: str) -> None:
    before, after = before.replace("{label}", ""), after.replace("{label}", "")
    assert from_template(label, [f"{before} {{label}} {after}"], 1, "x.png") == f"{before} {label} {after}"


def test_templates_are_chosen_evenly_by_seed_and_name() -> None:
    templates = ["a photo of a {label}", "{label}", "one {label}"]
    found = Counter(from_template("cat", templates, 0, f"{n}.png") for n in range(3000))
    expected, error = 1000, (3000 * 2 / 9) ** 0.5
    assert all(abs(found[text.replace("{label}", "cat")] - expected) < 4 * error for text in templates)
    assert from_template("cat", templates, 0, "1.png") == from_template("cat", templates, 0, "1.png")
    assert len({tuple(from_template("c", templates, seed, f"{n}") for n in range(20)) for seed in range(5)}) == 5
    with pytest.raises(UsageError, match="no template"):
        from_template("cat", [], 0, "a")


# -- tags -------------------------------------------------------------------------------------------------------------

TAGS = "cat, sofa, window, tail, red {x}, 100%"


@given(texts, st.integers(0, 5), st.integers(0, 10**12), st.integers(0, 4), st.floats(0, 1), st.booleans())
@settings(max_examples=120, deadline=None)
def test_varied_tags_are_tags_of_the_text(
    text: str, seed: int, position: int, keep: int, dropout: float, shuffle: bool
) -> None:
    found = varied(text, seed, position, dropout=dropout, shuffle=shuffle, keep=keep)
    assert found == varied(text, seed, position, dropout=dropout, shuffle=shuffle, keep=keep)
    if dropout or shuffle:
        left, whole = tags(found), tags(text)
        assert not Counter(left) - Counter(whole)
        assert left[:keep] == whole[:keep]
        assert dropout or len(left) == len(whole)
        assert shuffle or left == [tag for tag in whole if tag in left] or len(set(whole)) < len(whole)
    else:
        assert found == text


def test_without_settings_a_sentence_keeps_its_commas() -> None:
    assert varied("A cat,  on a chair,", 0, 0) == "A cat,  on a chair,"


def test_each_tag_is_left_out_its_share_of_times_and_takes_every_place() -> None:
    count, dropout = 4000, 0.3
    seen: Counter[str] = Counter()
    first: Counter[str] = Counter()
    for position in range(count):
        left = tags(varied(TAGS, 3, position, dropout=dropout, shuffle=True, keep=1))
        assert left[0] == "cat"
        seen.update(left)
        first.update(tags(varied(TAGS, 3, position, shuffle=True, keep=1))[1:2])
    error = (count * dropout * (1 - dropout)) ** 0.5
    assert all(abs(seen[tag] - count * (1 - dropout)) < 4 * error for tag in tags(TAGS)[1:])
    error = (count * 0.2 * 0.8) ** 0.5
    assert all(abs(first[tag] - count / 5) < 4 * error for tag in tags(TAGS)[1:])


def test_the_ends_of_dropout() -> None:
    assert varied(TAGS, 0, 0, dropout=1.0) == ""
    assert varied(TAGS, 0, 0, dropout=1.0, keep=2) == "cat, sofa"
    assert varied("", 0, 0, dropout=0.5, shuffle=True) == ""


# -- captions of somebody else's making -------------------------------------------------------------------------------


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", f"import sys, time, os; {code}"]


def test_a_command_gets_the_path_as_it_is(tmp_path: Path) -> None:
    names = ["a.png", "with space; rm -rf $HOME.png", "猫.png", "-n"]
    command = python("sys.stdout.buffer.write(('  ' + os.path.basename(sys.argv[-1]) + '\\n').encode())")
    found = caption_with(command, [tmp_path / name for name in names])
    assert found.captions == names and found.failures == []


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("sys.exit(3)", "ended with code 3"),
        ("pass", "answered with nothing"),
        (r"sys.stdout.buffer.write(b'caf\xe9')", "not UTF-8 (byte 3)"),
        ("sys.stdout.write('x' * 10**6)", "more than 80,000 bytes"),
    ],
)
def test_a_command_that_fails_leaves_the_caption_empty(code: str, reason: str) -> None:
    found = caption_with(python(code), ["a.png"])
    assert found.captions == [""] and len(found.failures) == 1
    assert found.failures[0][0] == "a.png" and reason in found.failures[0][1]


@pytest.mark.parametrize("code", ["time.sleep(100)", "os.close(1); time.sleep(100)"])
def test_a_command_that_hangs_is_stopped(code: str) -> None:
    assert caption_with(python(code), ["a.png"], 0.5).failures == [("a.png", "took more than 0.5 s")]


LEAVES_A_CHILD = """
import os, sys, time
if os.fork() == 0:
    with open(sys.argv[1], "w") as file:
        file.write(str(os.getpid()))
    time.sleep(100)
"""


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks at processes in /proc")
def test_what_a_command_leaves_behind_is_stopped(tmp_path: Path) -> None:
    """A child that holds the pipe open would be waited for for ever, and would outlive the work."""
    script, note = tmp_path / "leaves.py", tmp_path / "child"
    script.write_text(LEAVES_A_CHILD)
    found = caption_with([sys.executable, "-S", str(script), str(note)], ["a.png"], timeout_sec=2.0)
    assert found.failures == [("a.png", "took more than 2 s")]
    status = Path(f"/proc/{note.read_text()}/status")
    for _ in range(1000):  # a killed process takes its time on a busy machine
        if not status.exists() or "zombie" in status.read_text():
            return
        time.sleep(0.01)
    pytest.fail("the child still runs")


def test_failures_do_not_end_the_work() -> None:
    def ask(path: str) -> str:
        if path == "b":
            raise OSError("no such model")
        return 7 if path == "c" else f"  a picture\0 of {path}\n"  # type: ignore[return-value]

    done: list[int] = []
    found = caption_with(ask, ["a", "b", "c", "d"], progress=done.append)
    assert found.captions == ["a picture of a", "", "", "a picture of d"] and done == [1, 2, 3, 4]
    assert found.failures == [("b", "OSError: no such model"), ("c", "answered with int, not text")]


def test_a_command_that_is_not_there_is_said_at_once() -> None:
    for command in (["surely-no-such-program"], [], "echo hello"):
        with pytest.raises(UsageError, match="captioning command"):
            caption_with(command, ["a.png"])


@pytest.mark.parametrize("text", ["", "one", "a {caption} of {braces}", "一只 红色 的 猫", "x " * 50])
@pytest.mark.parametrize("dropout", [0.0, 0.5, 1.0])
def test_reworded_captions_keep_words_in_order_and_never_become_empty(text: str, dropout: float) -> None:
    words = text.split()
    for position in range(50):
        told = reworded(text, 3, position, dropout=dropout, wordings=("see {caption}!",))
        assert told == reworded(text, 3, position, dropout=dropout, wordings=("see {caption}!",))
        inner = told.removeprefix("see ").removesuffix("!") if told.startswith("see ") else told
        left = iter(words)
        assert all(word in left for word in inner.split()), "a word that was not there, or another order"
        assert bool(told) == bool(words)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_fillers_stand_around_a_caption_and_mean_nothing(share: float) -> None:
    """As many captions as asked for have some; none is a word of the caption, and all come and go with the position."""
    text, around = "a small red cat, sofa", []
    for position in range(400):
        told = reworded(text, 5, position, fillers=share)
        assert told == reworded(text, 5, position, fillers=share)
        before, found, behind = told.partition(text)
        assert found == text and len(before.split()) <= MOST_BEFORE and len(behind.split()) <= MOST_BEHIND
        around += [word for word in (*before.split(), *behind.split())]
        assert reworded("", 5, position, fillers=share) == ""
    assert all(word.isalpha() and 2 <= len(word) <= 4 for word in around)
    expected = 400 * share * (MOST_BEFORE + MOST_BEHIND) / 2
    assert abs(len(around) - expected) <= 6 * (400 * share * (1 - share) + 400) ** 0.5 * (share > 0)
    assert len(set(around)) >= len(around) // 3
