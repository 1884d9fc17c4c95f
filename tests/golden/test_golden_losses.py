"""Twenty losses of each family on a fixed batch from a fixed seed: arithmetic that changes is noticed, and read.

`make golden` (IMAGEKILN_REWRITE_GOLDEN=1) rewrites the numbers; the diff is the review. Kernels differ a little between
machines, therefore the tolerance. In some games of two networks that little grows within twenty steps: a file says how
many of its numbers are compared, and rewriting keeps that.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from imagekiln.config import Recipe
from imagekiln.core import Batch
from imagekiln.engine import recipe as recipes
from imagekiln.engine import registry
from imagekiln.engine.run import Run
from imagekiln.engine.tracker import Silent
from imagekiln.engine.trainer import Trainer

FOLDER = Path(__file__).parent
REWRITE = os.environ.get("IMAGEKILN_REWRITE_GOLDEN") == "1"
STEPS, TOLERANCE = 20, 1e-4
SMALL = {"width": 8, "z_dim": 8, "widths": [16, 16], "attention": [False, True]}


class Ramps:
    """Eight pictures of 16 x 16 made by arithmetic alone, in three classes."""

    image_shape, num_classes, class_names, fingerprint = (3, 16, 16), 3, ("a", "b", "c"), "ramps"

    def __len__(self) -> int:
        return 8

    def read(self, indices):
        rows = torch.arange(3 * 16 * 16).view(3, 16, 16)
        images = torch.stack([(rows * (index + 3) // 7) % 256 for index in indices]).to(torch.uint8)
        return Batch(images, torch.tensor([index % 3 for index in indices]))


def losses(name: str, folder: Path) -> list[float]:
    """The sum of the phases' losses at every step."""
    fields = registry.load(name).Config.model_fields
    family = {key: value for key, value in SMALL.items() if key in fields}
    if foundation := registry.load(name).foundation:
        family[foundation] = registry.load(name).check_settings[foundation]
    train = {"batch": 8, "total_kimg": 1.0, "precision": "fp32", "device": "cpu", "compile": "off"}
    recipe: Recipe = recipes.resolve(name, {"family": family, "train": train})
    torch.manual_seed(0)
    built = recipes.build(recipe, Ramps.image_shape, Ramps.num_classes)
    trainer = Trainer(recipe, built, Ramps(), Ramps(), Run.create(folder / "run", "", {}), Silent())
    totals = []
    for _ in range(STEPS):
        trainer._sums = {}
        trainer.step()
        totals.append(sum(float(value[-1]) for key, value in trainer._sums.items() if key.endswith("/loss")))
    return totals


@pytest.mark.parametrize("name", registry.names())
def test_losses(name: str, tmp_path: Path) -> None:
    file, measured = FOLDER / f"{name}.json", losses(name, tmp_path)
    if REWRITE:
        compared = json.loads(file.read_text())["compared"] if file.exists() else STEPS
        content = {
            "torch": torch.__version__,
            "relative_tolerance": TOLERANCE,
            "compared": compared,
            "losses": measured,
        }
        file.write_text(json.dumps(content, indent=1) + "\n")
    assert file.exists(), "a new family: run `make golden` and read the numbers"
    stored = json.loads(file.read_text())
    first = slice(stored["compared"])
    assert measured[first] == pytest.approx(stored["losses"][first], rel=stored["relative_tolerance"], abs=1e-6)


def test_no_number_without_a_family() -> None:
    assert {file.stem for file in FOLDER.glob("*.json")} <= set(registry.names())
