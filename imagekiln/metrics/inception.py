"""The Inception network of 2015 that FID, KID and the Inception score are defined on, folded for fast inference.

The layers are those of C. Szegedy et al., Rethinking the Inception Architecture for Computer Vision, arXiv:1512.00567
(table 1, figures 5 to 7 and 10), as in the weights that M. Heusel et al. (arXiv:1706.08500) measured with: 1008 logits,
average pooling that does not count the padding, and a maximum instead of the average in the last block. A layer is

    relu(gamma (W * x - mean) / sqrt(variance + 0.001) + beta) = relu(W' * x + b')

and the second form, computed once in float64 when the file is read, is what runs. A 1x1 convolution of an average is
the average of the 1x1 convolution, so the pooled branch pools after it, on fewer channels, and all 1x1 convolutions of
one input are one.

Shapes: B images, C channels, H rows, W columns, D = 2048 features, K = 1008 classes.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from imagekiln.errors import DataError, UsageError
from imagekiln.metrics.features import weights_hash
from imagekiln.metrics.resize import resize

FILE = "pt_inception-2015-12-05-6726825d.pth"
URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""Of the file under both names it is published by, `pt_inception-...` and `weights-inception-...`."""

SIDE = 299
STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "pool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "pool_2")
BLOCKS = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")
NUM_FEATURES = 2048
NUM_CLASSES = 1008
EPSILON = 1e-3
CHUNK = 16
STEM_CHUNK = 2
"""Pictures in one pass, and in one through the large first layers, where few of them fill a processor's cache."""


class Layer(NamedTuple):
    """A convolution without bias, followed by batch normalization and ReLU."""

    inputs: int
    outputs: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: tuple[int, int] = (0, 0)


class Protocol(NamedTuple):
    """What is done to pictures before the network, each as one published program does it.

    filter: a name of `resize.FILTERS`. offset, scale: (x - offset) / scale of pixels x in 0..255.
    """

    filter: str
    offset: float
    scale: float


PROTOCOLS = {
    "tf": Protocol("tf1-bilinear", 128.0, 128.0),
    "pytorch-fid": Protocol("torch-bilinear", 127.5, 127.5),
    "clean-fid": Protocol("pil-bicubic", 128.0, 128.0),
}
"""`tf` is the original program's and torch-fidelity's."""


def layers() -> dict[str, Layer]:
    """All 94 convolutions by the names the published files use.

    >>> table = layers()
    >>> len(table), table["Mixed_6b.branch7x7_2"]
    (94, Layer(inputs=128, outputs=128, kernel=(1, 7), stride=1, padding=(0, 3)))
    """
    table = {
        "Conv2d_1a_3x3": Layer(3, 32, (3, 3), 2),
        "Conv2d_2a_3x3": Layer(32, 32, (3, 3)),
        "Conv2d_2b_3x3": Layer(32, 64, (3, 3), 1, (1, 1)),
        "Conv2d_3b_1x1": Layer(64, 80),
        "Conv2d_4a_3x3": Layer(80, 192, (3, 3)),
    }
    for block, inputs, pooled in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
        table |= _named(block, _fine(inputs, pooled))
    table |= _named("6a", _shrink_to_17())
    for block, width in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
        table |= _named(block, _crossed(width))
    table |= _named("7a", _shrink_to_8())
    for block, inputs in (("7b", 1280), ("7c", 2048)):
        table |= _named(block, _spread(inputs))
    return table


class Inception(nn.Module):
    """Features and logits of the Inception network of 2015: a `FeatureNetwork` for three-channel pictures of any size.

    weights: tensors named as in the published files; see `load`.
    protocol: how pictures are brought to 299x299 and scaled; a name of `PROTOCOLS`.
    dtype: what the convolutions compute in. Features are float32 always; with bfloat16 they are no longer those that
        published numbers are about, and `name` says so.

    Raises UsageError for an unknown protocol, DataError for tensors that are missing or of another shape.

    >>> network = Inception(random_weights(0))
    >>> network.name, [tuple(found.shape) for found in network.features_and_logits(torch.zeros(1, 3, 8, 8))]
    ('inception-2015', [(1, 2048), (1, 1008)])
    """

    num_features = NUM_FEATURES

    def __init__(self, weights: Mapping[str, Tensor], protocol: str = "tf", dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if protocol not in PROTOCOLS:
            raise UsageError(f"Inception got the protocol {protocol!r}; it knows {', '.join(sorted(PROTOCOLS))}.")
        self.protocol, self.dtype = protocol, dtype
        self.name = "inception-2015" + (f"-{protocol}" if protocol != "tf" else "")
        self.name += f"-{str(dtype).removeprefix('torch.')}" if dtype != torch.float32 else ""
        self.steps = nn.ModuleDict(_folded(weights, dtype))
        self.classes: Tensor
        self.class_bias: Tensor
        self.register_buffer("classes", _checked(weights, "fc.weight", (NUM_CLASSES, NUM_FEATURES)).float())
        self.register_buffer("class_bias", _checked(weights, "fc.bias", (NUM_CLASSES,)).float())
        self.eval().requires_grad_(False)

    @classmethod
    def load(cls, path: Path, protocol: str = "tf", dtype: torch.dtype = torch.float32) -> Inception:
        """The network of a published file, `pt_inception-...pth` or `weights-inception-...pth`.

        Raises DataError when the file is missing, or is not the published one (its sha256 is compared).
        """
        return cls(published_weights(path), protocol, dtype)

    @property
    def hash(self) -> str:
        """sha256 of the weights and of what is done to pictures before them."""
        return hashlib.sha256(f"{weights_hash(self)}:{self.protocol}:{PROTOCOLS[self.protocol]}".encode()).hexdigest()

    def features(self, images_BCHW: Tensor) -> Tensor:
        """features_BD float32 of images_BCHW float32 in [-1, 1]."""
        if not len(images_BCHW):
            return torch.empty(0, NUM_FEATURES, device=images_BCHW.device)
        return torch.cat([self._pooled(part) for part in images_BCHW.split(CHUNK)])

    forward = features

    def features_and_logits(self, images_BCHW: Tensor, bias: bool = False) -> tuple[Tensor, Tensor]:
        """features_BD and logits_BK, float32. The Inception score is defined on logits without the bias."""
        features_BD = self.features(images_BCHW)
        return features_BD, functional.linear(features_BD, self.classes, self.class_bias if bias else None)

    def prepare(self, images_BCHW: Tensor) -> Tensor:
        """What the first layer sees of images_BCHW in [-1, 1]: (B, 3, 299, 299) float32, channels last.

        Pixels are rounded to the 256 levels a picture file has, before they are resized; after that nothing is rounded.
        """
        if images_BCHW.ndim != 4 or images_BCHW.shape[1] != 3:
            raise DataError(
                f"Inception got pictures of shape {tuple(images_BCHW.shape)}; it needs (pictures, 3, height, width): "
                "repeat grey pictures three times."
            )
        filter_name, offset, scale = PROTOCOLS[self.protocol]
        pixels = ((images_BCHW.float() + 1) * 127.5).round().clamp(0, 255)
        resized = resize(pixels.contiguous(memory_format=torch.channels_last), SIDE, filter_name)
        return resized.sub_(offset).div_(scale)

    def walk(self, x_BCHW: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The output of every stage for prepared pictures, by name, as it is computed."""
        x = x_BCHW
        for name in STEM:
            x = self._stem(name, x)
            yield name, x
        for name in BLOCKS:
            x = self._block(name, x)
            yield f"Mixed_{name}", x

    def _pooled(self, images_BCHW: Tensor) -> Tensor:
        parts = []
        for x in map(self.prepare, images_BCHW.split(STEM_CHUNK)):
            for name in STEM:
                x = self._stem(name, x)
            parts.append(x)
        x = torch.cat(parts)
        for name in BLOCKS:
            x = self._block(name, x)
        return x.float().mean((2, 3))

    def _stem(self, name: str, x: Tensor) -> Tensor:
        if name in ("pool_1", "pool_2"):
            return _shrunk(x)
        return self.steps[_key(name)](x.to(self.dtype, memory_format=torch.channels_last))

    def _block(self, name: str, x: Tensor) -> Tensor:
        return {"5": self._block_5, "6": self._block_6, "7": self._block_7}[name[0]](name, x)

    def _step(self, block: str, branch: str, x: Tensor) -> Tensor:
        return self.steps[_key(f"Mixed_{block}.{branch}")](x)

    def _heads(self, block: str, x: Tensor) -> list[Tensor]:
        """The 1x1 convolutions of a block's input, each after ReLU; the pooled branch's last, after its pooling."""
        head = cast(Convolution, self.steps[_key(f"Mixed_{block}")])
        *parts, last = head.convolved(x).split(head.widths, dim=1)
        if head.pooled:
            last = functional.avg_pool2d(last, 3, 1, 1, count_include_pad=False)
        return [functional.relu(part) for part in (*parts, last)]

    def _block_5(self, block: str, x: Tensor) -> Tensor:
        one, five, double, pooled = self._heads(block, x)
        five = self._step(block, "branch5x5_2", five)
        double = self._step(block, "branch3x3dbl_3", self._step(block, "branch3x3dbl_2", double))
        return torch.cat([one, five, double, pooled], 1)

    def _block_6(self, block: str, x: Tensor) -> Tensor:
        if block == "6a":
            double = self._step(block, "branch3x3dbl_2", self._step(block, "branch3x3dbl_1", x))
            double = self._step(block, "branch3x3dbl_3", double)
            return torch.cat([self._step(block, "branch3x3", x), double, _shrunk(x)], 1)
        one, seven, double, pooled = self._heads(block, x)
        for index in (2, 3):
            seven = self._step(block, f"branch7x7_{index}", seven)
        for index in (2, 3, 4, 5):
            double = self._step(block, f"branch7x7dbl_{index}", double)
        return torch.cat([one, seven, double, pooled], 1)

    def _block_7(self, block: str, x: Tensor) -> Tensor:
        if block == "7a":
            three, seven = self._heads(block, x)
            for index in (2, 3, 4):
                seven = self._step(block, f"branch7x7x3_{index}", seven)
            return torch.cat([self._step(block, "branch3x3_2", three), seven, _shrunk(x)], 1)
        one, three, double, *pooled = self._heads(block, x)
        if not pooled:  # the last block takes a maximum, which does not commute with a convolution
            pooled = [self._step(block, "branch_pool", functional.max_pool2d(x, 3, 1, 1))]
        double = self._step(block, "branch3x3dbl_2", double)
        spread = [self._step(block, f"branch3x3_2{side}", three) for side in "ab"]
        spread += [self._step(block, f"branch3x3dbl_3{side}", double) for side in "ab"]
        return torch.cat([one, *spread, *pooled], 1)


class Convolution(nn.Module):
    """A convolution with the normalization folded in, of one layer or of several that share input and kernel.

    On a processor the weights are kept a second time, in the order oneDNN computes in, where torch offers that: it
    saves reordering them for every chunk, and ReLU needs no pass of its own. The numbers are the same to rounding.
    """

    def __init__(self, weight: Tensor, bias: Tensor, layer: Layer, widths: tuple[int, ...], pooled: bool) -> None:
        super().__init__()
        self.weight: Tensor
        self.bias: Tensor
        self.register_buffer("weight", weight.contiguous(memory_format=torch.channels_last))
        self.register_buffer("bias", bias)
        self.stride, self.padding, self.widths, self.pooled = layer.stride, layer.padding, widths, pooled
        self._packed: tuple[int, Tensor] | None = None

    def convolved(self, x: Tensor) -> Tensor:
        """Before ReLU."""
        if self._can_pack(x):
            return self._onednn(x, "none")
        return functional.conv2d(x, self.weight, self.bias, self.stride, self.padding)

    def forward(self, x: Tensor) -> Tensor:
        return self._onednn(x, "relu") if self._can_pack(x) else self.convolved(x).relu_()

    def _can_pack(self, x: Tensor) -> bool:
        return x.device.type == "cpu" and _has_onednn(self.weight.dtype)

    def _onednn(self, x: Tensor, activation: str) -> Tensor:
        strides, padding = [self.stride] * 2, list(self.padding)
        if self._packed is None or self._packed[0] != self.weight.data_ptr():
            weight = self.weight.to_mkldnn()
            packed = _internal().mkldnn_reorder_conv2d_weight(weight, padding, strides, [1, 1], 1, list(x.shape))
            self._packed = self.weight.data_ptr(), packed
        convolve = torch.ops.mkldnn._convolution_pointwise
        return convolve(x, self._packed[1], self.bias, padding, strides, [1, 1], 1, activation, [], "")


def _internal() -> Any:
    """torch's internal functions, whose published types lack an argument."""
    return torch._C._nn


@functools.cache
def _has_onednn(dtype: torch.dtype) -> bool:
    """Whether this torch has the two calls, which are internal to it, with the arguments used here, and this processor
    the dtype: bfloat16 asks for more than AVX2."""
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    try:
        weight, x = torch.ones(16, 16, 1, 1, dtype=dtype), torch.ones(1, 16, 2, 2, dtype=dtype)
        reorder, bias = _internal().mkldnn_reorder_conv2d_weight, torch.zeros(16, dtype=dtype)
        packed = reorder(weight.to_mkldnn(), [0, 0], [1, 1], [1, 1], 1, [1, 16, 2, 2])
        y = torch.ops.mkldnn._convolution_pointwise(x, packed, bias, [0, 0], [1, 1], [1, 1], 1, "relu", [], "")
        return bool((y == 16).all())
    except (AttributeError, RuntimeError, TypeError):
        return False


def published_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of the published file. Raises DataError when it is missing, damaged or another file."""
    where = f"Get it from {URL}{FILE} and put it there."
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"The Inception weights {path} cannot be read ({error.strerror}). {where}") from None
    if found != SHA256:
        raise DataError(
            f"{path} is not the published Inception file: its sha256 is {found[:12]}..., not {SHA256[:12]}.... {where}"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged archive raises is torch's business, and changes
        raise DataError(f"The Inception weights {path} cannot be read ({error}). {where}") from None


def random_weights(seed: int) -> dict[str, Tensor]:
    """Weights of the right names and shapes that keep the size of activations: for speed and for tests of the layers.

    >>> len(random_weights(0))
    472
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weights = {}
    for name, layer in layers().items():
        rows, columns = layer.kernel
        fan_in = layer.inputs * rows * columns
        weights[f"{name}.conv.weight"] = normal(layer.outputs, layer.inputs, rows, columns) * (2 / fan_in) ** 0.5
        weights[f"{name}.bn.weight"] = 1 + 0.1 * normal(layer.outputs)
        weights[f"{name}.bn.bias"] = 0.1 * normal(layer.outputs)
        weights[f"{name}.bn.running_mean"] = 0.1 * normal(layer.outputs)
        weights[f"{name}.bn.running_var"] = 1 + 0.1 * normal(layer.outputs).abs()
    weights["fc.weight"] = normal(NUM_CLASSES, NUM_FEATURES) * NUM_FEATURES**-0.5
    weights["fc.bias"] = 0.1 * normal(NUM_CLASSES)
    return weights


# -- the layer table --------------------------------------------------------------------------------------------------


def _named(block: str, branches: Mapping[str, Layer]) -> dict[str, Layer]:
    return {f"Mixed_{block}.{branch}": layer for branch, layer in branches.items()}


def _fine(inputs: int, pooled: int) -> dict[str, Layer]:
    """At 35x35: figure 5, where one branch keeps a 5x5 kernel."""
    return {
        "branch1x1": Layer(inputs, 64),
        "branch5x5_1": Layer(inputs, 48),
        "branch5x5_2": Layer(48, 64, (5, 5), 1, (2, 2)),
        "branch3x3dbl_1": Layer(inputs, 64),
        "branch3x3dbl_2": Layer(64, 96, (3, 3), 1, (1, 1)),
        "branch3x3dbl_3": Layer(96, 96, (3, 3), 1, (1, 1)),
        "branch_pool": Layer(inputs, pooled),
    }


def _shrink_to_17() -> dict[str, Layer]:
    """From 35x35 to 17x17: figure 10."""
    return {
        "branch3x3": Layer(288, 384, (3, 3), 2),
        "branch3x3dbl_1": Layer(288, 64),
        "branch3x3dbl_2": Layer(64, 96, (3, 3), 1, (1, 1)),
        "branch3x3dbl_3": Layer(96, 96, (3, 3), 2),
    }


def _crossed(width: int) -> dict[str, Layer]:
    """At 17x17: figure 6, 7x7 kernels as a row and a column."""
    return {
        "branch1x1": Layer(768, 192),
        "branch7x7_1": Layer(768, width),
        "branch7x7_2": _row(width, width),
        "branch7x7_3": _column(width, 192),
        "branch7x7dbl_1": Layer(768, width),
        "branch7x7dbl_2": _column(width, width),
        "branch7x7dbl_3": _row(width, width),
        "branch7x7dbl_4": _column(width, width),
        "branch7x7dbl_5": _row(width, 192),
        "branch_pool": Layer(768, 192),
    }


def _row(inputs: int, outputs: int) -> Layer:
    return Layer(inputs, outputs, (1, 7), 1, (0, 3))


def _column(inputs: int, outputs: int) -> Layer:
    return Layer(inputs, outputs, (7, 1), 1, (3, 0))


def _shrink_to_8() -> dict[str, Layer]:
    """From 17x17 to 8x8."""
    return {
        "branch3x3_1": Layer(768, 192),
        "branch3x3_2": Layer(192, 320, (3, 3), 2),
        "branch7x7x3_1": Layer(768, 192),
        "branch7x7x3_2": _row(192, 192),
        "branch7x7x3_3": _column(192, 192),
        "branch7x7x3_4": Layer(192, 192, (3, 3), 2),
    }


def _spread(inputs: int) -> dict[str, Layer]:
    """At 8x8: figure 7, 3x3 kernels as a row beside a column."""
    return {
        "branch1x1": Layer(inputs, 320),
        "branch3x3_1": Layer(inputs, 384),
        "branch3x3_2a": Layer(384, 384, (1, 3), 1, (0, 1)),
        "branch3x3_2b": Layer(384, 384, (3, 1), 1, (1, 0)),
        "branch3x3dbl_1": Layer(inputs, 448),
        "branch3x3dbl_2": Layer(448, 384, (3, 3), 1, (1, 1)),
        "branch3x3dbl_3a": Layer(384, 384, (1, 3), 1, (0, 1)),
        "branch3x3dbl_3b": Layer(384, 384, (3, 1), 1, (1, 0)),
        "branch_pool": Layer(inputs, 192),
    }


# -- folding ----------------------------------------------------------------------------------------------------------


def _heads_of(block: str) -> list[str]:
    """The layers of a block that are computed as one 1x1 convolution, in the order their outputs are split."""
    heads = {
        "5": ["branch1x1", "branch5x5_1", "branch3x3dbl_1", "branch_pool"],
        "6": ["branch1x1", "branch7x7_1", "branch7x7dbl_1", "branch_pool"],
        "7": ["branch1x1", "branch3x3_1", "branch3x3dbl_1", "branch_pool"],
    }[block[0]]
    special: dict[str, list[str]] = {"6a": [], "7a": ["branch3x3_1", "branch7x7x3_1"], "7c": heads[:3]}
    return special.get(block, heads)


def _folded(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, nn.Module]:
    """All convolutions to run, by key."""
    table = layers()
    merged = {f"Mixed_{block}": [f"Mixed_{block}.{head}" for head in _heads_of(block)] for block in BLOCKS}
    inside = {name for names in merged.values() for name in names}
    jobs = {name: [name] for name in table if name not in inside} | {b: names for b, names in merged.items() if names}
    steps: dict[str, nn.Module] = {}
    for name, parts in jobs.items():
        pairs = [_fold(weights, part, table[part]) for part in parts]
        weight, bias = (torch.cat(tensors).to(dtype) for tensors in zip(*pairs, strict=True))
        widths = tuple(table[part].outputs for part in parts)
        pooled = len(parts) > 1 and parts[-1].endswith("branch_pool")
        steps[_key(name)] = Convolution(weight, bias, table[parts[0]], widths, pooled)
    return steps


def _fold(weights: Mapping[str, Tensor], name: str, layer: Layer) -> tuple[Tensor, Tensor]:
    """W' and b' in float64."""
    weight = _checked(weights, f"{name}.conv.weight", (layer.outputs, layer.inputs, *layer.kernel)).double()
    gamma, beta, mean, variance = (
        _checked(weights, f"{name}.bn.{part}", (layer.outputs,)).double()
        for part in ("weight", "bias", "running_mean", "running_var")
    )
    factor = gamma / (variance + EPSILON).sqrt()
    return weight * factor[:, None, None, None], beta - mean * factor


def _checked(weights: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    found = weights.get(name)
    if found is None or tuple(found.shape) != shape:
        given = "nothing" if found is None else f"shape {tuple(found.shape)}"
        raise DataError(f"The Inception weights have {given} under {name}; it should be a tensor of shape {shape}.")
    return found.detach()


def _key(name: str) -> str:
    """A name as torch allows it for a sub-module."""
    return name.replace(".", "-")


def _shrunk(x: Tensor) -> Tensor:
    return functional.max_pool2d(x, 3, 2)
