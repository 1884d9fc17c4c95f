"""The stability page: its parts, that nothing in it runs or loads, and that names stay text."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from webpage import ATTACK, Page

from imagekiln.engine.stability import Sampled, Stability, _sheet
from imagekiln.engine.verdict import STATES, Ending, Estimate, Pair, RunRow, Verdict, broken, judge, spread
from imagekiln.report import stability as page


def result(names: tuple[str, ...] = ("calm", "steady", "wild")) -> Stability:
    """Two good runs and a broken one, with one of everything."""
    values = (2.0, 2.1, 50.0)
    rows = tuple(
        RunRow(
            name,
            seed=index,
            left_out=index,
            variety=1.0,
            differs=(f"train.batch = {name} instead of 64",) if index == 2 else (),
            measured={
                "frechet": Estimate(value, 0.9 * value, 1.1 * value, floor=1.0),
                "coverage": Estimate(0.9, 0.85, 0.95, floor=0.95),
            },
            ending=Ending(100, Estimate(value, 1, 3), 200, Estimate(value * 1.02, 1, 3)),
            drift=tuple((100 * moment, 0.8 / moment) for moment in range(1, 9)),
        )
        for index, (name, value) in enumerate(zip(names, values, strict=True))
    )
    spreads = tuple(spread(m, {r.name: r.measured[m] for r in rows[:2]}, m == "frechet") for m in rows[0].measured)
    pairs = (Pair(names[0], names[1], 0.01, 0.02, 0.5, 0.3), Pair(names[0], names[2], 3.0, 0.02, 0.5, 0.9, True))
    images = torch.randint(0, 256, (10, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sampling = (
        Sampled("heun", 8, Estimate(0.1, 0.0, 0.2), 0.0, 0.5, False),
        Sampled("heun", 4, Estimate(0.1, 0, 0.2), 0.1, 0.5, True),
    )
    about = {
        "n": 60,
        "seed": 0,
        "features": "randconv-v1",
        "reference": "photos, held out",
        "classes": 0,
        "sampled": names[0],
    }
    return Stability(
        verdict=judge(rows, spreads, pairs),
        rows=rows,
        spreads=spreads,
        pairs=pairs,
        sampling=sampling,
        about=about,
        side_by_side=tuple(_sheet(name, f"Drawn by {name}", images, 5) for name in ("real pictures", *names)),
        over_time=tuple(_sheet(name, str(nimg), images, 10) for name in names for nimg in (0, 500)),
        by_sampling=tuple(_sheet(names[0], f"{one.steps} steps, heun", images, 10) for one in sampling),
    )


@pytest.fixture(scope="module")
def shown() -> Page:
    return Page(page.render(result()))


def test_every_part_is_there_in_order(shown: Page) -> None:
    assert shown.sections == ["pictures", "runs", "numbers", "spread", "pairs", "time", "sampling", "rules"]


def test_the_verdict_comes_first_and_in_words(shown: Page) -> None:
    found = result()
    assert list(broken(found.rows)) == ["wild"]
    at = [shown.text.index(part) for part in ("No: something broke", "Run wild is broken", "Same seeds, side by side")]
    assert at == sorted(at)
    for sentence in (found.verdict.headline, *found.verdict.sentences):
        assert sentence in shown.text


def test_pictures_and_bars_are_inside_the_page(shown: Page) -> None:
    assert len(shown.images) == 4 + 2 * 3 + 3 * 2 + 1 + 2  # side by side, bars, moments, drift, ways of drawing
    for image in shown.images:
        kind, data = re.fullmatch(r"data:image/(png|svg\+xml);base64,(.+)", image["src"]).groups()
        content = base64.b64decode(data, validate=True)
        assert image["alt"]
        if kind == "png":
            with Image.open(io.BytesIO(content)) as picture:
                assert picture.size == (int(image["width"]), int(image["height"]))
        else:
            assert content.startswith(b"<svg ") and b"<script" not in content


def test_nothing_runs_and_nothing_is_loaded_from_elsewhere(shown: Page) -> None:
    policy = {"http-equiv": "Content-Security-Policy"}.items()
    policies = [found["content"] for tag, found in shown.tags if tag == "meta" and policy <= found.items()]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert not {tag for tag, _ in shown.tags} & {"script", "link", "iframe", "object", "embed", "form", "svg", "base"}
    assert not [key for _, found in shown.tags for key in found if key.startswith("on") or key in ("href", "srcset")]


def test_a_bar_shows_value_and_interval_on_one_scale() -> None:
    scale = page._scale([0.0, 10.0])
    assert [scale(x) for x in (0.0, 5.0, 10.0)] == [0.0, 0.5, 1.0]
    wide = page._scale([1.0, 100.0])
    assert wide(10.0) == pytest.approx(0.5) and wide(0.0) == 0.0
    svg = base64.b64decode(page._bar(Estimate(5.0, 0.0, 10.0), scale, "#123456").split(",")[1]).decode()
    assert 'cx="130.00"' in svg and 'x1="8.00" x2="252.00"' in svg


def test_names_are_text() -> None:
    shown = Page(page.render(result((ATTACK, "b", ATTACK + "2"))))
    assert "script" not in {tag for tag, _ in shown.tags}
    assert not [found for _, found in shown.tags if "onerror" in found or found.get("src") == "x"]
    assert shown.text.count(ATTACK) >= 8


def test_the_same_result_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (page.write(result(), tmp_path / name).read_bytes() for name in ("a.html", "b.html"))
    assert first == second and first.startswith(b"<!doctype html>")


@pytest.mark.parametrize("state", STATES)
def test_every_verdict_has_an_answer_and_missing_parts_are_left_out(state: str) -> None:
    bare = Stability(Verdict(state, "One sentence.", (), {}), (RunRow("alone"),), (), (), (), result().about)
    shown = Page(page.render(bare))
    assert shown.sections == ["runs", "rules"] and page.ANSWERS[state][0] in shown.text


def test_only_runs_with_the_metric_have_a_bar() -> None:
    found = result()
    rows = (dataclasses.replace(found.rows[0], measured={}), *found.rows[1:])
    block = page._block("frechet", dataclasses.replace(found, rows=rows))
    assert block is not None and [(bar.run, bar.broken) for bar in block.bars] == [("steady", False), ("wild", True)]
    assert page._block("precision", found) is None
