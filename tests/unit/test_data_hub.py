"""Data sets of the hub: what names one, what is fetched, what is refused, and that a folder stays at its commit.

The hub is played by a server on loopback that speaks the few requests the package huggingface_hub makes.
"""

from __future__ import annotations

import http.server
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagekiln.data import hub
from imagekiln.data.hub import parse, snapshot
from imagekiln.errors import DataError, UsageError

FILES = {
    "data/train-0.parquet": b"PAR1 a table PAR1",
    "images/cat 1.JPG": b"a picture",
    "metadata.csv": b"file_name,text\n",
    "load.py": b"raise SystemExit",
    "weights.pkl": b"no",
    "model.bin": b"no",
    ".hidden/a.png": b"no",
    "README.md": b"words",
}


def commit_of(number: int) -> str:
    return f"{number:040x}"


class Hub(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.branch, self.asked = dict(FILES), 1, list[str]()
        self.gated = self.broken = False
        self.commits = {commit_of(1): dict(FILES)}

    def push(self, files: dict[str, bytes]) -> None:
        self.branch += 1
        self.commits[commit_of(self.branch)] = files


class Answer(http.server.BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *arguments: Any) -> None:
        pass

    def send(self, status: int, raw: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content_Length": str(len(raw))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(raw)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        if path.startswith("/api/datasets/me/set/revision/"):
            self.about(path.rsplit("/", 1)[1])
        elif path.startswith("/datasets/me/set/resolve/"):
            _, _, _, _, _, commit, name = path.split("/", 6)
            raw = self.server.commits[commit][name.replace("%20", " ")]
            if self.server.broken:
                self.send(400)
            else:
                self.send(200, raw, ETag=f'"{commit}{len(raw)}"', X_Repo_Commit=commit)
        else:
            self.send(404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def about(self, revision: str) -> None:
        if self.server.gated:
            return self.send(403, X_Error_Code="GatedRepo")
        commit = commit_of(self.server.branch) if revision == "main" else revision
        if commit not in self.server.commits:
            return self.send(404, X_Error_Code="RevisionNotFound")
        siblings = [{"rfilename": name, "size": len(raw)} for name, raw in self.server.commits[commit].items()]
        about = {"id": "me/set", "sha": commit, "siblings": siblings, "private": False, "tags": []}
        return self.send(200, json.dumps(about).encode(), Content_Type="application/json")


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    pytest.importorskip("huggingface_hub", reason="the package huggingface_hub is not installed")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    with Hub() as running:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{running.server_address[1]}")
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def visible(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.name != ".hub.json"
    }


# --- against a server -----------------------------------------------------------------------------------------------


def test_only_data_is_fetched_and_the_commit_is_kept(
    site: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, told = tmp_path / "set", list[tuple[int, int]]()
    assert snapshot("me/set", "main", folder, progress=lambda *values: told.append(values)) == folder
    wanted = {name: FILES[name] for name in ("data/train-0.parquet", "images/cat 1.JPG", "metadata.csv")}
    assert visible(folder) == wanted and told == [(1, 3), (2, 3), (3, 3)]
    assert json.loads((folder / ".hub.json").read_text())["commit"] == commit_of(1)
    assert capfd.readouterr() == ("", "")
    asked = len(site.asked)
    site.push({"new.png": b"new"})
    snapshot("me/set", "main", folder)  # the branch moved on, the folder does not, and nobody is asked
    assert visible(folder) == wanted and len(site.asked) == asked
    snapshot("me/set", "main", tmp_path / "newer")
    assert visible(tmp_path / "newer") == {"new.png": b"new"}
    snapshot("me/set", commit_of(1), tmp_path / "pinned")
    assert visible(tmp_path / "pinned") == wanted


def test_what_is_missing_is_fetched_at_the_same_commit(site: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    site.broken = True
    with pytest.raises(DataError, match="hf:me/set@main cannot be reached"):
        snapshot("me/set", "main", folder)
    site.broken = False
    site.push({"new.png": b"new"})
    snapshot("me/set", "main", folder)
    assert len(visible(folder)) == 3
    (folder / "metadata.csv").unlink()
    site.asked.clear()
    snapshot("me/set", "main", folder)
    assert len(visible(folder)) == 3
    fetched = {line for line in site.asked if line.startswith("GET /datasets")}
    assert fetched == {f"GET /datasets/me/set/resolve/{commit_of(1)}/metadata.csv"}


def test_what_cannot_be_had_is_said(site: Hub, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="hf:me/other@main does not exist"):
        snapshot("me/other", "main", tmp_path / "a")
    with pytest.raises(UsageError, match="no such revision"):
        snapshot("me/set", "v9", tmp_path / "a")
    with pytest.raises(DataError, match=r"GiB of data; at most"):
        snapshot("me/set", "main", tmp_path / "a", max_bytes=10)
    site.push({"load.py": b"", "x.bin": b"", "../out.png": b"no"})
    with pytest.raises(DataError, match=r"holds no data that is read.*\.parquet"):
        snapshot("me/set", "main", tmp_path / "a")
    site.gated = True
    with pytest.raises(UsageError, match="only to those who asked"):
        snapshot("me/set", "main", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_folder_of_something_else_is_left_alone(site: Hub, tmp_path: Path) -> None:
    snapshot("me/set", "main", tmp_path / "set")
    with pytest.raises(UsageError, match=r"holds me/set@main"):
        snapshot("me/set", commit_of(1), tmp_path / "set")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.png").write_bytes(b"")
    with pytest.raises(UsageError, match="holds something else"):
        snapshot("me/set", "main", tmp_path / "mine")


# --- without one ----------------------------------------------------------------------------------------------------


def test_the_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match=r"pip install 'imagekiln\[hub\]'"):
        snapshot("me/set", "main", tmp_path / "set")
    assert not (tmp_path / "set").exists()


BAD = [
    "a/b/c",
    "../x",
    "a/..",
    "/a",
    "a/",
    "a b/c",
    "a/b@",
    "a/b@../x",
    "a/b@x y",
    "a/b\n",
    "-a/b",
    "a--b/c",
    ".a/b",
    "",
]


@pytest.mark.parametrize("source", [*(f"hf:{name}" for name in BAD), "a/b"])
def test_what_names_no_data_set_is_refused(source: str) -> None:
    with pytest.raises(UsageError, match="expected hf:owner/name"):
        parse(source)


@given(st.text(max_size=40))
def test_any_name_is_parsed_or_refused(text: str) -> None:
    try:
        name, revision = parse(f"hf:{text}")
    except UsageError as error:
        assert "\n" not in str(error)
    else:
        assert parse(f"hf:{name}@{revision}") == (name, revision) and ".." not in name + revision


def test_data_is_told_from_what_runs() -> None:
    assert all(map(hub._is_data, ["a.parquet", "x/y.PNG", "t.tar", "m.jsonl"]))
    assert not any(
        map(hub._is_data, ["a.py", "a.pkl", "a.pt", "a.tar.gz", "../a.png", "/a.png", ".git/a.txt", "C:\\a.png"])
    )
