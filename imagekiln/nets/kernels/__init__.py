"""The native group normalisation with SiLU. See `imagekiln.native` for how it is compiled and loaded."""

from __future__ import annotations

import ctypes
import functools

from imagekiln import native


class Job(ctypes.Structure):
    """The C struct `Job` of group_norm_silu.c; pointers are addresses of contiguous storage."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "dy", "out", "offset", "gain", "bias", "mean", "rstd")),
        *((name, ctypes.c_void_p) for name in ("dgain", "dbias", "doffset")),
        *((name, ctypes.c_int64) for name in ("images", "pixels", "channels", "groups", "row_stride")),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_int32) for name in ("is_bf16", "is_silu")),
        *((name, ctypes.c_int64) for name in ("next", "failed")),
    ]


@functools.cache
def library() -> ctypes.CDLL | str:
    """The loaded library, compiled on the first call, or a clause that says why there is none."""
    return native.library(__package__, "group_norm_silu.c", _bind)


def _bind(loaded: ctypes.CDLL) -> None:
    loaded.imagekiln_group_norm_silu.argtypes = [ctypes.POINTER(Job), ctypes.c_void_p, ctypes.c_uint]
    loaded.imagekiln_group_norm_silu.restype = ctypes.c_int
