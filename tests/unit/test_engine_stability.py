"""Several runs together: what is measured on them, and which words follow from which numbers."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from imagekiln import api
from imagekiln.engine import agreement, pictures, recipe, verdict
from imagekiln.engine import stability as looking
from imagekiln.engine.generate import labels_for
from imagekiln.engine.run import Run
from imagekiln.engine.stability import Stability, stability
from imagekiln.engine.verdict import STATES, Ending, Estimate, Pair, RunRow, Spread, judge, spread
from imagekiln.errors import DataError, Diverged, UsageError

TINY = {"width": 8, "z_dim": 8}
N = 60


# -- real runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures without labels, so that no judge has to be trained."""
    folder = tmp_path_factory.mktemp("digits")
    for index, pixels in enumerate(load_digits().images[:300]):
        Image.fromarray(np.uint8(pixels * 15.9)).save(folder / f"{index:03d}.png")
    return folder


@pytest.fixture(scope="module")
def train(digits: Path, tmp_path_factory: pytest.TempPathFactory):
    """Trains a tiny run and gives its folder, even when it diverges."""
    folder = tmp_path_factory.mktemp("runs")

    def of(name: str, family: str = "vae", held_out: float = 0.3, **train: object) -> Run:
        assignments = [f"{key.replace('__', '.')}={train.pop(key)}" for key in list(train) if "__" in key]
        small = {"total_kimg": 0.64, "batch": 32, "preview_kimg": 0.1, "precision": "fp32", "device": "cpu"}
        chosen = {
            "family": TINY if family == "vae" else {"widths": [16], "attention": [False], "sample": {"steps": 2}},
            "data": {"validation_fraction": held_out, "size": 8},
            "train": {**small, **train},
        }
        try:
            return api.train(family, digits, folder / name, settings=chosen, assignments=assignments)
        except Diverged:
            return Run.open(folder / name)

    return of


@pytest.fixture(scope="module")
def three(train) -> list[Run]:
    return [train(f"seed-{seed}", seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def found(three: list[Run]) -> Stability:
    return stability(three, n=N)


def test_three_runs_of_one_recipe_are_no_accident(found: Stability) -> None:
    assert found.verdict.state in STATES and found.verdict.state not in ("broken", "undecided", "shaky")
    assert found.verdict.headline.startswith(("The three runs", "Run "))
    assert [row.name for row in found.rows] == ["seed-0", "seed-1", "seed-2"]
    assert [row.seed for row in found.rows] == [0, 1, 2]
    assert {"frechet", "coverage"} <= set(found.rows[0].measured)
    assert found.about["n"] == N and {one.num_runs for one in found.spreads} == {3}
    assert len(found.pairs) == 3 and not any(pair.other_data for pair in found.pairs)
    assert found.sampling == (), "this family has no steps to choose"
    assert all(len(row.drift) >= 4 and min(change for _, change in row.drift) > 0 for row in found.rows)


def test_values_are_those_evaluate_gives(three: list[Run], found: Stability) -> None:
    rows = {row.metric: row for row in api.evaluate(three[0], n=N)}
    assert rows["frechet"].value == pytest.approx(found.rows[0].measured["frechet"].value, rel=1e-6)


def test_a_second_look_measures_nothing_again(three: list[Run], found: Stability, tmp_path: Path) -> None:
    before = [len(run.measurements()) for run in three]
    said: list[str] = []
    again = stability(three, n=N, say=said.append)
    assert [len(run.measurements()) for run in three] == before
    assert not any(sentence.startswith("Comparing") for sentence in said)
    assert again.to_json() == found.to_json() and again.side_by_side == found.side_by_side
    assert len(stability(three[:1], n=N // 2).rows[0].measured) and len(three[0].measurements()) > before[0]


def test_the_result_is_json_and_text(found: Stability) -> None:
    facts = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert facts["verdict"]["state"] == found.verdict.state
    assert facts["rows"][1]["measured"]["frechet"]["value"] == found.rows[1].measured["frechet"].value
    text = looking.table(found)
    assert text.startswith(found.verdict.headline) and all(row.name in text for row in found.rows)


def test_a_run_with_a_ruinous_learning_rate_is_named(three: list[Run], train) -> None:
    ruined = train("ruined", seed=3, **{"optim__decoder-encoder-noise__lr": 10.0, "clip_norm": 0.0})
    found = stability([*three, ruined], n=N)
    assert found.verdict.state == "broken" and list(found.verdict.broken) == ["ruined"]
    assert found.verdict.headline.startswith("Run ruined is broken: ")
    assert any("lr = 10.0 instead of 0.001" in sentence for sentence in found.verdict.sentences)
    assert all("ruined" not in (pair.a, pair.b) for pair in found.pairs)
    assert {one.num_runs for one in found.spreads} == {3}


def test_runs_on_other_pictures_are_compared_as_such(three: list[Run], train) -> None:
    other = train("other-split", held_out=0.5)
    found = stability([three[0], other], n=N)
    assert not any(row.differs for row in found.rows) and found.spreads == ()
    assert [pair.other_data for pair in found.pairs] == [True]
    assert any("learned from different pictures" in sentence for sentence in found.verdict.sentences)


def test_ways_of_drawing(train) -> None:
    found = stability([train("flow", "diffusion", total_kimg=0.064)], n=40)
    assert found.verdict.state == "undecided"
    steps = [(one.sampler, one.steps) for one in found.sampling]
    assert steps[0][1] == 4 and found.sampling[0].rmse == 0.0
    assert len({sampler for sampler, _ in steps}) >= 2
    assert [one.steps for one in found.sampling if one.usual] == [2]
    assert all(one.rmse > 0 for one in found.sampling[1:]) and len(found.by_sampling) == len(steps)


def test_a_run_without_weights_is_broken(three: list[Run], tmp_path: Path) -> None:
    empty = Run.create(tmp_path / "empty", three[0].recipe_path.read_text(encoding="utf-8"), {})
    found = stability([three[0], empty], n=N)
    assert found.verdict.broken == {"empty": "it has no weights that can be read"}


def test_what_cannot_be_compared_is_refused(three: list[Run], train, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"family\.name"):
        stability([three[0], train("flow", "diffusion", total_kimg=0.064)])
    with pytest.raises(UsageError, match="twice"):
        stability([three[0], three[0]])
    with pytest.raises(UsageError, match="not a run folder"):
        stability([tmp_path])
    with pytest.raises(UsageError, match="0 runs"):
        stability([])
    with pytest.raises(DataError, match="at least 20"):
        stability(three, n=10)


# -- parts of looking -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("num_classes", [0, 2, 10, 100])
def test_tiles_undo_a_grid(channels: int, num_classes: int) -> None:
    count = len(labels_for(agreement.PREVIEW_IMAGES, num_classes))
    images = torch.randint(
        0, 256, (count, channels, 8, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    sheet = np.array(pictures.grid(images, pictures.columns_for(count, num_classes)))
    cut = agreement.tiles(sheet, (channels, 8, 6), num_classes)
    assert cut is not None and torch.equal(cut, images)
    assert agreement.tiles(sheet[:-1], (channels, 8, 6), num_classes) is None


def test_paired_distance_is_the_sum_over_unequal_pairs() -> None:
    x, y = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(1)).double()

    def kernel(a: torch.Tensor, b: torch.Tensor) -> float:
        return (float(a @ b) / 3 + 1) ** 3

    pairs = [(i, j) for i in range(7) for j in range(7) if i != j]
    terms = [kernel(x[i], x[j]) + kernel(y[i], y[j]) - kernel(x[i], y[j]) - kernel(x[j], y[i]) for i, j in pairs]
    assert agreement.paired_distance(x, y)[0] == pytest.approx(math.fsum(terms) / len(pairs), rel=1e-12)


def test_paired_distance_keeps_its_level_for_pairs_that_are_alike() -> None:
    """Pictures of one seed resemble each other: the distance must neither gain nor lose by that."""
    generator = torch.Generator().manual_seed(2)
    beyond, distances = 0, []
    for trial in range(200):
        shared, own = torch.randn(40, 4, generator=generator), torch.randn(2, 40, 4, generator=generator)
        distance, same = agreement.paired_distance(shared + own[0], shared + own[1], seed=trial)
        beyond += distance > same
        distances.append(distance)
    mean, error = np.mean(distances), np.std(distances) / math.sqrt(len(distances))
    assert abs(mean) < 4 * error and 1 <= beyond <= 24  # 5 % of 200, four standard errors about it
    shifted, same = agreement.paired_distance(own[0], own[1] + 1.0)
    assert shifted > same


def test_what_differs_is_named_by_the_majority() -> None:
    usual, hot = recipe.resolve("vae"), recipe.resolve("vae", {"optim": {"decoder-encoder-noise": {"lr": 0.3}}})
    other_seed = recipe.resolve("vae", {"train": {"seed": 9}, "data": {"path": "elsewhere"}})
    found = agreement.differences([hot, usual, other_seed], ["a", "b", "c"])
    assert found == [("optim.decoder-encoder-noise.lr = 0.3 instead of 0.001",), (), ()]


def test_the_fewest_steps_that_suffice_are_named() -> None:
    ways = [
        looking.Sampled("a", steps, around(1.0), rmse, 1.0, steps == 16)
        for steps, rmse in ((32, 0.0), (16, 0.02), (8, 0.07), (4, 0.3))
    ]
    other = looking.Sampled("b", 2, around(1.0), 0.0, 1.0, False)
    assert looking._about_sampling([*ways, other]) == ["8 steps draw nearly the same pictures as 32."]
    rough = [dataclasses.replace(one, rmse=3 * one.rmse + 0.05) for one in ways[1:]]
    assert looking._about_sampling([ways[0], *rough]) == [
        "Fewer than 32 steps draw clearly other pictures: more of them may still help."
    ]
    assert looking._about_sampling([]) == looking._about_sampling(ways[:1]) == []


# -- words from numbers -----------------------------------------------------------------------------------------------


def around(value: float, error: float = 0.05, floor: float = 1.0) -> Estimate:
    return Estimate(value, value * (1 - error), value * (1 + error), floor)


def run_row(name: str, frechet: float = 2.0, **more: object) -> RunRow:
    return dataclasses.replace(RunRow(name, measured={"frechet": around(frechet)}, variety=1.0), **more)


def judged(rows: list[RunRow], pairs: tuple[Pair, ...] = ()) -> verdict.Verdict:
    bad = verdict.broken(rows)
    known = {row.name: row.measured["frechet"] for row in rows if row.name not in bad and not row.differs}
    spreads = [spread("frechet", known, True)] if len(known) > 1 else []
    return judge(rows, spreads, pairs)


def test_every_state_has_its_words() -> None:
    good = [run_row(name) for name in "abc"]
    worse = Ending(100, around(2.0), 200, around(3.0))
    far = Pair("a", "b", distance=2.0, same=0.1, to_real=1.0, same_seed=0.9, other_data=True)
    cases = {
        "consistent": judged(good),
        "shaky": judged([*good, run_row("d", rollbacks=1, left_out=3)]),
        "undecided": judged(good[:1]),
        "varied": judged([run_row("a", 2.0), run_row("b", 2.9), run_row("c", 3.7)]),
        "declining": judged([*good[:2], run_row("c", ending=worse)]),
        "broken": judged([*good, run_row("d", 20.0)]),
    }
    assert {name: found.state for name, found in cases.items()} == {name: name for name in STATES}
    assert cases["consistent"].headline.startswith("The three runs agree: ")
    assert cases["broken"].headline.startswith("Run d is broken: its pictures lie 10.0 times as far from real ones")
    assert "The other three runs agree" in cases["broken"].headline
    assert "1.50 times" in cases["declining"].headline
    assert "2 to 3.7" in cases["varied"].headline
    assert "train.seed" in cases["undecided"].headline
    assert judged(good[:2], (far,)).state == "varied"
    for found in cases.values():
        for sentence in (found.headline, *found.sentences):
            assert sentence[0].isupper() and sentence.endswith("."), sentence


def test_agreeing_is_not_being_good() -> None:
    bad = [run_row(name, 40.0) for name in "abc"]
    assert any("40 times as far" in sentence for sentence in judged(bad).sentences)
    assert not any("Agreeing" in sentence for sentence in judged([run_row(name) for name in "abc"]).sentences)


def test_the_same_picture_every_time_needs_nobody_to_compare_with() -> None:
    found = judged([run_row("a", variety=0.02)])
    assert found.state == "broken" and "same picture" in found.headline
    assert judged([run_row("a", variety=0.02), run_row("b", variety=0.02)]).headline.startswith(
        "All two runs are broken"
    )


def test_an_end_within_its_interval_is_named_but_decides_nothing() -> None:
    unsure = Ending(100, around(2.0, 0.4), 200, around(2.5, 0.4))
    found = judged([run_row("a", ending=unsure), run_row("b")])
    assert found.state == "consistent" and any("chance alone" in sentence for sentence in found.sentences)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 9), st.integers(0, 4), st.randoms(use_true_random=False))
def test_the_broken_minority_is_found_in_any_order(num_good: int, num_bad: int, random) -> None:
    """Several broken runs excuse neither one another nor a good one."""
    num_bad = min(num_bad, num_good)
    rows = [run_row(f"good {i}", random.uniform(1.8, 2.2)) for i in range(num_good)]
    rows += [run_row(f"bad {i}", random.uniform(9.0, 90.0)) for i in range(num_bad)]
    random.shuffle(rows)
    assert set(verdict.broken(rows)) == {row.name for row in rows if row.name.startswith("bad")}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.01, 0.99), min_size=2, max_size=8), st.floats(0.001, 1000.0))
def test_the_better_half_is_never_broken_and_units_do_not_matter(shares: list[float], unit: float) -> None:
    rows = [
        RunRow(str(i), measured={"frechet": around(unit * share), "coverage": around(1 - share, 0.01)})
        for i, share in enumerate(shares)
    ]
    found = verdict.broken(rows)
    best = sorted(rows, key=lambda row: row.measured["frechet"].value)[: math.ceil(len(rows) / 2)]
    assert not set(found) & {row.name for row in best}
    scaled = [RunRow(r.name, measured={**r.measured, "frechet": around(s)}) for r, s in zip(rows, shares, strict=True)]
    assert set(verdict.broken(scaled)) == set(found)


@settings(max_examples=40, deadline=None)
@given(st.floats(0.01, 200.0), st.integers(1, 12))
def test_chi_squared(x: float, freedom: int) -> None:
    truth = torch.special.gammaincc(torch.tensor(freedom / 2).double(), torch.tensor(x / 2).double())
    found = verdict.chi_squared_above(x, freedom)
    assert found == pytest.approx(float(truth), rel=1e-6, abs=1e-9), "torch's is good to 1e-8"


@pytest.mark.parametrize("tau", [0.0, 3.0])
def test_what_seeds_add_is_told_from_measuring(tau: float) -> None:
    random = np.random.default_rng(0)
    spreads = list[Spread]()
    for _ in range(2000):
        values = 10 + tau * random.normal(size=4) + random.normal(size=4)
        runs = {str(i): Estimate(x, x - 1.959964, x + 1.959964) for i, x in enumerate(values)}
        spreads.append(spread("frechet", runs, True))
    rejected = np.mean([one.p < 0.05 for one in spreads])
    if tau == 0:
        assert rejected == pytest.approx(0.05, abs=0.02)
    else:
        assert rejected > 0.7
        assert np.mean([one.sd**2 - 1 for one in spreads]) == pytest.approx(tau**2, rel=0.1)
        assert np.mean([one.between_sd**2 for one in spreads]) == pytest.approx(tau**2, rel=0.1)
