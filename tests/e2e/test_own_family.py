"""A GAN in a file of one's own: 40 lines, and it trains, continues, draws and passes every check of the package."""

from __future__ import annotations

from pathlib import Path

import pytest

from imagekiln import testing

GAN = (Path(__file__).parents[2] / "docs" / "guide" / "my_gan.py").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def gan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("own") / "my_gan.py"
    file.write_text(GAN)
    return file


def test_it_is_short() -> None:
    assert len(GAN.splitlines()) <= 40


@pytest.mark.parametrize("check", testing.checks(), ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_contract(gan: Path, check) -> None:
    check(str(gan))


def test_it_trains_continues_and_draws(cli, tiny, reference, ends_like, gan: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = cli.start(*tiny(str(gan), out))
    command.wait_until(lambda: (out / "checkpoints" / "000000032").exists())
    command.send(2)
    assert command.wait().code == 75
    cli(*tiny(str(gan), out), cwd=tmp_path).ok()
    ends_like(reference(str(gan)), out)
    cli("generate", out, "-n", 4, "--out", tmp_path / "drawn").ok()
    assert len(list((tmp_path / "drawn").glob("0*.png"))) == 4


def test_a_relative_path_is_found_again_from_elsewhere(cli, tiny, gan: Path, tmp_path: Path) -> None:
    cli(
        *tiny(str(gan), tmp_path / "run", nimg=32)[:1],
        gan.name,
        *tiny(str(gan), tmp_path / "run", nimg=32)[2:],
        cwd=gan.parent,
    ).ok()
    cli("generate", tmp_path / "run", "-n", 1, "--out", tmp_path / "drawn", cwd=tmp_path).ok()
