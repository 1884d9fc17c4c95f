"""DINOv2 and CLIP through real transformers models of tiny size: our features are those of the model itself."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from imagekiln.errors import DataError, UsageError
from imagekiln.metrics import FeatureNetwork
from imagekiln.metrics.encoders import CLIP, IMAGENET, Clip, Dinov2

transformers = pytest.importorskip("transformers")


def pictures(n=3, size=(20, 26)):
    return torch.randint(0, 256, (n, 3, *size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def pixels(images, side, scale):
    """What the model sees, by Pillow and numpy alone."""
    planes = np.stack(
        [
            [
                np.asarray(Image.fromarray(c.astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC))
                for c in i
            ]
            for i in images.numpy()
        ]
    )
    mean, deviation = (np.array(numbers).reshape(3, 1, 1) for numbers in scale)
    return torch.from_numpy((planes.clip(0, 255) / 255 - mean) / deviation).float()


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-dino"
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    transformers.Dinov2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-clip"
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    small["projection_dim"] = 12
    words = ["<|startoftext|>", "<|endoftext|>", *"abcdefgh", *(f"{letter}</w>" for letter in "abcdefgh")]
    text = {"vocab_size": len(words), "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
    config = transformers.CLIPConfig(
        text_config=small | text, vision_config=small | {"image_size": 28, "patch_size": 14}, projection_dim=12
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    vocabulary = folder / "vocab.json"
    vocabulary.write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "pad_token": "<|endoftext|>"})
    )
    return folder


@torch.inference_mode()
def test_dinov2_gives_the_class_token(dinov2):
    network, images = Dinov2(dinov2, side=28), pictures()
    direct = transformers.Dinov2Model.from_pretrained(dinov2).eval()
    expected = direct(pixel_values=pixels(images, 28, IMAGENET)).last_hidden_state[:, 0]
    found = network.features(images.float() / 127.5 - 1)
    assert isinstance(network, FeatureNetwork) and found.shape == (3, network.num_features)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert network.name == "dinov2-tiny-dino" and Dinov2(dinov2).side == 224
    assert network.hash == Dinov2(dinov2, side=28).hash != Dinov2(dinov2).hash


@torch.inference_mode()
def test_clip_gives_embeddings_of_length_one(clip):
    network, images = Clip(clip), pictures()
    direct = transformers.CLIPModel.from_pretrained(clip).eval()
    seen = direct.vision_model(pixel_values=pixels(images, 28, CLIP)).pooler_output
    expected = direct.visual_projection(seen)
    found = network.features(images.float() / 127.5 - 1)
    assert network.num_features == 12 and network.name == "clip-tiny-clip"
    torch.testing.assert_close(found, expected / expected.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))


@torch.inference_mode()
def test_agreement_is_the_cosine_of_picture_and_text(clip):
    network, images, texts = Clip(clip), pictures().float() / 127.5 - 1, ["a b c", "h", "a b c d e f g h a b c d"]
    direct = transformers.CLIPModel.from_pretrained(clip).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(clip)
    one_by_one = []
    for text in texts:
        tokens = tokenizer([text], truncation=True, max_length=8, return_tensors="pt")
        assert tokens.input_ids.shape[1] > 2, "the vocabulary of this test knows its words"
        one_by_one.append(direct.text_projection(direct.text_model(**tokens).pooler_output))
    expected = torch.nn.functional.cosine_similarity(network.features(images), torch.cat(one_by_one))
    found = network.agreement(images, texts)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(DataError, match="one text a picture"):
        network.agreement(images, texts[:2])


def test_only_safetensors_and_only_pinned(dinov2, tmp_path):
    weights = tmp_path / "other"
    weights.mkdir()
    (weights / "config.json").write_text((dinov2 / "config.json").read_text())
    torch.save({}, weights / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"model\.safetensors"):
        Dinov2(weights)
    for unpinned in ("facebook/dinov2-base", "facebook/dinov2-base@main", "no/such/folder"):
        with pytest.raises(UsageError, match="40 hex digits"):
            Dinov2(unpinned)


def test_tensors_that_are_not_there_are_not_made_up(dinov2, tmp_path):
    config = json.loads((dinov2 / "config.json").read_text()) | {"num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((dinov2 / "model.safetensors").read_bytes())
    with pytest.raises(DataError, match="does not fit Dinov2Model"):
        Dinov2(tmp_path)


def test_without_transformers_it_says_what_to_install(dinov2, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match=r"pip install 'imagekiln\[sd\]'"):
        Dinov2(dinov2)


def test_grey_pictures_are_refused(dinov2):
    with pytest.raises(DataError, match="repeat grey"):
        Dinov2(dinov2, side=28).features(torch.zeros(1, 1, 8, 8))
