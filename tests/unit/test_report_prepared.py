"""The page of a prepared set: its parts, its commands, and that names from outside stay text."""

from __future__ import annotations

import base64
import io
import re
import shlex
import subprocess
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from webpage import ATTACK, Page

from imagekiln.data import builtin, measures
from imagekiln.data.advice import Advice, facts_of
from imagekiln.data.prepared import Prepared
from imagekiln.data.source import digest
from imagekiln.data.survey import MEASURES, THUMB, Survey
from imagekiln.report import decided, prepared, specimens, spread

HOSTILE = (f"{ATTACK}.png", "[bold]red[/bold].png", "صورة قطة.png", "evil\u202egnp.png", "{{ 7 * 7 }}.png", "a\nb.png")


def made(
    folder: Path, n: int = 60, names: tuple[str, ...] = HOSTILE, classes: tuple[str, ...] = ("cat", "dog", ATTACK)
) -> Prepared:
    """A set of n digits: file 1 a copy of 0 and left out, 2 too dark but kept, the last one cannot be read."""
    images_NCHW = builtin.load("digits", Path("unused")).images_NHWC[: n - 1].transpose(0, 3, 1, 2)
    files = [*names, *(f"{index:03}.png" for index in range(n - len(names)))]
    pictures = [Image.fromarray(image[0]) for image in images_NCHW]
    seen = [measures.measure(picture) for picture in pictures]
    measured, thumbs = np.zeros(n, MEASURES), np.zeros((n, THUMB, THUMB, 3), np.uint8)
    for index, (entry, thumb) in enumerate(seen):
        measured[index], thumbs[index] = entry, thumb
    measured["width"][: n - 1] += np.arange(n - 1)
    survey = Survey(
        names=files,
        labels=[None] * n,
        texts=[None] * n,
        reasons=[""] * (n - 1) + ["truncated"],
        digests=[digest(image) for image in images_NCHW] + [""],
        measured=measured,
        thumbs=thumbs,
        notes=[frozenset({"place", "turned"})] + [frozenset()] * (n - 1),
        places=np.array([*range(n - 1), -1]),
    )
    kept = [index for index in range(n - 1) if index != 1]
    rows = [
        {
            "file_name": files[index],
            "digest": survey.digests[index],
            "row": index,
            "split": "validation" if index % 10 == 0 else "train",
            "text": f"{ATTACK} number {index}" + " very" * (index % 9),
            **({"label": index % len(classes)} if classes else {}),
        }
        for index in kept
    ]
    findings = [
        finding("duplicate", files[1], 1, 0.0, "same picture as it", files[0], left_out=True),
        finding("dark", files[2], 2, 0.03, f"dark {ATTACK}"),
        *(finding("soft_focus", files[index], index, 0.1, "soft") for index in range(3, 6)),
    ]
    about = {
        "name": f"pets {ATTACK}",
        "sources": ["/home/somebody/my pets"],
        "settings": {"clean": {"leave_out": ["duplicate", "blank"]}},
        "image_shape": list(images_NCHW.shape[1:]),
        "class_names": list(classes),
        "notices": [f"Noticed: {ATTACK}"],
        "counts": {"files": n, "usable": n - 1, "kept": n - 2, "left_out": 2, "train": 52, "validation": 6, "test": 0},
        "checks": {
            "duplicate": check("Exact copies", "The same pixels as another file.", 0.0),
            "dark": check("Dark pictures", "Hardly any light.", 0.05),
            "blank": check("Blank pictures", "One colour all over.", None),
        },
    }
    left_out = [(files[1], "same picture as it"), (files[-1], "truncated")]
    return Prepared(folder, about, rows, images_NCHW, findings, left_out, survey)


def finding(
    check: str, file: str, row: int, value: float, reason: str, other: str = "", left_out: bool = False
) -> dict[str, Any]:
    found = {"file_name": file, "check": check, "value": value, "threshold": 0.05, "reason": reason}
    return found | {"other": other, "left_out": left_out, "row": row}


def check(title: str, meaning: str, threshold: float | None) -> dict[str, Any]:
    return {"title": title, "meaning": meaning, "threshold": threshold, "found": 1, "left_out": 1}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Prepared, str, Page]:
    folder = tmp_path_factory.mktemp("sets") / "pets prepared"
    mine = made(folder)
    html = prepared.write(mine, folder / "report.html").read_text(encoding="utf-8")
    return mine, html, Page(html)


def test_the_example_has_the_fields_of_a_prepared_set():
    assert [own.name for own in fields(Prepared)] == [own.name for own in fields(Prepared)]


def test_the_facts_for_advice_are_those_of_the_pictures_that_are_kept(whole):
    facts = facts_of(whole[0])
    assert (facts.num_train, facts.num_held_out, facts.image_shape) == (52, 6, (1, 8, 8))
    assert sum(facts.counts_by_class.values()) == 58 and set(facts.counts_by_class) == {"cat", "dog", ATTACK}
    assert (facts.num_captions, facts.num_unlabelled, facts.num_copies, facts.num_enlarged) == (58, 0, 0, 0)
    assert facts.handed.n == 58


# -- what stands on it ------------------------------------------------------------------------------------------------


def test_every_part_is_there_in_order(whole):
    _, _, shown = whole
    assert shown.sections == [
        *("facts", "pictures", "advice", "checks", "copies", "map", "variance", "sizes"),
        *("classes", "split", "captions", "notes", "left-out"),
    ]


def test_the_headline_says_what_was_kept_and_why_not(whole):
    _, _, shown = whole
    said = "60 files were looked at, 58 pictures are kept. 2 are left out (exact copies: 1; cannot be used: 1)."
    assert said in shown.text
    assert "Your own files were only read" in shown.text


def test_checks_say_what_was_found_and_done(whole):
    _, _, shown = whole
    text = re.sub(r"\s+", " ", shown.text)
    assert "Exact copies 1 found, 1 left out" in text and "The same pixels as another file." in text
    assert "Dark pictures 1 found, only mentioned threshold 0.05" in text
    assert "Looked for and not found: blank pictures." in text
    assert "Soft focus 3 found, only mentioned" in text  # a check nothing more is known about
    assert text.index("Exact copies") < text.index("Soft focus") < text.index("Dark pictures")


def test_a_copy_stands_beside_its_twin(whole):
    mine, html, _ = whole
    pair = html[html.index('<div class="pair">') :]
    first, second = re.findall(r'src="data:image/png;base64,([^"]+)"', pair)[:2]
    for source, row in ((first, 0), (second, 1)):
        with Image.open(io.BytesIO(base64.b64decode(source))) as picture:
            assert np.array_equal(np.asarray(picture.convert("L")), mine.images_NCHW[row, 0])


def test_groups_and_what_is_left_out_are_listed(whole):
    _, _, shown = whole
    assert "1 group of copies" in re.sub(r"\s+", " ", shown.text)
    assert "2 files are not in the set" in re.sub(r"\s+", " ", shown.text) and "truncated" in shown.text


def test_notes_captions_and_sides_are_told(whole):
    _, _, shown = whole
    text = re.sub(r"\s+", " ", shown.text)
    assert "1 files were turned upright" in text and "That is never copied" in text
    assert "58 pictures have a caption, 58 different ones" in text
    assert re.search(r"train\s*to learn from\s*52\s*89\.7%", text)
    assert re.search(r"validation\s*held out, to measure on\s*6\s*10\.3%", text)


def test_advice_stands_with_its_evidence(tmp_path):
    advice = [Advice("mine", "warning", "Do this & that.", "Somebody 2020 found it.", {"n": 3})]
    text = Page(prepared.render(made(tmp_path), advice=advice)).text
    assert "Do this & that." in text and "Somebody 2020 found it." in text and "look at this" in text


def test_the_same_folder_gives_the_same_bytes(whole):
    mine, html, _ = whole
    assert prepared.render(mine) == html


# -- safety -----------------------------------------------------------------------------------------------------------


def test_nothing_runs_and_nothing_is_loaded_from_elsewhere(whole):
    _, html, shown = whole
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in html
    assert not {tag for tag, _ in shown.tags} & {"script", "link", "iframe", "object", "embed", "form", "svg", "base"}
    assert not [key for _, found in shown.tags for key in found if key.startswith("on") or key in ("href", "srcset")]
    assert not re.search(r"https?:|url\(|@import", html)


def test_names_stay_text(whole):
    _, html, shown = whole
    assert "<script" not in html and "onerror=alert(2)>" not in html
    for name in (HOSTILE[0], "[bold]red[/bold].png", "صورة قطة.png", "{{ 7 * 7 }}.png"):
        assert name in shown.text or name in [found.get("title") for _, found in shown.tags]
    assert "\u202e" not in html and "evil\\u202egnp.png" in shown.text and "49.png" not in shown.text
    assert "/home/somebody" not in html and str(whole[0].folder.parent) not in html


def test_every_image_is_inside_the_page_and_says_what_it_shows(whole):
    _, _, shown = whole
    assert len(shown.images) > 15
    for image in shown.images:
        kind, data = re.fullmatch(r"data:image/(png|webp|svg\+xml);base64,(.+)", image["src"]).groups()
        content = base64.b64decode(data, validate=True)
        assert image["alt"]
        if kind == "svg+xml":
            assert content.startswith(b"<svg ") and b"<script" not in content and b"nan" not in content
        else:
            with Image.open(io.BytesIO(content)) as picture:
                assert picture.size == (int(image["width"]), int(image["height"]))


# -- commands ---------------------------------------------------------------------------------------------------------


def test_commands_undo_what_was_done(whole):
    _, _, shown = whole
    commands = re.findall(r"imagekiln prepare [^\n]+", shown.text)
    assert len(commands) == 4
    back, spare, _, drop = (shlex.split(command) for command in commands)
    assert back == ["imagekiln", "prepare", "--restore", HOSTILE[1], "--out", "pets prepared"]
    assert spare[2:] == ["my pets", "--out", "pets prepared", "--set", 'clean.leave_out=["blank"]']
    assert drop[2:] == ["--drop", HOSTILE[2], "--out", "pets prepared"]


@pytest.mark.parametrize("name", [*HOSTILE, "it's.png", "a b.png", "tab\t\\x.png", "-rf", "\U000e0001.png"])
def test_a_shell_reads_names_back(name):
    command = decided.restore_command("out", [name]).replace("imagekiln prepare", "printf '%s\\0'", 1)
    said = subprocess.run(["bash", "-c", command], capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"}).stdout
    assert said.decode().split("\0")[1] == name


def test_a_shell_reads_bytes_that_are_no_text_back():
    name = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    command = decided.drop_command("out", [name]).replace("imagekiln prepare", "printf '%s\\0'", 1)
    said = subprocess.run(["bash", "-c", command], capture_output=True, check=True).stdout
    assert said.split(b"\0")[1] == b"caf\xe9.png"


def test_a_file_that_another_check_left_out_is_not_called_kept(tmp_path):
    mine = made(tmp_path)
    mine.findings.append(finding("soft_focus", HOSTILE[1], 1, 0.1, "soft"))
    soft = next(c for c in decided.checked(mine, decided.Gallery(mine), "out", []) if c.name == "soft_focus")
    assert {one.name: one.left_out for one in soft.examples}[HOSTILE[1]] and soft.left_out == 0
    assert HOSTILE[1] not in shlex.split(soft.commands[0][1])


def test_many_files_are_not_named_one_by_one(tmp_path):
    mine = made(tmp_path)
    for index in range(10, 40):
        mine.findings.append(finding("duplicate", mine.survey.names[index], index, 0.0, "copy", left_out=True))
    (found, *_) = decided.checked(mine, decided.Gallery(mine), "out", ["src"])
    assert found.left_out == 31 and len(found.examples) == decided.MOST_EXAMPLES
    assert [what for what, _ in found.commands] == ["Bring one back", "Never leave pictures out for this"]


# -- other sets -------------------------------------------------------------------------------------------------------


def test_a_plain_set_has_no_empty_parts(tmp_path):
    mine = made(tmp_path, names=(), classes=())
    mine.findings.clear()
    mine.left_out.clear()
    mine.about["counts"] |= {"left_out": 0, "files": 58, "usable": 58}
    mine.about["notices"] = []
    for row in mine.rows:
        row.pop("text")
    mine.survey.notes[0] = frozenset()
    shown = Page(prepared.render(mine))
    assert shown.sections == ["facts", "pictures", "advice", "checks", "map", "variance", "sizes", "split"]
    assert "Nothing had to be left out." in shown.text and "every file that can be read is kept" in shown.text


@pytest.mark.parametrize("kept", [1, 2])
def test_a_tiny_set_has_a_page(tmp_path, kept):
    mine = made(tmp_path, names=())
    mine.rows = mine.rows[:kept]
    shown = Page(prepared.render(mine))
    assert "map" not in shown.sections and "split" in shown.sections


def test_a_long_list_is_cut_and_names_the_whole_one(tmp_path):
    mine = made(tmp_path)
    mine.left_out = [(f"{index}.png", "truncated") for index in range(500)]
    html = prepared.render(mine)
    assert html.count('data-label="why"') == prepared.MOST_LEFT_OUT
    assert "The first 200 are listed here, all of them in <code>left_out.csv</code>" in html


def test_unlabelled_and_proposed_labels_are_counted(tmp_path):
    mine = made(tmp_path)
    mine.rows[3].pop("label")
    mine.rows[4]["label_from"] = "proposed"
    shown = Page(prepared.render(mine))
    assert "1 labels were proposed" in shown.text and "without a label" in shown.text


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pictures_of_any_colours_come_through(channels):
    pixels = np.random.default_rng(0).integers(0, 256, (channels, 9, 7), dtype=np.uint8)
    shown = specimens.single(pixels, "noise")
    with Image.open(io.BytesIO(base64.b64decode(shown.source.partition(",")[2]))) as picture:
        found = np.asarray(picture).reshape(9, 7, channels)
    assert np.array_equal(found, pixels.transpose(1, 2, 0))


def test_a_sheet_keeps_places_empty():
    one = np.full((1, 4, 4), 200, np.uint8)
    shown = specimens.sheet([one, None, one], 2, "sheet")
    with Image.open(io.BytesIO(base64.b64decode(shown.source.partition(",")[2]))) as picture:
        alpha = np.asarray(picture.getchannel("A"))
    assert picture.size == (10, 10) and alpha[0, 0] == 255 and alpha[0, 9] == 0 and alpha[9, 0] == 255


def test_the_map_puts_pictures_where_they_belong():
    grid = np.array([[x, y] for x in range(4) for y in range(4)], np.float32)
    images = np.arange(16, dtype=np.uint8)[:, None, None, None] * np.full((1, 1, 8, 8), 16, np.uint8)
    shown = specimens.atlas(grid, images, np.arange(16), "map")
    with Image.open(io.BytesIO(base64.b64decode(shown.source.partition(",")[2]))) as picture:
        pixels = np.asarray(picture.convert("RGBA")).astype(int)
    middle = specimens.MAP_SIDE // 2
    assert abs(pixels[-middle, middle, 0] - 0) < 8  # (0, 0) is the lower left
    assert abs(pixels[middle, -middle, 0] - 240) < 8  # (3, 3) the upper right
    assert (pixels[..., 3] > 0).sum() < 0.1 * pixels[..., 3].size  # 16 of 308 cells


def test_histograms_count_every_picture():
    chart = spread.histogram("Width", "Pixels.", np.array([10.0, 20, 20, 40]), log=True)
    svg = base64.b64decode(chart.source.partition(",")[2]).decode()
    assert svg.count("<rect") == spread.BINS and ">2<" in svg  # the highest bar holds two
    assert chart.summary == "Width: from 10 to 40, half of the pictures below 20."
    assert spread.histogram("Width", "", np.array([])) is None
    same = spread.histogram("Width", "Pixels.", np.array([7.0, 7.0]))
    assert same.source == "" and "All pictures: 7." in same.meaning


def test_points_beyond_the_largest_classes_are_grey():
    labels = [*range(12)] * 5 + [*range(10), -1]
    chart = spread.points(np.random.default_rng(0).random((71, 2)), labels, [f"c{k}" for k in range(12)])
    assert [line.name for line in chart.lines] == [*(f"c{k}" for k in range(10)), "all others"]
    svg = base64.b64decode(chart.source.partition(",")[2]).decode()
    assert svg.count("<circle") == 71 and svg.count(spread.OTHERS) == 11


def test_unknown_fields_do_no_harm(tmp_path):
    mine = made(tmp_path)
    mine = replace(mine, about={k: v for k, v in mine.about.items() if k not in ("checks", "settings", "sources")})
    assert "Duplicate" in Page(prepared.render(mine)).text
