"""Starts that end before the first checkpoint: the next one begins as if there had been none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import imagekiln
from imagekiln.engine import codec as codecs
from imagekiln.engine.models import codec_of
from imagekiln.engine.run import Run
from imagekiln.engine.trainer import Trainer
from imagekiln.errors import DiskError, UsageError

SMALL = {
    "family": {"widths": [16], "attention": [False], "sample": {"steps": 4}},
    "train": {"batch": 16, "total_kimg": 0.064, "precision": "fp32"},
}


def train(out: Path, begin_with: Path | None = None, assignments: tuple[str, ...] = (), **more: Any) -> Run:
    name = "" if begin_with else "diffusion"
    return imagekiln.train(
        name, "builtin:digits", out, settings=SMALL, begin_with=begin_with, assignments=assignments, **more
    )


def cut_short(*_: Any) -> None:
    raise KeyboardInterrupt


def test_the_weights_of_another_run_are_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = train(tmp_path / "before")
    whole = train(tmp_path / "whole", before.path)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Trainer, "fit", cut_short)
        train(tmp_path / "parts", before.path)
    assert Run(tmp_path / "parts").exists()
    parts = train(tmp_path / "parts", before.path)
    first, second = (load_file(run.weights()) for run in (whole, parts))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_settings_may_be_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything was learned nothing is held to; afterwards settings are."""
    with monkeypatch.context() as patched, pytest.raises(UsageError):
        patched.setattr(Trainer, "__init__", lambda *_: (_ for _ in ()).throw(UsageError("no such device")))
        train(tmp_path / "run")
    run = train(tmp_path / "run", assignments=("train.seed=3",))
    assert "seed = 3" in run.recipe_path.read_text()
    with pytest.raises(UsageError, match=r"train\.seed = 3, not 4"):
        train(tmp_path / "run", assignments=("train.seed=4",))


def test_a_codec_that_was_kept_by_half_is_kept_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coder = {"kind": "tiny", "width": 8, "factor": 2, "adversarial_weight": 0.0}
    settings = {"family": coder, "train": SMALL["train"]}
    codec = imagekiln.train("autoencoder", "builtin:digits", tmp_path / "codec", settings=settings)
    named = (f"data.codec='{codec.path}'",)
    written = codecs.write_whole

    def full(path: Path, data: bytes | str) -> None:
        if path.name == "scales.json":
            raise DiskError("the disk is full")
        written(path, data)

    with monkeypatch.context() as patched, pytest.raises(DiskError):
        patched.setattr(codecs, "write_whole", full)
        train(tmp_path / "run", assignments=named)
    assert codec_of(Run(tmp_path / "run")) is None
    run = train(tmp_path / "run", assignments=named)
    assert codec_of(run) is not None
    assert len(imagekiln.generate(run, 2, tmp_path / "drawn").pictures) == 2


def test_what_a_start_left_is_not_believed(tmp_path: Path) -> None:
    """A codec kept by a start in latents is none of the run over pixels that takes its place."""
    run = Run.create(tmp_path / "run", "", {})
    codecs.write_whole(run.codec_path, b"")
    codecs.write_whole(run.codec_scales_path, "{}")
    assert codec_of(train(run.path)) is None
