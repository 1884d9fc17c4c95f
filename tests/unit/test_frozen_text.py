"""Pretrained text encoders that stay as they are: what they say and remember, whole runs, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pretrained_folder import write_base
from safetensors.torch import load_file, save_file

import imagekiln
from imagekiln import testing
from imagekiln.config import read_toml
from imagekiln.core import Condition, seeded_noise
from imagekiln.engine import checkpoint
from imagekiln.engine.models import guide_by, open_model
from imagekiln.engine.run import Run
from imagekiln.errors import RecipeError, UsageError
from imagekiln.families.stable_diffusion import StableDiffusion
from imagekiln.nets import frozen_text, pretrained
from imagekiln.nets.frozen_text import FrozenText

transformers = pytest.importorskip("transformers")
pytest.importorskip("diffusers", reason="diffusers is not installed")

CAPTIONS = ["a red cat", "", "一只猫", "x " * 50]
KINDS = {"CLIPTextModel": "sd1", "CLIPTextModelWithProjection": "sd3"}


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pipelines' folders by the class of their text encoder."""
    root = tmp_path_factory.mktemp("pipelines")
    return {name: write_base(root / kind, kind) for name, kind in KINDS.items()}


def alone(pipeline: Path, out: Path) -> Path:
    """The text encoder and the tokenizer of a pipeline in one folder."""
    shutil.copytree(pipeline / "tokenizer", out)
    shutil.copytree(pipeline / "text_encoder", out, dirs_exist_ok=True)
    return out


@pytest.fixture
def folder(pipelines: dict[str, Path], tmp_path: Path) -> Path:
    """A text encoder with its tokenizer that a test may change."""
    return alone(pipelines["CLIPTextModelWithProjection"], tmp_path / "clip")


# -- what it says -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["pipeline", "alone"])
@pytest.mark.parametrize("name", KINDS)
def test_it_says_what_transformers_says(name: str, layout: str, pipelines: dict[str, Path], tmp_path: Path) -> None:
    base = pipelines[name] if layout == "pipeline" else alone(pipelines[name], tmp_path / "clip")
    made = FrozenText(str(base))
    stock = getattr(transformers, name).from_pretrained(pipelines[name] / "text_encoder").eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(pipelines[name] / "tokenizer")
    wanted = tokenizer(CAPTIONS, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
    tokens_BL = made.read(CAPTIONS)
    assert torch.equal(tokens_BL, wanted["input_ids"]) and made.context == 16
    assert [made.cuts(caption) for caption in CAPTIONS] == [False, False, False, True]
    with torch.no_grad():
        theirs = stock(input_ids=tokens_BL, output_hidden_states=True)
    said = made(tokens_BL)
    pooled = theirs.text_embeds if name == "CLIPTextModelWithProjection" else theirs.pooler_output
    for ours, other in (
        (said.last_BLW, theirs.last_hidden_state),
        (said.before_BLW, theirs.hidden_states[-2]),
        (said.pooled_BP, pooled),
    ):
        assert torch.allclose(ours, other, atol=1e-5)
    assert said.pooled_BP.shape[1] == made.whole_width and said.last_BLW.shape[2] == made.width


def test_the_text_half_of_a_whole_clip_is_read(folder: Path) -> None:
    own = FrozenText(str(folder))
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 8, "patch_size": 4, "projection_dim": 32}
    text = own.clip.config.to_dict()
    whole = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
    ).eval()
    whole.save_pretrained(folder)
    tokens_BL = own.read(CAPTIONS)
    with torch.no_grad():
        theirs = whole.text_projection(whole.text_model(input_ids=tokens_BL).pooler_output)
    assert torch.allclose(FrozenText(str(folder))(tokens_BL).pooled_BP, theirs, atol=1e-5)


def test_a_text_is_said_once_the_same_in_any_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    made, calls = FrozenText("random:clip"), list[int]()
    made.clip.register_forward_hook(lambda *_: calls.append(1))
    tokens_BL = made.read(["a cat", "a dog", "a cat", "a fish"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = made(tokens_BL[:2])
    with torch.inference_mode():
        made(tokens_BL[2:])
    assert rounded.last_BLW.dtype == torch.float32
    plain = FrozenText("random:clip")(tokens_BL)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(made(tokens_BL), plain, strict=True))
    assert len(calls) == 3 and not plain.last_BLW.requires_grad
    layer = torch.nn.Linear(made.width, 1)
    layer(made(tokens_BL).last_BLW).sum().backward()  # what was said without gradients can be learned from
    assert layer.weight.grad is not None
    monkeypatch.setattr(pretrained, "REMEMBERED_BYTES", made.memory.num_bytes)
    made(made.read(["one more"]))
    made(made.read(["one more"]))
    assert len(calls) == 5 and len(made.memory.kept) == 3


def test_what_is_looked_up_is_not_compiled() -> None:
    made = FrozenText("random:clip")
    made.compile()
    assert made._compiled_call_impl is None


def test_halves_of_surrogate_pairs_are_passed_over() -> None:
    made = FrozenText("random:clip")
    assert made.read(["a caf\udce9 \ud83d"]).equal(made.read(["a caf"]))


# -- as a part of the family ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "check",
    [
        testing.check_modules_exist,
        testing.check_every_parameter_learns,
        testing.check_mixed_precision,
        testing.check_held_out_losses_are_finite_and_repeatable,
        testing.check_samples_depend_on_seed_alone,
        testing.check_training_is_repeatable,
        testing.check_resume_is_exact,
        testing.check_accumulates,
        testing.check_weights_file_draws_the_same,
    ],
    ids=lambda check: check.__name__.removeprefix("check_"),
)
def test_the_family_keeps_its_contract_with_it(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"depth": 1, "text": {"base": "random:clip"}, "sample": {"steps": 2}}
    monkeypatch.setattr(StableDiffusion, "check_settings", settings)
    check("stable_diffusion")


def trained(base: str | Path, out: Path, kimg: float = 0.032, **family: Any) -> Run:
    family = {"depth": 1, "text": {"base": str(base)}, "sample": {"steps": 2}} | family
    train = {"batch": 16, "total_kimg": kimg, "checkpoint_kimg": 0.016, "doctor": "off", "precision": "fp32"}
    train |= {"schedule": "constant", "warmup_fraction": 0.0}  # so that a longer run begins as a shorter one
    settings = {"family": family, "train": train}
    return imagekiln.train("stable_diffusion", "builtin:digits", out, settings=settings)


def test_nothing_of_it_is_trained_averaged_or_stored(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = load_file(folder / "model.safetensors")
    run = trained(folder.name, tmp_path / "run")
    assert read_toml(run.recipe_path)["family"]["text"]["base"] == str(folder), "found again from any folder"
    kept = checkpoint.load(checkpoint.stored(run.checkpoints)[0])
    names = {name for tensors in kept.parts.values() for name in tensors} | set(load_file(run.weights()))
    assert names and not [name for name in names if name.startswith("text.") or "/text." in name]
    family: Any = open_model(run).family
    assert all(torch.equal(value, family.text.clip.state_dict()[name]) for name, value in before.items())


def test_runs_continue_exactly(folder: Path, tmp_path: Path) -> None:
    whole = trained(folder, tmp_path / "whole", 0.064)
    trained(folder, tmp_path / "parts", 0.032)
    parts = trained(folder, tmp_path / "parts", 0.064)
    first, second = (load_file(run.weights()) for run in (whole, parts))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_changed_text_encoder_is_refused(file: str, folder: Path, tmp_path: Path) -> None:
    trained(folder, tmp_path / "run")
    if file == "model.safetensors":
        tensors = load_file(folder / file)
        save_file({name: value + 1 for name, value in tensors.items()}, folder / file, {"format": "pt"})
    else:
        (folder / file).write_text((folder / file).read_text() + "\n")
    with pytest.raises(UsageError, match=r"family\.text\.base: what it names is not what it was"):
        trained(folder, tmp_path / "run", 0.064)


def test_a_text_encoder_that_is_gone_is_missed(folder: Path, tmp_path: Path) -> None:
    run = trained(folder, tmp_path / "run")
    shutil.rmtree(folder)
    with pytest.raises(UsageError, match=r"family\.text\.base: what it names is not what it was"):
        trained(folder, tmp_path / "run", 0.064)
    with pytest.raises(RecipeError, match=r"family\.text\.base = .*clip' does not exist"):
        imagekiln.generate(run, 1, tmp_path / "drawn")


def test_merges_are_a_part_of_what_it_is(folder: Path) -> None:
    before = frozen_text.fingerprint(str(folder))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    assert frozen_text.fingerprint(str(folder)) != before


def test_it_draws_what_is_said_and_turns_away_from_what_is_not_wanted(tmp_path: Path) -> None:
    run = trained("random:clip", tmp_path / "run", 0.128)
    model = open_model(run)
    family: Any = model.family
    noise = seeded_noise([1, 1], family.noise_shape())
    options = family.config.sample.model_copy(update={"guidance": 5.0})
    told = Condition(text=family.read(["a", "a b c d e"]))
    drawn = family.sample(noise, told, options)
    assert not torch.allclose(drawn[0], drawn[1], atol=1e-5), "the words change the picture"
    away = family.sample(noise, told, options.model_copy(update={"negative_prompt": "x y z"}))
    assert not torch.allclose(drawn, away, atol=1e-5)
    plain = family.sample(noise, told, options.model_copy(update={"guidance": 1.0}))
    guide_by(model, run.path, options)
    assert torch.allclose(family.sample(noise, told, options), plain, atol=1e-4), "by itself"
    other = trained("", tmp_path / "other", text={"width": 32, "layers": 2, "context": 8, "vocabulary": 514})
    with pytest.raises(UsageError, match="other pictures, classes, captions"):
        guide_by(model, other.path, options)


def test_a_student_reads_with_its_teachers_text_encoder(folder: Path, tmp_path: Path) -> None:
    teacher = trained(folder, tmp_path / "teacher")
    train = {"batch": 16, "total_kimg": 0.032, "precision": "fp32"}
    settings = {"train": train, "family": {"distillation": {"teacher_steps": 1}}}
    student = imagekiln.train("few-step", "", tmp_path / "student", begin_with=teacher.path, settings=settings)
    assert read_toml(student.recipe_path)["family"]["text"]["base"] == str(folder)
    assert len(imagekiln.generate(student, 2, tmp_path / "drawn", steps=1).pictures) == 2
    own = {"train": train, "family": {"text": {"base": "", "width": 32}}}
    with pytest.raises(RecipeError, match="the weights of its text do not fit"):
        imagekiln.train("", "", tmp_path / "own", begin_with=teacher.path, settings=own)


# -- bad input --------------------------------------------------------------------------------------------------------


def test_a_folder_that_holds_something_else_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name, sentence in (
        ("gone", "gone' does not exist. Expected a folder of a CLIP text model"),
        ("empty", "empty' holds no text encoder"),
        ("file", "file' is one file"),
    ):
        with pytest.raises(RecipeError, match=rf"family\.text\.base = .*{sentence}"):
            FrozenText(str(tmp_path / name))
    with pytest.raises(RecipeError, match="expected random:clip"):
        FrozenText("random:sd1")


def test_what_is_no_clip_text_model_is_refused(folder: Path) -> None:
    sizes = {"vocab_size": 600, "d_model": 32, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    transformers.T5EncoderModel(transformers.T5Config(**sizes)).save_pretrained(folder)
    with pytest.raises(RecipeError, match=r"family\.text\.base: .* (is not a CLIP text model|cannot be read)"):
        FrozenText(str(folder))


def test_weights_that_are_not_all_there_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    gone = next(name for name in tensors if "q_proj" in name)
    save_file({name: value for name, value in tensors.items() if name != gone}, file, {"format": "pt"})
    with pytest.raises(RecipeError, match=r"is not a CLIP text model: .*q_proj.* is missing"):
        FrozenText(str(folder))
    file.write_bytes(b"nonsense")
    with pytest.raises(RecipeError, match=r"family\.text\.base: .* cannot be read as a CLIPTextModel"):
        FrozenText(str(folder))
    file.rename(folder / "pytorch_model.bin")
    with pytest.raises(RecipeError, match=r"family\.text\.base: .* holds weights as pickles"):
        FrozenText(str(folder))


def test_a_tokenizer_must_be_there_and_belong_to_it(folder: Path) -> None:
    about = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(RecipeError, match=r"family\.text\.base: the tokenizer in .* cannot be read"):
        FrozenText(str(folder))
    about["model"]["vocab"] |= {"more": 514, "and more": 515}
    (folder / "tokenizer.json").write_text(json.dumps(about))
    with pytest.raises(RecipeError, match="its tokenizer has 516 tokens, and its text encoder knows 514"):
        FrozenText(str(folder))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(
        RecipeError, match=r"holds no tokenizer\. Put the text encoder's there: tokenizer\.json or vocab"
    ):
        FrozenText(str(folder))
