"""Exports of autoencoders and of models that read text: stock programs compute from the files what we compute."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from pretrained_folder import write_base

from imagekiln import api
from imagekiln.config import write_toml
from imagekiln.core import Family
from imagekiln.engine import recipe as recipes
from imagekiln.engine.codec import Codec
from imagekiln.engine.kept import keep
from imagekiln.engine.models import hash_of, load_model, open_model, save_weights
from imagekiln.engine.run import Run
from imagekiln.errors import UsageError
from imagekiln.metrics import Measurement, Provenance
from imagekiln.nets.latent_autoencoder import LatentMoments
from imagekiln.testing import Toy

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

CAPTIONS = ["a red circle", "a blue square", "red and blue"]
TEXT = {"width": 32, "layers": 2, "context": 8, "vocabulary": 530}
SHIFT, SCALE = 0.3, 0.7
NOISE = 0.05


def made(path: Path, values: dict[str, Any], shape: tuple[int, int, int], codec: Run | None = None) -> Run:
    """A run of a family that has learned nothing yet, with every weight and every average away from its start."""
    torch.manual_seed(0)
    recipe = recipes.complete(
        {"data": {"path": "toy", "codec": str(codec.path) if codec else ""}, "train": {"precision": "fp32"}, **values}
    )
    family: Family = recipes.build(recipe, shape, 0)
    for weight in family.parameters():
        weight.data += NOISE * torch.randn(weight.shape)
    for part in family.children():
        if isinstance(part, LatentMoments):
            part.mean.normal_()
            part.square.copy_(part.mean.square() + 0.25)
    if hasattr(family, "study"):
        family.study(CAPTIONS * 2)
    run = Run.create(path, write_toml(recipe), {"version": "0", "data_fingerprint": "f00d", "data_summary": "toys"})
    run.weights_path(0, "ema").parent.mkdir()
    save_weights(run.weights_path(0, "ema"), family, recipe, Toy((3, 32, 32), 0), CAPTIONS)
    if codec is not None:
        weights = codec.weights()
        Codec(load_model(weights, "cpu"), weights.read_bytes(), SHIFT, SCALE).keep(run)
    return run


def autoencoder(path: Path, kind: str, **family: Any) -> Run:
    settings = {"name": "autoencoder", "kind": kind, "width": 8, "factor": 4, "num_codes": 16, "adversarial_weight": 0}
    return made(path, {"family": settings | family}, (3, 32, 32))


@pytest.fixture(scope="module")
def kl(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return autoencoder(tmp_path_factory.mktemp("kl") / "run", "kl")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return autoencoder(tmp_path_factory.mktemp("tiny") / "run", "tiny")


def speaking(where: Path, codec: Run | None, **family: Any) -> Run:
    """A model that reads text, on the latents of a codec, or on pixels without one."""
    settings = {"name": "stable_diffusion", "depth": 1, "widths": [32, 32], "text": TEXT}
    return made(where, {"family": settings | family}, (4, 8, 8), codec)


# -- autoencoders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), [("kl", "AutoencoderKL"), ("tiny", "AutoencoderTiny"), ("vq", "VQModel")])
def test_diffusers_loads_an_autoencoder(kind: str, name: str, tmp_path: Path) -> None:
    run = autoencoder(tmp_path / "run", kind)
    receipt = api.export(run, "diffusers", tmp_path / "out")
    assert receipt["difference"] <= 1e-5
    theirs = getattr(diffusers, name).from_pretrained(tmp_path / "out")
    family: Any = open_model(run, device="cpu").family
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        latents = family.encode(x)
        assert latents.std() > 1e-3
        torch.testing.assert_close(
            family.decode(latents), theirs.decode(latents).sample.clamp(-1, 1), atol=1e-5, rtol=0
        )


def test_what_was_changed_on_disk_is_noticed(tiny: Run, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from imagekiln.exporters import _coder

    api.export(tiny, "diffusers", tmp_path)
    family = open_model(tiny, device="cpu").family
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["decoder.layers.0.bias"] += 0.1
    save_file(tensors, path)
    assert _coder.difference(family, tmp_path) > 1e-4


# -- text to picture --------------------------------------------------------------------------------------------------


def test_stable_diffusion_3_draws_what_we_draw(tiny: Run, tmp_path: Path) -> None:
    """Against the family's own sampler, with words, a negative prompt and guidance."""
    from imagekiln.diffusion import samplers

    run = speaking(tmp_path / "run", tiny)
    receipt = api.export(run, "diffusers", tmp_path / "out")
    assert receipt["difference"] <= 1e-4
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(
        tmp_path / "out", text_encoder_3=None, tokenizer_3=None
    )
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.vae.config.scaling_factor == pytest.approx(1 / SCALE)
    assert pipeline.vae.config.shift_factor == pytest.approx(SHIFT)
    noise = torch.randn(2, 4, 8, 8)
    words = {"num_inference_steps": 5, "guidance_scale": 3.0, "latents": noise.clone(), "output_type": "pt"}

    def theirs(**more: Any) -> torch.Tensor:
        drawn: torch.Tensor = pipeline(CAPTIONS[:2], negative_prompt=["blue"] * 2, **(words | more)).images
        return drawn

    family: Any = open_model(run, device="cpu").family
    with torch.no_grad():
        tokens, negative = family.read(CAPTIONS[:2]), family.read(["blue"] * 2)
        told, against = family._denoiser(tokens), family._denoiser(negative)
        guided = lambda z, sigma_B: against(z, sigma_B) + 3.0 * (told(z, sigma_B) - against(z, sigma_B))  # noqa: E731
        ours = family.codec.decode(samplers.euler(guided, noise, samplers.flow_sigmas(5), family.path)) / 2 + 0.5
    torch.testing.assert_close(theirs(max_sequence_length=0), ours.clamp(0, 1), atol=1e-4, rtol=0)
    assert (theirs() - ours.clamp(0, 1)).abs().max() > 1e-3, "tokens of zeros behind the words change the picture"
    assert (theirs(max_sequence_length=0, guidance_scale=1.0) - ours.clamp(0, 1)).abs().max() > 1e-3


@torch.no_grad()
def test_a_transformer_that_learned_shapes_has_their_places_in_its_files(eightfold: Run, tmp_path: Path) -> None:
    """The stock network cuts them out of the middle of the table, as ComfyUI does, and answers what ours does."""
    from safetensors.torch import load_file

    data = {"path": "toy", "codec": str(eightfold.path), "buckets": True}
    settings = {"family": {"name": "stable_diffusion", "depth": 1, "text": TEXT}, "data": data}
    run = made(tmp_path / "run", settings, (4, 8, 8), eightfold)
    receipts = {to: api.export(run, to, tmp_path / to) for to in ("diffusers", "comfyui")}
    assert all(receipt["difference"] <= 1e-4 for receipt in receipts.values())
    assert receipts["comfyui"]["detected"]["denoiser"]["patches"] == 8 * 8
    assert all("in shapes of about as many" in (tmp_path / to / "README.md").read_text() for to in receipts)
    [file] = (tmp_path / "comfyui" / "models" / "diffusion_models").glob("*.safetensors")
    net = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / "diffusers" / "transformer")
    assert torch.equal(load_file(file)["pos_embed.pos_embed"], net.pos_embed.pos_embed)
    family: Any = open_model(run, device="cpu").family
    told = family.text(family.read(CAPTIONS[:2]))
    words, whole = (torch.nn.functional.pad(part, (0, 8)) for part in (told.before_BLW, told.pooled_BP))
    for rows, columns in ((8, 8), (12, 4), (6, 10)):
        z, time_B = torch.randn(2, 4, rows, columns), torch.tensor([100.0, 900.0])
        theirs = net(z, encoder_hidden_states=words, pooled_projections=whole, timestep=time_B).sample
        torch.testing.assert_close(family.denoiser(z, time_B, told), theirs, atol=1e-5, rtol=0)


def test_the_second_encoder_says_exactly_nothing(tiny: Run, tmp_path: Path) -> None:
    from transformers import CLIPTextModelWithProjection

    api.export(speaking(tmp_path / "run", tiny), "diffusers", tmp_path / "out")
    silent = CLIPTextModelWithProjection.from_pretrained(tmp_path / "out" / "text_encoder_2")
    said = silent(torch.tensor([[528, 3, 5, 529, 529, 529, 529, 529]]), output_hidden_states=True)
    assert said.hidden_states[-2].shape[-1] == said.text_embeds.shape[-1] == 8
    assert not said.hidden_states[-2].any() and not said.text_embeds.any()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers with numpy 2
@pytest.mark.parametrize(
    ("path", "target"), [("rf", "v"), ("rf", "x"), ("vp", "v"), ("vp", "eps")], ids=lambda value: str(value)
)
def test_stable_diffusion_draws_what_we_draw(path: str, target: str, kl: Run, tmp_path: Path) -> None:
    from imagekiln.diffusion import samplers

    run = speaking(tmp_path / "run", kl, denoiser="unet", path=path, target=target)
    receipt = api.export(run, "diffusers", tmp_path / "out")
    assert receipt["difference"] <= 1e-4
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    steps = 9 if path == "rf" else 10
    start = torch.randn(2, 4, 8, 8)
    theirs = pipeline(
        CAPTIONS[:2], num_inference_steps=steps, guidance_scale=1.0, latents=start.clone(), output_type="pt"
    ).images
    family: Any = open_model(run, device="cpu").family
    times = torch.tensor(
        [0.999 - (0.999 if path == "rf" else 1) * k / steps for k in range(steps)], dtype=torch.float64
    )
    sigmas = times / (1 - times) if path == "rf" else torch.tan(math.pi / 2 * times)
    b = times[0] if path == "rf" else torch.sin(math.pi / 2 * times[0])
    with torch.no_grad():
        denoise = family._denoiser(family.read(CAPTIONS[:2]))
        z = samplers.euler(denoise, start / b.item(), torch.cat([sigmas, sigmas.new_zeros(1)]), family.path)
        ours = family.codec.decode(z) / 2 + 0.5
    torch.testing.assert_close(theirs, ours.clamp(0, 1), atol=1e-4, rtol=0)


def test_betas_are_those_of_the_cosine() -> None:
    from imagekiln.exporters._pipelines import angular_betas

    scheduler = diffusers.DDIMScheduler(num_train_timesteps=1000, trained_betas=angular_betas())
    wanted = torch.cos(math.pi / 2 * torch.arange(1000, dtype=torch.float64) / 1000).square()
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), wanted, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "kind", "sentence"),
    [
        ({"path": "vp"}, "tiny", "family.path = 'vp'"),
        ({"target": "x"}, "tiny", "family.target = 'x'"),
        ({"denoiser": "unet"}, "tiny", "scales latents but does not shift"),
        ({}, "vq", "without codes"),
        ({}, "", "draws pixels from words"),
    ],
)
def test_what_no_pipeline_computes_is_refused(family: dict[str, Any], kind: str, sentence: str, tmp_path: Path) -> None:
    codec = autoencoder(tmp_path / "codec", kind) if kind else None
    with pytest.raises(UsageError, match=sentence):
        api.export(speaking(tmp_path / "run", codec, **family), "diffusers", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir()), "nothing is written then"


def test_the_card_says_what_the_model_is(tiny: Run, tmp_path: Path) -> None:
    run = speaking(tmp_path / "painter", tiny)
    keep(run, [measured(run)], {})
    run.sample_path(0).parent.mkdir()
    run.sample_path(0).write_bytes(b"png")
    receipt = api.export(run, "diffusers", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "max_sequence_length=0" in card and "max_sequence_length=0" in receipt["call"]
    for told in ("# painter", "f00d", "toys", "FD[classifier]", "1 .. 1.5", "samples.png", "8 tokens", "sha256"):
        assert told in card, told
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["text_encoder_3"] == [None, None]


def measured(run: Run, value: float = 1.25, features: str = "classifier", reference: str = "toys") -> Measurement:
    origin = Provenance(features, "f", reference, "r", hash_of(run.weights()))
    return Measurement("frechet", value, 9, 9, origin, low=value - 0.25, high=value + 0.25)


def test_the_card_tells_numbers_of_these_weights_drawn_by_default(tiny: Run, tmp_path: Path) -> None:
    run = speaking(tmp_path / "painter", tiny)
    others = measured(run, 66.0)
    keep(run, [dataclasses.replace(others, provenance=dataclasses.replace(others.provenance, weights_hash="w"))], {})
    run.append_measurement({"metric": "frechet", "value": 77.0})
    api.export(run, "diffusers", tmp_path / "unmeasured")
    assert "Nothing was measured of these weights." in (tmp_path / "unmeasured" / "README.md").read_text()
    keep(run, [measured(run, 88.0), measured(run), measured(run, 2.5, "randconv-v1")], {})
    keep(run, [measured(run, math.inf, "pixels"), measured(run, 3.5, reference="others")], {})
    keep(run, [measured(run, 99.0)], {"guide": "other/run"})
    api.export(run, "diffusers", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    toys, others_too = card.split("Beside toys:\n")[1].split("Beside others:\n")
    for told in ("| FD[classifier] | 1.25 | 1 .. 1.5 |", "| FD[randconv-v1] | 2.5 |", "| FD[pixels] | inf |"):
        assert told in toys, told
    assert "| FD[classifier] | 3.5 |" in others_too
    assert not any(f"| {number} |" in card for number in (66, 77, 88, 99))


def test_a_unet_on_latents_comes_with_its_autoencoder(tiny: Run, tmp_path: Path) -> None:
    family = {"name": "diffusion", "widths": [32, 64], "attention": [False, True]}
    receipt = api.export(made(tmp_path / "run", {"family": family}, (4, 8, 8), tiny), "diffusers", tmp_path / "out")
    assert receipt["difference"] <= 1e-5
    assert not (tmp_path / "out" / "model_index.json").exists(), "no stock pipeline decodes what it draws"
    assert diffusers.AutoencoderTiny.from_pretrained(tmp_path / "out" / "vae").config.shift_factor == SHIFT
    assert json.loads((tmp_path / "out" / "receipt.json").read_text()) == receipt


# -- safetensors ------------------------------------------------------------------------------------------------------


def test_safetensors_carries_the_codec(tiny: Run, tmp_path: Path) -> None:
    from imagekiln.engine.generate import asked_for, pictured

    run = speaking(tmp_path / "run", tiny)
    receipt = api.export(run, "safetensors", tmp_path / "out")
    assert receipt["difference"] == 0.0
    ours, theirs = open_model(run, device="cpu").family, load_model(Path(receipt["path"]), "cpu").family
    assert (theirs.codec.shift, theirs.codec.scale) == (SHIFT, SCALE)
    noise = torch.randn(1, 4, 8, 8)
    drawn = [pictured(family, noise, asked_for(family, CAPTIONS[:1])) for family in (ours, theirs)]
    assert torch.equal(*drawn)


# -- ComfyUI ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eightfold(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A tiny autoencoder that is narrower and shallower than ComfyUI's, with fewer latent channels."""
    return autoencoder(tmp_path_factory.mktemp("eightfold") / "run", "tiny", factor=8, width=12, blocks=2)


def test_comfyui_gets_a_denoiser_an_autoencoder_and_words(eightfold: Run, tmp_path: Path) -> None:
    run = speaking(tmp_path / "my run", eightfold)
    receipt = api.export(run, "comfyui", tmp_path / "out")
    assert receipt["difference"] <= 1e-4
    assert receipt["detected"]["denoiser"] == {
        "model": "SD3", "channels": 16, "depth": 1, "words": 4096, "whole": 2048, "patches": 16
    }  # fmt: skip
    assert receipt["detected"]["codec"] == {"model": "TAESD", "channels": 16, "factor": 8}
    graph = json.loads((tmp_path / "out" / "workflow.json").read_text())
    for node in graph.values():
        for given in node["inputs"].values():
            assert not isinstance(given, list) or given[0] in graph
    by_kind = {node["class_type"]: node["inputs"] for node in graph.values()}
    for folder, key, kind in (("diffusion_models", "unet_name", "UNETLoader"), ("vae", "vae_name", "VAELoader")):
        assert (tmp_path / "out" / "models" / folder / by_kind[kind][key]).is_file()
    assert (by_kind["EmptySD3LatentImage"]["width"], by_kind["EmptySD3LatentImage"]["height"]) == (64, 64)
    assert by_kind["ModelSamplingSD3"]["shift"] == 1.0


def test_the_files_of_comfyui_draw_what_we_draw(eightfold: Run, tmp_path: Path) -> None:
    """Euler's method written out on what the files hold, in ComfyUI's latents, as its nodes do it."""
    import importlib.util

    from safetensors.torch import load_file

    from imagekiln.diffusion import samplers
    from imagekiln.exporters import _comfyui_tensors

    run, out = speaking(tmp_path / "run", eightfold), tmp_path / "out"
    api.export(run, "comfyui", out)
    family: Any = open_model(run, device="cpu").family
    spec = importlib.util.spec_from_file_location("node", out / "custom_nodes" / "imagekiln_run" / "__init__.py")
    node = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(node)
    ((words, more),) = next(iter(node.NODE_CLASS_MAPPINGS.values()))().encode(CAPTIONS[0])[0]
    net = family.denoiser.net
    wide = {"in_channels": 16, "out_channels": 16, "joint_attention_dim": 4096, "pooled_projection_dim": 2048}
    theirs = type(net).from_config(dict(net.config) | wide)
    theirs.load_state_dict(load_file(out / "models" / "diffusion_models" / "run.safetensors"))
    _, decode = _comfyui_tensors.reader(
        load_file(out / "models" / "vae" / "run.safetensors"), family.codec.model.family.network
    )
    noise = torch.randn(1, 16, 8, 8)
    levels = [1.0, 0.5005, 0.001, 0.0]
    with torch.no_grad():
        z = noise.clone()
        for now, after in pairwise(levels):
            v = theirs(z, words, more["pooled_output"], torch.tensor([1000 * now])).sample
            z = z + (after - now) * v
        drawn = decode(z / 1.5305 + 0.0609)
        denoise = family._denoiser(family.read(CAPTIONS[:1]))
        ours = family.codec.decode(samplers.euler(denoise, noise[:, :4], samplers.flow_sigmas(3), family.path))
    assert ours.std() > 1e-3
    torch.testing.assert_close(drawn.clamp(-1, 1), ours, atol=1e-4, rtol=0)


@pytest.mark.parametrize("channels", [4, 6])
def test_a_full_autoencoder_is_folded_and_filled(channels: int) -> None:
    from imagekiln.exporters import _coder, _comfyui_tensors
    from imagekiln.nets import latent_autoencoder

    torch.manual_seed(0)
    network = latent_autoencoder.build("kl", (3, 16, 16), (8, 16), blocks=1).eval()
    gain, offset = 0.6, -0.4
    tensors = _comfyui_tensors.fill_kl(_coder.folded(network.state_dict(), gain, offset), 4, channels)
    encode, decode = _comfyui_tensors.reader(tensors, network)
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        raw = latent_autoencoder.moments(network, x)[0]
        c = torch.randn(2, channels, 8, 8)
        c[:, :4] = (raw - offset) / gain
        torch.testing.assert_close(encode(x)[:, :4], c[:, :4], atol=1e-5, rtol=0)
        torch.testing.assert_close(decode(c), latent_autoencoder.pictures(network, raw), atol=1e-5, rtol=0)


def test_shapes_are_those_of_the_real_classes() -> None:
    """The rules write every name and shape out; the networks of diffusers must have them, renamed where needed."""
    from imagekiln.exporters import _classical, _comfyui_tensors
    from imagekiln.exporters import _comfyui_rules as rules
    from imagekiln.nets.conditioned import denoiser
    from imagekiln.nets.latent_autoencoder import build

    with torch.device("meta"):
        flow: Any = denoiser("sd3", (16, 8, 8), 3, (), 100)
        unet: Any = denoiser("unet", (4, 8, 8), 0, (320, 640, 1280), 768)
        full = [build("kl", (3, 64, 64), [128, 256, 512, 512][:levels], blocks=2) for levels in (4, 3)]
    assert rules.shapes_of(flow.net.state_dict()) == rules.transformer_shapes(3, 108, 108, 16)
    renamed = rules.shapes_of(_comfyui_tensors.unet(unet.net, 768))
    assert renamed == rules.unet_shapes([320, 640, 1280])
    assert rules.denoiser(renamed)["widths"] == [320, 640, 1280]
    assert set(_classical.unet_back(_comfyui_tensors.unet(unet.net, 768), 3, 1)) == set(unet.net.state_dict())
    whole = sum(math.prod(shape) for name, shape in rules.tiny_shapes(4).items() if name.startswith("taesd_"))
    assert whole == 2_445_063, "the size that is known of it"
    for network, factor in zip(full, (8, 4), strict=True):
        shapes = rules.shapes_of(_comfyui_tensors.autoencoder(network, network.state_dict(), 1.5, 0.1, 16))
        assert rules.autoencoder(shapes) == {"model": "KL", "channels": 16, "factor": factor}


def test_a_file_that_comfyui_would_refuse_is_named() -> None:
    from imagekiln.exporters import _comfyui_rules as rules

    good = rules.transformer_shapes(2, 4096, 2048, 64)
    assert rules.denoiser(good)["depth"] == 2
    few = good | {"pos_embed.proj.weight": (128, 4, 2, 2)}
    missing = {name: shape for name, shape in good.items() if name != "proj_out.bias"}
    deep = good | {"transformer_blocks.2.norm1.linear.weight": (768, 128)}
    narrow = rules.unet_shapes([320, 640]) | {"input_blocks.0.0.weight": (64, 4, 3, 3)}
    tall = rules.tiny_shapes(16) | {"taesd_encoder.0.weight": (32, 3, 3, 3)}
    for shapes, sentence in (
        (few, "4 channels"),
        (missing, "proj_out.bias is missing"),
        (deep, "is not known there"),
        (narrow, "makes 64 channels"),
        ({"unet.weight": (1,)}, "none of the networks"),
    ):
        with pytest.raises(UsageError, match=sentence):
            rules.denoiser(shapes)
    with pytest.raises(UsageError, match=r"taesd_encoder.0.weight has shape \(32, 3, 3, 3\)"):
        rules.autoencoder(tall)


# -- with a pretrained text encoder -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of text encoders: without a projection, and with one of another width."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    root = tmp_path_factory.mktemp("texts")
    plain, narrow = write_base(root / "plain", "sd1"), root / "narrow"
    config = json.loads((plain / "text_encoder" / "config.json").read_text()) | {"projection_dim": 24}
    shutil.copytree(plain / "tokenizer", narrow)
    torch.manual_seed(3)
    CLIPTextModelWithProjection(CLIPTextConfig(**config)).save_pretrained(narrow)
    return {"plain": plain, "narrow": narrow}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers with numpy 2
@pytest.mark.parametrize("denoiser", ["sd3", "unet"])
@pytest.mark.parametrize("base", ["plain", "narrow"])
def test_a_pretrained_text_encoder_is_within_the_pipeline(
    base: str, denoiser: str, bases: dict[str, Path], kl: Run, tmp_path: Path
) -> None:
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    run = speaking(tmp_path / "run", kl, denoiser=denoiser, text={"base": str(bases[base])})
    receipt = api.export(run, "diffusers", tmp_path / "out")
    assert receipt["difference"] <= 1e-4
    text: Any = open_model(run, device="cpu").family.text
    assert (text.width, text.whole_width) == (32, 32 if base == "plain" else 24)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    tokens = tokenizer(CAPTIONS, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt")
    assert torch.equal(tokens["input_ids"], text.read(CAPTIONS))
    if denoiser == "sd3":
        written = CLIPTextModelWithProjection.from_pretrained(tmp_path / "out" / "text_encoder").eval()
        assert all(torch.equal(value, written.state_dict()[name]) for name, value in text.clip.state_dict().items())
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"Its text encoder is that of {base}, unchanged." in card and "It reads 16 tokens" in card
    assert str(tmp_path) not in card and str(bases[base]) not in card


@pytest.mark.parametrize("base", ["plain", "narrow"])
def test_a_pretrained_text_encoder_comes_with_the_node(
    base: str, bases: dict[str, Path], eightfold: Run, tmp_path: Path
) -> None:
    run = speaking(tmp_path / "run", eightfold, text={"base": str(bases[base])})
    receipt = api.export(run, "comfyui", tmp_path / "out")
    assert receipt["difference"] <= 1e-4 and receipt["detected"]["denoiser"]["model"] == "SD3"
    assert f"Its text encoder is that of {base}, unchanged." in (tmp_path / "out" / "README.md").read_text()


def test_a_text_encoder_that_is_too_wide_for_comfyui_is_named(
    bases: dict[str, Path], eightfold: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from imagekiln.exporters import comfyui

    monkeypatch.setattr(comfyui, "WHOLE", 31)
    run = speaking(tmp_path / "run", eightfold, text={"base": str(bases["narrow"])})
    with pytest.raises(UsageError, match="is 32 numbers wide, and ComfyUI's SD3 reads at most 31"):
        api.export(run, "comfyui", tmp_path / "out")


def test_safetensors_find_the_pretrained_text_encoder_again(bases: dict[str, Path], tiny: Run, tmp_path: Path) -> None:
    run = speaking(tmp_path / "run", tiny, text={"base": str(bases["plain"])})
    receipt = api.export(run, "safetensors", tmp_path / "out")
    assert receipt["difference"] == 0.0
    again: Any = load_model(Path(receipt["path"]), "cpu").family
    assert torch.equal(
        again.text(again.read(CAPTIONS)).last_BLW, open_model(run).family.text(again.read(CAPTIONS)).last_BLW
    )


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "codec", "sentence"),
    [
        ({}, {"kind": "tiny", "factor": 4}, "8 pixels of a latent"),
        ({}, {"kind": "kl", "factor": 8}, "width = 128"),
        ({"target": "x"}, {"kind": "tiny", "factor": 8}, "family.target = 'x'"),
        ({"denoiser": "unet"}, {"kind": "tiny", "factor": 8}, "makes 32 channels"),
    ],
)
def test_what_comfyui_does_not_take_is_refused(
    family: dict[str, Any], codec: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    run = speaking(tmp_path / "run", autoencoder(tmp_path / "codec", **codec), **family)
    with pytest.raises(UsageError, match=sentence):
        api.export(run, "comfyui", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir()), "nothing is written then"


def test_a_unet_is_renamed_and_filled(eightfold: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tenth of the width that ComfyUI asks for, so that it is quick."""
    from imagekiln.exporters import _comfyui_rules

    monkeypatch.setattr(_comfyui_rules, "UNET_WIDTH", 32)
    codec = autoencoder(tmp_path / "codec", "tiny", factor=8, latent_channels=3)
    settings = {"name": "stable_diffusion", "denoiser": "unet", "widths": [32, 64], "text": TEXT}
    run = made(tmp_path / "run", {"family": settings}, (3, 8, 8), codec)
    receipt = api.export(run, "comfyui", tmp_path / "out")
    assert receipt["difference"] <= 1e-4
    assert receipt["detected"]["denoiser"] == {"model": "SD15", "channels": 4, "widths": [32, 64], "words": 768}


def test_comfyui_gets_an_autoencoder_alone(eightfold: Run, tmp_path: Path) -> None:
    receipt = api.export(eightfold, "comfyui", tmp_path)
    assert receipt["difference"] <= 1e-5
    assert receipt["detected"] == {"model": "TAESD", "channels": 4, "factor": 8}
