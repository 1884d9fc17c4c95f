"""Whole fine-tunings as one file under classical names: exact, recognised, and refused where a program would differ."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pretrained_folder import full_autoencoder, joint_transformer, third_encoder, write_whole_base, xl_unet
from safetensors.torch import load_file, save_file

import imagekiln
from imagekiln.engine import bases, published
from imagekiln.engine.models import open_model
from imagekiln.engine.run import Run
from imagekiln.errors import UsageError
from imagekiln.exporters import _checkpoint, _classical
from imagekiln.exporters import _comfyui_rules as rules
from imagekiln.exporters import _comfyui_whole as whole
from imagekiln.nets.pretrained import PIPELINES, Pretrained

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

MODELS = _checkpoint.MODELS
BASES = ("sd1", "sdxl", "sd3", "sd3 with t5")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures of 32 pixels with captions."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    rows = ["file_name,text"]
    for index in range(6):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3)).astype(np.uint8)).save(root / f"{index}.png")
        rows.append(f"{index}.png,a square")
    (root / "metadata.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture(scope="module", params=BASES)
def run(request: pytest.FixtureRequest, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Denoiser and text encoders of a narrow base, changed by a training."""
    where = tmp_path_factory.mktemp(request.param)
    kind, _, third = request.param.partition(" with ")
    base = write_whole_base(where / "base", kind, bool(third))
    settings = {
        "family": {"base": str(base), "method": "full", "train_text": True, "sample": {"steps": 2}},
        "train": {"total_kimg": 0.004, "batch": 2, "doctor": "off", "precision": "fp32", "warmup_fraction": 0.0},
        "optim": {"tuned": {"lr": 1e-2}},
    }
    return imagekiln.train("fine_tune", data=photos, out=where / "run", settings=settings)


def make_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    unets = {
        "SD15": rules.UNet(32, linear=False, heads=8),
        "SDXL": rules.UNet(80, linear=True, told=1584, depths=(0, 1, 2), head=8),
    }
    pair = (whole.Text(32, 2), whole.Text(48, 3))
    texts = {"SD15": pair[:1], "SDXL": pair, "SD3": pair}
    third = whole.Third(width=96, layers=2, inner=24, heads=2, head=8, tokens=104)
    denoisers = {"UNETS": unets, "UNET_WIDTH": 32, "KL_WIDTH": 32, "HEAD": 16}
    encoders = {"TEXTS": texts, "THIRD": third, "TOKENS": 514, "PLACES": 16}
    for module, sizes in ((rules, denoisers), (whole, encoders)):
        for name, value in sizes.items():
            monkeypatch.setattr(module, name, value)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules for networks that are as narrow as those of the tests."""
    make_narrow(monkeypatch)


@pytest.fixture(scope="module")
def exported(run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The receipt of an export named "mine"."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_narrow(monkeypatch)
        return imagekiln.export(run, "comfyui", tmp_path_factory.mktemp("out") / "mine")


def test_one_file_holds_the_trained_model(
    run: Run, exported: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family: Any = open_model(run, device="cpu").family
    assert exported["difference"] <= 1e-4 and exported["detected"]["model"] == MODELS[family.base.kind]
    out = Path(exported["path"]).parents[2]
    assert exported["path"] == str(out / "models" / "checkpoints" / "mine.safetensors")
    exec(exported["call"], scope := {})
    assert type(scope["pipeline"]).__name__ == PIPELINES[family.base.kind]
    networks = [part for part in scope["pipeline"].components.values() if isinstance(part, torch.nn.Module)]
    assert not any(network.training for network in networks)
    assert str(out.parent) not in (out / "README.md").read_text()
    shutil.copyfile(exported["path"], file := tmp_path / "mine.safetensors")
    monkeypatch.setenv("IMAGEKILN_CACHE", str(tmp_path / "cache"))
    base = Path(family.base.folder)
    shutil.copytree(base, file.with_suffix(""), ignore=shutil.ignore_patterns("*.safetensors"))
    again, untrained = Pretrained(str(bases.folder(str(file)))).networks(), Pretrained(str(base)).networks()
    assert set(again) == set(untrained) >= set(family.tuned)
    expected = {name: dict(network.state_dict()) for name, network in (untrained | dict(family.tuned.items())).items()}
    if family.base.kind == "sd3":
        fold(expected["denoiser"], expected["text"])
    for name, network in again.items():
        tensors, before = network.state_dict(), untrained[name].state_dict()
        assert all(torch.equal(tensors[key], tensor) for key, tensor in expected[name].items()), name
        same = all(torch.equal(before[key], tensor) for key, tensor in tensors.items())
        assert same != (name in family.tuned), f"{name} has learned, or was left as it is"


def fold(denoiser: dict[str, torch.Tensor], text: dict[str, torch.Tensor]) -> None:
    """The projection of the first encoder stands in the layer that reads what it says."""
    told, projection = "time_text_embed.text_embedder.linear_1.weight", text["text_projection.weight"]
    width = len(projection)
    denoiser[told] = torch.cat([denoiser[told][:, :width] @ projection, denoiser[told][:, width:]], 1)
    text["text_projection.weight"] = torch.eye(width)


def test_a_workflow_names_the_file(run: Run, exported: dict[str, Any]) -> None:
    nodes = json.loads((Path(exported["path"]).parents[2] / "workflow.json").read_text())
    kinds = [node["class_type"] for node in nodes.values()]
    assert kinds[0] == "CheckpointLoaderSimple" and nodes["1"]["inputs"] == {"ckpt_name": "mine.safetensors"}
    assert kinds.count("CLIPTextEncode") == 2 and kinds[-3:] == ["KSampler", "VAEDecode", "SaveImage"]
    base = open_model(run, device="cpu").family.base
    if base.kind != "sd3":
        assert ("ConditioningZeroOut" in kinds) == (base.kind == "sdxl"), "XL learned zeros for the empty text"
    empty = "EmptySD3LatentImage" if base.kind == "sd3" else "EmptyLatentImage"
    size = next(node["inputs"] for node in nodes.values() if node["class_type"] == empty)
    assert size == {"width": 32, "height": 32, "batch_size": 1}
    links = [given for node in nodes.values() for given in node["inputs"].values() if isinstance(given, list)]
    assert all(number in nodes for number, _ in links)


@pytest.mark.parametrize("run", BASES[2:], indirect=True)
def test_a_workflow_sets_as_many_tokens_as_stock_nodes_can(run: Run, exported: dict[str, Any]) -> None:
    """Training had 77 of CLIP and 256 of T5, or zeros in their place."""
    out = Path(exported["path"]).parents[2]
    nodes = json.loads((out / "workflow.json").read_text())
    by_kind = {node["class_type"]: node["inputs"] for node in nodes.values()}
    assert by_kind["ModelSamplingSD3"]["shift"] == 3.0 and by_kind["KSampler"]["scheduler"] == "normal"

    def tokens(number: str) -> int:
        node = nodes[number]["inputs"]
        if "text" in node:
            return 77
        if "conditioning" in node:
            return tokens(node["conditioning"][0])
        return tokens(node["conditioning_to"][0]) + tokens(node["conditioning_from"][0])

    third = len(open_model(run, device="cpu").family.base.encoders) > 2
    for words in ("positive", "negative"):
        assert tokens(by_kind["KSampler"][words][0]) == (77 if third else 77 + 231)
    assert by_kind.get("T5TokenizerOptions", {}).get("min_length") == (256 if third else None)
    assert ("T5TokenizerOptions" if third else "231 there") in (out / "README.md").read_text()


def test_what_was_changed_in_the_file_is_noticed(
    run: Run, exported: dict[str, Any], narrow: None, tmp_path: Path
) -> None:
    family: Any = open_model(run, device="cpu").family
    tensors, file = load_file(exported["path"]), tmp_path / "changed.safetensors"
    tensors["first_stage_model.encoder.conv_in.bias"] += 1
    save_file(tensors, file)
    pipeline = _checkpoint.opened(family, file, tmp_path)
    assert _checkpoint.encoded_difference(family, pipeline) > 1e-3
    assert type(pipeline).__name__ == PIPELINES[family.base.kind]
    del tensors["first_stage_model.encoder.conv_out.bias"]
    save_file(tensors, file)
    with pytest.raises(UsageError, match=r"first_stage_model.encoder.conv_out.bias is missing"):
        _checkpoint.detected(file)


@pytest.mark.parametrize("run", BASES[2:], indirect=True)
def test_every_name_and_shape_counts(run: Run, exported: dict[str, Any], narrow: None) -> None:
    shapes = rules.shapes_of(load_file(exported["path"]))
    assert whole.checkpoint(shapes) == exported["detected"]
    for name, shape in shapes.items():
        with pytest.raises(UsageError, match=r"is missing|not recognise"):
            whole.checkpoint({other: known for other, known in shapes.items() if other != name})
        with pytest.raises(UsageError, match=r"has shape|refuse"):
            whole.checkpoint(shapes | {name: (shape[0] + 1, *shape[1:])})
        with pytest.raises(UsageError, match=r"x is not known there"):
            whole.checkpoint(shapes | {f"{name}x": shape})


@pytest.mark.parametrize("run", BASES[:2], indirect=True)
def test_what_shapes_do_not_tell_is_refused(run: Run, narrow: None, tmp_path: Path) -> None:
    family: Any = open_model(run, device="cpu").family
    path = tmp_path / "x.safetensors"
    noise = family.base.noise
    family.base.noise = noise._replace(betas=noise.betas / 2)
    with pytest.raises(UsageError, match="other noise"):
        _checkpoint.write(family, path)
    family.tuned["denoiser"].register_to_config(attention_head_dim=16)
    with pytest.raises(UsageError, match=r"heads = \[16, 16"):
        _checkpoint.write(family, path)
    coder = diffusers.AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    coder.save_pretrained(tmp_path / "tiny")
    family.codec = published.opened(tmp_path / "tiny", (3, 32, 32))
    with pytest.raises(UsageError, match="class AutoencoderTiny"):
        _checkpoint.write(family, path)
    assert not path.exists()


@pytest.mark.parametrize("run", BASES[3:], indirect=True)
def test_what_shapes_do_not_tell_of_sd3_is_refused(
    run: Run, narrow: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family: Any = open_model(run, device="cpu").family
    path = tmp_path / "x.safetensors"
    with monkeypatch.context() as context, pytest.raises(UsageError, match=r"words of 96 numbers and 80 of a whole"):
        context.setattr(whole, "THIRD", whole.THIRD._replace(width=64))
        _checkpoint.write(family, path)
    family.base.encoders[2].config.dense_act_fn = "silu"
    with pytest.raises(UsageError, match=r"dense_act_fn of encoder 3 = 'silu', and ComfyUI computes with 'gelu_new'"):
        _checkpoint.write(family, path)
    family.tuned["denoiser"].register_to_config(attention_head_dim=32)
    with pytest.raises(UsageError, match=r"attention_head_dim = 32"):
        _checkpoint.write(family, path)
    family.codec.scale = 1.0
    with pytest.raises(
        UsageError, match=r"lowered by 0\.0609 and multiplied by 1; ComfyUI's are by 0\.0609 and 1\.5305"
    ):
        _checkpoint.write(family, path)
    full_autoencoder((32, 64, 128, 128), latent_channels=16).save_pretrained(tmp_path / "vae")
    family.codec = published.opened(tmp_path / "vae", (3, 32, 32))
    with pytest.raises(UsageError, match=r"AutoencoderKL without 1x1 convolutions"):
        _checkpoint.write(family, path)
    assert not path.exists()


def test_the_rules_are_those_of_the_published_sizes() -> None:
    """Every name and shape of real networks without weights, renamed."""
    with torch.device("meta"):
        coder = full_autoencoder((128, 256, 512, 512))
        first = diffusers.UNet2DConditionModel(cross_attention_dim=768)
        second = xl_unet((320, 640, 1280), heads=(5, 10, 20), layers=(1, 2, 10), words=2048, whole=1280)
        large = transformers.CLIPTextConfig(
            hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280
        )
        small = transformers.CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
        )
        texts = [transformers.CLIPTextModel(small), transformers.CLIPTextModelWithProjection(large)]
    states = [text.state_dict() for text in texts]
    for unet, encoders, model, count in ((first, states[:1], "SD15", 1130), (second, states, "SDXL", 2513)):
        tensors = _classical.checkpoint(unet.state_dict(), 2, coder.state_dict(), encoders)
        assert whole.checkpoint(rules.shapes_of(tensors))["model"] == model and len(tensors) == count
        renamed = _classical.unet(unet.state_dict(), 2)
        assert set(_classical.unet_back(renamed, len(unet.config.block_out_channels), 2)) == set(unet.state_dict())
    with pytest.raises(UsageError, match=r"ln_final.bias is missing"):
        shapes = rules.shapes_of(tensors)
        whole.checkpoint({name: shape for name, shape in shapes.items() if not name.endswith("ln_final.bias")})
    with torch.device("meta"):
        bare = {"use_quant_conv": False, "use_post_quant_conv": False}
        coder = full_autoencoder((128, 256, 512, 512), latent_channels=16, **bare)
        joint = joint_transformer(24, 64, 4096, 2048, sample_size=128, pos_embed_max_size=192)
        later = joint_transformer(24, 64, 4096, 2048, sample_size=128, pos_embed_max_size=384, **LATER)
        small.projection_dim = 768
        pair = [transformers.CLIPTextModelWithProjection(config) for config in (small, large)]
        encoders = [text.state_dict() for text in (*pair, third_encoder(24, 4096, 10240, 64, 64, 32128))]
    for net, texts, places, count in ((joint, encoders[:2], 192**2, 1448), (later, encoders, 384**2, 1842)):
        tensors = _classical.joint_checkpoint(net.state_dict(), coder.state_dict(), texts)
        found = whole.checkpoint(rules.shapes_of(tensors))
        assert (found["model"], found["depth"], found["patches"]) == ("SD3", 24, places) and len(tensors) == count


LATER = {"qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))}
"""What 3.5 has beyond 3."""


@pytest.mark.parametrize("more", [{}, LATER | {"dual_attention_layers": (0, 2)}], ids=["3", "3.5"])
def test_a_transformer_is_named_as_it_was_published(more: dict[str, Any]) -> None:
    """What diffusers reads from these names is what it was."""
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers as read

    own = joint_transformer(3, 8, 12, 10, sample_size=4, pos_embed_max_size=6, **more).state_dict()
    for tensor in own.values():
        torch.nn.init.normal_(tensor)
    named = _classical.transformer(own)
    again = read(dict(named))
    assert again.keys() == own.keys() and all(torch.equal(again[name], tensor) for name, tensor in own.items())


def test_joint_layers_of_openclip_compute_the_same() -> None:
    """Torch's attention with one layer for queries, keys and values is OpenCLIP's; x P is its projection."""
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=20,
        hidden_size=24,
        intermediate_size=96,
        projection_dim=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=6,
    )
    network = transformers.CLIPTextModelWithProjection(config).eval()
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    named = _classical.open_clip(network.state_dict())
    start = "transformer.resblocks.0.attn."
    joint = torch.nn.MultiheadAttention(24, 4, batch_first=True)
    joint.load_state_dict({name.removeprefix(start): t for name, t in named.items() if name.startswith(start)})
    x = torch.randn(2, 6, 24)
    layer = network.text_model.encoder.layers[0].self_attn
    with torch.no_grad():
        assert torch.allclose(joint(x, x, x)[0], layer(x)[0], atol=1e-5)
        assert torch.allclose(x @ named["text_projection"], network.text_projection(x), atol=1e-5)
