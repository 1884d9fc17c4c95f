"""The run folder: the only artefact of a training, and the only file that knows what lies in it by which name.

Every small file is written aside, flushed and renamed, so a reader never sees half of one. No torch is imported here.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from imagekiln.errors import DiskError, UsageError

_FULL = {errno.ENOSPC, errno.EDQUOT} if hasattr(errno, "EDQUOT") else {errno.ENOSPC}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextmanager
def disk_faults(path: Path) -> Iterator[None]:
    """Turn what is raised where `path` cannot be written into a `DiskError` that says what the system said."""
    try:
        yield
    except OSError as error:
        raise _fault(path, error) from error
    except SafetensorError as error:
        said = re.search(r"\(os error (\d+)\)", str(error))  # the system's number is in its words alone
        if not said:
            raise
        raise _fault(path, OSError(int(said[1]), os.strerror(int(said[1])))) from error


def _fault(path: Path, error: OSError) -> DiskError:
    if error.errno in _FULL:
        what = "the disk is full. Free some space and run the same command again; nothing saved so far is lost"
    elif error.errno in _FORBIDDEN:
        what = "the folder is not writable. Choose another one with --out, or change its permissions"
    else:
        what = f"{error.strerror or error}"
    return DiskError(f"{path} could not be written: {what}.")


def made_folder(path: str | Path) -> Path:
    """The folder at this path, made where there is none. Raises `DiskError` when it cannot be."""
    folder = Path(path)
    with disk_faults(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_whole(path: Path, data: bytes | str) -> None:
    """Write a file so that it is there whole or not at all: aside, fsync, rename.

    Raises:
        DiskError: the disk is full or the folder is not writable.
    """
    with written_whole(path) as aside, aside.open("xb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A hidden name to write and flush a file under, which then takes the place of `path`; no part is ever left.

    Raises:
        DiskError: the disk is full or the folder is not writable.
    """
    with disk_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = aside_of(path)
        try:
            yield aside
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)


def aside_of(path: Path) -> Path:
    """A hidden name beside `path` to write under before renaming.

    It is named before it is made, so that whoever makes it can promise to remove it, wherever a signal comes in.
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


class Run:
    """One run folder.

    >>> import tempfile
    >>> run = Run.create(Path(tempfile.mkdtemp()) / "first", recipe_toml="", meta={"data": "builtin:digits"})
    >>> run.append_stats({"nimg": 64, "loss": 0.5}); run.stats()[0]["loss"]
    0.5
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    @classmethod
    def create(cls, path: Path, recipe_toml: str, meta: Mapping[str, Any]) -> Run:
        """Make the folder and write what the run is made with, also over a run that was never started.

        Raises:
            UsageError: the folder holds something that is not a run.
            DiskError: it cannot be written.
        """
        run = cls(path)
        with disk_faults(run.path):
            run._refuse_foreign()
            run.path.mkdir(parents=True, exist_ok=True)
            run.checkpoints.mkdir(exist_ok=True)
            for left in (run.codec_path, run.codec_scales_path):
                left.unlink(missing_ok=True)
        write_whole(run.path / "meta.json", json.dumps(dict(meta), indent=2) + "\n")
        write_whole(run.path / "recipe.toml", recipe_toml)
        return run

    @classmethod
    def open(cls, path: Path | str) -> Run:
        """An existing run.

        Raises:
            UsageError: there is no run at `path`.
        """
        run = cls(Path(path))
        if not run.exists():
            reason = "holds no recipe.toml" if run.path.is_dir() else "does not exist"
            raise UsageError(f"{path} is not a run folder: it {reason}. `imagekiln train` makes one.")
        return run

    def exists(self) -> bool:
        """Whether the folder holds a run."""
        return (self.path / "recipe.toml").is_file()

    def started(self) -> bool:
        """Whether it holds something to continue from: a start may be cut short before its first checkpoint."""
        kept = (self.checkpoints.glob("[0-9]*"), (self.path / "weights").glob("[0-9]*.safetensors"))
        return self.exists() and any(True for files in kept for _ in files)

    def _refuse_foreign(self) -> None:
        """Refuse a file, and a folder that holds anything but a run or what a start that was killed leaves."""
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"{self.path} is a file. Name a folder for the run with --out.")
        if self.exists() or not self.path.is_dir():
            return
        begun = {"meta.json"} | ({"checkpoints"} if not any(self.checkpoints.glob("*")) else set())
        if any(not p.name.startswith(".") and p.name not in begun for p in self.path.iterdir()):
            raise UsageError(f"{self.path} holds files but no run. Name an empty or new folder with --out.")

    @contextmanager
    def lock(self, await_other: Callable[[], None] | None = None) -> Iterator[None]:
        """Hold the folder for one writer; released by the system when the process ends in whatever way.

        await_other: called before another process is waited for, which is otherwise an error.

        Raises:
            UsageError: another process is writing to this run, or the folder holds something else.
            DiskError: the folder cannot be made.
        """
        with disk_faults(self.path):
            self._refuse_foreign()
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                if await_other is None:
                    raise UsageError(
                        f"Another process is training in {self.path}. Wait for it, or name another folder with --out."
                    ) from None
                await_other()
                lock.acquire()
        try:
            yield
        finally:
            lock.release()
            if not self.exists():  # nothing came of it: leave no empty folder behind
                with contextlib.suppress(OSError):
                    (self.path / ".lock").unlink(missing_ok=True)
                    self.path.rmdir()

    # -- what it is made with ----------------------------------------------------------------------------------------

    @property
    def recipe_path(self) -> Path:
        """The fully resolved recipe."""
        return self.path / "recipe.toml"

    def write_recipe(self, recipe_toml: str) -> None:
        """Replace the recipe (once, when `--minutes` has fixed the length of the run)."""
        write_whole(self.recipe_path, recipe_toml)

    def meta(self) -> dict[str, Any]:
        """Versions, device, command and data fingerprint the run was started with."""
        return _read_json(self.path / "meta.json") or {}

    # -- how it goes --------------------------------------------------------------------------------------------------

    def write_status(self, **status: Any) -> None:
        """The heartbeat: state, images seen, images per second, time of finish."""
        write_whole(self.path / "status.json", json.dumps({**status, "unix_sec": round(time.time(), 1)}) + "\n")

    def status(self) -> dict[str, Any]:
        """The last heartbeat, or {}."""
        return _read_json(self.path / "status.json") or {}

    def append_stats(self, row: Mapping[str, Any]) -> None:
        """One row a tick; keys carry their unit."""
        self._append("stats.jsonl", row)

    def stats(self) -> list[dict[str, Any]]:
        """All ticks so far."""
        return _read_rows(self.path / "stats.jsonl")

    def forget_after(self, nimg: int) -> None:
        """Drop rows written after the checkpoint a resume starts from: they will be written again."""
        for name in ("stats.jsonl", "doctor.jsonl"):
            rows = _read_rows(self.path / name)
            kept = [row for row in rows if row.get("nimg", 0) <= nimg or row.get("keep")]
            if len(kept) < len(rows):
                write_whole(self.path / name, "".join(json.dumps(row) + "\n" for row in kept))

    def append_measurement(self, row: Mapping[str, Any]) -> None:
        """One measured number with its provenance."""
        self._append("metrics.jsonl", row)

    def measurements(self) -> list[dict[str, Any]]:
        """All measured numbers."""
        return _read_rows(self.path / "metrics.jsonl")

    def append_event(self, row: Mapping[str, Any]) -> None:
        """Something that was noticed, and what was done about it."""
        self._append("doctor.jsonl", row)

    def events(self) -> list[dict[str, Any]]:
        """Everything that was noticed."""
        return _read_rows(self.path / "doctor.jsonl")

    def append_check(self, row: Mapping[str, Any]) -> None:
        """One answer of `monitor`."""
        self._append("monitor.jsonl", row)

    def checks(self) -> list[dict[str, Any]]:
        """All answers of `monitor`."""
        return _read_rows(self.path / "monitor.jsonl")

    def append_log(self, text: str) -> None:
        """A traceback, for a report of a bug."""
        with disk_faults(self.log_path), self.log_path.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n{text}\n")

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        path = self.path / name
        with disk_faults(path), path.open("ab+") as file:
            if file.tell() and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n":
                file.write(b"\n")  # a crash cut the last row short
            file.write(json.dumps(dict(row)).encode() + b"\n")

    # -- what it made -------------------------------------------------------------------------------------------------

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints (see `engine.checkpoint`)."""
        return self.path / "checkpoints"

    @property
    def log_path(self) -> Path:
        """Tracebacks of unforeseen errors, for reports of bugs."""
        return self.path / "log.txt"

    @property
    def report_path(self) -> Path:
        """The self-contained report."""
        return self.path / "report.html"

    @property
    def release_path(self) -> Path:
        """Pictures of fixed seeds on the day of release."""
        return self.path / "release.safetensors"

    @property
    def codec_path(self) -> Path:
        """The run's own copy of the autoencoder whose latents it learns, where it learns latents."""
        return self.path / "codec" / "weights.safetensors"

    @property
    def codec_scales_path(self) -> Path:
        """Shift and scale of these latents."""
        return self.path / "codec" / "scales.json"

    @classmethod
    def of_weights(cls, weights: Path) -> Run:
        """The run that a weights file lies in."""
        return cls(weights.parent.parent)

    @property
    def events_folder(self) -> Path:
        """TensorBoard's files."""
        return self.path / "tensorboard"

    def sample_path(self, nimg: int) -> Path:
        """Picture of the fixed seeds after `nimg` images."""
        return self.path / "samples" / f"{nimg:09d}.png"

    def samples(self) -> list[tuple[int, Path]]:
        """All previews as (images seen, file), oldest first."""
        return [(int(path.stem), path) for path in sorted((self.path / "samples").glob("[0-9]*.png"))]

    def picture_path(self, name: str) -> Path:
        """A named picture of the run, for example `real`."""
        return self.path / "samples" / f"{name}.png"

    def weights_path(self, nimg: int, average: str) -> Path:
        """Weights ready to draw with, their recipe inside."""
        return self.path / "weights" / f"{nimg:09d}-{average}.safetensors"

    def weights(self, nimg: int | None = None, average: str | None = None) -> Path:
        """The weights file to draw with: the best one by default, else the newest.

        Raises:
            UsageError: the run has none (yet), or none after that many images.
        """
        files = sorted((self.path / "weights").glob("[0-9]*.safetensors"))
        if not files:
            raise UsageError(f"{self.path} has no weights yet. Let `imagekiln train` finish or stop it with Ctrl-C.")
        best = self.status() if nimg is None else {}
        chosen = best.get("best_nimg") if nimg is None else nimg
        stem = [f for f in files if chosen is not None and int(f.stem.split("-", 1)[0]) == chosen]
        if nimg is not None and not stem:
            known = ", ".join(sorted({f.stem.split("-", 1)[0].lstrip("0") or "0" for f in files}))
            raise UsageError(f"{self.path} has no weights after {nimg} images. There are: {known}.")
        stem = stem or [f for f in files if f.stem.split("-", 1)[0] == files[-1].stem.split("-", 1)[0]]
        named = [
            f
            for f in stem
            if f.stem.split("-", 1)[1] == (average or best.get("best_average") or self.meta().get("average"))
        ]
        if average is not None and not named:
            raise UsageError(
                f"{self.path} has no average {average!r}. There are: "
                f"{', '.join(f.stem.split('-', 1)[1] for f in stem)}."
            )
        return (named or stem)[0]

    def prune_weights(self, kept_nimg: set[int], since: Sequence[int] = ()) -> None:
        """Delete weights of all other moments, but the first ones after so many images."""
        files = {file: int(file.stem.split("-", 1)[0]) for file in (self.path / "weights").glob("[0-9]*.safetensors")}
        firsts = {min((nimg for nimg in files.values() if nimg >= moment), default=-1) for moment in since}
        for file, nimg in files.items():
            if nimg not in kept_nimg | firsts:
                file.unlink()


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file; a last line cut short by a crash is left out."""
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows
