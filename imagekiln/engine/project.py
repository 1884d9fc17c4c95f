"""Projection: the noise, and the styles, with which a model draws a given picture as nearly as it can.

Adam goes down a distance between the drawn picture x and the given one y (Zhu et al. 2016, arXiv:1609.03552; for styles
Abdal et al. 2019, arXiv:1904.03189, and Karras et al. 2020, arXiv:1912.04958, appendix D). The distance has a part of
pixels at four sizes and a part of maps of fixed random convolutions, each relative to those of the model's mean picture
m (the features of a judge instead were no better with a DCGAN's digits):

    d(x) = sum_s |x_s - y_s|^2 / sum_s |m_s - y_s|^2 + sum_f |f(x) - f(y)|^2 / sum_f |f(m) - f(y)|^2.

It starts from the nearest of many drawn pictures, and from what the family's encoder says where it has one. Noise stays
no longer than that of nearly all drawn pictures, sqrt(N) + 2, and styles no farther from their mean than those of the
drawn ones: unbounded, they draw anything, and say nothing about the model. Every place has a style of its own, so mixed
pictures are reached, too; the noise of the layers stays that of the start.

Shapes: B candidates, N values of noise, L places a style enters, Z dimensions of a style, C channels, H rows, W
columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor
from torch.nn import functional

from imagekiln.core import UNLABELLED, Condition, Family, half_cosine, mix, seeded_noise
from imagekiln.data import to_float, to_uint8
from imagekiln.engine import pictures
from imagekiln.engine.generate import asked_for, in_parts, pictured
from imagekiln.engine.latents import StyleSpace
from imagekiln.engine.models import Model, open_model
from imagekiln.engine.run import Run, made_folder, write_whole
from imagekiln.errors import UsageError
from imagekiln.metrics import RandomConv
from imagekiln.metrics.features import SMALLEST_SIDE

NUM_DRAWN = 256
"""Pictures that are drawn to find where to start."""
BATCH = 64
LEARNING_RATE = 0.1
"""Of noise, and of styles in units of their spread; it falls to 0 along half a cosine."""
FOUND_GAIN_DB, FOUND_DB = 6.0, 30.0
"""A picture counts as found when so much nearer than the model's mean picture (a quarter of its error), or so near."""
LARGEST_DB = 99.0
"""Stands for pictures that are equal."""

Report = Callable[[int, int], None]
Features = Callable[[Tensor], list[Tensor]]


@runtime_checkable
class Encodes(Protocol):
    """What a family with an encoder has besides `sample`."""

    def noise_of(self, images: Tensor, condition: Condition) -> Tensor:
        """The noise that draws these images_BCHW in [-1, 1], as far as the encoder knows."""
        ...


class Latent(NamedTuple):
    """All that decides about a picture: noise_BX, labels of the B, and styles_BLZ or None for families without."""

    noise: Tensor
    labels: list[int]
    styles: Tensor | None = None

    def rows(self, chosen: Sequence[int]) -> Latent:
        """Some of them."""
        styles = None if self.styles is None else self.styles[list(chosen)]
        return Latent(self.noise[list(chosen)], [self.labels[index] for index in chosen], styles)


@dataclass(frozen=True)
class Projected:
    """The nearest picture found: uint8 (C, H, W), how near it is, and the noise, label and styles that draw it.

    psnr_db: of the picture; drawn_psnr_db: of the nearest of `num_drawn` drawn ones; mean_psnr_db: of their mean.
    """

    image: Tensor
    latent: Latent
    num_drawn: int
    psnr_db: float
    drawn_psnr_db: float
    mean_psnr_db: float

    @property
    def found(self) -> bool:
        """Whether the model has this picture, by a rule of thumb (`FOUND_GAIN_DB`, `FOUND_DB`)."""
        return self.psnr_db >= FOUND_DB or self.psnr_db >= self.mean_psnr_db + FOUND_GAIN_DB


@dataclass(frozen=True)
class Written:
    """What `project` wrote, and the result it is about."""

    result: Projected
    files: dict[str, Path]
    weights: Path
    label: str | None

    def sentence(self) -> str:
        """What a person should know about it."""
        result = self.result
        near = (
            f"{result.psnr_db:.1f} dB; the nearest of {result.num_drawn} drawn pictures has "
            f"{result.drawn_psnr_db:.1f} dB, the model's mean picture {result.mean_psnr_db:.1f} dB"
        )
        of_class = f" as {self.label!r}" if self.label is not None else ""
        if result.found:
            return f"Found{of_class}: {near}. {self.files['sheet']}"
        return (
            f"Not found: the nearest picture{of_class} has {near}. The model probably cannot draw such a picture. "
            f"{self.files['sheet']}"
        )

    def facts(self) -> dict[str, Any]:
        """For programs."""
        result = self.result
        numbers = {
            "psnr_db": result.psnr_db,
            "drawn_psnr_db": result.drawn_psnr_db,
            "mean_psnr_db": result.mean_psnr_db,
        }
        return {**numbers, "found": result.found, "label": self.label, **self.files, "weights": self.weights}


def project(
    run: Run | str | Path,
    picture: str | Path,
    out: str | Path,
    *,
    label: str | None = None,
    steps: int = 300,
    restarts: int = 4,
    seed: int = 0,
    nimg: int | None = None,
    average: str | None = None,
    device_name: str = "auto",
    progress: Report | None = None,
) -> Written:
    """Find a picture in what a run can draw, and write it beside the original.

    In `out`: original.png (at the model's size), projection.png, difference.png (absolute, 0 = black), sheet.png (the
    three in a row), latent.safetensors (noise, styles, label).
    label: class to draw it as; None = the one that fits best.

    Raises:
        UsageError: no such run or label, or a model whose pictures cannot be searched. DataError: the picture cannot be
        read. DiskError: `out` cannot be written.
    """
    if steps < 1 or restarts < 1:
        raise UsageError(f"--steps {steps}, --restarts {restarts}: expected at least 1 of each.")
    run = run if isinstance(run, Run) else Run.open(run)
    model = open_model(run, nimg, average, device_name)
    require_searchable(model.family)
    classes = list(range(model.family.num_classes)) or [UNLABELLED]
    labels = classes if label is None else [model.label(label)]
    target = read_picture(Path(picture), model)
    seen = random_features(model.family.picture_shape)  # type: ignore[arg-type]  # three numbers
    result = search(model.family, target, labels, seen, steps=steps, restarts=restarts, seed=seed, progress=progress)
    return _write(Path(out), model, target, result)


def require_searchable(family: Family) -> None:
    """Whether a family's pictures follow its noise smoothly, so that a search knows where to go.

    Raises:
        UsageError: they do not.
    """
    name = family.config.name
    if not family.draws:
        raise UsageError(f"A {name} judges pictures and draws none, so there is nothing to search.")
    noise = seeded_noise([0], family.noise_shape()).to(next(family.parameters()).device).requires_grad_(True)
    with torch.enable_grad():
        smooth = pictured(family, noise, asked_for(family, [UNLABELLED])).requires_grad
    if not smooth:
        raise UsageError(
            f"A {name} model cannot be searched for a picture: its drawing has no derivative by the noise. "
            "Projection works with GANs and with autoencoders that have a continuous latent space."
        )


def read_picture(path: Path, model: Model) -> Tensor:
    """A picture from outside at the model's size, cut or padded as its training pictures were: uint8 (C, H, W).

    Raises:
        DataError: it cannot be used.
    """
    data = model.recipe.data
    return pictures.read(path, model.family.picture_shape, data.fit, data.background)


# -- the search -------------------------------------------------------------------------------------------------------


def search(
    family: Family,
    target: Tensor,
    labels: Sequence[int],
    features: Features,
    *,
    steps: int = 300,
    restarts: int = 4,
    seed: int = 0,
    progress: Report | None = None,
) -> Projected:
    """The nearest picture to `target`, uint8 (C, H, W), that the family draws under one of these labels.

    features: maps or vectors of images_BCHW in [-1, 1] whose distance counts beside that of pixels; [] = pixels alone.
    restarts: how many of the best starts are followed. The family is in evaluation mode, its weights without gradients.

    Raises:
        UsageError: pictures of another shape.
    """
    if tuple(target.shape) != family.picture_shape:
        raise UsageError(
            f"A picture of shape {tuple(target.shape)} was given; this model draws {family.picture_shape}."
        )
    goal = to_float(target).to(next(family.parameters()).device)[None]
    num_drawn = max(NUM_DRAWN, len(labels))
    starts = _starts(family, goal, labels, num_drawn, seed)
    rows = range(len(starts.labels))
    seen = torch.cat(list(in_parts(lambda some: _picture(family, starts.rows(rows[some])), len(rows), BATCH)))
    mean = to_float(seen[:num_drawn]).mean(0, keepdim=True)
    distance = Distance(goal, mean.to(goal.device), features)
    with torch.no_grad():
        found_B = torch.cat([distance(to_float(part).to(goal.device)) for part in seen.split(BATCH)])
    nearest = found_B.argsort(stable=True)[:restarts].tolist()
    best, best_B = _descend(family, starts, nearest, distance, steps, progress)
    latent = best.rows([int(best_B.argmin())])
    (image,) = in_parts(lambda some: _picture(family, latent), 1)
    drawn = seen[int(found_B[:num_drawn].argmin())]
    near = {"psnr_db": image[0], "drawn_psnr_db": drawn, "mean_psnr_db": to_uint8(mean[0])}
    return Projected(image[0], latent, num_drawn, **{key: psnr_db(one, target) for key, one in near.items()})


class Distance:
    """How far pictures are from a given one: d at the top of this file, one number each; 2 = like the mean picture."""

    def __init__(self, goal: Tensor, mean: Tensor, features: Features) -> None:
        self.features = features
        with torch.no_grad():
            self.goal = self._seen(goal)
            self.scale = [part_1.clamp(min=1e-12) for part_1 in self._parts(mean)]

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """distance_B, with a graph where pictures have one."""
        parts = [part_B / scale_1 for part_B, scale_1 in zip(self._parts(images_BCHW), self.scale, strict=True)]
        return torch.stack(parts).sum(0)

    def _parts(self, images_BCHW: Tensor) -> list[Tensor]:
        """Squared distances in pixels and, if there are any, in features: each (B,), summed over sizes and maps."""
        both = zip(self._seen(images_BCHW), self.goal, strict=True)
        return [
            torch.stack([(x - y).square().flatten(1).mean(1) for x, y in zip(seen, wanted, strict=True)]).sum(0)
            for seen, wanted in both
            if seen
        ]

    def _seen(self, images_BCHW: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        sizes = [factor for factor in (1, 2, 4, 8) if factor <= min(images_BCHW.shape[2:])]
        return [functional.avg_pool2d(images_BCHW, factor) for factor in sizes], self.features(images_BCHW)


def psnr_db(first: Tensor, second: Tensor) -> float:
    """10 log10(255^2 / mean squared error) of two uint8 pictures, at most `LARGEST_DB`.

    >>> psnr_db(torch.tensor([0, 0], dtype=torch.uint8), torch.tensor([255, 255], dtype=torch.uint8))
    0.0
    """
    error = float((first.double() - second.double()).square().mean())
    return min(LARGEST_DB, 10 * math.log10(255**2 / error)) if error else LARGEST_DB


@torch.no_grad()
def _starts(family: Family, goal: Tensor, labels: Sequence[int], num_drawn: int, seed: int) -> Latent:
    """Those of drawn pictures, the labels in turn, and after them what an encoder says under every label."""
    seeds = [mix(seed, "project", index) for index in range(num_drawn)]
    noise = seeded_noise(seeds, family.noise_shape()).to(goal.device)
    of_all = [labels[index % len(labels)] for index in range(num_drawn)]
    if isinstance(family, Encodes):
        every = goal.expand(len(labels), -1, -1, -1)
        told = family.noise_of(every, asked_for(family, labels)).float()
        noise = torch.cat([noise, _shortened(told, longest(told[0].numel()))])
        of_all += list(labels)
    if not isinstance(family, StyleSpace):
        return Latent(noise, of_all)
    return Latent(noise, of_all, family.styles(noise, asked_for(family, of_all)))


def _descend(
    family: Family, starts: Latent, chosen: Sequence[int], distance: Distance, steps: int, progress: Report | None
) -> tuple[Latent, Tensor]:
    """The best latent on the way from each of these starts, and its distance. The starts do not know of each other."""
    room, start = _Room.of(starts), starts.rows(chosen)
    free = room.inside(start.noise if start.styles is None else start.styles).requires_grad_(True)
    optimizer = torch.optim.Adam([free], lr=LEARNING_RATE, betas=(0.9, 0.99))
    best, best_B = free.detach().clone(), torch.full((len(chosen),), math.inf, device=free.device)
    for step in range(steps + 1):
        found_B = distance(_seen(_picture(family, room.latent(start, free)).float()))
        nearer_B = found_B.detach() < best_B  # what is not a number is never nearer
        best_B = torch.where(nearer_B, found_B.detach(), best_B)
        best = torch.where(nearer_B.view(-1, *[1] * (best.ndim - 1)), free.detach(), best)
        if step == steps:
            break
        optimizer.param_groups[0]["lr"] = half_cosine(LEARNING_RATE, 0.0, step / steps)
        optimizer.zero_grad(set_to_none=True)
        found_B.sum().backward()
        optimizer.step()
        with torch.no_grad():
            free.copy_(_shortened(free, room.reach, room.together))
        if progress is not None:
            progress(step + 1, steps)
    return room.latent(start, best), best_B


def _seen(images_BCHW: Tensor) -> Tensor:
    """Clamped to [-1, 1], as pictures are written, with the derivative of what is not: else nothing leads back."""
    return images_BCHW + (images_BCHW.clamp(-1, 1) - images_BCHW).detach()


class _Room(NamedTuple):
    """Where is searched: in noise, or in styles less their mean in units of their spread, so that one rate suits all.

    reach: length of the longest vector. together: the dimension from which on values are one vector.
    """

    centre: Tensor
    spread: float
    reach: float
    together: int

    @classmethod
    def of(cls, starts: Latent) -> _Room:
        """The room that these span."""
        if starts.styles is None:
            return cls(torch.zeros_like(starts.noise[0]), 1.0, longest(starts.noise[0].numel()), together=1)
        centre = starts.styles.mean(0)
        spread = max(1e-6, float((starts.styles - centre).square().mean().sqrt()))
        farthest = float((starts.styles - centre).norm(dim=2).max()) / spread
        return cls(centre, spread, max(1e-6, farthest), together=2)

    def inside(self, x_BX: Tensor) -> Tensor:
        """Noise or styles as they are searched."""
        return (x_BX - self.centre) / self.spread

    def latent(self, start: Latent, free: Tensor) -> Latent:
        """What is searched as noise or styles, with all else as at the start."""
        x_BX = self.centre + self.spread * free
        return start._replace(noise=x_BX) if start.styles is None else start._replace(styles=x_BX)


def longest(count: int) -> float:
    """More than the length of nearly all vectors of `count` normal values, sqrt(count) with a deviation of 0.7."""
    return math.sqrt(count) + 2


def _shortened(x_BX: Tensor, most: float, together: int = 1) -> Tensor:
    flat = x_BX.flatten(together)
    return (flat * (most / flat.norm(dim=-1, keepdim=True).clamp(min=most))).view_as(x_BX)


def _picture(family: Any, latent: Latent) -> Tensor:
    if latent.styles is not None:
        return family.from_styles(latent.styles, latent.noise)
    return pictured(family, latent.noise, asked_for(family, latent.labels))


# -- what is seen, and what is written --------------------------------------------------------------------------------


def random_features(image_shape: tuple[int, int, int]) -> Features:
    """Maps of the fixed random convolutions at all their sizes; none for pictures that are too small for them."""
    if min(image_shape[1:]) < SMALLEST_SIDE:
        return lambda images_BCHW: []
    network = RandomConv(image_shape)

    def maps(images_BCHW: Tensor) -> list[Tensor]:
        network.to(images_BCHW.device)
        found = []
        for scale, convolutions in enumerate(network.scales):
            x_BCHW = functional.avg_pool2d(images_BCHW, 2**scale)
            for layer, convolution in enumerate(convolutions.children()):
                x_BCHW = functional.relu(convolution(functional.avg_pool2d(x_BCHW, 2) if layer else x_BCHW))
                found.append(x_BCHW)
        return found

    return maps


def _write(folder: Path, model: Model, target: Tensor, result: Projected) -> Written:
    difference = (target.int() - result.image.int()).abs().to(torch.uint8)
    if len(difference) == 4:
        difference[3] = 255  # a difference of 0 is to be black, not transparent
    images = {"original": target, "projection": result.image, "difference": difference}
    names = [*images, "sheet"]
    files = {name: folder / f"{name}.png" for name in names} | {"latent": folder / "latent.safetensors"}
    made_folder(folder)
    for name, image in images.items():
        pictures.write(pictures.to_picture(image), files[name])
    pictures.write(pictures.grid(torch.stack(list(images.values())), len(images)), files["sheet"])
    latent = result.latent
    tensors = {"noise": latent.noise, "labels": torch.tensor(latent.labels)}
    tensors |= {} if latent.styles is None else {"styles": latent.styles}
    write_whole(files["latent"], to_bytes({key: value.cpu().contiguous() for key, value in tensors.items()}))
    label = latent.labels[0]
    return Written(result, files, model.weights, None if label == UNLABELLED else model.class_names[label])
