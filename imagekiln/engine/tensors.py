"""Tensors as safetensors files, written from where they lie: of a large network no second copy is in memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from imagekiln.engine.run import written_whole


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> None:
    """One file, whole or not there; its folder is made. about: metadata.

    Tensors may be on any device, in any layout, and share their numbers with each other.

    Raises:
        DiskError: the disk is full or the folder is not writable.
    """
    with written_whole(path) as aside:
        stream(aside, tensors, about)


def stream(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> None:
    """The same at the path itself, flushed to the disk; raises what `imagekiln.engine.run.disk_faults` understands."""
    path.touch()
    mode = path.stat().st_mode
    save_file(_held(tensors), path, dict(about) if about else None)
    path.chmod(mode)  # safetensors leaves 0600, which locks out a shared group
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _held(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as a file holds them: on the CPU, contiguous, none sharing its numbers with another."""
    held: dict[str, Tensor] = {}
    storages: set[int] = set()
    for key, value in tensors.items():
        value = value.detach().cpu().contiguous()
        place = value.untyped_storage().data_ptr()
        held[key] = value.clone() if place in storages else value
        storages.add(place)
    return held
