"""Compiles a C source of the package once, with the system's C compiler, and loads it.

Nothing that is compiled is needed for a right result: without a compiler, or with IMAGEKILN_NO_NATIVE=1 in the
environment, `library` says why there is none and the caller uses PyTorch. The compiled file lies in the user's cache
directory under a hash of everything it depends on (source, compiler, flags, processor), written aside and renamed, so
that processes that start together and homes shared by different machines are both safe.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path

_FLAGS = ("-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
_TUNING = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ("-mcpu=native",), ())

Bind = Callable[[ctypes.CDLL], None]
"""Tells a loaded library the types of its functions."""


class Unavailable(Exception):
    """There is no compiled library; the message is a clause that says why."""


def library(package: str, source: str, bind: Bind, flags: tuple[str, ...] = ()) -> ctypes.CDLL | str:
    """The library of a C file of a package, compiled on the first call, or a clause that says why there is none.

    flags: of the compiler, besides the usual ones. Compiling takes about two seconds; callers keep the result.
    """
    if os.environ.get("IMAGEKILN_NO_NATIVE", "") not in ("", "0"):
        return "IMAGEKILN_NO_NATIVE is set"
    try:
        return _load(package, source, bind, (*_FLAGS, *flags))
    except (Unavailable, OSError, subprocess.SubprocessError) as error:
        return str(error).strip() or type(error).__name__


@functools.cache
def parallel() -> ctypes.c_void_p:
    """Address of GOMP_parallel in the OpenMP runtime PyTorch uses; null when there is none: one thread."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p)
    except (AttributeError, OSError, TypeError):
        return ctypes.c_void_p(None)


def reuse_freed_memory() -> bool:
    """Tell glibc to keep freed memory instead of giving it back; True when it was told.

    A training step frees and takes the same large tensors again; by default each of them is new, zeroed by the kernel
    page by page. For a training process only: memory once used stays with the process.
    """
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**26))
    return all([mallopt(key, value) == 1 for key, value in settings])


def _load(package: str, name: str, bind: Bind, flags: tuple[str, ...]) -> ctypes.CDLL:
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise Unavailable("there is no C compiler")
    source = resources.files(package).joinpath(name).read_bytes()
    identity = [source, compiler.encode(), repr((flags, _TUNING)).encode(), _processor().encode()]
    built = f"{Path(name).stem}-{hashlib.sha256(b'|'.join(identity)).hexdigest()[:24]}.so"
    try:
        cache = Path(os.environ.get("IMAGEKILN_CACHE") or _platform_cache())
        cache.mkdir(parents=True, exist_ok=True)
        if not (cache / built).exists():
            _compile(compiler, flags, source, cache / built)
        return _open(cache / built, bind)
    except (OSError, RuntimeError):  # no home, a full or read-only disk, a damaged file: compile for this process alone
        with tempfile.TemporaryDirectory(prefix="imagekiln-") as folder:
            _compile(compiler, flags, source, Path(folder, built))
            return _open(Path(folder, built), bind)


def _open(path: Path, bind: Bind) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    bind(loaded)
    return loaded


def _compile(compiler: str, flags: tuple[str, ...], source: bytes, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        path, built = Path(folder, "source.c"), Path(folder, "built.so")
        path.write_bytes(source)
        for tuning in _TUNING:
            command = [compiler, *flags, *tuning, "-o", str(built), str(path), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            if done.returncode == 0:
                os.replace(built, target)
                return
    raise Unavailable(f"{compiler} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")


def _platform_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "imagekiln"


def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        kept = [
            line for line in lines if line.split("\t")[0].strip() in ("model name", "flags", "Features", "CPU part")
        ]
    except OSError:
        kept = []
    return "\n".join([platform.machine(), platform.processor(), *kept])
