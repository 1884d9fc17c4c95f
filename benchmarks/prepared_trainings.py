"""Does what `imagekiln prepare` makes of real folders train, a diffusion model and a GAN alike?

Every folder given is prepared by the command line, as anyone would, and each family trains on the set for some
minutes. Drawn pictures are measured against the held-out ones by `engine.bench`, with what other real pictures score
beside them, and a sheet of them is written below `--out`. The networks are narrower than the recipes', for in minutes
on one core a narrow one sees more. The same command continues what was interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import command
import ours
from quality_per_minute import Logbook, our_seconds
from record import Row, this_command, write_record
from semi_supervised import run_verb

from imagekiln import api
from imagekiln import data as datasets
from imagekiln.config import DataConfig
from imagekiln.core import mix
from imagekiln.engine import pictures
from imagekiln.engine.bench import BATCH, Bench
from imagekiln.engine.generate import draw
from imagekiln.engine.models import hash_of, open_model
from imagekiln.engine.run import Run, write_whole
from imagekiln.metrics import Measurement

FAMILIES = {"diffusion": (("family.widths=[16,32,64]",), 1.0), "dcgan": (("family.width=32",), 5.0)}
"""What is trained, the settings laid over its defaults, and how many times as many images it sees: what a step of it is
cheaper."""

SHEET = 100


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = arguments.add_argument
    add("--data", type=Path, nargs="+", required=True, help="folders of pictures, as `imagekiln prepare` takes them")
    add("--out", type=Path, default=Path("runs/prepared-trainings"), help="folder of the sets and runs")
    add("--size", type=int, default=32, help="pixels (32)")
    add("--channels", type=int, default=3, help="1, 3 or 4; transparency is laid onto white if not 4 (3)")
    add("--kimg", type=float, default=40.0, help="thousands of images that the diffusion model sees (40)")
    add("--seed", type=int, default=0, help="of training and drawing (0)")
    add("--n", type=int, default=5000, help="pictures drawn by each, at most as many as are held out (5000)")
    add("--name", default="prepared-trainings", help="name of the record (prepared-trainings)")
    add("--records", type=Path, metavar="FOLDER", help="folder of the record (records/)")
    return arguments


def prepared(options: argparse.Namespace, source: Path) -> Path:
    """The prepared set of a folder."""
    out = options.out / source.name / "set"
    if not datasets.is_prepared(out):
        run_verb("prepare", source, "--out", out, "--size", options.size, "--channels", options.channels)
    return out


def train(options: argparse.Namespace, out: Path, family: str) -> Run:
    """Train or continue a family on a set."""
    run = Run(out.with_name(family))
    if run.status().get("state") != "finished":
        logbook = Logbook(run, f"{family} on {out.parent.name}")
        settings, times = FAMILIES[family]
        settings = (*settings, f"train.seed={options.seed}", f"train.total_kimg={options.kimg * times}")
        try:
            api.train(family, out, run.path, assignments=settings, listener=logbook)
        finally:
            if run.exists():
                logbook.note()
    return Run.open(run.path)


def measure(options: argparse.Namespace, bench: Bench, run: Run) -> dict[str, Any]:
    """Draw with the run's best weights, keep a sheet, and measure; done once."""
    file, model, count = run.path.with_suffix(".measured.json"), open_model(run), bench.count(options.n)
    key = [hash_of(model.weights), count, bench.spaces[0].hash]
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"key": None}
    if known["key"] == key:
        return known["found"]
    labels = bench.labels(count)
    command.say(f"Drawing {count} pictures of {run.path.parent.name} by {run.path.name}.")
    seeds = [mix("prepared-trainings", options.seed, index) for index in range(count)]
    with model.precision():
        images = draw(model.family, seeds, labels, getattr(model.family.config, "sample", None), BATCH)
    sheet = run.path.with_suffix(".png")
    pictures.write(pictures.grid(images[:SHEET], pictures.columns_for(min(count, SHEET), 0)), sheet)
    bench.subject_hash = key[0]
    found = {
        "kimg": run.status().get("nimg", 0) / 1000,
        "parameters": ours.parameters(model.family),
        "seconds": our_seconds(run),
        "sheet": str(Path(run.path.parent.name) / sheet.name),
        "rows": [json.loads(row.to_json()) for row in bench.measure(images, labels)],
    }
    write_whole(file, json.dumps({"key": key, "found": found}) + "\n")
    return found


def rows_of(what: str, found: dict[str, Any]) -> list[Row]:
    """One training's numbers: intervals are those of the single measurement."""
    rows = [Row(f"{what}, images seen", found["kimg"], "kimg")]
    rows += [Row(f"{what}, training ({kind})", seconds, "s") for kind, seconds in found["seconds"].items()]
    for row in found["rows"]:
        one = Measurement.from_json(json.dumps(row))
        ends = None if one.low is None or one.high is None else (one.low, one.high)
        rows.append(Row(f"{what}, {one.label}", one.value, "", one.n, (), ends, None, (one.value,)))
        if one.floor is not None:
            rows.append(Row(f"{what}, {one.label}, real pictures", one.floor, "", one.n))
        if one.ratio is not None:
            rows.append(Row(f"{what}, {one.label} / real pictures", one.ratio, "times", one.n))
    return rows


def work(options: argparse.Namespace) -> Path:
    """Prepare, train, measure, write."""
    rows: list[Row] = []
    facts: dict[str, Any] = {}
    for source in options.data:
        out = prepared(options, source)
        dataset = datasets.load(DataConfig(path=str(out.absolute())))
        command.say(dataset.summary())
        runs = {family: train(options, out, family) for family in FAMILIES}
        bench = Bench(dataset, "auto", 0, command.say, "")
        found = {family: measure(options, bench, run) for family, run in runs.items()}
        facts[source.name] = {"summary": dataset.summary(), "fingerprint": dataset.fingerprint, "runs": found}
        for family, one in found.items():
            rows += rows_of(f"{source.name}, {family}", one)
    for row in rows:
        ends = f" [{row.interval[0]:.4g}, {row.interval[1]:.4g}]" if row.interval else ""
        print(f"{row.what:<64}{row.value:>12.5g} {row.unit}{ends}")
    notes = [
        "One training each. Intervals are those of the single measurements; sheets lie below the folder of --out.",
        "Real pictures: other real pictures measured in the same way, n against n.",
    ]
    folder = {"folder": options.records} if options.records else {}
    return write_record(options.name, this_command(), rows, notes=notes, **folder, sets=facts)


def main(given: Sequence[str] | None = None) -> int:
    """The exit code; given: the arguments, None = those of the process."""
    return command.run(parser(), work, given)


if __name__ == "__main__":
    sys.exit(main())
