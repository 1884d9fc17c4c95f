"""Tuning: which settings go on, what is compared with what, and real runs that continue where they were stopped."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from imagekiln import api
from imagekiln.cli.tune import tune as verb
from imagekiln.engine import checkpoint
from imagekiln.engine.run import Run
from imagekiln.engine.tune import Tuned, candidates, criterion, quantile, rungs, table, tune, verdict
from imagekiln.engine.tune import _difference as difference
from imagekiln.engine.tune import _Race as Race
from imagekiln.errors import Diverged, Interrupted, RecipeError, UsageError

HEAT = "optim.network.langevin.temperature"
SMALL = ["family.width=8", "train.batch=50", "train.precision='fp32'", "train.preview_kimg=1000"]
SMALL += ["train.doctor='off'", "train.device='cpu'", "train.checkpoint_kimg=1000", "train.validate_kimg=0.2"]
KIMG = 0.6


def train(folder: Path, assignments: Sequence[str]) -> Run:
    return api.train("classifier", "builtin:digits", folder, assignments=assignments)


# -- which candidates -------------------------------------------------------------------------------------------------


def test_no_noise_is_always_in_the_race_and_named_once() -> None:
    for text in ("0.01,1", "0.01,0,1", "0,0.01,0.0,1"):
        found = candidates([f"{HEAT}={text}"])
        assert [one.values[HEAT] for one in found] == [0, 0.01, 1]
        assert [one.is_control for one in found] == [True, False, False]
    pair = candidates(["optim.a.langevin.temperature=1", "optim.b.langevin.temperature=2", "train.batch=8,16"])
    assert len(pair) == 8 and sum(one.is_control for one in pair) == 2
    assert len({one.name for one in pair}) == 8, "folders have different names"
    assert len({one.name for one in candidates(["family.name=a/b,a b,a_b"])}) == 3
    assert not any(one.is_control for one in candidates(["train.batch=8,16"])), "no noise was asked about"


def test_values_are_toml_or_words() -> None:
    (one, two) = candidates(["optim.network.betas=[0.5,0.9],[0.9, 0.99]"])
    assert (one.values["optim.network.betas"], two.assignments) == ([0.5, 0.9], ["optim.network.betas=[0.9, 0.99]"])
    assert [c.values["optim.network.name"] for c in candidates(["optim.network.name=adam, sgd"])] == ["adam", "sgd"]


@pytest.mark.parametrize(
    ("over", "word"),
    [
        (["train.batch"], "key=value"),
        (["train.batch="], "key=value"),
        (["train.batch=8,8"], "1 candidate;"),
        (["train.batch=8,16", "train.batch=32"], "twice"),
        (["train.total_kimg=1,2"], "--kimg"),
        (["train.seed=1,2"], "--seeds"),
        (["data.size=8,16"], "compared"),
        ([f"train.batch={','.join(map(str, range(1, 90)))}"], "89 candidates"),
    ],
)
def test_what_cannot_be_tried_is_refused(over: list[str], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        candidates(over)


def test_unknown_settings_and_too_short_rungs_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="temperature"):
        tune("classifier", ["optim.network.langevin.temperatur=0,1"], tmp_path / "a", train)
    with pytest.raises(UsageError, match="first rung"):
        tune("classifier", [f"{HEAT}=1,2"], tmp_path / "b", train, kimg=0.1)
    with pytest.raises(UsageError, match="at least 2"):
        tune("classifier", [f"{HEAT}=1"], tmp_path / "c", train, seeds=1)
    assert not list(tmp_path.iterdir())


def test_rungs_are_as_many_as_candidates_fill() -> None:
    assert rungs(27.0, 8, 3) == (9.0, 27.0) and rungs(27.0, 27, 3) == (1.0, 3.0, 9.0, 27.0)
    assert rungs(16.0, 5, 2) == (4.0, 8.0, 16.0)


# -- who goes on ------------------------------------------------------------------------------------------------------


def test_the_best_go_on_and_no_noise_with_them(tmp_path: Path) -> None:
    grid = candidates([f"{HEAT}={','.join(map(str, range(1, 9)))}"])
    race = Race(grid, (1.0, 3.0, 9.0), (0, 1), tmp_path, train, [])
    for place, one in enumerate(grid):
        race.values[one.name] = [float(-place)]
    names = [one.name for one in race.survivors(grid, 3, False)]
    assert names == ["temperature-0", "temperature-6", "temperature-7", "temperature-8"]
    assert [one.name for one in race.survivors(grid, 0, True)] == ["temperature-0", "temperature-7", "temperature-8"]
    race.values["temperature-0"], race.values["temperature-8"] = [-99.0], [math.inf]
    assert [one.name for one in race.survivors(grid, 2, False)] == ["temperature-0", "temperature-7"]
    for values in race.values.values():
        values[-1] = 1.0
    assert [one.name for one in race.survivors(grid, 1, False)] == ["temperature-0"], "of equals the first of the grid"


# -- what it means ----------------------------------------------------------------------------------------------------


def test_differences_are_taken_seed_by_seed() -> None:
    """Values that differ widely between seeds, but always by the same: apart. Student's t by hand for n = 3."""
    behind, limits = difference([1.1, 2.1, 3.1], [1.0, 2.0, 3.0])
    assert behind == pytest.approx(0.1) and limits == pytest.approx((0.1, 0.1))
    behind, limits = difference([1.0, 3.0, 5.0], [0.0, 0.0, 0.0])
    assert limits == pytest.approx((3 - 4.302653 * 2 / 3**0.5, 3 + 4.302653 * 2 / 3**0.5), rel=1e-5)
    assert difference([1.0, math.inf], [1.0, 2.0]) == (math.inf, None)
    assert quantile(1) == pytest.approx(12.7062, rel=1e-4) and quantile(30) == pytest.approx(2.0423, rel=1e-3)


def judged(**values: list[float]) -> tuple[Tuned, str]:
    grid = candidates([f"{HEAT}=0.1,1"])
    race = Race(grid, (1.0,), (0, 1, 2), Path("x"), train, [])
    for one in grid:
        race.values[one.name] = [values[f"t{one.values[HEAT]:g}".replace(".", "")][0]]
    found = race._judged({one.name: values[f"t{one.values[HEAT]:g}".replace(".", "")] for one in grid}, "validation/x")
    return found, found.verdict


def test_the_verdict_says_when_no_noise_wins_and_when_intervals_overlap() -> None:
    near, far = [0.50, 0.61, 0.69], [2.50, 2.61, 2.69]
    found, said = judged(t0=near, t01=far, t1=far)
    assert found.winner == "temperature-0" and not found.tied and "D = 0 wins" in said and "costs" in said
    found, said = judged(t0=[0.51, 0.59, 0.72], t01=near, t1=far)
    assert found.winner == "temperature-0.1" and found.tied == ("temperature-0",)
    assert "overlap" in said and "no evidence for noise" in said
    found, said = judged(t0=near, t01=[0.51, 0.59, 0.72], t1=far)
    assert "overlap" in said and "D = 0 wins" in said and "gains nothing" in said
    found, said = judged(t0=far, t01=near, t1=far)
    assert "better than D = 0 by 2" in said and not found.tied
    found, said = judged(t0=near, t01=[0.4, math.inf, 0.4], t1=far)
    assert found.winner == "temperature-0"
    assert json.loads(json.dumps(found.to_json()))["rows"][-1]["mean"] is None
    assert "D = 0" in verdict(found.rows, found.winner, found.tied) and "temperature-1" in table(found)


# -- real runs --------------------------------------------------------------------------------------------------------


def test_real_runs_are_ranked_continued_and_repeat(tmp_path: Path) -> None:
    calls: list[tuple[str, str]] = []

    def counted(folder: Path, assignments: Sequence[str]) -> Run:
        calls.append((folder.name, next(text for text in assignments if text.startswith("train.total_kimg"))))
        if len(calls) == 3:
            raise Interrupted("stopped by a signal")
        return train(folder, assignments)

    over, options = [f"{HEAT}=0.001,1000"], {"assignments": SMALL, "kimg": KIMG, "seeds": 2}
    with pytest.raises(Interrupted):
        tune("classifier", over, tmp_path / "t", counted, **options)
    said: list[str] = []
    found = tune("classifier", over, tmp_path / "t", counted, **options, say=said.append)
    # Two reached the first rung before the stop and are not trained there again; the hot one does not go on.
    assert [name for name, kimg in calls if kimg.endswith("=0.2")][:4] == [
        "temperature-0",
        "temperature-0.001",
        "temperature-1000",
        "temperature-1000",
    ]
    assert len(calls) == 1 + 3 + 2 + 2 * 2 and found.rungs_kimg == (0.2, KIMG)
    by_name = {row.name: row for row in found.rows}
    hot = by_name["temperature-1000"]
    assert len(hot.rungs) == 1 and not hot.values and hot.rungs[0] > by_name["temperature-0"].rungs[0]
    assert by_name["temperature-0"].control and len(by_name["temperature-0"].values) == 2
    for row in found.rows[:2]:
        run = Run.open(tmp_path / "t" / row.name)
        kept, _ = checkpoint.load_newest(run.checkpoints, "cpu")
        assert kept is not None and kept.nimg == 1000 * KIMG
        assert kept.state["best_loss"] == row.values[0] == row.rungs[-1] == criterion(run)
    before = len(calls)
    assert tune("classifier", over, tmp_path / "t", counted, **options) == found and len(calls) == before
    written = json.loads((tmp_path / "t" / "tune.json").read_text())
    assert written["result"] == found.to_json() and found.winner in table(found)
    with pytest.raises(UsageError, match="other seeds"):
        tune("classifier", over, tmp_path / "t", counted, **{**options, "seeds": 3})
    with pytest.raises(UsageError, match="no tuning"):
        tune("classifier", over, tmp_path / "t" / "temperature-0", counted, **options)


def test_what_diverges_falls_behind_and_all_of_it_is_an_error(tmp_path: Path) -> None:
    def fragile(folder: Path, assignments: Sequence[str]) -> Run:
        """A recipe whose training leaves the finite numbers with any noise; rows as a trainer writes them."""
        if f"{HEAT}=0" not in assignments or "hopeless" in str(folder):
            raise Diverged("it left the finite numbers")
        run = Run.create(folder, '[family]\nname = "classifier"\n[train]\n', {})
        run.append_stats({"nimg": 1, "validation/classify": 0.5})
        return run

    found = tune("classifier", [f"{HEAT}=1,2"], tmp_path / "t", fragile, kimg=9.0, seeds=2)
    assert found.winner == "temperature-0" and all(row.rungs[0] == math.inf for row in found.rows if not row.control)
    with pytest.raises(Diverged, match="Every candidate"):
        tune("classifier", [f"{HEAT}=1,2"], tmp_path / "hopeless", fragile, kimg=9.0, seeds=2)


def test_other_pictures_or_an_edited_recipe_do_not_continue_a_tuning(tmp_path: Path) -> None:
    def told(folder: Path, assignments: Sequence[str]) -> Run:
        """Rows as a trainer writes them."""
        run = Run.create(folder, '[family]\nname = "classifier"\n[train]\n', {})
        run.append_stats({"nimg": 1, "validation/classify": float(len(folder.name))})
        return run

    recipe, photos = tmp_path / "mine.toml", tmp_path / "photos"
    photos.mkdir()
    for index in range(8):
        Image.new("L", (8, 8), 20 * index).save(photos / f"{index}.png")
    recipe.write_text('[family]\nname = "classifier"\nwidth = 8\n')

    def again(data: str | Path) -> Tuned:
        return tune(str(recipe), [f"{HEAT}=1"], tmp_path / "t", told, data=str(data), kimg=9.0, seeds=2)

    found = again(photos)
    assert again(photos) == found
    with pytest.raises(UsageError, match="other data"):
        again("builtin:digits")
    photos.rename(tmp_path / "moved")
    assert again(tmp_path / "moved") == found
    (tmp_path / "moved" / "0.png").unlink()
    with pytest.raises(UsageError, match="other data"):
        again(tmp_path / "moved")
    Image.new("L", (8, 8), 0).save(tmp_path / "moved" / "0.png")
    recipe.write_text('[family]\nname = "classifier"\nwidth = 16\n')
    with pytest.raises(UsageError, match="other settings"):
        again(tmp_path / "moved")


def test_the_verb_prints_a_table_and_the_command_to_go_on_with(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(verb)
    settings = [word for setting in SMALL for word in ("--set", setting)]
    command = ["classifier", "--data", "builtin:digits", "--out", str(tmp_path / "t"), "--over", f"{HEAT}=1000"]
    command += ["--kimg", "0.1", "--seeds", "2", *settings, "--set", "train.validate_kimg=0.1"]
    ended = CliRunner().invoke(app, command)
    assert ended.exit_code == 0, ended.output
    assert "D = 0" in ended.stdout and "validation/classify, lower is better" in ended.stdout
    anew = [f"--set={one}" for one in [*SMALL, "train.validate_kimg=0.1", "train.total_kimg=0.1", f"{HEAT}="]]
    assert f"imagekiln train classifier --data builtin:digits {shlex.join(anew)}" in ended.stdout, "all that it took"
    again = CliRunner().invoke(app, [*command, "--json"])
    found = json.loads(again.stdout)
    assert {row["name"] for row in found["rows"]} == {"temperature-0", "temperature-1000"} and len(found["seeds"]) == 2
    for wrong, word in (([], "--data"), (["--data", "builtin:digits"], "--over")):
        refused = CliRunner().invoke(app, ["classifier", *wrong])
        assert isinstance(refused.exception, UsageError) and word in str(refused.exception)
