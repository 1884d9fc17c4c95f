"""From names to families and recipes."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from imagekiln.config import write_toml
from imagekiln.core import Family
from imagekiln.engine import recipe as recipes
from imagekiln.engine import registry
from imagekiln.errors import RecipeError


@pytest.mark.parametrize("name", registry.names())
def test_a_file_is_a_family(name: str) -> None:
    kind = registry.load(name)
    assert issubclass(kind, Family) and kind.__mro__[1] is Family, "no family inherits from another"
    assert registry.describe(name).endswith((".", ";")) and kind.Config().name == name
    assert registry.locate(name) == name


@pytest.mark.parametrize("name", ["", "vea", "..", "os.path", "vae.py", "/etc/passwd", "imagekiln.core", "a b"])
def test_names_that_are_no_family(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError):
        registry.load(name)


def test_a_near_name_is_suggested() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'vae'"):
        recipes.resolve("vea")


def test_a_name_may_be_spelt_with_other_hyphens() -> None:
    assert recipes.resolve("emoji_text") == recipes.resolve("emoji-text")
    assert recipes.resolve("r3-gan") == recipes.resolve("r3gan")
    known = [*recipes.names(), *registry.names()]
    assert [recipes.meant(name) for name in known] == known


def test_a_file_that_fails_can_be_mended_and_loaded_again(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("1 / 0")
    with pytest.raises(RecipeError, match="ZeroDivisionError"):
        registry.load(str(file))
    file.write_text("from imagekiln.core import Family\nclass Mine(Family): pass\n")
    assert registry.load(str(file)).__name__ == "Mine"


WHOLE = [name for name in recipes.names() if not recipes.goes_on(name)]


@pytest.mark.parametrize("name", [*WHOLE, *registry.names()])
def test_a_complete_recipe_is_complete(name: str) -> None:
    recipe = recipes.resolve(name)
    assert recipes.complete(tomllib.loads(write_toml(recipe))) == recipe
    assert set(recipe.optim) == set(registry.load(recipe.family.name).optimizers)


@pytest.mark.parametrize("name", registry.names())
def test_the_schema_knows_the_familys_own_settings(name: str) -> None:
    schema = recipes.json_schema(name)
    assert set(registry.load(name).Config.model_fields) <= set(schema["properties"]["family"]["properties"])
    assert json.loads(json.dumps(schema)) == schema


def test_settings_lie_over_the_file_and_assignments_over_all() -> None:
    recipe = recipes.resolve("vae", {"train": {"batch": 5, "seed": 7}}, ["train.batch=6"])
    assert (recipe.train.batch, recipe.train.seed) == (6, 7)


@pytest.mark.parametrize("values", [{}, {"family": 3}, {"family": {"name": 3}}, {"family": {}}, {"optim": {"a": 1}}])
def test_values_that_are_no_recipe(values: dict) -> None:
    with pytest.raises(RecipeError):
        recipes.complete(values)
