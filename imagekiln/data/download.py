"""Pictures from a list of URLs into a folder: parallel but polite, checked, and continued where it was stopped.

The folder is in the imagefolder convention: pictures named by a hash of their URL, and `metadata.jsonl` (file_name,
text, label) that names those that are there. `downloads.jsonl` is the journal, one line for every URL that was decided:
url, status ("ok" or "failed"), file, bytes, sha256, etag, reason; of several lines the last one counts. Pictures are
written aside and renamed, so a name stands for a whole picture. A second call asks only for what is not there.
"""

from __future__ import annotations

import csv
import hashlib
import heapq
import io
import itertools
import json
import math
import os
import re
import shutil
import time
import urllib.parse
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from filelock import FileLock, Timeout

from imagekiln import signals
from imagekiln.data import decode, web
from imagekiln.data.files import printable
from imagekiln.data.metadata import surplus
from imagekiln.errors import DataError, DiskError, UsageError

JOURNAL = "downloads.jsonl"
MAX_REDIRECTS = 5
MAX_WAIT_SEC = 120.0
"""A host that asks for more patience than this (Retry-After) is left for another day."""
_WHOLE = 15  # a whole picture may take this many times as long as a pause between two bytes
_MAX_LIST_BYTES = 512 * 2**20
_LOOK_SEC = 0.2
_COLUMNS = ("url", "text", "label", "sha256")
_ENDINGS = (
    (rb"\xff\xd8\xff", "jpg"),
    (rb"\x89PNG", "png"),
    (rb"GIF8", "gif"),
    (rb"RIFF....WEBP", "webp"),
    (rb"BM", "bmp"),
    (rb"(II|MM)", "tif"),
)

ProgressFn = Callable[[int, int], None]


@dataclass(frozen=True)
class Wanted:
    """One row of a list: a URL, and what the list says about its picture."""

    url: str
    text: str | None = None
    label: str | int | None = None
    sha256: str | None = None


@dataclass
class Fetched:
    """What a download did. failed: (url, reason). kept: pictures that were there already."""

    folder: Path
    num_listed: int
    num_downloaded: int = 0
    num_kept: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def fetch(
    urls_file: Path,
    folder: Path,
    *,
    workers: int = 8,
    tries: int = 3,
    timeout_sec: float = 20,
    max_bytes: int = 64 * 2**20,
    per_host: int = 2,
    pause_sec: float = 0.1,
    backoff_sec: float = 1.0,
    allow_private: bool = False,
    progress: ProgressFn | None = None,
) -> Fetched:
    """Download the pictures of a list into a folder that is DATA from then on; what is there already is kept.

    urls_file: one URL a line (`#` begins a comment), or a .csv or .jsonl with a column url and perhaps text, label and
        sha256.
    workers, per_host: connections at a time, in all and to one host. pause_sec: between two requests to one host.
    tries: for what may pass (no answer, 429, 5xx); the k-th wait is `backoff_sec * 2**k`, or what the host asks for.
    timeout_sec: for connecting and between bytes; a whole picture may take 15 times as long. max_bytes: a picture.
    allow_private: also ask hosts of this machine and its network.
    progress: called as progress(done, total).

    Raises `UsageError` for a list that cannot be understood and a folder of something else, `DataError` when in the end
    there is no picture, `DiskError` when the folder cannot be written, `Interrupted` after a signal.
    """
    wanted, notices = _distinct(read_list(urls_file))
    limits = web.Limits(timeout_sec, _WHOLE * timeout_sec, max_bytes, allow_private)
    pace = _Pace(workers, tries, per_host, pause_sec, backoff_sec)
    fetched = Fetched(folder, len(wanted), notices=notices)
    try:
        _claim(folder)
        lock, place = FileLock(folder / ".downloads.lock", timeout=0), folder / JOURNAL
        with lock, place.open("a+", encoding="utf-8", errors="replace") as stream:
            journal = _Journal(folder, stream)
            left = [one for one in wanted if not journal.has(one)]
            fetched.num_kept = len(wanted) - len(left)
            try:
                with signals.deferred():
                    _Downloads(journal, limits, pace, fetched, progress).run(left)
            finally:
                shutil.rmtree(folder / _ASIDE, ignore_errors=True)
                _write_metadata(folder, wanted, journal)
    except Timeout:
        raise UsageError(f"Another download writes to {folder}. Wait for it, or give another folder.") from None
    except OSError as error:
        raise DiskError(f"{folder} cannot be written ({error.strerror or error}).") from None
    signals.raise_if_pending()
    if not fetched.num_kept + fetched.num_downloaded:
        reasons = Counter(reason for _, reason in fetched.failed).most_common(3)
        listed = ", ".join(f"{reason} ({count:,})" for reason, count in reasons)
        raise DataError(f"None of the {len(wanted):,} URLs of {urls_file} gave a picture: {listed}.")
    return fetched


# --- the list -------------------------------------------------------------------------------------------------------


def read_list(path: Path) -> list[Wanted]:
    """The rows of a list of URLs, in order. Raises `UsageError` with the line that cannot be understood.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as place:
    ...     file = Path(place) / "urls.csv"
    ...     _ = file.write_text("url,label\\nhttps://example.org/a b.png,cat\\n")
    ...     read_list(file)
    [Wanted(url='https://example.org/a%20b.png', text=None, label='cat', sha256=None)]
    """
    where = printable(str(path))
    try:
        with path.open("rb") as stream:
            raw = stream.read(_MAX_LIST_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{where} cannot be read: {error.strerror}.") from None
    if len(raw) > _MAX_LIST_BYTES:
        raise UsageError(f"{where} is larger than {_MAX_LIST_BYTES // 2**20} MB. Split it.")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{where} is not UTF-8 (byte {error.start}). Save it as UTF-8.") from None
    ending = path.suffix.lower()
    lines = _csv if ending in (".csv", ".tsv") else _jsonl if ending in (".jsonl", ".ndjson") else _plain
    wanted = [_row(f"{where} line {number}", row) for number, row in lines(where, text)]
    if not wanted:
        raise UsageError(f"{where} holds no URL. Expected one a line.")
    return wanted


def _plain(where: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if (url := line.strip()) and not url.startswith("#"):
            if re.search(r"\s", url):
                raise UsageError(f"{where} line {number}: expected one URL; captions and labels go into a .csv.")
            yield number, {"url": url}


def _csv(where: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    header = text.lstrip("\r\n").split("\n", 1)[0]
    delimiter = max(",;\t|", key=header.count)
    table = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    try:
        columns = [str(column).strip().lower() for column in table.fieldnames or []]
        if "url" not in columns:
            raise UsageError(f"{where} has no column url. Columns found: {printable(', '.join(columns)) or 'none'}.")
        table.fieldnames = columns
        for row in table:
            if why := surplus(row, delimiter):
                raise UsageError(f"{where} line {table.line_num} {why}")
            yield table.line_num, {key: value or None for key, value in row.items() if key in _COLUMNS}
    except csv.Error as error:
        raise UsageError(f"{where} line {table.line_num} cannot be read as CSV: {error}.") from None


def _jsonl(where: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise UsageError(
                f'{where} line {number}: expected an object such as {{"url": "https://example.org/a.png"}}.'
            )
        yield number, row


def _row(place: str, row: dict[str, Any]) -> Wanted:
    url, text, label, sha256 = (row.get(column) for column in _COLUMNS)
    if not isinstance(url, str):
        raise UsageError(f"{place}: there is no url.")
    try:
        url = web.checked(url)
    except ValueError as error:
        raise UsageError(f"{place}: {printable(url[:200])} cannot be downloaded: {error}.") from None
    if text is not None and not isinstance(text, str):
        raise UsageError(f"{place}: text is {text!r}; expected a string.")
    if isinstance(label, bool) or not isinstance(label, str | int | None):
        raise UsageError(f"{place}: label is {label!r}; expected a whole number or a string.")
    if sha256 is not None and not (isinstance(sha256, str) and re.fullmatch("[0-9a-fA-F]{64}", sha256.strip())):
        raise UsageError(f"{place}: sha256 is {str(sha256)[:80]!r}; expected 64 hex digits.")
    return Wanted(url, text, label, sha256.strip().lower() if sha256 else None)


def _distinct(wanted: list[Wanted]) -> tuple[list[Wanted], list[str]]:
    """Every URL once, as it came first, and what there is to say about the others."""
    first: dict[str, Wanted] = {}
    differing = sum(first.setdefault(one.url, one) != one for one in wanted)
    repeated = len(wanted) - len(first)
    notices = [f"{repeated:,} rows repeat a URL and were left out."] if repeated else []
    notices += [f"{differing:,} of them say something else about it; the first row counts."] if differing else []
    return list(first.values()), notices


# --- the folder -----------------------------------------------------------------------------------------------------

_ASIDE = ".downloading"
_FILE = re.compile(rf"[0-9a-f]{{16}}\.({'|'.join(ending for _, ending in _ENDINGS)})")


class _Journal:
    """What is known about every URL that was asked for."""

    def __init__(self, folder: Path, stream: TextIO) -> None:
        self.folder, self._stream = folder, stream
        self._entries: dict[str, dict[str, Any]] = {}
        stream.seek(0)
        lines = stream.read().split("\n")
        for line in lines:
            try:
                entry = json.loads(line)
                self._entries[str(entry["url"])] = entry
            except (ValueError, TypeError, KeyError, RecursionError):
                continue  # a line that was cut when the power went: its URL is asked for again
        if lines[-1]:
            stream.write("\n")

    def file(self, one: Wanted) -> str | None:
        """The name of a picture that is there, whole and as wanted."""
        entry = self._entries.get(one.url, {})
        file = str(entry.get("file", ""))
        if entry.get("status") != "ok" or not _FILE.fullmatch(file):
            return None
        if one.sha256 is not None and entry.get("sha256") != one.sha256:
            return None
        try:
            return file if (self.folder / file).stat().st_size == entry.get("bytes") else None
        except OSError:
            return None

    def has(self, one: Wanted) -> bool:
        return self.file(one) is not None

    def add(self, **entry: Any) -> None:
        self._entries[entry["url"]] = entry
        self._stream.write(json.dumps(entry) + "\n")
        self._stream.flush()


def _claim(folder: Path) -> None:
    """Make the folder, or see that it is one of ours."""
    folder.mkdir(parents=True, exist_ok=True)
    strange = [name for name in os.listdir(folder) if not name.startswith(".")]
    if strange and JOURNAL not in strange:
        raise UsageError(f"{folder} holds something else already. Give a new folder for the downloads.")


def _write_metadata(folder: Path, wanted: list[Wanted], journal: _Journal) -> None:
    """`metadata.jsonl` for the pictures that are there, written aside and renamed."""
    rows = []
    for one in wanted:
        if (file := journal.file(one)) is not None:
            row = {"file_name": file, "text": one.text, "label": one.label}
            rows.append({key: value for key, value in row.items() if value is not None})
    aside = folder / ".metadata.jsonl"
    with aside.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    os.replace(aside, folder / "metadata.jsonl")


# --- the work -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pace:
    workers: int
    tries: int
    per_host: int
    pause_sec: float
    backoff_sec: float


@dataclass(frozen=True)
class _Job:
    """A picture on its way: url is where it is looked for now."""

    wanted: Wanted
    url: str
    redirects: int = 0
    failures: int = 0

    @property
    def host(self) -> str:
        return urllib.parse.urlsplit(self.url).netloc


class _Schedule:
    """Which request may be sent when: at most `per_host` at a time to one host, and pauses between them."""

    def __init__(self, per_host: int, pause_sec: float) -> None:
        self._per_host, self._pause_sec, self._left = per_host, pause_sec, 0
        self._jobs: defaultdict[str, list[tuple[float, int, _Job]]] = defaultdict(list)
        self._free: defaultdict[str, float] = defaultdict(float)
        self._running: Counter[str] = Counter()
        self._ready: list[tuple[float, str]] = []
        self._listed: dict[str, float] = {}  # the one entry of `_ready` that counts, by host
        self._count = itertools.count()

    def __len__(self) -> int:
        return self._left

    def add(self, job: _Job, when: float = 0.0) -> None:
        heapq.heappush(self._jobs[job.host], (when, next(self._count), job))
        self._left += 1
        self._list(job.host)

    def hold(self, host: str, until: float) -> None:
        """Send nothing to a host before this time."""
        self._free[host] = max(self._free[host], until)

    def next(self, now: float) -> _Job | None:
        """A request that may be sent now; `done` is to be called when it ended."""
        while self._ready and self._ready[0][0] <= now:
            when, host = heapq.heappop(self._ready)
            if self._listed.get(host) != when:
                continue
            del self._listed[host]
            jobs = self._jobs[host]
            if max(self._free[host], jobs[0][0]) > now:
                self._list(host)
                continue
            job = heapq.heappop(jobs)[2]
            self._left -= 1
            self._running[host] += 1
            self._free[host] = now + self._pause_sec
            self._list(host)
            return job
        return None

    def done(self, host: str) -> None:
        self._running[host] -= 1
        self._list(host)

    def wait_sec(self, now: float) -> float:
        """How long nothing more may be sent, as far as hosts are concerned that may be asked more at all."""
        return max(0.0, self._ready[0][0] - now) if self._ready else math.inf

    def _list(self, host: str) -> None:
        if self._jobs[host] and self._running[host] < self._per_host:
            when = max(self._free[host], self._jobs[host][0][0])
            if when < self._listed.get(host, math.inf):
                self._listed[host] = when
                heapq.heappush(self._ready, (when, host))


class _Downloads:
    """The loop: one thread decides and keeps the journal, `workers` threads ask."""

    def __init__(
        self, journal: _Journal, limits: web.Limits, pace: _Pace, fetched: Fetched, progress: ProgressFn | None
    ) -> None:
        self._journal, self._limits, self._pace, self._fetched = journal, limits, pace, fetched
        self._progress, self._lines = progress, web.Lines()
        self._schedule = _Schedule(pace.per_host, pace.pause_sec)

    def run(self, wanted: list[Wanted]) -> None:
        """Until every URL is decided or a signal came in."""
        shutil.rmtree(self._journal.folder / _ASIDE, ignore_errors=True)
        (self._journal.folder / _ASIDE).mkdir()
        for one in wanted:
            self._schedule.add(_Job(one, one.url))
        running: dict[Future[tuple[str, web.Got] | web.Moved], _Job] = {}
        with ThreadPoolExecutor(self._pace.workers, "imagekiln-download") as pool:
            try:
                while (self._schedule or running) and not signals.pending():
                    while len(running) < self._pace.workers and (job := self._schedule.next(time.monotonic())):
                        running[pool.submit(self._ask, job)] = job
                    pause = min(_LOOK_SEC, self._schedule.wait_sec(time.monotonic()))
                    if not running:
                        time.sleep(pause)
                        continue
                    busy = len(running) == self._pace.workers
                    ended, _ = wait(running, _LOOK_SEC if busy else pause, FIRST_COMPLETED)
                    for future in ended:
                        self._settle(running.pop(future), future)
                self._lines.stop()
                for future in wait(running).done:  # what was whole when the signal came in
                    if future.exception() is None:
                        self._settle(running[future], future)
            finally:
                self._lines.stop()

    def _ask(self, job: _Job) -> tuple[str, web.Got] | web.Moved:
        """One request, in a thread of its own: the picture's file where it came and is one."""
        name = hashlib.sha256(job.wanted.url.encode()).hexdigest()[:16]
        aside = self._journal.folder / _ASIDE / name
        try:
            got = web.get(job.url, aside, self._limits, self._lines)
            if isinstance(got, web.Moved):
                return got
            if job.wanted.sha256 not in (None, got.sha256):
                raise web.Refused("another checksum than the list says", again=True)
            with aside.open("rb") as stream:
                head = stream.read(16)
                decode.probe(stream)
            ending = next(kind for pattern, kind in _ENDINGS if re.match(pattern, head, re.DOTALL))
            os.replace(aside, self._journal.folder / f"{name}.{ending}")
            return f"{name}.{ending}", got
        except decode.Unusable as error:
            raise web.Refused(str(error)) from None
        finally:
            aside.unlink(missing_ok=True)

    def _settle(self, job: _Job, future: Future[tuple[str, web.Got] | web.Moved]) -> None:
        """Write down what came of a request, or plan the next one."""
        self._schedule.done(job.host)
        now, url = time.monotonic(), job.wanted.url
        try:
            answer = future.result()
        except web.Refused as refused:
            failures = job.failures + 1
            if refused.again and failures < self._pace.tries and refused.wait_sec <= MAX_WAIT_SEC:
                if refused.wait_sec:
                    self._schedule.hold(job.host, now + refused.wait_sec)
                backoff_sec = self._pace.backoff_sec * 2**job.failures
                self._schedule.add(replace(job, failures=failures), now + max(refused.wait_sec, backoff_sec))
                return
            asked = f", asks to wait {refused.wait_sec:.0f} s" if refused.wait_sec > MAX_WAIT_SEC else ""
            self._fail(url, f"{refused}{asked}")
            return
        if isinstance(answer, web.Moved):
            if job.redirects < MAX_REDIRECTS:
                self._schedule.add(replace(job, url=answer.url, redirects=job.redirects + 1))
            else:
                self._fail(url, f"more than {MAX_REDIRECTS} redirects")
            return
        file, got = answer
        self._journal.add(url=url, status="ok", file=file, bytes=got.num_bytes, sha256=got.sha256, etag=got.etag)
        self._fetched.num_downloaded += 1
        self._tell()

    def _fail(self, url: str, reason: str) -> None:
        self._journal.add(url=url, status="failed", reason=reason)
        self._fetched.failed.append((url, reason))
        self._tell()

    def _tell(self) -> None:
        fetched = self._fetched
        if self._progress is not None:
            self._progress(fetched.num_kept + fetched.num_downloaded + len(fetched.failed), fetched.num_listed)
