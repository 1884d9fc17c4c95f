"""Folders that cannot be written, and disks that fill up: one sentence, exit 2 or 5, and nothing whole is lost."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from imagekiln.engine import checkpoint
from imagekiln.engine.run import Run


def test_two_trainings_in_one_folder(cli, tiny, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = cli.start(*tiny("vae", out, nimg=200_000))
    first.wait_until(lambda: bool(checkpoint.stored(out / "checkpoints")))
    cli(*tiny("vae", out, nimg=200_000)).refused(2, "Another process", "--out")
    first.send(9)
    first.wait()
    cli(*tiny("vae", out, nimg=16)).ok()  # the lock of a process that died does not stay


def test_a_file_in_the_way(cli, tiny, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    ended = cli(*tiny("vae", tmp_path / "run"))
    ended.refused(2, str(tmp_path / "run"), "--out")
    assert (tmp_path / "run").read_text() == "mine"


def test_a_path_below_a_file(cli, tiny, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    cli(*tiny("vae", tmp_path / "file" / "run")).refused(5, str(tmp_path / "file"))


def test_a_name_too_long(cli, tiny, tmp_path: Path) -> None:
    cli(*tiny("vae", tmp_path / ("n" * 300))).refused(5, "too long")


def test_a_folder_of_something_else(cli, tiny, tmp_path: Path) -> None:
    (tmp_path / "thesis.doc").write_text("mine")
    cli(*tiny("vae", tmp_path)).refused(2, "holds files but no run", "--out")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.doc"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_without_permission(cli, tiny, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    cli(*tiny("vae", tmp_path / "closed" / "run")).refused(5, "not writable")


def test_pictures_into_a_file(cli, reference, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    cli("generate", reference("vae"), "--out", tmp_path / "out").refused(5, str(tmp_path / "out"))


def test_a_checkpoint_that_does_not_fit(cli, tiny, reference, half_done, ends_like, tmp_path: Path) -> None:
    """A limit on the size of files stops every save; the last whole checkpoint stays, and later it goes on."""
    out = half_done("vae", tmp_path)
    before = checkpoint.stored(out / "checkpoints")[0]
    cli(*tiny("vae", out), limits={"RLIMIT_FSIZE": 20_000}).refused(5, "could not be written")
    assert checkpoint.load_newest(out / "checkpoints")[0].nimg == int(before.name)
    assert not list((out / "checkpoints").glob(".aside-*"))
    cli(*tiny("vae", out)).ok()
    ends_like(reference("vae"), out)


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.name != "posix" or os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(cli, tiny, reference, ends_like, small_disk: Path) -> None:
    out = small_disk / "run"
    cli(*tiny("vae", out, nimg=48)).ok()
    whole = checkpoint.stored(out / "checkpoints")[0].name
    filler = small_disk / "filler"
    with filler.open("wb") as file:
        file.write(b"0" * (os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize - 150_000))
    cli(*tiny("vae", out)).refused(5, "disk is full", "Free some space")
    found, sentences = checkpoint.load_newest(out / "checkpoints")
    assert found is not None and not sentences and found.nimg >= int(whole)
    filler.unlink()
    cli(*tiny("vae", out)).ok()
    assert Run(out).status()["state"] == "finished"


def test_an_export_onto_a_full_disk(cli, reference, small_disk: Path) -> None:
    filler, room = small_disk / "filler", os.statvfs(small_disk)
    filler.write_bytes(b"0" * (room.f_bavail * room.f_frsize - 40_000))
    export = ("export", reference("diffusion"), "--to", "diffusers", "--out", small_disk / "out")
    cli(*export).refused(5, "disk is full", "Free some space")
    assert not [path.name for path in small_disk.rglob("*") if "safetensors" in path.name or path.name.startswith(".")]
