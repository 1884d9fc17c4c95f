"""The report: what stands in it, what is left out, and that nothing in it can run, load or give away a folder."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markupsafe import escape
from PIL import Image
from safetensors.numpy import save_file
from webpage import ATTACK, Page

from imagekiln import report
from imagekiln.engine import pictures, registry
from imagekiln.engine.generate import labels_for
from imagekiln.engine.run import Run
from imagekiln.errors import UsageError
from imagekiln.metrics import BUNDLES, Measurement, Provenance, Regression
from imagekiln.report import curves, measured, page, plots

FAMILY = registry.names()[0]


def bare_run(folder: Path, recipe: str = "", **meta: object) -> Run:
    return Run.create(folder, recipe_toml=recipe or f"[family]\nname = '{FAMILY}'\n", meta=meta)


def full_run(folder: Path, classes: tuple[str, ...] = ("cat", "dog"), data: str = "/home/somebody/photos") -> Run:
    """A run with one of everything."""
    recipe = f"[data]\npath = {json.dumps(data)}\n[family]\nname = '{FAMILY}'\n"
    run = bare_run(folder, recipe, device="a machine", data_summary="90 pictures, 8x8 grey.", torch="2.13.0")
    for step in range(1, 6):
        row = {"nimg": step * 500, "train_sec": step * 20.0, "img_per_sec": 25.0, "peak_mem_gb": 0.5, "lr": 1e-3}
        run.append_stats({**row, "learn/loss": 3.0 / step, "learn/grad_norm": 10.0**-step, "learn/extra": -step})
        run.append_stats({"nimg": step * 500, "validation/learn": 4.0 / step})
        add_picture(run.sample_path(step * 500))
    run.write_status(state="finished", nimg=2500, total_nimg=2500, best_nimg=2000)
    add_picture(run.picture_path("real"))
    add_picture(run.picture_path("neighbours"))
    run.append_measurement(row_of("frechet", 12.5, low=11.0, high=14.0, floor=5.0, ratio=2.5))
    run.append_measurement(row_of("psnr", 21.0, features="pixels"))
    run.append_event({"nimg": 1000, "kind": "memory", "sentence": "Out of memory: each batch is halved."})
    add_weights(run, classes)
    return run


def add_picture(path: Path, size: tuple[int, int] = (35, 17)) -> None:
    pixels = np.random.default_rng(len(path.name)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    pictures.write(Image.fromarray(pixels), path)


def add_weights(run: Run, classes: tuple[str, ...]) -> None:
    path = run.weights_path(2500, "power-0.100")
    path.parent.mkdir(exist_ok=True)
    save_file({"w": np.zeros(1, np.float32)}, path, {"class_names": json.dumps(classes)})


def row_of(metric: str, value: float, features: str = "classifier", **more: object) -> dict[str, object]:
    provenance = Provenance(features, "a" * 64, "photos, held out", "b" * 64, "c" * 64)
    return json.loads(Measurement(metric, value, 40, 40, provenance, **more).to_json())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, str, Page]:
    run = full_run(tmp_path_factory.mktemp("runs") / "pets")
    html = report.write(run).read_text(encoding="utf-8")
    return run, html, Page(html)


# -- a whole run ------------------------------------------------------------------------------------------------------


def test_every_part_is_there_in_order(whole):
    _, _, shown = whole
    expected = ["learned", "facts", "timeline", "measurements", "neighbours", "curves", "noticed", "again"]
    assert shown.sections == expected


def test_the_headline_says_what_was_learned_from_what_and_how_long(whole):
    _, _, shown = whole
    sentence = (
        "learned to draw pictures like those of photos (90 pictures, 8x8 grey). It saw 2,500 images in 1 min 40 s"
    )
    assert sentence in shown.text
    assert registry.describe(FAMILY) in shown.text


@pytest.mark.parametrize("name", registry.names())
def test_families_are_described_as_the_registry_does(name):
    assert page._family_words(name) == registry.describe(name)


def test_a_family_from_outside_is_not_opened(tmp_path):
    assert page._family_words(str(tmp_path / "mine.py")) == page._family_words("package.mine") == ""


def test_nothing_runs_and_nothing_is_loaded_from_elsewhere(whole):
    _, html, shown = whole
    policy = {"http-equiv": "Content-Security-Policy"}.items()
    policies = [found["content"] for tag, found in shown.tags if tag == "meta" and policy <= found.items()]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert not {tag for tag, _ in shown.tags} & {"script", "link", "iframe", "object", "embed", "form", "svg", "base"}
    assert not [key for _, found in shown.tags for key in found if key.startswith("on") or key in ("href", "srcset")]
    assert not re.search(r"https?:|url\(|@import", html)


def test_every_image_is_inside_the_page_and_says_what_it_shows(whole):
    _, _, shown = whole
    assert len(shown.images) == 2 + 5 + 1 + 5  # sheets, previews, neighbours, curves
    for image in shown.images:
        kind, data = re.fullmatch(r"data:image/(png|webp|svg\+xml);base64,(.+)", image["src"]).groups()
        content = base64.b64decode(data, validate=True)
        assert image["alt"]
        if kind == "svg+xml":
            assert content.startswith(b"<svg ") and b"<script" not in content
        else:
            with Image.open(io.BytesIO(content)) as picture:
                assert picture.size == (int(image["width"]), int(image["height"]))


def test_previews_are_in_order_with_their_moment(whole):
    _, _, shown = whole
    moments = re.findall(r"after ([\d.]+) thousand images(?=\s)", shown.text[shown.text.index("How it learned") :])
    assert moments[:5] == ["0.5", "1", "1.5", "2", "2.5"]


def test_measurements_show_value_interval_floor_ratio_and_meaning(whole):
    _, html, shown = whole
    for expected in ("12.5", "11 to 14", "2.50", measured.MEANINGS["frechet"][1], measured.MEANINGS["psnr"][1]):
        assert expected in shown.text
    assert "a" * 12 in shown.text and "a" * 13 not in shown.text
    assert "FID" not in re.sub(r"base64,[^\"]+", "", html)


def test_classes_stand_above_the_columns(whole):
    _, _, shown = whole
    assert [found["title"] for tag, found in shown.tags if tag == "span" and "title" in found] == ["cat", "dog"] * 2


def test_what_was_noticed_and_how_to_go_on_is_said(whole):
    _, _, shown = whole
    assert "Out of memory: each batch is halved." in shown.text
    assert "imagekiln train pets/recipe.toml --data photos --out pets-again" in shown.text
    assert "imagekiln generate pets -n 16 --out pictures --label cat" in shown.text


def test_the_same_run_gives_the_same_bytes(whole):
    run, html, _ = whole
    assert report.write(run).read_text(encoding="utf-8") == html


def test_torch_is_not_needed(whole):
    run, _, _ = whole
    code = f"from imagekiln import Run, report; report.write(Run({str(run.path)!r}))"
    subprocess.run([sys.executable, "-c", f"{code}; import sys; sys.exit('torch' in sys.modules)"], check=True)


# -- names from files -------------------------------------------------------------------------------------------------


def test_markup_in_names_is_text(tmp_path):
    run = full_run(tmp_path / "a <b> & c", classes=(ATTACK, "dog"), data=f"/data/{ATTACK.replace('/', '')}")
    run.append_event({"nimg": 5, "sentence": ATTACK})
    run.append_measurement(row_of(ATTACK, 1.0, features=ATTACK, details={"floor": ATTACK}))
    for nimg in (1, 2, 3):
        run.append_stats({"nimg": nimg, f"{ATTACK}/loss": nimg, f"{ATTACK}/grad_norm": nimg, "learn/$x^{": 1})
    shown = Page(report.write(run).read_text(encoding="utf-8"))
    assert not {tag for tag, _ in shown.tags} & {"script", "b>"}
    assert not [found for tag, found in shown.tags if "onerror" in found or found.get("src") == "x"]
    assert shown.text.count(ATTACK) >= 6  # two sheets, event, metric, its features, two legends
    assert "a <b> & c" in shown.text


@settings(deadline=None, max_examples=40)
@given(st.lists(st.text(), min_size=2, max_size=4), st.text(), st.text())
def test_any_text_comes_back_as_it_was(tmp_path_factory, classes, sentence, key):
    run = bare_run(tmp_path_factory.mktemp("runs") / "run")
    add_picture(run.picture_path("real"))
    add_weights(run, tuple(classes))
    run.append_event({"nimg": 5, "sentence": sentence})
    run.append_stats({"nimg": 1, f"{key}/loss": 1.0, key: 1.0})
    found = page._gather(run)
    assert list(found["real"].columns) == classes
    assert [event["what"] for event in found["events"]] == [sentence]
    before = Page(page.render(bare_run(tmp_path_factory.mktemp("runs") / "run")))
    extra = {tag for tag, _ in Page(page.render(run)).tags} - {tag for tag, _ in before.tags}
    assert extra <= {"figure", "figcaption", "img", "ul", "li", "dl", "dt", "dd", "div", "span"}


def test_names_that_are_not_unicode_do_not_hinder_the_report(tmp_path):
    run = bare_run(tmp_path / "run")
    run.append_event({"nimg": 1, "sentence": "caf\udce9.jpg is no picture."})
    assert "caf?.jpg is no picture." in report.write(run).read_text(encoding="utf-8")


def test_folders_of_the_machine_are_not_given_away(tmp_path):
    run = full_run(tmp_path / "pets", data=str(tmp_path / "secret" / "photos"))
    run.append_event({"nimg": 9, "sentence": f"{run.path / 'checkpoints' / '7'} is damaged; see ~/log."})
    run.append_event({"nimg": 9, "sentence": f"{tmp_path / 'secret' / 'photos'} is read; {Path.home()}/log."})
    html = report.write(run).read_text(encoding="utf-8")
    assert str(tmp_path) not in html and "secret" not in html and f"{Path.home()}/" not in html
    assert "pets/checkpoints/7 is damaged" in html and "photos is read; ~/log." in html


@pytest.mark.parametrize(
    ("path", "name"),
    [("/a/b/", "b"), ("C:\\Users\\ada\\cats", "cats"), ("photos", "photos"), ("builtin:digits", "builtin:digits")],
)
def test_last_component(path, name):
    assert page.last_component(path) == name


# -- what is missing --------------------------------------------------------------------------------------------------


def test_an_empty_run_has_a_page(tmp_path):
    shown = Page(report.write(bare_run(tmp_path / "empty")).read_text(encoding="utf-8"))
    assert shown.sections == ["noticed", "again"]
    assert "Nothing out of the ordinary." in shown.text and not shown.images


def test_a_family_that_draws_nothing_is_not_said_to_draw(tmp_path):
    run = bare_run(tmp_path / "judge")
    add_picture(run.picture_path("real"))
    shown = Page(report.write(run).read_text(encoding="utf-8"))
    assert shown.sections == ["learned", "noticed", "again"]
    assert "draw" not in shown.text and "imagekiln generate" not in shown.text


def test_no_run_is_an_error(tmp_path):
    with pytest.raises(UsageError, match="not a run folder"):
        report.write(Run(tmp_path))


def test_broken_files_are_left_out(tmp_path):
    run = full_run(tmp_path / "run")
    run.sample_path(2500).write_bytes(b"<html>no picture</html>")
    run.weights().write_bytes(b"no weights")
    for row in ({"metric": "recall"}, {"value": 1}, {"metric": "recall", "value": "much"}, {"metric": 3, "value": 3}):
        run.append_measurement(row)
    shown = Page(report.write(run).read_text(encoding="utf-8"))
    assert len(shown.images) == 1 + 4 + 1 + 5
    assert "recall" not in shown.text


@pytest.mark.parametrize(("state", "said"), [("interrupted", "stopped after 40%"), ("diverged", "was given up")])
def test_a_run_that_did_not_finish_says_so(tmp_path, state, said):
    run = bare_run(tmp_path / "run")
    run.write_status(state=state, nimg=400, total_nimg=1000)
    assert said in page.render(run)


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_every_metric_has_a_meaning():
    scores = Regression().update(*(np_to_tensor(x) for x in (0.0, 1.0))).scores()
    assert {metric.name for metric in BUNDLES["all"]} | set(scores) <= set(measured.MEANINGS)
    assert set(scores) <= set(measured.PIXEL_ERRORS) <= set(measured.MEANINGS)


def np_to_tensor(value: float):
    import torch

    return torch.tensor([value, -1.0]).reshape(2, 1, 1, 1)


def test_the_newest_measurement_of_a_feature_space_counts():
    rows = [row_of("kernel", 1.0), row_of("kernel", 2.0, features="randconv"), row_of("kernel", 3.0)]
    shown = measured.tables(rows)["drawn"]
    assert [(row.value, row.features) for row in shown] == [("3", "classifier"), ("2", "randconv")]
    assert measured.tables(rows[:1])["drawn"][0].features == ""


def test_numbers_that_are_not_finite_are_shown_or_left_out():
    found = measured.tables([row_of("frechet", float("inf")), row_of("kernel", float("nan"))])
    assert [(row.metric, row.value) for row in found["drawn"]] == [("frechet", "inf")]


def test_long_lines_are_thinned_to_means_that_keep_end_and_average():
    rows = [{"nimg": i, "x": float(i % 2)} for i in range(1, 10_001)]
    points = curves._points(rows, "x")
    assert len(points) == curves.MOST_POINTS and points[-1][0] == 10_000
    assert all(value == 0.5 for _, value in points)


def test_values_that_are_not_finite_are_no_points():
    rows = [{"nimg": 1, "x": float("nan")}, {"nimg": 2, "x": float("inf")}, {"nimg": 3, "x": 1}, {"x": 1}, {"nimg": 4}]
    assert curves._points(rows, "x") == ((3, 1.0),)


def test_a_log_scale_is_taken_where_it_helps(tmp_path):
    def numerals(factor: float) -> list[str]:
        rows = [{"nimg": 1000 * i, "a/loss": factor**i} for i in range(5)]
        svg = base64.b64decode(curves.charts(rows)[0].source.split(",")[1]).decode()
        return re.findall(r">([\d.e-]+)</text>", svg)

    assert {"1", "10", "100", "1000"} <= set(numerals(10.0))
    assert "100" not in numerals(1.2) and {"1", "1.5", "2"} <= set(numerals(1.2))


def test_no_two_noise_levels_look_alike():
    names = [f"validation/learn@{level}" for level in range(8)]
    rows = [{"nimg": step, **dict.fromkeys(names, 1.0 / step)} for step in range(1, 5)]
    (chart,) = [chart for chart in curves.charts(rows) if "noise level" in chart.title]
    assert len({(line.colour, line.dashed) for line in chart.lines}) == 8


def test_charts_of_few_points_are_left_out():
    rows = [{"nimg": i, "a/loss": 1.0, "lr": 0.1} for i in range(curves.FEWEST_POINTS)]
    assert [chart.title for chart in curves.charts(rows)] == ["Loss", "Learning rate"]
    assert curves.charts(rows[1:]) == []


# -- plots of measurements --------------------------------------------------------------------------------------------

CURVES = {"curve": [[1, 0.25, 0.5], [3, 0.5, 0.75]], "curve_real": [[1, 0.75, 0.625], [3, 0.875, 1.0]]}
RADII = {"radial": [1.0, 0.1], "radial_real": [10.0, 1.0]}


def test_precision_stands_over_recall_for_drawn_and_for_real_pictures():
    (chart,) = plots.plots([row_of("precision", 0.5, details=CURVES)])
    assert [line.points for line in chart.lines] == [((0.5, 0.25), (0.75, 0.5)), ((0.625, 0.75), (1.0, 0.875))]
    assert "drawn from 0.5 and 0.25 to 0.75 and 0.5" in chart.summary


def test_spectra_are_in_decibels():
    (chart,) = plots.plots([row_of("spectrum", 3.0, details=RADII)])
    assert [line.points for line in chart.lines] == [((1, 0.0), (2, -10.0)), ((1, 10.0), (2, 0.0))]


@pytest.mark.parametrize(
    "details", [{}, {"curve": 3}, {"curve": [[1, 2]]}, {"curve": [[1, None, "x"]]}, {"classes": 1}]
)
def test_plots_without_figures_are_left_out(details):
    rows = [row_of(metric, 0.5, details=details) for metric in ("precision", "spectrum", "label_accuracy")]
    assert plots.plots(rows) == [] and plots.bars(rows) == []


def test_bars_show_the_worst_class_first():
    accuracy = row_of("label_accuracy", 0.5, details={"classes": {"cat": 0.9, "dog": 0.2, "cow": "nan"}})
    distance = row_of("intra_class_frechet", 4.0, details={"classes": {"cat": 2.0, "dog": 8.0}})
    shown = {group.title: [(bar.name, bar.share) for bar in group.rows] for group in plots.bars([accuracy, distance])}
    assert list(shown.values()) == [[("dog", 0.2), ("cat", 0.9)], [("dog", 1.0), ("cat", 0.25)]]


def test_of_many_classes_only_the_worst_have_a_bar():
    classes = {f"kind {i}": i / 1000 for i in range(100)}
    (group,) = plots.bars([row_of("label_accuracy", 0.05, details={"classes": classes})])
    assert len(group.rows) == plots.MOST_BARS and group.rows[0].name == "kind 0"


def test_plots_stand_in_the_page_with_names_of_classes_escaped(tmp_path):
    run = bare_run(tmp_path / "run")
    run.append_measurement(row_of("precision", 0.5, details=CURVES))
    run.append_measurement(row_of("label_accuracy", 0.5, details={"classes": {ATTACK: 0.5}}))
    html = page.render(run)
    assert "<script>" not in html and "script" in Page(html).text
    assert any("Recall and precision" in (found["alt"] or "") for found in Page(html).images)


# -- pictures ---------------------------------------------------------------------------------------------------------


def test_a_heavy_picture_is_made_smaller(tmp_path):
    add_picture(tmp_path / "noise.png", (900, 600))
    small = page.embed(tmp_path / "noise.png", "noise", *page.THUMBNAIL)
    assert (small.width, small.height) == (480, 320)
    assert len(small.source) < (tmp_path / "noise.png").stat().st_size / 5


def test_a_long_timeline_keeps_its_ends(tmp_path):
    run = bare_run(tmp_path / "run")
    for nimg in range(150):
        add_picture(run.sample_path(nimg * 1000), (4, 4))
    shown = page._timeline(run.samples())
    assert len(shown) == page.MOST_PREVIEWS
    assert (shown[0].shows, shown[-1].shows) == ("before training", "after 149 thousand images")
    assert "60 of 150 moments" in page.render(run)


def test_prompts_of_previews_are_listed_below_the_newest_one(tmp_path):
    prompts = ["a red shoe", "犬", ATTACK]
    recipe = f"[family]\nname = '{FAMILY}'\n[train]\nprompts = {json.dumps(prompts)}\n"
    run = bare_run(tmp_path / "run", recipe)
    add_picture(run.sample_path(0))
    add_picture(run.sample_path(1000))
    add_weights(run, ("cat", "dog"))
    shown = page.render(run)
    assert [shown.count(f"<li>{escape(prompt)}</li>") for prompt in prompts] == [1, 1, 1] and ATTACK not in shown
    assert "and the same prompts, so" in shown and ">cat</span>" not in shown


@pytest.mark.parametrize("num_classes", [2, page.MOST_COLUMNS, page.MOST_COLUMNS + 1])
def test_columns_are_named_exactly_where_the_sheet_has_one_a_class(tmp_path, num_classes):
    add_picture(tmp_path / "sheet.png")
    names = [str(label) for label in range(num_classes)]
    columns = pictures.columns_for(len(labels_for(40, num_classes)), num_classes)
    assert bool(page._sheet(tmp_path / "sheet.png", "", names).columns) == (columns == num_classes)
