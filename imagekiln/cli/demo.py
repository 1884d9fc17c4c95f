"""`imagekiln demo`: the whole job on the handwritten digits that come with scikit-learn."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from imagekiln.cli.output import DebugOption, JsonOption, answer, say

PICTURES = 500


def demo(
    out: Annotated[Path, typer.Option("--out", help="Run folder.")] = Path("runs/demo"),
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Do the whole job on real handwritten digits: prepare, train, measure, draw, report. Takes minutes on a laptop."""
    from imagekiln import api
    from imagekiln.engine.tracker import Console, duration
    from imagekiln.metrics import table
    from imagekiln.report import write

    started = time.monotonic()
    say("1/4  Training a diffusion model on 1,797 handwritten digits of 8x8 pixels.")
    run = api.train("digits", "builtin:digits", out, listener=Console())
    say(f"2/4  Measuring {PICTURES} drawn digits against digits the training never saw.")
    rows = api.evaluate(run, n=PICTURES, progress=say)
    say("3/4  Drawing pictures.")
    drawn = api.generate(run, n=100, out=run.path / "pictures")
    say("4/4  Writing the report.")
    report = write(run)
    text = (
        f"{table(rows)}\n\nDone in {duration(time.monotonic() - started)}.\n"
        f"Pictures: {drawn.grid}\nReport:   {report}, which says what every number means\n"
        f"Yours:    imagekiln train diffusion --data YOUR_PICTURES --minutes 20"
    )
    facts = {
        "run": run.path,
        "grid": drawn.grid,
        "report": report,
        "seconds": round(time.monotonic() - started, 1),
        "measurements": {
            row.label: {
                "value": row.value,
                "low": row.low,
                "high": row.high,
                "floor": row.floor,
                "ratio": row.ratio,
                "n": row.n,
            }
            for row in rows
        },
    }
    answer(text, facts, as_json)
