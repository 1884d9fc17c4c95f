"""What a family learns from: pictures or a codec's latents, with captions as the family reads them, and other models.

A family sees batches and knows nothing of where they come from. `begin` builds it and puts the two sources in front of
it: `Latents` where the recipe names a codec (`imagekiln.engine.codec`), `Told` where the family reads text.

Shapes: N pictures, B of them in a batch; X a row of text as the family takes it.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from imagekiln.config import DataConfig, Recipe
from imagekiln.core import UNLABELLED, Batch, Family, Source, mix
from imagekiln.data import Dataset
from imagekiln.data.captions import reworded, varied
from imagekiln.data.phrasebook import MOST_SIGNS
from imagekiln.engine import device as devices
from imagekiln.engine import recipe as recipes
from imagekiln.engine import registry
from imagekiln.engine.codec import Codec, Coder, Latents, latents
from imagekiln.engine.generate import Wish, read
from imagekiln.engine.models import Model, hash_of, named_codec, open_model
from imagekiln.engine.run import Run
from imagekiln.errors import RecipeError, UsageError
from imagekiln.nets import frozen_text, pretrained

LOOKED_AT = 1000
"""Different captions that are measured before a training."""


class Begun(NamedTuple):
    """A family with freshly initialised networks, and the two sources it learns from."""

    family: Family
    train: Source
    held_out: Source


def begin(
    recipe: Recipe, dataset: Dataset, run: Run | None = None, *, rehearsal: bool = False, codec: Codec | None = None
) -> Begun:
    """What a training starts with, a function of (recipe, data) alone.

    run: an earlier start of the same run, which keeps its own copy of the codec. rehearsal: latents are not made; all
    are those of a grey picture. codec: stands in for the one that the recipe names.

    Raises:
        RecipeError: family, pictures and recipe do not fit. UsageError: another run that the recipe names is not there,
        or a family that reads text finds neither captions nor classes.
    """
    if recipe.data.codec and not registry.load(recipe.family.name).latents:
        raise RecipeError(
            f"data.codec: a {recipe.family.name} model draws between -1 and 1, and latents lie outside. Leave it out, "
            "or train a diffusion model."
        )
    codec = codec or named_codec(recipe.data, dataset, run)
    train: Any = dataset.train
    held_out: Any = dataset.validation
    shaped = train.shaped() if recipe.data.buckets else None
    if shaped is not None and not rehearsal:
        train = shaped
    if codec is not None:  # the training set's come first: its scales are those of both
        made = _unmade if rehearsal else latents
        kept = not recipe.data.augment.changes  # else mirrored and changed ones are encoded as they come
        train, held_out = made(codec, train, recipe.data.flip and kept), made(codec, held_out)
    torch.manual_seed(mix(recipe.train.seed, "initialisation"))
    family = recipes.build(recipe, train.image_shape, train.num_classes)
    family.codec = codec
    if shaped is not None:
        _require_shapes(family, shaped.shapes_N2)
    for field in family.companions:
        if path := getattr(recipe.family, field):
            family.companion[field] = _companion(family, field, path, recipe.train.device)
    captions = captions_of(train)
    wordings = recipe.data.wordings
    family.study([reworded(caption, 0, place, wordings=wordings) for place, caption in enumerate(captions or [])])
    if recipe.train.start and run is None:
        _begin_with(family, recipe.train.start)
    if family.read([""]) is None:
        if recipe.data.phrasebook:
            raise RecipeError(f"data.phrasebook: a {recipe.family.name} model reads no text. Leave it out.")
        if recipe.train.prompts:
            raise RecipeError(f"train.prompts: a {recipe.family.name} model reads no text. Leave them out.")
        return Begun(family, train, held_out)
    if captions is None:
        raise UsageError(
            f"A {recipe.family.name} model learns from captions, and {recipe.data.path} has neither captions nor "
            "classes. Add a metadata.csv with the columns file_name and text, or one folder a class."
        )
    if recipe.data.phrasebook:
        _require_few(captions)
    return Begun(family, *(Told(source, family, recipe.data) for source in (train, held_out)))


def untrained_codec(recipe: Recipe, dataset: Dataset) -> Codec:
    """The codec that a training of `recipe` will make, before it has learned anything: for rehearsals.

    Raises:
        RecipeError, UsageError: that training could not begin, or it makes no codec.
    """
    family = begin(recipe, dataset, rehearsal=True).family
    if not isinstance(family, Coder):
        raise UsageError(f"data.codec: a {family.config.name} model encodes nothing. Name a recipe of an autoencoder.")
    model = Model(family, recipe, dataset.train.class_names, Path(), torch.device("cpu"))
    return Codec(model, b"", shift=0.0, scale=1.0)


def _unmade(codec: Codec, source: Source, mirrored: bool = False) -> Latents:
    """Latents of the right number and shape, at no cost."""
    one_1CHW = codec.raw(torch.zeros(1, *source.image_shape)).cpu().numpy()
    return Latents(source, np.broadcast_to(one_1CHW, (len(source) * (1 + mirrored), *one_1CHW.shape[1:])), codec)


def _require_few(captions: Sequence[str]) -> None:
    """Raises `RecipeError` where there are more captions than a model should keep."""
    if (signs := sum(map(len, dict.fromkeys(captions)))) > MOST_SIGNS:
        raise RecipeError(
            f"data.phrasebook: the captions have {signs:,} characters, and a model keeps {MOST_SIGNS:,} at most. "
            "Leave it out: from so many captions a text encoder learns other wordings by itself."
        )


def _require_shapes(family: Family, shapes_N2: np.ndarray) -> None:
    """Raises `RecipeError` where the family cannot learn all shapes of the training pictures."""
    factor = family.picture_shape[1] // family.image_shape[1]
    for height, width in np.unique(shapes_N2, axis=0).tolist():
        if height % factor or width % factor or not family.fits(height // factor, width // factor):
            raise RecipeError(
                f"data.buckets: there are pictures of {height}x{width}, and this {family.config.name} model cannot "
                "learn them. Leave it out, or train a model with a U-Net."
            )


def _begin_with(family: Family, path: str) -> None:
    """The weights that another run draws with, in the place of fresh ones.

    Raises:
        RecipeError: that run is not there, or its networks are of another kind or size.
    """
    where, before = f"train.start = {path!r}", _model("train.start", path).family
    if type(before) is not type(family):
        raise RecipeError(f"{where} holds a {before.config.name}, and this run trains a {family.config.name}.")
    for name in family.averaged:
        try:
            family.get_submodule(name).load_state_dict(before.get_submodule(name).state_dict())
        except RuntimeError:
            raise RecipeError(
                f"{where}: the weights of its {name} do not fit, because pictures, classes or settings of the family "
                "differ. Leave out what changes them, or train from fresh weights."
            ) from None


def companion_hashes(recipe: Recipe) -> dict[str, str]:
    """Hashes of the weights that a training needs beside its own, by setting: other runs', and published ones.

    Raises:
        RecipeError: a run or a file is not there.
    """
    kind = registry.load(recipe.family.name)
    found = {}
    for field in kind.companions:
        if path := getattr(recipe.family, field):
            file = _published(kind, field, path)
            found[f"family.{field}"] = hash_of(file or _model(f"family.{field}", path).weights)
    if recipe.train.start:
        found["train.start"] = hash_of(_model("train.start", recipe.train.start).weights)
    if kind.foundation:
        found[f"family.{kind.foundation}"] = pretrained.fingerprint(getattr(recipe.family, kind.foundation))
    if text := recipes.frozen_text(recipe):
        found[f"family.{kind.frozen_text}"] = frozen_text.fingerprint(text)
    return found


def _companion(family: Family, field: str, path: str, device: str) -> Any:
    """The frozen model that a field of the family names, on a device. Raises `RecipeError` where there is none."""
    file = _published(type(family), field, path)
    if file is None:
        return _model(f"family.{field}", path, device).family
    try:
        network = family.published[field](file, family.image_shape)
    except UsageError as error:
        raise RecipeError(f"family.{field}: {error}") from None
    return devices.place(network, devices.choose(device)).eval().requires_grad_(False)


def _published(kind: type[Family], field: str, path: str) -> Path | None:
    """The file of a published network that a field names; None where it names a run."""
    file = Path(path).expanduser()
    if field not in kind.published or file.is_dir():
        return None
    if not file.is_file():
        raise RecipeError(f"family.{field} = {path!r} does not exist. Name a run folder or a .safetensors file.")
    return file


def _model(setting: str, path: str, device: str = "auto") -> Model:
    try:
        return open_model(Run.open(path), device=device)
    except UsageError as error:
        raise RecipeError(f"{setting}: {error}") from None


def pictures_of(source: Any) -> Any:
    """The source of the pictures themselves, where `source` gives latents or adds text."""
    source = source.source if isinstance(source, Told) else source
    return source.pictures if isinstance(source, Latents) else source


# -- text -------------------------------------------------------------------------------------------------------------


def captions_of(source: Any) -> list[str] | None:
    """What is said about every picture: its caption, else the name of its class, else ""; None for a set without."""
    told, labels = getattr(source, "captions", None), getattr(source, "labels_N", None)
    if told is None and labels is None:
        return None
    captions = list(told) if told is not None else [""] * len(source)
    if labels is None:
        return captions
    names = source.class_names
    return [
        caption or ("" if label == UNLABELLED else names[label])
        for caption, label in zip(captions, labels.tolist(), strict=True)
    ]


class Told:
    """A source whose batches hold captions as a family reads them; equal captions are read once."""

    def __init__(self, source: Any, family: Family, data: DataConfig) -> None:
        self.source, self.family, self.data = source, family, data
        self.image_shape, self.num_classes = source.image_shape, source.num_classes
        self.class_names, self.fingerprint = source.class_names, source.fingerprint
        self.labels_N = getattr(source, "labels_N", None)
        self.captions: Sequence[str] = captions_of(source) or [""] * len(source)
        places: dict[str, int] = {}
        self._row_N = np.array([places.setdefault(caption, len(places)) for caption in self.captions], np.int64)
        self.different = list(places)

    @functools.cached_property
    def _text_UX(self) -> Tensor:
        """Every different caption, read when the first one is asked for: by then a checkpoint's vocabulary is back."""
        return read(self.family, self.different)

    @functools.cached_property
    def choices(self) -> dict[int, list[str]]:
        """Different captions by label, those of all pictures under `UNLABELLED`."""
        return _choices(self)

    def __len__(self) -> int:
        return len(self.source)

    def read(self, indices: Sequence[int]) -> Batch:
        """The pictures at these indices with their captions as they stand."""
        chosen = torch.from_numpy(self._row_N[np.asarray(indices, np.int64)])
        return self.source.read(indices)._replace(text=self._text_UX[chosen])

    def text(self, indices: Sequence[int], seed: int, position: int) -> Tensor:
        """Captions of a batch that starts at `position` of a run, in the wordings that the recipe asks for."""
        data = self.data
        changes = (data.tag_dropout, data.tag_shuffle, data.word_dropout, data.wordings, data.fillers)
        if not any(changes):
            return self._text_UX[torch.from_numpy(self._row_N[np.asarray(indices, np.int64)])]
        return read(self.family, [self.worded(self.captions[i], seed, position + at) for at, i in enumerate(indices)])

    def worded(self, caption: str, seed: int, position: int) -> str:
        """A caption as it is told at one position of a run."""
        data = self.data
        dropout, shuffle, keep = data.tag_dropout, data.tag_shuffle, data.tags_kept
        told = varied(caption, seed, position, dropout=dropout, shuffle=shuffle, keep=keep)
        words = {"dropout": data.word_dropout, "fillers": data.fillers}
        return reworded(told, seed, position, wordings=data.wordings, **words)


def text_remarks(source: Source, prompts: Sequence[str] = ()) -> list[str]:
    """Sentences about captions as a training will show them, of the first different ones, so that it takes no time; and
    about prompts of previews."""
    if not isinstance(source, Told):
        return []
    long = [f'"{prompt[:60]}"' for prompt in prompts if source.family.cuts(prompt)]
    remarks = [f"train.prompts: {one} is longer than this model reads; its end is left out." for one in long]
    looked = source.different[:LOOKED_AT]
    cut = sum(source.family.cuts(source.worded(caption, 0, place)) for place, caption in enumerate(looked))
    if cut:
        remarks.append(
            f"{cut:,} of {len(looked):,} captions are longer than this model reads; their ends are left out."
        )
    return remarks


def wishes(source: Any, rows: Sequence[int]) -> list[Wish]:
    """What to ask for to get pictures such as those in these rows of a source that a family learns from."""
    if isinstance(source, Told):
        return [source.captions[row] for row in rows]
    labels = getattr(source, "labels_N", None)
    return [UNLABELLED] * len(rows) if labels is None else [int(labels[row]) for row in rows]


def examples(family: Family, source: Any, count: int = 16) -> list[str]:
    """Captions that show what a model can be asked for; none for a family that reads no text."""
    return [wish for wish in in_words(family, source, [UNLABELLED] * count) if isinstance(wish, str)]


def in_words(family: Family, source: Any, labels: Sequence[int]) -> list[Wish]:
    """The same wishes as a family takes them: one that reads text is given captions of pictures with these labels.

    source: whose captions these are; the k-th wish for a label is the k-th different caption of that label, and again
    the first when there are no more. A label of -1 stands for any picture.
    """
    if family.read([""]) is None:
        return list(labels)
    choices = source.choices if isinstance(source, Told) else _choices(source)
    asked = Counter[int]()
    wanted: list[Wish] = []
    for label in labels:
        some = choices.get(label) or [""]
        wanted.append(some[asked[label] % len(some)])
        asked[label] += 1
    return wanted


def _choices(source: Any) -> dict[int, list[str]]:
    captions, labels_N = captions_of(source) or [], getattr(source, "labels_N", None)
    labels = [UNLABELLED] * len(captions) if labels_N is None else labels_N.tolist()
    told: dict[int, dict[str, None]] = {UNLABELLED: {}}
    for caption, label in zip(captions, labels, strict=True):
        if caption:
            told[UNLABELLED][caption] = None
            told.setdefault(label, {})[caption] = None
    return {label: list(some) for label, some in told.items()}
