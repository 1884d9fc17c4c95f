"""How fast are perceptual hashes of 32 px grey pictures, and are they those of imagededup and ImageHash bit for bit?

A: `imagekiln.data.measures.perceptual_hashes`, all pictures in one call.
B: imagededup's PHash, one picture after the other, from the same array. C: ImageHash's phash, likewise.

All get the same grey arrays, so that only the hash is timed, interleaved A B C A B C in one process; what is not
installed is left out. Of imagededup only the module of its hashes is imported: the rest of it wants torchvision.
Equality is counted with each peer's own rule, for the two differ: imagededup compares with the median without the mean
of the picture, ImageHash with the median of all.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pairs
from PIL import Image
from record import Row, this_command, write_record

from imagekiln.data import builtin, measures

OURS, IMAGEDEDUP, IMAGEHASH = "imagekiln", "imagededup", "ImageHash"
TARGET = 5.0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = arguments.add_argument
    add("--data", type=Path, help="CIFAR-10's binary files (random pictures)")
    add("--n", type=int, default=5000, help="pictures (5000)")
    add("--rounds", type=int, default=5, help="interleaved rounds (5)")
    add("--record", action="store_true", help="also write a record under records/")
    return arguments


def pictures(folder: Path | None, count: int) -> np.ndarray:
    """grey_N3232 uint8."""
    if folder is None:
        coarse = np.random.default_rng(0).integers(0, 256, (count, 8, 8), dtype=np.uint8)
        return builtin.brought_to(coarse[..., None], measures.THUMB, 1)[..., 0]
    found = builtin.recognise(folder)
    if found is None:
        sys.exit(f"{folder} does not hold CIFAR-10's binary files.")
    return measures.grey(builtin.read(*found).images_NHWC[:count])


def imagededup_hashes() -> Callable[[np.ndarray], list[str]] | None:
    """imagededup's hashes of grey arrays, None where it is not installed."""
    spec = importlib.util.find_spec("imagededup")
    if spec is None or spec.submodule_search_locations is None:
        return None
    root = Path(next(iter(spec.submodule_search_locations)))
    for name in ("", ".methods", ".utils", ".handlers", ".handlers.search"):  # packages whose own code is not run
        package = ModuleType(f"imagededup{name}")
        package.__path__ = [str(root.joinpath(*name.split(".")))]
        sys.modules[f"imagededup{name}"] = package
    hasher = importlib.import_module("imagededup.methods.hashing").PHash(verbose=False)
    return lambda grey_N3232: [hasher._array_to_hash(hasher._hash_algo(picture)) for picture in grey_N3232]


def imagehash_hashes() -> Callable[[np.ndarray], list[str]] | None:
    """ImageHash's hashes of grey arrays, None where it is not installed."""
    try:
        import imagehash
    except ImportError:
        return None
    return lambda grey_N3232: [str(imagehash.phash(Image.fromarray(picture))) for picture in grey_N3232]


def timer(work: Callable[[np.ndarray], object], grey_N3232: np.ndarray) -> pairs.Timer:
    """Seconds of processor time, which other programs on the machine disturb least."""

    def run(steps: int) -> float:
        start = time.process_time()
        for _ in range(steps):
            work(grey_N3232)
        return time.process_time() - start

    return run


def main(given: Sequence[str] | None = None) -> int:
    """Measure, print, and write what was asked for; 1 where a hash differs."""
    options = parser().parse_args(given)
    grey = pictures(options.data, options.n)
    peers = {IMAGEDEDUP: imagededup_hashes(), IMAGEHASH: imagehash_hashes()}
    cases: dict[str, Callable[[np.ndarray], object]] = {OURS: measures.perceptual_hashes}
    cases |= {name: work for name, work in peers.items() if work is not None}
    rows, same = [], True
    for name, work in peers.items():
        if work is None:
            print(f"{name} is not installed and left out.")
            continue
        ours = measures.perceptual_hashes(grey, median_with_mean=name == IMAGEHASH)
        equal = int(np.sum([f"{mine:016x}" == theirs for mine, theirs in zip(ours, work(grey), strict=True)]))
        same = same and equal == len(grey)
        rows.append(Row(f"hashes equal to {name}'s", float(equal), "pictures", len(grey)))
    timers = {name: timer(work, grey) for name, work in cases.items()}

    def say(index: int, seconds: dict[str, float]) -> None:
        rates = "   ".join(f"{name} {len(grey) / value:10.0f}" for name, value in seconds.items())
        print(f"round {index + 1}, pictures/s:   {rates}", flush=True)

    seconds = pairs.interleave(timers, options.rounds, 1, 1, say)
    for name, values in seconds.items():
        rows.append(Row.median(f"{name}, hashes", [len(grey) / value for value in values], "pictures/s", len(grey)))
        if name != OURS:
            ratios = [theirs / mine for theirs, mine in zip(values, seconds[OURS], strict=True)]
            rows.append(Row.median(f"{OURS} / {name}", ratios, "times the pictures/s", len(grey)))
    for row in rows:
        print(f"{row.what:32s} {row.value:12.1f} {row.unit} {row.interval or ''}")
    if options.record and same and len(cases) > 1:
        of = options.data.name if options.data else "random pictures"
        notes = [
            "Processor time; intervals are the smallest and the largest of all rounds.",
            f"Grey 32 px arrays of {of}; no decoding, no resizing.",
            f"The aim was {TARGET:g} times {IMAGEDEDUP}.",
        ]
        print(write_record("hash-speed", this_command(), rows, notes=notes))
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
