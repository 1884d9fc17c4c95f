"""Tensors as files: the bytes of the library, no second copy in memory, and whole or not there."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from imagekiln.engine.run import disk_faults
from imagekiln.engine.tensors import write_tensors
from imagekiln.errors import DiskError

ABOUT = {"format": "pt"}


def tensors() -> dict[str, torch.Tensor]:
    """In every layout: contiguous, channels last, transposed, one twice, and two parts of one storage."""
    weight = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    return {
        "b": weight,
        "a": weight.contiguous(memory_format=torch.channels_last),
        "tied": weight,
        "part": weight[1:3],
        "turned": torch.arange(6).view(2, 3).T,
        "half": torch.ones(3, dtype=torch.bfloat16).requires_grad_(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 2),
    }


def test_the_bytes_are_those_of_the_library(tmp_path: Path):
    path = tmp_path / "new" / "file"
    write_tensors(path, tensors(), ABOUT)
    plain = {key: value.detach().contiguous().clone() for key, value in tensors().items()}
    assert path.read_bytes() == save(plain, ABOUT)
    assert all(torch.equal(value, plain[key]) for key, value in load_file(path).items())
    assert [one.name for one in path.parent.iterdir()] == ["file"]
    assert stat.S_IMODE(path.stat().st_mode) & 0o044


MEASURE = """
import resource, sys, torch
from pathlib import Path
from imagekiln.engine.tensors import write_tensors
held = {str(place): torch.ones(1 << 22) for place in range(4)}  # 64 MiB
write_tensors(Path(sys.argv[1]) / "small", {"w": torch.ones(1)})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_tensors(Path(sys.argv[1]) / "large", held)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted in KiB")
def test_writing_holds_no_second_copy(tmp_path: Path):
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    grown_kib = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert (tmp_path / "large").stat().st_size > 1 << 26 and grown_kib < 1 << 14


def test_a_file_that_does_not_fit_leaves_the_old_one(tmp_path: Path):
    resource = pytest.importorskip("resource", reason="limits on files are POSIX")
    path, before = tmp_path / "file", resource.getrlimit(resource.RLIMIT_FSIZE)
    write_tensors(path, {"w": torch.ones(1)})
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        with pytest.raises(DiskError, match=r"file could not be written: File too large\.$"):
            write_tensors(path, {"w": torch.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [one.name for one in tmp_path.iterdir()] == ["file"] and load_file(path)["w"].tolist() == [1]


def test_what_the_library_says_of_the_disk_is_understood(tmp_path: Path):
    full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with (
        pytest.raises(DiskError, match=r"w could not be written: the disk is full\. Free some space"),
        disk_faults(tmp_path / "w"),
    ):
        raise full
    with pytest.raises(SafetensorError, match="header too large"), disk_faults(tmp_path / "w"):
        raise SafetensorError("Error while deserializing header: header too large")
