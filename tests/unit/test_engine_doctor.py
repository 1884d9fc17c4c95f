"""The doctor: illnesses fire on their own histories alone, nothing is turned too far, and resume is exact."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from imagekiln.config import FamilyConfig, Recipe, write_toml
from imagekiln.core import Batch, Family, HeldOut, Loss, Phase, mix
from imagekiln.data import to_float
from imagekiln.engine import recipe as recipes
from imagekiln.engine.doctor import ILLNESSES, Finding, History, diagnose
from imagekiln.engine.doctor import acts as acting
from imagekiln.engine.doctor.chart import Chart, Haven
from imagekiln.engine.doctor.practice import LOOKS, SHARE, affordable
from imagekiln.engine.doctor.signals import AT_ONCE, KINDS, Real, grid_power, label_effect, pooled, spread
from imagekiln.engine.run import Run
from imagekiln.engine.tracker import Silent
from imagekiln.engine.trainer import Trainer

# -- illnesses as functions of a history ------------------------------------------------------------------------------


def healthy(count: int, seed: int = 0) -> list[dict[str, float]]:
    """Looks of an adversarial run that goes well, every number with some noise."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        noise = (1 + 0.1 * torch.randn(16, generator=generator).clamp(-2, 2)).tolist()
        grown = min(1.0, 0.2 + index / 12)
        row = {
            "nimg": 1000 * (index + 1),
            "judge/loss": 1.2 * noise[0],
            "judge/on_real": 0.5 * noise[1],
            "judge/on_fake": -0.5 * noise[2],
            "judge/grad_norm": 2.0 * noise[3],
            "draw/loss": 0.8 * noise[4],
            "draw/grad_norm": 1.0 * noise[5],
        }
        if index % 2:
            row |= {
                "drawn/diversity": 0.95 * grown * noise[6],
                "drawn/missing": max(0.0, 0.9 - grown) * noise[7],
                "drawn/grid": 1.2 * noise[8],
                "drawn/copies": 0.0,
                "drawn/label_effect": 0.9 * grown * noise[9],
                "probe/train": 0.5 * noise[10],
                "probe/held_out": 0.5 * noise[11],
                "probe/fake": -0.5 * noise[12],
                "dial/augment_p": 0.3,
            }
        rows.append(row)
    return rows


def fitting(count: int, seed: int = 0) -> list[dict[str, float]]:
    """Looks of an autoencoder or denoiser that goes well."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        noise = (1 + 0.05 * torch.randn(6, generator=generator).clamp(-2, 2)).tolist()
        rows.append(
            {
                "nimg": 1000 * (index + 1),
                "fit/loss": (0.1 + math.exp(-index / 4)) * noise[0],
                "fit/grad_norm": (0.5 + math.exp(-index / 8)) * noise[1],
                "fit/divergence_nats": 12.0 * noise[2],
                "fit/perplexity": min(60.0, 8.0 * (index + 1)) * noise[3],
                "held_out/fit@0.5": (0.1 + math.exp(-index / 4)) * noise[4],
                "held_out/fit@2": (0.2 + math.exp(-index / 4)) * noise[5],
            }
        )
    return rows


def overlaid(rows: list[dict[str, float]], **changes: object) -> list[dict[str, float]]:
    """The last six looks with other values; a list gives one for each, for a look that has the key."""
    keys = {name.replace("__", "/"): value for name, value in changes.items()}
    tail = [
        row | {key: value[index] if isinstance(value, list) else value for key, value in keys.items() if key in row}
        for index, row in enumerate(rows[-6:])
    ]
    return [*rows[:-6], *tail]


SICK = {
    "mode collapse": lambda: overlaid(healthy(32), drawn__diversity=0.2),
    "mode drop": lambda: overlaid(healthy(32), drawn__missing=0.45),
    "discriminator overfitting": lambda: overlaid(healthy(32), probe__held_out=0.0),
    "vanishing gradient": lambda: overlaid(
        healthy(32), judge__loss=0.01, judge__on_real=6.0, judge__on_fake=-6.0, draw__grad_norm=0.02
    ),
    "exploding gradient": lambda: overlaid(healthy(32), judge__grad_norm=[2.0, 2.0, 2.0, 2.0, 2.0, 300.0]),
    "oscillation": lambda: [
        row | {"judge/on_real": (-1.0) ** index + 0.1, "judge/on_fake": 0.0} for index, row in enumerate(healthy(32))
    ],
    "checkerboard": lambda: overlaid(healthy(32), drawn__grid=9.0),
    "memorization": lambda: overlaid(healthy(32), drawn__copies=0.8),
    "dead code-book": lambda: overlaid(fitting(32), fit__perplexity=1.2),
    "posterior collapse": lambda: overlaid(fitting(32), fit__divergence_nats=0.01),
    "divergence": lambda: overlaid(fitting(32), fit__loss=0.9),
    "ignored labels": lambda: overlaid(healthy(32), drawn__label_effect=0.02),
    "leaking augmentation": lambda: overlaid(healthy(32), dial__augment_p=2.0),
}


def names(rows: list[dict[str, float]], total_nimg: int = 64_000) -> set[str]:
    return {finding.illness.name for finding in diagnose(History(rows, total_nimg))}


def test_every_illness_has_a_planted_history() -> None:
    assert set(SICK) == {illness.name for illness in ILLNESSES} and len(SICK) >= 12


@pytest.mark.parametrize("illness", SICK)
def test_an_illness_is_named_and_nothing_else(illness: str) -> None:
    assert names(SICK[illness]()) == {illness}


@pytest.mark.parametrize("seed", range(3))
def test_healthy_histories_are_left_alone_at_every_look(seed: int) -> None:
    for rows in (healthy(63, seed), fitting(63, seed)):
        for length in range(1, len(rows) + 1):
            assert not names(rows[:length]), f"look {length}"


def test_nothing_to_look_at_is_no_illness() -> None:
    assert not names([]) and not names([{"nimg": 1000}])


def test_a_critic_that_knows_no_picture_by_heart_in_one_look_knows_none() -> None:
    """On average it does: probes of a few dozen pictures are noisy."""
    rows = healthy(32)
    for row, held_out in zip([row for row in rows if "probe/train" in row][-3:], (-0.9, -0.9, 0.9), strict=True):
        row |= {"probe/train": 0.5, "probe/held_out": held_out}
    assert not names(rows)
    [row for row in rows if "probe/train" in row][-1]["probe/held_out"] = 0.4
    assert names(rows) == {"discriminator overfitting"}


def test_one_bad_look_is_not_yet_a_collapse() -> None:
    rows = healthy(32)
    rows[-1]["drawn/diversity"] = 0.1
    assert not names(rows)


def test_a_young_network_goes_up_and_down() -> None:
    """It draws little, then less; kinds come and go; grids come and fade: none of that is an illness yet."""
    young = [
        {"drawn/diversity": spread, "drawn/missing": missing, "drawn/grid": grid, "drawn/copies": 0.0}
        for spread, missing, grid in [
            (0.36, 0.57, 1.3),
            (0.26, 0.22, 7.1),
            (0.20, 0.65, 3.1),
            (0.16, 0.95, 5.0),
            (0.31, 0.78, 7.0),
            (0.02, 0.85, 4.9),
            (0.20, 0.85, 4.3),
        ]
    ]
    rows = [{"nimg": 2000 * (place + 1), **row} for place, row in enumerate(young)]
    for count in range(1, len(rows) + 1):
        assert names(rows[:count]) == set(), count


def test_a_young_network_that_draws_one_thing_is_not_collapsed() -> None:
    rows = [row | ({"drawn/diversity": 0.1} if "drawn/diversity" in row else {}) for row in healthy(20)]
    assert "mode collapse" not in names(rows)
    assert "mode collapse" in names([r | ({"drawn/diversity": 0.1} if "drawn/grid" in r else {}) for r in healthy(50)])


@pytest.mark.parametrize("illness", ILLNESSES, ids=lambda illness: illness.name)
def test_the_sentence_is_one_and_shows_the_picture(illness) -> None:
    (finding,) = (f for f in diagnose(History(SICK[illness.name](), 64_000)) if f.illness is illness)
    sentence = finding.sentence(32.0, "samples/000032000.png")
    assert sentence.startswith(f"After 32 kimg it looks like {illness.name}: ") and sentence.endswith(".")
    assert (
        "samples/000032000.png" in sentence and "{" not in sentence and ". " not in sentence and "nan" not in sentence
    )
    assert illness.reads and illness.source
    assert set(illness.acts) <= {*acting.TURNS, "restore", "stop"}


def test_the_worst_noise_level_is_named() -> None:
    rows = overlaid(fitting(32), fit__loss=0.9)
    rows[-1]["held_out/fit@2"] = 5.0
    (finding,) = diagnose(History(rows, 64_000))
    assert "most at noise level 2" in finding.sentence(32.0, None)


# -- acts -------------------------------------------------------------------------------------------------------------


def test_nothing_is_turned_farther_than_four_times() -> None:
    chart = Chart()
    dials = {"gamma": torch.tensor(0.5), "augment_p": torch.tensor(3.0)}
    said = {name: [act(chart, dials, ["a", "b"], ["a"]) for _ in range(10)] for name, act in acting.TURNS.items()}
    assert all(0.25 <= factor <= 4 for factor in [*chart.lr.values(), *chart.dials.values()])
    assert float(dials["gamma"]) == 2.0
    assert float(dials["augment_p"]) == pytest.approx(0.85)
    assert chart.lr == {"a": 0.25, "b": 0.25}
    assert [line is not None for line in said["raise_gamma"]] == [True, True, *[False] * 8]
    assert said["clamp_p"][1:] == [None] * 9


def test_every_act_turns_something_of_a_family_that_exists() -> None:
    """An act whose dial nobody offers is a promise that nobody keeps."""
    named = {act for illness in ILLNESSES for act in illness.acts} - {"restore", "stop"}
    assert named == set(acting.TURNS)
    gan = recipes.build(recipes.resolve("stylegan2", {"family": {"augment": {"policy": "ada"}}}), (1, 8, 8), 0)
    gan.dials()["augment_p"].fill_(0.9)
    for name, act in acting.TURNS.items():
        assert act(Chart(), gan.dials(), ["discriminator", "generator"], ["discriminator"]), name


def test_what_is_not_there_is_not_turned() -> None:
    chart = Chart()
    assert acting.TURNS["raise_gamma"](chart, {}, ["a"], ["a"]) is None
    assert acting.TURNS["raise_gamma"](chart, {"gamma": torch.tensor(0.0)}, ["a"], ["a"]) is None
    assert acting.TURNS["lower_critic_lr"](chart, {}, ["a"], []) is None and chart == Chart()


@pytest.mark.parametrize("total_nimg", [10_000, 100_000, 1_000_000])
@pytest.mark.parametrize("cost", [0.1, 1.0, 6.0])
def test_looking_stays_within_its_share(total_nimg: int, cost: float) -> None:
    count, every = affordable(total_nimg, cost)
    assert count * cost * LOOKS / every <= SHARE * total_nimg


# -- moments to go back to --------------------------------------------------------------------------------------------


def chart_of(*moments: tuple[int, bool]) -> Chart:
    chart = Chart()
    for nimg, best in moments:
        chart.keep(Haven(nimg, best))
    return chart


@pytest.mark.parametrize(
    ("moments", "first", "then"),
    [
        ([(8, True), (16, True), (24, False), (32, False)], 16, 8),  # neither the last nor the oldest
        ([(8, True), (16, True), (24, True)], 24, 16),
        ([(8, True)], 8, 8),
        ([(8, False), (16, False), (24, False)], 16, 16),  # held-out pictures are not asked: the older of two
        ([(8, False), (16, False), (24, True)], 24, 16),
    ],
)
def test_it_goes_back_to_the_best_and_after_that_to_the_one_before(moments, first: int, then: int) -> None:
    chart = chart_of(*moments)
    haven = chart.haven("divergence")
    assert haven is not None and haven.nimg == first and len(chart.havens) <= 2
    haven.left_for.append("divergence")
    again, other = chart.haven("divergence"), chart.haven("mode drop")
    assert again is not None and again.nimg == then
    assert other is not None and other.nimg == first, "another illness says nothing against the best"


def test_who_was_never_well_has_nowhere_to_go_back_to() -> None:
    assert Chart().haven("divergence") is None


def test_charts_of_before_the_best_was_known_are_read() -> None:
    chart = Chart(havens=[8, 16])  # type: ignore[list-item]
    assert chart.havens == [Haven(8), Haven(16)] and chart.haven("divergence") == Haven(8)
    assert chart.keep(Haven(24, True)) and chart.haven("divergence") == Haven(24, True)


@pytest.mark.parametrize("best", [True, False, None])
def test_only_the_best_healthy_moments_are_kept(best: bool | None, tmp_path: Path) -> None:
    made = trainer(tmp_path, "act")
    made.state.doctor.rows = [{"nimg": 64}]
    made.doctor.hear({}, best)
    assert [haven.best for haven in made.state.doctor.havens] == ([] if best is False else [bool(best)])


# -- signals ----------------------------------------------------------------------------------------------------------


class Shades:
    """Grey pictures with a bright corner whose place is the label: one of four."""

    image_shape, num_classes, class_names, fingerprint = (1, 6, 6), 4, ("a", "b", "c", "d"), "shades"

    def __init__(self, count: int = 256, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(mix("shades", seed))
        self.labels = torch.arange(count) % 4
        self.images = torch.randint(0, 60, (count, 1, 6, 6), generator=generator, dtype=torch.uint8)
        for index, label in enumerate(self.labels.tolist()):
            self.images[index, :, 3 * (label // 2) :, 3 * (label % 2) :][:, :3, :3] += 150

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices) -> Batch:
        rows = torch.as_tensor(list(indices))
        return Batch(self.images[rows], self.labels[rows])


def test_signals_of_real_pictures_are_those_of_health() -> None:
    real, fresh = Real(Shades()), Shades(64, seed=1)
    found = real.look_at(fresh.images, fresh.labels.tolist())
    assert found["diversity"] == pytest.approx(1, abs=0.1) and found["label_effect"] == pytest.approx(1, abs=0.1)
    assert found["copies"] == 0 and found["grid"] < 2
    assert real.missing(real.kinds_of(fresh.images)) <= 0.2
    assert int(real.kinds_K.sum()) == 256 and len(real.kinds_K) == KINDS


def test_real_pictures_are_read_in_parts() -> None:
    asked: list[int] = []

    class Counted(Shades):
        def read(self, indices) -> Batch:
            asked.append(len(indices))
            return super().read(indices)

    source = Counted(150)
    real = Real(source)
    assert asked == [AT_ONCE, AT_ONCE, 150 - 2 * AT_ONCE]
    assert torch.equal(real.rows_MD, pooled(source.images)) and torch.equal(real.labels_M, source.labels)
    assert real.grid_power == pytest.approx(grid_power(source.images))


def test_signals_see_what_is_wrong() -> None:
    source = Shades()
    real, fresh = Real(source), Shades(64, seed=1)
    labels = fresh.labels.tolist()
    one = fresh.images[:4].repeat(16, 1, 1, 1)
    assert real.look_at(one, labels)["diversity"] < 0.01
    assert real.look_at(source.images[:64], labels)["copies"] == 1
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert abs(real.look_at(fresh.images[order], labels)["label_effect"]) < 0.2
    pattern = ((torch.arange(6)[:, None] + torch.arange(6)) % 2 * 120).to(torch.uint8)
    assert (
        real.look_at(fresh.images // 2 + pattern, labels)["grid"] > 3 > real.look_at(fresh.images // 2, labels)["grid"]
    )
    more = Shades(128, seed=1)
    half = more.images[more.labels < 2]
    assert 0.3 < real.missing(real.kinds_of(half)) < 0.7
    assert real.missing(real.kinds_of(half[:8])) < 0.3, "eight pictures cannot say that a tenth of the kinds is gone"


def test_spread_and_label_effect_are_what_they_say() -> None:
    rows = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 3
    pairs = [(i, j) for i in range(40) for j in range(40) if i != j]
    distance = {pair: float((rows[pair[0]].double() - rows[pair[1]].double()).norm()) for pair in pairs}
    alike = [distance[i, j] for i, j in pairs if labels[i] == labels[j]]
    other = [distance[i, j] ** 2 for i, j in pairs if labels[i] != labels[j]]
    assert spread(rows) == pytest.approx(sum(distance.values()) / len(pairs), rel=1e-5)
    assert spread(rows, labels) == pytest.approx(sum(alike) / len(alike), rel=1e-5)
    expected = (sum(other) / len(other)) / (sum(d**2 for d in alike) / len(alike))
    assert label_effect(rows, labels) == pytest.approx(expected, rel=1e-4)


def test_the_grid_is_the_spectrum_at_nyquist() -> None:
    images = torch.randint(0, 256, (3, 2, 6, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    spectrum = (torch.fft.fft2(images.double()) / 48).abs().square().mean((0, 1))
    expected = spectrum[3, 0] + spectrum[0, 4] + spectrum[3, 4]
    assert grid_power(images) == pytest.approx(float(expected))
    assert pooled(torch.zeros(2, 3, 40, 20, dtype=torch.uint8)).shape == (2, 3 * 16 * 16)


# -- a training -------------------------------------------------------------------------------------------------------


class Config(FamilyConfig):
    name: str = "game"


class Game(Family):
    """A generator and a critic of two layers, and a penalty whose weight is a dial."""

    Config = Config
    optimizers = {"critic": {}, "generator": {}}
    phases = (Phase("critic", trains=("critic",)), Phase("generator", trains=("generator",)))
    averaged = ("generator",)
    constant = False
    """Whether the generator has stopped listening to its noise."""

    def __init__(self) -> None:
        super().__init__(Config(), Shades.image_shape, 0)
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 36), nn.Tanh())
        self.critic = nn.Sequential(nn.Linear(36, 64), nn.ReLU(), nn.Linear(64, 1))
        self.register_buffer("gamma", torch.tensor(0.1))
        with torch.no_grad():
            self.generator[2].weight *= 6  # various from the start: what is tested is the doctor, not the game

    def loss(self, phase, batch, progress):
        fake = self.generator(torch.randn(len(batch.images), 8))
        if phase == "generator":
            return Loss(nn.functional.softplus(-self.critic(fake)).mean())
        on_real, on_fake = self.critic(batch.images.flatten(1)), self.critic(fake.detach())
        total = nn.functional.softplus(-on_real).mean() + nn.functional.softplus(on_fake).mean()
        squares = self.gamma * (on_real.square().mean() + on_fake.square().mean())
        return Loss(total + squares, {"on_real": on_real.mean(), "on_fake": on_fake.mean()})

    def dials(self):
        return {"gamma": self.gamma}

    def sample(self, noise, condition, options=None):
        return self.generator(noise).unflatten(1, self.image_shape)

    def noise_shape(self):
        return (8,)

    def drawing_cost(self):
        return 0.01


class Unlabelled(Shades):
    num_classes, class_names = 0, ()

    def read(self, indices) -> Batch:
        return super().read(indices)._replace(labels=None)


class Collapsing(Trainer):
    """From 25.6 kimg on, and only before the doctor acts, the generator stops listening to its noise."""

    sick_from_nimg = 25_600

    def step(self) -> None:
        if self.state.nimg >= self.sick_from_nimg and self.state.attempt == 0:
            with torch.no_grad():
                self.family.generator[0].weight.zero_()  # type: ignore[union-attr]
        super().step()


def trainer(
    folder: Path,
    doctor: str,
    run: Run | None = None,
    kind: type[Trainer] = Collapsing,
    family: Family | None = None,
    **more,
) -> Trainer:
    settings = {
        "batch": 128,
        "total_kimg": 51.2,
        "precision": "fp32",
        "device": "cpu",
        "compile": "off",
        "clip_norm": 0,
        "checkpoint_kimg": 12.8,
        "preview_kimg": 1000,
        "validate_kimg": 6.4,
        "averages": [{"kind": "exponential", "halflife_kimg": 0.2}],
        "doctor": doctor,
        **more,
    }
    optim = {"critic": {"name": "adam", "lr": 1e-4}, "generator": {"name": "adam", "lr": 1e-4}}
    recipe = Recipe.model_validate({"family": Config(), "optim": optim, "train": settings})
    run = run or Run.create(folder / f"{doctor}-{len(list(folder.iterdir()))}", write_toml(recipe), {})
    return kind(recipe, family or Game(), Unlabelled(), Unlabelled(96, seed=1), run, Silent())


def test_what_was_not_seen_yet_is_not_known_by_heart(tmp_path: Path) -> None:
    made = trainer(tmp_path, "watch", kind=Trainer)
    made.train_source = made.loader.source = Unlabelled(20_000)
    made.fit()
    probed = [row["nimg"] for row in made.state.doctor.rows if "probe/held_out" in row]
    looked = [row["nimg"] for row in made.state.doctor.rows if "drawn/diversity" in row]
    assert probed and probed == [nimg for nimg in looked if nimg >= 20_000] and looked[0] < 20_000


def tensors(made: Trainer) -> dict[str, torch.Tensor]:
    found = dict(made.family.state_dict()) | made.optimizer_tensors()
    for average in made.averages.values():
        found |= {f"average/{key}": value for key, value in average.state_dict().items()}
    return {key: value.clone() for key, value in found.items()}


def same(first: Trainer, second: Trainer) -> bool:
    ours, theirs = tensors(first), tensors(second)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def told(made: Trainer) -> list[dict]:
    return [event for event in made.run.events() if "values" in event]


@pytest.fixture(scope="module")
def acted(tmp_path_factory) -> Trainer:
    made = trainer(tmp_path_factory.mktemp("acted"), "act")
    made.fit()
    return made


@pytest.fixture(scope="module")
def watched(tmp_path_factory) -> Trainer:
    made = trainer(tmp_path_factory.mktemp("watched"), "watch")
    made.fit()
    return made


def test_a_planted_collapse_is_told_once_with_its_picture(watched: Trainer) -> None:
    events = [event for event in told(watched) if event["kind"] == "mode collapse"]
    assert len(events) == 1 and 25_600 < events[0]["nimg"] <= 25_600 + 5120
    picture = f"samples/{events[0]['nimg']:09d}.png"
    assert picture in events[0]["sentence"] and (watched.run.path / picture).is_file()
    assert watched.state.nimg == 51_200 and not watched.state.doctor.lr and watched.state.attempt == 0


def test_the_picture_is_of_now_and_not_of_an_earlier_attempt(watched: Trainer) -> None:
    path = watched.run.sample_path(watched.state.nimg)
    drawn = path.read_bytes()
    path.write_bytes(b"of another attempt")
    assert watched.doctor is not None and watched.doctor._picture() == f"samples/{path.name}"
    assert path.read_bytes() == drawn


def test_watching_changes_no_bit(tmp_path: Path, watched: Trainer) -> None:
    unwatched = trainer(tmp_path, "off")
    unwatched.fit()
    assert unwatched.doctor is None and not unwatched.state.doctor.rows and same(watched, unwatched)
    assert not unwatched.run.events()


def test_acting_heals_the_collapse(acted: Trainer, watched: Trainer) -> None:
    (event,) = (event for event in told(acted) if event["kind"] == "mode collapse")
    assert event["act"] == "restore" and "Done: went back" in event["sentence"]
    assert acted.state.nimg == 51_200 and acted.state.attempt == 1 and acted.state.doctor.restores == 1
    assert acted.state.doctor.lr == {"critic": 0.5, "generator": 0.5}
    ill, healed = (History(made.state.doctor.rows, 1).values("drawn/diversity")[-1] for made in (watched, acted))
    assert ill < 0.4 < healed
    assert acted.run.status()["state"] == "finished"


@pytest.mark.parametrize(("stop_nimg", "killed"), [(15_000, True), (27_000, False), (40_000, False), (40_000, True)])
def test_a_run_with_acts_is_continued_bit_for_bit(tmp_path: Path, acted: Trainer, stop_nimg: int, killed: bool) -> None:
    """Stopped before the collapse, while it shows, and after the act; saved politely, or killed."""

    class Gone(Exception):
        pass

    class Stopping(Collapsing):
        def _after(self, before: int) -> None:
            super()._after(before)
            if self.state.nimg >= stop_nimg and (stop_nimg < 30_000 or self.state.attempt):
                if not killed:
                    self.save()
                raise Gone

    first = trainer(tmp_path, "act", kind=Stopping)
    with pytest.raises(Gone):
        first.fit()
    second = trainer(tmp_path, "act", run=first.run)
    second.fit()
    assert same(second, acted)
    assert second.state.doctor == acted.state.doctor and told(second) == told(acted)


class Measured(Game):
    """Its held-out criterion is known beforehand: best after 12.8 kimg, and before that after 6.4."""

    monitor = "distance"

    def held_out(self, batch, progress):
        value = {6_400: 3.0, 12_800: 1.0, 19_200: 2.0}.get(progress.nimg, 4.0)
        return {"distance": HeldOut(torch.full((len(batch.images),), value), None)}


class Relapsing(Collapsing):
    """The illness comes again after the first going back."""

    def step(self) -> None:
        if self.state.nimg >= self.sick_from_nimg and self.state.attempt == 1:
            with torch.no_grad():
                self.family.generator[0].weight.zero_()  # type: ignore[union-attr]
        super().step()


def test_the_best_is_gone_back_to_then_the_one_before_and_resume_is_exact(tmp_path: Path) -> None:
    """Stopped between the best moment and the first going back, between that and the second, and after both."""
    whole = trainer(tmp_path, "act", kind=Relapsing, family=Measured())
    whole.fit()
    acts = [event for event in told(whole) if "act" in event]
    assert [event["act"] for event in acts] == ["restore"] * 2
    assert ["checkpoint of 12800 images" in acts[0]["sentence"], "of 6400 images" in acts[1]["sentence"]] == [True] * 2
    assert whole.state.nimg == 51_200 and whole.state.attempt == whole.state.doctor.restores == 2
    assert whole.state.doctor.lr == {"critic": 0.25, "generator": 0.25}

    class Gone(Exception):
        pass

    class Stopping(Relapsing):
        stops = [(0, 20_000), (1, 20_000), (2, 10_000)]

        def _after(self, before: int) -> None:
            super()._after(before)
            if self.stops and self.state.attempt == self.stops[0][0] and self.state.nimg >= self.stops[0][1]:
                self.stops.pop(0)
                self.save()
                raise Gone

    first = trainer(tmp_path, "act", kind=Stopping, family=Measured())
    for _ in range(3):
        with pytest.raises(Gone):
            trainer(tmp_path, "act", run=first.run, kind=Stopping, family=Measured()).fit()
    last = trainer(tmp_path, "act", run=first.run, kind=Stopping, family=Measured())
    last.fit()
    assert same(last, whole) and last.state.doctor == whole.state.doctor and told(last) == told(whole)


def test_the_doctor_stops_what_it_cannot_heal(tmp_path: Path) -> None:
    class Incurable(Collapsing):
        def step(self) -> None:
            if self.state.nimg >= self.sick_from_nimg:
                with torch.no_grad():
                    self.family.generator[0].weight.zero_()  # type: ignore[union-attr]
            Trainer.step(self)

    made = trainer(tmp_path, "act", kind=Incurable)
    made.fit()
    assert [event["act"] for event in told(made) if "act" in event] == ["restore"] * 3 + ["stop"]
    assert made.state.doctor.stopped and made.state.nimg < 51_200 and made.run.status()["state"] == "finished"
    assert made.state.doctor.lr == {"critic": 0.25, "generator": 0.25}
    again = trainer(tmp_path, "act", run=made.run)
    assert again.fit().nimg == made.state.nimg, "a run that was stopped stays stopped"


def test_findings_are_plain_values() -> None:
    (finding,) = diagnose(History(SICK["memorization"](), 64_000))
    assert isinstance(finding, Finding) and dict(finding.evidence) == {"copies": 0.8}
    assert float(to_float(torch.zeros(1, dtype=torch.uint8))) == -1
