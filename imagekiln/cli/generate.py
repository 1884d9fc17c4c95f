"""`imagekiln generate`: draw pictures with a trained run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    with_options,
)

if TYPE_CHECKING:  # the help does not wait for torch
    from imagekiln.api import Drawn

TruncationOption = Annotated[
    float | None, typer.Option("--truncation", help="Less varied, more typical; for some GANs (0.7).")
]
PromptOption = Annotated[list[str] | None, typer.Option("--prompt", help="What to show, in words; several take turns.")]
AsWrittenOption = Annotated[
    bool, typer.Option("--as-written", help="Take the words as they stand (models with a phrasebook).")
]
StartOption = Annotated[Path | None, typer.Option("--start", help="A picture to begin with (diffusion).")]
StrengthOption = Annotated[
    float | None, typer.Option("--strength", help="How much of --start is drawn anew, 0 to 1 [default: 1].")
]
MaskOption = Annotated[Path | None, typer.Option("--mask", help="White: drawn anew; black: --start stays.")]
GuideOption = Annotated[
    Path | None, typer.Option("--guide", help="Run or weights of a weaker model, for --guidance to turn away from.")
]
ShapeOption = Annotated[
    str | None, typer.Option("--shape", metavar="HxW", help="Height and width in pixels (diffusion with a U-Net).")
]
WalkOption = Annotated[
    int,
    typer.Option("--interpolate", metavar="FRAMES", help="Walk through the pictures, FRAMES from each to the next."),
]
MixOption = Annotated[
    int, typer.Option("--mix", metavar="M", help="Table: coarse styles of the pictures, fine ones of M more.")
]
CrossoverOption = Annotated[
    int | None, typer.Option("--crossover", help="Places with the coarse style [default: half of them].")
]


def generate(
    run: RunArgument,
    n: Annotated[int, typer.Option("-n", "--number", min=1, help="Number of pictures.")] = 16,
    out: Annotated[Path, typer.Option("--out", help="Folder for the pictures.")] = Path("pictures"),
    label: Annotated[str | None, typer.Option("--label", help="Class by name or number.")] = None,
    prompt: PromptOption = None,
    as_written: AsWrittenOption = False,
    seed: Annotated[int, typer.Option("--seed", help="Other seed, other pictures.")] = 0,
    steps: Annotated[int | None, typer.Option("--steps", help="Sampling steps (diffusion).")] = None,
    guidance: Annotated[float | None, typer.Option("--guidance", help="1 = none (diffusion with labels).")] = None,
    sampler: Annotated[str | None, typer.Option("--sampler", help="dpmpp_2m, heun, euler or ddim.")] = None,
    start: StartOption = None,
    strength: StrengthOption = None,
    mask: MaskOption = None,
    guide: GuideOption = None,
    shape: ShapeOption = None,
    truncation: TruncationOption = None,
    grid: Annotated[str, typer.Option("--grid", help="plain, or class: a row a class with its name.")] = "plain",
    interpolate: WalkOption = 0,
    fps: Annotated[float, typer.Option("--fps", help="Frames a second of the walk.")] = 20.0,
    mix: MixOption = 0,
    crossover: CrossoverOption = None,
    options: Annotated[list[str] | None, typer.Option("--option", help="Another one, as name=value.")] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Pictures at a time.")] = 64,
    nimg: NimgOption = None,
    average: AverageOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Draw pictures: OUT/000000.png ... and OUT/grid.png; walk.png, strip.png and mix.png where they are asked for."""
    from imagekiln import api

    given = {"steps": steps, "guidance": guidance, "sampler": sampler, "strength": strength, "truncation": truncation}
    drawn = api.generate(
        run,
        n,
        out,
        label=label,
        prompt=prompt or (),
        as_written=as_written,
        start=start,
        mask=mask,
        guide=guide,
        shape=shape,
        seed=seed,
        batch=batch,
        nimg=nimg,
        average=average,
        device_name=device,
        grid=grid,
        interpolate=interpolate,
        fps=fps,
        mix=mix,
        crossover=crossover,
        progress=progress("Drawing"),
        **with_options(given, options or [], api.generate),
    )
    _say(drawn, as_json)


def _say(drawn: Drawn, as_json: bool) -> None:
    """What was written, and how prompts were understood where that is not what they say."""
    sheets = {key: path for key in ("grid", "walk", "strip", "mix") if (path := getattr(drawn, key)) is not None}
    text = f"Drew {len(drawn.pictures)} pictures with {drawn.weights.name}: {', '.join(map(str, sheets.values()))}"
    meant = {asked: said for asked, said in drawn.understood.items() if said != asked}
    text += "".join(f'\n"{asked}" was understood as "{said}".' for asked, said in meant.items())
    text += "".join(f'\nLonger than this model reads, so that its end was left out: "{one[:60]}".' for one in drawn.cut)
    facts = {"pictures": drawn.pictures, **sheets, "weights": drawn.weights}
    facts |= {"understood": drawn.understood, "cut": drawn.cut}
    answer(text, facts, as_json)
