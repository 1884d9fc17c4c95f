"""The records tool: whole files, finite numbers, nothing overwritten; and every benchmark says what it asks."""

from __future__ import annotations

import argparse
import doctest
import importlib
import json
import math
import platform
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imagekiln.errors import DiskError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.usefixtures("beside_the_benchmarks")
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))
KEYS = {"name", "date", "command", "hardware", "versions", "commit", "rows", "notes", "facts"}
ROW_KEYS = {"what", "value", "unit", "n", "seeds", "interval", "sd", "raw"}


@pytest.fixture(scope="module")
def record() -> ModuleType:
    return importlib.import_module("record")


def test_a_record_says_what_where_and_how(record: ModuleType, tmp_path: Path) -> None:
    row = record.Row.of("FD of ours", [3.0, 5.0], "", seeds=[0, 1], n=5000)
    path = record.write_record(
        "quality", "python benchmarks/x.py", [row], notes=["a note"], folder=tmp_path, kimg=[1, 2]
    )
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written.keys() == KEYS
    assert (written["name"], written["command"], written["notes"]) == ("quality", "python benchmarks/x.py", ["a note"])
    assert written["facts"] == {"kimg": [1, 2]}
    assert torch.__version__.startswith(written["versions"]["torch"].partition("+")[0])
    assert written["versions"]["python"] == platform.python_version()
    assert written["hardware"]["threads"] == torch.get_num_threads()
    assert written["hardware"]["device"]
    (read,) = written["rows"]
    assert read.keys() == ROW_KEYS
    assert (read["value"], read["sd"], read["raw"]) == (4.0, pytest.approx(math.sqrt(2)), [3.0, 5.0])
    assert (read["seeds"], read["n"], read["interval"]) == ([0, 1], 5000, None)


def test_the_median_comes_with_its_extremes(record: ModuleType) -> None:
    row = record.Row.median("speed", [3.0, 1.0, 9.0], "images/s")
    assert (row.value, row.interval, row.raw) == (3.0, (1.0, 9.0), (3.0, 1.0, 9.0))


def test_one_measurement_has_no_spread(record: ModuleType) -> None:
    assert record.Row.of("speed", [3.0]).sd is None


@settings(deadline=None)
@given(bad=st.sampled_from([math.nan, math.inf, -math.inf]), place=st.sampled_from(["value", "raw", "interval", "sd"]))
def test_a_number_that_is_not_finite_is_refused_and_nothing_is_written(
    record: ModuleType, tmp_path_factory: pytest.TempPathFactory, bad: float, place: str
) -> None:
    folder = tmp_path_factory.mktemp("records")
    values = {"value": 1.0, place: {"raw": (1.0, bad), "interval": (0.0, bad)}.get(place, bad)}
    with pytest.raises(ValueError, match="only finite numbers are results"):
        record.write_record("x", "c", [record.Row("loss", 1.0), record.Row("accuracy", **values)], folder=folder)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("fact", [math.nan, [1.0, math.inf], {"deep": {"er": math.nan}}])
def test_facts_are_finite_too(record: ModuleType, tmp_path: Path, fact: object) -> None:
    with pytest.raises(ValueError, match="not a finite number"):
        record.write_record("x", "c", [record.Row("loss", 1.0)], folder=tmp_path, fact=fact)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "../up", "a b", "Quality", "-x"])
def test_a_name_must_be_a_file_name(record: ModuleType, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="does not name a record"):
        record.write_record(name, "c", [record.Row("loss", 1.0)], folder=tmp_path)


def test_a_record_without_rows_is_none(record: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no rows"):
        record.write_record("x", "c", [], folder=tmp_path)


def test_nothing_is_overwritten_and_the_newest_is_found(record: ModuleType, tmp_path: Path) -> None:
    for value in range(12):
        record.write_record("speed", "c", [record.Row("speed", float(value))], folder=tmp_path)
    record.write_record("speed-of-light", "c", [record.Row("speed", 3e8)], folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 13
    assert record.newest("speed", tmp_path)["rows"][0]["value"] == 11.0
    assert record.newest("nothing", tmp_path) is None


def test_a_folder_that_cannot_be_written_is_said(record: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="could not be written"):
        record.write_record("x", "c", [record.Row("loss", 1.0)], folder=tmp_path / "file")


def test_a_command_names_no_folder_of_this_machine(record: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--data", "/home/me/my photos", "--set", "data.path=/home/me/flowers", "--n", "50", "runs/a"]
    monkeypatch.setattr("sys.argv", ["/home/me/imagekiln/benchmarks/x.py", *arguments])
    expected = "python benchmarks/x.py --data 'my photos' --set data.path=flowers --n 50 runs/a"
    assert record.this_command() == expected


@pytest.mark.parametrize("module", ["record", "pairs"])
def test_the_examples_are_true(module: str) -> None:
    result = doctest.testmod(importlib.import_module(module))
    assert (result.failed, result.attempted > 0) == (0, True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_benchmark_is_importable_and_says_what_it_asks(script: str) -> None:
    module = importlib.import_module(script)
    assert module.__doc__ is not None
    assert module.__doc__.splitlines()[0].endswith("?"), "the first line is the question"
    parser = module.parser()
    assert isinstance(parser, argparse.ArgumentParser)
    assert all(action.help for action in parser._actions)
    assert str(BENCHMARKS.parent) not in parser.format_help()
