"""What people get wrong: each ends with its exit code, one clear sentence and no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

RECIPES = {
    "unknown key": (["--set", "train.bach=8"], 2, ["train.bach", "'batch'"]),
    "unknown section": (["--set", "trian.batch=8"], 2, ["trian", "'train'"]),
    "unknown family setting": (["--set", "family.wdith=8"], 2, ["family.wdith", "'width'"]),
    "unknown optimizer": (["--set", "optim.decodr.lr=0.1"], 2, ["optim.decodr"]),
    "wrong type": (["--set", "train.batch=many"], 2, ["train.batch", "'many'", "integer"]),
    "a section for a value": (["--set", "train=5"], 2, ["train"]),
    "a value for optimizers": (["--set", "optim=5"], 2, ["optim = 5"]),
    "a value for an optimizer": (["--set", "optim.decoder-encoder-noise=5"], 2, ["optim.decoder-encoder-noise = 5"]),
    "too small": (["--set", "train.batch=0"], 2, ["train.batch", "greater"]),
    "no average": (["--set", "train.averages=[]"], 2, ["train.averages", "at least 1"]),
    "a date": (["--set", "train.batch=2024-01-01", "--set", "train.seed=1"], 2, ["train.batch"]),
    "not a number": (["--set", "optim.decoder-encoder-noise.lr=nan"], 2, ["optim.decoder-encoder-noise.lr", "nan"]),
    "infinite length": (["--set", "train.total_kimg=inf"], 2, ["train.total_kimg", "finite"]),
    "negative rate": (["--set", "optim.decoder-encoder-noise.lr=-1"], 2, ["optim.decoder-encoder-noise.lr"]),
    "no value": (["--set", "train.batch"], 2, ["key=value"]),
    "unknown device": (["--set", "train.device=abacus"], 2, ["train.device", "cpu"]),
    "unknown option": (["--bach", "8"], 2, ["--bach"]),
    "negative seed": (["--seed", "-1"], 2, ["train.seed"]),
}


@pytest.mark.parametrize("case", RECIPES)
def test_settings(cli, tmp_path: Path, case: str) -> None:
    extra, code, words = RECIPES[case]
    cli("train", "vae", "--data", "builtin:digits", "--out", tmp_path / "run", *extra).refused(code, *words)
    assert not (tmp_path / "run").exists(), "a refused training leaves nothing behind"


def test_a_number_in_quotes_is_a_number(cli, tiny, tmp_path: Path) -> None:
    settings = {"optim__decoder-encoder-noise__lr": "'1e-4'"}
    cli(*tiny("vae", tmp_path / "run", nimg=16, **settings)).ok()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "difusion", "--data", "builtin:digits"], ["difusion", "'diffusion'"]),
        (["train", "no.such.module", "--data", "builtin:digits"], ["no.such.module"]),
        (["train", "missing.py", "--data", "builtin:digits"], ["missing.py"]),
        (["train", "missing.toml", "--data", "builtin:digits"], ["missing.toml"]),
        (["train", "vae"], ["--data"]),
        (["train", "vae", "--data", "no/such/folder"], ["no/such/folder"]),
        (["train", "vae", "--data", "builtin:digit"], ["digit", "digits"]),
        (["generate", "no/such/run"], ["no/such/run", "not a run folder"]),
        (["compare", "no/such/run"], ["no/such/run"]),
        (["evaluate", "no/such/run"], ["no/such/run"]),
        (["recipe", "show", "nothing"], ["nothing"]),
        (["kindle"], ["kindle"]),
    ],
    ids=lambda part: " ".join(part[:2]),
)
def test_names_that_do_not_exist(cli, tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    cli(*arguments, cwd=tmp_path).refused(2, *words)
    assert not any(path for path in tmp_path.iterdir() if path.name != "runs")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:7"])
def test_a_gpu_that_is_not_there(cli, tmp_path: Path, device: str) -> None:
    ended = cli("train", "vae", "--data", "builtin:digits", "--out", tmp_path / "run", "--device", device)
    ended.refused(2, device, "this machine has", "cpu")


def test_a_broken_recipe_file(cli, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[family\nname = 3")
    cli("train", "mine.toml", "--data", "builtin:digits", cwd=tmp_path).refused(2, "mine.toml", "line 1")


def test_a_family_file_that_does_not_import(cli, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import no_such_package")
    cli("train", "mine.py", "--data", "builtin:digits", cwd=tmp_path).refused(2, "no_such_package")
    (tmp_path / "mine.py").write_text("x = 1")
    cli("train", "mine.py", "--data", "builtin:digits", cwd=tmp_path).refused(2, "one subclass of Family")


def test_an_empty_folder(cli, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    cli("train", "vae", "--data", "photos", "--out", "run", cwd=tmp_path).refused(3, "photos")
    assert not (tmp_path / "run").exists()


def test_texts_that_are_named_like_pictures(cli, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for index in range(3):
        (tmp_path / "photos" / f"{index}.jpg").write_text("<html>not a picture</html>")
    cli("train", "vae", "--data", "photos", "--out", "run", cwd=tmp_path).refused(3, "photos")


def draw_photos(folder: Path, count: int) -> None:
    folder.mkdir()
    for index in range(count):
        Image.new("RGB", (16, 16), (10 * index, 255 - 10 * index, 128)).save(folder / f"{index}.png")


def test_one_bad_picture_among_good_ones(cli, tiny, tmp_path: Path) -> None:
    draw_photos(tmp_path / "photos", 24)
    whole = (tmp_path / "photos" / "0.png").read_bytes()
    (tmp_path / "photos" / "broken.png").write_bytes(whole[: len(whole) // 2])
    arguments = tiny("vae", tmp_path / "run", nimg=32)
    arguments[arguments.index("builtin:digits")] = str(tmp_path / "photos")
    ended = cli(*arguments).ok()
    assert "24 pictures" in ended.err and "1 " in ended.err


def test_other_pictures_or_settings_do_not_continue_a_run(cli, tiny, half_done, tmp_path: Path) -> None:
    out = half_done("vae", tmp_path)
    cli(*tiny("vae", out, seed=5)).refused(2, "train.seed", "0", "5", "--out")
    cli(*tiny("vae", out, family__beta=2.0)).refused(2, "family.beta")
    cli(*tiny("dcgan", out)).refused(2, "family")
    draw_photos(tmp_path / "photos", 24)
    arguments = tiny("vae", out)
    arguments[arguments.index("builtin:digits")] = str(tmp_path / "photos")
    cli(*arguments).refused(2, "pictures differ", "--out")
    cli(*tiny("vae", out, keep=5)).ok()  # what does not change the result may change


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--label", "eleven"], ["--label", "eleven", "0"]),
        (["--label", "10"], ["10"]),
        (["--label", "²"], ["²"]),
        (["--steps", "5"], ["--steps", "vae"]),
        (["--nimg", "7"], ["7 images", "240"]),
        (["--average", "median"], ["median", "power-0.100"]),
        (["-n", "0"], ["-n"]),
        (["--batch", "0"], ["--batch"]),
        (["--option", "seed=3"], ["--option seed", "use --seed"]),
        (["--option", "n=3"], ["use -n"]),
        (["--option", "as_written=true"], ["use --as-written"]),
    ],
    ids=lambda part: " ".join(part),
)
def test_drawing(cli, reference, tmp_path: Path, extra: list[str], words: list[str]) -> None:
    cli("generate", reference("vae"), "--out", tmp_path / "out", *extra).refused(2, *words)
    assert not (tmp_path / "out").exists()


def test_measuring(cli, reference) -> None:
    cli("evaluate", reference("vae"), "--option", "seed=3").refused(2, "--option seed", "use --seed")
    refused = cli("evaluate", reference("vae"), "--option", "speed=3").refused(2, "--speed", "vae")
    assert "judge" not in refused.err, "what cannot be drawn is said before a judge is trained"


def test_a_folder_without_run_or_weights(cli, tiny, reference, tmp_path: Path) -> None:
    cli("generate", tmp_path).refused(2, "not a run folder")
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "recipe.toml").write_bytes((reference("vae") / "recipe.toml").read_bytes())
    cli("generate", begun).refused(2, "no weights yet")


def test_weights_that_are_no_weights(cli, tiny, reference, tmp_path: Path) -> None:
    import shutil

    out = Path(shutil.copytree(reference("vae"), tmp_path / "run"))
    for file in (out / "weights").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    cli("generate", out, "--out", tmp_path / "out").refused(2, "weights")
