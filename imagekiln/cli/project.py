"""`imagekiln project`: find a given picture in what a run can draw."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from imagekiln.cli.output import (
    AverageOption,
    DebugOption,
    DeviceOption,
    JsonOption,
    NimgOption,
    RunArgument,
    answer,
    progress,
)


def project(
    run: RunArgument,
    picture: Annotated[Path, typer.Argument(help="Picture to look for.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")] = Path("projection"),
    label: Annotated[str | None, typer.Option("--label", help="Draw it as this class [default: what fits].")] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps of the search.")] = 300,
    restarts: Annotated[int, typer.Option("--restarts", min=1, max=64, help="Starts that are followed.")] = 4,
    seed: Annotated[int, typer.Option("--seed", help="Other seed, other starts.")] = 0,
    nimg: NimgOption = None,
    average: AverageOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Find the noise with which a model draws a picture: OUT/sheet.png has the picture, what was found, the difference.

    For GANs and autoencoders with a continuous latent space.
    """
    from imagekiln.engine import project as projection

    written = projection.project(
        run,
        picture,
        out,
        label=label,
        steps=steps,
        restarts=restarts,
        seed=seed,
        nimg=nimg,
        average=average,
        device_name=device,
        progress=progress("Searching"),
    )
    answer(written.sentence(), written.facts(), as_json)
