"""What every shipped recipe must keep: on pictures that it is for, its training can begin."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagekiln import api
from imagekiln.config import Recipe
from imagekiln.engine import recipe as recipes
from imagekiln.engine import registry
from imagekiln.errors import UsageError

WHOLE = [name for name in recipes.names() if not recipes.goes_on(name)]
"""Without those that only say how to go on from a run."""
NEEDS_WEIGHTS = [name for name in WHOLE if registry.load(recipes.resolve(name).family.name).foundation]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with captions and classes, enough of them for every recipe."""
    folder = tmp_path_factory.mktemp("recipes") / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = ["file_name,text,label"]
    for index in range(24):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{index:02d}.png")
        rows.append(f"{index:02d}.png,picture {index},{('cat', 'dog')[index % 2]}")
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.mark.parametrize("name", [name for name in WHOLE if name not in NEEDS_WEIGHTS])
def test_a_recipe_can_begin(name: str, photos: Path) -> None:
    planned = api.dry_run(name, photos)
    assert planned.parameters and isinstance(planned.recipe, Recipe)
    assert set(planned.recipe.optim) == set(registry.load(planned.recipe.family.name).optimizers)
    codec = planned.recipe.data.codec
    assert not codec or any(codec in notice for notice in planned.notices), "the autoencoder is trained on the way"


@pytest.mark.parametrize("name", NEEDS_WEIGHTS)
def test_a_recipe_says_which_weights_it_needs(name: str, photos: Path) -> None:
    with pytest.raises(UsageError, match="pretrained"):
        api.dry_run(name, photos)
