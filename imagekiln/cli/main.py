"""Entry point: runs a verb and turns every error into one sentence and an exit code."""

from __future__ import annotations

import os
import sys
import traceback

import typer

from imagekiln import __version__, signals
from imagekiln.cli import (
    compare,
    demo,
    doctor,
    evaluate,
    export,
    generate,
    listing,
    monitor,
    prepare,
    project,
    recipe,
    train,
    tune,
)
from imagekiln.cli.output import UNKNOWN_ERROR_EXIT, debug_wanted, say
from imagekiln.errors import ImagekilnError, OutOfMemory, is_out_of_memory

app = typer.Typer(
    name="imagekiln",
    help="Turn a set of pictures into a trained, measured, exportable image generator.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for verb in (
    demo.demo,
    prepare.prepare,
    train.train,
    tune.tune,
    generate.generate,
    project.project,
    evaluate.evaluate,
    compare.compare,
    monitor.monitor,
    export.export,
    doctor.doctor,
):
    app.command()(verb)
app.command("list")(listing.list_)
app.add_typer(recipe.app, name="recipe")


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version and leave.")) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line; the process ends with the exit code the error tree defines."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a narrow console must not end a training
    try:
        with signals.handled():
            app()
    except ImagekilnError as error:
        if debug_wanted():
            traceback.print_exc()
        say(str(error))
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        if debug_wanted():
            traceback.print_exc()
        if is_out_of_memory(error):
            say("Out of memory. Lower data.size, train.batch or the family's width.")
            code = OutOfMemory.exit_code
        else:
            say(f"Something unforeseen went wrong: {type(error).__name__}: {error}. Add --debug to see where.")
            code = UNKNOWN_ERROR_EXIT
    else:
        code = 0
    sys.exit(code)
