"""For all tests: one thread, a cache of their own, and the command line as a fixture."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest

ZYGOTE = Path(__file__).parent / "zygote.py"
PLAIN = {"NO_COLOR": "1", "COLUMNS": "100", "TERM": "dumb", "LC_ALL": "C.UTF-8"}


def pytest_configure(config: pytest.Config) -> None:
    # Before torch and imagekiln are imported: results must not depend on the machine's cores or on earlier sessions.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    hypothesis.settings.register_profile("untimed", deadline=None)  # machines are noisy
    hypothesis.settings.load_profile("untimed")
    if not hasattr(config, "workerinput"):  # workers share the cache of the process that starts them
        config.stash[_before] = os.environ.get("IMAGEKILN_CACHE")
        os.environ["IMAGEKILN_CACHE"] = tempfile.mkdtemp(prefix="imagekiln-test-cache-")


def pytest_unconfigure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        return
    shutil.rmtree(os.environ.pop("IMAGEKILN_CACHE"), ignore_errors=True)
    if config.stash[_before] is not None:
        os.environ["IMAGEKILN_CACHE"] = config.stash[_before]


_before = pytest.StashKey[str | None]()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)

    def ok(self) -> Outcome:
        assert self.code == 0, f"exit {self.code}\n{self.out}\n{self.err}"
        return self

    def refused(self, code: int, *words: str) -> Outcome:
        """The command ended with this code and one clear sentence that holds these words."""
        assert self.code == code, f"exit {self.code} instead of {code}\n{self.out}\n{self.err}"
        assert "Traceback" not in self.err + self.out
        assert self.err.strip(), "nothing was said"
        for word in words:
            assert word in self.err, f"{word!r} is not in: {self.err}"
        return self


class Command:
    """A command line that runs in its own process."""

    def __init__(self, ask: Callable[[dict], Any], arguments: list[str], folder: Path, request: dict) -> None:
        self._ask, self._code = ask, None
        self.files = [Path(tempfile.mkstemp(dir=folder)[1]) for _ in "oe"]
        self.pid = ask({"start": arguments, "out": str(self.files[0]), "err": str(self.files[1]), **request})

    def code(self) -> int | None:
        if self._code is None:
            self._code = self._ask({"poll": self.pid})
        return self._code

    def send(self, number: int) -> None:
        if self.code() is None:
            os.kill(self.pid, number)

    def wait(self, timeout_sec: float = 240.0) -> Outcome:
        end = time.monotonic() + timeout_sec
        while self.code() is None:
            if time.monotonic() > end:
                self.send(signal.SIGKILL)
                raise TimeoutError(f"still running after {timeout_sec} s: {self.files[1].read_text()}")
            time.sleep(0.002)
        out, err = (file.read_text(errors="replace") for file in self.files)
        return Outcome(self.code(), out, err)

    def wait_until(self, condition: Callable[[], bool], timeout_sec: float = 60.0) -> None:
        end = time.monotonic() + timeout_sec
        while not condition():
            assert self.code() is None, f"ended too early: {self.files[1].read_text()}"
            assert time.monotonic() < end, "it did not come to pass"
            time.sleep(0.002)


class CommandLine:
    """`cli("train", "vae", ...)` runs to the end; `cli.start(...)` returns at once."""

    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, **PLAIN}
        self.folder = folder
        self._server = subprocess.Popen(
            [sys.executable, str(ZYGOTE)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )

    def _ask(self, request: dict) -> Any:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(
        self, *arguments: object, cwd: Path | None = None, env: dict | None = None, limits: dict | None = None
    ) -> Command:
        request = {"cwd": str(cwd or self.folder), "env": env or {}, "limits": limits or {}}
        return Command(self._ask, [str(argument) for argument in arguments], self.folder, request)

    def __call__(self, *arguments: object, **options: Any) -> Outcome:
        return self.start(*arguments, **options).wait()

    def close(self) -> None:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.wait(timeout=10)


@pytest.fixture(scope="session")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    """The real command line, one process a command, without the seconds `import torch` takes."""
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    line = CommandLine(tmp_path_factory.mktemp("cli"))
    yield line
    line.close()


def without_escapes(text: str) -> bool:
    """Whether a text has no terminal escape codes."""
    return re.search(r"\x1b\[", text) is None
