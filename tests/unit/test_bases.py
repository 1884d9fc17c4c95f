"""Where a pretrained model lies: a folder, one file under the names of its first publication, a commit of the hub."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from pretrained_folder import write_base
from safetensors.torch import save_file

from imagekiln.engine import bases
from imagekiln.errors import RecipeError
from imagekiln.exporters import _classical
from imagekiln.nets.pretrained import Pretrained

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("bases") / "sd1", "sd1")


@pytest.fixture
def single(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One file of the same weights; its configs lie beside it."""
    monkeypatch.setenv("IMAGEKILN_CACHE", str(tmp_path / "cache"))
    save_file(published_tensors(base), file := tmp_path / "mine.safetensors")
    shutil.copytree(base, tmp_path / "mine", ignore=shutil.ignore_patterns("*.safetensors"))
    return file


def published_tensors(base: Path) -> dict[str, torch.Tensor]:
    """The weights of a folder under the names that Stable Diffusion 1 was first published with."""
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    networks = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    unet, coder, encoder = (network.state_dict() for network in networks)
    tensors = _classical.checkpoint(unet, pipeline.unet.config.layers_per_block, coder, [encoder])
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def test_a_file_becomes_a_folder_with_the_same_networks(base: Path, single: Path) -> None:
    folder = bases.folder(str(single))
    assert folder is not None and folder.is_relative_to(single.parent / "cache")
    assert folder.name.startswith("mine-"), "cards name the model by it"
    before, after = Pretrained(str(base)), Pretrained(str(folder))
    for name, network in before.networks().items():
        tensors = after.networks()[name].state_dict()
        for key, tensor in network.state_dict().items():
            assert torch.equal(tensors[key], tensor), f"{name}.{key}"
    coders = [diffusers.AutoencoderKL.from_pretrained(one / "vae").state_dict() for one in (base, folder)]
    assert all(torch.equal(coders[1][key], tensor) for key, tensor in coders[0].items())
    assert not list(folder.glob("**/*.bin"))


def test_a_file_is_unpacked_once(single: Path) -> None:
    folder = bases.folder(str(single))
    written = (folder / "model_index.json").stat().st_mtime_ns
    assert bases.folder(str(single)) == folder and (folder / "model_index.json").stat().st_mtime_ns == written
    assert [one.name for one in folder.parent.iterdir()] == [folder.name], "nothing is left aside"


def test_files_that_are_no_model_are_refused(single: Path, tmp_path: Path) -> None:
    (tmp_path / "old.ckpt").write_bytes(b"x")
    (tmp_path / "torn.safetensors").write_bytes(b"x" * 30)
    save_file({"lora_unet.down": torch.zeros(2)}, tmp_path / "lora.safetensors")
    for name, sentence in (
        ("old.ckpt", "pickles"),
        ("torn.safetensors", "cannot be read"),
        ("lora.safetensors", "no whole"),
    ):
        with pytest.raises(RecipeError, match=sentence):
            bases.folder(str(tmp_path / name))


def test_a_file_that_its_configs_do_not_fit_is_refused(single: Path) -> None:
    config = single.with_suffix("") / "unet" / "config.json"
    config.write_text(config.read_text().replace('"cross_attention_dim": 32', '"cross_attention_dim": 48'))
    with pytest.raises(RecipeError, match=r"cannot be opened as StableDiffusionPipeline.*configs are looked for in"):
        bases.folder(str(single))
    assert not list((single.parent / "cache" / "bases").glob("*"))


def test_a_commit_of_the_hub_is_a_folder(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the library keeps what it has fetched; nothing is asked for then."""
    shutil.copytree(base, kept := tmp_path / "models--me--mine" / "snapshots" / COMMIT)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    assert bases.folder(f"me/mine@{COMMIT}") == kept
    with pytest.raises(RecipeError, match="cannot be fetched"):
        bases.folder(f"me/other@{COMMIT}")


@pytest.mark.parametrize("named", ["me/mine@main", f"mine@{COMMIT}", f"me/mine@{COMMIT[:-1]}g", "me/mine@"])
def test_what_may_be_another_model_tomorrow_is_refused(named: str) -> None:
    with pytest.raises(RecipeError, match="40 hexadecimal digits"):
        bases.folder(named)


def test_other_names_are_left_alone(tmp_path: Path) -> None:
    assert bases.folder("") is None and bases.folder("random:sd1") is None and bases.folder("nowhere") is None
    assert bases.folder(str(tmp_path)) == tmp_path
