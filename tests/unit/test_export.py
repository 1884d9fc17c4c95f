"""Exports load back: our U-Net in the real diffusers, our weights in our own loader."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from imagekiln import api
from imagekiln.engine.run import Run
from imagekiln.errors import UsageError

SMALL = {
    "family": {"widths": [32, 64], "attention": [False, True]},
    "train": {"total_kimg": 0.128, "batch": 32, "precision": "fp32", "device": "cpu"},
}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return api.train("diffusion", "builtin:digits", tmp_path_factory.mktemp("labelled") / "run", settings=SMALL)


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory: pytest.TempPathFactory, pictures_without_labels: Path) -> Run:
    return api.train("diffusion", pictures_without_labels, tmp_path_factory.mktemp("plain") / "run", settings=SMALL)


@pytest.fixture(scope="module")
def pictures_without_labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("pictures")
    for index, pixels in enumerate(load_digits().images[:64]):
        Image.fromarray((pixels * 15.9).astype("uint8")).save(folder / f"{index}.png")
    return folder


def test_safetensors_holds_the_same_weights(labelled: Run, tmp_path: Path) -> None:
    receipt = api.export(labelled, "safetensors", tmp_path)
    assert receipt["difference"] == 0.0
    assert Path(receipt["path"]).is_file()


def test_diffusers_computes_the_same(labelled: Run, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    receipt = api.export(labelled, "diffusers", tmp_path)
    assert receipt["difference"] <= 1e-5
    assert not receipt["pipeline"], "a stock pipeline would not feed the labels"


def test_stock_pipeline_draws_what_we_draw(unlabelled: Run, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    from imagekiln.diffusion import samplers
    from imagekiln.engine.models import open_model

    assert api.export(unlabelled, "diffusers", tmp_path)["pipeline"]
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(batch_size=2, generator=torch.Generator().manual_seed(3), num_inference_steps=6, output_type="np")
    family = open_model(unlabelled, device="cpu").family
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        ours = samplers.euler(family._denoiser(None), noise, samplers.flow_sigmas(6), family.path)
    expected = torch.from_numpy(theirs.images).permute(0, 3, 1, 2) * 2 - 1
    torch.testing.assert_close(ours.clamp(-1, 1), expected, atol=1e-4, rtol=0)


def test_config_is_the_one_diffusers_would_write(labelled: Run, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    api.export(labelled, "diffusers", tmp_path)
    config = json.loads((tmp_path / "unet" / "config.json").read_text())
    theirs = diffusers.UNet2DModel.from_config(config)
    assert theirs.config.num_class_embeds == 11, "ten digits and the null class"


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    run = api.train(
        "vae",
        "builtin:digits",
        tmp_path / "vae",
        settings={"family": {"width": 8, "z_dim": 4}, "train": SMALL["train"]},
    )
    with pytest.raises(UsageError, match="no network that diffusers knows"):
        api.export(run, "diffusers", tmp_path / "out")
    with pytest.raises(UsageError, match="Did you mean 'diffusers'"):
        api.export(run, "diffuser", tmp_path / "out")
