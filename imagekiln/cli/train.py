"""`imagekiln train`: train a model, or continue one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from imagekiln.cli.output import DebugOption, JsonOption, answer, progress, say
from imagekiln.errors import UsageError

if TYPE_CHECKING:
    from imagekiln.api import Planned


def train(
    recipe: Annotated[
        str, typer.Argument(help="Recipe, family, or path of a .toml or .py file [default: diffusion].")
    ] = "",
    data: Annotated[str, typer.Option("--data", help="Folder, zip, or builtin:digits|fashion-mnist|cifar10.")] = "",
    out: Annotated[Path | None, typer.Option("--out", help="Run folder [default: runs/DATA-RECIPE].")] = None,
    begin_with: Annotated[
        Path | None, typer.Option("--from", help="Run whose weights, settings and pictures it begins with.")
    ] = None,
    minutes: Annotated[float | None, typer.Option("--minutes", min=0.05, help="Length of the run.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="A setting, such as train.batch=32.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Same as --set train.seed=N.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="Same as --set train.device=NAME.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and leave.")] = False,
    show: Annotated[Path | None, typer.Option("--show", help="Write the first batch as pictures here; leave.")] = None,
    report: Annotated[bool, typer.Option("--report/--no-report", help="Write report.html at the end.")] = True,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Train a model; the same command continues a run that was interrupted."""
    if not data and begin_with is None:
        raise UsageError("No pictures were named. Give a folder, a zip or builtin:digits with --data.")
    recipe = recipe or ("diffusion" if begin_with is None else "")
    assignments = list(settings or [])
    assignments += [f"train.seed={seed}"] if seed is not None else []
    assignments += [f"train.device='{device}'"] if device is not None else []
    from imagekiln import api
    from imagekiln.engine.tracker import Console

    if dry_run:
        told = progress("Reading pictures")
        planned = api.dry_run(recipe, data, assignments=assignments, begin_with=begin_with, progress=told)
        _say_plan(planned, as_json)
        return
    if show is not None:
        told = progress("Reading pictures")
        facts = api.show(recipe, data, show, assignments=assignments, begin_with=begin_with, progress=told)
        answer(f"The first batch: {show / 'batch.png'}", facts, as_json)
        return
    folder = out or Path("runs") / f"{_short(data or str(begin_with))}-{_short(recipe or 'again')}"
    run = api.train(
        recipe,
        data,
        folder,
        minutes=minutes,
        assignments=assignments,
        begin_with=begin_with,
        listener=Console(),
        progress=progress("Reading pictures"),
    )
    if report:
        from imagekiln.report import write

        say(f"Report: {write(run)}")
    text = (
        f"Trained: {run.path}\nPictures: {run.samples()[-1][1] if run.samples() else 'none'}\n"
        f"Next: imagekiln generate {run.path} -n 16 --out pictures"
    )
    answer(text, {"run": str(run.path), **run.status()}, as_json)


def _say_plan(planned: Planned, as_json: bool) -> None:
    """What `--dry-run` answers."""
    counts = ", ".join(f"{name} {count:,}" for name, count in planned.parameters.items())
    lines = [
        planned.summary,
        *planned.notices,
        f"Parameters: {counts}",
        f"Device: {planned.device}, {planned.precision}",
        "Nothing was written.",
    ]
    facts = {
        "recipe": planned.recipe.model_dump(mode="json"),
        "parameters": planned.parameters,
        "device": planned.device,
        "precision": planned.precision,
        "notices": planned.notices,
    }
    answer("\n".join(lines), facts, as_json)


def _short(name: str) -> str:
    """A folder name from a path, a recipe or `builtin:digits`."""
    return Path(name.rsplit(":", 1)[-1].rstrip("/")).stem or "data"
