"""Fine-tuning: layouts of pretrained folders, what is learned, drawing as stock pipelines draw, and what is refused."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pretrained_folder import write_base
from safetensors.torch import load_file

import imagekiln
from imagekiln.core import Batch, Condition, Progress, seeded_noise
from imagekiln.diffusion.paths import SteppedVP
from imagekiln.engine import published, recipe
from imagekiln.engine.models import open_model
from imagekiln.errors import ImagekilnError, RecipeError, UsageError
from imagekiln.families.fine_tune import FineTune, FineTuneConfig
from imagekiln.nets import pretrained
from imagekiln.nets.adapters import LowRank
from imagekiln.nets.pretrained import PIPELINES

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

KINDS = tuple(PIPELINES)
METHODS = ("lora", "dora", "full", "word")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base of every layout."""
    return {kind: write_base(tmp_path_factory.mktemp("bases") / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures of 16 pixels with captions."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    rows = ["file_name,text"]
    for index in range(10):
        pixels = rng.integers(0, 60, (16, 16, 3))
        pixels[..., index % 3] += 180
        Image.fromarray(pixels.astype(np.uint8)).save(root / f"{index}.png")
        rows.append(f"{index}.png,a <new> {('red', 'green', 'blue')[index % 3]} square")
    (root / "metadata.csv").write_text("\n".join(rows) + "\n")
    return root


def family(kind: str = "sd1", **settings: object) -> FineTune:
    torch.manual_seed(0)
    settings = {"base": f"random:{kind}", "rank": 2, "alpha": 2.0, "word": {"start": "o"}} | settings
    return FineTune(FineTuneConfig(**settings), (4, 8, 8), 0)


def batch(model: FineTune, count: int = 2) -> Batch:
    images = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    return Batch(images, text=model.read(["a <new> cat", "a dog"])[:count])


def trained(bases: dict, photos: Path, out: Path, kind: str, method: str, kimg: float = 0.008, **more: object):
    train = {"total_kimg": kimg, "batch": 4, "doctor": "off", "precision": "fp32", "warmup_fraction": 0.0}
    settings = {
        "family": {
            "base": str(bases[kind]),
            "method": method,
            "rank": 2,
            "word": {"start": "o"},
            "sample": {"steps": 2},
        }
        | more,
        "train": train,
        "optim": {"tuned": {"lr": 1e-2}},
    }
    return imagekiln.train("fine_tune", data=photos, out=out, settings=settings)


# -- parts ------------------------------------------------------------------------------------------------------------


def test_steps_have_the_noise_of_their_betas():
    betas = torch.linspace(1e-4, 0.02, 50, dtype=torch.float64)
    path = SteppedVP(betas)
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=50, beta_start=1e-4, beta_end=0.02)
    kept = scheduler.alphas_cumprod.double()
    assert torch.allclose(path.sigma_T, ((1 - kept) / kept).sqrt(), rtol=1e-4)
    steps = torch.arange(50).float()
    assert torch.equal(path.time(path.sigma(steps)), steps)
    assert path.time(torch.tensor([0.0, 1e9])).tolist() == [0.0, 49.0]
    x, eps = torch.randn(2, 3), torch.randn(2, 3)
    ours = path.diffuse(x, eps, path.sigma(torch.tensor([7.0, 42.0])))
    assert torch.allclose(ours, scheduler.add_noise(x, eps, torch.tensor([7, 42])), atol=1e-5)


def test_steps_that_end_in_noise_alone_have_the_noise_of_the_scheduler():
    config = pretrained.RANDOM_BETAS | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    betas = pretrained.noise_of(config, "sd1").betas
    scheduler = diffusers.DDPMScheduler.from_config(config)
    assert torch.allclose(betas.float(), scheduler.betas, atol=1e-5) and betas[-1] == 1
    kept, theirs = (1 - betas).cumprod(0), scheduler.alphas_cumprod.double()
    assert torch.allclose(kept.sqrt(), theirs.sqrt(), atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lengths", [True, False])
def test_changes_are_those_of_the_changed_weights(bias: bool, lengths: bool):
    torch.manual_seed(0)
    layer = torch.nn.Linear(5, 7, bias=bias).double()
    part = LowRank(layer, 3, 6.0, lengths).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    assert torch.allclose(part(x, layer(x), layer), layer(x), atol=1e-12), "it begins as the layer was"
    torch.nn.init.normal_(part.up)
    weight = layer.weight + 2.0 * part.up @ part.down
    if part.length is not None:
        torch.nn.init.uniform_(part.length, 1, 2)
        weight = part.length[:, None] * weight / weight.norm(dim=1, keepdim=True)
    wanted = torch.nn.functional.linear(x, weight, layer.bias)
    assert torch.allclose(part(x, layer(x), layer), wanted, atol=1e-12)
    assert torch.allclose(part.merged(layer), weight, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_only_what_is_tuned_is_in_a_checkpoint_and_learns(kind: str, method: str):
    model = family(kind, method=method)
    assert {name.split(".")[0] for name in model.state_dict()} == {"tuned"}
    before = {name: value.clone() for name, value in model.base.denoiser.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.requires_grad_(True)
    torch.manual_seed(0)
    model.loss("denoise", batch(model), Progress(0, 10)).total.backward()
    optimizer.step()
    after = model.base.denoiser.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items()) == (method != "full")
    noise = seeded_noise([1, 2], model.noise_shape())
    drawn = model.eval().sample(noise, Condition(text=model.read(["a <new> cat"] * 2)))
    fresh = family(kind, method=method).eval()
    assert not torch.allclose(drawn, fresh.sample(noise, Condition(text=fresh.read(["a <new> cat"] * 2))), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_captions_that_are_longer_than_encoders_read_are_known(kind: str):
    model = family(kind)
    assert not model.cuts("a cat") and model.cuts("a cat " * 20)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_encoded_once_while_there_is_room(monkeypatch: pytest.MonkeyPatch, kind: str):
    base = family(kind).base
    calls: list[int] = []
    base.encoders[0].register_forward_hook(lambda *_: calls.append(1))
    tokens = base.read(["a cat", "a dog", "a cat", "a fish", "a fish"])
    each = [base.words(tokens[place : place + 1], learning=True) for place in range(len(tokens))]
    whole = [one.whole_BP for one in each if one.whole_BP is not None]
    calls.clear()
    base.words(tokens[:1])
    one_text = base.memory.num_bytes
    monkeypatch.setattr(pretrained, "REMEMBERED_BYTES", 2 * one_text)
    for _ in range(3):
        words = base.words(tokens)
        assert torch.equal(words.states_BLW, torch.cat([one.states_BLW for one in each]))
        assert words.whole_BP is None if not whole else torch.equal(words.whole_BP, torch.cat(whole))
    assert len(calls) == 2 + 3, "two are remembered, and the third one is encoded once a batch"
    assert base.memory.num_bytes == 2 * one_text and len(base.memory.kept) == 2
    for kept in base.memory.kept.values():
        assert kept.states_BLW.any(-1).all() and kept.states_BLW.any(1).all(), "zeros of absent encoders are not"


def test_words_of_the_third_encoder_stand_behind_those_of_the_others():
    transformers = pytest.importorskip("transformers")
    base = family("sd3").base
    absent = base.words(base.read(["a cat"])).states_BLW
    width, length = absent.shape[-1], absent.shape[1] - pretrained.T5_TOKENS
    assert absent[:, :length].any() and not absent[:, length:].any()
    sizes = {"vocab_size": 1000, "d_model": width, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    base.encoders.append(transformers.T5EncoderModel(transformers.T5Config(**sizes)).eval())
    base.tokenizers.append(base.tokenizers[0])
    tokens = base.read(["a cat"])
    words = base.words(tokens).states_BLW
    assert torch.equal(words[:, :length], absent[:, :length])
    with torch.no_grad():
        assert torch.equal(words[:, length:], base.encoders[2](tokens[:, length * 2 :]).last_hidden_state)


def test_copies_draw_with_what_they_learned_themselves():
    model = family(method="lora").eval()
    twin = copy.deepcopy(model)
    assert twin.base is model.base
    for part in twin.tuned.parts.values():
        torch.nn.init.normal_(part.up, std=0.3)
    noise, told = seeded_noise([1], model.noise_shape()), Condition(text=model.read(["a"]))
    first, changed = model.sample(noise, told), twin.sample(noise, told)
    assert not torch.allclose(first, changed, atol=1e-4)
    assert torch.equal(model.sample(noise, told), first)


def test_a_prior_is_drawn_once_by_the_model_as_it_was_and_kept():
    model = family(prior={"prompt": "a cat", "pictures": 3}, sample={"steps": 2})
    plain = family(sample={"steps": 2}).eval()
    loss = model.loss("denoise", batch(model), Progress(0, 10))
    assert set(loss.parts) == {"given", "prior"} and bool(model.prior_drawn)
    kept = model.prior_NCHW.clone()
    seeds_differ = [not torch.equal(kept[0], kept[place]) for place in (1, 2)]
    assert all(seeds_differ) and float(kept.std()) > 0
    torch.nn.init.normal_(next(iter(model.tuned.parts.values())).up)
    model.loss("denoise", batch(model), Progress(0, 10))
    assert torch.equal(model.prior_NCHW, kept)
    assert "prior_NCHW" in model.state_dict() and "prior_NCHW" not in plain.state_dict()


def test_given_pictures_and_the_prior_each_see_all_levels():
    model = family(prior={"prompt": "a cat", "pictures": 2}, sample={"steps": 2})
    model.loss("denoise", batch(model), Progress(0, 10))  # the prior is drawn here
    seen: list[torch.Tensor] = []
    model.base.denoiser.register_forward_pre_hook(lambda network, given: seen.append(given[1]))
    model.loss("denoise", Batch(torch.randn(8, 4, 8, 8)), Progress(0, 10))
    for half in seen[0].chunk(2):
        assert sorted((half // 125).tolist()) == list(range(8))  # of a thousand steps


def test_weights_of_levels_are_those_of_min_snr():
    plain, weighted = (family(min_snr=value).eval() for value in (0.0, 5.0))
    one = batch(plain)
    for seed in range(3):
        losses = []
        for model in (plain, weighted):
            torch.manual_seed(seed)
            losses.append(model.held_out(one, Progress(0, 1))["denoise"])
        snr = losses[0].levels ** -2
        assert torch.allclose(losses[1].values, losses[0].values * (snr.clamp(max=5) / snr), rtol=1e-4)


# -- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "method"), [(kind, "lora") for kind in KINDS] + [("sd1", m) for m in METHODS[1:]] + [("sdxl", "word")]
)
def test_exports_draw_in_stock_pipelines_what_we_draw(bases, photos, tmp_path, kind: str, method: str):
    if method in ("lora", "dora"):
        pytest.importorskip("peft", reason="peft is not installed")
    run = trained(
        bases, photos, tmp_path / "run", kind, method, train_text=method in ("lora", "full") and kind != "sd3"
    )
    receipt = imagekiln.export(run, "diffusers", tmp_path / "out")
    assert receipt["difference"] <= 1e-4 and receipt["pipeline"] == PIPELINES[kind]
    if method == "full":
        with pytest.raises(UsageError, match=r"ComfyUI would refuse this file.*Use --to diffusers"):
            imagekiln.export(run, "comfyui", tmp_path / "comfy")
    else:
        assert imagekiln.export(run, "comfyui", tmp_path / "comfy")["difference"] <= 1e-4
        nodes = json.loads((tmp_path / "comfy" / "workflow.json").read_text()).values()
        given = [node["inputs"] for node in nodes if node["class_type"] == "LoraLoader"]
        assert [one["lora_name"] for one in given] == (["comfy.safetensors"] if method in ("lora", "dora") else [])
        said = next(node["inputs"]["text"] for node in nodes if node["class_type"] == "CLIPTextEncode")
        assert said.startswith("a embedding:comfy" if method == "word" else "a <new>"), "a prompt of the run"
    card = (tmp_path / "out" / "README.md").read_text()
    assert str(tmp_path) not in card and str(bases[kind]) not in card


def test_the_card_names_a_base_of_the_hub_as_the_hub_does(bases, photos, tmp_path):
    shutil.copytree(bases["sd1"], kept := tmp_path / "models--me--mine" / "snapshots" / ("5" * 40))
    run = trained({"sd1": kept}, photos, tmp_path / "run", "sd1", "word")
    imagekiln.export(run, "diffusers", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"from_pretrained('me/mine', revision='{'5' * 40}')" in card and f"me/mine at commit {'5' * 40}" in card


def test_a_base_whose_steps_end_in_noise_alone_draws_as_its_pipeline(bases, photos, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(bases["sd1"], base)
    path = base / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text()) | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    path.write_text(json.dumps(config))
    run = trained({"sd1": base}, photos, tmp_path / "run", "sd1", "word")
    assert imagekiln.export(run, "diffusers", tmp_path / "out")["difference"] <= 1e-4
    imagekiln.export(run, "comfyui", tmp_path / "comfy")
    nodes = json.loads((tmp_path / "comfy" / "workflow.json").read_text()).values()
    given = [node["inputs"] for node in nodes if node["class_type"] == "ModelSamplingDiscrete"]
    assert [(one["sampling"], one["zsnr"]) for one in given] == [("v_prediction", True)]


@pytest.mark.parametrize("kind", KINDS)
def test_comfyui_is_given_what_a_dora_changes_weights_by(bases, photos, tmp_path, kind: str):
    """Of full rank, as lengths scale all of W; added to stock layers, the denoiser answers as ours does."""
    run = trained(bases, photos, tmp_path / "run", kind, "dora")
    receipt = imagekiln.export(run, "comfyui", tmp_path / "comfy")
    assert receipt["difference"] <= 1e-5 and not receipt["pipeline"] and not receipt["call"]
    assert "from diffusers" not in (tmp_path / "comfy" / "README.md").read_text()
    file = load_file(receipt["path"])
    ours = open_model(run, device="cpu").family
    stock = pretrained.Pretrained(str(bases[kind])).networks()["denoiser"]
    changed = {name: weight.clone() for name, weight in stock.state_dict().items()}
    ranks = []
    for name in [name for name in changed if name.endswith(".weight")]:
        layer = name.removesuffix(".weight")
        known = f"transformer.{layer}" if kind == "sd3" else f"lora_unet_{layer.replace('.', '_')}"
        if (difference := file.pop(f"{known}.diff", None)) is not None:
            ranks.append(int(torch.linalg.matrix_rank(difference)))
            changed[name] += difference
    assert max(ranks) > ours.config.rank
    assert not file, "ComfyUI passes over names that it does not know"
    x, tokens = torch.randn(2, *ours.image_shape), ours.read(["a <new> cat", "a dog"])
    wanted = ours.denoiser(tokens)(x, torch.tensor([0.5, 2.0]))
    ours.base.networks()["denoiser"].load_state_dict(changed)
    ours.tuned = torch.nn.ModuleDict()
    assert torch.allclose(ours.denoiser(tokens)(x, torch.tensor([0.5, 2.0])), wanted, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_runs_continue_exactly(bases, photos, tmp_path, method: str):
    more = {"prior": {"prompt": "a square", "pictures": 2}} if method == "lora" else {}
    whole = trained(bases, photos, tmp_path / "whole", "sd1", method, kimg=0.016, **more)
    trained(bases, photos, tmp_path / "parts", "sd1", method, kimg=0.008, **more)
    parts = trained(bases, photos, tmp_path / "parts", "sd1", method, kimg=0.016, **more)
    first, second = (open_model(run).family.state_dict() for run in (whole, parts))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_changed_base_is_refused(bases, photos, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(bases["sd1"], base)
    trained({"sd1": base}, photos, tmp_path / "run", "sd1", "lora")
    shutil.rmtree(base)
    with pytest.raises(ImagekilnError, match=r"family\.base"):
        imagekiln.generate(tmp_path / "run", n=1, out=tmp_path / "drawn")
    shutil.copytree(bases["sd1"], base)
    (base / "scheduler" / "scheduler_config.json").write_text('{"beta_end": 0.02}')
    with pytest.raises(UsageError, match=r"family\.base: what it names is not what it was"):
        trained({"sd1": base}, photos, tmp_path / "run", "sd1", "lora", kimg=0.016)


def test_the_weights_travel_with_a_published_codec(bases, photos, tmp_path):
    run = trained(bases, photos, tmp_path / "run", "sd1", "lora")
    receipt = imagekiln.export(run, "safetensors", tmp_path / "out")
    assert receipt["difference"] == 0 and Path(receipt["codec"]).is_file()


def test_published_autoencoders_are_codecs(bases, photos, tmp_path):
    codec = published.opened(bases["sd3"] / "vae", (3, 16, 16))
    vae = diffusers.AutoencoderKL.from_pretrained(bases["sd3"] / "vae")
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        latents = (vae.encode(images).latent_dist.mean - 0.1) * 0.5
        pictures = vae.decode(latents / 0.5 + 0.1).sample
    assert torch.allclose(codec.encode(images), latents, atol=1e-5)
    assert torch.allclose(codec.decode(latents), pictures, atol=1e-5)
    (tmp_path / "codec.safetensors").write_bytes(codec.data)
    again = published.reopened(tmp_path / "codec.safetensors")
    assert again is not None and torch.equal(again.decode(latents), codec.decode(latents))
    with pytest.raises(UsageError, match="multiples of 2"):
        published.opened(bases["sd3"] / "vae", (3, 15, 16))


# -- bad input --------------------------------------------------------------------------------------------------------


def broken(base: Path, out: Path, file: str, text: str | None) -> Path:
    """A copy of a base with one file changed, or taken away."""
    shutil.copytree(base, out)
    if text is None:
        (out / file).unlink()
    else:
        (out / file).write_text(text)
    return out


@pytest.mark.parametrize(
    ("file", "text", "sentence"),
    [
        ("model_index.json", None, "Expected a folder with a model_index.json"),
        ("model_index.json", '{"_class_name": "FluxPipeline"}', "holds a FluxPipeline; expected one of"),
        ("model_index.json", "{", "cannot be read"),
        ("unet/diffusion_pytorch_model.safetensors", None, "holds no weights"),
        ("unet/diffusion_pytorch_model.safetensors", "nonsense", "cannot be read as a UNet2DConditionModel"),
        ("scheduler/scheduler_config.json", '{"beta_schedule": "odd"}', "beta_schedule = 'odd'"),
        ("scheduler/scheduler_config.json", '{"prediction_type": "odd"}', "prediction_type = 'odd'"),
    ],
)
def test_broken_folders_are_refused(bases, tmp_path, file: str, text: str | None, sentence: str):
    folder = broken(bases["sd1"], tmp_path / "base", file, text)
    with pytest.raises(RecipeError, match=sentence):
        pretrained.Pretrained(str(folder))


def test_pickles_and_remote_code_are_refused(bases, tmp_path):
    folder = broken(bases["sd1"], tmp_path / "base", "unet/diffusion_pytorch_model.safetensors", None)
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(RecipeError, match="pickles"):
        pretrained.Pretrained(str(folder))
    index = json.loads((bases["sd1"] / "model_index.json").read_text())
    index["text_encoder"] = ["my_code", "MyEncoder"]
    folder = broken(bases["sd1"], tmp_path / "other", "model_index.json", json.dumps(index))
    with pytest.raises(RecipeError, match="MyEncoder"):
        pretrained.Pretrained(str(folder))
    with pytest.raises(RecipeError, match="one file"):
        pretrained.Pretrained(str(folder / "model_index.json"))
    with pytest.raises(RecipeError, match="vae' holds no whole model"):
        pretrained.Pretrained(str(folder / "vae"))
    with pytest.raises(RecipeError, match="gone' does not exist"):
        pretrained.Pretrained(str(folder / "gone"))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"method": "dora", "train_text": True}, r"family\.train_text"),
        ({"base": ""}, r"family\.base: it is missing"),
        ({"base": "random:sd9"}, "random:sd1"),
        ({"method": "word", "word": {"start": "two words"}}, r"is \d+ tokens"),
        ({"method": "word", "word": {"token": "<|endoftext|>", "start": "a"}}, "the model knows it"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict, sentence: str):
    with pytest.raises(RecipeError, match=sentence):
        FineTune(FineTuneConfig(**({"base": "random:sd1"} | settings)), (4, 8, 8), 0)


def test_a_base_that_is_not_named_is_not_the_folder_at_hand(bases, monkeypatch):
    monkeypatch.chdir(bases["sd1"])
    assert recipe.founded(recipe.resolve("fine_tune")) == recipe.resolve("fine_tune")
    named = recipe.founded(recipe.resolve("fine_tune", {"family": {"base": "."}}))
    assert named.family.base == named.data.codec == str(bases["sd1"])


def test_a_codec_of_other_scales_is_refused(bases, tmp_path):
    """Stable Diffusion 3 shifts latents. What a config leaves out is the default of its class."""
    named = {"family": {"base": str(bases["sd1"])}, "data": {"codec": str(bases["sdxl"])}}
    assert recipe.founded(recipe.resolve("fine_tune", named)).data.codec == str(bases["sdxl"])
    with pytest.raises(RecipeError, match=r"scales latents by 0\.5 after 0\.1 is taken off, and .* with 0\.5 and 0"):
        recipe.founded(recipe.resolve("fine_tune", named | {"data": {"codec": str(bases["sd3"])}}))
    config = json.loads((bases["sd1"] / "vae" / "config.json").read_text())
    del config["scaling_factor"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match=r"by 0\.18215"):
        recipe.founded(recipe.resolve("fine_tune", named | {"data": {"codec": str(tmp_path)}}))
    (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": "AutoencoderTiny"}))
    recipe.founded(recipe.resolve("fine_tune", named | {"data": {"codec": str(tmp_path)}}))


def test_latents_of_another_kind_are_refused(bases):
    with pytest.raises(RecipeError, match="draws latents of 4 channels, and it is given 3"):
        FineTune(FineTuneConfig(base=str(bases["sd1"])), (3, 16, 16), 0)


# -- learning ---------------------------------------------------------------------------------------------------------

OVERFIT = {
    "full": ({"method": "full"}, 2e-3, 0.75),
    "lora": ({"method": "lora", "rank": 8, "train_text": True}, 3e-2, 0.97),
    "dora": ({"method": "dora", "rank": 8}, 3e-2, 0.97),
    "dreambooth": ({"method": "lora", "rank": 8, "prior": {"prompt": "a", "pictures": 4}}, 3e-2, 0.98),
    "word": ({"method": "word", "word": {"start": "o", "count": 4}}, 0.3, 0.9999),
}
"""Settings, learning rate, and what the loss of eight pictures must fall to, as a share; networks are random."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", OVERFIT)
def test_eight_pictures_are_learned(kind: str, what: str):
    settings, lr, share = OVERFIT[what]
    model = family(kind, text_dropout=0.0, sample={"steps": 2}, **settings)
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(8, 4, 8, 8, generator=generator)
    eight = Batch(images, text=model.read([f"a <new> {place}" for place in range(8)]))
    model.loss("denoise", eight, Progress(0, 1))  # a prior is drawn here
    optimizer = torch.optim.Adam(model.requires_grad_(True).parameters(), lr)

    def loss(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return model.loss("denoise", eight, Progress(0, 1)).total

    before = sum(float(loss(seed).detach()) for seed in range(3))
    for step in range(36):
        optimizer.zero_grad()
        loss(step % 3).backward()
        optimizer.step()
    after = sum(float(loss(seed).detach()) for seed in range(3))
    assert after < share * before
