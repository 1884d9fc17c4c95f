"""BigGAN: residual generator and critic with spectral norm, shared class embedding, hierarchical z and self-attention.

Brock et al. 2019 (arXiv:1809.11096, appendix B) and Zhang et al. 2019 (SAGAN, arXiv:1805.08318, section 3), whose
networks differ in how z and label reach the norms. Blocks by the picture's size as in `resnet_gan`: up to 32 pixels all
of 4 * width channels, above a pyramid of `width` channels next to the picture, doubled at each halving, at most 16 x.

Trainable parameters with 3 channels; a label for "anything" adds one row to every label table:

  network           generator: z, width, shared, attention; critic: width      generator    critic
  BigGAN 32         128 flat, 64, 0, none; 64; 10 classes                      4,304,387    4,207,361
  SAGAN 32          128 flat, 64, 0, half; 32; 10 classes                      4,386,308    1,075,586
  BigGAN 32 large   80 in chunks, 96, 128, half; 48; 10 classes                9,416,196    2,415,170
  BigGAN 64         120 in chunks, 64, 128, half; 64; 1000 classes            31,969,540   20,571,842
  SAGAN 128         128 flat, 64, 0, half; 64; 1000 classes                   42,017,412   39,448,258
  BigGAN 128        120 in chunks, 96, 128, half; 96; 1000 classes            70,433,988   87,982,370

Shapes: B pictures, Z latent dimensions, V dimensions of a block's condition, C channels, H rows, W columns, L = H W
places, K = L / 4 places after pooling.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, max_pool2d, relu
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import is_parametrized

from imagekiln.errors import RecipeError
from imagekiln.nets.labels import LabelEmbedding
from imagekiln.nets.resnet_gan import LARGEST_FLAT, block_channels, critic_plan, doublings
from imagekiln.nets.stabilizers import initialize_weight

Init = Literal["orthogonal", "normal", "xavier"]
"""Initial weights: orthogonal matrices, N(0, 0.02), or Glorot's uniform distribution."""

Share = Literal["none", "full", "half", "quarter"]
"""Side of the map with self-attention, as a share of the picture's side."""

HALVINGS = {"full": 0, "half": 1, "quarter": 2}

FLAT_WIDTH = 4
"""Channels of the blocks for pictures up to `LARGEST_FLAT`, in units of `width`."""

AT_64 = (2, 4, 8, 16, 16)
"""Channels of the generator at 64 pixels, by halvings of the picture: the one size where the paper's is wider."""


class SelfAttention(nn.Module):
    """x + gamma o(h(x) softmax(f(x)^T g(x))), the identity at initialisation (Zhang et al. 2019, eqs. 1 to 3).

    f and g have C / 8 channels, h has C / 2; keys and values are max-pooled 2 x 2 (SAGAN's published code). No bias.

    >>> x = torch.randn(2, 16, 6, 4)
    >>> torch.equal(SelfAttention(16)(x), x)
    True
    """

    def __init__(self, channels: int, init: Init = "orthogonal") -> None:
        super().__init__()
        narrow, half = max(1, channels // 8), max(1, channels // 2)
        self.query = _conv(channels, narrow, init, kernel=1, bias=False)
        self.key = _conv(channels, narrow, init, kernel=1, bias=False)
        self.value = _conv(channels, half, init, kernel=1, bias=False)
        self.out = _conv(half, channels, init, kernel=1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """x_BCHW, every place with a share of all others. H and W are at least 2."""
        query_BCL = self.query(x_BCHW).flatten(2)
        key_BCK = max_pool2d(self.key(x_BCHW), 2).flatten(2)
        value_BCK = max_pool2d(self.value(x_BCHW), 2).flatten(2)
        weights_BLK = torch.softmax((query_BCL.transpose(1, 2) @ key_BCK).float(), dim=-1).to(value_BCK.dtype)
        seen_BCHW = (value_BCK @ weights_BLK.transpose(1, 2)).unflatten(2, x_BCHW.shape[2:])
        return x_BCHW + self.gamma * self.out(seen_BCHW)


class ConditionalNorm(nn.Module):
    """Batch normalisation with gain 1 + A v + a[label] and bias B v + b[label]; a plain one without either.

    vector_dim: length V of v, 0 for none. num_classes: classes of the own table of labels, 0 for none.
    """

    def __init__(self, channels: int, vector_dim: int, num_classes: int, init: Init) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=not (vector_dim or num_classes))
        self.gain = _linear(vector_dim, channels, init, bias=False) if vector_dim else None
        self.bias = _linear(vector_dim, channels, init, bias=False) if vector_dim else None
        self.labels = LabelEmbedding(num_classes, 2 * channels) if num_classes else None
        if self.labels is not None:
            initialize_weight(self.labels.table.weight, init)

    def forward(self, x_BCHW: Tensor, vector_BV: Tensor | None, labels_B: Tensor | None) -> Tensor:
        """x_BCHW, normalised, scaled and shifted."""
        x_BCHW = self.norm(x_BCHW)
        if self.gain is not None and self.bias is not None:
            gain_BC, bias_BC = 1 + self.gain(vector_BV), self.bias(vector_BV)
            x_BCHW = x_BCHW * gain_BC[:, :, None, None] + bias_BC[:, :, None, None]
        elif self.labels is not None:
            gain_BC, bias_BC = self.labels(labels_B, len(x_BCHW)).chunk(2, dim=1)
            x_BCHW = x_BCHW * (1 + gain_BC[:, :, None, None]) + bias_BC[:, :, None, None]
        return x_BCHW


class Grow(nn.Module):
    """A generator's block: norm, ReLU, doubling, 3x3, norm, ReLU, 3x3, beside a doubled 1x1."""

    def __init__(self, before: int, after: int, vector_dim: int, num_classes: int, init: Init) -> None:
        super().__init__()
        self.first_norm = ConditionalNorm(before, vector_dim, num_classes, init)
        self.first = _conv(before, after, init)
        self.second_norm = ConditionalNorm(after, vector_dim, num_classes, init)
        self.second = _conv(after, after, init)
        self.shortcut = _conv(before, after, init, kernel=1)

    def forward(self, x_BCHW: Tensor, vector_BV: Tensor | None, labels_B: Tensor | None) -> Tensor:
        """x_BCHW -> (B, after, 2 H, 2 W)."""
        h_BCHW = self.first(_double(relu(self.first_norm(x_BCHW, vector_BV, labels_B))))
        h_BCHW = self.second(relu(self.second_norm(h_BCHW, vector_BV, labels_B)))
        return h_BCHW + _double(self.shortcut(x_BCHW))  # a 1x1 convolution and a doubling commute, and this is cheaper


class Shrink(nn.Module):
    """A critic's block: ReLU, 3x3, ReLU, 3x3 and, if it halves, mean pooling, beside a pooled 1x1 where sizes differ.

    first: the block that sees the picture has no ReLU before it.
    """

    def __init__(self, before: int, after: int, init: Init, *, halve: bool, first: bool) -> None:
        super().__init__()
        self.starts, self.halve = first, halve
        self.first = _conv(before, after, init)
        self.second = _conv(after, after, init)
        self.shortcut = None if before == after and not halve else _conv(before, after, init, kernel=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """x_BCHW -> (B, after, H, W), or half the height and width."""
        h_BCHW = self.second(relu(self.first(x_BCHW if self.starts else relu(x_BCHW))))
        if self.halve:
            x_BCHW, h_BCHW = avg_pool2d(x_BCHW, 2), avg_pool2d(h_BCHW, 2)
        return h_BCHW + (x_BCHW if self.shortcut is None else self.shortcut(x_BCHW))


class Generator(nn.Module):
    """From latent vectors to pictures.

    z_dim: latent dimensions Z. image_shape: (C, H, W). width: see above. num_classes: 0 for a generator without labels.
    shared_dim: length of the one label embedding all norms look at; 0 gives every norm a table of its own.
    hierarchical: cut z into one chunk for the first map and one for every block's norms.
    attention: the map with self-attention; a network without a block that ends in such a map has none.
    Raises `RecipeError` for an impossible size or a z shorter than the number of chunks.

    >>> Generator(80, (3, 32, 32), width=4, num_classes=10)(torch.randn(2, 80)).shape
    torch.Size([2, 3, 32, 32])
    """

    def __init__(
        self,
        z_dim: int,
        image_shape: tuple[int, int, int],
        width: int,
        num_classes: int = 0,
        shared_dim: int = 128,
        hierarchical: bool = True,
        attention: Share = "none",
        init: Init = "orthogonal",
    ) -> None:
        super().__init__()
        count, self.base = doublings(image_shape)
        channels = _generator_channels(image_shape, width, count)
        self.chunks = _chunks(z_dim, count + 1) if hierarchical else [z_dim]
        self.shared = LabelEmbedding(num_classes, shared_dim) if num_classes and shared_dim else None
        if self.shared is not None:
            initialize_weight(self.shared.table.weight, init)
        vector_dim = (self.chunks[-1] if hierarchical else 0) + (shared_dim if self.shared is not None else 0)
        tables = num_classes if self.shared is None and not hierarchical else 0
        if num_classes and hierarchical and not shared_dim:
            raise RecipeError("family.shared_dim = 0: a hierarchical z needs a shared label embedding, such as 128.")
        self.project = _linear(self.chunks[0], channels[0] * self.base[0] * self.base[1], init)
        self.blocks = nn.ModuleList(
            Grow(before, after, vector_dim, tables, init) for before, after in pairwise(channels)
        )
        self.attention_after = count - 1 - HALVINGS.get(attention, count)
        self.attention = SelfAttention(channels[self.attention_after + 1], init) if self.attention_after >= 0 else None
        self.last_norm = nn.BatchNorm2d(channels[-1])
        self.last = _conv(channels[-1], image_shape[0], init)

    def forward(self, z_BZ: Tensor, labels_B: Tensor | None = None) -> Tensor:
        """images_BCHW in [-1, 1] from standard normal z_BZ. labels_B: int64, -1 = anything; None = all of them -1."""
        first_BZ, *chunks = z_BZ.split(self.chunks, dim=1)
        shared = [] if self.shared is None else [self.shared(labels_B, len(z_BZ))]
        x_BCHW = self.project(first_BZ).view(len(z_BZ), -1, *self.base)
        for index, block in enumerate(self.blocks):
            parts = [*chunks[index : index + 1], *shared]
            x_BCHW = block(x_BCHW, torch.cat(parts, dim=1) if parts else None, labels_B)
            if self.attention is not None and index == self.attention_after:
                x_BCHW = self.attention(x_BCHW)
        return self.last(relu(self.last_norm(x_BCHW))).tanh()

    def matrices(self) -> Iterator[Tensor]:
        """The weights of all layers before spectral normalisation as matrices, the shorter side first.

        Of R > K rows in K dimensions not all can be perpendicular, the columns can.
        """
        for module in self.modules():
            if is_parametrized(module, "weight"):
                matrix = module.get_parameter("parametrizations.weight.original").flatten(1)
                yield matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


class Discriminator(nn.Module):
    """From pictures to one logit each: positive for "real". Arguments as for `Generator`.

    The features are summed over places; labels enter as a projection (Miyato & Koyama 2018, arXiv:1802.05637).

    >>> critic = Discriminator((3, 32, 32), width=4, num_classes=10, attention="half")
    >>> critic(torch.zeros(2, 3, 32, 32), torch.tensor([7, -1])).shape
    torch.Size([2])
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        width: int,
        num_classes: int = 0,
        attention: Share = "none",
        init: Init = "orthogonal",
    ) -> None:
        super().__init__()
        plan = critic_plan(image_shape, _flat(image_shape, width))
        blocks: list[nn.Module] = []
        halvings = 0
        for index, (before, after, halve) in enumerate(plan):
            blocks.append(Shrink(before, after, init, halve=halve, first=index == 0))
            halvings += halve
            if halve and halvings == HALVINGS.get(attention):
                blocks.append(SelfAttention(after, init))
        self.blocks = nn.Sequential(*blocks)
        features = plan[-1][1]
        self.head = _linear(features, 1, init)
        self.labels = LabelEmbedding(num_classes, features) if num_classes else None
        if self.labels is not None:
            initialize_weight(self.labels.table.weight, init)
            spectral_norm(self.labels.table)

    def forward(self, images_BCHW: Tensor, labels_B: Tensor | None = None) -> Tensor:
        """logits_B. images_BCHW in [-1, 1]; labels_B as for the generator."""
        features_BC = relu(self.blocks(images_BCHW)).sum((2, 3))
        logits_B = self.head(features_BC).flatten()
        if self.labels is not None:
            logits_B = logits_B + (self.labels(labels_B, len(features_BC)) * features_BC).sum(dim=1)
        return logits_B


def truncate(noise: Tensor, threshold: float) -> Tensor:
    """Standard normal values turned into values of the normal distribution cut to [-threshold, threshold].

    F_cut^-1(F(z)) = sqrt(2) erfinv(erf(z / sqrt 2) erf(threshold / sqrt 2)): the distribution that one gets by drawing
    again whatever lies outside (Brock et al. 2019, section 3.1), as a function of the noise alone, and monotone.

    >>> truncate(torch.tensor([-9.0, 0.0, 0.5, 9.0]), 1.0)
    tensor([-1.0000,  0.0000,  0.3337,  1.0000])
    """
    inside = torch.erf(noise.cpu().double() / math.sqrt(2)) * math.erf(threshold / math.sqrt(2))
    return (math.sqrt(2) * torch.erfinv(inside)).clamp(-threshold, threshold).to(noise)


@torch.no_grad()
def standing(generator: nn.Module, inputs: Iterable[tuple[Tensor, Tensor | None]]) -> nn.Module:
    """A copy whose batch normalisations hold the statistics of these inputs (Brock et al. 2019, appendix C.2).

    Running statistics belong to the weights and the noise of training; averaged weights and truncated noise have
    others. inputs: batches of the generator's arguments, all of one size. The copy is in evaluation mode.
    """
    twin = copy.deepcopy(generator).eval()
    norms = [module for module in twin.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over batches
        norm.train()
    for z_BZ, labels_B in inputs:
        twin(z_BZ, labels_B)
    return twin.eval()


def _flat(image_shape: tuple[int, int, int], width: int) -> int:
    return FLAT_WIDTH * width if max(image_shape[1:]) <= LARGEST_FLAT else width


def _generator_channels(image_shape: tuple[int, int, int], width: int, count: int) -> list[int]:
    """Channels before every block, and after the last one."""
    if image_shape[1:] == (64, 64):
        return [width * factor for factor in reversed(AT_64)]
    return [block_channels(image_shape, _flat(image_shape, width), level) for level in range(count, -1, -1)]


def _chunks(z_dim: int, count: int) -> list[int]:
    """Lengths of the pieces of z; the first one takes what cannot be divided."""
    if z_dim < count:
        raise RecipeError(f"family.z_dim = {z_dim}: pictures of this size take a z of at least {count}, one a block.")
    return [z_dim - (count - 1) * (z_dim // count), *[z_dim // count] * (count - 1)]


def _conv(before: int, after: int, init: Init, *, kernel: int = 3, bias: bool = True) -> nn.Module:
    return _normalised(nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=bias), init)


def _linear(before: int, after: int, init: Init, *, bias: bool = True) -> nn.Module:
    return _normalised(nn.Linear(before, after, bias=bias), init)


def _normalised(layer: nn.Conv2d | nn.Linear, init: Init) -> nn.Module:
    """Initialised first: spectral normalisation starts its power iteration from the weights it finds."""
    initialize_weight(layer.weight, init)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return spectral_norm(layer)


def _double(x_BCHW: Tensor) -> Tensor:
    return interpolate(x_BCHW, scale_factor=2.0, mode="nearest")
