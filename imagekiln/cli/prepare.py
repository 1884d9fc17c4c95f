"""`imagekiln prepare`: read, clean and pack pictures once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from imagekiln.cli.output import DebugOption, JsonOption, answer, progress, say


def prepare(
    source: Annotated[str, typer.Argument(help="Folder, zip, or builtin:NAME.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the prepared set.")],
    size: Annotated[int, typer.Option("--size", min=0, max=1024, help="Pixels; 0 keeps the set's own size.")] = 0,
    fit: Annotated[str, typer.Option("--fit", help="crop or pad.")] = "crop",
    channels: Annotated[int, typer.Option("--channels", help="1, 3 or 4; 0 looks at the pictures.")] = 0,
    background: Annotated[str, typer.Option("--background", help="Colour behind transparency.")] = "white",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Read, check and pack pictures into a folder that `train` takes as --data."""
    from imagekiln.config import DataConfig, parse
    from imagekiln.data import write_prepared

    settings = {"path": source, "size": size, "fit": fit, "channels": channels, "background": background}
    dataset = write_prepared(parse(DataConfig, settings, "data"), out, progress("Reading pictures"))
    for notice in dataset.notices:
        say(notice)
    facts = {"out": out, "summary": dataset.summary(), "left_out": dataset.left_out, "notices": dataset.notices}
    answer(f"{dataset.summary()}\nPrepared: {out}", facts, as_json)
