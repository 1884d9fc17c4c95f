"""`imagekiln tune`: try a few settings of one recipe and find out which is best, if any."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from imagekiln.cli.output import DebugOption, JsonOption, answer, progress, say
from imagekiln.errors import UsageError

if TYPE_CHECKING:
    from imagekiln.engine.run import Run


def tune(
    recipe: Annotated[str, typer.Argument(help="Recipe, family, or path of a .toml or .py file.")],
    over: Annotated[list[str] | None, typer.Option("--over", help="Values to try: train.batch=32,64.")] = None,
    data: Annotated[str, typer.Option("--data", help="Folder, zip, or builtin:digits|fashion-mnist|cifar10.")] = "",
    out: Annotated[Path, typer.Option("--out", help="Folder for the runs.")] = Path("runs/tune"),
    kimg: Annotated[float | None, typer.Option("--kimg", min=0.001, help="Last rung [default: the recipe's].")] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=2, max=20, help="Seeds of the finalists.")] = 3,
    reduction: Annotated[int, typer.Option("--reduction", min=2, max=10, help="One in so many goes on.")] = 3,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of all, such as train.batch=32.")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="Same as --set train.device=NAME.")] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Try settings of a recipe by successive halving; a temperature is always compared with none."""
    if not data:
        raise UsageError("No pictures were named. Give a folder, a zip or builtin:digits with --data.")
    if not over:
        raise UsageError("Nothing to try. Give --over, for example --over optim.network.langevin.temperature=0.01,0.1.")
    from imagekiln import api
    from imagekiln.engine import tune as tuning

    def train(folder: Path, assignments: Sequence[str]) -> Run:
        return api.train(recipe, data, folder, assignments=assignments, progress=progress("Reading pictures"))

    assignments = list(settings or [])
    assignments += [f"train.device='{device}'"] if device is not None else []
    found = tuning.tune(
        recipe,
        over,
        out,
        train,
        data=data,
        assignments=assignments,
        kimg=kimg,
        seeds=seeds,
        reduction=reduction,
        say=say,
        progress=progress("Reading pictures"),
    )
    winner = next(row for row in found.rows if row.name == found.winner)
    length = [] if kimg is None else [f"train.total_kimg={kimg:g}"]
    wanted = [*assignments, *length, *(f"{key}={value}" for key, value in winner.settings.items())]
    text = f"{tuning.table(found)}\nNext: {_command(recipe, data, wanted)}"
    answer(text, found.to_json(), as_json)


def _command(recipe: str, data: str, settings: Sequence[str]) -> str:
    """What trains with these settings, as a shell reads it.

    >>> _command("vae", "my photos", ["train.batch=16"])
    "imagekiln train vae --data 'my photos' --set=train.batch=16"
    """
    return shlex.join(["imagekiln", "train", recipe, "--data", data, *(f"--set={one}" for one in settings)])
