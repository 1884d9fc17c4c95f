"""What a family learns from: latents of a codec, captions as it reads them, and what goes with a run."""

from __future__ import annotations

import shutil
from pathlib import Path

import folding
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import imagekiln
from imagekiln.config import Recipe
from imagekiln.data import Dataset, load, to_float
from imagekiln.engine import augment, inputs, models, recipe
from imagekiln.engine.generate import asked_for, draw
from imagekiln.engine.run import Run
from imagekiln.errors import RecipeError, UsageError
from imagekiln.nets.vgg import Vgg16

FOLDING = folding.__file__
NAMES = ("red", "green", "blue")
BLIND = {"widths": [32], "attention": [False]}
TINY = {"depth": 1, "text": {"width": 32, "layers": 2, "context": 8, "vocabulary": 520}, "sample": {"steps": 2}}


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small pictures of one colour each, with captions of tags."""
    monkeypatch.setenv("IMAGEKILN_CACHE", str(tmp_path / "cache"))
    root, rng = tmp_path / "photos", np.random.default_rng(0)
    root.mkdir()
    rows = ["file_name,text"]
    for index in range(96):
        pixels = rng.integers(0, 90, (8, 8, 3))
        pixels[..., index % 3] += 150
        Image.fromarray(pixels.astype(np.uint8)).save(root / f"{index:02d}.png")
        rows.append(f'{index:02d}.png,"{NAMES[index % 3]}, tag{index}, other"')
    (root / "metadata.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture
def coder(photos: Path, tmp_path: Path) -> Path:
    """The run of an autoencoder."""
    settings = {"train": {"total_kimg": 0.008, "batch": 8, "doctor": "off"}}
    return imagekiln.train(FOLDING, data=photos, out=tmp_path / "coder", settings=settings).path


def made(photos: Path, name: str = "stable_diffusion", **sections: dict) -> Recipe:
    train = {"total_kimg": 0.032, "batch": 8, "doctor": "off", "precision": "fp32"}
    sections = {"train": train, "data": {"path": str(photos)}, "family": TINY} | sections
    if "path" not in sections["data"]:
        sections["data"]["path"] = str(photos)
    return recipe.resolve(name, sections)


def begun(wanted: Recipe) -> tuple[inputs.Begun, Dataset]:
    dataset = load(wanted.data)
    return inputs.begin(wanted, dataset), dataset


# -- latents ----------------------------------------------------------------------------------------------------------


def test_latents_have_mean_zero_and_deviation_one_and_give_the_pictures_back(photos: Path, coder: Path):
    (family, train, held_out), dataset = begun(made(photos, data={"codec": str(coder)}))
    assert train.image_shape == (12, 4, 4) == family.image_shape and family.picture_shape == (3, 8, 8)
    everything = train.read(range(len(train))).images
    assert everything.dtype == torch.float32
    assert abs(float(everything.mean())) < 1e-3 and float(everything.std()) == pytest.approx(1, abs=1e-3)
    for source, pictures in ((train, dataset.train), (held_out, dataset.validation)):
        wanted = to_float(pictures.read(range(4)).images)
        assert torch.allclose(family.codec.decode(source.read(range(4)).images), wanted, atol=2e-3)
        assert inputs.pictures_of(source) is pictures
    images = to_float(dataset.train.read([3]).images)
    assert torch.allclose(family.codec.encode(images), train.read([3]).images, atol=2e-3)


def test_mirrored_pictures_have_latents_of_their_own(photos: Path, coder: Path):
    wanted = made(photos, data={"codec": str(coder), "flip": True})
    (family, train, _), dataset = begun(wanted)
    count = len(dataset.train)
    assert len(train) == 2 * count
    mirrored = family.codec.decode(train.read([count + 5]).images)
    assert torch.allclose(mirrored, to_float(dataset.train.read([5]).images).flip(-1), atol=2e-3)
    assert train.captions[count + 5] == train.captions[5]
    loader = augment.loader(wanted.data, train, 0, 8, "cpu")
    batch, indices = loader.batch(0), loader.order(0, 8).tolist()
    assert torch.equal(batch.images, train.read(indices).images), "the loader mirrors no latents"


def test_latents_are_made_once(photos: Path, coder: Path, tmp_path: Path):
    wanted = made(photos, data={"codec": str(coder)})
    first = begun(wanted)[0].train.read(range(8)).images
    files = list((tmp_path / "cache" / "latents").glob("*.npy"))
    assert len(files) == 2
    times = [file.stat().st_mtime_ns for file in files]
    assert torch.equal(begun(wanted)[0].train.read(range(8)).images, first)
    assert [file.stat().st_mtime_ns for file in files] == times


def test_a_run_keeps_its_codec(photos: Path, coder: Path, tmp_path: Path):
    wanted, out = made(photos, data={"codec": str(coder)}), tmp_path / "run"
    run = imagekiln.train(wanted, data=photos, out=out)
    before = imagekiln.generate(run, n=3, out=tmp_path / "before").pictures
    shutil.rmtree(coder)
    after = imagekiln.generate(run, n=3, out=tmp_path / "after").pictures
    assert [a.read_bytes() for a in before] == [b.read_bytes() for b in after]
    with Image.open(after[0]) as picture:
        assert picture.size == (8, 8)
    longer = wanted.model_copy(update={"train": wanted.train.model_copy(update={"total_kimg": 0.048})})
    assert imagekiln.train(longer, data=photos, out=out).status()["nimg"] == 48
    shutil.rmtree(out / "codec")
    with pytest.raises(UsageError, match="codec"):
        imagekiln.generate(run, n=1, out=tmp_path / "none")


def test_what_cannot_be_a_codec_is_refused(photos: Path, coder: Path, tmp_path: Path):
    with pytest.raises(UsageError, match=r"data\.codec: .*gone is not a run folder"):
        begun(made(photos, data={"codec": str(tmp_path / "gone")}))
    vae = imagekiln.train(
        "vqvae", data=photos, out=tmp_path / "v", settings={"train": {"total_kimg": 0.008, "batch": 8}}
    )
    if not hasattr(models.open_model(vae).family, "encode"):
        with pytest.raises(UsageError, match="cannot encode"):
            begun(made(photos, data={"codec": str(vae.path)}))
    with pytest.raises(UsageError, match=r"encodes pictures of \(3, 8, 8\)"):
        begun(made(photos, data={"codec": str(coder), "size": 16}))


@pytest.mark.parametrize("flip", [False, True])
def test_pictures_behind_a_codec_are_changed_before_they_are_encoded(photos: Path, coder: Path, flip: bool):
    data = {"flip": flip, "augment": {"p": 0.5, "rotate": 90, "color": 0.3}}
    pixels, wanted = (made(photos, data=data | more) for more in ({}, {"codec": str(coder)}))
    start, dataset = begun(wanted)
    seen = augment.loader(wanted.data, start.train, 3, 16, "cpu").batch(32)
    shown = augment.loader(pixels.data, begun(pixels)[0].train, 3, 16, "cpu").batch(32)
    assert len(start.train) == len(dataset.train) and seen.augment.any()
    torch.testing.assert_close(seen.images, start.family.codec.encode(shown.images), atol=1e-5, rtol=1e-5)
    assert torch.equal(seen.augment, shown.augment) and torch.equal(seen.text, shown.text)
    assert not seen.images.requires_grad and not seen.images.is_inference()


def test_latents_are_for_families_that_are_not_bounded(photos: Path, coder: Path):
    with pytest.raises(RecipeError, match=r"data\.codec: a dcgan model draws between -1 and 1"):
        begun(made(photos, "dcgan", data={"codec": str(coder)}, family={}))


def test_a_companion_that_changed_is_refused(photos: Path, tmp_path: Path):
    judge, out = tmp_path / "judge", tmp_path / "run"
    small = {"total_kimg": 0.008, "batch": 8, "doctor": "off"}
    labelled = tmp_path / "labelled"
    for name in NAMES:
        (labelled / name).mkdir(parents=True)
    for place, photo in enumerate(sorted(photos.glob("*.png"))):
        shutil.copy(photo, labelled / NAMES[place % 3])
    imagekiln.train("classifier", data=labelled, out=judge, settings={"train": small})
    family = {"kind": "tiny", "width": 8, "factor": 2, "blocks": 1, "perceptual": str(judge), "adversarial_weight": 0}
    first = made(photos, "autoencoder", family=family, train=small)
    imagekiln.train(first, data=photos, out=out)
    longer = first.model_copy(update={"train": first.train.model_copy(update={"total_kimg": 0.016})})
    assert imagekiln.train(longer, data=photos, out=out).status()["nimg"] == 16
    shutil.rmtree(judge)
    imagekiln.train("classifier", data=labelled, out=judge, settings={"train": small | {"seed": 1}})
    with pytest.raises(UsageError, match=r"family\.perceptual: what it names is not what it was"):
        imagekiln.train(longer, data=photos, out=out)


def test_a_published_network_is_a_companion_too(photos: Path, tmp_path: Path):
    file, out = tmp_path / "vgg16.safetensors", tmp_path / "run"
    save_file(Vgg16((3, 8, 8), (4, 4, 4, 4, 4)).state_dict(), file)
    family = {"kind": "tiny", "width": 8, "factor": 2, "perceptual": str(file), "adversarial_weight": 0}
    wanted = made(photos, "autoencoder", family=family, train={"total_kimg": 0.008, "batch": 8, "doctor": "off"})
    run = imagekiln.train(wanted, data=photos, out=out)
    assert run.stats()[-1]["validation/perceptual"] > 0
    judge = begun(wanted)[0].family.companion["perceptual"]
    assert judge.image_shape == (3, 8, 8) and not any(weight.requires_grad for weight in judge.parameters())
    save_file({"w": torch.zeros(1)}, file)
    with pytest.raises(RecipeError, match=r"family\.perceptual: .* holds no VGG-16"):
        begun(wanted)
    with pytest.raises(UsageError, match=r"family\.perceptual: what it names is not what it was"):
        imagekiln.train(wanted, data=photos, out=out)
    file.unlink()
    assert imagekiln.generate(run, n=1, out=tmp_path / "drawn").pictures  # judging is over
    with pytest.raises(RecipeError, match=r"family\.perceptual = .* does not exist. Name a run folder or a \.safetens"):
        begun(wanted)


def test_an_autoencoder_is_measured_by_what_it_gives_back(photos: Path, tmp_path: Path):
    family = {"width": 8, "factor": 2, "adversarial_weight": 0}
    settings = {"total_kimg": 0.032, "batch": 8, "doctor": "off", "preview_kimg": 0.016}
    run = imagekiln.train(made(photos, "autoencoder", family=family, train=settings), data=photos, out=tmp_path / "run")
    found = {row.metric for row in imagekiln.evaluate(run, features="randconv")}
    assert {"mse", "mae", "psnr"} <= found
    assert not {"frechet", "coverage", "copy_ratio"} & found, "it draws nothing of its own"
    assert len(list((run.path / "samples").glob("*.png"))) >= 2, "shown in pairs while it trains"
    with pytest.raises(UsageError, match=r"-n: .* measured without drawing"):
        imagekiln.evaluate(run, n=40)


# -- captions ---------------------------------------------------------------------------------------------------------


def test_batches_hold_captions_as_the_family_reads_them(photos: Path):
    wanted = made(photos)
    (family, train, held_out), dataset = begun(wanted)
    batch = augment.loader(wanted.data, train, 0, 8, "cpu").batch(0)
    indices = augment.loader(wanted.data, train, 0, 8, "cpu").order(0, 8).tolist()
    assert torch.equal(batch.text, family.read([dataset.train.captions[index] for index in indices]))
    assert torch.equal(held_out.read([0]).text, family.read([dataset.validation.captions[0]]))


def test_tags_change_with_the_position_and_with_nothing_else(photos: Path):
    wanted = made(photos, data={"tag_dropout": 0.5, "tag_shuffle": True})
    (family, train, _), _ = begun(wanted)
    loaders = [augment.loader(wanted.data, train, 7, size, "cpu") for size in (8, 4)]
    whole = loaders[0].batch(8).text
    assert torch.equal(whole, torch.cat([loaders[1].batch(8).text, loaders[1].batch(12).text]))
    texts = [family.text.tokenizer().decode(row, skip_special_tokens=True) for row in whole]
    assert all(text.split(",")[0].strip() in NAMES for text in texts), "the first part stays first"
    later = augment.loader(wanted.data, train, 7, 8, "cpu").batch(8 + 10 * len(train)).text
    assert not torch.equal(whole, later)


def test_wordings_change_in_training_and_not_when_looked_at(photos: Path):
    wanted = made(photos, data={"wordings": ["see: {caption}"], "word_dropout": 0.3, "tags_kept": 3})
    (family, train, held_out), dataset = begun(wanted)
    loader = augment.loader(wanted.data, train, 7, 64, "cpu")
    texts = [family.text.tokenizer().decode(row, skip_special_tokens=True) for row in loader.batch(0).text]
    whole = [train.captions[index] for index in loader.order(0, 64).tolist()]
    assert any(text.startswith("see") for text in texts) and not all(text.startswith("see") for text in texts)
    assert any(caption.split(",")[0] not in text for text, caption in zip(texts, whole, strict=True))
    assert torch.equal(loader.batch(0).text, augment.loader(wanted.data, train, 7, 64, "cpu").batch(0).text)
    assert torch.equal(held_out.read([0]).text, family.read([dataset.validation.captions[0]]))


def test_captions_that_are_cut_are_counted(photos: Path):
    def said(context: int) -> list[str]:
        family = TINY | {"text": TINY["text"] | {"context": context}}
        return inputs.text_remarks(begun(made(photos, family=family, data={"path": str(photos)}))[0].train)

    assert said(64) == [] and inputs.text_remarks(begun(made(photos, "diffusion", family=BLIND))[0].train) == []
    assert said(4) == ["85 of 85 captions are longer than this model reads; their ends are left out."]


def test_previews_are_asked_for_the_prompts_of_the_recipe(photos: Path, tmp_path: Path):
    prompts = ["red, tag1", "犬 <b>", "red, tag1", "blue " * 2000]
    train = {"total_kimg": 0.032, "batch": 8, "doctor": "off", "precision": "fp32"}
    wanted = made(photos, train=train | {"prompts": prompts})
    remarks = inputs.text_remarks(begun(wanted)[0].train, prompts)
    assert [remark[:25] for remark in remarks if "prompts" in remark] == ['train.prompts: "blue blue']
    run = imagekiln.train(wanted, data=photos, out=tmp_path / "named")
    sheets = [np.asarray(Image.open(file)) for _, file in run.samples()]
    height, width = 4 * 9 - 1, 8 * 9 - 1
    zoom = sheets[0].shape[0] // height
    margin = sheets[0].shape[1] - width * zoom
    titles = [sheet[:, :margin] for sheet in sheets]
    assert titles[0].min() < 128 and all(np.array_equal(one, titles[0]) for one in titles), "the same at every moment"
    rows = [sheets[-1][row * 9 * zoom : (row * 9 + 8) * zoom, margin:] for row in range(4)]
    assert np.array_equal(rows[0], rows[2]), "the same noise in every row"

    usual = imagekiln.train(made(photos), data=photos, out=tmp_path / "usual")
    kept = [open_weights(one) for one in (run, usual)]
    assert all(torch.equal(kept[0][name], value) for name, value in kept[1].items()), "what is learned is the same"


def open_weights(run: Run) -> dict[str, torch.Tensor]:
    return dict(models.open_model(run).family.state_dict())


def test_prompts_of_previews_are_refused_by_a_family_that_reads_no_text(photos: Path):
    with pytest.raises(RecipeError, match=r"train\.prompts: a diffusion model reads no text\. Leave them out\."):
        begun(made(photos, "diffusion", family=BLIND, train={"prompts": ["a cat"]}))
    with pytest.raises(RecipeError, match=r"train\.prompts"):
        made(photos, train={"prompts": ["a cat"] * 41})


def test_names_of_classes_are_captions_where_there_are_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("IMAGEKILN_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "classes"
    for index in range(20):
        folder = root / ("cat" if index % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (index, 100, 200)).save(folder / f"{index}.png")
    (_, train, _), dataset = begun(made(root))
    names = {"cat": 0, "dog": 1}
    assert [names[caption] for caption in train.captions] == dataset.train.labels_N.tolist()


def test_pictures_without_captions_are_refused_by_a_family_that_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("IMAGEKILN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "plain").mkdir()
    for index in range(20):
        Image.new("RGB", (8, 8), (index, 100, 200)).save(tmp_path / "plain" / f"{index}.png")
    with pytest.raises(UsageError, match="neither captions nor classes"):
        begun(made(tmp_path / "plain"))


def test_wishes_in_words_take_the_captions_in_turn(photos: Path):
    (family, train, _), dataset = begun(made(photos))
    captions = list(dict.fromkeys(dataset.train.captions))
    asked = inputs.in_words(family, train, [-1] * (len(captions) + 2))
    assert asked == [*captions, *captions[:2]]
    assert inputs.in_words(family, train, [5]) == [""], "nobody has this label"
    blind = recipe.build(made(photos, "diffusion", family=BLIND), (3, 8, 8), 0)
    assert inputs.in_words(blind, train, [-1, -1]) == [-1, -1]
    assert inputs.examples(blind, train) == []


def test_words_change_what_is_drawn_and_batches_do_not(photos: Path):
    family = begun(made(photos))[0].family.eval()
    torch.manual_seed(0)
    for parameter in family.denoiser.parameters():  # the output layer starts at zero
        torch.nn.init.normal_(parameter, std=0.2)
    options = family.config.sample.model_copy(update={"guidance": 1.5})
    red, blue = draw(family, [1], ["red"], options), draw(family, [1], ["blue"], options)
    assert not torch.equal(red, blue)
    both = draw(family, [1, 1], ["red", "blue"], options)
    assert (both.int() - torch.cat([red, blue]).int()).abs().max() <= 1
    unlike = options.model_copy(update={"negative_prompt": "blue"})
    assert not torch.equal(draw(family, [1], ["red"], unlike), red)
    assert torch.equal(draw(family, [1], [-1], options), draw(family, [1], [""], options))


def test_prompts_are_refused_where_they_mean_nothing(photos: Path, tmp_path: Path):
    blind = made(photos, "diffusion", family=BLIND)
    run = imagekiln.train(blind, data=photos, out=tmp_path / "blind")
    with pytest.raises(UsageError, match="reads no text"):
        imagekiln.generate(run, n=1, out=tmp_path / "p", prompt="a cat")
    with pytest.raises(UsageError, match="reads no text"):
        asked_for(models.open_model(Run.open(run.path)).family, ["a cat"])


def test_prompts_of_any_kind_are_drawn(photos: Path, tmp_path: Path):
    wanted = made(photos, data={"validation_fraction": 0.5})
    run = imagekiln.train(wanted, data=photos, out=tmp_path / "run")
    model = models.open_model(run)
    assert model.prompts and set(model.prompts) <= set(load(wanted.data).validation.captions)
    drawn = imagekiln.generate(run, n=4, out=tmp_path / "p", prompt=["red", "一只猫 " * 2000, "", "\x00\n"])
    assert len(drawn.pictures) == 4
    assert model.wishes(3) == [model.prompts[index % len(model.prompts)] for index in range(3)]
    with pytest.raises(UsageError, match="without labels"):
        imagekiln.generate(run, n=1, out=tmp_path / "q", label="red")
    rows = imagekiln.evaluate(run, n=20)
    assert {"kernel", "frechet"} & {row.metric for row in rows}
