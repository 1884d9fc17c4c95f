"""The one trainer: it walks a family's phases and knows no family by name.

Backward, accumulation, clipping, the finite check, the optimizer step, moving averages, validation, previews and
checkpoints live here once. A run is a pure function of (recipe, data fingerprint, images seen): the global generator is
seeded before every loss from (seed, attempt, phase, images seen, slot), and data order is a function of (seed, index).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from imagekiln import native, optim, signals
from imagekiln.config import Recipe
from imagekiln.core import Family, Phase, Progress, Source, half_cosine, mix
from imagekiln.engine import augment, checkpoint, device, pictures, previews, validation
from imagekiln.engine.doctor import Doctor
from imagekiln.engine.guard import Guard
from imagekiln.engine.inputs import examples
from imagekiln.engine.models import save_weights
from imagekiln.engine.run import Run
from imagekiln.engine.state import Listener, State, parts_of
from imagekiln.engine.twin import follow, twin_of
from imagekiln.engine.validation import Validation
from imagekiln.errors import CheckpointError, DiskError, Diverged, OutOfMemory, is_out_of_memory

TICK_SEC = 5.0
FIRST_PREVIEW_SEC = 30.0
SKIPS_BEFORE_ROLLBACK, SKIP_WINDOW_STEPS, MAX_ROLLBACKS = 3, 20, 3


class Trainer:
    """Trains one family on one source and keeps everything in one run folder.

    family: freshly built by `engine.recipe.build`; moved to the device here.
    train, held_out: sources of the two splits.
    """

    def __init__(
        self, recipe: Recipe, family: Family, train: Source, held_out: Source, run: Run, listener: Listener
    ) -> None:
        self.recipe, self.config, self.run, self.listener = recipe, recipe.train, run, listener
        self.device = device.choose(self.config.device)
        self.dtype = device.autocast_dtype(self.config.precision, self.device)
        if self.device.type == "cpu":
            native.reuse_freed_memory()
        self.family = device.place(family, self.device)
        self.train_source = train
        self.validation = Validation(held_out, self.config.seed, self.device, self._precision)
        self.state = State(accumulate=parts_of(self.config.batch, self.config.accumulate))
        self.repeat = max(phase.repeat for phase in family.phases)
        self.images_per_step = self.config.batch * self.repeat
        self.total_nimg = self.config.total_nimg
        self.params = {p.optimizer: self._trainable(p) for p in family.phases}
        self.optimizers = {key: optim.build(recipe.optim[key], self.params[key], len(train)) for key in self.params}
        self.followed = self._averaged(self.family)  # the live tensors: collecting them anew costs as much as a layer
        self.averages = {
            average.name: optim.Average(average, self.followed, dict(family.named_buffers()))
            for average in self.config.averages
        }
        self.twin = twin_of(self.family)
        self.guard = Guard(late=self.device.type == "cuda")
        self._open: str | None = None
        self._sums: dict[str, list[Tensor]] = {}
        self._make_loader()
        self.doctor = Doctor(self, held_out, self._precision) if self.config.doctor != "off" else None
        if self.config.compile == "on" or (self.config.compile == "auto" and self.device.type == "cuda"):
            device.compile_parts(self.family)

    # -- the loop -----------------------------------------------------------------------------------------------------

    def fit(self) -> State:
        """Train until the recipe's length, from the newest whole checkpoint if there is one.

        Raises:
            Interrupted: a signal came; everything is saved, the same call continues.
            Diverged: roll-backs did not help.
            DiskError: a checkpoint could not be written.
            OutOfMemory: not even one picture a step fits.
        """
        with signals.deferred():
            fresh = not self.restore()
            self._tick_sec = self._start_sec = time.monotonic()
            self._tick_nimg = self.state.nimg
            if fresh:
                self.preview()
                self.save(verify=True)
            while self.state.nimg < self.total_nimg and not self._stops_early():
                before = self.state.nimg
                self.step()
                self._after(before)
                if signals.pending():
                    self.save()
                    self._status("interrupted")
                    signals.raise_if_pending()
            self._finish()
        return self.state

    def step(self) -> None:
        """One training step: every phase that is due, on fresh pictures."""
        number = self.state.nimg // self.images_per_step
        progress = Progress(self.state.nimg, self.total_nimg)
        if not self.family.training:
            self.family.train()
        whole = True
        for phase in self.family.phases:
            if number % phase.every == 0 and not (phase.rests and phase.rests(number)):
                for turn in range(phase.repeat):
                    whole = whole and self._update(phase, turn, progress)
        self.family.after_step(progress)
        self.state.nimg += self.images_per_step
        if whole:
            for average in self.averages.values():
                average.update(self.followed, self.state.nimg, self.images_per_step)
        self.guard.close(self.state.nimg)
        self._look_back(self.state.nimg >= self.total_nimg)

    def _update(self, phase: Phase, turn: int, progress: Progress) -> bool:
        """Differentiate one phase's loss and step its optimizer; False where the host knows that it was left out."""
        self._unfreeze(phase)
        optimizer = self.optimizers[phase.optimizer]
        optimizer.zero_grad(set_to_none=True)
        finite, slot = list[Tensor](), 0
        while slot < self.state.accumulate:
            position = progress.nimg + turn * self.config.batch + slot * self.loader.size
            try:
                batch = self.loader.batch(position)
                self._reseed(phase.name, progress.nimg, turn, slot)
                with self._precision():
                    loss = self.family.loss(phase.name, batch, progress)
                (loss.total * (phase.every / self.state.accumulate)).backward()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self._split_batches(optimizer, error)
                finite, slot = [], 0
                continue
            finite.append(torch.isfinite(loss.total.detach()))
            self._note(phase.name, {"loss": loss.total, **loss.parts})
            slot += 1
        norm = self._clip([p for _, p in self.params[phase.optimizer] if p.grad is not None])
        self._note(phase.name, {"grad_norm": norm})
        middle = (progress.nimg + self.images_per_step / 2) / self.total_nimg  # of this step, so that none is at 0
        factor = self.state.lr_scale * self.state.doctor.lr.get(phase.optimizer, 1.0)
        factor *= optim.multiplier(self.config.schedule, middle, self.config.warmup_fraction, self.config.end_lr_ratio)
        one = self.recipe.optim[phase.optimizer]
        for group in optimizer.param_groups:
            group["lr"] = one.lr * factor
            if one.beta2_start:
                group["betas"] = one.betas[0], half_cosine(one.beta2_start, one.betas[1], middle)
        self._heat(phase, turn, progress)
        stepped = self.guard.step(optimizer, torch.stack([*finite, torch.isfinite(norm)]).all())
        if not stepped:
            optimizer.zero_grad(set_to_none=True)
        return stepped

    def _heat(self, phase: Phase, turn: int, progress: Progress) -> None:
        """The temperature of this moment, and noise that is a function of (seed, attempt, phase, images seen)."""
        langevin = self.recipe.optim[phase.optimizer].langevin
        if langevin.temperature:
            optim.place(
                self.optimizers[phase.optimizer],
                step=progress.nimg // self.images_per_step * phase.repeat + turn,
                factor=optim.schedule(langevin.schedule)(progress.fraction),
                seed=mix(self.config.seed, self.state.attempt, "langevin", phase.name),
            )

    def _split_batches(self, optimizer: torch.optim.Optimizer, error: BaseException) -> None:
        """Compute every batch in more parts, mostly twice as many: what is learned from stays the same."""
        parts = parts_of(self.config.batch, 2 * self.state.accumulate)
        if parts == self.state.accumulate:
            raise OutOfMemory(
                f"A step with {self.loader.size} picture(s) at a time does not fit into memory. "
                "Lower data.size, the family's width, or train.batch."
            ) from error
        optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.state.accumulate = parts
        self._make_loader()
        self._notice("memory", f"Out of memory: each batch is now computed in {parts} parts.")

    # -- when numbers stop being finite -------------------------------------------------------------------------------

    def _look_back(self, everything: bool = True) -> None:
        """Steps that are known to have been left out, or all of them before something is kept."""
        for nimg in self.guard.bad(everything):
            self._skipped(nimg)

    def _skipped(self, nimg: int) -> None:
        window = nimg - SKIP_WINDOW_STEPS * self.images_per_step
        self.state.skipped_nimg = [n for n in self.state.skipped_nimg if n > window] + [nimg]
        self._notice("non-finite", f"Loss or gradient was not finite after {nimg} images; step left out.")
        if len(self.state.skipped_nimg) < SKIPS_BEFORE_ROLLBACK:
            return
        # A checkpoint from within the bad stretch holds the weights that led there.
        before_nimg = min(self.state.skipped_nimg) - self.images_per_step
        self.state.rollbacks, self.state.lr_scale = self.state.rollbacks + 1, self.state.lr_scale / 2
        if self.state.rollbacks > MAX_ROLLBACKS:
            checkpoint.forget_after(self.run.checkpoints, before_nimg)
            self._status("diverged")
            raise Diverged(
                f"The training left the finite numbers {self.state.rollbacks} times, at last after {nimg} images. "
                "Lower optim.*.lr, set train.precision = 'fp32', or look at the pictures; "
                "the last good checkpoint is kept."
            )
        self.go_back(before_nimg)
        self.state.skipped_nimg = []
        self.save()
        self._notice("rollback", f"Back to the checkpoint of {self.state.nimg} images, learning rate halved.")

    def go_back(self, nimg: int) -> None:
        """Continue from the newest checkpoint of at most `nimg` images, with other seeds; later ones are deleted."""
        was = self.state
        checkpoint.forget_after(self.run.checkpoints, nimg)
        self.restore()
        self.guard.forget()
        # The checkpoint may be of before an earlier going back, whose seeds did not help and whose rate stays lowered.
        self.state.attempt, self.state.rollbacks, self.state.lr_scale = was.attempt + 1, was.rollbacks, was.lr_scale
        self._make_loader()
        self._sums, self._tick_nimg = {}, self.state.nimg  # a rate is of what is learned from here on
        self._restart_clock()

    # -- events -------------------------------------------------------------------------------------------------------

    def _after(self, before: int) -> None:
        now = time.monotonic()

        def due(which: Any) -> bool:
            interval = self.config.interval_nimg(which)
            return self.state.nimg // interval > before // interval and self.state.nimg < self.total_nimg

        if now - self._tick_sec >= TICK_SEC:
            self._tick(now)
        if self.doctor and self.state.nimg < self.total_nimg:
            self.doctor.look(before)
        if due("validate"):
            self._validate()
        if due("preview") or (now - self._start_sec > FIRST_PREVIEW_SEC and len(self.run.samples()) < 2):
            self.preview()
        if due("checkpoint"):
            self.save()

    def _finish(self) -> None:
        if self._sums:
            self._tick(time.monotonic())
        if self.run.status().get("state") != "finished":
            self._validate()
            self.preview()
            self.save()
        self._status("finished")

    def _tick(self, now: float) -> None:
        means = {key: torch.stack(values).mean().item() for key, values in self._sums.items()}
        rate = (self.state.nimg - self._tick_nimg) / max(1e-9, now - self._tick_sec)
        self.state.train_sec += now - self._tick_sec
        row = {
            "nimg": self.state.nimg,
            "train_sec": round(self.state.train_sec, 2),
            "img_per_sec": round(rate, 2),
            "peak_mem_gb": round(device.peak_memory_gb(self.device), 3),
            "lr": next(iter(self.optimizers.values())).param_groups[0]["lr"],
            **means,
        }
        self._sums, self._tick_sec, self._tick_nimg = {}, now, self.state.nimg
        self.run.append_stats(row)
        self.listener.tick({**row, "total_nimg": self.total_nimg})
        self._status("training", img_per_sec=row["img_per_sec"])

    def _validate(self, count: int | None = None) -> None:
        """Held-out losses and quality of `count` drawn pictures (by default as many as are due), for every average."""
        if count is None:
            number = self.state.nimg // self.config.interval_nimg("validate")
            count, every = validation.affordable(self.total_nimg, self.family.drawing_cost() * len(self.averages))
            count = 0 if number % every and self.state.nimg < self.total_nimg else count
        row: dict[str, float] = {}
        criteria: dict[str, float] = {}
        for name in self.averages:
            found = self._looked_at(self.inference_twin(name), count)
            row |= {(key if name == next(iter(self.averages)) else f"{key}[{name}]"): v for key, v in found.items()}
            if self.family.monitor is None and "quality/coverage" in found:
                criteria[name] = 1 - found["quality/coverage"]
            elif f"validation/{self.family.monitor}" in found:
                criteria[name] = found[f"validation/{self.family.monitor}"]
        self.run.append_stats({"nimg": self.state.nimg, **row})
        self.listener.tick({"nimg": self.state.nimg, "total_nimg": self.total_nimg, **row})
        best = self._keep_best(criteria) if criteria else None
        if self.doctor:
            self.doctor.hear(row, best)
        self._restart_clock()

    def _looked_at(self, twin: Family, count: int) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, estimate in self.validation.losses(twin, Progress(self.state.nimg, self.total_nimg)).items():
            found |= {f"validation/{name}": estimate.mean, f"validation_error/{name}": estimate.error}
        found |= {f"quality/{name}": value for name, value in self.validation.quality(twin, count).items()}
        return {key: value for key, value in found.items() if not math.isnan(value) or key.startswith("validation/")}

    def _keep_best(self, criteria: Mapping[str, float]) -> bool:
        """Remember this moment and its best average as those to draw with, if they are; whether none before was better.

        A loss ranks moments. Coverage only says which are clearly worse: of the others the latest is the best.
        """
        average, loss = min(criteria.items(), key=lambda item: (math.isnan(item[1]), item[1]))
        before = self.state.best_loss
        better = before is None or loss < before or math.isnan(before)
        if better:
            self.state.best_loss = loss
        self.state.stale_validations = 0 if better else self.state.stale_validations + 1
        near = self.family.monitor is None and before is not None and self.validation.as_much(1 - loss, 1 - before)
        if better or near or self.config.choose == "last":
            self.state.best_nimg, self.state.best_average = self.state.nimg, average
            self._save_weights()
        return (better or near) and not math.isnan(loss)

    def _stops_early(self) -> bool:
        stop = 0 < self.config.patience <= self.state.stale_validations
        if stop:
            self.listener.say(f"Stopped early: {self.state.stale_validations} validations without gain.")
        return stop or self.state.doctor.stopped

    def preview(self) -> None:
        """Draw the sheet of this moment (`engine.previews`) and write it into the run."""
        if not self.family.draws:
            return
        with self._precision():
            picture = previews.sheet(self.inference_twin(), self.config, self.validation)
        pictures.write(picture, self.run.sample_path(self.state.nimg))
        self.listener.preview(self.state.nimg, picture)
        self._restart_clock()

    def time_event(self, name: str) -> float:
        """Do one preview, validation (of losses) or checkpoint now and return the seconds it took."""
        clock = time.monotonic()
        {"preview": self.preview, "validate": lambda: self._validate(0), "checkpoint": self.save}[name]()
        return time.monotonic() - clock

    def _restart_clock(self) -> None:
        """Images per second are those of training: time spent on looking is not counted."""
        if not self._sums:
            self._tick_sec = time.monotonic()

    def _status(self, state: str, **more: Any) -> None:
        rate = more.get("img_per_sec") or 0.0
        eta = max(0, self.total_nimg - self.state.nimg) / rate if rate else None
        self.run.write_status(
            state=state,
            nimg=self.state.nimg,
            total_nimg=self.total_nimg,
            eta_sec=None if eta is None else round(eta, 1),
            best_nimg=self.state.best_nimg,
            best_average=self.state.best_average,
            **more,
        )

    def _notice(self, kind: str, sentence: str) -> None:
        # A roll-back rewinds the images seen, but must not rewind what was noticed.
        self.run.append_event({"nimg": self.state.nimg, "kind": kind, "sentence": sentence, "keep": True})
        self.listener.say(sentence)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def save(self, verify: bool = False) -> None:
        """Write a checkpoint of this moment, and weights to draw with."""
        self._look_back()
        if self.doctor:
            self.doctor.write_down()
        parts = {"model": dict(self.family.state_dict()), "optimizer": self.optimizer_tensors()}
        parts |= {name: average.state_dict() for name, average in self.averages.items()}
        if not all(bool(torch.isfinite(t).all()) for t in parts["model"].values() if t.is_floating_point()):
            self._notice("non-finite", f"Weights were not finite after {self.state.nimg} images; not saved.")
            return
        state = dataclasses.asdict(self.state)
        for pause_sec in (0.0, 1.0, 3.0, None):
            try:
                path = checkpoint.save(self.run.checkpoints, self.state.nimg, parts, state)
                break
            except DiskError as error:
                if pause_sec is None or not checkpoint.stored(self.run.checkpoints):
                    raise
                self.listener.say(f"{error} Trying again.")
                time.sleep(pause_sec)
        if verify:
            checkpoint.load(path)
        pinned = {haven.nimg for haven in self.state.doctor.havens}
        pinned |= set() if self.state.best_nimg is None else {self.state.best_nimg}
        checkpoint.rotate(self.run.checkpoints, self.config.keep, pinned)
        if self.state.nimg:
            self._save_weights()
        self._restart_clock()

    def restore(self) -> bool:
        """Continue from the newest whole checkpoint; False when there is none."""
        found, sentences = checkpoint.load_newest(self.run.checkpoints, "cpu")
        for sentence in sentences:
            self._notice("checkpoint", sentence)
        if found is None:
            return False
        try:
            self.state = State(**found.state)
            self.family.load_state_dict(found.parts["model"])
            for key, optimizer in self.optimizers.items():
                checkpoint.load_optimizer(key, optimizer, self.params[key], found.parts["optimizer"])
            for name, average in self.averages.items():
                average.load_state_dict(found.parts[name])
        except (KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(
                f"The checkpoint of {found.nimg} images does not fit this recipe's networks ({error}). "
                "Use the recipe the run was started with, or another --out."
            ) from error
        self._make_loader()
        if self.doctor:
            self.doctor.read_up()
        self.run.forget_after(self.state.nimg)
        return True

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The state of all optimizers, as a checkpoint keeps it."""
        found: dict[str, Tensor] = {}
        for key, optimizer in self.optimizers.items():
            found |= checkpoint.optimizer_tensors(key, optimizer, self.params[key])
        return found

    def _save_weights(self) -> None:
        for name in self.averages:
            tensors = self.inference_twin(name)
            prompts = examples(self.family, self.validation.source)
            save_weights(self.run.weights_path(self.state.nimg, name), tensors, self.recipe, self.train_source, prompts)
        kept = {self.state.nimg} | ({self.state.best_nimg} if self.state.best_nimg is not None else set())
        if self.state.nimg < self.total_nimg:  # the training may go back to a checkpoint and its best moment
            kept |= checkpoint.noted(self.run.checkpoints, "best_nimg")
        self.run.prune_weights(kept, [round(1000 * kimg) for kimg in self.config.keep_kimg])
        self._status("training")

    # -- small parts --------------------------------------------------------------------------------------------------

    def inference_twin(self, average: str | None = None) -> Family:
        """The family in evaluation mode, its averaged modules with a moving average's weights, until the next step."""
        follow(self.twin, self.family, self.averages[average or next(iter(self.averages))].state_dict())
        return self.twin

    def _averaged(self, family: Family) -> dict[str, Tensor]:
        prefixes = tuple(f"{name}." for name in family.averaged)
        return {name: value for name, value in family.state_dict().items() if name.startswith(prefixes)}

    def _trainable(self, phase: Phase) -> list[tuple[str, nn.Parameter]]:
        prefixes = tuple(f"{name}." for name in phase.trains)
        return [(name, p) for name, p in self.family.named_parameters() if name.startswith(prefixes)]

    def _unfreeze(self, phase: Phase) -> None:
        if self._open != phase.optimizer:
            self.family.requires_grad_(False)
            for _, parameter in self.params[phase.optimizer]:
                parameter.requires_grad_(True)
            self._open = phase.optimizer

    def _clip(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        largest = self.config.clip_norm or math.inf
        return nn.utils.clip_grad_norm_(list(parameters), largest, foreach=True)

    def _note(self, phase: str, scalars: Mapping[str, Tensor]) -> None:
        for name, value in scalars.items():
            scalar = value.detach().float()
            self._sums.setdefault(f"{phase}/{name}", []).append(scalar)
            if self.doctor:
                self.doctor.note(f"{phase}/{name}", scalar)

    def _reseed(self, *keys: int | str) -> None:
        """All randomness of what follows is a function of these keys."""
        seed = mix(self.config.seed, self.state.attempt, *keys)
        if self.device.type == "cpu":
            torch.default_generator.manual_seed(seed)  # torch.manual_seed also visits every kind of GPU
        else:
            torch.manual_seed(seed)

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def _make_loader(self) -> None:
        seed, whole = mix(self.config.seed, self.state.attempt), self.config.batch
        data, batch = self.recipe.data, whole // self.state.accumulate
        self.loader = augment.loader(data, self.train_source, seed, batch, self.device, whole)
