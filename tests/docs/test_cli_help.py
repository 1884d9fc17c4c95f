"""Every `--help` equals its stored text: a change of the command line is seen in the diff (`make golden` rewrites)."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import typer

from imagekiln.cli.main import app

FOLDER = Path(__file__).parent / "help"
REWRITE = os.environ.get("IMAGEKILN_REWRITE_GOLDEN") == "1"


def commands(command: object, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    children = getattr(command, "commands", {})
    return [path, *(found for name, child in children.items() for found in commands(child, (*path, name)))]


@pytest.mark.parametrize("path", commands(typer.main.get_command(app)), ids=lambda path: "-".join(path) or "imagekiln")
def test_help(cli, path: tuple[str, ...]) -> None:
    said = cli(*path, "--help").ok()
    text = "\n".join(line.rstrip() for line in said.out.splitlines()) + "\n"
    assert not said.err and not re.search(r"\x1b", text)
    file = FOLDER / f"{'-'.join(path) or 'imagekiln'}.txt"
    if REWRITE:
        FOLDER.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8"), "run `make golden` and read the diff"


def test_every_option_says_what_it_does() -> None:
    """No option without a help text, none twice, and no text that goes on for more than two lines."""

    def look(command: object, path: tuple[str, ...]) -> None:
        for parameter in getattr(command, "params", []):
            if getattr(parameter, "opts", [""])[0].startswith("-") and "--help" not in parameter.opts:
                assert parameter.help, f"{path}: {parameter.name}"
                assert len(parameter.help) <= 120, f"{path}: {parameter.name}"
        for name, child in getattr(command, "commands", {}).items():
            assert child.help, name
            look(child, (*path, name))

    look(typer.main.get_command(app), ())


def test_no_stored_text_without_a_command() -> None:
    known = {"-".join(path) or "imagekiln" for path in commands(typer.main.get_command(app))}
    assert {file.stem for file in FOLDER.glob("*.txt")} == known
