"""The command of a benchmark that trains: a line at the end, or one sentence and the exit code of what went wrong."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from imagekiln import signals
from imagekiln.errors import ImagekilnError

Work = Callable[[argparse.Namespace], Path | None]
"""Does it all and returns the path of its record; None where none was asked for."""


def run(parser: argparse.ArgumentParser, work: Work, given: Sequence[str] | None = None) -> int:
    """The exit code. given: the arguments; None = those of the process."""
    options = parser.parse_args(given)
    try:
        with signals.handled():
            print(work(options) or "No record was asked for.")
    except ImagekilnError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def say(sentence: str) -> None:
    """Tells how far it is, beside what is printed at the end."""
    print(sentence, file=sys.stderr, flush=True)
