"""Sheets that `generate` writes beside single pictures: grids, rows of classes, walks, tables of mixed styles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from imagekiln.engine import latents, pictures
from imagekiln.engine.generate import Wish
from imagekiln.engine.models import Model
from imagekiln.engine.run import write_whole
from imagekiln.errors import UsageError

GRIDS = {"plain": 100, "class": 400}
"""Kinds of grids, and how many pictures each shows at most."""

SLOWEST_FPS, FASTEST_FPS = 0.1, 100.0


@dataclass(frozen=True)
class Sheets:
    """What is asked for; the fields are arguments of `imagekiln.generate`."""

    grid: str = "plain"
    interpolate: int = 0
    fps: float = 20.0
    mix: int = 0
    crossover: int | None = None

    def __post_init__(self) -> None:
        if self.mix < 0:
            raise UsageError(f"--mix {self.mix}: expected a number of pictures, or 0 for no table.")

    def require(self, model: Model, labels: Sequence[Wish], begun: bool = False) -> None:
        """Whether this model can draw them.

        labels: of all pictures, those that give fine styles last. begun: drawing begins with a given picture.

        Raises:
            UsageError: it cannot, or something else than asked for was meant.
        """
        count = len(labels) - self.mix
        if self.grid not in GRIDS:
            raise UsageError(f"--grid {self.grid}: expected {' or '.join(GRIDS)}.")
        if self.grid == "class" and (not model.class_names or any(isinstance(label, str) for label in labels)):
            raise UsageError("--grid class: this model does not draw by labels. Leave --grid out.")
        if not SLOWEST_FPS <= self.fps <= FASTEST_FPS:
            raise UsageError(f"--fps {self.fps:g}: expected {SLOWEST_FPS:g} to {FASTEST_FPS:g} frames a second.")
        if begun and (self.interpolate or self.mix):
            raise UsageError("--start: walks and tables of styles begin with noise. Leave --interpolate and --mix out.")
        if self.interpolate:
            latents.require_walk(model.family, self.interpolate, labels[:count])
        if self.mix:
            latents.require_styles(model.family, count, self.mix, self.crossover)
        elif self.crossover is not None:
            raise UsageError("--crossover says where styles are mixed; give --mix, too.")

    def kept(self, count: int) -> int:
        """How many of the first pictures `write` needs when `count` are drawn, those for fine styles not counted."""
        return count + self.mix if self.interpolate or self.mix else GRIDS[self.grid]

    def write(
        self,
        folder: Path,
        model: Model,
        images: Tensor,
        seeds: Sequence[int],
        labels: Sequence[Wish],
        options: Any = None,
        batch: int = 64,
    ) -> dict[str, Path]:
        """Write the sheets, and say where they are: `grid`, and `walk`, `strip`, `mix` where they were asked for.

        images: at least the first `kept(...)` pictures of these seeds and labels.

        Raises:
            DiskError: the folder cannot be written.
        """
        count = len(seeds) - self.mix
        written = {"grid": folder / "grid.png"}
        pictures.write(self._grid(images[:count], labels[:count], model), written["grid"])
        if self.interpolate:
            frames = latents.walk(
                model.family, images[:count], seeds[:count], labels[:count], self.interpolate, options, batch
            )
            written |= {"walk": folder / "walk.png", "strip": folder / "strip.png"}
            write_whole(written["walk"], pictures.animation(frames, self.fps))
            pictures.write(pictures.grid(frames, len(frames), pictures.frame_zoom(frames)), written["strip"])
        if self.mix:
            crossover = latents.require_styles(model.family, count, self.mix, self.crossover)
            cells = latents.mixed(model.family, seeds, labels, count, crossover, options, batch)
            written["mix"] = folder / "mix.png"
            pictures.write(pictures.table(images[:count], images[count : count + self.mix], cells), written["mix"])
        return written

    def _grid(self, images: Tensor, labels: Sequence[Wish], model: Model) -> Any:
        shown = images[: GRIDS[self.grid]]
        if self.grid == "class":
            numbers = [label for label in labels[: len(shown)] if isinstance(label, int)]
            return pictures.class_rows(shown, numbers, model.class_names)
        turns = len(set(labels)) > 1 or model.family.num_classes < 2
        return pictures.grid(shown, pictures.columns_for(len(shown), model.family.num_classes if turns else 0))
