"""What every source of pictures must keep, whatever it was made from."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from imagekiln.config import DataConfig
from imagekiln.core import Source
from imagekiln.data import Dataset, Loader, load

REAL = Path(os.environ.get("IMAGEKILN_TEST_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")


def folder(root: Path) -> Path:
    rng = np.random.default_rng(0)
    for index in range(24):
        place = root / "set" / ("猫" if index % 2 else "dog")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(place / f"{index}.png")
    return root / "set"


def archive(root: Path) -> Path:
    with zipfile.ZipFile(root / "set.zip", "w") as out:
        for file in sorted(folder(root).rglob("*.png")):
            out.write(file, file.relative_to(root))
    return root / "set.zip"


def packed(root: Path) -> Path:
    load(DataConfig(path=str(folder(root))), root / "cache")
    return next((root / "cache" / "packed").iterdir())


def real(*names: str) -> Callable[[Path], Path]:
    def find(root: Path) -> Path:
        found = [REAL / name for name in names if (REAL / name).exists()]
        if not found:
            pytest.skip(f"{' or '.join(names)} is not here; IMAGEKILN_TEST_DATA names the folder that holds it")
        return found[0]

    return find


KINDS: dict[str, Callable[[Path], Path | str]] = {
    "digits": lambda root: "builtin:digits",
    "folder": folder,
    "zip": archive,
    "packed": packed,
    "fashion-mnist": real("fashion-mnist"),
    "cifar10": real("cifar-10-batches-bin"),
    "emoji": real("emoji.zip", "emoji"),
}
SMALL = ("digits", "folder", "zip", "packed")


def opened(kind: str, root: Path, **settings: object) -> Dataset:
    return load(DataConfig(path=str(KINDS[kind](root)), **settings), root / "cache")


@pytest.fixture(scope="module", params=list(KINDS))
def dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return opened(request.param, tmp_path_factory.mktemp("set"))


@pytest.fixture(params=["train", "validation"])
def source(request: pytest.FixtureRequest, dataset: Dataset) -> Source:
    return getattr(dataset, request.param)


def test_it_is_a_source_and_not_empty(source: Source) -> None:
    assert isinstance(source, Source) and len(source) > 0
    assert source.image_shape[0] in (1, 3, 4) and source.num_classes == len(source.class_names)
    assert len(source.fingerprint) == 32


def test_it_reads_any_indices_in_the_order_given(source: Source) -> None:
    last = len(source) - 1
    batch = source.read([last, 0, last])
    assert batch.images.dtype == torch.uint8 and batch.images.shape == (3, *source.image_shape)
    assert torch.equal(batch.images[0], batch.images[2])
    assert torch.equal(source.read([0]).images[0], batch.images[1])
    assert source.read([]).images.shape == (0, *source.image_shape)
    assert source.read(np.array([0, last])).images.shape[0] == 2
    with pytest.raises(IndexError):
        source.read([last + 1])


def test_its_labels_fit_its_classes(source: Source) -> None:
    labels = source.read(range(len(source))).labels
    if not source.num_classes:
        assert labels is None
        return
    assert labels is not None and labels.dtype == torch.int64 and labels.shape == (len(source),)
    assert labels.min() >= -1 and labels.max() < source.num_classes


def test_what_it_gives_may_be_written_to(source: Source) -> None:
    before = source.read([0]).images.clone()
    source.read([0]).images.zero_()
    assert torch.equal(source.read([0]).images, before)


def test_both_sides_agree_and_differ(dataset: Dataset) -> None:
    assert dataset.train.image_shape == dataset.validation.image_shape
    assert dataset.train.class_names == dataset.validation.class_names
    assert dataset.train.fingerprint != dataset.validation.fingerprint
    assert len(dataset.train.files) == len(dataset.train)
    assert f"{len(dataset.train):,} to train on" in dataset.summary()


def test_a_loader_feeds_on_it(source: Source) -> None:
    batch = Loader(source, 0, 5, flip=True).batch(10**6)
    assert batch.images.dtype == torch.float32 and batch.images.shape == (5, *source.image_shape)
    assert batch.images.min() >= -1 and batch.images.max() <= 1


@pytest.mark.parametrize("kind", SMALL)
def test_opening_it_twice_gives_the_same(kind: str, tmp_path: Path) -> None:
    assert opened(kind, tmp_path).fingerprint == opened(kind, tmp_path).fingerprint


@pytest.mark.parametrize("kind", ["digits", "folder", "zip"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_it_comes_at_any_size_and_with_any_channels(kind: str, channels: int, tmp_path: Path) -> None:
    data = opened(kind, tmp_path, size=24, channels=channels)
    assert data.train.image_shape == (channels, 24, 24)


def test_fashion_mnist_is_the_published_one() -> None:
    data = load(DataConfig(path=str(real("fashion-mnist")(Path()))))
    assert (len(data.train), len(data.validation)) == (60_000, 10_000) and data.notices == []
    assert data.train.class_names[0] == "T-shirt/top" and data.train.class_names[9] == "Ankle boot"
    labels = data.train.read(range(60_000)).labels
    assert labels is not None and labels.bincount().tolist() == [6000] * 10 and labels[0] == 9
