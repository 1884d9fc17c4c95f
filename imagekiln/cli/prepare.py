"""`imagekiln prepare`: collect, check, clean, split and pack pictures once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from imagekiln.cli.output import DebugOption, JsonOption, answer, progress, say

if TYPE_CHECKING:
    from imagekiln.data import Dataset

FitOption = Annotated[str | None, typer.Option("--fit", help="crop (to the middle), smart (to most edges) or pad.")]
FramesOption = Annotated[
    str | None, typer.Option("--frames", help="first or all, of animations and files of several pages.")
]
RepairOption = Annotated[
    bool, typer.Option("--repair", help="Use truncated JPEG files of which nine tenths of the rows are there.")
]
BucketsOption = Annotated[
    bool, typer.Option("--buckets", help="Also keep pictures in their own proportions, for data.buckets.")
]
ReportOption = Annotated[
    bool, typer.Option("--report/--no-report", help="Write report.html beside the set; published sets have none.")
]


def prepare(
    sources: Annotated[list[str] | None, typer.Argument(help="Folders, archives, shards, or builtin:NAME.")] = None,
    *,
    out: Annotated[Path, typer.Option("--out", help="Folder for the prepared set.")],
    size: Annotated[int | None, typer.Option("--size", help="Pixels; 0 keeps the set's own size.")] = None,
    fit: FitOption = None,
    channels: Annotated[int | None, typer.Option("--channels", help="1, 3 or 4; 0 looks at the pictures.")] = None,
    background: Annotated[str | None, typer.Option("--background", help="Colour behind transparency.")] = None,
    buckets: BucketsOption = False,
    frames: FramesOption = None,
    repair: RepairOption = False,
    caption_encoding: Annotated[
        str | None, typer.Option("--caption-encoding", help="Of text files that are not UTF-8, such as gb18030.")
    ] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="A setting, such as clean.min_side=32.")] = None,
    restore: Annotated[
        list[str] | None, typer.Option("--restore", help="Keep this file whatever a check says.")
    ] = None,
    drop: Annotated[list[str] | None, typer.Option("--drop", help="Leave this file out.")] = None,
    urls: Annotated[Path | None, typer.Option("--urls", help="List of addresses to download pictures from.")] = None,
    propagate: Annotated[
        float | None, typer.Option("--propagate-labels", help="Propose labels; accept from this confidence on.")
    ] = None,
    show: Annotated[Path | None, typer.Option("--show", help="Also write a first batch as pictures here.")] = None,
    shards: Annotated[Path | None, typer.Option("--shards", help="Also write WebDataset shards here.")] = None,
    report: ReportOption = True,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Collect, check, clean, split and pack pictures into a folder that `train` takes as --data.

    The same command again only looks at what is new. Nothing in the sources is changed.
    """
    from imagekiln import api
    from imagekiln.data import URLS, write_shards

    given: dict[str, Any] = dict(size=size, fit=fit, channels=channels, background=background, frames=frames)
    given |= dict(caption_encoding=caption_encoding, repair=repair or None, buckets=buckets or None)
    dataset = api.prepare(
        [*(sources or []), *([f"{URLS}{urls}"] if urls else [])],
        out,
        progress("Looking at pictures"),
        restore=restore or (),
        drop=drop or (),
        propagate=propagate,
        assignments=settings or (),
        report=report,
        say=say,
        **{name: value for name, value in given.items() if value is not None},
    )
    for notice in dataset.notices:
        say(notice)
    lines, facts = _told(dataset, out)
    if shards is not None:
        lines.append(f"Shards:   {shards} ({len(write_shards(dataset, shards)):,} pictures)")
    if show is not None:
        api.show("diffusion", out, show)
        lines.append(f"First batch: {show / 'batch.png'}")
    answer("\n".join(lines), facts, as_json)


def _told(dataset: Dataset, out: Path) -> tuple[list[str], dict[str, Any]]:
    """Lines for a person and facts for a program."""
    from imagekiln.data import is_prepared, read_about

    about = read_about(out) if is_prepared(out) else {"checks": {}, "counts": {}}
    found = [(name, check) for name, check in about["checks"].items() if check["found"]]
    lines = [dataset.summary()]
    lines += [f"  {check['found']:,} {name.replace('_', ' ')}: {_fate(check)}" for name, check in found]
    lines += [f"Prepared: {out}"] + ([f"Report:   {out / 'report.html'}"] if (out / "report.html").is_file() else [])
    facts = {
        "out": out,
        "summary": dataset.summary(),
        "left_out": dataset.left_out,
        "notices": dataset.notices,
        "counts": about["counts"],
        "checks": about["checks"],
    }
    return lines, facts


def _fate(check: dict[str, Any]) -> str:
    """What was done about what a check found."""
    if not check["leaves_out"]:
        return "kept"
    return "left out" if check["left_out"] == check["found"] else f"{check['left_out']:,} left out"
