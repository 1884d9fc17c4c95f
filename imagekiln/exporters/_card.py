"""The model card of an export, README.md: what the model is, what it learned from, how good it is, how to use it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from imagekiln.engine.kept import kept
from imagekiln.engine.models import Model, hash_of
from imagekiln.engine.run import Run, disk_faults, write_whole
from imagekiln.metrics import Measurement, table

PICTURE = "samples.png"


def write_card(model: Model, out: Path, use: str, facts: Sequence[str], limits: Sequence[str]) -> None:
    """Write README.md, and the newest preview of the run beside it where there is one.

    use: how to load it, in Markdown. facts: what was checked. limits: sentences; those of every model are added.
    """
    run, weights_hash = Run.of_weights(model.weights), hash_of(model.weights)
    meta, family = run.meta(), model.family
    channels, rows, columns = family.picture_shape
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in family.named_children()}
    told = [
        f"- Family: {family.config.name}; pictures of {columns} x {rows} pixels, {channels} channels.",
        f"- Parameters: {', '.join(f'{name} {count:,}' for name, count in counts.items() if count)}.",
        f"- Trained with imagekiln {meta.get('version') or metadata.version('imagekiln')}; "
        f"weights {model.weights.name}, sha256 {weights_hash}.",
        f"- Data: {meta.get('data_summary') or 'not recorded'}",
        f"- Fingerprint of the data: {meta.get('data_fingerprint') or 'not recorded'}.",
        *(f"- {fact}" for fact in facts),
    ]
    shown = _picture(run, out)
    general = [
        "It draws what its training pictures show and nothing else; nothing filters what it draws.",
        "Whoever passes it on needs the right to pass on what it learned from.",
    ]
    parts = [
        f"# {run.path.resolve().name}",
        "\n".join(told),
        *([f"![drawn by this model]({PICTURE})"] if shown else []),
        f"## Use\n\n{use}",
        f"## Measured\n\n{_measured(run, weights_hash)}",
        "## Limits\n\n" + "\n".join(f"- {limit}" for limit in [*limits, *_few_steps(family), *general]),
    ]
    write_whole(out / "README.md", "\n\n".join(parts) + "\n")


def sizes(model: Model) -> str:
    """The sentence on the sizes of what it draws."""
    _, rows, columns = model.family.picture_shape
    shapes = ", in shapes of about as many," if model.recipe.data.buckets else ""
    return f"It was trained at {columns} x {rows} pixels{shapes} and draws nothing else well."


def _few_steps(family: Any) -> list[str]:
    """Where a model steps from that learned from a teacher to draw in few steps."""
    if not getattr(family.config, "teacher", ""):
        return []
    levels = torch.tensor(family.config.distillation.levels, dtype=torch.float64)
    times = ", ".join(f"{time:.1f}" for time in family.path.time(levels).tolist())
    return [
        f"It learned to draw in at most {len(levels)} steps of Euler's method, unguided, from the times {times} "
        "(of 1000). Give these to a scheduler; from others it draws worse."
    ]


def _picture(run: Run, out: Path) -> bool:
    previews = run.samples()
    if not previews:
        return False
    with disk_faults(out):
        shutil.copyfile(previews[-1][1], out / PICTURE)
    return True


def _measured(run: Run, weights_hash: str) -> str:
    """The newest numbers of these weights, drawn from by default: a table for every set of real pictures."""
    found: dict[tuple[str, str], dict[str, Measurement]] = {}
    for row, options in kept(run):
        origin = row.provenance
        if origin.weights_hash == weights_hash and not options:
            found.setdefault((origin.reference, origin.reference_hash), {})[row.label] = row
    if not found:
        return "Nothing was measured of these weights. `imagekiln evaluate` measures a run."
    parts = [
        f"Beside {reference}:\n\n{table(list(rows.values()), 'markdown')}" for (reference, _), rows in found.items()
    ]
    return "\n\n".join(parts)
