"""`imagekiln evaluate`: measure a run, or any folder of pictures, against real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from imagekiln.cli.output import DebugOption, JsonOption, answer, say


def evaluate(
    subject: Annotated[Path, typer.Argument(help="Run folder, or a folder of pictures.")],
    data: Annotated[str | None, typer.Option("--data", help="Real pictures [default: the run's own].")] = None,
    n: Annotated[int | None, typer.Option("-n", "--number", min=2, help="Pictures on each side.")] = None,
    features: Annotated[str | None, typer.Option("--features", help="classifier, randconv or auto.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of pictures and resampling.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Sampling steps (diffusion).")] = None,
    guidance: Annotated[float | None, typer.Option("--guidance", help="1 = none (diffusion with labels).")] = None,
    sampler: Annotated[str | None, typer.Option("--sampler", help="dpmpp_2m, heun, euler or ddim.")] = None,
    options: Annotated[list[str] | None, typer.Option("--option", help="Another one, as name=value.")] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure quality, diversity and copying, with intervals and the real-versus-real floor."""
    from imagekiln import api
    from imagekiln.config import override
    from imagekiln.engine.evaluate import table
    from imagekiln.engine.run import Run
    from imagekiln.report import write

    rows = api.evaluate(
        subject,
        data,
        n=n,
        features=features,
        seed=seed,
        progress=say,
        steps=steps,
        guidance=guidance,
        sampler=sampler,
        **override({}, options or []),
    )
    run = Run(subject)
    if run.exists():
        say(f"Report: {write(run)}")
    answer(table(rows), [json.loads(row.to_json()) for row in rows], as_json)
