"""`imagekiln evaluate`: measure a run, or any folder of pictures, against real ones; or several runs together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from imagekiln.cli.output import DebugOption, JsonOption, answer, say, with_options
from imagekiln.errors import UsageError


def evaluate(
    subjects: Annotated[
        list[Path], typer.Argument(help="Run folder, or a folder of pictures; several runs with --stability.")
    ],
    data: Annotated[str | None, typer.Option("--data", help="Real pictures [default: the run's own].")] = None,
    n: Annotated[int | None, typer.Option("-n", "--number", min=2, help="Pictures on each side.")] = None,
    features: Annotated[
        str | None,
        typer.Option(
            "--features", help="classifier, randconv, pixels, inception[:FILE], dinov2:DIR, clip:DIR or auto."
        ),
    ] = None,
    metrics: Annotated[str | None, typer.Option("--metrics", help="default, all, or names with commas.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of pictures and resampling.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Sampling steps (diffusion).")] = None,
    guidance: Annotated[float | None, typer.Option("--guidance", help="1 = none (diffusion with labels).")] = None,
    sampler: Annotated[str | None, typer.Option("--sampler", help="dpmpp_2m, heun, euler or ddim.")] = None,
    guide: Annotated[
        Path | None, typer.Option("--guide", help="Run or weights of a weaker model, for --guidance to turn away from.")
    ] = None,
    options: Annotated[list[str] | None, typer.Option("--option", help="Another one, as name=value.")] = None,
    table: Annotated[str, typer.Option("--table", help="text, csv, markdown or latex.")] = "text",
    stability: Annotated[
        bool, typer.Option("--stability", help="Look at runs of one recipe together: is this model consistent?")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Page of --stability [default: stability.html].")] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure quality, diversity and copying, with intervals and the real-versus-real floor."""
    from imagekiln import api

    drawing = {"steps": steps, "guidance": guidance, "sampler": sampler}
    drawing = with_options(drawing, options or [], api.evaluate)
    if stability:
        given = [name for name, value in {**drawing, "guide": guide}.items() if value is not None]
        if given:
            raise UsageError(f"--stability measures runs as they are drawn from by default; leave --{given[0]} out.")
        _stability(subjects, data, n, features, seed, out or Path("stability.html"), as_json)
    elif len(subjects) > 1:
        raise UsageError("evaluate measures one run or folder; give --stability to look at several runs together.")
    else:
        asked = {"n": n, "features": features, "metrics": metrics, "seed": seed, "guide": guide}
        _one(subjects[0], data, asked, drawing, table, as_json)


def _one(
    subject: Path, data: str | None, asked: dict[str, Any], drawing: dict[str, Any], table: str, as_json: bool
) -> None:
    from imagekiln import api
    from imagekiln.engine.run import Run
    from imagekiln.metrics import table as written
    from imagekiln.report import write

    written([], table)  # an unknown kind is said before the work
    rows = api.evaluate(subject, data, **asked, progress=say, **drawing)
    run = Run(subject)
    if run.exists():
        say(f"Report: {write(run)}")
    answer(written(rows, table), [json.loads(row.to_json()) for row in rows], as_json)


def _stability(
    runs: list[Path], data: str | None, n: int | None, features: str | None, seed: int | None, out: Path, as_json: bool
) -> None:
    from imagekiln.engine import stability as looking
    from imagekiln.report import stability as page

    found = looking.stability(runs, data, n=n, features=features, seed=seed, say=say)
    say(f"Page: {page.write(found, out)}")
    answer(looking.table(found), found.to_json(), as_json)
