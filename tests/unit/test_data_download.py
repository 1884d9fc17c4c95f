"""Downloads from a server on loopback: what comes, what is refused and why, how politely, and what is asked again."""

from __future__ import annotations

import hashlib
import http.server
import io
import itertools
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from imagekiln import signals
from imagekiln.data import download, scan, web
from imagekiln.data.download import fetch, read_list
from imagekiln.errors import DataError, DiskError, Interrupted, UsageError

FAST: dict[str, Any] = {"allow_private": True, "pause_sec": 0.0, "backoff_sec": 0.01, "timeout_sec": 5.0}


def picture(name: str, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    seed = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(stream, kind)
    return stream.getvalue()


class Site(http.server.ThreadingHTTPServer):
    """A server that does what the path says and counts what it is asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.asked: Counter[str] = Counter()
        self.agents: set[str] = set()
        self.times: list[float] = []
        self.now = self.most = 0
        self.lock = threading.Lock()
        self.released = threading.Event()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{path}"


class Answer(http.server.BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        site = self.server
        with site.lock:
            site.asked[self.path] += 1
            site.agents.add(self.headers["User-Agent"])
            site.times.append(time.monotonic())
            site.now += 1
            self.counted = 1
            site.most = max(site.most, site.now)
        try:
            getattr(self, self.path.split("/")[1].partition("?")[0])(site.asked[self.path])
        except (TimeoutError, ConnectionError):
            self.close_connection = True
        finally:
            self.leave()

    def leave(self) -> None:
        """No longer counted: called before the last byte, after which the client may ask for the next picture."""
        with self.server.lock:
            self.server.now -= self.counted
            self.counted = 0

    def log_message(self, *arguments: Any) -> None:
        pass

    def head(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def body(self, raw: bytes, **headers: str) -> None:
        self.head(200, **{"Content_Type": "image/png", "Content_Length": str(len(raw)), **headers})
        self.leave()
        self.wfile.write(raw)

    def ok(self, time: int) -> None:
        self.body(picture(self.path), ETag='"v1"')

    def untyped(self, time: int) -> None:
        self.head(200)
        self.wfile.write(picture(self.path, "JPEG"))

    def octets(self, time: int) -> None:
        self.body(picture(self.path, "WEBP"), Content_Type="application/octet-stream")

    def flaky(self, time: int) -> None:
        self.head(500) if time == 1 else self.ok(time)

    def busy(self, time: int) -> None:
        self.head(429, Retry_After="1") if time == 1 else self.ok(time)

    def closed(self, time: int) -> None:
        self.head(503, Retry_After="86400")

    def gone(self, time: int) -> None:
        self.head(404)

    def html(self, time: int) -> None:
        self.body(b"<html>sorry</html>", Content_Type="text/html; charset=utf-8")

    def lying(self, time: int) -> None:
        self.body(b"<html>sorry</html>")

    def vector(self, time: int) -> None:
        self.body(b"<svg xmlns='http://www.w3.org/2000/svg'/>", Content_Type="image/svg+xml")

    def large(self, time: int) -> None:
        self.head(200, Content_Type="image/png", Content_Length=str(10**10))

    def endless(self, time: int) -> None:
        self.head(200, Content_Type="image/png")
        for _ in range(10_000):
            self.wfile.write(bytes(100_000))

    def cut(self, time: int) -> None:
        raw = picture(self.path)
        self.head(200, Content_Type="image/png", Content_Length=str(len(raw)))
        self.wfile.write(raw[: len(raw) // 2])

    def silent(self, time: int) -> None:
        self.server.released.wait(20)

    def drip(self, time: int) -> None:
        self.head(200, Content_Type="image/png")
        while not self.server.released.wait(0.02):
            self.wfile.write(b"\0")

    def dripping_head(self, time: int) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
        while not self.server.released.wait(0.02):
            self.wfile.write(b"a")

    def noise(self, time: int) -> None:
        self.wfile.write(b"\x80\x81 this is no HTTP\r\n\r\n")

    def moved(self, time: int) -> None:
        self.head(302, Location="/ok/moved")

    def circle(self, time: int) -> None:
        self.head(301, Location=self.path)

    def to_file(self, time: int) -> None:
        self.head(302, Location="file:///etc/passwd")

    def to_nowhere(self, time: int) -> None:
        self.head(302)

    def inside(self, time: int) -> None:
        self.head(302, Location=f"http://127.0.0.2:{self.server.server_address[1]}/ok/inside")

    def private(self, time: int) -> None:
        self.body(picture(self.path), X_Robots_Tag="noindex, noai")

    def packed(self, time: int) -> None:
        self.body(picture(self.path), Content_Encoding="gzip")

    def stops(self, time: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        self.server.released.wait(20)


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield running
        running.released.set()
        running.shutdown()
        thread.join()


def listed(site: Site, tmp_path: Path, *paths: str) -> Path:
    file = tmp_path / "urls.txt"
    file.write_text("# a list\n\n" + "".join(f"{site.url(path)}\n" for path in paths))
    return file


def journal(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "downloads.jsonl").read_text().splitlines()]


# --- what comes -----------------------------------------------------------------------------------------------------


def test_pictures_come_with_what_the_list_says_and_are_data(site: Site, tmp_path: Path) -> None:
    file, folder = tmp_path / "urls.csv", tmp_path / "set"
    sha = hashlib.sha256(picture("/ok/a")).hexdigest()
    file.write_text(
        "URL;Label;TEXT;sha256;other\n"
        f"{site.url('/ok/a')};cat;a cat, 貓;{sha.upper()};1\n{site.url('/untyped')};dog;;;2\n"
        f"{site.url('/octets')};cat;third;;3\n{site.url('/ok/a')};dog;again;;4\n{site.url('/moved')};dog;;;5\n",
        encoding="utf-8",
    )
    told: list[tuple[int, int]] = []
    fetched = fetch(file, folder, progress=lambda *values: told.append(values), **FAST)
    assert (fetched.num_listed, fetched.num_downloaded, fetched.num_kept, fetched.failed) == (4, 4, 0, [])
    assert fetched.notices == [
        "1 rows repeat a URL and were left out.",
        "1 of them say something else about it; the first row counts.",
    ]
    assert told == [(n, 4) for n in range(1, 5)]
    found = scan.find(folder)
    content = {(folder / p.name).read_bytes(): (p.label, p.text, Path(p.name).suffix) for p in found.pictures}
    assert content == {
        picture("/ok/a"): ("cat", "a cat, 貓", ".png"),
        picture("/untyped", "JPEG"): ("dog", None, ".jpg"),
        picture("/octets", "WEBP"): ("cat", "third", ".webp"),
        picture("/ok/moved"): ("dog", None, ".png"),
    }
    entry = next(entry for entry in journal(folder) if entry["url"] == site.url("/ok/a"))
    assert entry["status"] == "ok" and entry["sha256"] == sha and entry["etag"] == '"v1"'
    assert entry["bytes"] == len(picture("/ok/a")) and (folder / entry["file"]).is_file()
    assert {agent.split("/")[0] for agent in site.agents} == {"imagekiln"}
    assert not [name for name in os.listdir(folder) if name.startswith(".downloading")]


def test_a_second_call_asks_only_for_what_is_missing(site: Site, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    first = fetch(listed(site, tmp_path, "/ok/a", "/ok/b", "/gone"), folder, **FAST)
    assert (first.num_downloaded, [reason for _, reason in first.failed]) == (2, ["404 Not Found"])
    (folder / next(entry["file"] for entry in journal(folder) if entry["url"].endswith("/ok/b"))).unlink()
    with (folder / "downloads.jsonl").open("a") as stream:
        stream.write('{"url": "cut by a power fai')
    again = fetch(listed(site, tmp_path, "/ok/a", "/ok/b", "/gone", "/ok/c"), folder, **FAST)
    assert (again.num_kept, again.num_downloaded, len(again.failed)) == (1, 2, 1)
    assert site.asked == {"/ok/a": 1, "/ok/b": 2, "/ok/c": 1, "/gone": 2}
    third = fetch(listed(site, tmp_path, "/ok/c", "/ok/a"), folder, **FAST)
    assert (third.num_kept, third.num_downloaded) == (2, 0) and site.asked["/ok/c"] == 1
    assert len(scan.find(folder).pictures) == 2  # the list was shortened: /ok/b has no row any more


def test_a_new_checksum_in_the_list_asks_again(site: Site, tmp_path: Path) -> None:
    folder, file = tmp_path / "set", tmp_path / "urls.jsonl"
    fetch(listed(site, tmp_path, "/ok/a", "/ok/b"), folder, **FAST)
    rows = [{"url": site.url("/ok/a"), "sha256": "0" * 64, "label": 3}, {"url": site.url("/ok/b"), "label": -1}]
    file.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    fetched = fetch(file, folder, **FAST)
    assert [reason for _, reason in fetched.failed] == ["another checksum than the list says"]
    assert site.asked == {"/ok/a": 4, "/ok/b": 1}
    assert [p.label for p in scan.find(folder).pictures] == [None]


# --- what does not --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "reason", "asked"),
    [
        ("/gone", "404 Not Found", 1),
        ("/html", "text/html instead of a picture", 1),
        ("/lying", "not an image (HTML)", 1),
        ("/vector", "SVG is not read; convert it to PNG", 1),
        ("/large", "larger than 0.25 MB", 1),
        ("/endless", "larger than 0.25 MB", 1),
        ("/cut", "ended early", 2),
        ("/noise", "not an answer in HTTP", 1),
        ("/circle", "more than 5 redirects", 6),
        ("/to_file", "a redirect that is not followed: it does not begin with http:// or https://", 1),
        ("/to_nowhere", "a redirect to nowhere", 1),
        ("/private", "the host does not want it to be learned from (X-Robots-Tag)", 1),
        ("/packed", "sent compressed, which was not asked for", 1),
        ("/closed", "503 Service Unavailable, asks to wait 86400 s", 1),
        ("/drip", "took longer than 0.75 s", 2),
        ("/dripping_head", "took longer than 0.75 s", 2),
    ],
)
def test_what_is_no_picture_is_listed_with_its_reason(
    site: Site, tmp_path: Path, path: str, reason: str, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "drip" in path:
        monkeypatch.setattr(download, "_WHOLE", 0.15)
    options = {**FAST, "max_bytes": 2**18, "tries": 2}
    folder = tmp_path / "set"
    with pytest.raises(DataError, match=r"None of the 1 URLs of .*urls\.txt gave a picture"):
        fetch(listed(site, tmp_path, path), folder, **options)
    entries = journal(folder)
    assert entries == [{"url": site.url(path), "status": "failed", "reason": reason}]
    assert site.asked[path] == asked
    assert sorted(name for name in os.listdir(folder) if not name.startswith(".")) == [
        "downloads.jsonl",
        "metadata.jsonl",
    ]


def test_what_may_pass_is_tried_again(site: Site, tmp_path: Path) -> None:
    fetched = fetch(listed(site, tmp_path, "/flaky", "/busy"), tmp_path / "set", **FAST)
    assert fetched.num_downloaded == 2 and site.asked == {"/flaky": 2, "/busy": 2}
    assert site.times[-1] - site.times[0] >= 0.99  # Retry-After: 1


def test_silence_and_nobody_there(site: Site, tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}/a.png"
        file = listed(site, tmp_path, "/silent", "/ok/a")
        file.write_text(file.read_text() + nobody)
        fetched = fetch(file, tmp_path / "set", **{**FAST, "timeout_sec": 0.3, "tries": 1})
    assert fetched.num_downloaded == 1
    assert sorted(reason for _, reason in fetched.failed) == ["connection refused", "no answer for 0.3 s"]


def test_when_nothing_comes_the_commonest_reasons_are_named(site: Site, tmp_path: Path) -> None:
    paths = [*(f"/gone?{n}" for n in range(4)), *(f"/html?{n}" for n in range(3)), "/lying", "/lying?1", "/vector"]
    with pytest.raises(DataError) as caught:
        fetch(listed(site, tmp_path, *paths), tmp_path / "set", **FAST)
    assert str(caught.value).endswith("404 Not Found (4), text/html instead of a picture (3), not an image (HTML) (2).")


def test_a_full_disk_is_an_error_of_the_disk(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def full(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if mode == "wb":
            raise OSError(28, "No space left on device")
        return opened(path, mode, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", full)
        with pytest.raises(DiskError, match="No space left"):
            fetch(listed(site, tmp_path, "/ok/a"), tmp_path / "set", **FAST)
    assert fetch(listed(site, tmp_path, "/ok/a"), tmp_path / "set", **FAST).num_downloaded == 1


# --- where it may go ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "0.0.0.0", "2130706433"])
def test_this_machine_is_not_asked_unless_told(site: Site, tmp_path: Path, host: str) -> None:
    file = tmp_path / "urls.txt"
    file.write_text(f"http://{host}:{site.server_address[1]}/ok/a\n")
    with pytest.raises(DataError, match=r"not public|no such host"):
        fetch(file, tmp_path / "set", **{**FAST, "allow_private": False, "tries": 1})
    assert not site.asked


def test_a_redirect_to_the_inside_is_refused(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 127.0.0.1 in the part of a public host: what it sends on to is judged like any other address."""
    judge = web.is_public
    monkeypatch.setattr(web, "is_public", lambda address: address == "127.0.0.1" or judge(address))
    fetched = fetch(listed(site, tmp_path, "/inside", "/ok/a"), tmp_path / "set", **{**FAST, "allow_private": False})
    assert [reason for _, reason in fetched.failed] == ["leads to an address that is not public"]
    assert site.asked == {"/inside": 1, "/ok/a": 1}


PRIVATE = """
10.1.2.3 172.16.0.1 192.168.1.1 100.64.0.1 169.254.169.254 0.0.0.0 224.0.0.1
::1 fe80::1 fc00::1 ff02::1 :: ::ffff:127.0.0.1 64:ff9b::7f00:1 2002:7f00:1::
"""


@pytest.mark.parametrize("address", PRIVATE.split())
def test_addresses_that_are_not_public(address: str) -> None:
    assert not web.is_public(address)


def test_addresses_that_are_public() -> None:
    assert all(map(web.is_public, ["1.1.1.1", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"]))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_certificates_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    options = ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command.split(), *options], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with Site() as secure:
        secure.socket = context.wrap_socket(secure.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=secure.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        file = tmp_path / "urls.txt"
        file.write_text(f"https://localhost:{secure.server_address[1]}/ok/a\n")
        with pytest.raises(DataError, match="its certificate is not valid"):
            fetch(file, tmp_path / "set", **FAST)
        trusting = ssl.create_default_context(cafile=str(certificate))
        monkeypatch.setattr(web, "_tls", lambda: trusting)
        assert fetch(file, tmp_path / "set", **FAST).num_downloaded == 1
        secure.shutdown()
        thread.join()


# --- how ------------------------------------------------------------------------------------------------------------


def test_a_host_is_not_crowded(site: Site, tmp_path: Path) -> None:
    paths = [f"/ok/{n}" for n in range(30)]
    fetched = fetch(listed(site, tmp_path, *paths), tmp_path / "set", workers=8, per_host=2, **FAST)
    assert fetched.num_downloaded == 30 and site.most <= 2


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 3)), max_size=40),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.25, 1.0]),
)
@settings(max_examples=80, deadline=None)
def test_the_schedule_keeps_limits_and_pauses_and_loses_nothing(
    jobs: list[tuple[str, float]], per_host: int, pause_sec: float
) -> None:
    schedule = download._Schedule(per_host, pause_sec)
    for number, (host, when) in enumerate(jobs):
        schedule.add(download._Job(download.Wanted(str(number)), f"http://{host}/{number}"), when)
    sent: dict[str, list[float]] = {host: [] for host in "abc"}
    running: list[tuple[float, str]] = []
    seen, now = set(), 0.0
    for _ in range(2000):
        while (job := schedule.next(now)) is not None:
            number = int(job.wanted.url)
            assert now >= jobs[number][1] and number not in seen
            seen.add(number)
            sent[job.host].append(now)
            running.append((now + 0.3, job.host))
            assert sum(host == job.host for _, host in running) <= per_host
        for end in [end for end in running if end[0] <= now]:
            running.remove(end)
            schedule.done(end[1])
        if not schedule and not running:
            break
        now += min(0.05, max(1e-3, schedule.wait_sec(now)))
    assert len(seen) == len(jobs) and len(schedule) == 0
    for times in sent.values():
        assert all(b - a >= pause_sec - 1e-9 for a, b in itertools.pairwise(times))


def test_a_host_that_asks_for_time_is_held() -> None:
    schedule = download._Schedule(2, 0.0)
    for number in range(3):
        schedule.add(download._Job(download.Wanted(str(number)), f"http://{'aab'[number]}/"))
    assert schedule.next(0.0) is not None
    schedule.done("a")
    schedule.hold("a", 9.0)
    job = schedule.next(1.0)
    assert job is not None and job.host == "b"
    assert schedule.next(8.9) is None and 0 < schedule.wait_sec(8.9) < 0.2 and schedule.next(9.0) is not None


def test_a_signal_stops_at_once_and_the_same_call_continues(site: Site, tmp_path: Path) -> None:
    file, folder = listed(site, tmp_path, "/ok/a", "/ok/b", "/stops", "/ok/c"), tmp_path / "set"
    started = time.monotonic()
    with signals.handled(), pytest.raises(Interrupted):
        fetch(file, folder, workers=1, **{**FAST, "timeout_sec": 60.0})
    assert time.monotonic() - started < 15  # it did not wait for the answer that never came
    assert len(scan.find(folder).pictures) == 2 and site.asked == {"/ok/a": 1, "/ok/b": 1, "/stops": 1}
    site.released.set()
    fetched = fetch(listed(site, tmp_path, "/ok/a", "/ok/b", "/ok/c"), folder, **FAST)
    assert (fetched.num_kept, fetched.num_downloaded) == (2, 1)


def test_a_folder_of_something_else_is_left_alone(site: Site, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.png").write_bytes(b"mine")
    with pytest.raises(UsageError, match="holds something else"):
        fetch(listed(site, tmp_path, "/ok/a"), tmp_path / "mine", **FAST)
    assert os.listdir(tmp_path / "mine") == ["a.png"] and not site.asked


def test_two_downloads_do_not_write_to_one_folder(site: Site, tmp_path: Path) -> None:
    file, refused = listed(site, tmp_path, "/ok/a", "/ok/b"), []

    def second(done: int, total: int) -> None:
        with pytest.raises(UsageError, match="Another download") as caught:
            fetch(file, tmp_path / "set", **FAST)
        refused.append(caught)

    assert fetch(file, tmp_path / "set", progress=second, **FAST).num_downloaded == 2 and len(refused) == 2


# --- the list -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.txt", "", "holds no URL"),
        ("a.txt", "# nothing\n", "holds no URL"),
        ("a.txt", "http://a.org/x.png\n\nftp://a.org/x.png\n", "line 3: ftp://a.org/x.png cannot be downloaded"),
        ("a.txt", "file:///etc/passwd\n", "line 1: .* does not begin with http"),
        ("a.txt", "a.org/x.png", "line 1"),
        ("a.txt", "http://a.org/x.png a cat", "line 1: expected one URL"),
        ("a.txt", "http://me:secret@a.org/x.png", "line 1: .*holds a name or password"),
        ("a.txt", "http://a.org:port/x.png", "line 1: .*is no URL"),
        ("a.txt", "http:///x.png", "line 1: .*names no host"),
        ("a.txt", "http://a..b/x.png", "line 1: .*names no host"),
        ("a.txt", "http://a.org/\x1b[31m", r"line 1: .*\\x1b.*control characters"),
        ("a.csv", "link,text\nhttp://a.org/x,b\n", "no column url. Columns found: link, text"),
        ("a.csv", "url,text\nhttp://a.org/x,b\n,c\n", "line 3: there is no url"),
        ("a.csv", "url,text\nhttp://a.org/x,a cat, asleep\n", "line 2 has more values than there are columns. Put"),
        ("a.csv", "url,sha256\nhttp://a.org/x,abc\n", "line 2: sha256 is 'abc'"),
        ("a.jsonl", '{"url": "http://a.org/x"}\n{"url": \n', "line 2: expected an object"),
        ("a.jsonl", '{"url": "http://a.org/x", "label": 1.5}', "line 1: label is 1.5"),
        ("a.jsonl", '{"url": "http://a.org/x", "label": true}', "line 1: label is True"),
        ("a.jsonl", '{"url": "http://a.org/x", "text": 5}', "line 1: text is 5"),
        ("a.jsonl", '{"url": 5}', "line 1: there is no url"),
        ("a.jsonl", "[" * 100_000, "line 1: expected an object"),
    ],
)
def test_a_bad_list_names_the_line(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=words) as caught:
        fetch(tmp_path / name, tmp_path / "set")
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value) and not (tmp_path / "set").exists()


def test_a_list_that_is_not_there_or_not_utf8(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_list(tmp_path / "none.txt")
    (tmp_path / "a.txt").write_bytes("http://a.org/é".encode("latin-1"))
    with pytest.raises(UsageError, match=r"not UTF-8 \(byte 13\)"):
        read_list(tmp_path / "a.txt")


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_list_is_read_or_refused(tmp_path: Path, raw: bytes) -> None:
    for name, prefix in (("a.txt", b""), ("b.txt", b"http://a.org/"), ("a.csv", b"url,text,label\n"), ("a.jsonl", b"")):
        (tmp_path / name).write_bytes(prefix + raw)
        try:
            for one in read_list(tmp_path / name):
                assert one.url.isascii() and one.url.startswith(("http://", "https://"))
                assert web.checked(one.url) == one.url  # what is sent stays as it is when it is sent again
        except UsageError as error:
            assert "\n" not in str(error)
