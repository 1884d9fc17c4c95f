"""What is exported resolves, help needs no torch, recipes parse, and from the command line to a loss it is not far."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import imagekiln
from imagekiln import api, core, errors
from imagekiln.config import FamilyConfig, Recipe
from imagekiln.core import Family, Loss, Phase
from imagekiln.engine import recipe as recipes
from imagekiln.engine import registry

SIX = ["compare", "evaluate", "export", "generate", "prepare", "train"]


def test_exported_names_resolve() -> None:
    assert sorted(imagekiln.__all__) == sorted(["Run", *SIX])
    for name in imagekiln.__all__:
        assert getattr(imagekiln, name).__doc__
        assert name in dir(imagekiln)
    with pytest.raises(AttributeError, match="no_such_name"):
        imagekiln.no_such_name  # noqa: B018


def test_the_api_exports_what_it_defines() -> None:
    own = {n for n, v in vars(api).items() if getattr(v, "__module__", "") == api.__name__ and not n.startswith("_")}
    assert own <= set(api.__all__) and set(SIX) <= set(api.__all__)
    assert all(hasattr(api, name) for name in api.__all__)


def test_every_error_has_its_exit_code() -> None:
    kinds = [kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, Exception)]
    codes = {kind.__name__: kind.exit_code for kind in kinds}
    assert codes == {
        "ImagekilnError": 1,
        "UsageError": 2,
        "RecipeError": 2,
        "DataError": 3,
        "OutOfMemory": 4,
        "DiskError": 5,
        "Diverged": 6,
        "CheckpointError": 1,
        "Interrupted": 75,
    }


def test_every_recipe_and_family_parses() -> None:
    whole = [name for name in recipes.names() if not recipes.goes_on(name)]
    for name in [*whole, *registry.names()]:
        recipe = recipes.resolve(name)
        assert isinstance(recipe, Recipe) and recipe.optim
        assert len(type(recipe.family).model_fields) - 1 <= 14, "a family has about 12 settings beside its name"
    for name in recipes.names():
        head = recipes.header(name)
        assert "ommand" in head and head.split("\n")[0].strip(), f"{name}: the header says command and expectation"


def test_the_words_are_importable_from_core() -> None:
    for word in ("Batch", "Condition", "Progress", "Loss", "Phase", "Family", "Source", "Metric"):
        assert inspect.getdoc(getattr(core, word))


HELP = """
import sys
from typer.testing import CliRunner
from imagekiln.cli.main import app
import typer
runner = CliRunner()
group = typer.main.get_command(app)
def walk(command, path):
    result = runner.invoke(app, [*path, "--help"])
    if result.exit_code or "Usage" not in result.output:
        raise SystemExit(f"{path}: {result.exit_code} {result.output}")
    for name, child in getattr(command, "commands", {}).items():
        walk(child, [*path, name])
walk(group, [])
heavy = {"torch", "sklearn", "matplotlib", "diffusers", "numpy", "PIL"} & set(sys.modules)
raise SystemExit(", ".join(sorted(heavy)) or 0)
"""


def test_help_imports_nothing_heavy() -> None:
    ended = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, f"--help imports {ended.stderr}"


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, imagekiln, imagekiln.config, imagekiln.engine.run; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


class Seen:
    """Where a loss was called from."""

    depth: int = 0
    names: list[str] = []


class _Config(FamilyConfig):
    name: str = "tests"


def test_from_the_command_line_to_a_loss_in_five_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Looking(Family):
        """A family that looks at who calls it."""

        Config = _Config
        optimizers = {"net": {}}
        phases = (Phase("look", trains=("net",)),)
        averaged = ("net",)

        def __init__(self, config, image_shape, num_classes):
            super().__init__(config, image_shape, num_classes)
            self.net = torch.nn.Linear(1, 1)

        def loss(self, phase, batch, progress):
            package = str(Path(imagekiln.__file__).parent)
            frames = [f for f in inspect.stack() if f.filename.startswith(package)]
            training = [f for f in frames if f.function != "_validate"]
            if len(training) == len(frames):
                Seen.names = [f.function for f in frames]
            return Loss(self.net(batch.images.mean().view(1, 1)).square().mean())

        def sample(self, noise, condition, options=None):
            return noise.clamp(-1, 1)

        def noise_shape(self):
            return self.image_shape

    from imagekiln.cli.train import train

    monkeypatch.setattr(registry, "load", lambda name: Looking)
    train("vae", "builtin:digits", tmp_path / "run", settings=["train.total_kimg=0.064"], device="cpu", report=False)
    assert Seen.names[-1] == "train" and len(Seen.names) <= 5, " <- ".join(Seen.names)
