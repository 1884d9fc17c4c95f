"""Numbers that are not finite: a step is left out, then the run goes back, then it gives up; weights stay clean."""

from __future__ import annotations

from pathlib import Path

import pytest

from imagekiln.engine import checkpoint
from imagekiln.engine.run import Run

FAMILY = '''"""A straight line whose loss is not a number when BAD says so."""
import pathlib

import torch
from imagekiln.config import FamilyConfig
from imagekiln.core import Family, Loss, Phase


class Config(FamilyConfig):
    name: str = __file__


class Line(Family):
    Config = Config
    optimizers = {"net": {"name": "sgd", "lr": 0.01}}
    phases = (Phase("fit", trains=("net",)),)
    averaged = ("net",)

    def __init__(self, config, image_shape, num_classes):
        super().__init__(config, image_shape, num_classes)
        self.net = torch.nn.Linear(4, image_shape[0] * image_shape[1] * image_shape[2])

    def loss(self, phase, batch, progress):
        drawn = self.sample(torch.randn(len(batch.images), 4), None)
        total = (drawn - batch.images).square().mean()
        return Loss(total * bad(progress.nimg, total))

    def sample(self, noise, condition, options=None):
        return self.net(noise).view(-1, *self.image_shape)

    def noise_shape(self):
        return (4,)


def once(nimg):
    marker = pathlib.Path(__file__).with_name(f"bad-{nimg}")
    if marker.exists():
        return 1.0
    marker.touch()
    return float("nan")


def bad(nimg, total):
    return BAD
'''


def train(cli, tiny, folder: Path, bad: str, nimg: int = 480, checkpoint_nimg: int = 64):
    family = folder / "line.py"
    family.write_text(FAMILY.replace("BAD\n", f"{bad}\n"))
    ended = cli(*tiny(str(family), folder / "run", nimg=nimg, checkpoint_nimg=checkpoint_nimg))
    run = Run(folder / "run")
    found, sentences = checkpoint.load_newest(run.checkpoints)
    assert found is not None and not sentences
    for part, tensors in found.parts.items():
        assert all(bool(t.isfinite().all()) for t in tensors.values() if t.is_floating_point()), part
    return ended, run, found


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_one_bad_step_is_left_out(cli, tiny, tmp_path: Path, number: str) -> None:
    ended, run, found = train(cli, tiny, tmp_path, f"float('{number}') if nimg == 160 else 1.0")
    ended.ok()
    assert [event["kind"] for event in run.events()] == ["non-finite"]
    assert found.state["rollbacks"] == 0 and "left out" in ended.err


def test_a_gradient_that_overflows_counts_as_one(cli, tiny, tmp_path: Path) -> None:
    """The loss is finite, its slope is not: sqrt at 0."""
    slope = "1 + (total.detach() - total).clamp(min=0).sqrt() if nimg == 160 else 1.0"
    ended, run, _ = train(cli, tiny, tmp_path, slope)
    ended.ok()
    assert [event["kind"] for event in run.events()] == ["non-finite"]


def test_three_in_a_row_go_back(cli, tiny, tmp_path: Path) -> None:
    ended, run, found = train(cli, tiny, tmp_path, "once(nimg) if nimg in (160, 176, 192) else 1.0")
    ended.ok()
    assert [event["kind"] for event in run.events()] == ["non-finite"] * 3 + ["rollback"]
    assert "checkpoint of 128 images" in run.events()[-1]["sentence"]
    assert found.nimg == 480 and found.state["lr_scale"] == 0.5 and found.state["attempt"] == 1


def test_for_good_it_gives_up(cli, tiny, tmp_path: Path) -> None:
    ended, run, found = train(cli, tiny, tmp_path, "float('nan') if nimg >= 160 else 1.0")
    ended.refused(6, "finite", "lr")
    assert [event["kind"] for event in run.events()].count("rollback") == 3
    assert run.status()["state"] == "diverged" and found.nimg < 160
    again = cli(*tiny(str(tmp_path / "line.py"), tmp_path / "run", nimg=480, checkpoint_nimg=64))
    again.refused(6)
