"""Checkpoints that a crash cannot spoil: complete or absent, checksummed, free of pickle.

Protocol: write into a folder aside, fsync every file, write a manifest of sha256 sums last, fsync, rename, fsync the
parent; only then delete old ones, never below two. Reading goes from the newest to the oldest and believes nothing that
the manifest does not confirm, because a flipped bit loads without complaint otherwise.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from imagekiln.engine.run import disk_faults
from imagekiln.engine.tensors import stream
from imagekiln.errors import CheckpointError, DiskError, UsageError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """What was read: tensors by part (`model`, `optimizer`, one part a moving average) and the trainer's state."""

    nimg: int
    parts: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save(folder: Path, nimg: int, parts: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
    """Write a checkpoint; an older one of the same name gives way only when the new one is whole.

    Raises:
        DiskError: it does not fit, or the folder is not writable. What was there before is untouched.
    """
    final = folder / f"{nimg:09d}"
    aside = folder / f".aside-{nimg:09d}-{os.getpid()}"
    try:
        with disk_faults(final):
            _refuse_when_full(folder, parts)
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            sums = {}
            for name, tensors in parts.items():
                file = aside / f"{name}.safetensors"
                stream(file, tensors)
                sums[file.name] = _sum_and_size(file)
            _write_json(aside / STATE, {**state, "nimg": nimg})
            sums[STATE] = _sum_and_size(aside / STATE)
            _write_json(aside / MANIFEST, {"schema_version": SCHEMA_VERSION, "nimg": nimg, "files": sums})
            _fsync(aside)
            if final.exists():
                final.rename(folder / f".trash-{nimg:09d}-{os.getpid()}")
            aside.rename(final)
            _fsync(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    for trash in folder.glob(".trash-*"):
        shutil.rmtree(trash, ignore_errors=True)
    return final


def rotate(folder: Path, keep: int, pinned: set[int]) -> None:
    """Delete all but the newest `keep` (never fewer than two) and the pinned ones; also what a crash left aside."""
    for leftover in [*folder.glob(".aside-*"), *folder.glob(".trash-*")]:
        shutil.rmtree(leftover, ignore_errors=True)
    for path in stored(folder)[max(2, keep) :]:
        if int(path.name) not in pinned:
            _delete(path)


def forget_after(folder: Path, nimg: int) -> None:
    """Delete the checkpoints of later moments, but never the only one left."""
    for path in stored(folder)[:-1]:
        if int(path.name) > nimg:
            _delete(path)


def stored(folder: Path) -> list[Path]:
    """Folders of all checkpoints, newest first."""
    return sorted((p for p in folder.glob("[0-9]*") if p.name.isdigit()), key=lambda p: int(p.name), reverse=True)


def noted(folder: Path, key: str) -> set[Any]:
    """The values of a number in the states of all checkpoints; of one that cannot be read there is none."""
    found = set()
    for path in stored(folder):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            found.add(json.loads((path / STATE).read_text(encoding="utf-8")).get(key))
    return found - {None}


def load(path: Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Read and verify one checkpoint.

    Raises:
        CheckpointError: a file is missing, shorter than written, or differs in a single bit.
        UsageError: it was written by a newer version of imagekiln.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["schema_version"] > SCHEMA_VERSION:
            raise UsageError(f"{path} was written by a newer version of imagekiln. Update imagekiln to continue it.")
        for name, expected in manifest["files"].items():
            if not (path / name).is_file():
                raise CheckpointError(f"{name} is missing")
            if _sum_and_size(path / name) != expected:
                raise CheckpointError(f"{name} is damaged (its checksum differs)")
        nimg = manifest["nimg"]
        if type(manifest["schema_version"]) is not int or type(nimg) is not int or nimg < 0:
            raise CheckpointError(f"{MANIFEST} names no version and no number of pictures")
        if STATE not in manifest["files"]:  # what the manifest leaves out is not verified
            raise CheckpointError(f"{MANIFEST} does not name {STATE}")
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        names = [name for name in manifest["files"] if name.endswith(".safetensors")]
        parts = {name.removesuffix(".safetensors"): load_file(path / name, device=str(device)) for name in names}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"it cannot be read ({type(error).__name__}: {error})") from error
    return Checkpoint(nimg=nimg, parts=parts, state=state)


def load_newest(folder: Path, device: torch.device | str = "cpu") -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and one sentence for each newer one that is not.

    Raises:
        CheckpointError: there are checkpoints, but not one of them is whole.
    """
    sentences: list[str] = []
    paths = stored(folder)
    for path in paths:
        try:
            return load(path, device), sentences
        except CheckpointError as error:
            sentences.append(f"Checkpoint {path.name} was skipped: {error}.")
    if paths:
        raise CheckpointError(
            f"None of the {len(paths)} checkpoints in {folder} is whole. {sentences[0]} "
            "Delete the run folder to start again."
        )
    return None, sentences


def _delete(path: Path) -> None:
    trash = path.with_name(f".trash-{path.name}-{os.getpid()}")
    path.rename(trash)  # at once, so that no half-deleted checkpoint is ever taken for a damaged one
    shutil.rmtree(trash, ignore_errors=True)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())


def _sum_and_size(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"sha256": digest, "bytes": path.stat().st_size}


def _fsync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _refuse_when_full(folder: Path, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    needed = sum(tensor.nbytes for tensors in parts.values() for tensor in tensors.values())
    free = shutil.disk_usage(folder).free
    if free < 1.2 * needed + 1_000_000:
        raise DiskError(
            f"{folder}: the disk is full. A checkpoint needs {needed / 1e6:.0f} MB and {free / 1e6:.0f} MB are free. "
            "Free some space and run the same command again; the last checkpoint is whole."
        )


# -- optimizers -------------------------------------------------------------------------------------------------------

Named = Sequence[tuple[str, nn.Parameter]]


def optimizer_tensors(key: str, optimizer: Optimizer, parameters: Named) -> dict[str, Tensor]:
    """An optimizer's state by `key/parameter/entry`: names outlive the order of parameters."""
    return {
        f"{key}/{name}/{entry}": torch.as_tensor(value)
        for name, parameter in parameters
        for entry, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(key: str, optimizer: Optimizer, parameters: Named, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` took, on the devices of the parameters."""
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    optimizer.state.clear()
    for name, parameter in parameters:
        prefix = f"{key}/{name}/"
        state = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
        if state:
            counted_there = any(groups[parameter].get(way) for way in ("fused", "capturable"))
            optimizer.state[parameter] = {
                # torch counts steps on the CPU, unless the kernel itself counts.
                entry: value if entry == "step" and not counted_there else _placed(value, parameter)
                for entry, value in state.items()
            }


def _placed(value: Tensor, parameter: nn.Parameter) -> Tensor:
    return _like(value, parameter) if value.shape == parameter.shape else value.to(parameter.device)


def _like(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """The tensor on the parameter's device and in its memory layout: optimizer kernels round differently otherwise."""
    result = torch.empty_like(parameter, dtype=value.dtype)
    result.copy_(value)
    return result.detach()
