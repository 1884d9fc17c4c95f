"""Judges: classifiers trained on a set's training split, kept in the cache and used by every evaluation of that set.

The first one's penultimate layer is a feature space; the second, trained from another seed, judges whether a picture
shows the label that was asked for.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from imagekiln import data as datasets
from imagekiln.config import write_toml
from imagekiln.core import mix
from imagekiln.engine import recipe as recipes
from imagekiln.engine.inputs import begin
from imagekiln.engine.models import Model, open_model
from imagekiln.engine.run import Run
from imagekiln.engine.tracker import Say, Silent
from imagekiln.engine.trainer import Trainer

JUDGE_RECIPE = "judge"
BATCH = 100


def judge(dataset: datasets.Dataset, number: int, say: Say) -> Model:
    """A classifier of the set's training split, from the cache or trained now; `number` picks an independent one."""
    recipe = recipes.resolve(JUDGE_RECIPE, {"train": {"seed": number}})
    # A setting that is added to the program later leaves a judge what it is, as long as it has its default.
    settings = json.dumps(recipe.model_dump(mode="json", exclude_defaults=True), sort_keys=True)
    key = f"{mix(dataset.fingerprint, recipe.family.name, settings):016x}"
    run = Run(datasets.cache_folder() / "judges" / key)
    with run.lock(lambda: say(f"Waiting for judge {number + 1} of 2, which another process is training.")):
        if run.status().get("state") != "finished":
            say(f"Training judge {number + 1} of 2 on {len(dataset.train):,} real pictures (once for this set).")
            run = Run.create(run.path, write_toml(recipe), {"average": recipe.train.averages[0].name})
            epochs = max(recipe.train.total_kimg, 3 * len(dataset.train) / 1000)
            longer = recipe.model_copy(update={"train": recipe.train.model_copy(update={"total_kimg": epochs})})
            Trainer(longer, *begin(longer, dataset), run, Silent()).fit()
    return open_model(run)


@torch.inference_mode()
def predicted(judge_family: Any, images: Tensor) -> Tensor:
    """Class numbers, int64 (N,), of uint8 pictures (N, C, H, W)."""
    device = next(judge_family.parameters()).device
    parts = [judge_family.predict(datasets.to_float(part).to(device)).argmax(1).cpu() for part in images.split(BATCH)]
    return torch.cat(parts)
