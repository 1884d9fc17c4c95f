"""Writes the parts of the documentation that come from the code and from records: `make docs` runs it.

A part stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`; everything else on a page is written by hand.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from imagekiln import errors
from imagekiln.config import (
    AugmentConfig,
    AverageConfig,
    DataAugmentConfig,
    DataConfig,
    EvalConfig,
    LangevinConfig,
    OptimizerConfig,
    Section,
    StabilizeConfig,
    TrainConfig,
)
from imagekiln.diffusion.distillation import Distillation
from imagekiln.diffusion.noising import Noise
from imagekiln.engine import recipe as recipes
from imagekiln.engine import registry

ROOT = Path(__file__).resolve().parent.parent
NO_RECORDS = "No results have been recorded yet."
SHORT_ROWS = 14
"""A record of more rows is not shown on the first page."""

LONG_RECORDS = "docs/guide/measured.md"


def pages() -> dict[Path, str]:
    """Every page with a generated part, as it should be."""
    found = {}
    for path in sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]):
        text = path.read_text(encoding="utf-8")
        whole = re.sub(r"(<!-- (\w+):begin -->\n).*?(<!-- \2:end -->)", _filled, text, flags=re.DOTALL)
        if ":begin -->" in text:
            found[path] = whole
    return found


def _filled(match: re.Match[str]) -> str:
    name = match[2]
    if name not in PARTS:
        raise SystemExit(f"docs/generate.py knows no part {name!r}; there are {', '.join(PARTS)}.")
    return f"{match[1]}{PARTS[name]()}\n{match[3]}"


# -- records ----------------------------------------------------------------------------------------------------------


def records(folder: Path = ROOT / "records") -> str:
    """The newest record of every name: where it comes from, its rows, its notes. What a record lacks stays away."""
    newest = _newest(folder)
    return "\n\n".join(_shown_record(name, newest[name]) for name in sorted(newest)) or NO_RECORDS


def short_records(folder: Path = ROOT / "records") -> str:
    """The records of few rows, and the names of the others, which have a page."""
    newest = _newest(folder)
    short = [name for name in sorted(newest) if len(newest[name]["rows"]) <= SHORT_ROWS]
    shown = [_shown_record(name, newest[name]) for name in short]
    others = ", ".join(f"**{name}**" for name in sorted(newest) if name not in short)
    return (
        "\n\n".join([*shown, *([f"Longer ones on [their page]({LONG_RECORDS}): {others}."] if others else [])])
        or NO_RECORDS
    )


def _newest(folder: Path) -> dict[str, dict[str, Any]]:
    newest: dict[str, dict[str, Any]] = {}
    for record in sorted(filter(None, map(_record, folder.glob("*.json"))), key=lambda record: str(record.get("date"))):
        newest[str(record.get("name"))] = record
    return newest


def _record(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SystemExit(f"{path} is not JSON: {error}.") from None
    return record if isinstance(record, dict) and isinstance(record.get("rows"), list) else None


def _shown_record(name: str, record: Mapping[str, Any]) -> str:
    commit, changed, _ = str(record.get("commit") or "").partition("+")
    origin = [
        str(record.get("date") or "")[:10],
        f"commit {commit[:10]}{' with changes' if changed else ''}" if commit else "",
        _hardware(record.get("hardware")),
        f"`{record['command']}`" if record.get("command") else "",
    ]
    rows = [
        (
            row.get("what", ""),
            " ".join(part for part in (_number(row.get("value")), str(row.get("unit") or "")) if part),
            _interval(row.get("interval")),
            _number(row.get("sd")),
            _number(row.get("n")),
            _count(row.get("seeds")),
        )
        for row in record["rows"]
        if isinstance(row, Mapping)
    ]
    parts = [
        f"**{name}** ({'; '.join(filter(None, origin))})",
        table(("what", "value", "interval", "sd", "n", "seeds"), rows),
        " ".join(map(str, record.get("notes") or [])),
    ]
    return "\n\n".join(filter(None, parts))


def _hardware(given: Any) -> str:
    if not isinstance(given, Mapping):
        return str(given or "")
    device = str(given.get("device") or given.get("processor") or "")
    return f"{device} of {given['cores']} cores" if given.get("cores") and "threads" in device else device


def _interval(given: Any) -> str:
    if isinstance(given, list | tuple) and len(given) == 2:
        return " .. ".join(map(_number, given))
    return "" if given is None else str(given)


def _count(seeds: Any) -> str:
    return str(len(seeds) or "") if isinstance(seeds, list | tuple) else _number(seeds)


def _number(value: Any) -> str:
    """Four digits that mean something, however large the number is.

    >>> _number(0.912345), _number(12345.6), _number(600), _number(None)
    ('0.9123', '12346', '600', '')
    """
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "" if value is None else str(value)


def power(folder: Path = ROOT / "records") -> str:
    """From which strength on each measure sees each fault, of the newest record of every name `metric-power...`."""
    found = {}
    for record in sorted(filter(None, map(_record, folder.glob("metric-power*.json"))), key=lambda r: str(r["date"])):
        found[str(record["name"])] = record
    return "\n\n".join(_shown_power(found[name]) for name in sorted(found)) or NO_RECORDS


def _shown_power(record: Mapping[str, Any]) -> str:
    facts = record["facts"]
    measures = list(dict.fromkeys(measure for seen in facts["weakest"].values() for measure in seen))
    rows = []
    for fault, seen in facts["weakest"].items():
        unit, strengths = facts["faults"][fault]["unit"], facts["faults"][fault]["strengths"]
        cells = ["" if seen[measure] is None else _number(seen[measure]) for measure in measures]
        rows.append((f"{fault}, {_number(strengths[0])} to {_number(strengths[-1])} {unit}", *cells))
    origin = f"`{record['command']}`, {record['date'][:10]}, features: {facts['features']}, n = {facts['n']}."
    return f"{table(('fault', *measures), rows)}\n\n{origin} {' '.join(record['notes'])}"


LEAGUE = {
    "frechet": "FD",
    "precision": "precision",
    "recall": "recall",
    "coverage": "coverage",
    "spectrum": "spectrum, dB",
    "label_accuracy": "label",
}
"""Measures of a league's table."""


def league(folder: Path = ROOT / "records") -> str:
    """Families best first, of the newest record of every name `gan-league...`: means over the seeds."""
    newest = _newest(folder)
    shown = [_shown_league(newest[name]) for name in sorted(newest) if name.startswith("gan-league")]
    return "\n\n".join(shown) or NO_RECORDS


def _shown_league(record: Mapping[str, Any]) -> str:
    rows = []
    for family, by_seed in record["facts"]["runs"].items():
        runs = list(by_seed.values())
        measured = [{row["metric"]: row["value"] for row in run["rows"]} for run in runs]
        moments = [run["moments"] for run in runs if "moments" in run]
        ends = [found[max(found, key=int)] / min(found.values()) for found in moments]
        means = {name: _mean([one[name] for one in measured if name in one]) for name in LEAGUE}
        minutes = _mean([min(run["seconds"].values()) / 60 for run in runs])  # the processor's where they are known
        seen = (_mean([run[what] for run in runs]) for what in ("kimg", "images_per_sec"))
        about = (_million(runs[0]), round(minutes or 0, 1), *seen)
        last = (f"{max(ends):.2f}" if ends else "", str(len(runs)))
        rows.append((means["frechet"], (f"`{family}`", *map(_number, about), *map(_number, means.values()), *last)))
    head = ("family", "million", "minutes", "kimg", "images/s", *LEAGUE.values(), "end / best", "seeds")
    origin = f"`{record['command']}`, {record['date'][:10]}, {_hardware(record.get('hardware'))}."
    title = f"**{record['name']}**: {record['facts']['data']}"
    return f"{title}\n\n{table(head, [cells for _, cells in sorted(rows)])}\n\n{origin} {' '.join(record['notes'])}"


def _million(run: Mapping[str, Any]) -> float:
    return round(run["parameters"]["draws"] / 1e6, 2)


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def doctor(folder: Path = ROOT / "records") -> str:
    """The newest record of how many planted illnesses were named."""
    newest = _newest(folder)
    return _shown_record("doctor", newest["doctor"]) if "doctor" in newest else NO_RECORDS


_DIFFERENCE = re.compile(r"(\w+): (\w+), (.+) minus (.+) \((D = 0|best control)\): (win|tie|loss)")


def langevin(folder: Path = ROOT / "records") -> str:
    """Of every task and measure the best method with noise, beside the same without and the strongest control.

    A record may hold some of the tasks; each is shown from the newest that has it.
    """
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from langevin_tasks import TASKS

    found = (record for name, record in _newest(folder).items() if name.startswith("langevin-tasks"))
    records = sorted(found, key=lambda record: str(record["date"]), reverse=True)
    rows, titles = [], []
    for name, task in TASKS.items():
        if (record := next((one for one in records if name in one["facts"]["tasks"]), None)) is None:
            continue
        rows += [
            (name, measure, *_best(record, name, measure, metric.lower)) for measure, metric in task.metrics.items()
        ]
        titles.append(f"- {name}: {task.title}. {_counted(record, name)}")
    head = ("task", "measure", "with noise", "without (D = 0)", "strongest control")
    notes = list(dict.fromkeys(note for record in records for note in record["notes"]))
    notes += [f"`{record['command']}`, {record['date'][:10]}." for record in records]
    return "\n\n".join([table(head, rows), "\n".join(titles), " ".join(notes)]) if rows else NO_RECORDS


def _best(record: Mapping[str, Any], task: str, measure: str, lower: bool) -> tuple[str, str, str]:
    """The method with noise that has the best mean, and what came of comparing it."""
    means = {row["what"]: row["value"] for row in record["rows"]}
    found: dict[str, dict[str, str]] = {}
    for row in record["rows"]:
        match = _DIFFERENCE.fullmatch(row["what"])
        if match and match.groups()[:2] == (task, measure):
            _, _, method, other, kind, verdict = match.groups()
            found.setdefault(method, {})[kind] = f"{_number(means[f'{task}: {measure}, {other}'])} {other}: {verdict}"
    mean = {method: means[f"{task}: {measure}, {method}"] for method in found}
    best = (min if lower else max)(mean, key=mean.__getitem__)
    return f"{_number(mean[best])} {best}", found[best]["D = 0"], found[best]["best control"]


def _counted(record: Mapping[str, Any], task: str) -> str:
    """Wins, ties and losses of all methods with noise in all measures."""
    counts = record["facts"]["verdicts_by_task"][task]
    return f"Against D = 0 {counts['D = 0']}; against the strongest control {counts['best control']}."


# -- the code ---------------------------------------------------------------------------------------------------------


def families() -> str:
    """The families of the package with the first line of their docstring."""
    return table(("family", "what it is"), [(f"`{name}`", registry.describe(name)) for name in registry.names()])


def package_recipes() -> str:
    """The recipes of the package with the first line of their header."""
    named = [(f"`{name}`", recipes.header(name).split("\n")[0].split(": ", 1)[-1]) for name in recipes.names()]
    return table(("recipe", "what it trains"), named)


def exit_codes() -> str:
    """Exit codes with the error behind each."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    rows = [("0", "done")]
    meanings = {errors.ImagekilnError: "anything else"}
    rows += [(str(kind.exit_code), f"`{kind.__name__}`: {meanings.get(kind, _first(kind.__doc__))}") for kind in kinds]
    rows += [("10, 11, 12", "`imagekiln monitor`: the pictures drifted, generation changed, both")]
    rows += [("130", "a second signal: left at once; what is on disk is whole")]
    return table(("code", "meaning"), sorted(rows, key=lambda row: int(row[0].split(",")[0])))


def settings() -> str:
    """Every setting that all recipes share, and the families' own."""
    sections: list[tuple[str, type[Section]]] = [
        ("data", DataConfig),
        ("data.augment", DataAugmentConfig),
        ("train", TrainConfig),
        ("train.averages", AverageConfig),
        ("eval", EvalConfig),
        ("optim.MODULES", OptimizerConfig),
        ("optim.MODULES.langevin", LangevinConfig),
        ("family.augment", AugmentConfig),
        ("family.stabilize", StabilizeConfig),
        ("family.distillation", Distillation),
        ("family.noise", Noise),
    ]
    parts = [_settings_of(f"`[{name}]`", model) for name, model in sections]
    for name in registry.names():
        elsewhere = {"name", "sample", "augment", "stabilize", "distillation", "noise"}
        parts.append(_settings_of(f"`[family]` of {name}", registry.load(name).Config, skip=elsewhere))
        options = registry.load(name).Config.model_fields.get("sample")
        if options is not None and isinstance(options.annotation, type):
            parts.append(_settings_of(f"`[family.sample]` of {name}", options.annotation))
    return "\n\n".join(parts)


def _settings_of(title: str, model: type[Section], skip: Iterable[str] = ()) -> str:
    rows = [
        (f"`{key}`", f"`{_shown(field.default)}`", _meaning(field))
        for key, field in model.model_fields.items()
        if key not in skip
    ]
    return f"{title}\n\n{table(('setting', 'default', 'meaning'), rows)}"


def _meaning(field: FieldInfo) -> str:
    """The description, and the choices where there are only so many."""
    chosen = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    choices = f"one of {', '.join(f'`{_shown(choice)}`' for choice in chosen)}" if chosen else ""
    return "; ".join(filter(None, (choices, field.description)))


def _shown(default: Any) -> str:
    """A default as it would be written in TOML."""
    if isinstance(default, tuple):
        return f"[{', '.join(_shown(value) for value in default)}]"
    if isinstance(default, Section):
        return "{ ... }"
    return json.dumps(default) if isinstance(default, bool | str) else f"{default:g}"


def _first(text: str | None) -> str:
    sentence = (text or "").strip().split("\n")[0].split(". ")[0].rstrip(".")
    return sentence[:1].lower() + sentence[1:]


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table; a column without a single entry is left out.

    >>> print(table(("a", "b"), [(1, ""), (2, "")]))
    | a |
    |---|
    | 1 |
    | 2 |
    """
    columns = [column for column in zip(head, *rows, strict=True) if any(str(cell) for cell in column[1:])]
    lines = [" | ".join(str(cell).replace("|", "\\|") for cell in row) for row in zip(*columns, strict=True)]
    return "\n".join([f"| {lines[0]} |", "|---" * len(columns) + "|", *(f"| {line} |" for line in lines[1:])])


PARTS = {
    "records": records,
    "highlights": short_records,
    "families": families,
    "recipes": package_recipes,
    "exits": exit_codes,
    "settings": settings,
    "power": power,
    "league": league,
    "doctor": doctor,
    "langevin": langevin,
}

if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text, encoding="utf-8")
