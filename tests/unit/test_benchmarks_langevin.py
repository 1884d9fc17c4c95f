"""The benchmark of Langevin noise: what it compares, what it trains next, and that nothing is trained twice."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

pytestmark = pytest.mark.usefixtures("beside_the_benchmarks")


def test_paired_intervals_are_those_of_the_books() -> None:
    from langevin.protocol import Metric, difference

    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(2, 8))
    found = difference(list(a), list(b), Metric(lower=True, worst=0.0))
    low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high), rel=5e-3)
    lower = difference([1.0, 1.1, 0.9], [2.0, 2.1, 2.0], Metric(lower=True, worst=0.0))
    higher = difference([1.0, 1.1, 0.9], [2.0, 2.1, 2.0], Metric(lower=False, worst=0.0))
    assert (lower.verdict, higher.verdict) == ("win", "loss")


def test_intervals_of_yes_and_no_hold_the_truth() -> None:
    """Exact coverage over all tables of 12 pairs, at several truths: Agresti and Min report 93 to 99 %."""
    from langevin.protocol import Metric, difference

    yes_no, num = Metric(lower=False, worst=0.0, yes_no=True), 12
    for more, less in ((0.1, 0.1), (0.4, 0.2), (0.7, 0.05), (0.9, 0.0)):
        held = 0.0
        for b, c in itertools.product(range(num + 1), repeat=2):
            if b + c <= num:
                ours = [1.0] * b + [0.0] * c + [0.0] * (num - b - c)
                theirs = [0.0] * b + [1.0] * c + [0.0] * (num - b - c)
                found = difference(ours, theirs, yes_no)
                chance = stats.multinomial.pmf([b, c, num - b - c], num, [more, less, 1 - more - less])
                held += chance * (found.low <= more - less <= found.high)
        assert 0.92 < held <= 1.0, (more, less)
    same = difference([1.0] * 20, [1.0] * 20, yes_no)
    assert same.verdict == "tie" and same.low < 0 < same.high, "20 pairs that agree leave room for a difference"


def small_task(log: list):
    """The score is a known function of setting and seed: 'b' wants 3, 'c' starts from it and wants 0."""
    from langevin.protocol import Arm, Metric, Task

    def train(settings, seed, places):
        log.append((dict(settings), seed))
        b, c = settings["b"], settings.get("c")
        value = (b - 3) ** 2 + (0.0 if c is None else 10 * c - 5) + 0.01 * (seed % 7)
        last = {"validation": value, "loss": value if b != 9 else math.nan}
        return {"last": last, "mean": {"validation": -b, "loss": 100 + b}}

    arms = (
        Arm("plain", ({"b": 1}, {"b": 3}, {"b": 9}), ("last", "mean")),
        Arm("noisy", ({"c": 0.2}, {"c": 0.0}), ("last",), ours=True, after="plain"),
        Arm("fixed", ({"b": 9},)),
    )
    return Task("x", "small", {"loss": Metric(lower=True, worst=77.0)}, arms, "plain", train)


def test_settings_are_chosen_then_seeds_are_trained_and_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import langevin_tasks as benchmark

    log: list = []
    monkeypatch.setitem(benchmark.TASKS, "x", small_task(log))
    command = ["--tasks", "x", "--seeds", "5", "--workers", "0", "--store", str(tmp_path)]
    assert benchmark.main(command) == 0
    tuning = [settings for settings, seed in log if seed == benchmark.TUNING_SEED]
    assert tuning == [{"b": 1}, {"b": 3}, {"b": 9}, {"b": 3, "c": 0.2}, {"b": 3, "c": 0.0}]
    # The last weights want b = 3, their mean b = 9, which the arm without a choice has too: one training for both.
    finals = [settings for settings, seed in log if seed == 0]
    assert finals == [{"b": 3}, {"b": 9}, {"b": 3, "c": 0.0}]
    assert [seed for settings, seed in log if settings == {"b": 3}] == [benchmark.TUNING_SEED, 0, 1, 2, 3, 4]
    said = capsys.readouterr().out
    assert "win  loss       noisy (last) - plain (last), D = 0: -5 (-5 .. -5)" in said
    assert "loss 77" in said, "a training that left the finite numbers counts as the worst"

    num = len(log)
    store = tmp_path / "rows.jsonl"
    text = store.read_text()
    store.write_text(text[:-20])  # a stop in the middle of a line
    assert benchmark.main(command) == 0 and len(log) == num + 1, "what was cut short is made again, and only that"
    assert benchmark.main([*command, "--seeds", "6"]) == 0 and len(log) == num + 1 + 3, "one more seed of three"
    assert len([line for line in store.read_text().splitlines() if _is_whole(line)]) == num + 3
    assert benchmark.main([*command, "--seeds", "9", "--minutes", "0"]) == 1 and len(log) == num + 4

    monkeypatch.setattr(benchmark, "write_record", lambda name, command, rows, **facts: (name, rows, facts))
    plan = benchmark.Plan([benchmark.TASKS["x"]], benchmark.Store(benchmark.Places(store=tmp_path)), 5, False)
    name, rows, facts = benchmark.record(plan, benchmark.comparisons(plan, plan.tasks[0]), ["said"], 0)
    by_what = {row.what: row for row in rows}
    assert name == "langevin-tasks-x" and facts["chosen"]["x: noisy (last)"] == {"b": 3, "c": 0.0}
    assert by_what["x: loss, plain (last)"].raw == pytest.approx([0.0, 0.01, 0.02, 0.03, 0.04])
    assert by_what["x: loss, plain (last)"].value == pytest.approx(statistics.fmean([0.0, 0.01, 0.02, 0.03, 0.04]))
    assert all(math.isfinite(row.value) for row in rows)
    assert facts["verdicts"] == {"D = 0": "1 win, 0 ties, 0 losses", "best control": "1 win, 0 ties, 0 losses"}


def _is_whole(line: str) -> bool:
    try:
        return bool(json.loads(line))
    except ValueError:
        return False


def test_wrong_arguments_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    import langevin_tasks as benchmark

    assert benchmark.main(["--tasks", "nothing"]) == 2 and "c20" in capsys.readouterr().out


def test_every_method_has_as_many_settings_of_its_own() -> None:
    import langevin_tasks as benchmark

    for task in benchmark.TASKS.values():
        assert {len(arm.settings) for arm in task.arms} <= {1, 3}, task.name
        names = [arm.name for arm in task.arms]
        assert task.control in names and len(set(names)) == len(names)
        assert any(arm.ours for arm in task.arms) and sum(not arm.ours for arm in task.arms) >= 3
        assert all(arm.after in ("", *names) for arm in task.arms) and task.num_seeds >= 5


def test_samples_are_taken_when_they_are_said_to_be() -> None:
    from langevin.training import SAMPLES, collects

    for num_steps in (60, 100, 1801):
        for cycles in (False, True):
            taken = [step for step in range(num_steps) if collects(step, num_steps, cycles)]
            assert len(taken) == SAMPLES and taken[-1] == num_steps - 1
            assert cycles or taken[0] >= num_steps * 2 // 3


def test_the_reference_of_the_regression_samples_from_its_law() -> None:
    """Hamiltonian Monte Carlo of a Gaussian with widths from 1 to 1 / 10, over 100 chains."""
    from langevin.regression import hamiltonian

    h = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)
    start = torch.zeros(100, 3, dtype=torch.float64)
    samples = hamiltonian(lambda t: (h * t.square()).sum(1) / 2, start, num=60, burn_in=60, leaps=20, seed=0)
    energy = (h * samples.square()).mean(0)  # of each chain: independent numbers, so their error is known
    z = (energy.mean(0) - 1) / (energy.std(0) / 10)
    assert bool((z.abs() < 4).all()) and bool((energy.std(0) / 10 < 0.1).all())
    assert samples.std(0).min() > 0
