"""The doctor at work: looks at fixed moments in images seen, tells what it finds, and acts where the recipe allows it.

Looks come `LOOKS` times a run. Numbers the trainer logs anyway are averaged over the images between two looks; drawn
pictures are looked at every so many looks, as many as `SHARE` of the training pays for. What is remembered is a `Chart`
in the run's state, so a run that was stopped and continued finds, says and does the same at the same images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from imagekiln.config import Recipe
from imagekiln.core import Family, Progress, Source, mix
from imagekiln.data import to_float
from imagekiln.engine.doctor import acts
from imagekiln.engine.doctor.chart import Chart, Haven
from imagekiln.engine.doctor.illnesses import Finding, History, diagnose
from imagekiln.engine.doctor.signals import Real
from imagekiln.engine.generate import draw
from imagekiln.engine.inputs import in_words, pictures_of
from imagekiln.engine.run import Run

LOOKS = 64
"""Looks of a run."""

SHARE = 0.015
"""Of the training's cost that looking at pictures may take."""

FEWEST, MOST = 32, 64
"""Pictures drawn for a look."""

HISTOGRAMS = 2
"""Looks over which kinds of drawn pictures are counted."""

QUIET = 12
"""Looks for which an illness is neither told nor treated again."""


class Patient(Protocol):
    """A training, as the doctor sees and touches it."""

    recipe: Recipe
    family: Family
    state: Any
    run: Run
    listener: Any
    train_source: Source
    device: torch.device
    optimizers: dict[str, torch.optim.Optimizer]
    total_nimg: int
    images_per_step: int

    def inference_twin(self, average: str | None = None) -> Family: ...
    def preview(self) -> None: ...
    def save(self) -> None: ...
    def go_back(self, nimg: int) -> None: ...


class Doctor:
    """Looks after one training.

    patient: the trainer. held_out: pictures it does not learn from. precision: makes the context the model computes in.
    """

    def __init__(
        self, patient: Patient, held_out: Source, precision: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        self.patient, self.held_out, self._precision = patient, held_out, precision
        self.acting = patient.recipe.train.doctor == "act"
        self.interval_nimg = max(patient.images_per_step, patient.total_nimg // LOOKS)
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._real: Real | None = None

    @property
    def chart(self) -> Chart:
        """What is remembered, as of now."""
        chart: Chart = self.patient.state.doctor
        return chart

    # -- listening ----------------------------------------------------------------------------------------------------

    def note(self, key: str, value: Tensor) -> None:
        """A scalar that was logged in a step; nothing waits for its value."""
        self._sums[key] = self._sums[key] + value if key in self._sums else value
        self._counts[key] = self._counts.get(key, 0) + 1

    def hear(self, found: Mapping[str, float], best: bool | None) -> None:
        """What a validation found, and whether this moment is the one to draw with, None = nobody knows: if nothing is
        wrong it is one to go back to, and is saved."""
        chart, nimg = self.chart, self.patient.state.nimg
        told = {
            key.partition("/")[2]: value for key, value in found.items() if key.startswith(("validation/", "quality/"))
        }
        chart.heard |= {f"held_out/{k}": value for k, value in told.items() if "[" not in k and math.isfinite(value)}
        healthy = chart.rows and not diagnose(History(chart.rows, self.patient.total_nimg))
        if self.acting and healthy and best is not False and chart.keep(Haven(nimg, bool(best))):
            self.patient.save()

    def write_down(self) -> None:
        """Put what is still being summed into the chart, for a checkpoint."""
        self.chart.sums = {key: float(value) for key, value in self._sums.items()}
        self.chart.counts = dict(self._counts)

    def read_up(self) -> None:
        """Go on summing from the chart of a checkpoint."""
        where = self.patient.device
        self._sums = {key: torch.tensor(value, device=where) for key, value in self.chart.sums.items()}
        self._counts = dict(self.chart.counts)

    # -- looking ------------------------------------------------------------------------------------------------------

    def look(self, before_nimg: int) -> None:
        """Look, if a look is due between `before_nimg` and now; tell and treat what is found."""
        nimg, chart = self.patient.state.nimg, self.chart
        number = nimg // self.interval_nimg
        if number == before_nimg // self.interval_nimg:
            return
        means = {key: float(value) / self._counts[key] for key, value in self._sums.items()}
        self._sums, self._counts = {}, {}
        row = {key: value for key, value in means.items() if math.isfinite(value)} | chart.heard
        row |= {f"dial/{name}": float(dial) for name, dial in self.patient.family.dials().items()}
        critics = [key.removesuffix("/on_real") for key in row if key.endswith("/on_real")]
        count, every = affordable(self.patient.total_nimg, self._cost(bool(critics)))
        if (critics or self.patient.family.draws) and count and number % every == 0:
            row |= self._seen(number, count, critics)
        chart.heard = {}
        chart.rows = [*chart.rows[1 - 2 * LOOKS :], {"nimg": nimg, **row}]
        for finding in diagnose(History(chart.rows, self.patient.total_nimg)):
            if self._answer(finding, critics):
                return

    def _cost(self, has_critic: bool) -> float:
        """Of a looked-at picture, in pictures trained on: drawing it, and two real ones shown to the critic."""
        return (self.patient.family.drawing_cost() if self.patient.family.draws else 0.0) + has_critic * 2 / 3

    def _seen(self, number: int, count: int, critics: list[str]) -> dict[str, float]:
        twin = self.patient.inference_twin()
        found: dict[str, float] = {}
        if twin.draws:
            self._real = self._real or Real(pictures_of(self.patient.train_source))
            seed = mix(self.patient.recipe.train.seed, "doctor", number)
            labels = self._real.labels(count, seed)
            with self._precision():
                wanted = in_words(twin, self.patient.train_source, labels)
                images = draw(twin, [mix(seed, index) for index in range(count)], wanted, batch=count)
            found = {f"drawn/{key}": value for key, value in self._real.look_at(images, labels).items()}
            found["drawn/missing"] = self._missing(images)
        # What was never seen cannot be known by heart, and a probe of a few dozen pictures is noisy.
        if critics and self.patient.state.nimg >= len(self.patient.train_source):
            found |= self._probed(twin, critics[0], number, count)
        return found

    def _missing(self, images: Tensor) -> float:
        real = self._real or Real(pictures_of(self.patient.train_source))
        self.chart.kinds = [*self.chart.kinds[1 - HISTOGRAMS :], real.kinds_of(images).tolist()]
        return real.missing(torch.tensor(self.chart.kinds).sum(0))

    @torch.no_grad()
    def _probed(self, twin: Family, critic: str, number: int, count: int) -> dict[str, float]:
        """The critic's mean answer on training, held-out and drawn pictures: others at every look."""
        found: dict[str, float] = {}
        for side, source in (("train", self.patient.train_source), ("held_out", self.held_out)):
            rows = [(number * count + index) * _STRIDE % len(source) for index in range(count)]
            raw = source.read(rows)
            batch = raw._replace(images=to_float(raw.images)).to(self.patient.device)
            torch.manual_seed(mix(self.patient.recipe.train.seed, "probe", number))
            with self._precision():
                parts = twin.loss(critic, batch, Progress(self.patient.state.nimg, self.patient.total_nimg)).parts
            found |= {f"probe/{side}": float(parts["on_real"]), "probe/fake": float(parts["on_fake"])}
        return found if all(map(math.isfinite, found.values())) else {}

    # -- telling and treating -----------------------------------------------------------------------------------------

    def _answer(self, finding: Finding, critics: list[str]) -> bool:
        """Say it and, where allowed, do something about it; True when the training went back or ends."""
        chart, nimg, name = self.chart, self.patient.state.nimg, finding.illness.name
        quiet_nimg = QUIET * self.interval_nimg
        told = nimg - chart.seen_nimg.get(name, -quiet_nimg - 1) <= quiet_nimg
        chart.seen_nimg[name] = nimg
        treat = self.acting and nimg - chart.treated_nimg.get(name, -quiet_nimg - 1) > quiet_nimg
        if told and not treat:
            return False
        sentence = finding.sentence(nimg / 1000, self._picture())
        event = {"nimg": nimg, "kind": name, "sentence": sentence, "values": dict(finding.evidence)}
        if not treat:
            self._tell(event)
            return False
        chart.treated_nimg[name] = nimg
        for act in finding.illness.acts:
            done = self._act(act, event, critics)
            if done:
                return act in ("restore", "stop")
        if not told:
            self._tell(event)
        return False

    def _act(self, act: str, event: dict[str, Any], critics: list[str]) -> bool:
        chart, family = self.chart, self.patient.family
        if act == "restore":
            haven = chart.haven(event["kind"])
            if haven is None or chart.restores >= acts.MOST_RESTORES:
                return False
            what = f"went back to the checkpoint of {haven.nimg} images and halved the learning rates"
            self._tell(event | {"act": act, "keep": True, "sentence": f"{event['sentence']} Done: {what}."})
            self._restore(haven, event["kind"])
            return True
        if act == "stop":
            chart.stopped = True
            self._tell(event | {"act": act, "sentence": f"{event['sentence']} Done: stopped; the best is kept."})
            return True
        owners = [phase.optimizer for phase in family.phases if phase.name in critics]
        done = acts.TURNS[act](chart, family.dials(), list(self.patient.optimizers), owners)
        if done:
            self._tell(event | {"act": act, "sentence": f"{event['sentence']} Done: {done}."})
        return bool(done)

    def _restore(self, haven: Haven, illness: str) -> None:
        """Back to a good moment with other seeds. What was turned since stays turned."""
        was = self.chart
        haven.left_for = sorted({*haven.left_for, illness})
        self.patient.go_back(haven.nimg)
        chart = self.chart
        for name, factor in was.dials.items():
            self.patient.family.dials()[name].mul_(factor / chart.dials.get(name, 1.0))
        chart.lr, chart.dials, chart.restores = was.lr, was.dials, was.restores + 1
        chart.havens = [one for one in was.havens if one.nimg <= self.patient.state.nimg]
        acts.lower_lr(chart, {}, list(self.patient.optimizers), [])
        self.patient.save()

    def _picture(self) -> str | None:
        """The preview of this moment: its path inside the run folder. One that is there already may be older than a
        going back, so it is drawn anew."""
        if not self.patient.family.draws:
            return None
        path: Path = self.patient.run.sample_path(self.patient.state.nimg)
        self.patient.preview()
        return path.relative_to(self.patient.run.path).as_posix()

    def _tell(self, event: dict[str, Any]) -> None:
        if event not in self.patient.run.events():  # a run that was killed while acting comes here again
            self.patient.run.append_event(event)
        self.patient.listener.say(event["sentence"])


_STRIDE = 7919
"""A prime: neighbours in a set are often of one class, a probe takes pictures from all over."""


def affordable(total_nimg: int, cost: float) -> tuple[int, int]:
    """(pictures a look, at every which look) within `SHARE` of the training; (0, 1) where none is affordable.

    cost: of one picture, in pictures trained on.

    >>> affordable(200_000, 1.0), affordable(200_000, 6.0), affordable(10_000, 6.0)
    ((46, 1), (46, 6), (0, 1))
    """
    for every in (1, 2, 3, 4, 6, 8):
        count = int(SHARE * total_nimg * every / (LOOKS * max(cost, 1e-3)))
        if count >= FEWEST:
            return min(count, MOST), every
    return 0, 1
