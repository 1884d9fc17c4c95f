"""Numbers of one picture against what can be said about them on paper, and hashes against their definition."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter
from scenes import scene

from imagekiln.data import measures
from imagekiln.data.survey import MEASURES, THUMB


def by_definition(grey: np.ndarray, with_mean: bool) -> int:
    """The hash written out: sums of cosines in double precision, one coefficient after the other."""
    angles = [[math.pi * k * (2 * n + 1) / 64 for n in range(32)] for k in range(8)]
    cosines = np.cos(np.array(angles))
    D = [
        float(sum(grey[y].astype(float) @ cosines[u] * cosines[v][y] for y in range(32)))
        for v in range(8)
        for u in range(8)
    ]
    if with_mean:
        ordered = sorted(D)
        bits = [d > (ordered[31] + ordered[32]) / 2 for d in D]
    else:
        bits = [d >= sorted(D[1:])[31] for d in D]
    return int("".join("01"[bit] for bit in bits), 2)


@pytest.mark.parametrize("with_mean", [False, True])
def test_hashes_are_what_their_definition_says(with_mean: bool) -> None:
    grey = np.stack([np.asarray(scene(seed).convert("L").resize((32, 32))) for seed in range(8)])
    found = measures.perceptual_hashes(grey, median_with_mean=with_mean)
    assert found.dtype == np.uint64
    assert found.tolist() == [by_definition(picture, with_mean) for picture in grey]


@pytest.mark.parametrize("with_mean", [False, True])
def test_hashes_are_those_of_the_transform_the_peers_use(with_mean: bool) -> None:
    fftpack = pytest.importorskip("scipy.fftpack")
    rng = np.random.default_rng(0)
    flat = np.full((3, 32, 32), [[[0]], [[77]], [[255]]])
    half = rng.integers(0, 256, (20, 32, 16))
    symmetric = np.concatenate([half, half[:, :, ::-1]], 2)
    grey = np.concatenate([rng.integers(0, 256, (200, 32, 32)), symmetric, flat]).astype(np.uint8)
    D = fftpack.dct(fftpack.dct(grey, axis=1), axis=2)[:, :8, :8].reshape(len(grey), 64)
    bits = np.median(D, axis=1)[:, None] < D if with_mean else np.median(D[:, 1:], axis=1)[:, None] <= D
    expected = [int("".join("01"[bit] for bit in row), 2) for row in bits.astype(int)]
    assert measures.perceptual_hashes(grey, median_with_mean=with_mean).tolist() == expected


def test_the_two_rules_differ_in_the_bit_of_the_median() -> None:
    grey = np.stack([measures.measure(scene(seed))[1] for seed in range(10)])[..., 1]
    both = [measures.perceptual_hashes(grey, median_with_mean=rule) for rule in (False, True)]
    assert np.bitwise_count(both[0] ^ both[1]).tolist() == [1] * 10


def test_the_mirrored_hash_is_that_of_the_mirrored_picture() -> None:
    rng = np.random.default_rng(1)
    half = rng.integers(0, 256, (5, 32, 16))
    grey = np.concatenate([rng.integers(0, 256, (50, 32, 32)), np.concatenate([half, half[..., ::-1]], 2)])
    found = measures.perceptual_hashes(grey, mirrored=True)
    assert (found == measures.perceptual_hashes(grey[:, :, ::-1])).all()
    assert (found[50:] == measures.perceptual_hashes(grey[50:])).all()


def test_hashes_do_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    grey = np.random.default_rng(2).integers(0, 256, (23, 32, 32))
    whole = measures.perceptual_hashes(grey)
    monkeypatch.setattr(measures, "_BLOCK", 5)
    assert (measures.perceptual_hashes(grey) == whole).all()
    assert measures.perceptual_hashes(grey[:0]).shape == (0,)


def test_grey_is_pillows() -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    assert all(
        (grey == np.asarray(Image.fromarray(rgb).convert("L"))).all()
        for grey, rgb in zip(measures.grey(pixels), pixels, strict=True)
    )


def test_light_and_entropy_of_two_tones() -> None:
    pixels = np.zeros((40, 40), np.uint8)
    pixels[:, :10] = 255
    entry, thumb = measures.measure(Image.fromarray(pixels))
    assert entry.dtype == MEASURES and (entry["height"], entry["width"]) == (40, 40)
    assert entry["brightness"] == pytest.approx(0.25)
    assert entry["contrast"] == pytest.approx(math.sqrt(0.25 * 0.75))
    assert entry["entropy"] == pytest.approx(-0.25 * math.log2(0.25) - 0.75 * math.log2(0.75), rel=1e-6)
    assert thumb.shape == (THUMB, THUMB, 3) and thumb.dtype == np.uint8


def test_a_flat_picture_has_no_entropy_contrast_or_sharpness() -> None:
    for size in ((4, 4), (5, 80), (300, 200)):
        entry, _ = measures.measure(Image.new("RGB", size, (90, 90, 90)))
        assert (entry["contrast"], entry["entropy"], entry["sharpness"]) == (0, 0, 0)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
@pytest.mark.parametrize("side", [20, 200])
def test_transparent_pixels_lie_on_white(mode: str, side: int) -> None:
    image = Image.new(mode, (side, side), (0, 0) if mode == "LA" else (200, 0, 0, 0))
    image.paste((0, 255) if mode == "LA" else (0, 0, 0, 255), (0, 0, side, side // 2))
    entry, thumb = measures.measure(image)
    assert entry["brightness"] == pytest.approx(0.5, abs=0.01)
    assert (thumb[-4:] == 255).all() and (thumb[:4] == 0).all()


def test_size_is_the_files_where_it_was_decoded_smaller() -> None:
    entry, _ = measures.measure(scene(0), (720, 960))
    assert (entry["height"], entry["width"]) == (720, 960)


@pytest.mark.parametrize("size", [(900, 601), (521, 777)])
def test_a_picture_is_measured_alike_at_any_size(size: tuple[int, int]) -> None:
    smooth = scene(3, (225, 150)).filter(ImageFilter.GaussianBlur(2)).resize(size, Image.Resampling.BICUBIC)
    small = smooth.resize((size[0] // 4, size[1] // 4), Image.Resampling.LANCZOS)
    (whole, thumb), (reduced, copy) = measures.measure(smooth), measures.measure(small, (size[1], size[0]))
    assert (whole["height"], whole["width"]) == (reduced["height"], reduced["width"])
    for name in ("brightness", "contrast", "entropy", "sharpness"):
        assert whole[name] == pytest.approx(reduced[name], rel=0.03), name
    assert np.abs(thumb.astype(int) - copy).mean() < 1.5


def test_sharpness_is_the_ratio_of_energies() -> None:
    luma = np.random.default_rng(4).integers(0, 256, (19, 27)).astype(float)

    def binomial(picture: np.ndarray, step: int) -> np.ndarray:
        out, (height, width) = np.zeros_like(picture), picture.shape
        fold = lambda at, side: side - 1 - abs(side - 1 - abs(at))  # noqa: E731
        for y in range(height):
            for x in range(width):
                for dy, wy in ((-step, 1), (0, 2), (step, 1)):
                    for dx, wx in ((-step, 1), (0, 2), (step, 1)):
                        out[y, x] += wy * wx * picture[fold(y + dy, height), fold(x + dx, width)] / 16
        return out

    first = binomial(luma, 1)
    second = binomial(first, 2)
    third = binomial(second, 4)
    energy = [((a - b) ** 2).sum() for a, b in ((luma, first), (first, second), (second, third))]
    assert measures.sharpness(luma) == pytest.approx(energy[0] / max(energy[1], energy[2] / 3), rel=1e-4)
    assert measures.sharpness(luma / 3 + 20) == pytest.approx(measures.sharpness(luma), rel=1e-4)


@pytest.mark.parametrize("size", [(32, 32), (64, 48), (96, 72), (400, 300)])
def test_blur_lowers_sharpness_whatever_the_size(size: tuple[int, int]) -> None:
    sharp = [float(measures.measure(scene(seed, size))[0]["sharpness"]) for seed in range(5)]
    radius = 0.04 * min(size)
    blurred = [scene(seed, size).filter(ImageFilter.GaussianBlur(radius)) for seed in range(5)]
    assert min(sharp) > 0.5
    assert max(float(measures.measure(image)[0]["sharpness"]) for image in blurred) < 0.3


def test_noise_of_jpeg_does_not_make_a_strong_blur_sharp() -> None:
    stream = io.BytesIO()
    scene(0, (96, 96)).filter(ImageFilter.GaussianBlur(6)).save(stream, "JPEG", quality=80)
    assert measures.measure(Image.open(stream).convert("RGB"))[0]["sharpness"] < 0.3


def test_hashes_are_added_to_a_table_whose_copies_lie_on_disk(tmp_path: Path) -> None:
    images = [scene(seed) for seed in range(6)]
    measured = np.zeros(6, MEASURES)
    thumbs = np.memmap(tmp_path / "thumbs", np.uint8, "w+", shape=(6, THUMB, THUMB, 3))
    for index, image in enumerate(images):
        measured[index], thumbs[index] = measures.measure(image)
    measures.add_hashes(measured, thumbs)
    mirrored = [measures.measure(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))[1] for image in images]
    again = measures.perceptual_hashes(measures.grey(np.stack(mirrored)))
    assert len(set(measured["hash"].tolist())) == 6
    assert np.bitwise_count(measured["mirrored"] ^ again).max() <= 2
    assert (measured["height"] == 72).all()


def test_small_copies_of_a_mapped_file_are_its_rows(tmp_path: Path) -> None:
    pixels = np.random.default_rng(5).integers(0, 256, (9, THUMB, THUMB, 3), dtype=np.uint8)
    np.save(tmp_path / "thumbs.npy", pixels)
    mapped = np.load(tmp_path / "thumbs.npy", mmap_mode="r")
    rows = np.array([7, 0, 7])
    for thumbs, expected in (
        (mapped, pixels),
        (mapped[2:], pixels[2:]),
        (mapped[::-1], pixels[::-1]),
        (pixels, pixels),
    ):
        found = measures.small_copies(thumbs, rows % len(thumbs))
        assert (found == expected[rows % len(expected)]).all()
        assert type(found) is np.ndarray


def test_what_was_written_stays_when_its_pages_are_released(tmp_path: Path) -> None:
    mapped = np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.uint8, (5, 4096))
    mapped[:] = np.arange(5, dtype=np.uint8)[:, None]
    measures.release(mapped)
    mapped[1] = 9
    measures.release(mapped)
    measures.release(np.zeros(3))  # nothing to let go of
    assert mapped[:, 7].tolist() == np.load(tmp_path / "a.npy")[:, 7].tolist() == [0, 9, 2, 3, 4]
