"""The trainer's promises, with families of a few numbers: phases, accumulation, memory, schedules."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest
import torch

from imagekiln.config import FamilyConfig, Recipe, write_toml
from imagekiln.core import Family, Loss, Phase
from imagekiln.engine.guard import Guard
from imagekiln.engine.run import Run
from imagekiln.engine.tracker import Silent
from imagekiln.engine.trainer import Trainer
from imagekiln.errors import CheckpointError, OutOfMemory
from imagekiln.testing import Toy


class Config(FamilyConfig):
    name: str = "linear"


class Linear(Family):
    """A least-squares fit without randomness, which notes what it was asked."""

    Config = Config
    optimizers = {"net": {}}
    phases: tuple[Phase, ...] = (Phase("fit", trains=("net",)),)
    averaged = ("net",)
    largest = 10**9
    full: Exception = torch.OutOfMemoryError("a picture too many")

    def __init__(self, phases: tuple[Phase, ...] = (Phase("fit", trains=("net",)),)) -> None:
        super().__init__(Config(), (3, 16, 16), 3)
        torch.manual_seed(0)
        self.net, self.other = torch.nn.Linear(768, 3), torch.nn.Linear(768, 3)
        self.phases, self.asked, self.ended = phases, [], 0

    def loss(self, phase, batch, progress):
        if len(batch.images) > self.largest:
            raise self.full
        trained = [name for name, child in self.named_children() if child.weight.requires_grad]
        self.asked.append((phase, progress.nimg, tuple(trained), batch.images.flatten(1).sum(1).tolist()))
        scores = sum(getattr(self, name)(batch.images.flatten(1)) for name in trained or ["net"])
        return Loss((scores - torch.nn.functional.one_hot(batch.labels, 3)).square().mean())

    def after_step(self, progress):
        self.ended += 1

    def sample(self, noise, condition, options=None):
        return noise.clamp(-1, 1)

    def noise_shape(self):
        return self.image_shape


def trainer(
    folder: Path,
    family: Linear | None = None,
    lr: float = 0.01,
    optimizer: dict[str, object] | None = None,
    **train: object,
) -> Trainer:
    family = family or Linear()
    settings = {
        "batch": 8,
        "total_kimg": 0.16,
        "precision": "fp32",
        "device": "cpu",
        "compile": "off",
        "schedule": "constant",
        "warmup_fraction": 0,
        "clip_norm": 0,
        **train,
    }
    optim = {phase.optimizer: {"name": "sgd", "lr": lr, **(optimizer or {})} for phase in family.phases}
    recipe = Recipe.model_validate({"family": {"name": "linear"}, "optim": optim, "train": settings})
    run = Run.create(folder / str(len(list(folder.iterdir()))), write_toml(recipe), {})
    return Trainer(recipe, family, Toy(), Toy(), run, Silent())


def steps(made: Trainer, count: int) -> Trainer:
    for _ in range(count):
        made.step()
    return made


def weights(made: Trainer) -> torch.Tensor:
    return made.family.net.weight.detach()  # type: ignore[union-attr]


@pytest.mark.parametrize(("parts", "size"), [(2, 4), (3, 2), (4, 2), (8, 1), (20, 1)])
def test_a_batch_in_parts_learns_the_same(tmp_path: Path, parts: int, size: int) -> None:
    """Of every picture of a batch, also where so many parts would not be equal."""
    whole, split = steps(trainer(tmp_path), 5), steps(trainer(tmp_path, accumulate=parts), 5)
    assert split.loader.size == size and split.state.nimg == whole.state.nimg == 40
    assert torch.allclose(weights(whole), weights(split), atol=1e-6)
    assert not torch.equal(weights(whole), weights(steps(trainer(tmp_path), 4)))


def refused() -> Exception:
    """What torch says on a CPU to an allocation that cannot be."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    return caught.value


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), MemoryError(), refused()])
def test_out_of_memory_halves_the_parts_and_learns_the_same(tmp_path: Path, error: Exception) -> None:
    small = Linear()
    small.largest, small.full = 2, error
    made = steps(trainer(tmp_path, small), 5)
    assert made.state.accumulate == 4 and made.loader.size == 2
    assert [event["kind"] for event in made.run.events()] == ["memory", "memory"]
    assert torch.allclose(weights(made), weights(steps(trainer(tmp_path), 5)), atol=1e-6)


def test_another_error_is_none_of_memory(tmp_path: Path) -> None:
    broken = Linear()
    broken.largest, broken.full = 0, RuntimeError("shapes differ")
    with pytest.raises(RuntimeError, match="shapes differ"):
        trainer(tmp_path, broken).step()


@pytest.mark.parametrize(("batch", "parts"), [(6, [1, 2, 6]), (12, [1, 2, 4, 12]), (7, [1, 7])])
def test_parts_divide_every_batch_down_to_one_picture(tmp_path: Path, batch: int, parts: list[int]) -> None:
    for fewer, more in itertools.pairwise(parts):
        small = Linear()
        small.largest = batch // more
        made = steps(trainer(tmp_path, small, batch=batch, accumulate=fewer), 1)
        assert made.state.accumulate == more and made.loader.size == batch // more


def test_when_one_picture_does_not_fit_it_says_what_to_lower(tmp_path: Path) -> None:
    none = Linear()
    none.largest = 0
    with pytest.raises(OutOfMemory, match=r"1 picture.*data\.size.*train\.batch"):
        trainer(tmp_path, none).step()


def test_the_parts_found_by_running_out_of_memory_are_kept_on_resuming(tmp_path: Path) -> None:
    small = Linear()
    small.largest = 4
    first = steps(trainer(tmp_path, small), 2)
    first.time_event("checkpoint")
    second = Trainer(first.recipe, Linear(), Toy(), Toy(), first.run, Silent())
    assert second.restore() and second.loader.size == 4


def test_lazy_phases_share_the_optimizer_and_are_scaled(tmp_path: Path) -> None:
    lazy = Linear((Phase("main", trains=("net",)), Phase("penalty", trains=("net",), every=4)))
    made = trainer(tmp_path, lazy)
    assert list(made.optimizers) == ["net"]
    steps(made, 9)
    assert [nimg for phase, nimg, *_ in lazy.asked if phase == "penalty"] == [0, 32, 64]
    assert len([1 for phase, *_ in lazy.asked if phase == "main"]) == 9 and lazy.ended == 9


def test_every_k_steps_counts_k_times(tmp_path: Path) -> None:
    """One step of a phase with every = 4 moves the weights as far as the gradient times four."""
    plain = trainer(tmp_path, Linear((Phase("fit", trains=("net",)),)), lr=0.04)
    lazy = trainer(tmp_path, Linear((Phase("fit", trains=("net",), every=4),)), lr=0.01)
    assert torch.allclose(weights(steps(plain, 1)), weights(steps(lazy, 1)), atol=1e-6)


def test_repeats_see_fresh_pictures_and_count_them(tmp_path: Path) -> None:
    critic = Linear((Phase("critic", trains=("other",), repeat=3), Phase("fit", trains=("net",))))
    made = steps(trainer(tmp_path, critic, batch=4), 2)
    assert made.images_per_step == 12 and made.state.nimg == 24
    assert [phase for phase, *_ in critic.asked] == ["critic", "critic", "critic", "fit"] * 2
    seen = [made.loader.order(nimg, 4).tolist() for nimg in (0, 4, 8)]
    assert len({tuple(rows) for rows in seen}) == 3
    sums = [images for phase, nimg, _, images in critic.asked if phase == "critic" and nimg == 0]
    expected = [made.train_source.read(rows).images.float().flatten(1) / 127.5 - 1 for rows in seen]
    for got, images in zip(sums, expected, strict=True):
        assert got == pytest.approx(images.sum(1).tolist(), rel=1e-5)


def test_a_phase_rests_where_it_says_and_then_counts_once(tmp_path: Path) -> None:
    phases = (Phase("critic", trains=("other",)), Phase("fit", trains=("net",), rests=lambda step: step < 2))
    family = Linear(phases)
    made = steps(trainer(tmp_path, family, batch=4), 4)
    assert [phase for phase, *_ in family.asked] == ["critic"] * 3 + ["fit", "critic", "fit"]
    assert made.state.nimg == 16


def test_what_draws_shares_its_weights(tmp_path: Path) -> None:
    """They may be most of the memory: those of the average asked for, and the live ones of what is not averaged."""
    averages = [{"sigma_rel": 0.05}, {"sigma_rel": 0.2}]
    made = steps(trainer(tmp_path, averages=averages), 5)
    for name in ("power-0.200", "power-0.050", "power-0.200"):
        twin = made.inference_twin(name)
        own, kept = dict(twin.named_parameters()), made.averages[name].state_dict()
        assert kept and all(own[key].data_ptr() == tensor.data_ptr() for key, tensor in kept.items())
        assert not any(parameter.requires_grad for parameter in own.values()) and not twin.training
    drawn = twin.net.weight.clone()
    assert not torch.equal(drawn, weights(made)) and made.family.net.weight.requires_grad
    steps(made, 1)
    assert not torch.equal(made.inference_twin("power-0.200").net.weight, drawn)


def test_a_phase_freezes_what_it_does_not_train(tmp_path: Path) -> None:
    both = Linear((Phase("a", trains=("net",)), Phase("b", trains=("other",)), Phase("c", trains=("net", "other"))))
    made = steps(trainer(tmp_path, both), 2)
    assert [trained for _, _, trained, _ in both.asked] == [("net",), ("other",), ("net", "other")] * 2
    assert sorted(made.optimizers) == ["net", "net-other", "other"]


def rates(made: Trainer) -> list[float]:
    found = []
    while made.state.nimg < made.total_nimg:
        made.step()
        found.append(next(iter(made.optimizers.values())).param_groups[0]["lr"])
    return found


def test_the_schedule_counts_images_not_steps(tmp_path: Path) -> None:
    """What a linear decay spends over the run per image does not depend on the batch."""
    for batch in (4, 8, 16):
        spent = rates(trainer(tmp_path, batch=batch, schedule="linear"))
        assert sum(spent) / len(spent) == pytest.approx(0.01 / 2)
        assert spent == sorted(spent, reverse=True)
    warm = rates(trainer(tmp_path, warmup_fraction=0.5))
    assert warm[:10] == sorted(warm[:10]) and warm[10:] == [pytest.approx(0.01)] * 10


def test_the_rate_may_end_above_zero_and_the_second_beta_may_rise(tmp_path: Path) -> None:
    adam = {"name": "adam", "betas": (0.0, 0.99), "beta2_start": 0.9}
    made = trainer(tmp_path, optimizer=adam, schedule="linear", end_lr_ratio=0.25)
    (group,) = [group for group in made.optimizers["net"].param_groups if any(p.ndim == 2 for p in group["params"])]
    seen = []
    for _ in range(20):
        made.step()
        seen.append((group["lr"], *group["betas"]))
    rates_, first, second = zip(*seen, strict=True)
    assert rates_[0] == pytest.approx(0.01 * (1 - 0.75 / 40)) and rates_[-1] == pytest.approx(0.01 * (0.25 + 0.75 / 40))
    assert set(first) == {0.0} and list(second) == sorted(second)
    assert second[0] == pytest.approx(0.9, abs=1e-3) and second[-1] == pytest.approx(0.99, abs=1e-3)
    assert sum(second) / 20 == pytest.approx(0.945)


def test_no_gradient_is_longer_than_the_clip(tmp_path: Path) -> None:
    made = trainer(tmp_path, lr=1.0, clip_norm=1e-3)
    before = weights(made).clone()
    made.step()
    assert float((weights(made) - before).norm()) <= 1.001e-3


def test_order_of_pictures_depends_on_the_seed_alone(tmp_path: Path) -> None:
    one, same, other = (trainer(tmp_path, seed=seed) for seed in (1, 1, 2))
    assert one.loader.order(0, 48).tolist() == same.loader.order(0, 48).tolist() != other.loader.order(0, 48).tolist()


def test_patience_stops_a_run(tmp_path: Path) -> None:
    made = trainer(tmp_path, patience=2, validate_kimg=0.008, total_kimg=10)
    type(made.family).monitor = "fit"
    try:
        for parameter in made.family.parameters():
            parameter.data.zero_()
        made.recipe.optim["net"].__dict__["lr"] = 0.0
        state = made.fit()
    finally:
        type(made.family).monitor = None
    assert state.nimg == 24 and made.run.status()["state"] == "finished"


def test_a_checkpoint_of_another_network_is_refused_in_words(tmp_path: Path) -> None:
    first = steps(trainer(tmp_path), 1)
    first.time_event("checkpoint")
    other = Linear()
    other.net = torch.nn.Linear(768, 4)
    with pytest.raises(CheckpointError, match="does not fit this recipe's networks"):
        Trainer(first.recipe, other, Toy(), Toy(), first.run, Silent()).restore()


def test_weights_that_are_not_numbers_are_not_saved(tmp_path: Path) -> None:
    made = steps(trainer(tmp_path), 1)
    with torch.no_grad():
        made.family.net.weight[0, 0] = float("nan")
    made.time_event("checkpoint")
    assert not list(made.run.checkpoints.iterdir()) and made.run.events()[-1]["kind"] == "non-finite"


def test_going_back_finds_the_weights_of_the_best_moment_before(tmp_path: Path) -> None:
    """A better moment that came after the checkpoint is forgotten with what followed; the one before is still there."""
    made = trainer(tmp_path)
    average = next(iter(made.averages))
    steps(made, 1)._keep_best({average: 1.0})
    steps(made, 1).save()
    steps(made, 1)._keep_best({average: 0.5})
    assert made.run.weights() == made.run.weights_path(24, average)
    made.go_back(16)
    assert (made.state.best_nimg, made.state.best_loss) == (8, 1.0)
    steps(made, 2).save()
    assert made.run.weights() == made.run.weights_path(8, average)
    assert not made.run.weights_path(24, average).is_file()


def test_what_was_gone_back_on_is_no_part_of_a_rate(tmp_path: Path) -> None:
    made = steps(trainer(tmp_path), 1)
    made.save()
    steps(made, 3)
    made._tick_nimg, made._tick_sec = made.state.nimg, time.monotonic()
    made.go_back(8)
    steps(made, 1)._tick(time.monotonic())
    row = made.run.stats()[-1]
    assert row["nimg"] == 16 and row["img_per_sec"] > 0


def spoilt(folder: Path, bad: dict[int, float], late: bool, **optimizer: object) -> Trainer:
    """A training whose loss is multiplied by what `bad` says after so many images."""

    class Spoilt(Linear):
        def loss(self, phase, batch, progress):
            told = super().loss(phase, batch, progress)
            return Loss(told.total * bad.get(progress.nimg, 1.0))

    made = trainer(folder, Spoilt(), optimizer={"name": "adam", **optimizer})
    made.guard = Guard(late)
    return made


@pytest.mark.parametrize("bad_nimg", [0, 16])
@pytest.mark.parametrize("name", ["adam", "sgd", "rmsprop"])
def test_an_update_is_left_out_also_where_the_host_hears_of_it_later(tmp_path: Path, name: str, bad_nimg: int) -> None:
    """Weights and what the optimizer remembers are those of a training without that step, early and late."""
    more = {} if name == "adam" else {"momentum": 0.9}
    soon, late = (
        steps(spoilt(tmp_path, {bad_nimg: float("nan")}, late, name=name, **more), 4) for late in (False, True)
    )
    told = {True: late.run.events(), False: soon.run.events()}
    heard = ["non-finite"] if bad_nimg == 0 else []  # two steps later
    assert [event["kind"] for event in told[False]] == ["non-finite"]
    assert [event["kind"] for event in told[True]] == heard
    late.save()
    assert [event["sentence"] for event in late.run.events()] == [event["sentence"] for event in told[False]]
    assert late.state.skipped_nimg == soon.state.skipped_nimg == [bad_nimg + 8]
    assert torch.equal(weights(soon), weights(late))
    ours, theirs = soon.optimizer_tensors(), late.optimizer_tensors()
    assert ours and ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_going_back_is_the_same_whenever_it_is_heard_of(tmp_path: Path) -> None:
    ended = []
    for late in (False, True):
        once = {16: float("inf"), 24: float("nan"), 32: float("nan")}
        made = spoilt(tmp_path, once, late)
        made.save()
        while made.state.nimg < 64:
            made.step()
            if made.state.rollbacks:
                once.clear()
        assert (made.state.rollbacks, made.state.lr_scale, made.state.attempt) == (1, 0.5, 1)
        ended.append(made)
    assert torch.equal(weights(ended[0]), weights(ended[1]))


def test_the_last_step_is_looked_at_before_a_training_ends(tmp_path: Path) -> None:
    made = spoilt(tmp_path, {152: float("nan")}, late=True)
    made.fit()
    assert [event["kind"] for event in made.run.events()] == ["non-finite"]


def hot(folder: Path, temperature: float, schedule: str = "constant", name: str = "sgd", total_kimg: float = 0.16):
    made = trainer(folder, total_kimg=total_kimg)
    warm = {"temperature": temperature, "schedule": schedule}
    optim = {"net": {"name": name, "lr": 0.01, "momentum": 0.5 if name == "sgd" else 0.0, "langevin": warm}}
    recipe = Recipe.model_validate({**made.recipe.model_dump(), "optim": optim})
    return Trainer(recipe, Linear(), Toy(), Toy(), made.run, Silent())


@pytest.mark.parametrize("name", ["sgd", "adamw", "rmsprop"])
def test_a_hot_run_is_continued_bit_for_bit(tmp_path: Path, name: str) -> None:
    whole = steps(hot(tmp_path, 5.0, "cosine", name), 8)
    first = steps(hot(tmp_path, 5.0, "cosine", name), 4)
    first.time_event("checkpoint")
    second = Trainer(first.recipe, Linear(), Toy(), Toy(), first.run, Silent())
    assert second.restore() and second.state.nimg == 32
    assert torch.equal(weights(steps(second, 4)), weights(whole))
    assert not torch.equal(weights(steps(hot(tmp_path, 0.0, "constant", name), 8)), weights(whole))


def test_the_heat_follows_its_schedule(tmp_path: Path) -> None:
    cold = steps(hot(tmp_path, 0.0, total_kimg=0.08), 10)
    falling, constant = (hot(tmp_path, 50.0, schedule, total_kimg=0.08) for schedule in ("linear", "constant"))
    far = [float((weights(steps(made, 10)) - weights(cold)).norm()) for made in (falling, constant)]
    assert 0.2 * far[1] < far[0] < 0.9 * far[1]
    group = falling.optimizers["net"].param_groups[0]
    assert group["noise_diffusion"] == 50.0 / len(Toy()) and group["noise_factor"] == pytest.approx(0.1, abs=1e-6)
