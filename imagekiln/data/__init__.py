"""The data room: any DATA in, a `Dataset` with two sources out, and a `Loader` that makes batches of a source.

`load` is the way in. Pictures enter the program in `decode` only; `collect` and `scan` find them, `pixels` brings them
to one size, `pack` keeps them in the cache, `builtin` knows the published sets. `prepare` does more with them: `survey`
measures, `checks` find faults, `decisions` and `sides` say what is kept and where.
"""

from __future__ import annotations

from imagekiln.data.decisions import Edits, PrepareConfig
from imagekiln.data.decode import open_own
from imagekiln.data.files import printable
from imagekiln.data.loader import Loader, to_float, to_uint8
from imagekiln.data.pack import cache_folder, load, published, write_published
from imagekiln.data.packed import cell, read_about
from imagekiln.data.prepared import PROPOSALS, URLS, Prepared, is_prepared, open_prepared, prepare
from imagekiln.data.shards import write_dataset as write_shards
from imagekiln.data.source import Dataset, MemmapSource

__all__ = [
    "PROPOSALS",
    "URLS",
    "Dataset",
    "Edits",
    "Loader",
    "MemmapSource",
    "PrepareConfig",
    "Prepared",
    "cache_folder",
    "cell",
    "is_prepared",
    "load",
    "open_own",
    "open_prepared",
    "prepare",
    "printable",
    "published",
    "read_about",
    "to_float",
    "to_uint8",
    "write_published",
    "write_shards",
]
