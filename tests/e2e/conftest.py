"""Tiny trainings through the command line, and how their ends are compared."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import BaseModel
from torch import Tensor

from imagekiln.engine import checkpoint, registry
from imagekiln.engine.run import Run

SMALL = {"width": "8", "widths": "[16,16]", "attention": "[false,false]", "z_dim": "8", "depth": "1"}
SMALL |= {"text.width": "32", "text.layers": "2", "text.vocabulary": "520", "sample.steps": "4"}
NEVER_KIMG = 1000


@pytest.fixture(scope="session")
def tiny() -> Callable[..., list[str]]:
    """Arguments of a training that takes a second: `tiny("vae", out, nimg=160)`."""

    def arguments(family: str, out: Path, nimg: int = 240, checkpoint_nimg: int = 16, **settings: object) -> list[str]:
        small = {f"family.{key}": value for key, value in SMALL.items() if _known(registry.load(family).Config, key)}
        if foundation := registry.load(family).foundation:
            small[f"family.{foundation}"] = registry.load(family).check_settings[foundation]
        train = {
            "batch": 16,
            "total_kimg": nimg / 1000,
            "checkpoint_kimg": checkpoint_nimg / 1000,
            "preview_kimg": NEVER_KIMG,
            "validate_kimg": NEVER_KIMG,
            "precision": "fp32",
        }
        given = {**small, **{f"train.{key}": value for key, value in train.items()}}
        given |= {key.replace("__", ".") if "__" in key else f"train.{key}": v for key, v in settings.items()}
        pairs = [part for key, value in given.items() for part in ("--set", f"{key}={value}")]
        return [
            "train",
            family,
            "--data",
            "builtin:digits",
            "--out",
            str(out),
            "--device",
            "cpu",
            "--no-report",
            *pairs,
        ]

    return arguments


def _known(section: type[BaseModel], key: str) -> bool:
    """Whether a section has this setting: `_known(VaeConfig, "width")`."""
    name, _, rest = key.partition(".")
    field = section.model_fields.get(name)
    return field is not None and (not rest or _known(field.annotation, rest))


@pytest.fixture(scope="session")
def ends_like() -> Callable[[Path, Path], None]:
    """Both runs ended in the same bits: model, optimizer, every average."""

    def compare(first: Path, second: Path) -> None:
        ours, theirs = _final(first), _final(second)
        assert ours.keys() == theirs.keys()
        different = [key for key in ours if not torch.equal(ours[key], theirs[key])]
        assert not different, f"{len(different)} of {len(ours)} tensors differ: {different[:3]}"

    return compare


def _final(folder: Path) -> dict[str, Tensor]:
    run = Run.open(folder)
    assert run.status()["state"] == "finished"
    newest = checkpoint.load(checkpoint.stored(run.checkpoints)[0])
    assert newest.nimg == run.status()["nimg"] >= run.status()["total_nimg"]  # steps may be of several batches
    return {f"{part}/{key}": value for part, tensors in newest.parts.items() for key, value in tensors.items()}


@pytest.fixture(scope="session")
def reference(cli, tiny, tmp_path_factory) -> Callable[..., Path]:
    """The run folder of an uninterrupted training with these settings; trained once."""
    folder, known = tmp_path_factory.mktemp("reference"), dict[str, Path]()

    def of(family: str, **settings: object) -> Path:
        key = f"{Path(family).stem}-{sorted(settings.items())}"
        if key not in known:
            known[key] = folder / str(len(known))
            cli(*tiny(family, known[key], **settings)).ok()
        return known[key]

    return of


@pytest.fixture(scope="session")
def half_done(cli, tiny, tmp_path_factory) -> Callable[[str, Path], Path]:
    """A copy of a run that was stopped half way: `half_done("vae", tmp_path)`; the whole run is `reference("vae")`."""
    folder = tmp_path_factory.mktemp("half")

    def of(family: str, into: Path) -> Path:
        kept = folder / family
        if not kept.exists():
            command = cli.start(*tiny(family, kept))
            run = Run(kept)
            command.wait_until(lambda: bool(checkpoint.stored(run.checkpoints)[5:6] or _nimg(run) >= 96))
            command.send(2)
            assert command.wait().code == 75
        return Path(shutil.copytree(kept, into / "run"))

    return of


def _nimg(run: Run) -> int:
    stored = checkpoint.stored(run.checkpoints)
    return int(stored[0].name) if stored else 0
