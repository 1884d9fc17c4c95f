"""Every kind of bad or odd picture, with what must come of it."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from imagekiln.data.decode import (
    FORMATS,
    MAX_PIXELS,
    Unusable,
    colour,
    fit,
    flatten,
    num_frames,
    open_noted,
    open_safely,
    probe,
)
from imagekiln.errors import UsageError

RNG = np.random.default_rng(0)
NOISE = Image.fromarray(RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8))


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def decoded(raw: bytes, **options: int) -> Image.Image:
    return open_safely(io.BytesIO(raw), **options)


def why(raw: bytes, **options: int) -> str:
    with pytest.raises(Unusable) as error:
        decoded(raw, **options)
    return str(error.value)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def one_bit_png(side: int) -> bytes:
    """A real, tiny PNG of side x side pixels: the classic decompression bomb."""
    packer, row = zlib.compressobj(9), b"\0" + b"\0" * ((side + 7) // 8)
    body = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_read_by_content(format: str) -> None:
    image = decoded(encoded(NOISE, format))
    assert image.size == NOISE.size and image.mode in ("L", "RGB", "RGBA")
    if format in ("PNG", "BMP", "TIFF"):
        assert (np.asarray(image) == np.asarray(NOISE)).all()


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "empty file"),
        (b"hello, I am a shopping list\n", "not an image (text)"),
        (b"\n<!DOCTYPE html><html><body>404</body></html>", "not an image (HTML)"),
        (b"\xef\xbb\xbf<HTML>moved</HTML>", "not an image (HTML)"),
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "SVG is not read; convert it to PNG"),
        (b"%PDF-1.7\n", "not an image (PDF)"),
        (b"8BPS\0\1" + bytes(40), "PSD is not read; convert it to PNG"),
        (b"\0\0\0\x18ftypheic" + bytes(40), "HEIC is not read; convert it to JPEG or PNG"),
        (b"\0\0\0\x18ftypavif" + bytes(40), "AVIF is not read; convert it to JPEG or PNG"),
        (b"PK\3\4" + bytes(40), "not an image (zip)"),
        (bytes(range(128, 256)), "not an image"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "damaged"),
    ],
)
def test_what_is_not_a_picture_is_called_by_its_name(raw: bytes, reason: str) -> None:
    assert why(raw) == reason


@pytest.mark.parametrize("format", FORMATS)
def test_a_picture_cut_in_half_is_refused(format: str) -> None:
    raw = encoded(NOISE, format)
    assert why(raw[: len(raw) // 2]) == "truncated"


def test_a_jpeg_that_lacks_two_bytes_is_refused() -> None:
    assert why(encoded(NOISE, "JPEG")[:-2]) == "truncated"


def test_a_png_with_a_wrong_checksum_is_refused() -> None:
    raw = bytearray(encoded(NOISE, "PNG"))
    at = raw.index(b"IDAT")
    (length,) = struct.unpack(">I", raw[at - 4 : at])
    raw[at + 4 + length] ^= 1
    assert why(bytes(raw)) == "damaged (wrong checksum)"


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((1, 1), "1x1 is below the smallest size (4x4)"),
        ((3, 5000), "3x5000 is below the smallest size (4x4)"),
        ((2000, 10), "2000x10 is narrower than 1:20"),
    ],
)
def test_specks_and_strips_are_refused(size: tuple[int, int], reason: str) -> None:
    assert why(encoded(Image.new("L", size), "PNG")) == reason


@pytest.mark.parametrize(("side", "reason"), [(20_000, "too large (400 MP)"), (12_000, "too large (144 MP)")])
def test_bombs_are_refused_before_decoding_and_without_a_warning(side: int, reason: str) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    assert why(one_bit_png(side)) == reason
    assert limit == Image.MAX_IMAGE_PIXELS


def test_the_limit_is_ours_and_not_pillows() -> None:
    assert MAX_PIXELS > Image.MAX_IMAGE_PIXELS  # between the two Pillow would warn, and warnings fail this test
    assert decoded(one_bit_png(9_600)).size == (9_600, 9_600)
    assert why(encoded(NOISE, "PNG"), max_pixels=2399) == "too large (0 MP)"


def test_a_webp_that_claims_to_be_huge_is_refused() -> None:
    raw = bytearray(encoded(NOISE, "WEBP", lossless=True))
    at = raw.index(b"VP8L") + 9
    raw[at : at + 4] = struct.pack("<I", (16383) | (16383 << 14))
    assert why(bytes(raw)).startswith("too large (268 MP)")


def test_a_float_tiff_is_scaled_or_refused() -> None:
    ramp = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    image = decoded(encoded(Image.fromarray(ramp), "TIFF"))
    assert (np.asarray(image).ravel() == np.arange(256)).all()
    assert why(encoded(Image.fromarray(ramp * 4), "TIFF")) == "float pixels outside 0..1 (HDR)"
    ramp[3, 3] = np.nan
    assert why(encoded(Image.fromarray(ramp), "TIFF")) == "pixels that are not finite numbers"


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_and_never_clipped(format: str) -> None:
    values = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    image = decoded(encoded(Image.fromarray(values), format))
    assert image.mode == "L"
    assert (np.asarray(image).ravel() == np.arange(256)).all()


def test_a_tiff_of_twelve_bits_is_scaled_from_its_own_range() -> None:
    values = np.rint(np.arange(256) * 4095 / 255).astype(np.uint16)
    raw = encoded(Image.fromarray(values.reshape(16, 16)), "TIFF")
    pairs = (int(a) << 12 | int(b) for a, b in values.reshape(-1, 2))
    raw = raw.replace(values.tobytes(), b"".join(pair.to_bytes(3, "big") for pair in pairs))
    twelve = raw.replace(struct.pack("<HHIHH", 258, 3, 1, 16, 0), struct.pack("<HHIHH", 258, 3, 1, 12, 0))
    assert (np.asarray(decoded(twelve)).ravel() == np.arange(256)).all()


def test_a_jpeg_with_a_gain_map_behind_it_is_a_jpeg() -> None:
    raw = encoded(NOISE.resize((60, 400)), "MPO", save_all=True, append_images=[Image.new("L", (15, 100), 90)])
    opened = open_noted(io.BytesIO(raw), name="a.jpg")
    assert opened.notes == frozenset() and (opened.height, opened.width) == (400, 60)
    assert num_frames(io.BytesIO(raw), 9) == 1
    assert decoded(raw, short_side=10).size == (30, 200)
    picture = raw[: raw.index(b"\xff\xd8", 2)]
    cut = open_noted(io.BytesIO(picture[:-20]), repair=True)
    assert cut.notes == {"repaired"} and 360 <= cut.height < 400


def test_zero_is_white_where_a_tiff_says_so() -> None:
    ramp = np.arange(256).reshape(16, 16)
    for values in ((ramp * 257).astype(np.uint16), (ramp / 255).astype(np.float32)):
        raw = encoded(Image.fromarray(values), "TIFF", tiffinfo={262: 0})
        assert (np.asarray(decoded(raw)).ravel() == np.arange(256)[::-1]).all()


def test_cmyk_becomes_rgb() -> None:
    inks = Image.merge("CMYK", [Image.new("L", (16, 16), ink) for ink in (0, 255, 255, 0)])
    red = np.asarray(decoded(encoded(inks, "JPEG", quality=100))).astype(int)
    assert np.abs(red - [255, 0, 0]).max() <= 2


def icc_profile(primaries: np.ndarray, gamma: float) -> bytes:
    """A matrix display profile (ICC.1:2001) with these primaries (columns, XYZ relative to D50) and a plain gamma."""

    def fixed(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    def xyz(column: np.ndarray) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(map(fixed, column))

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"wide\0" + bytes(11 + 67)
    white = np.array([0.9642, 1.0, 0.8249])
    tags = {b"desc": text + bytes(-len(text) % 4), b"wtpt": xyz(white)}
    tags |= {name + b"XYZ": xyz(primaries[:, column]) for column, name in enumerate((b"r", b"g", b"b"))}
    tags |= {name + b"TRC": curve for name in (b"r", b"g", b"b")}
    offset, table, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name + struct.pack(">II", offset + len(body), len(content))
        body += content
    header = bytearray(128)
    header[8:24] = b"\x02\x10\0\0mntrRGB XYZ "
    header[36:40], header[68:80] = b"acsp", b"".join(map(fixed, white))
    header[0:4] = struct.pack(">I", offset + len(body))
    return bytes(header) + table + body


DISPLAY_P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])


@pytest.mark.parametrize("alpha", [False, True])
def test_a_wide_gamut_profile_is_converted_as_the_matrices_say(alpha: bool) -> None:
    wide = np.array([[180, 120, 100], [128, 128, 128], [90, 140, 110], [120, 110, 170]], np.uint8)
    linear = (wide / 255) ** 2.2 @ DISPLAY_P3.T @ np.linalg.inv(SRGB).T
    expected = 255 * np.where(linear < 0.0031308, 12.92 * linear, 1.055 * linear.clip(0) ** (1 / 2.4) - 0.055)
    image = Image.fromarray(np.repeat(np.repeat(wide[None], 4, 0), 4, 1))
    if alpha:
        image.putalpha(128)
    found = decoded(encoded(image, "PNG", icc_profile=icc_profile(DISPLAY_P3, 2.2)))
    assert found.mode == image.mode
    assert np.abs(np.asarray(found)[0, ::4, :3] - expected).max() <= 2
    assert np.abs(expected - wide).max() > 8  # ignoring the profile would fail


def test_a_profile_that_makes_no_sense_is_ignored() -> None:
    image = decoded(encoded(NOISE, "PNG", icc_profile=b"not a profile"))
    assert (np.asarray(image) == np.asarray(NOISE)).all()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_eight_orientations_are_turned_upright(format: str, orientation: int) -> None:
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :24, 0], upright[:16, 24:, 1], upright[16:, :24, 2] = 255, 255, 255
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    raw = encoded(Image.fromarray(np.ascontiguousarray(stored)), format, exif=exif)
    image = decoded(raw)
    assert probe(io.BytesIO(raw)) == (32, 48)
    assert image.size == (48, 32)
    found = np.asarray(image.convert("RGB"))[8::16, 12::24] > 128
    assert (found == (upright[8::16, 12::24] > 128)).all()


def test_no_metadata_survives() -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8825)[1] = "N"
    exif[0x010F] = "SECRET CAMERA"
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "SECRET PLACE")
    for image in (
        decoded(encoded(NOISE, "JPEG", exif=exif)),
        decoded(encoded(NOISE, "PNG", exif=exif, pnginfo=text)),
    ):
        assert image.info == {} and not image.getexif()
        assert b"SECRET" not in encoded(image, "PNG")


def test_transparency_is_composited_or_kept_and_hidden_colour_never_leaks() -> None:
    pixels = np.full((8, 8, 4), (255, 0, 0, 0), np.uint8)
    pixels[:, 4:] = (0, 0, 255, 255)
    image = decoded(encoded(Image.fromarray(pixels), "PNG"))
    flat = fit(image, (8, 8), background="white", channels=3)
    assert (flat[:, :4] == 255).all() and (flat[:, 4:] == (0, 0, 255)).all()
    kept = fit(image, (8, 8), channels=4)
    assert (kept[:, :4] == 0).all() and (kept[:, 4:] == (0, 0, 255, 255)).all()
    for size in ((4, 4), (16, 16)):
        assert fit(image, size, background="black", channels=3)[..., 0].max() == 0
        assert fit(image, size, channels=4)[..., 0].max() == 0


def test_half_transparent_pixels_mix_with_the_background() -> None:
    image = Image.new("RGBA", (8, 8), (200, 100, 0, 51))
    assert fit(image, (8, 8), background="#0000ff", channels=3)[0, 0].tolist() == [40, 20, 204]


def test_palettes_and_grey_with_transparency() -> None:
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.paste(0, (0, 0, 4, 8))
    clear = decoded(encoded(palette, "PNG", transparency=0))
    assert clear.mode == "RGBA"
    assert fit(clear, (8, 8), background="black")[0, [0, 7]].tolist() == [[0, 0, 0], [0, 255, 0]]
    assert decoded(encoded(palette, "GIF")).mode == "RGB"
    grey = decoded(encoded(Image.new("LA", (8, 8), (100, 0)), "PNG"))
    assert grey.mode == "LA" and (fit(grey, (8, 8), background="white", channels=1) == 255).all()
    key = decoded(encoded(Image.new("RGB", (8, 8), (1, 2, 3)), "PNG", transparency=(1, 2, 3)))
    assert key.mode == "RGBA" and fit(key, (8, 8), channels=4).max() == 0


def test_grey_stays_grey_exactly() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert (fit(Image.fromarray(ramp), (16, 16), channels=1)[..., 0] == ramp).all()


def test_the_first_frame_of_an_animation_is_taken() -> None:
    frames = [Image.new("RGB", (8, 8), name) for name in ("red", "blue")]
    for format in ("GIF", "PNG", "TIFF", "WEBP"):
        image = decoded(encoded(frames[0], format, save_all=True, append_images=frames[1:]))
        found = np.asarray(image.convert("RGB")).astype(int)
        assert np.abs(found - [255, 0, 0]).max() <= 6, format


def test_crop_keeps_the_centre_and_pad_keeps_everything() -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    assert (fit(Image.fromarray(wide), (10, 10), "crop") == 255).all()
    padded = fit(Image.fromarray(wide), (30, 30), "pad", background="red")
    assert (padded[:10] == (255, 0, 0)).all() and (padded[20:] == (255, 0, 0)).all()
    assert (padded[10:20] == wide).all()
    assert (fit(Image.fromarray(wide), (30, 30), "pad", channels=4)[:10] == 0).all()


def test_shrinking_is_antialiased() -> None:
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    assert np.abs(fit(Image.fromarray(board), (8, 8), channels=1)[2:6, 2:6].astype(int) - 127.5).max() < 3


@given(
    st.integers(4, 40),
    st.integers(4, 40),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from(["crop", "smart", "pad"]),
)
@settings(max_examples=60, deadline=None)
def test_a_flat_picture_stays_flat_at_any_size(height: int, width: int, rows: int, columns: int, how: str) -> None:
    out = fit(Image.new("RGB", (width, height), (9, 99, 199)), (rows, columns), how, background="#0963c7")
    assert out.shape == (rows, columns, 3) and (out == (9, 99, 199)).all()


def test_flatten_composites_any_leading_shape() -> None:
    pixels = RNG.integers(0, 256, (3, 5, 5, 4), dtype=np.uint8)
    weight = pixels[..., 3:] / 255
    expected = pixels[..., :3] * weight + np.array([10, 20, 30]) * (1 - weight)
    assert np.abs(flatten(pixels, 3, (10, 20, 30)) - expected).max() <= 0.5 + 1e-9
    assert flatten(pixels, 1, (0, 0, 0)).shape == (3, 5, 5, 1)


def test_a_jpeg_may_be_decoded_smaller_but_never_below_twice_the_target() -> None:
    smooth = Image.linear_gradient("L").resize((800, 640)).convert("RGB")
    raw = encoded(smooth, "JPEG", quality=95)
    small = decoded(raw, short_side=64)
    assert small.size == (200, 160)
    difference = fit(small, (64, 64)).astype(int) - fit(decoded(raw), (64, 64))
    assert np.abs(difference).max() <= 3
    assert why(raw[: len(raw) // 2], short_side=64) == "truncated"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_reduced_jpeg_is_not_moved(orientation: int) -> None:
    """Sides that eight does not divide leave padding in the reduced picture, which must not count as picture."""
    waves = np.sin(np.linspace(0, 20, 515))[:, None] + np.cos(np.linspace(0, 31, 777))[None]
    photo = Image.fromarray(np.uint8(np.stack([waves, waves.clip(-1, 1), -waves], -1) * 60 + 128))
    exif = Image.Exif()
    exif[0x0112] = orientation
    raw = encoded(photo, "JPEG", quality=95, exif=exif)
    for how in ("crop", "pad"):
        reduced, whole = (fit(decoded(raw, short_side=side), (32, 32), how).astype(float) for side in (32, 0))
        assert 10 * np.log10(255**2 / np.square(reduced - whole).mean()) > 45  # decibels; 28 when it is moved


def test_colour_names() -> None:
    assert colour("white") == (255, 255, 255) and colour("#102030") == (16, 32, 48) == colour("#102030ff")
    with pytest.raises(UsageError, match=r"data\.background = 'blurple' is no colour"):
        colour("blurple")


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    class Denied(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise PermissionError(13, "Permission denied")

    for file, reason in ((Denied(), "permission denied"), (tmp_path / "gone.png", "no such file")):
        with pytest.raises(Unusable, match=reason):
            open_safely(file)
    with pytest.raises(Unusable, match="not a regular file"):
        open_safely(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")
def test_a_fifo_is_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(Unusable, match="not a regular file"):
        open_safely(tmp_path / "pipe.png")


def with_checksums(raw: bytes) -> bytes:
    """A PNG whose chunks, as far as they can be followed, have right checksums: mutations reach the decoder."""
    out, at = raw[:8], 8
    while at + 12 <= len(raw) and (length := struct.unpack(">I", raw[at : at + 4])[0]) <= len(raw) - at - 12:
        out += png_chunk(raw[at + 4 : at + 8], raw[at + 8 : at + 8 + length])
        at += 12 + length
    return out + raw[at:]


@pytest.mark.parametrize("format", FORMATS)
def test_mutated_files_are_decoded_or_refused_with_a_reason(format: str) -> None:
    """350 mutations a format, 2,100 in all: what a decoder throws arrives as a plain reason, and nothing crashes."""
    rng = np.random.default_rng(len(format))
    palette = Image.fromarray(RNG.integers(0, 256, (24, 24), dtype=np.uint8)).convert("P")
    exif = Image.Exif()
    exif[0x0112] = 6
    seeds = [encoded(NOISE, format, **({} if format in ("BMP", "GIF") else {"exif": exif}))]
    seeds += [encoded(palette, format)] if format in ("PNG", "GIF", "TIFF") else []
    outcomes = {"decoded": 0, "refused": 0}
    for index in range(350):
        raw = bytearray(seeds[index % len(seeds)])
        for _ in range(rng.integers(1, 5)):
            place = rng.integers(len(raw) if rng.random() < 0.5 else min(len(raw), 160))
            match rng.integers(3):
                case 0:
                    raw[place] = rng.integers(256)
                case 1:
                    del raw[place : place + rng.integers(1, 16)]
                case _:
                    raw[place:place] = rng.bytes(rng.integers(1, 16))
        try:
            mutated = with_checksums(bytes(raw)) if format == "PNG" else bytes(raw)
            pixels = fit(decoded(mutated, short_side=8), (8, 8), channels=4)
            assert pixels.shape == (8, 8, 4)
            outcomes["decoded"] += 1
        except Unusable as error:
            assert str(error).isprintable() and len(str(error)) < 80
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 0


def test_what_is_noticed_while_reading() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif.get_ifd(0x8825)[1] = "N"
    opened = open_noted(io.BytesIO(encoded(NOISE, "JPEG", exif=exif)), name="a.PNG", short_side=8)
    assert opened.notes == {"turned", "place", "extension"} and (opened.height, opened.width) == (60, 40)
    film = encoded(NOISE, "GIF", save_all=True, append_images=[NOISE.rotate(90)])
    assert open_noted(io.BytesIO(film), name="a.gif").notes == {"frames"}
    deep = Image.fromarray(np.zeros((8, 8), np.uint16))
    assert open_noted(io.BytesIO(encoded(deep, "PNG")), name="a.png").notes == {"deep"}
    assert open_noted(io.BytesIO(encoded(NOISE, "PNG"))).notes == set()
