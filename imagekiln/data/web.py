"""One careful GET: http and https only, to public addresses, limited in bytes and seconds, stoppable at any moment.

The address of a host is looked up once, judged, and connected to, so that a name cannot lead elsewhere a moment later.
Redirects are given back, not followed: whoever asked decides. There is no proxy, no cookie and no cache.
"""

from __future__ import annotations

import hashlib
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import lru_cache
from http import HTTPStatus
from pathlib import Path
from typing import BinaryIO, NamedTuple

from imagekiln import __version__
from imagekiln.errors import DiskError

USER_AGENT = f"imagekiln/{__version__} (downloads pictures from a list of URLs)"
_MOVED = (301, 302, 303, 307, 308)
_LATER = (408, 425, 429, 500, 502, 503, 504)
_FORBIDS = re.compile(r"\b(noai|noimageai)\b", re.IGNORECASE)
_CHUNK = 2**16
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class Refused(Exception):
    """What was not got; the text is the plain reason. again: worth another try, after `wait_sec` if the host says."""

    def __init__(self, reason: str, again: bool = False, wait_sec: float = 0.0) -> None:
        super().__init__(reason)
        self.again, self.wait_sec = again, wait_sec


class Got(NamedTuple):
    """What came: its size, its checksum and the host's own name for this version."""

    num_bytes: int
    sha256: str
    etag: str


class Moved(NamedTuple):
    """Where the host says it lies now."""

    url: str


@dataclass(frozen=True)
class Limits:
    """timeout_sec: for connecting and between bytes. whole_sec: for everything. allow_private: see `is_public`."""

    timeout_sec: float
    whole_sec: float
    max_bytes: int
    allow_private: bool = False


class Lines:
    """The connections that are open now, so that all of them can be cut from another thread."""

    def __init__(self) -> None:
        self.stopped, self._open, self._lock = False, set[_Line](), threading.Lock()

    @contextmanager
    def opened(self, whole_sec: float) -> Iterator[_Line]:
        """A line that is cut after this time, and closed at the end."""
        line = _Line()
        clock = threading.Timer(whole_sec, line.cut)
        clock.daemon = True
        with self._lock:
            self._open.add(line)
        try:
            if self.stopped:
                raise Refused("stopped", again=True)
            clock.start()
            yield line
        finally:
            clock.cancel()
            line.close()
            with self._lock:
                self._open.discard(line)

    def stop(self) -> None:
        """Cut every line, and every one that is opened later."""
        self.stopped = True
        with self._lock:
            for line in self._open:
                line.cut()


class _Line:
    """The socket of one request, which another thread may cut."""

    def __init__(self) -> None:
        self.is_cut, self._lock = False, threading.Lock()
        self._socket: socket.socket | None = None

    def hold(self, fresh: socket.socket) -> None:
        with self._lock:
            self._socket = fresh
        if self.is_cut:
            self.cut()

    def cut(self) -> None:
        with self._lock:
            self.is_cut = True
            try:
                if self._socket is not None:  # of a TLS socket, too, the plain one: TLS would wait for the other side
                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
            except OSError:  # not connected yet, or not any more
                return

    def close(self) -> None:
        with self._lock:
            if self._socket is not None:
                self._socket.close()


def checked(text: str) -> str:
    """A URL as it is sent: http or https, percent-encoded, without fragment. Raises `ValueError` with the reason.

    >>> checked("HTTPS://Example.org/a b/\\u732b.png?x=1#top")
    'https://example.org/a%20b/%E7%8C%AB.png?x=1'
    """
    if len(text) > 8000 or any(ord(char) < 32 or ord(char) == 127 for char in text):
        raise ValueError("it is too long or holds control characters")
    try:
        parts = urllib.parse.urlsplit(text.strip())
        port = parts.port
    except ValueError:
        raise ValueError("it is no URL") from None
    if parts.scheme not in ("http", "https"):
        raise ValueError("it does not begin with http:// or https://")
    if parts.username is not None or parts.password is not None:
        raise ValueError("it holds a name or password")
    try:
        host = (parts.hostname or "").encode("idna").decode() if ":" not in (parts.hostname or "") else parts.hostname
    except UnicodeError:
        host = ""
    if not host or not re.fullmatch(r"[\w.:%~-]+", host):
        raise ValueError("it names no host")
    host = f"[{host}]" if ":" in host else host
    path, query = (urllib.parse.quote(part, "%/:=&?~+!$,;'@()*[]|") for part in (parts.path, parts.query))
    return urllib.parse.urlunsplit((parts.scheme, host if port is None else f"{host}:{port}", path or "/", query, ""))


def is_public(address: str) -> bool:
    """Whether an IP address is out on the internet: not this machine, not its network, not a cloud's own service.

    >>> [is_public(a) for a in ("93.184.215.14", "127.0.0.1", "10.0.0.1", "169.254.169.254", "::1", "::ffff:10.0.0.1")]
    [True, False, False, False, False, False]
    """
    found = ipaddress.ip_address(address)
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo[1] if found.teredo else None)
        if found in _NAT64:
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return found.is_global and not found.is_multicast


def get(url: str, target: Path, limits: Limits, lines: Lines) -> Got | Moved:
    """Ask for a picture once and write what comes to `target`.

    url: as `checked` gives it. Raises `Refused` with the reason, `DiskError` when the file cannot be written.
    """
    with lines.opened(limits.whole_sec) as line:
        try:
            answer, problem = _asked(url, target, limits, line), None
        except Refused as refused:
            answer, problem = None, refused
        except (OSError, http.client.HTTPException, ValueError) as error:
            answer, problem = None, _refused(error, limits)
        if lines.stopped:  # asked first: a line that is cut looks like an answer that has ended
            raise Refused("stopped", again=True)
        if line.is_cut:
            raise Refused(f"took longer than {limits.whole_sec:g} s", again=True)
    if answer is None:
        raise problem or Refused("nothing came")
    return answer


def _asked(url: str, target: Path, limits: Limits, line: _Line) -> Got | Moved:
    parts = urllib.parse.urlsplit(url)
    secure = parts.scheme == "https"
    host, port = parts.hostname or "", parts.port or (443 if secure else 80)
    connection = http.client.HTTPConnection(host, port)
    connection.sock = _connected(host, port, secure, limits, line)
    path = urllib.parse.urlunsplit(("", "", parts.path, parts.query, ""))
    headers = {"Host": parts.netloc, "User-Agent": USER_AGENT, "Accept": "image/*", "Connection": "close"}
    connection.request("GET", path, headers={**headers, "Accept-Encoding": "identity"})
    with connection.getresponse() as response:
        return _answered(response, url, target, limits)


def _connected(host: str, port: int, secure: bool, limits: Limits, line: _Line) -> socket.socket:
    """A socket to an address that was judged; with TLS for the name that was asked for."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    allowed = [entry for entry in found if limits.allow_private or is_public(str(entry[4][0]))]
    if not allowed:
        raise Refused("leads to an address that is not public")
    for number, (family, kind, protocol, _, address) in enumerate(allowed, 1):
        plain = socket.socket(family, kind, protocol)
        line.hold(plain)
        plain.settimeout(limits.timeout_sec)
        try:
            plain.connect(address)
            break
        except OSError:
            plain.close()
            if number == len(allowed):
                raise
    if not secure:
        return plain
    wrapped = _tls().wrap_socket(plain, server_hostname=host, do_handshake_on_connect=False)
    line.hold(wrapped)
    wrapped.do_handshake()
    return wrapped


@lru_cache(maxsize=1)
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _answered(response: http.client.HTTPResponse, url: str, target: Path, limits: Limits) -> Got | Moved:
    """What the head of the answer means; the body of a picture is written."""
    status = response.status
    if status in _MOVED:
        return Moved(_next(url, response.getheader("Location")))
    if status != HTTPStatus.OK:
        known = {int(one): one.phrase for one in HTTPStatus}
        wait_sec = _retry_after(response.getheader("Retry-After"))
        raise Refused(f"{status} {known.get(status, '')}".strip(), status in _LATER, wait_sec)
    kind = (response.getheader("Content-Type") or "").partition(";")[0].strip().lower()
    if kind and not kind.startswith("image/") and kind not in ("application/octet-stream", "binary/octet-stream"):
        raise Refused(f"{kind[:60] if kind.isascii() and kind.isprintable() else 'something'} instead of a picture")
    if _FORBIDS.search(", ".join(response.headers.get_all("X-Robots-Tag") or [])):
        raise Refused("the host does not want it to be learned from (X-Robots-Tag)")
    if (response.getheader("Content-Encoding") or "identity").lower() != "identity":
        raise Refused("sent compressed, which was not asked for")
    if response.length is not None and response.length > limits.max_bytes:
        raise Refused(f"larger than {limits.max_bytes / 2**20:g} MB")
    expected = response.length
    try:
        stream = target.open("wb")
    except OSError as error:
        raise _disk(target, error) from None
    with stream:
        num_bytes, sha256 = _store(response, stream, target, limits)
    if expected is not None and num_bytes < expected:
        raise Refused("ended early", again=True)
    return Got(num_bytes, sha256, (response.getheader("ETag") or "")[:200])


def _store(response: http.client.HTTPResponse, stream: BinaryIO, target: Path, limits: Limits) -> tuple[int, str]:
    num_bytes, sha = 0, hashlib.sha256()
    while chunk := response.read1(_CHUNK):
        num_bytes += len(chunk)
        if num_bytes > limits.max_bytes:
            raise Refused(f"larger than {limits.max_bytes / 2**20:g} MB")
        sha.update(chunk)
        try:
            stream.write(chunk)
        except OSError as error:
            raise _disk(target, error) from None
    return num_bytes, sha.hexdigest()


def _next(url: str, location: str | None) -> str:
    if not location:
        raise Refused("a redirect to nowhere")
    # http.client reads headers as latin-1; what was sent as UTF-8 is made that again
    try:
        return checked(urllib.parse.urljoin(url, location.encode("latin-1").decode("utf-8", "replace")))
    except ValueError as error:
        raise Refused(f"a redirect that is not followed: {error}") from None


def _retry_after(text: str | None) -> float:
    """Seconds to wait, from a number or a date; 0 where the host says nothing understandable."""
    text = (text or "").strip()
    if re.fullmatch(r"[0-9]{1,9}", text):
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, IndexError, OverflowError, OSError):
        return 0.0


def _refused(error: Exception, limits: Limits) -> Refused:
    """The plain reason of what the network threw."""
    if isinstance(error, TimeoutError):
        return Refused(f"no answer for {limits.timeout_sec:g} s", again=True)
    if isinstance(error, ssl.SSLCertVerificationError):
        return Refused("its certificate is not valid")
    if isinstance(error, ssl.SSLError):
        return Refused("no secure connection", again=True)
    if isinstance(error, socket.gaierror):
        return Refused("no such host", again=error.errno == socket.EAI_AGAIN)
    if isinstance(error, ConnectionRefusedError):
        return Refused("connection refused", again=True)
    if isinstance(error, ConnectionError | http.client.IncompleteRead):
        return Refused("ended early", again=True)
    if isinstance(error, OSError):
        return Refused((error.strerror or "cannot be reached").lower(), again=True)
    return Refused("not an answer in HTTP")


def _disk(target: Path, error: OSError) -> DiskError:
    return DiskError(f"{target.parent} cannot be written ({error.strerror or error}).")
