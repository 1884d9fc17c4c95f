"""The benchmark of fine-tuning against diffusers' example: both sides tune the same weights, and a small run ends."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")
pytestmark = pytest.mark.usefixtures("beside_the_benchmarks")

SMALL = ("--size", "64", "--pictures", "6", "--shrink", "10", "--batch", "2")


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return importlib.import_module("fine_tune_speed")


def test_the_examples_are_true(bench: ModuleType) -> None:
    result = doctest.testmod(bench)
    assert (result.failed, result.attempted > 0) == (0, True)


def test_both_sides_tune_the_same_folder(bench: ModuleType, tmp_path: Path) -> None:
    options = bench.parser().parse_args(SMALL)
    base, pictures = tmp_path / "base", tmp_path / "pictures"
    bench.write_base(base, options.shrink)
    bench.write_pictures(pictures, options)
    our_step, ours = bench.build_ours(options, base, pictures)
    peer_step, theirs = bench.build_peer(options, base, "no")
    assert ours["parameters"] == theirs["parameters"]
    trainer, loop = our_step.__self__, peer_step.__self__
    first = next(iter(loop.unet.parameters())).detach().clone()
    assert torch.equal(first, next(trainer.family.get_submodule("tuned").parameters())), "they begin alike"
    for step in (our_step, peer_step):
        step()
    assert trainer.state.nimg == options.batch
    assert loop.optimizer.param_groups[0]["lr"] > 0 and len(loop.optimizer.state) > 0
    names = (bench.OURS, bench.PEER, bench.PEER_BF16)
    found = bench.pairs.Race(6, {name: [2.0, 1.0] for name in names}, dict.fromkeys(names, 10**9), {})
    assert [row.value for row in bench.rows(found, 3)] == [4.5, 4.5, 4.5, 1.0, 1.0, 1000.0, 1000.0, 1000.0]
