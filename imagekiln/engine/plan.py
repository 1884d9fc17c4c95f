"""How long a run may be: the step rate is measured once and turned into a number of images."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from imagekiln.config import Recipe, write_toml
from imagekiln.data import Dataset
from imagekiln.engine import validation
from imagekiln.engine.inputs import begin
from imagekiln.engine.run import Run
from imagekiln.engine.tracker import Silent
from imagekiln.engine.trainer import Trainer

PROBE_SEC = 10.0
WARMUP_STEPS = 3
PROBES = 4
"""Moments of the run, evenly spread, at which steps are timed."""

EVENTS = {"preview": 16, "validate": 16, "checkpoint": 8}


@dataclass(frozen=True)
class Rate:
    """What was measured before a run: training speed, and the seconds one event of each kind takes."""

    img_per_sec: float
    event_sec: dict[str, float]
    probe_sec: float


def measure(recipe: Recipe, dataset: Dataset, probe_sec: float = PROBE_SEC) -> Rate:
    """Run real steps and one event of each kind in a folder that is thrown away."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run = Run.create(Path(folder) / "probe", write_toml(recipe), {})
        trainer = Trainer(recipe, *begin(recipe, dataset), run, Silent())
        for _ in range(WARMUP_STEPS):
            trainer.step()
        step_sec = [_step_sec(trainer, (part + 0.5) / PROBES, probe_sec / PROBES) for part in range(PROBES)]
        rate = trainer.images_per_step * PROBES / sum(step_sec)
        event_sec = {name: trainer.time_event(name) for name in EVENTS}
    return Rate(rate, event_sec, time.monotonic() - start)


def _step_sec(trainer: Trainer, fraction: float, probe_sec: float) -> float:
    """Seconds a step takes at this share of the run: networks that grow become slower as it goes on."""
    step = trainer.images_per_step
    trainer.state.nimg = int(fraction * trainer.total_nimg) // step * step
    trainer.step()  # what begins here is set up
    steps, clock = 0, time.monotonic()
    while steps < 1 or time.monotonic() - clock < probe_sec:
        trainer.step()
        steps += 1
    return (time.monotonic() - clock) / steps


def within(recipe: Recipe, dataset: Dataset, minutes: float) -> tuple[Recipe, Rate]:
    """The recipe with its length set so that the whole call takes about `minutes`, probe and events included."""
    rate = measure(recipe, dataset, min(PROBE_SEC, 6 * minutes))
    events_sec = sum(sec * (EVENTS[name] + 1) for name, sec in rate.event_sec.items())
    seconds = max(1.0, 60 * minutes - rate.probe_sec - events_sec)
    step = recipe.train.batch
    images = rate.img_per_sec * seconds / (1 + validation.SHARE)
    kimg = max(step, round(images / step) * step) / 1000
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"total_kimg": kimg})}), rate
