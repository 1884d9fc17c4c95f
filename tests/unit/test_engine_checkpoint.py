"""Checkpoints: complete or absent, and not one damaged bit goes unnoticed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from imagekiln.engine import checkpoint
from imagekiln.errors import CheckpointError, DiskError, UsageError

PARTS = {
    "model": {"w": torch.arange(6.0).view(2, 3), "n": torch.tensor(7), "empty": torch.empty(0)},
    "optimizer": {"net/w/exp_avg": torch.full((2, 3), 0.1, dtype=torch.bfloat16)},
}
STATE = {"attempt": 2, "best_loss": 0.25, "skipped_nimg": [3]}


def save(folder: Path, nimg: int) -> Path:
    return checkpoint.save(folder, nimg, PARTS, STATE)


def same(found: checkpoint.Checkpoint, nimg: int) -> bool:
    tensors = all(torch.equal(found.parts[p][k], v) for p, part in PARTS.items() for k, v in part.items())
    return tensors and found.parts.keys() == PARTS.keys() and found.state == {**STATE, "nimg": nimg}


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    path = save(tmp_path, 64)
    assert path.name == "000000064" and same(checkpoint.load(path), 64)
    assert [p.name for p in tmp_path.iterdir()] == ["000000064"]


def test_saving_twice_keeps_the_second(tmp_path: Path) -> None:
    save(tmp_path, 64)
    path = checkpoint.save(tmp_path, 64, PARTS, {"attempt": 9})
    assert checkpoint.load(path).state["attempt"] == 9 and [p.name for p in tmp_path.iterdir()] == ["000000064"]


def test_tensors_in_any_memory_layout(tmp_path: Path) -> None:
    image = torch.arange(48.0).view(1, 3, 4, 4).to(memory_format=torch.channels_last)
    path = checkpoint.save(tmp_path, 0, {"model": {"image": image, "slice": image[:, :, 1]}}, {})
    found = checkpoint.load(path).parts["model"]
    assert torch.equal(found["image"], image) and torch.equal(found["slice"], image[:, :, 1])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("whole"), 64)


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_no_flipped_bit_is_believed(whole: Path, tmp_path: Path, data: st.DataObject) -> None:
    shutil.rmtree(tmp_path / "c", ignore_errors=True)
    path = Path(shutil.copytree(whole, tmp_path / "c"))
    file = path / data.draw(st.sampled_from(sorted(p.name for p in path.iterdir())))
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)
    try:
        found = checkpoint.load(path)
    except (CheckpointError, UsageError):
        return
    assert file.name == checkpoint.MANIFEST and same(found, 64), "what is believed is what was saved"


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_no_truncated_file_is_believed(whole: Path, tmp_path: Path, data: st.DataObject) -> None:
    shutil.rmtree(tmp_path / "c", ignore_errors=True)
    path = Path(shutil.copytree(whole, tmp_path / "c"))
    file = path / data.draw(st.sampled_from(sorted(p.name for p in path.iterdir())))
    content = file.read_bytes()
    file.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(CheckpointError):
        checkpoint.load(path)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    manifest=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["schema_version", "files", "nimg", "x"]), inner)
        ),
    )
)
@example(manifest={"schema_version": 1, "files": ["model.safetensors"]})
@example(manifest={"schema_version": 1, "files": {}})
@example(manifest={"schema_version": False, "files": {}, "nimg": None})
@example(manifest={"schema_version": 1, "files": {}, "nimg": None})
@example(manifest={"schema_version": 1, "files": {}, "nimg": -1})
@example(manifest={"schema_version": 1, "files": {}, "nimg": 64})
def test_any_manifest_is_answered_in_words(whole: Path, tmp_path: Path, manifest: object) -> None:
    shutil.rmtree(tmp_path / "c", ignore_errors=True)
    path = Path(shutil.copytree(whole, tmp_path / "c"))
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises((CheckpointError, UsageError)):
        checkpoint.load(path)


def test_the_newest_whole_one_is_taken_and_the_others_are_named(tmp_path: Path) -> None:
    for nimg in (1, 2, 10):
        save(tmp_path, nimg)
    (tmp_path / "000000010" / "model.safetensors").unlink()
    (tmp_path / "000000002" / checkpoint.MANIFEST).write_text("{")
    found, sentences = checkpoint.load_newest(tmp_path)
    assert found is not None and found.nimg == 1
    assert ["000000010" in sentences[0], "000000002" in sentences[1], len(sentences)] == [True, True, 2]
    shutil.rmtree(tmp_path / "000000001")
    with pytest.raises(CheckpointError, match="None of the 2 checkpoints"):
        checkpoint.load_newest(tmp_path)


def test_none_is_none(tmp_path: Path) -> None:
    assert checkpoint.load_newest(tmp_path / "nothing") == (None, [])


@pytest.mark.parametrize("keep", [0, 1, 2, 3])
def test_rotation_keeps_two_at_least_and_what_is_pinned(tmp_path: Path, keep: int) -> None:
    for nimg in range(1, 7):
        save(tmp_path, nimg)
    (tmp_path / ".aside-000000009-1").mkdir()
    checkpoint.rotate(tmp_path, keep, pinned={2})
    left = sorted(int(path.name) for path in tmp_path.iterdir())
    assert left == [2, *range(7 - max(2, keep), 7)]


def test_forgetting_never_takes_the_last_one(tmp_path: Path) -> None:
    for nimg in (4, 8, 12):
        save(tmp_path, nimg)
    checkpoint.forget_after(tmp_path, 8)
    assert [p.name for p in checkpoint.stored(tmp_path)] == ["000000008", "000000004"]
    checkpoint.forget_after(tmp_path, 0)
    assert [p.name for p in checkpoint.stored(tmp_path)] == ["000000004"]


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="could not be written"):
        save(tmp_path / "file", 1)


@pytest.mark.parametrize(("fused", "where"), [(True, "meta"), (False, "cpu")])
def test_an_optimizer_goes_back_to_the_device_of_its_parameters(fused: bool, where: str) -> None:
    """torch counts the steps of a fused optimizer beside the parameter, those of others on the CPU."""
    weight = torch.nn.Parameter(torch.ones(2, 3))
    before = torch.optim.Adam([weight], fused=fused)
    weight.grad = torch.ones(2, 3)
    before.step()
    kept = checkpoint.optimizer_tensors("net", before, [("w", weight)])
    kept["net/w/scale"] = torch.ones(1)  # state of a shape of its own
    moved = torch.nn.Parameter(weight.to("meta"))
    after = torch.optim.Adam([moved])
    after.param_groups[0]["fused"] = fused  # torch refuses to build it for this device
    checkpoint.load_optimizer("net", after, [("w", moved)], kept)
    found = {entry: value.device.type for entry, value in after.state[moved].items()}
    assert found == {"step": where, "exp_avg": "meta", "exp_avg_sq": "meta", "scale": "meta"}
