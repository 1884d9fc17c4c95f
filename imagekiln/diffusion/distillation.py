r"""Drawing in one step or two: a student learns to land at once where its teacher arrives after many steps.

The student begins with the teacher's weights. From noise its own steps lead it to one of a few noise levels; there it
answers with a picture y, and y is compared with the end x of the teacher's guided path from the same point z,

  sqrt(mean (y - x)^2 + c),   c = `FLOOR`,

as in Luhman & Luhman 2021 (arXiv:2101.02388) and Salimans & Ho 2022 (arXiv:2202.00512), with guidance built in (Meng et
al. 2023, arXiv:2210.03142). The mean of what the teacher might have drawn is blurred; a discriminator on the teacher's
own maps of y under noise sharpens it: adversarial diffusion distillation (Sauer et al. 2023, arXiv:2311.17042; Sauer et
al. 2024, arXiv:2403.12015). That the student meets the points it will come to itself, and not noised training pictures,
is section 4.5 of Yin et al. 2024 (arXiv:2405.14867).

Shapes: B pictures; x, y, z, eps (B, ...); sigma_B one noise level a picture.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import relu

from imagekiln.config import Section
from imagekiln.core import Family, HeldOut, Loss, Progress
from imagekiln.diffusion import samplers
from imagekiln.diffusion.drawing import Drawing
from imagekiln.diffusion.paths import Path
from imagekiln.diffusion.samplers import Denoiser
from imagekiln.errors import RecipeError, UsageError

FLOOR = 1e-4
"""Added to a picture's mean squared distance: below its root the loss is round."""

RAMP = 0.05
"""Share of the run in which the discriminator's weight rises."""


class Distillation(Section):
    """What a student learns from its teacher."""

    levels: tuple[float, ...] = Field(
        (160.0, 1.0), min_length=1, max_length=8, description="noise levels that it draws from, falling, in Euler steps"
    )
    teacher_steps: int = Field(4, ge=1, le=64, description="steps of the teacher from noise, fewer from lower levels")
    adversarial_weight: float = Field(0.3, ge=0, description="of the discriminator on the teacher's maps; 0 = none")

    def check(self, drawing: Drawing) -> None:
        """Raises `RecipeError` for levels that do not fall, fewer of them than the steps drawn with, or other steps."""
        fall = all(high > low for high, low in itertools.pairwise(self.levels))
        if not fall or self.levels[-1] <= 0:
            raise RecipeError(
                f"family.distillation.levels = {list(self.levels)}: expected falling noise levels above 0, for example "
                "[160, 1]."
            )
        if drawing.steps > len(self.levels):
            raise RecipeError(
                f"family.sample.steps = {drawing.steps}: with a teacher it learns to draw from {len(self.levels)} "
                "noise levels (family.distillation.levels). Set as many steps, or fewer."
            )
        if not _as_learned(drawing):
            raise RecipeError(
                f"family.sample.sampler = {drawing.sampler!r}: with a teacher it learns to draw in Euler steps. Set "
                "family.sample.sampler to euler."
            )

    def grid(self, drawing: Drawing) -> Tensor:
        """The levels of so many steps and then 0: (steps + 1,) float64. Raises `UsageError` for more steps than levels,
        or other steps than it learned.

        >>> Distillation(levels=(8, 4, 2, 1)).grid(Drawing(steps=2, sampler="euler")).tolist()
        [8.0, 2.0, 0.0]
        """
        steps = drawing.steps
        if steps > len(self.levels):
            raise UsageError(
                f"{steps} steps: this model learned to draw in at most {len(self.levels)}. Ask for as many, or draw "
                "with its teacher."
            )
        if not _as_learned(drawing):
            raise UsageError(
                f"sampler {drawing.sampler!r}: this model learned to draw in Euler steps. Ask for euler, or draw with "
                "its teacher."
            )
        return torch.tensor([*visited(self.levels, steps), 0.0], dtype=torch.float64)


def visited(levels: Sequence[float], steps: int) -> list[float]:
    """The levels that so many steps begin at, as far apart as they can be: the first, and every n-th."""
    return [levels[place * len(levels) // steps] for place in range(steps)]


def _as_learned(drawing: Drawing) -> bool:
    return samplers.sampler(drawing.sampler) is samplers.euler


def teacher_of(student: Family) -> Any:
    """The model that a family's `teacher` names.

    Raises:
        RecipeError: it was not loaded, or is another kind of model, or one of other pictures.
    """
    teacher, where = student.companion.get("teacher"), f"family.teacher = {student.config.teacher!r}"
    if teacher is None:
        raise RecipeError(f"{where}: that run was not loaded; name a folder that holds a finished run.")
    if type(teacher) is not type(student):
        raise RecipeError(
            f"{where} holds a {teacher.config.name}, and a {student.config.name} can only learn from its own kind."
        )
    mine, its = ((one.image_shape, one.num_classes) for one in (student, teacher))
    if mine != its:
        raise RecipeError(
            f"{where} draws pictures of {its[0]} with {its[1]} classes, and these are {mine[0]} with {mine[1]}. Give "
            "the pictures it was trained on."
        )
    words, its_words = student.read([""]), teacher.read([""])
    if words is not None and its_words is not None and not torch.equal(words, its_words):
        raise RecipeError(
            f"{where} reads texts as other tokens than this one. Begin with its run (--from), or give its family.text."
        )
    return teacher


class Lesson(NamedTuple):
    """What a batch is learned with: denoisers told what its pictures show, and `judge(z, sigma_B)`, logits of each of
    the teacher's maps of pictures under noise, positive for real."""

    student: Denoiser
    teacher: Denoiser
    judge: Callable[[Tensor, Tensor], Sequence[Tensor]]


def imitation(
    lesson: Lesson, settings: Distillation, path: Path, like: Tensor, sigma_B: Tensor, progress: Progress
) -> Loss:
    """The student's loss. like: any pictures of the batch's shape; sigma_B: the noise under which y is judged."""
    z, level = arrived(lesson.student, torch.randn_like(like), settings.levels, path)
    y = _at(lesson.student, z, level)
    apart = distance(y, goal(lesson.teacher, z, level, path, settings.teacher_steps)).mean()
    if not settings.adversarial_weight:
        return Loss(apart, {"distance": apart})
    on_fake = lesson.judge(path.diffuse(y, torch.randn_like(y), sigma_B), sigma_B)
    answer = torch.stack([-logits.mean() for logits in on_fake]).mean()
    weight = settings.adversarial_weight * min(1.0, progress.fraction / RAMP)
    return Loss(apart + weight * answer, {"distance": apart, "adversarial": answer})


def discrimination(lesson: Lesson, settings: Distillation, path: Path, x: Tensor, sigma_B: Tensor) -> Loss:
    """The hinge loss of what judges (Lim & Ye 2017, arXiv:1705.02894): x are real pictures of the batch."""
    with torch.no_grad():
        y = _at(lesson.student, *arrived(lesson.student, torch.randn_like(x), settings.levels, path))
        noisy = [path.diffuse(images, torch.randn_like(x), sigma_B) for images in (x, y)]
    on_real, on_fake = (lesson.judge(z, sigma_B) for z in noisy)
    pairs = zip(on_real, on_fake, strict=True)
    total = torch.stack([relu(1 - real).mean() + relu(1 + fake).mean() for real, fake in pairs]).mean()
    means = (torch.stack([logits.mean() for logits in side]).mean() for side in (on_real, on_fake))
    return Loss(total, dict(zip(("on_real", "on_fake"), means, strict=True)))


@torch.no_grad()
def held_out(lesson: Lesson, settings: Distillation, path: Path, like: Tensor) -> HeldOut:
    """The distance of each of the student's pictures from its teacher's, of noise shaped as `like`."""
    z, level = arrived(lesson.student, torch.randn_like(like), settings.levels, path)
    end = goal(lesson.teacher, z, level, path, settings.teacher_steps)
    return HeldOut(distance(_at(lesson.student, z, level), end))


@torch.no_grad()
def arrived(student: Denoiser, eps: Tensor, levels: Sequence[float], path: Path) -> tuple[Tensor, float]:
    """Where the student's steps from noise lead: z at one of the levels, the same for the batch, and that level.

    It is on its way in one step, two, ... or as many as there are levels, in k of them 1 / k as often as in one, and at
    one of these steps: the fewer steps, the harder each. So the first level is learned from most of all, from which all
    ways begin. Both numbers are of torch's global generator on the CPU, so that no step waits for a device.
    """
    steps = 1 + int(torch.multinomial(1 / torch.arange(1.0, len(levels) + 1), 1))
    grid = visited(levels, steps)[: 1 + int(torch.randint(steps, ()))]
    return samplers.euler(student, eps, torch.tensor(grid, dtype=torch.float64), path), grid[-1]


def _at(denoise: Denoiser, z: Tensor, level: float) -> Tensor:
    """The picture that a denoiser expects behind z, all of it at this level."""
    return denoise(z, z.new_full((len(z),), level))


@torch.no_grad()
def goal(teacher: Denoiser, z: Tensor, level: float, path: Path, steps: int) -> Tensor:
    """The picture at the end of the teacher's path that goes through z at this level.

    In so many steps from pure noise, as large and therefore fewer from lower levels, by Euler's method on
    `samplers.even_sigmas`: few steps follow a guided path better so than with a higher order and EDM's grid.

    >>> from imagekiln.diffusion.paths import RF
    >>> goal(lambda z, sigma_B: torch.ones_like(z), torch.zeros(1, 2), 1.0, RF(), 4)
    tensor([[1., 1.]])
    """
    grid = samplers.even_sigmas(math.ceil(steps * level / (1 + level)), level)
    _, b = path.scales(grid[:1])
    return samplers.euler(teacher, z / b.item(), grid, path)


def distance(y: Tensor, x: Tensor) -> Tensor:
    """distance_B of pictures: the root of the mean squared difference, rounded off near 0.

    >>> round(distance(torch.ones(1, 4), torch.zeros(1, 4)).item(), 4)
    1.0
    """
    return ((y - x).float().square().flatten(1).mean(1) + FLOOR).sqrt()
