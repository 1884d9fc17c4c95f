"""Schedules of the temperature: their values, the law of a cycle, and a training that ends cold."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import Parameter
from torch.optim import SGD

from imagekiln.errors import UsageError
from imagekiln.optim.langevin import langevin
from imagekiln.optim.temperature import (
    SCHEDULES,
    Annealed,
    Cycles,
    anneals_twice,
    constant,
    cosine,
    linear,
    polynomial,
    schedule,
)


@pytest.mark.parametrize("name", SCHEDULES)
def test_factors_are_between_0_and_1_and_defined_outside_the_run(name):
    factor = schedule(name)
    values = [factor(at / 200) for at in range(-20, 221)]
    assert all(0 <= value <= 1 for value in values)
    assert values[0] == factor(0.0) and values[-1] == factor(1.0)
    if name not in ("cyclical",):
        assert values == sorted(values, reverse=True)
    with pytest.raises(UsageError, match="nan"):
        (linear() if name == "constant" else factor)(math.nan)


def test_values_are_the_formulas():
    assert [constant()(p) for p in (0.0, 1.0)] == [1.0, 1.0]
    assert [linear()(p) for p in (0.0, 0.3, 1.0)] == pytest.approx([1.0, 0.7, 0.0])
    assert [cosine()(p) for p in (0.0, 1 / 3, 1.0)] == pytest.approx([1.0, 0.75, 0.0])
    assert [polynomial(0.5)(p) for p in (0.0, 0.75, 1.0)] == pytest.approx([1.0, 0.5, 0.0])
    assert [Annealed(0.2, 0.6)(p) for p in (0.1, 0.2, 0.4, 0.6, 1.0)] == pytest.approx([1.0, 1.0, 0.5, 0.0, 0.0])


def test_a_cycle_explores_cold_at_a_high_rate_and_samples_at_a_low_one():
    """Equation 1 of Zhang et al. 2020: eta_k = eta_0 / 2 (cos(pi mod(k - 1, K / M) / (K / M)) + 1)."""
    cycles, num_steps = Cycles(num=3, explore=0.75), 60
    for step in range(num_steps):
        inside = step % 20
        assert cycles.lr(step / num_steps) == pytest.approx((math.cos(math.pi * inside / 20) + 1) / 2)
        assert cycles(step / num_steps) == (1.0 if inside >= 15 else 0.0)
    for per_cycle in (1, 2, 3, 5):
        kept = [step for step in range(num_steps) if cycles.collects(step, num_steps, per_cycle)]
        assert len(kept) == 3 * per_cycle
        assert all(cycles(step / num_steps) == 1.0 for step in kept)
        assert kept[per_cycle - 1] == 19 and kept[-1] == 59


@pytest.mark.parametrize("wrong", [lambda: Cycles(0), lambda: Cycles(2, 1.0), lambda: Annealed(0.8, 0.2)])
def test_impossible_schedules_are_refused(wrong):
    with pytest.raises(UsageError, match="expected"):
        wrong()
    with pytest.raises(UsageError, match="above 0"):
        polynomial(0.0)
    with pytest.raises(UsageError, match="Did you mean 'cosine'"):
        schedule("cosin")


def test_annealing_twice_is_noticed():
    assert "annealed twice" in str(anneals_twice(linear(), cosine()))
    assert anneals_twice(constant(), cosine()) is None
    assert anneals_twice(cosine(), constant()) is None
    assert anneals_twice(Cycles(), Cycles().lr) is None


def test_hot_then_cold_with_a_tail_average_ends_at_the_minimum():
    """The tail of a spring's walk without noise goes to the minimum; the hot part is spread as exp(-L / D)."""
    num_steps, num, lr, h, heat = 400, 4000, 0.1, 1.0, 0.05
    theta = Parameter(torch.zeros(num, dtype=torch.float64))
    shape = Annealed(hot=0.5, cold=0.75)
    optimizer = langevin(SGD([theta], lr=lr), diffusion=heat, schedule=shape, num_steps=num_steps)
    hot, tail = [], []
    for step in range(num_steps):
        theta.grad = h * theta.detach()
        optimizer.step()
        if 100 <= step < 200:
            hot.append(h * theta.detach().square())
        if shape.averages(step / num_steps):
            tail.append(theta.detach().clone())
    energy = torch.stack(hot).mean(0)
    assert abs(float(energy.mean()) - heat / (1 - lr * h / 2)) < 4 * float(energy.std()) / num**0.5
    assert float(torch.stack(tail[-50:]).mean(0).square().mean()) < 1e-6 * heat
    assert len(tail) == 100
