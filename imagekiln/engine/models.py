"""Trained models as files: weights with their recipe inside, opened with everything that drawing needs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from imagekiln.config import DataConfig, Recipe
from imagekiln.core import Family, Source
from imagekiln.data import Dataset
from imagekiln.data.phrasebook import Phrasebook
from imagekiln.engine import device as devices
from imagekiln.engine import published
from imagekiln.engine import recipe as recipes
from imagekiln.engine.codec import Codec, Coder
from imagekiln.engine.generate import Wish
from imagekiln.engine.run import Run
from imagekiln.engine.tensors import write_tensors
from imagekiln.errors import UsageError, did_you_mean


@dataclass
class Model:
    """A trained family, ready to draw."""

    family: Family
    recipe: Recipe
    class_names: tuple[str, ...]
    weights: Path
    device: torch.device
    prompts: tuple[str, ...] = ()
    """A few captions of held-out pictures; empty for a model that reads no text."""
    phrasebook: Phrasebook | None = None
    """The captions of training, where `data.phrasebook` keeps them."""

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """The autocast context the model was trained in, as far as this device has it."""
        dtype = devices.autocast_dtype(self.recipe.train.precision, self.device)
        return contextlib.nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    def label(self, name: str) -> int:
        """The number of a class given by name or number.

        Raises:
            UsageError: the model knows no classes, or not this one.
        """
        if not self.class_names:
            raise UsageError(f"--label {name!r}: this model was trained without labels. Leave --label out.")
        if name in self.class_names:
            return self.class_names.index(name)
        if name.isdecimal() and int(name) < len(self.class_names):
            return int(name)
        raise UsageError(f"--label {name!r}: no such class. {did_you_mean(name, self.class_names)}")

    def understood(self, prompt: str) -> str:
        """A prompt in words that the model knows: by the phrasebook, or as it stands where that says nothing."""
        return (self.phrasebook and self.phrasebook.say(prompt)) or prompt

    def wishes(self, count: int, label: str | None = None, prompts: Sequence[str] = ()) -> list[Wish]:
        """What `count` pictures should show: one class, or the prompts in turn, as they stand; without either all
        classes in turn, or captions of the pictures that were held out.

        Raises:
            UsageError: the model knows no such class, or reads no text.
        """
        reads = self.family.read([""]) is not None
        if prompts and not reads:
            raise UsageError(f"--prompt {prompts[0]!r}: this model reads no text. Leave --prompt out.")
        if prompts and label is not None:
            raise UsageError("--label and --prompt say the same thing twice. Give one of them.")
        if not reads:
            classes = max(1, self.family.num_classes)
            return [self.label(label)] * count if label is not None else [index % classes for index in range(count)]
        if label is not None:
            prompts = [self.class_names[self.label(label)]]
        prompts = prompts or self.prompts or [""]
        return [prompts[index % len(prompts)] for index in range(count)]

    def cut(self, wishes: Sequence[Wish], options: Any) -> list[str]:
        """Of these wishes and the negative prompt the texts whose end the model does not read; captions that it offers
        by itself are no news."""
        asked = [wish for wish in wishes if isinstance(wish, str) and wish not in self.prompts]
        asked.append(getattr(options, "negative_prompt", ""))
        return [one for one in dict.fromkeys(asked) if self.family.cuts(one)]


def save_weights(path: Path, family: Family, recipe: Recipe, source: Source, prompts: Sequence[str] = ()) -> None:
    """Write the averaged modules with everything needed to use them in the file's own metadata."""
    prefixes = tuple(f"{name}." for name in family.averaged)
    tensors = {k: v for k, v in family.state_dict().items() if k.startswith(prefixes)}
    metadata = {
        "format": "imagekiln",
        "recipe": json.dumps(recipe.model_dump(mode="json")),
        "image_shape": json.dumps(list(family.image_shape)),
        "class_names": json.dumps(list(source.class_names)),
        "num_classes": str(family.num_classes),
        "prompts": json.dumps(list(prompts)),
    }
    if recipe.data.phrasebook:
        captions = getattr(source, "captions", None) or []
        metadata["captions"] = json.dumps(list(dict.fromkeys(captions)), ensure_ascii=False)
    write_tensors(path, tensors, metadata)


def load_model(path: Path, device: str = "auto") -> Model:
    """A model from a weights file.

    Raises:
        UsageError: the file is not one of ours, or its family is not here.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
        recipe = recipes.complete(json.loads(metadata["recipe"]))
        shape = json.loads(metadata["image_shape"])
        family = recipes.build(recipe, tuple(shape), int(metadata["num_classes"]))
        missing = family.load_state_dict(tensors, strict=False)
        if missing.unexpected_keys:
            raise KeyError(missing.unexpected_keys[0])
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise UsageError(f"{path} is not a weights file of this version of imagekiln ({error}).") from error
    chosen = devices.choose(device)
    family = devices.place(family, chosen).eval().requires_grad_(False)
    if recipe.data.codec:
        family.codec = codec_of(Run.of_weights(path))
        if family.codec is None:
            raise UsageError(f"{path} draws latents, and the codec that should lie beside its folder is missing.")
    prompts = tuple(json.loads(metadata.get("prompts", "[]")))
    phrasebook = phrasebook_of(json.loads(metadata["captions"]), recipe.data) if "captions" in metadata else None
    return Model(family, recipe, tuple(json.loads(metadata["class_names"])), path, chosen, prompts, phrasebook)


def phrasebook_of(captions: Sequence[str], data: DataConfig) -> Phrasebook:
    """Of captions that were learned from with these settings: it says as much of one as training always showed."""
    return Phrasebook(captions, max(1, data.tags_kept)) if data.tag_dropout else Phrasebook(captions)


def hash_of(path: Path) -> str:
    """sha256 of a weights file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_model(run: Run, nimg: int | None = None, average: str | None = None, device: str = "auto") -> Model:
    """The model of a run: its best moment and first average unless told otherwise."""
    return load_model(run.weights(nimg, average), device)


def guide_by(model: Model, path: str | Path | None, options: Any) -> None:
    """Let a weaker model guide what this one draws: autoguidance (Karras et al. 2024, arXiv:2406.02507).

    path: of the weaker one's run, or of a weights file such as an early one of this run; None = of none. options: how
    pictures are drawn.

    Raises:
        UsageError: the two are not of one family, or do not draw the same kind of pictures; the options say not to.
    """
    if path is None:
        return
    where = f"--guide {path}"
    file = Path(path).expanduser()
    other = load_model(file if file.is_file() else Run.open(file).weights(), str(model.device)).family
    family = model.family
    if not family.guidable or type(other) is not type(family):
        raise UsageError(
            f"{where} holds a model of the family {other.config.name}, and this one is of {family.config.name}. A "
            "diffusion model is guided by another of its family: a smaller one, or one that trained for less."
        )
    words = [*model.prompts, ""]
    read, others = family.read(words), other.read(words)
    alike = [_drawn(family) == _drawn(other), (read is None) == (others is None)]
    if not all(alike) or (read is not None and others is not None and not torch.equal(read, others)):
        raise UsageError(
            f"{where} was trained on other pictures, classes, captions or latents. Give a model of the same data."
        )
    if options.guidance == 1:
        raise UsageError(f"{where}: a guidance of 1 is none. Give --guidance, for example 2.")
    family.guide = other


def draw_as(model: Model, shape: str | None) -> None:
    """Let a model draw pictures of another shape. shape: height and width in pixels, such as "96x64"; None = its own.

    Raises:
        UsageError: it is not written so, or the model does not take that shape.
    """
    if shape is None:
        return
    family, where = model.family, f"--shape {shape}"
    if not re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,4}", shape):
        raise UsageError(f"{where}: expected height and width in pixels, such as 96x64.")
    height, width = map(int, shape.split("x"))
    factor = family.picture_shape[1] // family.image_shape[1]
    if height % factor or width % factor:
        raise UsageError(f"{where}: the latents of this model stand for {factor}x{factor} pixels. Give multiples.")
    if not family.fits(height // factor, width // factor):
        own = "x".join(map(str, family.picture_shape[1:]))
        raise UsageError(
            f"{where}: this {family.config.name} model of {own} pixels cannot draw that. Leave --shape out."
        )
    for one in (family, family.guide):
        if one is not None:
            one.image_shape = one.image_shape[0], height // factor, width // factor
    if family.codec is not None:
        family.codec.image_shape = family.codec.image_shape[0], height, width


def _drawn(family: Family) -> tuple[Any, ...]:
    """What two models must have in common to answer the same question."""
    codec: Any = family.codec
    return family.image_shape, family.num_classes, codec and (codec.fingerprint, codec.shift, codec.scale)


# -- codecs -----------------------------------------------------------------------------------------------------------


def named_codec(data: DataConfig, dataset: Dataset, run: Run | None = None) -> Codec | None:
    """The codec that a recipe's data section names; the run's own copy where it has one; None where there is none.

    Raises:
        UsageError: it is not there, is no autoencoder, or was made for other pictures.
    """
    if not data.codec:
        return None
    codec = codec_of(run) if run is not None else None
    if codec is None and (folder := published.folder_of(data.codec)) is not None:
        codec = published.opened(folder, dataset.train.image_shape)
    codec = codec or _open_codec(data.codec)
    if dataset.train.image_shape != codec.image_shape:
        raise UsageError(
            f"data.codec = {data.codec!r} encodes pictures of {codec.image_shape} and {data.path} holds "
            f"{dataset.train.image_shape} (channels, height, width). Prepare pictures of that shape, or train another "
            "autoencoder."
        )
    return codec


def _open_codec(path: str) -> Codec:
    weights = Path(path).expanduser()
    if weights.suffix != ".safetensors":
        try:
            weights = Run.open(weights).weights()
        except UsageError as error:
            raise UsageError(f"data.codec: {error}") from None
    return _load_codec(weights, f"data.codec = {path!r}")


def _load_codec(weights: Path, where: str) -> Codec:
    try:
        codec = published.reopened(weights)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{where} cannot be read ({error}). Name the run of an autoencoder.") from None
    if codec is not None:
        return codec
    model = load_model(weights)
    if not isinstance(model.family, Coder):
        raise UsageError(
            f"{where} holds a {model.family.config.name}, which cannot encode pictures. Train an autoencoder first."
        )
    return Codec(model, weights.read_bytes())


def codec_of(run: Run) -> Codec | None:
    """The codec that a run keeps, or None."""
    if not run.codec_path.is_file() or not run.codec_scales_path.is_file():
        return None
    codec = _load_codec(run.codec_path, str(run.codec_path))
    scales = json.loads(run.codec_scales_path.read_text(encoding="utf-8"))
    codec.shift, codec.scale = float(scales["shift"]), float(scales["scale"])
    return codec
