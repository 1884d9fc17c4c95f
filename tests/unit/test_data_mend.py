"""Truncated JPEG files: the rows that are there are those of the whole file; only nearly whole pictures are used."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagekiln.data import PrepareConfig, mend, prepare
from imagekiln.data.decode import Opened, Unusable, open_noted, open_safely
from imagekiln.errors import UsageError


def photo(height: int = 120, width: int = 90, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 9, 3), dtype=np.uint8)).resize((width, height))
    noisy = np.asarray(coarse).astype(int) + rng.integers(-15, 16, (height, width, 1))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, format: str = "JPEG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def mended(raw: bytes, **options: int) -> Opened:
    return open_noted(io.BytesIO(raw), name="a.jpg", repair=True, **options)


KINDS = {
    "4:2:0": {"quality": 85, "subsampling": 2},
    "4:4:4": {"quality": 95, "subsampling": 0},
    "restarts": {"quality": 85, "restart_marker_rows": 1},
    "optimized": {"quality": 60, "optimize": True},
}


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_what_is_there_is_what_the_whole_file_holds(kind: str, mode: str) -> None:
    raw = encoded(photo().convert(mode), **KINDS[kind])
    whole, start = np.asarray(Image.open(io.BytesIO(raw))), raw.rindex(b"\xff\xda")
    before = 0
    for at in range(start + 40, len(raw), (len(raw) - start) // 25):
        image, num_rows = mend.decoded(raw[:at], Image.open)
        assert (np.asarray(image)[:num_rows] == whole[:num_rows]).all()
        assert num_rows >= before, "more bytes, more rows"
        # A row of blocks is 8 or 16 pixels high, and smoothed color reaches one row further.
        assert num_rows >= 120 * (at - start) / (len(raw) - start) - 40
        before = num_rows
    assert mend.decoded(raw[:-2], Image.open)[1] == 120 >= before > 100


def test_missing_rows_are_cut_off_and_never_grey() -> None:
    raw = encoded(photo(), quality=85)
    whole = np.asarray(open_safely(io.BytesIO(raw)))
    found = mended(raw[: int(0.97 * len(raw))])
    assert found.notes == {"repaired"} and 108 <= found.height < 120 and found.width == 90
    assert found.image.size == (90, found.height) and (np.asarray(found.image) == whole[: found.height]).all()
    last = mended(raw[:-2])
    assert (np.asarray(last.image) == whole).all() and last.notes == {"repaired"}


def test_rows_of_a_turned_picture_are_missing_at_a_side() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    raw = encoded(photo(), quality=85, exif=exif)
    whole, found = np.asarray(open_safely(io.BytesIO(raw))), mended(raw[: int(0.97 * len(raw))])
    assert found.notes == {"repaired", "turned"} and (found.height, found.image.height) == (90, 90)
    assert (np.asarray(found.image) == whole[:, 120 - found.width :]).all()


@pytest.mark.parametrize("share", [0.02, 0.5, 0.8])
def test_too_little_is_refused(share: float) -> None:
    raw = encoded(photo(), quality=85)
    with pytest.raises(Unusable, match=r"truncated|damaged"):
        mended(raw[: int(share * len(raw))])


def test_what_cannot_be_told_complete_is_refused() -> None:
    progressive = encoded(photo(), quality=85, progressive=True)
    for raw in (progressive[:-20], encoded(photo(), "PNG")[:-30], encoded(photo(), "GIF")[:-30]):
        with pytest.raises(Unusable):
            mended(raw)


def test_unasked_nothing_is_mended_and_whole_files_are_not_touched() -> None:
    raw = encoded(photo(), quality=85)
    with pytest.raises(Unusable, match="truncated"):
        open_noted(io.BytesIO(raw[:-2]))
    plain, asked = open_noted(io.BytesIO(raw), short_side=16), mended(raw, short_side=16)
    assert asked.notes == plain.notes == set() and (np.asarray(asked.image) == np.asarray(plain.image)).all()


def test_mutated_files_are_decoded_or_refused() -> None:
    rng, raw = np.random.default_rng(0), encoded(photo(64, 32), quality=85)
    outcomes = {"decoded": 0, "refused": 0}
    for _ in range(200):
        changed = bytearray(raw[: rng.integers(len(raw) * 7 // 8, len(raw))])
        for _ in range(rng.integers(3)):
            changed[rng.integers(len(changed))] = rng.integers(256)
        try:
            outcomes["decoded"] += mended(bytes(changed)).image.width > 0
        except Unusable:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 20


def test_a_prepared_set_says_what_was_mended(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(6):
        raw = encoded(photo(seed=number), quality=85)
        kept = {0: len(raw) - 2, 1: int(0.97 * len(raw)), 2: len(raw) // 2}.get(number, len(raw))
        (tmp_path / "photos" / f"{number}.jpg").write_bytes(raw[:kept])
    sources, out = [str(tmp_path / "photos")], tmp_path / "set"
    plain, asked = PrepareConfig(size=16), PrepareConfig(size=16, repair=True)
    assert {row["file_name"] for row in prepare(sources, out, plain).rows} == {"3.jpg", "4.jpg", "5.jpg"}
    prepared = prepare(sources, out, asked)
    assert {row["file_name"]: row.get("repaired", False) for row in prepared.rows} == {
        f"{number}.jpg": number < 2 for number in (0, 1, 3, 4, 5)
    }
    notice = "2 truncated JPEG files are used without the rows that are missing at their lower edge: 0.jpg, 1.jpg."
    assert notice in prepared.about["notices"]
    with (out / "left_out.csv").open(encoding="utf-8", newline="") as stream:
        assert [(row["file"], row["reason"]) for row in csv.DictReader(stream)] == [("2.jpg", "truncated")]
    assert notice in prepare(sources, out, asked.model_copy(update={"validation_fraction": 0.5})).about["notices"]
    with pytest.raises(UsageError, match="To change repair, the pictures are needed"):
        prepare([], out, plain)
