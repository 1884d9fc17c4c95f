"""The words of imagekiln: what a batch, a phase, a loss, a family, a source and a metric are.

Everything else in the package is written in these terms, and this file imports nothing but torch.

Shapes: B images, C channels, H rows, W columns.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

UNLABELLED = -1
"""The label of a picture nobody labelled. Families map it to their null condition."""


class Batch(NamedTuple):
    """Pictures and what is known about them.

    images: images_BCHW, float32 in [-1, 1] (or a codec's latents) in training; uint8 as read from a `Source`.
    labels: labels_B, int64, `UNLABELLED` (-1) where unknown; None when the set has no labels at all.
    text: token ids or cached embeddings, one row a picture; None when the set has no captions.
    augment: augment_BA, float32, what was done to each picture (`config.AUGMENT_LABELS`), zeros where nothing was; None
        when pictures come as they are.
    """

    images: Tensor
    labels: Tensor | None = None
    text: Tensor | None = None
    augment: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device, which the host does not wait for."""
        labels, text, augment = (part if part is None else sent(part, device) for part in self[1:])
        return Batch(sent(self.images, device), labels, text, augment)


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on a device. A GPU fetches it by itself, out of memory that stays where it is, while the host goes on.

    >>> sent(torch.ones(2), "cpu").tolist()
    [1.0, 1.0]
    """
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class Condition(NamedTuple):
    """What a picture should show: labels_B int64 (-1 = anything) and/or text rows. Both None = unconditional.

    start: pictures (or latents) that drawing begins with, in the place of noise alone, for families of diffusion. keep:
        (B, 1, H, W), 1.0 where these stay as they are.
    """

    labels: Tensor | None = None
    text: Tensor | None = None
    start: Tensor | None = None
    keep: Tensor | None = None


class Progress(NamedTuple):
    """How far a run is, in images seen. Every schedule is a function of this, never of steps."""

    nimg: int
    total_nimg: int

    @property
    def fraction(self) -> float:
        """Share of the run that is done, in [0, 1]."""
        return min(1.0, self.nimg / max(1, self.total_nimg))


@dataclass(frozen=True)
class Loss:
    """One phase's objective: `total`, a scalar to differentiate, and `parts`, named scalars to log."""

    total: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)


class HeldOut(NamedTuple):
    """A loss on held-out pictures.

    values: one a picture (B,), or a single one for the whole batch.
    levels: at which level of noise each value was taken, (B,), one of a few fixed ones; None where there are none.
    """

    values: Tensor
    levels: Tensor | None = None


@dataclass(frozen=True)
class Phase:
    """One kind of update inside a training step.

    name: what `Family.loss` is asked for.
    trains: names of the sub-modules it updates; everything else is frozen while it runs.
    every: run it on every k-th step only, its loss scaled by k (lazy regularisation, StyleGAN2 section B).
    repeat: run it r times, each on a fresh batch (the critic steps of WGAN).
    rests: whether it is left out of the k-th step, k from 0, so that another phase gets ahead; its loss is not scaled.
    """

    name: str
    trains: tuple[str, ...]
    every: int = 1
    repeat: int = 1
    rests: Callable[[int], bool] | None = None

    @property
    def optimizer(self) -> str:
        """The key of the optimizer that owns these modules: phases that train the same modules share its moments."""
        return "-".join(sorted(self.trains))


class Codec(Protocol):
    """Between pictures and the latents that a family learns from (`imagekiln.engine.codec`)."""

    image_shape: tuple[int, int, int]
    """Channels, height and width of the pictures."""

    def encode(self, images: Tensor) -> Tensor:
        """latents_BCHW as a family learns them, of images_BCHW float32 in [-1, 1]."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """images_BCHW float32, about [-1, 1], of latents_BCHW as a family draws them."""
        ...


class Family(nn.Module, ABC):
    """A kind of generative model: it owns its networks, says how to learn and how to draw.

    A concrete family is built as `family(config, image_shape, num_classes)` and is final: no family is a subclass of
    another. It never calls `backward()`; the trainer does, once, for all families.
    """

    Config: ClassVar[type]
    """Pydantic model of the recipe's `family` section, a subclass of `imagekiln.config.FamilyConfig`."""

    optimizers: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Default optimizer settings by `Phase.optimizer`; a recipe's `optim` section overrides them key by key."""

    train_defaults: ClassVar[Mapping[str, Any]] = {}
    """Default settings of the recipe's `train` section where the family's paper has others than the package."""

    monitor: ClassVar[str | None] = None
    """The held-out loss that ranks moments of a run; None where no loss measures quality, and drawn pictures do."""

    check_settings: ClassVar[Mapping[str, Any]] = {}
    """Settings of the `family` section for the checks of `imagekiln.testing`: small, so that they take seconds."""

    companions: ClassVar[Sequence[str]] = ()
    """Fields of the `family` section that name the run of another model, which training needs beside this one."""

    published: ClassVar[Mapping[str, Callable[[Path, tuple[int, ...]], Any]]] = {}
    """Those of `companions` that may also name a file of weights published elsewhere, each with what opens it for
    pictures of a shape, as a module; it raises `UsageError` for files of anything else."""

    foundation: ClassVar[str] = ""
    """Field of the `family` section that names a folder of pretrained weights, which stay there; "" for none. The
    autoencoder in it is the codec, unless the recipe names another."""

    frozen_text: ClassVar[str] = ""
    """Field of the `family` section, such as "text.base", that names the folder of a pretrained text encoder, which
    stays there; "" for none. The field itself may be empty."""

    draws: ClassVar[bool] = True
    """False for a family that is trained to judge pictures, not to make them: it has `features` and no `sample`."""

    latents: ClassVar[bool] = False
    """Whether it can learn a codec's latents: they are not bounded as pictures are, so neither is what it draws."""

    guidable: ClassVar[bool] = False
    """Whether `sample` turns away from what `guide` would draw, where there is one."""

    phases: Sequence[Phase]
    averaged: Sequence[str]
    """Names of the sub-modules that sampling uses: the ones the moving averages follow."""

    def __init__(self, config: Any, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.image_shape = tuple(image_shape)
        self.num_classes = num_classes
        self.companion: dict[str, Any] = {}
        """The models of `companions`, frozen, by field; filled before training, and not part of this one's state."""
        self.guide: Any = None
        """A weaker model of the same family that guides what this one draws; set before drawing."""
        self.codec: Codec | None = None
        """What stands between pictures and what this family learns and draws; None where these are pictures."""

    @property
    def picture_shape(self) -> tuple[int, ...]:
        """Channels, height and width of the pictures that come of it: behind a codec not those it draws."""
        return self.image_shape if self.codec is None else self.codec.image_shape

    def fits(self, rows: int, columns: int) -> bool:
        """Whether it also learns and draws what has so many rows and columns, beside its `image_shape`."""
        return (rows, columns) == self.image_shape[1:]

    @abstractmethod
    def loss(self, phase: str, batch: Batch, progress: Progress) -> Loss:
        """The objective of one phase on one batch. Draws its randomness from torch's global generator, which the
        trainer seeds from (seed, images seen, phase, slot) before every call."""

    @abstractmethod
    def sample(self, noise: Tensor, condition: Condition, options: Any = None) -> Tensor:
        """Pictures from noise: images_BCHW float32 in [-1, 1]; with `latents` of any size, and the engine cuts.

        noise: (B, *self.noise_shape()) standard normal, made from one seed a picture, so that picture i is the same
            whatever the batch size. Nothing random may be drawn inside.
        options: the family's sampling options; None takes `self.config.sample`.
        """

    @abstractmethod
    def noise_shape(self) -> tuple[int, ...]:
        """Shape of the noise of one picture."""

    def held_out(self, batch: Batch, progress: Progress) -> Mapping[str, HeldOut]:
        """Losses on held-out pictures by name, `monitor` among them. The global generator is seeded as for `loss`, with
        the same seed every time. What is not overridden is the loss of every phase."""
        return {phase.name: HeldOut(self.loss(phase.name, batch, progress).total) for phase in self.phases}

    def study(self, captions: Sequence[str]) -> None:
        """Called once, before the first step of a new run, with the training set's captions: what is taken from them,
        such as a vocabulary, belongs into buffers, where checkpoints keep it."""

    def read(self, captions: Sequence[str]) -> Tensor | None:
        """Captions as this family takes them in `Batch.text` and `Condition.text`: one row a caption, "" for none; None
        where it reads no text."""
        return None

    def cuts(self, caption: str) -> bool:
        """Whether `read` leaves out the end of this caption, because it is longer than the family reads."""
        return False

    def drawing_cost(self) -> float:
        """What it costs to draw a picture, in pictures trained on: one evaluation of the network is about a third."""
        return 1 / 3

    def reconstruct(self, images: Tensor) -> Tensor | None:
        """Pictures the model makes of given pictures (autoencoding or denoising), or None where it has no such thing.

        images: images_BCHW float32 in [-1, 1]; the result has the same shape and range.
        """
        return None

    def features(self, images: Tensor) -> Tensor:
        """What a judging family (`draws = False`) sees in pictures: features_BD float32 of images_BCHW in [-1, 1]."""
        raise NotImplementedError(f"{type(self).__name__} draws pictures; it has no features.")

    def predict(self, images: Tensor) -> Tensor:
        """Class scores of a judging family: logits_BK float32."""
        raise NotImplementedError(f"{type(self).__name__} draws pictures; it predicts no classes.")

    def dials(self) -> Mapping[str, Tensor]:
        """Strengths that may be turned while training, by name: scalar buffers, so that a checkpoint holds them."""
        return {}

    def after_step(self, progress: Progress) -> None:
        """Called once after every training step: target networks, code-book averages, augmentation strength."""


@runtime_checkable
class Source(Protocol):
    """Pictures by index: the only thing the trainer knows about data."""

    image_shape: tuple[int, int, int]
    num_classes: int
    class_names: tuple[str, ...]
    fingerprint: str
    """Hash of pixels, labels and order: with the recipe it determines a run."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> Batch:
        """The pictures at these indices: images_BCHW uint8, labels_B int64 or None."""
        ...


@runtime_checkable
class Metric(Protocol):
    """A formula over two finished statistics of features (see `imagekiln.metrics`)."""

    name: str
    lower_is_better: bool

    def __call__(self, generated: Any, reference: Any) -> float: ...


def mix(*keys: int | str) -> int:
    """One 63-bit seed from any keys: stable across machines, processes and Python versions.

    All randomness of a run comes from here: `mix(seed, "order", epoch)`, `mix(seed, phase, nimg, slot)`.

    >>> mix(0, "order", 3) == mix(0, "order", 3), mix(0, "order", 3) == mix(0, "order", 4)
    (True, False)
    """
    text = "\x1f".join(f"{type(key).__name__}:{key}" for key in keys)
    raw = text.encode("utf-8", "surrogatepass")  # a file name that is not UTF-8 is a key too
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little") >> 1


def half_cosine(start: float, end: float, fraction: float) -> float:
    """From start to end along half a cosine, as a function of the share of the run that is done.

    >>> half_cosine(2.0, 0.2, 0.0), round(half_cosine(2.0, 0.2, 0.5), 6), half_cosine(2.0, 0.2, 1.0)
    (2.0, 1.1, 0.2)
    """
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, max(0.0, fraction)))) / 2


def seeded_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise, one generator a picture: (len(seeds), *shape) float32 on the CPU.

    >>> a, b = seeded_noise([1, 2], (3,)), seeded_noise([2], (3,))
    >>> bool((a[1] == b[0]).all())
    True
    """
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(mix("noise", seed))) for seed in seeds]
    return torch.stack(rows) if rows else torch.empty(0, *shape)
