"""`imagekiln compare`: runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from imagekiln.cli.output import DebugOption, JsonOption, answer


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    out: Annotated[Path | None, typer.Option("--out", help="Also write a picture of their samples.")] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show runs side by side: speed, and measurements with what may be ranked."""
    from imagekiln import api
    from imagekiln.engine.compare import comparison_table, side_by_side

    rows = api.compare(runs)
    text = comparison_table(rows)
    if out is not None:
        text += f"\nPicture: {side_by_side(runs, out)}"
    answer(text, rows, as_json)
