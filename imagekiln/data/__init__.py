"""The data room: any DATA in, a `Dataset` with two sources out, and a `Loader` that makes batches of a source.

`load` is the way in. Pictures enter the program in `decode` only; `scan` finds them, `pack` keeps them as one array,
`builtin` knows the published sets.
"""

from __future__ import annotations

from imagekiln.data.decode import open_own
from imagekiln.data.files import printable
from imagekiln.data.loader import Loader, to_float, to_uint8
from imagekiln.data.pack import cache_folder, load, write_prepared
from imagekiln.data.source import Dataset, MemmapSource

__all__ = [
    "Dataset",
    "Loader",
    "MemmapSource",
    "cache_folder",
    "load",
    "open_own",
    "printable",
    "to_float",
    "to_uint8",
    "write_prepared",
]
