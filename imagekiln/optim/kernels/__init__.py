"""The native noise. See `imagekiln.native` for how it is compiled and loaded."""

from __future__ import annotations

import ctypes
import functools

from imagekiln import native


class Job(ctypes.Structure):
    """The C struct `Job` of noise.c; pointers are addresses of contiguous storage."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("target", "weight")),
        *((name, ctypes.c_int64) for name in ("num", "start")),
        *((name, ctypes.c_uint64) for name in ("key", "second_key")),
        *((name, ctypes.c_double) for name in ("scale", "correction", "eps")),
        *((name, ctypes.c_int32) for name in ("law", "mode", "is_double")),
        ("first_piece", ctypes.c_int64),
    ]


@functools.cache
def library() -> ctypes.CDLL | str:
    """The loaded library, compiled on the first call, or a clause that says why there is none."""
    return native.library(__package__, "noise.c", _bind, ("-ffp-contract=off",))


def _bind(loaded: ctypes.CDLL) -> None:
    loaded.imagekiln_add_noise.argtypes = [ctypes.POINTER(Job), ctypes.c_int64, ctypes.c_void_p, ctypes.c_uint]
    loaded.imagekiln_add_noise.restype = None
