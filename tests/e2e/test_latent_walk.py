"""Walks, tables of styles, rows of classes and projections through the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

FRAMES = 4


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture).astype(int)


def frames_of(path: Path) -> list[np.ndarray]:
    with Image.open(path) as film:
        found = []
        for index in range(film.n_frames):
            film.seek(index)
            found.append(np.asarray(film).astype(int))
    return found


@pytest.mark.parametrize("family", ["vae", "stylegan2"])
def test_a_walk_goes_through_the_pictures_of_the_same_seed(cli, reference, tmp_path: Path, family: str) -> None:
    run, label = reference(family), ["--label", "3"]
    plain = ["generate", run, "-n", 3, "--seed", 9, *label]
    cli(*plain, "--out", tmp_path / "plain").ok()
    answered = cli(*plain, "--interpolate", FRAMES, "--fps", 25, "--out", tmp_path / "walk", "--json").ok().json()
    assert {"pictures", "grid", "walk", "strip", "weights", "understood", "cut"} == set(answered)
    names = [f"{index:06d}.png" for index in range(3)]
    for name in [*names, "grid.png"]:
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "walk" / name).read_bytes(), name
    film, strip = frames_of(Path(answered["walk"])), pixels(Path(answered["strip"]))
    assert len(film) == 3 * FRAMES
    zoom = film[0].shape[1] // 8
    for index, frame in enumerate(film):
        assert np.array_equal(strip[:, index * 9 * zoom :][:, : 8 * zoom], frame), index
    for index, name in enumerate(names):
        assert np.array_equal(film[index * FRAMES][::zoom, ::zoom], pixels(tmp_path / "plain" / name)), name


def test_a_table_of_styles(cli, reference, tmp_path: Path) -> None:
    run = reference("stylegan2")
    cli("generate", run, "-n", 2, "--mix", 3, "--crossover", 1, "--out", tmp_path / "mix").ok()
    cli("generate", run, "-n", 5, "--out", tmp_path / "plain").ok()
    assert len(list((tmp_path / "mix").glob("0*.png"))) == 5
    table = pixels(tmp_path / "mix" / "mix.png")
    zoom = table.shape[0] // 26  # three rows of 8 and two gaps
    cells = [[table[9 * zoom * r :: zoom, 9 * zoom * c :: zoom][:8, :8] for c in range(4)] for r in range(3)]
    assert (cells[0][0] == 255).all()
    drawn = [pixels(tmp_path / "plain" / f"{index:06d}.png") for index in range(5)]
    for row in range(2):
        assert np.array_equal(cells[1 + row][0], drawn[row])
    for column in range(3):
        assert np.array_equal(cells[0][1 + column], drawn[2 + column])


def test_rows_of_classes(cli, reference, tmp_path: Path) -> None:
    cli("generate", reference("vae"), "-n", 20, "--grid", "class", "--out", tmp_path / "rows").ok()
    sheet = pixels(tmp_path / "rows" / "grid.png")
    assert sheet.shape[0] % (10 * 9 - 1) == 0, "ten rows"
    zoom = sheet.shape[0] // 89
    margin = sheet.shape[1] - 17 * zoom
    assert np.array_equal(sheet[27 * zoom :: zoom, margin::zoom][:8, :8], pixels(tmp_path / "rows" / "000003.png"))


def test_truncation_and_who_has_it(cli, reference, tmp_path: Path) -> None:
    for family, share in (("biggan", 0.1), ("stylegan1", 0.0), ("stylegan2", 0.0)):
        drawn = {}
        for name, extra in (("free", []), ("cut", ["--truncation", share])):
            out = tmp_path / family / name
            cli("generate", reference(family), "-n", 12, "--label", 1, "--out", out, *extra).ok()
            drawn[name] = np.stack([pixels(out / f"{index:06d}.png") for index in range(12)])
        assert (drawn["cut"] != drawn["free"]).any(), family
        if share == 0.0:  # one style for all: only the noise of the layers is left
            assert drawn["cut"].std(0).mean() < 0.7 * drawn["free"].std(0).mean(), family
    cli("generate", reference("vae"), "--truncation", 0.5, "--out", tmp_path / "x").refused(2, "--truncation", "vae")
    cli("generate", reference("dcgan"), "--truncation", 0.5, "--out", tmp_path / "x").refused(2, "--truncation")
    cli("generate", reference("biggan"), "--truncation", -1, "--out", tmp_path / "x").refused(2, "truncation")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--interpolate", "8"], ["nothing between two classes", "--label"]),
        (["--interpolate", "1", "--label", "3"], ["2 or more frames"]),
        (["--interpolate", "8", "-n", "1"], ["at least 2 pictures"]),
        (["--interpolate", "900", "--label", "3"], ["at most 2000"]),
        (["--interpolate", "8", "--label", "3", "--fps", "0"], ["--fps"]),
        (["--mix", "4"], ["vae", "no styles"]),
        (["--mix", "-4"], ["--mix -4"]),
        (["--crossover", "2"], ["--mix"]),
        (["--grid", "square"], ["--grid square", "class"]),
    ],
    ids=lambda part: " ".join(part),
)
def test_what_cannot_be_drawn_is_refused_before_a_folder_is_made(
    cli, reference, tmp_path: Path, extra: list[str], words: list[str]
) -> None:
    cli("generate", reference("vae"), "--out", tmp_path / "out", *extra).refused(2, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["vae", "stylegan2"])
def test_a_picture_of_the_run_is_found_again(cli, reference, tmp_path: Path, family: str) -> None:
    run, quick = reference(family), ["--steps", 40, "--restarts", 2]
    cli("generate", run, "-n", 4, "--seed", 5, "--out", tmp_path / "drawn").ok()
    picture = tmp_path / "drawn" / "000002.png"
    told = cli("project", run, picture, "--out", tmp_path / "found", *quick, "--label", 2, "--json").ok().json()
    assert told["psnr_db"] > max(told["mean_psnr_db"], told["drawn_psnr_db"]) and told["label"] == "2"
    original, projection, difference = (pixels(Path(told[key])) for key in ("original", "projection", "difference"))
    assert np.array_equal(original, pixels(picture)) and np.array_equal(difference, np.abs(original - projection))
    error = (original - projection).astype(float)
    assert told["psnr_db"] == pytest.approx(min(99.0, 10 * np.log10(255**2 / max(1e-9, (error**2).mean()))))
    latent = load_file(told["latent"])
    assert latent["labels"].tolist() == [2] and ("styles" in latent) == (family == "stylegan2")
    said = cli("project", run, picture, "--out", tmp_path / "again", *quick).ok().out
    assert "dB" in said and str(tmp_path / "again" / "sheet.png") in said


def test_projections_that_cannot_be(cli, reference, tmp_path: Path) -> None:
    run, out = reference("vae"), tmp_path / "out"
    picture, text = tmp_path / "grey.png", tmp_path / "text.png"
    Image.new("L", (20, 30), 100).save(picture)
    text.write_text("hello")
    cli("project", run, text, "--out", out).refused(3, "text.png", "cannot be used")
    cli("project", run, tmp_path / "none.png", "--out", out).refused(3, "none.png does not exist")
    cli("project", tmp_path, picture, "--out", out).refused(2, "not a run folder")
    cli("project", run, picture, "--out", out, "--label", "eleven").refused(2, "eleven")
    cli("project", reference("vqvae"), picture, "--out", out).refused(2, "cannot be searched")
    cli("project", reference("diffusion"), picture, "--out", out).refused(2, "cannot be searched")
    assert not out.exists()
