"""`imagekiln monitor`: watch a released model, its data and its drawing, for example from cron."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from imagekiln.cli.output import DebugOption, DeviceOption, JsonOption, answer, say


def monitor(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    data: Annotated[str | None, typer.Option("--data", help="New pictures [default: look at drawing alone].")] = None,
    reference: Annotated[str | None, typer.Option("--reference", help="Compare with these, not the run's own.")] = None,
    n: Annotated[int, typer.Option("-n", "--number", min=20, max=4000, help="Most pictures on each side.")] = 1000,
    features: Annotated[str | None, typer.Option("--features", help="classifier, randconv or auto.")] = None,
    alpha: Annotated[float, typer.Option("--alpha", min=0.001, max=0.2, help="Chance of a false alarm.")] = 0.01,
    release: Annotated[bool, typer.Option("--release", help="Write a new release record.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Seed of samples and permutations.")] = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Tell whether pictures drifted (exit code 10), drawing changed (11), or both (12)."""
    from imagekiln.engine import monitor as monitoring

    watch = monitoring.monitor(
        run,
        data,
        reference=reference,
        n=n,
        features=features,
        alpha=alpha,
        release=release,
        seed=seed,
        device_name=device,
        say=say,
    )
    if watch.drift is not None and watch.drift.sheet is not None:
        say(f"The strangest new pictures, each above the nearest known one: {watch.drift.sheet}")
    answer(monitoring.table(watch), monitoring.facts(watch), as_json)
    if watch.exit_code:
        raise typer.Exit(watch.exit_code)
