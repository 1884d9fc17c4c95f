"""Errors a user can act on, each with its exit code.

ImagekilnError            1   anything else
├── UsageError            2   a wrong argument
│   └── RecipeError       2   a wrong recipe: unknown key, wrong type, impossible combination
├── DataError             3   the pictures cannot be used
├── OutOfMemory           4   the smallest batch does not fit
├── DiskError             5   a file could not be written
├── Diverged              6   the training left the finite numbers and could not be brought back
├── CheckpointError       1   no checkpoint of a run can be read
└── Interrupted          75   stopped by a signal; the same command continues

A message is one or two plain sentences: what was given and where, what was expected, what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ImagekilnError(Exception):
    """The root of the tree. `exit_code` is what the command line returns."""

    exit_code = 1


class UsageError(ImagekilnError):
    """A wrong argument or a name that does not exist."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe that cannot be read or does not make sense."""


class DataError(ImagekilnError):
    """Pictures that cannot be used."""

    exit_code = 3


class OutOfMemory(ImagekilnError):
    """Not even one picture a step fits."""

    exit_code = 4


class DiskError(ImagekilnError):
    """A file could not be written: disk full, read-only, or vanished."""

    exit_code = 5


class Diverged(ImagekilnError):
    """Loss or gradients kept leaving the finite numbers."""

    exit_code = 6


class CheckpointError(ImagekilnError):
    """No usable checkpoint."""


class Interrupted(ImagekilnError):
    """Stopped by a signal with everything saved."""

    exit_code = 75


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: Python's, torch's on a GPU, or torch's on a CPU, which is a plain RuntimeError.

    >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    (True, True)
    >>> is_out_of_memory(RuntimeError("shapes differ"))
    False
    """
    said = str(error).lower()
    torchs = isinstance(error, RuntimeError) and ("can't allocate memory" in said or "out of memory" in said)
    return torchs or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """A sentence naming the nearest known words, or all of them when none is near.

    >>> did_you_mean("learnign_rate", ["learning_rate", "batch"])
    "Did you mean 'learning_rate'?"
    """
    known = sorted(known)
    near = difflib.get_close_matches(given, known, n=1, cutoff=0.6)
    if near:
        return f"Did you mean '{near[0]}'?"
    return f"Known: {', '.join(known)}." if known else "There is none."
