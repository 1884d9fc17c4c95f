"""Contract tests of a family, for those of the package and for yours.

    from imagekiln.testing import check_family
    check_family("my_gan.py")

Every check is a plain function of a family's name; `checks()` lists them, so a test can be parametrised over them.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from imagekiln.config import Recipe, merge, parse, write_toml
from imagekiln.core import Batch, Condition, Family, HeldOut, Loss, Phase, Progress, mix, seeded_noise
from imagekiln.engine import recipe as recipes
from imagekiln.engine import registry
from imagekiln.engine.generate import draw
from imagekiln.engine.models import load_model
from imagekiln.engine.run import Run
from imagekiln.engine.tracker import Silent
from imagekiln.engine.trainer import Trainer
from imagekiln.errors import RecipeError

SHAPE = (3, 16, 16)
CLASSES = 3
TOY_LR = 1e-3


class Toy:
    """A source of 24 one-coloured pictures in three classes, small enough to learn in seconds."""

    def __init__(self, image_shape: tuple[int, int, int] = SHAPE, num_classes: int = CLASSES) -> None:
        self.image_shape, self.num_classes = image_shape, num_classes
        self.class_names = tuple(f"class {index}" for index in range(num_classes))
        self.fingerprint = f"toy-{image_shape}-{num_classes}"
        shades = torch.tensor([170, 190, 210], dtype=torch.uint8).repeat(8)
        self._images = shades[:, None, None, None].expand(-1, *image_shape).contiguous()
        self._labels = torch.arange(3).repeat(8) if num_classes else None

    def __len__(self) -> int:
        return len(self._images)

    def read(self, indices: Sequence[int]) -> Batch:
        rows = torch.as_tensor(list(indices))
        return Batch(self._images[rows], None if self._labels is None else self._labels[rows])


def check_family(name: str) -> None:
    """Run every check on a family, named as in a recipe: module, dotted module, or path of a `.py` file.

    Raises:
        AssertionError: the family breaks the contract; the message says which part.
    """
    for check in checks():
        check(name)


def checks() -> list[Callable[[str], None]]:
    """All checks, in the order in which they help most."""
    return [value for key, value in globals().items() if key.startswith("check_") and key != "check_family"]


# -- the checks -------------------------------------------------------------------------------------------------------


def check_docstring(name: str) -> None:
    """The module's docstring starts with one line that can stand in a table."""
    module = __import__("sys").modules[registry.load(registry.locate(name)).__module__]
    first = (module.__doc__ or "").strip().split("\n")[0]
    _require(20 <= len(first) <= 140 and first.endswith("."), f"first line of the docstring is {first!r}")


def check_recipe_round_trips(name: str) -> None:
    """Every setting has a default, and the recipe survives being written and read."""
    import tomllib

    recipe = _recipe(name)
    _require(recipes.complete(tomllib.loads(write_toml(recipe))) == recipe, "the recipe changed on its way to disk")


def check_unknown_settings_are_refused(name: str) -> None:
    """A misspelt setting is an error."""
    kind = registry.load(registry.locate(name))
    try:
        parse(kind.Config, {"name": name, "surely_no_such_setting": 1}, "family")
    except RecipeError:
        return
    raise AssertionError("an unknown setting was taken without a word; set extra='forbid'")


def check_modules_exist(name: str) -> None:
    """Phases train, and averages follow, sub-modules that exist; every optimizer is used, or could be by a phase that
    one of the family's companions brings."""
    for family in _built(name):
        children = dict(family.named_children())
        for module in [*family.averaged, *(part for phase in family.phases for part in phase.trains)]:
            _require(module in children, f"{module!r} is not a sub-module; there are {sorted(children)}")
        used = {phase.optimizer for phase in family.phases}
        known = set(type(family).optimizers)
        _require(used == known or (used < known and bool(family.companions)), f"phases use {sorted(used)}")
        _require(bool(family.averaged), "averaged is empty")
        monitored = type(family).monitor
        _require(monitored is None or monitored in _held_out(family), f"no held-out loss {monitored!r}")


def check_losses_are_finite_scalars(name: str) -> None:
    """Every phase's loss is one finite number, also for pictures without a label."""
    for family in _built(name):
        for phase in family.phases:
            for batch in (_batch(family), _batch(family, unlabelled=True)):
                loss = _loss(family, phase.name, batch)
                _require(loss.total.ndim == 0, f"{phase.name}: the total has shape {tuple(loss.total.shape)}")
                _require(bool(torch.isfinite(loss.total)), f"{phase.name}: the total is {loss.total}")
                for part, value in loss.parts.items():
                    _require(value.numel() == 1, f"{phase.name}/{part} is not a scalar")


def check_held_out_losses_are_finite_and_repeatable(name: str) -> None:
    """Held-out losses are finite, one a picture or one for all, and the same for the same seed."""
    for family in _built(name):
        for batch in (_batch(family), _batch(family, unlabelled=True)):
            first, second = _held_out(family, batch), _held_out(family, batch)
            _require(bool(first) and first.keys() == second.keys(), "held_out gives no losses, or others each time")
            for loss, (values, levels) in first.items():
                shape = tuple(values.shape)
                _require(shape in ((), (1,), (len(batch.images),)), f"{loss}: held-out values have shape {shape}")
                _require(bool(torch.isfinite(values).all()), f"{loss}: a held-out value is not finite")
                _require(torch.equal(values, second[loss].values), f"{loss}: the same seed gave another value")
                _require(levels is None or levels.shape == values.shape, f"{loss}: not one level a value")


def check_loss_is_repeatable(name: str) -> None:
    """The same seed gives the same loss, and computing it changes no parameter."""
    for family in _built(name):
        before = {key: value.clone() for key, value in family.named_parameters()}
        for phase in family.phases:
            first, second = (_loss(copy.deepcopy(family), phase.name, _batch(family)).total for _ in range(2))
            _require(torch.equal(first, second), f"{phase.name}: {first} then {second}")
        for key, value in family.named_parameters():
            _require(torch.equal(value, before[key]), f"loss() changed {key}")


def check_every_parameter_learns(name: str) -> None:
    """Each trained parameter gets a gradient in some phase, and no phase leaves one outside what it trains."""
    for family in _built(name):
        reached: set[str] = set()
        for phase in family.phases:
            trained = _unfreeze(family, phase)
            _loss(family, phase.name, _batch(family)).total.backward()
            graded = {key for key, p in family.named_parameters() if p.grad is not None}
            _require(all(key.startswith(trained) for key in graded), f"{phase.name} reaches outside what it trains")
            reached |= graded
        parts = tuple(f"{part}." for phase in family.phases for part in phase.trains)
        missed = sorted(k for k, _ in family.named_parameters() if k.startswith(parts) and k not in reached)
        _require(not missed, f"no phase gives a gradient to {missed[:3]}")


def check_mixed_precision(name: str) -> None:
    """Every phase's loss and gradients are finite under autocast to bfloat16."""
    family = next(_built(name))
    for phase in family.phases:
        _unfreeze(family, phase)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            total = _loss(family, phase.name, _batch(family)).total
        _require(bool(torch.isfinite(total)), f"{phase.name}: the total is {total} in bfloat16")
        total.backward()
        graded = {key: p.grad for key, p in family.named_parameters() if p.grad is not None}
        broken = [key for key, grad in graded.items() if not grad.isfinite().all()]
        _require(not broken, f"{phase.name}: in bfloat16 the gradient of {broken[:3]} is not finite")


def check_samples(name: str) -> None:
    """Pictures have the right shape, type and range, and hold no NaN."""
    for family in _drawing(name):
        images = _sample(family, range(4))
        _require(images.shape == (4, *SHAPE), f"sample gave {tuple(images.shape)} for pictures of {SHAPE}")
        _require(images.dtype == torch.float32, f"sample gave {images.dtype}")
        _require(bool(images.isfinite().all()), "not finite")
        _require(family.latents or float(images.abs().max()) <= 1.001, "outside [-1, 1]")


def check_samples_depend_on_seed_alone(name: str) -> None:
    """The same seed gives the same picture, whatever else is in the batch; another seed gives another one."""
    for family in _drawing(name):
        torch.manual_seed(0)
        state = torch.get_rng_state()
        together = _sample(family, [5, 6, 7])
        _require(torch.equal(state, torch.get_rng_state()), "sample drew from the global generator")
        _require(torch.equal(together, _sample(family, [5, 6, 7])), "the same seeds gave other pictures")
        _require(torch.allclose(together[1], _sample(family, [6])[0], atol=1e-4), "depends on the rest of the batch")


def check_samples_take_labels_or_none(name: str) -> None:
    """A family with classes draws a given class, any class (-1), or without being told."""
    for family in _drawing(name):
        for labels in (torch.tensor([0, -1]), None) if family.num_classes else (None,):
            noise = seeded_noise([1, 2], family.noise_shape())
            _require(family.sample(noise, Condition(labels=labels)).shape == (2, *SHAPE), f"labels {labels}")


def check_reconstructions(name: str) -> None:
    """Where a family reconstructs, shape and range are those of its input, and the answer is repeatable."""
    for family in _drawing(name):
        images = _batch(family).images
        first, second = family.eval().reconstruct(images), family.eval().reconstruct(images)
        if first is not None and second is not None:
            _require(first.shape == images.shape, f"reconstruct gave {tuple(first.shape)}")
            _require(torch.equal(first, second), "not repeatable")
            _require(family.latents or float(first.abs().max()) <= 1.001, "out of range")


def check_judges(name: str) -> None:
    """A family that judges gives one row of features and one score a class for every picture."""
    for family in _built(name):
        if not family.draws:
            images = _batch(family).images
            family.eval()
            _require(family.features(images).ndim == 2 and len(family.features(images)) == len(images), "features")
            _require(family.predict(images).shape == (len(images), family.num_classes), "predict")


def check_training_is_repeatable(name: str) -> None:
    """Two runs of one recipe end in the same bits."""
    with _trained(name, 4) as first, _trained(name, 4) as second:
        _require_equal(first, second, "two runs of one recipe differ")


def check_resume_is_exact(name: str) -> None:
    """Stopping, and continuing from the checkpoint, gives the bits of the uninterrupted run."""
    with _trained(name, 6) as whole, tempfile.TemporaryDirectory() as folder:
        first = _trainer(name, Path(folder), steps=6)
        for _ in range(3):
            first.step()
        first.time_event("checkpoint")
        second = _trainer(name, Path(folder), steps=6)
        _require(second.restore(), "no checkpoint was found")
        for _ in range(3):
            second.step()
        _require_equal(whole, second, "the resumed run differs from the uninterrupted one")


def check_accumulates(name: str) -> None:
    """A batch can be computed in parts."""
    with _trained(name, 2, {"train": {"accumulate": 2}}) as trainer:
        _require(trainer.state.nimg == 2 * trainer.images_per_step, "wrong count of images")
        _require(trainer.loader.size * 2 == trainer.config.batch, "the batch was not computed in two parts")
        with _trained(name, 0, {"train": {"accumulate": 2}}) as untrained:
            before, after = untrained.family.state_dict(), trainer.family.state_dict()
            _require(any(not torch.equal(before[key], after[key]) for key in before), "nothing was learned")


def check_weights_file_draws_the_same(name: str) -> None:
    """The weights file alone draws what the trainer draws."""
    with _trained(name, 2) as trainer:
        trainer.time_event("checkpoint")
        model = load_model(trainer.run.weights(), "cpu")
        twin = trainer.inference_twin()
        _require(model.class_names == trainer.train_source.class_names, "class names were lost")
        if twin.draws:
            labels = [0, 1] if twin.num_classes else [-1, -1]
            _require(torch.equal(draw(twin, [1, 2], labels), draw(model.family, [1, 2], labels)), "other pictures")


def check_learns_a_toy(name: str) -> None:
    """After a short training on one-coloured pictures the pictures drawn are nearer to them.

    They are looked at five times in 150 steps; it has learned when two looks in a row find them so, or the last one.
    """
    steps, looks = 150, 5
    # Papers' learning rates are for wide networks and long runs; these are small and have no time.
    optim = {key: {"lr": max(one.lr, TOY_LR)} for key, one in _recipe(name).optim.items()}
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(name, Path(folder), steps, {"optim": optim})
        target = trainer.train_source.read(range(24)).images.float().mean() / 127.5 - 1
        seen = [_distance(trainer, target)]
        while len(seen) <= looks and not all(each < 0.7 * seen[0] for each in seen[-2:]):
            for _ in range(steps // looks):
                trainer.step()
            seen.append(_distance(trainer, target))
        _require(seen[-1] < 0.7 * seen[0], f"distance to the pictures went from {seen[0]:.3g} to {seen[-1]:.3g}")


# -- how they are made ------------------------------------------------------------------------------------------------


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise AssertionError(sentence)


def _recipe(name: str, settings: dict | None = None, steps: int = 4) -> Recipe:
    base = {
        "train": {
            "batch": 8,
            "total_kimg": steps * 8 / 1000,
            "precision": "fp32",
            "device": "cpu",
            "compile": "off",
            "warmup_fraction": 0.0,
            "schedule": "constant",
            "averages": [{"sigma_rel": 0.1}, {"kind": "exponential", "halflife_kimg": 0.05}],
        }
    }
    small = {"family": dict(registry.load(registry.locate(name)).check_settings)}
    return recipes.resolve(name, merge(base, small, settings or {}))


def _built(name: str) -> Iterator[Family]:
    """The family with classes and, where it can be built so, without."""
    for num_classes in (CLASSES, 0):
        torch.manual_seed(0)
        try:
            yield recipes.build(_recipe(name), SHAPE, num_classes)
        except RecipeError:
            _require(num_classes == 0, "cannot be built for a small labelled set")


def _drawing(name: str) -> Iterator[Family]:
    for family in _built(name):
        if family.draws:
            yield family.eval().requires_grad_(False)


def _batch(family: Family, unlabelled: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(6, *SHAPE, generator=generator) * 2 - 1
    if not family.num_classes:
        return Batch(images)
    return Batch(images, torch.tensor([0, 1, 2, 0, -1, 1] if not unlabelled else [-1] * 6))


def _unfreeze(family: Family, phase: Phase) -> tuple[str, ...]:
    """Make what a phase trains learn, without gradients from before, and nothing else; the prefixes of its names."""
    trained = tuple(f"{part}." for part in phase.trains)
    for key, parameter in family.named_parameters():
        parameter.requires_grad_(key.startswith(trained))
        parameter.grad = None
    return trained


def _loss(family: Family, phase: str, batch: Batch) -> Loss:
    torch.manual_seed(mix("check", phase))
    return family.train().loss(phase, batch, Progress(0, 1000))


def _held_out(family: Family, batch: Batch | None = None) -> Mapping[str, HeldOut]:
    torch.manual_seed(mix("check", "held out"))
    return family.eval().held_out(batch or _batch(family), Progress(0, 1000))


def _sample(family: Family, seeds: Sequence[int]) -> Tensor:
    labels = torch.zeros(len(seeds), dtype=torch.int64) if family.num_classes else None
    return family.sample(seeded_noise(seeds, family.noise_shape()), Condition(labels=labels))


def _trainer(name: str, folder: Path, steps: int, settings: dict | None = None) -> Trainer:
    recipe = _recipe(name, settings, steps)
    torch.manual_seed(mix(recipe.train.seed, "initialisation"))
    family = recipes.build(recipe, SHAPE, CLASSES)
    run = Run.create(folder / "run", write_toml(recipe), {"average": recipe.train.averages[0].name})
    return Trainer(recipe, family, Toy(), Toy(), run, Silent())


@contextmanager
def _trained(name: str, steps: int, settings: dict | None = None) -> Iterator[Trainer]:
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(name, Path(folder), max(steps, 4), settings)
        for _ in range(steps):
            trainer.step()
        yield trainer


def _distance(trainer: Trainer, target: Tensor) -> float:
    """How far the model is from the toy: of its pictures, or of its predictions for a family that judges."""
    twin = trainer.inference_twin()
    if not twin.draws:
        batch = trainer.loader.batch(0)
        scores = twin.predict(batch.images).softmax(1)
        return float(1 - scores.gather(1, batch.labels[:, None]).mean())  # type: ignore[index]
    images = draw(twin, range(12), [index % CLASSES for index in range(12)])
    return float((images.float() / 127.5 - 1 - target).abs().mean())


def _require_equal(first: Trainer, second: Trainer, sentence: str) -> None:
    def tensors(trainer: Trainer) -> dict[str, Tensor]:
        everything = {f"model/{k}": v for k, v in trainer.family.state_dict().items()}
        everything |= {f"{name}/{k}": v for name, a in trainer.averages.items() for k, v in a.state_dict().items()}
        return everything | trainer.optimizer_tensors()

    ours, theirs = tensors(first), tensors(second)
    _require(ours.keys() == theirs.keys(), f"{sentence}: other tensors")
    different = [key for key in ours if not torch.equal(ours[key], theirs[key])]
    _require(not different, f"{sentence}: {different[:3]}")
