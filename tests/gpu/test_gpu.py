"""What only a GPU shows: every family trains there in bf16, resumes to the bit, and draws what the CPU draws."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from imagekiln import api, testing
from imagekiln.core import Loss
from imagekiln.engine import checkpoint, registry
from imagekiln.engine.generate import draw
from imagekiln.engine.models import load_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DRAWING = [name for name in registry.names() if registry.load(name).draws]


def settings(nimg: int) -> dict:
    return {
        "train": {"batch": 32, "total_kimg": nimg / 1000, "device": "cuda", "compile": "off", "checkpoint_kimg": 0.1}
    }


@pytest.mark.parametrize("name", DRAWING)
def test_trains_and_draws_the_same_on_both_devices(name: str, tmp_path: Path) -> None:
    run = api.train(name, "builtin:digits", tmp_path / "run", settings=settings(320))
    models = [load_model(run.weights(), where) for where in ("cuda", "cpu")]
    first, second = (draw(model.family, range(8), [0] * 8).float() for model in models)
    assert (first - second).abs().mean() < 2.0, "grey levels of 255"


@pytest.mark.parametrize("name", DRAWING)
def test_resume_is_exact(name: str, tmp_path: Path) -> None:
    whole = api.train(name, "builtin:digits", tmp_path / "whole", settings=settings(640))
    copied = Path(shutil.copytree(whole.path, tmp_path / "parts"))
    newest, *older = checkpoint.stored(copied / "checkpoints")
    shutil.rmtree(newest)
    assert older, "nothing to continue from"
    again = api.train(name, "builtin:digits", copied, settings=settings(640))
    ours, theirs = (checkpoint.load(checkpoint.stored(run.checkpoints)[0]).parts for run in (whole, again))
    for part, tensors in ours.items():
        assert all(torch.equal(value, theirs[part][key]) for key, value in tensors.items()), part


@pytest.mark.parametrize("name", ["dcgan", "r3gan", "stylegan2", "diffusion"])
def test_no_step_waits_for_the_device(name: str, tmp_path: Path) -> None:
    trainer = testing._trainer(name, tmp_path, 100, {"train": {"device": "cuda"}})
    for _ in range(4):  # what is done once: memory is found, kernels are chosen
        trainer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            trainer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_that_is_left_out_leaves_everything_as_it_is(tmp_path: Path) -> None:
    """On the device, and the host hears of it later."""
    trainer = testing._trainer("dcgan", tmp_path, 100, {"train": {"device": "cuda"}})
    for _ in range(4):
        trainer.step()
    before = {name: value.clone() for name, value in trainer.family.named_parameters()}
    spoilt = trainer.family.loss

    def bad(*given: object) -> Loss:
        told = spoilt(*given)  # type: ignore[arg-type]
        return Loss(told.total * float("nan"), told.parts)

    trainer.family.loss = bad  # type: ignore[method-assign]
    trainer.step()
    assert all(torch.equal(value, before[name]) for name, value in trainer.family.named_parameters())
    trainer.save()
    assert trainer.state.skipped_nimg == [trainer.state.nimg]


def test_peak_memory_is_reported(tmp_path: Path) -> None:
    run = api.train(DRAWING[0], "builtin:digits", tmp_path / "run", settings=settings(320))
    assert run.stats()[-1].get("peak_mem_gb", 1) > 0
