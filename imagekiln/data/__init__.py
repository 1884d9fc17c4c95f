"""The data room: any DATA in, a `Dataset` with two sources out, and a `Loader` that makes batches of a source.

`load` is the way in. Pictures enter the program in `decode` only; `scan` finds them, `pack` keeps them as one array,
`builtin` knows the published sets.
"""

from __future__ import annotations

from imagekiln.data.files import printable
from imagekiln.data.loader import Loader, to_float, to_uint8
from imagekiln.data.pack import cache_folder, load
from imagekiln.data.source import Dataset, MemmapSource

__all__ = ["Dataset", "Loader", "MemmapSource", "cache_folder", "load", "printable", "to_float", "to_uint8"]
