"""From a name to a complete recipe: recipe file, family defaults and the user's settings laid over one another."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from imagekiln import optim
from imagekiln.config import FamilyConfig, OptimizerConfig, Recipe, merge, override, parse, read_toml
from imagekiln.core import Family
from imagekiln.engine import bases, published, registry
from imagekiln.engine.run import Run
from imagekiln.errors import RecipeError, did_you_mean

BEGINNING = "--from"
"""Stands in a recipe for the run that it goes on from."""

_folder = Path(str(resources.files("imagekiln.recipes")))


def names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in _folder.glob("*.toml"))


def is_recipe(name: str) -> bool:
    """Whether this is the name of a recipe or a recipe's file, and not a folder."""
    return name.endswith(".toml") or (name in names() and not Path(name).exists())


def meant(name: str) -> str:
    """The recipe or family of the package that this name spells, hyphens and underscores aside; others as they are.

    >>> meant("fewstep"), meant("style-gan-2"), meant("my/few_step.py")
    ('few-step', 'stylegan2', 'my/few_step.py')
    """
    known = [*names(), *registry.names()]
    return name if name in known else {_letters(one): one for one in reversed(known)}.get(_letters(name), name)


def _letters(name: str) -> str:
    return name.replace("-", "").replace("_", "")


def goes_on(name: str) -> bool:
    """Whether a recipe of the package says only what is different from a run that it goes on from (`train --from`)."""
    return "name" not in read_toml(_folder / f"{name}.toml").get("family", {})


def text(name: str) -> str:
    """A recipe file of the package, with its header.

    Raises:
        RecipeError: no such recipe.
    """
    name = meant(name)
    if name not in names():
        raise RecipeError(f"There is no recipe {name!r}. {did_you_mean(name, names())}")
    return (_folder / f"{name}.toml").read_text(encoding="utf-8")


def resolve(
    name: str,
    settings: Mapping[str, Any] | None = None,
    assignments: Sequence[str] = (),
    under: Mapping[str, Any] | None = None,
) -> Recipe:
    """A complete recipe from the name of a recipe, a recipe file, or a family.

    settings: values laid over the file, for example `{"data": {"path": "photos"}}`.
    assignments: `a.b=value` strings laid over everything. under: values that the file is laid over (`following`).

    Raises:
        RecipeError: the name is unknown, or a setting is; the sentence names the nearest known one.
    """
    name = meant(name)
    if not name and under:
        values = {}
    elif name in names():
        values = read_toml(_folder / f"{name}.toml")
    elif name.endswith(".toml"):
        values = read_toml(Path(name).expanduser())
    elif name in registry.names() or name.endswith(".py") or "." in name:
        values = {"family": {"name": name}}
    else:
        known = sorted({*names(), *registry.names()})
        raise RecipeError(f"There is no recipe or family {name!r}. {did_you_mean(name, known)}")
    if under:
        values = _laid_over(under, values)
    elif "name" not in _section(values.get("family", {}), "family") and "family" in values:
        raise RecipeError(f"The recipe {name!r} goes on from a trained model. Name its run with --from.")
    return complete(override(merge(values, settings or {}), assignments))


def _laid_over(under: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Raises `RecipeError` for another family, of which it would be a mixture."""
    before, own = under["family"]["name"], _section(values.get("family", {}), "family").get("name")
    if own is not None and registry.locate(own) != before:
        raise RecipeError(
            f"--from names a {before} run, and a {own} cannot begin with its weights. Leave out one of them."
        )
    merged = merge(under, values)
    for field in registry.load(before).companions:
        if merged["family"].get(field) == BEGINNING:
            merged["family"][field] = under["train"]["start"]
    return merged


def following(run: Run) -> dict[str, Any]:
    """What a run that begins with another's weights takes from it: settings of family and pictures, and its codec."""
    before = complete(read_toml(run.recipe_path))
    family, data = before.family.model_dump(mode="json"), before.data.model_dump(mode="json")
    if run.codec_path.is_file():
        data["codec"] = str(run.codec_path.absolute())
    for field in registry.load(before.family.name).companions:
        family.pop(field)  # a recipe says anew whom it learns from
    return {"family": family, "data": data, "train": {"start": str(run.path.absolute())}}


def complete(values: Mapping[str, Any]) -> Recipe:
    """Validate plain values and fill in every default, the family's own included."""
    family_values = values.get("family")
    if not isinstance(family_values, Mapping) or not isinstance(family_values.get("name"), str):
        raise RecipeError("family.name: this setting is missing. It names what to train.")
    located = registry.locate(family_values["name"])
    kind = registry.load(located)
    family: FamilyConfig = parse(kind.Config, {**family_values, "name": located}, "family")
    given = _section(values.get("optim", {}), "optim")
    unknown = [key for key in given if key not in kind.optimizers]
    if unknown:
        raise RecipeError(f"optim.{unknown[0]}: no such optimizer. {did_you_mean(unknown[0], kind.optimizers)}")
    optim: dict[str, OptimizerConfig] = {
        key: parse(OptimizerConfig, merge(default, _section(given.get(key, {}), f"optim.{key}")), f"optim.{key}")
        for key, default in kind.optimizers.items()
    }
    rest = {key: value for key, value in values.items() if key not in ("family", "optim")}
    if kind.train_defaults and isinstance(rest.get("train", {}), Mapping):
        rest["train"] = merge(kind.train_defaults, rest.get("train", {}))
    return parse(Recipe, {**rest, "family": family, "optim": optim}, "")


def founded(recipe: Recipe) -> Recipe:
    """The recipe of a family that learns from pretrained weights, with the full paths of their folders, and with the
    autoencoder of its foundation as codec; any other recipe as it is. Raises what `bases.folder` and
    `published.require_scales` raise."""
    kind = registry.load(recipe.family.name)
    if (text := frozen_text(recipe)) and Path(text).expanduser().is_dir():
        family = _replaced(recipe.family, kind.frozen_text, str(Path(text).expanduser().absolute()))
        recipe = recipe.model_copy(update={"family": family})
    field = kind.foundation
    folder = bases.folder(getattr(recipe.family, field) if field else "")
    if folder is None:
        return recipe
    family = _replaced(recipe.family, field, str(folder))
    if recipe.data.codec:
        published.require_scales(recipe.data.codec, str(folder))
    codec = recipe.data.codec or (str(folder) if published.folder_of(str(folder)) else "")
    return recipe.model_copy(update={"family": family, "data": recipe.data.model_copy(update={"codec": codec})})


def frozen_text(recipe: Recipe) -> str:
    """The folder of the pretrained text encoder that a recipe names, "" where it names none."""
    field = registry.load(recipe.family.name).frozen_text
    named: str = operator.attrgetter(field)(recipe.family) if field else ""
    return named


def _replaced(section: Any, field: str, value: str) -> Any:
    """A section with another value of a setting, such as "text.base"."""
    name, _, rest = field.partition(".")
    return section.model_copy(update={name: _replaced(getattr(section, name), rest, value) if rest else value})


def remarks(recipe: Recipe) -> list[str]:
    """Sentences about settings that work together, but are seldom meant.

    >>> from imagekiln.config import OptimizerConfig, LangevinConfig
    >>> hot = OptimizerConfig(langevin=LangevinConfig(temperature=1, schedule="cosine"))
    >>> recipe = resolve("vae").model_copy(update={"optim": {"encoder": hot}})
    >>> [sentence[:40] for sentence in remarks(recipe)]
    ['optim.encoder.langevin: The learning rat']
    """
    train, found = recipe.train, []
    for key, one in recipe.optim.items():
        if not one.langevin.temperature:
            continue
        rate = functools.partial(
            optim.multiplier, train.schedule, warmup_fraction=train.warmup_fraction, end_ratio=train.end_lr_ratio
        )
        if sentence := optim.anneals_twice(optim.schedule(one.langevin.schedule), rate):
            found.append(f"optim.{key}.langevin: {sentence}")
    told, changes = getattr(recipe.family, "augment_condition", None), recipe.data.augment.changes
    if told and not changes:
        found.append("family.augment_condition: data.augment changes nothing, so there is nothing to tell.")
    if told is False and changes:
        found.append("data.augment: drawn pictures will show these changes; set family.augment_condition = true.")
    return found


def _section(value: Any, key: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RecipeError(f"{key} = {value!r}: expected settings, such as --set {key}.name=value.")
    return value


def json_schema(name: str) -> dict[str, Any]:
    """JSON Schema of the recipes of a family, its own settings and optimizers included."""
    recipe = resolve(name)
    schema = Recipe.model_json_schema()
    family = type(recipe.family).model_json_schema()
    definitions = family.pop("$defs", {})
    schema["$defs"] |= definitions
    schema["properties"]["family"] = family
    optimizer = schema["properties"]["optim"]["additionalProperties"]
    schema["properties"]["optim"] = {
        "type": "object",
        "properties": dict.fromkeys(recipe.optim, optimizer),
        "additionalProperties": False,
    }
    return schema


def build(recipe: Recipe, image_shape: tuple[int, int, int], num_classes: int) -> Family:
    """The family of a recipe with freshly initialised networks (from torch's global generator).

    Raises:
        RecipeError: the family cannot be built for pictures of this shape, or its phases and optimizers disagree.
    """
    family = registry.load(recipe.family.name)(recipe.family, image_shape, num_classes)
    needed = {phase.optimizer for phase in family.phases}
    if not needed <= set(recipe.optim):  # a phase that settings switch off leaves its optimizer over
        raise RecipeError(
            f"family {recipe.family.name!r} trains {sorted(needed)} but sets up optimizers {sorted(recipe.optim)}."
        )
    return family


def header(name: str) -> str:
    """The comment at the top of a recipe file: command, hardware, time, what to expect."""
    lines = text(name).splitlines()
    return "\n".join(line.lstrip("# ") for line in lines[: next(i for i, x in enumerate(lines) if x[:1] != "#")])


def parameter_counts(family: Family) -> dict[str, int]:
    """Trainable parameters by sub-module."""
    return {name: sum(p.numel() for p in child.parameters()) for name, child in family.named_children()}
