"""The run folder: whole files, one writer, rows that survive a crash."""

from __future__ import annotations

import json
import stat
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imagekiln.engine.run import Run, write_whole
from imagekiln.errors import DiskError, UsageError


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path / "run", "a = 1\n", {"average": "power-0.100"})


def test_files_are_whole_and_readable_by_a_group(tmp_path: Path) -> None:
    write_whole(tmp_path / "new" / "file", "old")
    write_whole(tmp_path / "new" / "file", b"new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]
    assert (tmp_path / "new" / "file").read_bytes() == b"new"
    assert stat.S_IMODE((tmp_path / "new" / "file").stat().st_mode) & 0o044


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(DiskError, match="could not be written"):
        write_whole(tmp_path / "folder", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_one_writer(run: Run) -> None:
    with run.lock(), pytest.raises(UsageError, match="Another process"), Run(run.path).lock():
        pass
    with run.lock():
        pass


def test_a_second_writer_may_wait_for_the_first(run: Run) -> None:
    order: list[str] = []

    def second() -> None:
        with Run(run.path).lock(lambda: order.append("waits")):
            order.append("second")

    thread = threading.Thread(target=second)
    with run.lock():
        thread.start()
        while not order:
            time.sleep(0.001)
        order.append("first")
    thread.join()
    assert order == ["waits", "first", "second"]


def test_a_lock_leaves_no_empty_folder(tmp_path: Path) -> None:
    with Run(tmp_path / "new").lock():
        assert (tmp_path / "new").is_dir()
    assert not (tmp_path / "new").exists()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(rows=st.lists(st.dictionaries(st.sampled_from(["nimg", "loss"]), st.integers(0, 99)), min_size=1), cut=st.data())
def test_rows_survive_a_crash_in_the_last_one(run: Run, rows: list[dict], cut: st.DataObject) -> None:
    file = run.path / "stats.jsonl"
    file.unlink(missing_ok=True)
    for row in rows:
        run.append_stats(row)
    assert run.stats() == rows
    content, last = file.read_bytes(), len(json.dumps(rows[-1])) + 1
    file.write_bytes(content[: len(content) - cut.draw(st.integers(2, last))])
    assert run.stats() == rows[:-1]


def test_rows_after_a_crash_are_not_glued_to_half_a_row(run: Run) -> None:
    run.append_stats({"nimg": 1})
    with (run.path / "stats.jsonl").open("a") as file:
        file.write('{"nimg": 2, "lo')
    run.forget_after(1)
    run.append_stats({"nimg": 2})
    assert run.stats() == [{"nimg": 1}, {"nimg": 2}]


def test_forgetting_keeps_what_was_noticed(run: Run) -> None:
    for nimg in (1, 2, 3):
        run.append_stats({"nimg": nimg})
        run.append_event({"nimg": nimg, "keep": nimg == 3})
    run.forget_after(1)
    assert [row["nimg"] for row in run.stats()] == [1]
    assert [row["nimg"] for row in run.events()] == [1, 3]


def weights(run: Run, *names: str) -> None:
    for name in names:
        write_whole(run.path / "weights" / f"{name}.safetensors", "")


def test_which_weights_draw(run: Run) -> None:
    with pytest.raises(UsageError, match="no weights yet"):
        run.weights()
    weights(run, "000000010-power-0.100", "000000010-exponential-20", "000000020-power-0.100")
    assert run.weights().stem == "000000020-power-0.100"
    run.write_status(best_nimg=10)
    assert run.weights().stem == "000000010-power-0.100"
    assert run.weights(average="exponential-20").stem == "000000010-exponential-20"
    assert run.weights(20).stem == "000000020-power-0.100"
    with pytest.raises(UsageError, match="There are: 10, 20"):
        run.weights(30)
    with pytest.raises(UsageError, match="no average 'median'"):
        run.weights(average="median")
    run.prune_weights({20})
    assert run.weights().stem == "000000020-power-0.100", "a best moment whose weights are gone is passed over"


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_a_spoilt_status_is_no_crash(run: Run, content: str) -> None:
    (run.path / "status.json").write_text(content)
    assert not run.status()


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        Run.open(tmp_path / "none")
    with pytest.raises(UsageError, match=r"holds no recipe\.toml"):
        Run.open(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        Run.create(tmp_path / "file", "", {})
