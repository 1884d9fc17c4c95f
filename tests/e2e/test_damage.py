"""Damaged checkpoints are noticed, skipped with a sentence, and the run still ends in the same bits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from imagekiln.engine import checkpoint

FAMILY = "vae"


def truncate(newest: Path) -> None:
    file = newest / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_one_bit(newest: Path) -> None:
    file = newest / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(data)


def lose_a_file(newest: Path) -> None:
    (newest / checkpoint.STATE).unlink()


def lose_the_manifest(newest: Path) -> None:
    (newest / checkpoint.MANIFEST).unlink()


def empty_every_file(newest: Path) -> None:
    for file in newest.iterdir():
        file.write_bytes(b"")


DAMAGES: list[Callable[[Path], None]] = [truncate, flip_one_bit, lose_a_file, lose_the_manifest, empty_every_file]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_falls_back_to_the_older_one(cli, tiny, reference, half_done, ends_like, tmp_path: Path, damage) -> None:
    out = half_done(FAMILY, tmp_path)
    newest = checkpoint.stored(out / "checkpoints")[0]
    damage(newest)
    continued = cli(*tiny(FAMILY, out)).ok()
    said = [line for line in continued.err.splitlines() if newest.name in line]
    assert len(said) == 1 and "skipped" in said[0]
    ends_like(reference(FAMILY), out)


def test_a_newer_schema_is_left_alone(cli, tiny, half_done, tmp_path: Path) -> None:
    out = half_done(FAMILY, tmp_path)
    file = checkpoint.stored(out / "checkpoints")[0] / checkpoint.MANIFEST
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps({**manifest, "schema_version": checkpoint.SCHEMA_VERSION + 1}))
    before = file.read_bytes()
    cli(*tiny(FAMILY, out)).refused(2, "newer version")
    assert file.read_bytes() == before


def test_without_any_whole_checkpoint_it_says_so(cli, tiny, half_done, tmp_path: Path) -> None:
    out = half_done(FAMILY, tmp_path)
    for path in checkpoint.stored(out / "checkpoints"):
        truncate(path)
    cli(*tiny(FAMILY, out)).refused(1, "checkpoints", "whole")


def test_what_a_crash_left_aside_is_cleared(cli, tiny, reference, half_done, ends_like, tmp_path: Path) -> None:
    out = half_done(FAMILY, tmp_path)
    newest = checkpoint.stored(out / "checkpoints")[0]
    shutil.copytree(newest, newest.with_name(".aside-000000999-1"))
    shutil.copytree(newest, newest.with_name(".trash-000000998-1"))
    cli(*tiny(FAMILY, out)).ok()
    assert not [p.name for p in (out / "checkpoints").iterdir() if p.name.startswith(".")]
    ends_like(reference(FAMILY), out)


@pytest.mark.parametrize("survivors", [(), ("checkpoints",), ("checkpoints", "meta.json")], ids=len)
def test_a_start_cut_short_does_not_block_the_folder(cli, tiny, ends_like, reference, tmp_path, survivors) -> None:
    """Killed between making the folder and writing the recipe, which is what makes it a run."""
    out = tmp_path / "run"
    out.mkdir()
    for name in survivors:
        if name == "checkpoints":
            (out / name).mkdir()
        else:
            shutil.copy(reference(FAMILY) / name, out / name)
    cli(*tiny(FAMILY, out)).ok()
    ends_like(reference(FAMILY), out)
