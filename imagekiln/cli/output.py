"""What a verb says: a short answer for people, or one JSON object; sentences and progress go to stderr."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from imagekiln.errors import UsageError

UNKNOWN_ERROR_EXIT = 1

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Print the traceback of an error.")]
RunArgument = Annotated[Path, typer.Argument(help="Run folder.")]
NimgOption = Annotated[int | None, typer.Option("--nimg", help="Weights after that many images.")]
AverageOption = Annotated[str | None, typer.Option("--average", help="Moving average to draw with.")]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, mps or auto.")]


def debug_wanted() -> bool:
    """Whether the command line asked for tracebacks."""
    return "--debug" in sys.argv


def say(sentence: str) -> None:
    """A sentence to the person, beside the answer."""
    print(sentence, file=sys.stderr, flush=True)


def answer(text: str, facts: Any, as_json: bool) -> None:
    """The verb's result."""
    print(json.dumps(facts, default=str) if as_json else text, flush=True)


def with_options(given: dict[str, Any], assignments: Sequence[str], function: Callable[..., Any]) -> dict[str, Any]:
    """`--option name=value` laid over the options of drawing that have flags of their own.

    function: what takes them, as keywords beside its own parameters. Raises `UsageError` for the name of one of these.
    """
    from imagekiln.config import override

    options = override(given, assignments)
    for name, parameter in inspect.signature(function).parameters.items():
        if name in options and parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            flag = f"-{name}" if len(name) == 1 else f"--{name.replace('_', '-')}"
            raise UsageError(f"--option {name}: this is no option of the family; use {flag}.")
    return options


def progress(what: str) -> Callable[[int, int], None]:
    """A counter that overwrites its line at a terminal and is silent elsewhere."""

    def report(done: int, total: int) -> None:
        if sys.stderr.isatty():
            end = "\n" if done >= total else ""
            print(f"\r{what} {done}/{total}", end=end, file=sys.stderr, flush=True)

    return report
