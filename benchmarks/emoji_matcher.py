"""An independent judge of whether a picture shows what some words say, trained on real pictures with names and tags.

A dual encoder (Radford et al. 2021, arXiv:2103.00020): convolutions f and a bag g of words and of pairs of neighbouring
words map pictures x_i and texts t_j into one sphere and are trained so that

  s_ij = exp(tau) <f(x_i), g(t_j)>,   L = (CE over all N texts for every picture of a batch
                                           + CE over the batch's pictures for each of their texts) / 2

is small. Pictures are shifted, scaled, blurred, coarsened, recoloured and made noisy, so that looking up exact pixels
does not help; texts are the name alone, the name with some of its tags, or tags alone. It shares nothing with the
models that it judges: no weights, no features, no tokenizer.

Shapes: N pictures with one text each, B of them in a batch, P parts of texts (a name or a tag), K words of texts, D
numbers an embedding.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from imagekiln.core import half_cosine, mix
from imagekiln.data import cache_folder, to_float
from imagekiln.engine.run import write_whole

SIZE = 32
"""Pixels a side that the picture network takes; other pictures are brought to it."""
BATCH, STEPS, WARM_UP_STEPS = 128, 650, 50
LEARNING_RATE, WEIGHT_DECAY = 2e-3, 0.05
WIDTH = 128
NAME_ALONE, WITH_NAME = 0.5, 0.8
"""Shares of texts in training that are the name alone, and that have the name in them at all."""
LARGEST_SCALE = 50.0
"""Of the scores; sharper ones would only count confidence."""

Say = Callable[[str], None]


# -- words ------------------------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """Words and single signs in small letters, commas left out.

    >>> words("keycap: 2, Blue-square")
    ['keycap', ':', '2', 'blue', '-', 'square']
    """
    return re.findall(r"\w+|[^\w\s,]", text.casefold())


def terms(text: str) -> list[str]:
    """Words and pairs of neighbouring words.

    >>> terms("a red apple")
    ['a', 'red', 'apple', 'a red', 'red apple']
    """
    single = words(text)
    return single + [f"{a} {b}" for a, b in itertools.pairwise(single)]


class Bags(NamedTuple):
    """Texts in parts as numbers of known terms: term_K with the part it stands in, part_K, and text_P of every part."""

    term_K: Tensor
    part_K: Tensor
    text_P: Tensor
    first_P: Tensor
    num_texts: int

    def chosen(self, generator: torch.Generator) -> Tensor:
        """on_P: which parts are told this time; the first part of a text is its name."""
        kind_N = torch.rand(self.num_texts, generator=generator)
        tag_P = torch.rand(len(self.text_P), generator=generator) < 0.5
        kind_P = kind_N[self.text_P]
        on_P = torch.where(self.first_P, kind_P < WITH_NAME, tag_P & (kind_P >= NAME_ALONE))
        told_N = torch.zeros(self.num_texts).index_add(0, self.text_P, on_P.float())
        return on_P | (self.first_P & (told_N[self.text_P] == 0))


def bags(texts: Sequence[Sequence[str]], vocabulary: dict[str, int]) -> Bags:
    """Texts, each a sequence of parts, in numbers; unknown terms are left out."""
    term: list[int] = []
    part: list[int] = []
    text: list[int] = []
    first: list[bool] = []
    for number, parts in enumerate(texts):
        for place, one in enumerate(parts):
            known = [vocabulary[name] for name in terms(one) if name in vocabulary]
            term += known
            part += [len(text)] * len(known)
            text.append(number)
            first.append(place == 0)
    term_K, part_K, text_P = (torch.tensor(some, dtype=torch.int64) for some in (term, part, text))
    return Bags(term_K, part_K, text_P, torch.tensor(first, dtype=torch.bool), len(texts))


# -- networks ---------------------------------------------------------------------------------------------------------


class PictureTower(nn.Sequential):
    """images_BCHW in [-1, 1], 32x32 RGB, to (B, D)."""

    def __init__(self) -> None:
        def block(before: int, after: int, stride: int) -> list[nn.Module]:
            return [
                nn.Conv2d(before, after, 2 + stride, stride, 1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(inplace=True),
            ]

        super().__init__(
            *block(3, 32, 2),
            *block(32, 64, 1),
            *block(64, 96, 2),
            *block(96, 96, 1),
            *block(96, 160, 2),
            nn.Flatten(),
            nn.Linear(160 * (SIZE // 8) ** 2, WIDTH),
        )


class TextTower(nn.Module):
    """Means of term embeddings, then two layers."""

    def __init__(self, num_terms: int) -> None:
        super().__init__()
        self.table = nn.Embedding(num_terms, WIDTH)
        self.head = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU(inplace=True), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, told: Bags, on_P: Tensor) -> Tensor:
        """(N, D) of texts, only the parts where on_P is true."""
        kept = on_P[told.part_K]
        term, text = told.term_K[kept], told.text_P[told.part_K[kept]]
        total = torch.zeros(told.num_texts, WIDTH).index_add(0, text, self.table(term))
        count = torch.zeros(told.num_texts).index_add(0, text, torch.ones(len(text)))
        return self.head(total / count.clamp(min=1)[:, None])


class Matcher(nn.Module):
    """Both towers with the vocabulary of what was read in training.

    cpu_sec: processor seconds that training took.
    """

    def __init__(self, vocabulary: Sequence[str], cpu_sec: float = 0.0) -> None:
        super().__init__()
        self.vocabulary = {term: number for number, term in enumerate(vocabulary)}
        self.pictures, self.texts = PictureTower(), TextTower(len(vocabulary))
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.cpu_sec = cpu_sec

    @torch.inference_mode()
    def of_pictures(self, images: Tensor) -> Tensor:
        """(B, D) of length 1, of uint8 RGB pictures of any size."""
        self.eval()
        parts = [self.pictures(_sized(to_float(part))) for part in images.split(BATCH)]
        return F.normalize(torch.cat(parts), dim=1)

    @torch.inference_mode()
    def of_texts(self, texts: Sequence[str]) -> Tensor:
        """(N, D) of length 1."""
        self.eval()
        told = bags([[text] for text in texts], self.vocabulary)
        return F.normalize(self.texts(told, torch.ones(len(told.text_P), dtype=torch.bool)), dim=1)

    def loss(self, images: Tensor, chosen_B: Tensor, told: Bags, on_P: Tensor) -> Tensor:
        """The symmetric loss; chosen_B: which of the N texts belong to the pictures."""
        scale = self.log_scale.exp().clamp(max=LARGEST_SCALE)
        text_ND = F.normalize(self.texts(told, on_P), dim=1)
        scores_BN = scale * F.normalize(self.pictures(images), dim=1) @ text_ND.T
        own = torch.arange(len(chosen_B))
        return (F.cross_entropy(scores_BN, chosen_B) + F.cross_entropy(scores_BN[:, chosen_B].T, own)) / 2


def _sized(images: Tensor) -> Tensor:
    if images.shape[-2:] == (SIZE, SIZE):
        return images
    return F.interpolate(images, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False).clamp(-1, 1)


# -- pictures ---------------------------------------------------------------------------------------------------------


def changed(x: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures in [-1, 1] shifted by up to 3 of 32 pixels, scaled by up to 15 %, softened, recoloured and made noisy.

    Each is changed in its own way; what comes in from outside is white.
    """

    def even(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    count = len(x)
    grid_B23 = torch.zeros(count, 2, 3)
    scale_B = 1 + 0.3 * (even(count) - 0.5)
    grid_B23[:, 0, 0] = grid_B23[:, 1, 1] = scale_B
    grid_B23[:, :, 2] = (even(count, 2) - 0.5) * 12 / SIZE
    grid = F.affine_grid(grid_B23, list(x.shape), align_corners=False)
    x = F.grid_sample(x - 1, grid, mode="bilinear", padding_mode="zeros", align_corners=False) + 1
    soft = torch.where(even(count, 1, 1, 1) < 0.5, blurred(x), coarse(x, x.shape[-1] // 2))
    x = x.lerp(soft, even(count, 1, 1, 1) * (even(count, 1, 1, 1) < 0.6))
    x = x * (1 + 0.3 * (even(count, 3, 1, 1) - 0.5)) + 0.3 * (even(count, 1, 1, 1) - 0.5)
    noise = torch.randn(x.shape, generator=generator) * (0.2 * even(count, 1, 1, 1))
    return (x + noise).clamp(-1, 1)


def blurred(x: Tensor) -> Tensor:
    """A binomial blur with a standard deviation of about 1.4 pixels, twice [1 4 6 4 1] / 16."""
    row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    channels = x.shape[1]
    for _ in range(2):
        for kernel in (row.view(1, 1, 1, 5), row.view(1, 1, 5, 1)):
            padding = (2, 2, 0, 0) if kernel.shape[-1] == 5 else (0, 0, 2, 2)
            x = F.conv2d(F.pad(x, padding, "replicate"), kernel.expand(channels, 1, -1, -1), groups=channels)
    return x


def coarse(x: Tensor, side: int) -> Tensor:
    """Pictures with only so many pixels a side, brought back to their size."""
    small = F.adaptive_avg_pool2d(x, side)
    return F.interpolate(small, x.shape[-2:], mode="bilinear", align_corners=False)


# -- training ---------------------------------------------------------------------------------------------------------


def _quiet(sentence: str) -> None:
    """Says nothing."""


def train(images: Tensor, texts: Sequence[Sequence[str]], seed: int, steps: int = STEPS, say: Say = _quiet) -> Matcher:
    """A matcher of these uint8 pictures and texts, whose first part is the name; a function of all arguments.

    The result is the same for the same number of threads.
    """
    vocabulary = sorted({term for parts in texts for part in parts for term in terms(part)})
    started = time.process_time()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix(seed, "matcher", "initialisation"))
        matcher = Matcher(vocabulary).train()
    generator = torch.Generator().manual_seed(mix(seed, "matcher", "training"))
    x, told = _sized(to_float(images)), bags(texts, matcher.vocabulary)
    optimizer = torch.optim.AdamW(matcher.parameters(), LEARNING_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
    order = torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        if len(order) < min(BATCH, len(x)):
            order = torch.randperm(len(x), generator=generator)
        chosen, order = order[:BATCH], order[BATCH:]
        rate = half_cosine(LEARNING_RATE, 0.0, step / steps) * min(1.0, (step + 1) / WARM_UP_STEPS)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = matcher.loss(changed(x[chosen], generator), chosen, told, told.chosen(generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 100 == 0:
            say(f"matcher: {step + 1} of {steps} steps, loss {loss.item():.3f}")
    matcher.cpu_sec = round(time.process_time() - started, 1)
    return matcher.eval().requires_grad_(False)


def matcher_of(
    images: Tensor,
    texts: Sequence[Sequence[str]],
    seed: int,
    steps: int = STEPS,
    folder: Path | None = None,
    say: Say = _quiet,
) -> Matcher:
    """`train`, or what it made before of the same arguments with the same program.

    folder: where matchers are kept; by default in imagekiln's cache.
    """
    told = hashlib.blake2b(Path(__file__).read_bytes(), digest_size=16)
    told.update(images.numpy().tobytes())
    told.update(json.dumps([seed, steps, *texts]).encode())
    path = (folder or cache_folder() / "matchers") / f"{told.hexdigest()}.safetensors"
    if path.is_file():
        with safe_open(path, "pt") as file:
            about = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
        matcher = Matcher(json.loads(about["vocabulary"]), float(about["cpu_sec"]))
        matcher.load_state_dict(tensors)
        return matcher.eval().requires_grad_(False)
    matcher = train(images, texts, seed, steps, say)
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"vocabulary": json.dumps(list(matcher.vocabulary)), "cpu_sec": str(matcher.cpu_sec)}
    write_whole(path, to_bytes(matcher.state_dict(), about))
    return matcher
