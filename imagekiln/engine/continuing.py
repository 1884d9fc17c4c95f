"""What a run may be continued with: the pictures and the settings it was started with, but for a few."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from imagekiln.config import Recipe, read_toml, write_toml
from imagekiln.data import Dataset
from imagekiln.engine import recipe as recipes
from imagekiln.engine.inputs import companion_hashes
from imagekiln.engine.run import Run
from imagekiln.errors import UsageError

FREE_TO_CHANGE = {
    "total_kimg",
    "checkpoint_kimg",
    "preview_kimg",
    "validate_kimg",
    "keep",
    "keep_kimg",
    "patience",
    "choose",
    "device",
    "tensorboard",
    "compile",
}
"""Settings of `train` that may differ."""


def continued(run: Run, wanted: Recipe, dataset: Dataset, minutes: float | None) -> Recipe:
    """The recipe to continue with: the run's own, with the few settings that may change.

    Raises:
        UsageError: the pictures or any other setting differ from what the run was made with.
    """
    stored = recipes.complete(read_toml(run.recipe_path))
    trained_on = run.meta().get("data_fingerprint")
    if trained_on != dataset.fingerprint:
        raise UsageError(
            f"The pictures differ from those {run.path} was trained on ({trained_on} -> {dataset.fingerprint}). "
            "Give the same --data, or another --out for a new run."
        )
    if changed := sorted(dict(run.meta().get("companions", {}).items() ^ companion_hashes(wanted).items())):
        raise UsageError(
            f"{changed[0]}: what it names is not what it was when {run.path} was started. Name that again, or "
            "give another --out for a new run."
        )
    if minutes is not None:
        wanted = wanted.model_copy(
            update={"train": wanted.train.model_copy(update={"total_kimg": stored.train.total_kimg})}
        )
    old, new = stored.model_dump(mode="json"), wanted.model_dump(mode="json")
    for section in (old, new):
        section["data"].pop("path")
        if run.codec_path.is_file():
            section["data"].pop("codec")  # the run has its own
        section.pop("eval")
        for key in FREE_TO_CHANGE:
            section["train"].pop(key)
    for key, before, after in _differences(old, new):
        raise UsageError(
            f"{run.path} was started with {key} = {before!r}, not {after!r}. "
            "Give the same settings to continue it, or another --out for a new run."
        )
    run.write_recipe(write_toml(wanted))
    return wanted


def _differences(old: Any, new: Any, key: str = "") -> Iterable[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}):
            yield from _differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif old != new:
        yield key, old, new
