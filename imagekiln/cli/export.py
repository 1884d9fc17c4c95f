"""`imagekiln export`: write a run for other programs, and prove that it loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from imagekiln.cli.output import DebugOption, JsonOption, RunArgument, answer


def export(
    run: RunArgument,
    to: Annotated[str, typer.Option("--to", help="comfyui, diffusers or safetensors.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a run in another format, load it back, and print the numeric difference."""
    from imagekiln import api

    receipt = api.export(run, to, out)
    answer(receipt["sentence"], receipt, as_json)
