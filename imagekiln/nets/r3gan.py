"""Generator and discriminator of R3GAN: residual networks without normalisation, for any size base * 2^k.

Huang et al. 2024 (arXiv:2501.05441): the two networks mirror each other. A stage at every resolution has residual
blocks of 1x1, grouped 3x3 and 1x1 convolutions with biased leaky ReLUs between them; the first map is a learned basis
weighed by z, the last one is weighed by a learned basis of the same size. Nothing is normalised: blocks begin as the
identity and their inner weights small (Fix-up, Zhang et al. 2019, arXiv:1901.09321): standard deviation
gain / sqrt(fan-in) * L^(-1/4) with L blocks in all, the last convolution 0. Smoothed resampling with [1, 2, 1].

Channels: `width` next to the picture, doubled at each halving, at most `widest`. Parameters of generator and
discriminator with a z of 64, 3 channels and 16 channels a group: 32 pixels (768) 20,732,160 and 20,683,776, with ten
classes 20,781,952 and 21,280,512; 64 pixels (384, at most 768) 22,429,824 and 22,381,440; 256 pixels (96, at most 768)
23,057,952 and 23,009,568; with 32 channels a group and 1000 classes, 32 pixels (1536) 82,914,304 and 86,548,992; 64
pixels (1536) 103,570,432 and 107,205,120.

Shapes: B pictures, Z latent dimensions, E dimensions of a label, C channels, H rows, W columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, softplus

from imagekiln.errors import RecipeError
from imagekiln.nets.dcgan import halvings
from imagekiln.nets.equalized import LEAK, Blur, class_shares, penalizable_conv2d, slopes_of_inputs_alone

TAPS = (1, 2, 1)

LABEL_WIDTH = 64
"""Dimensions a label takes beside z."""

GAIN = math.sqrt(2 / (1 + LEAK**2))
"""Keeps the variance through a leaky ReLU (He et al. 2015)."""


class BiasedLeaky(nn.Module):
    """leaky_relu(x + b, 0.2) with a learned b a channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """x_BCHW, activated."""
        return leaky_relu(x_BCHW + self.bias.to(x_BCHW.dtype)[:, None, None], LEAK)


class Residual(nn.Module):
    """x + 1x1(act(grouped 3x3(act(1x1(x))))), the identity to begin with.

    total: residual blocks in the whole network. expansion: inner channels for each outer one. group: channels of a
    group of the 3x3 convolution.

    >>> x = torch.randn(2, 8, 4, 4)
    >>> torch.equal(Residual(8, total=4, expansion=2, group=4)(x), x)
    True
    """

    def __init__(self, channels: int, total: int, expansion: int, group: int) -> None:
        super().__init__()
        inner = channels * expansion
        gain = GAIN * total ** (-1 / (2 * 3 - 2))  # three layers in a block
        self.body = nn.Sequential(
            _conv(channels, inner, 1, gain),
            BiasedLeaky(inner),
            _conv(inner, inner, 3, gain, groups=max(1, inner // group)),
            BiasedLeaky(inner),
            _conv(inner, channels, 1, 0.0),
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """x_BCHW, same shape."""
        return x_BCHW + self.body(x_BCHW)


class Up(nn.Module):
    """To twice the size, by a 1x1 convolution where the channels change and zeros that are smoothed over."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.project = _conv(before, after, 1, 1.0) if before != after else nn.Identity()
        self.blur = Blur(TAPS)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, after, 2 H, 2 W)."""
        return self.blur.up(self.project(x_BCHW))


class Down(nn.Module):
    """To half the size, by smoothing and a 1x1 convolution where the channels change."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.project = _conv(before, after, 1, 1.0) if before != after else nn.Identity()
        self.blur = Blur(TAPS)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, after, H / 2, W / 2)."""
        return self.project(self.blur.down(x_BCHW))


class Generator(nn.Module):
    """From latent vectors to pictures.

    z_dim: latent dimensions Z. image_shape: (C, H, W). width, widest: channels, see above. num_classes: 0 for a
    generator without labels. blocks: residual blocks a stage. Raises `RecipeError` for an impossible size.

    >>> Generator(64, (1, 28, 28), width=8, widest=16)(torch.randn(2, 64)).shape
    torch.Size([2, 1, 28, 28])
    """

    def __init__(
        self,
        z_dim: int,
        image_shape: tuple[int, int, int],
        width: int,
        widest: int = 768,
        num_classes: int = 0,
        *,
        blocks: int = 2,
        group: int = 16,
        expansion: int = 2,
    ) -> None:
        super().__init__()
        channels, base = plan(image_shape, width, widest, expansion, group)
        self.num_classes = num_classes
        self.labels = _linear(num_classes, LABEL_WIDTH) if num_classes else None
        self.basis = nn.Parameter(torch.randn(channels[0], *base))
        self.project = _linear(z_dim + (LABEL_WIDTH if num_classes else 0), channels[0])
        stages: list[nn.Module] = []
        for index, count in enumerate(channels):
            stages += [Up(channels[index - 1], count)] if index else []
            stages += [Residual(count, blocks * len(channels), expansion, group) for _ in range(blocks)]
        self.main = nn.Sequential(*stages)
        self.picture = _conv(channels[-1], image_shape[0], 1, 1.0)

    def forward(self, z_BZ: Tensor, labels_B: Tensor | None = None) -> Tensor:
        """images_BCHW, around [-1, 1], of standard normal z_BZ. labels_B: int64, -1 = anything; None = all of them."""
        if self.labels is not None:
            label_BE = self.labels(class_shares(labels_B, self.num_classes, len(z_BZ), like=self.labels.weight))
            z_BZ = torch.cat([z_BZ, label_BE.to(z_BZ.dtype)], dim=1)
        x_BCHW = self.basis * self.project(z_BZ)[:, :, None, None]
        return self.picture(self.main(x_BCHW))


class Discriminator(nn.Module):
    """From pictures to one logit each: positive for "real". No picture influences another's. Arguments as above.

    >>> critic = Discriminator((3, 32, 32), width=8, widest=16, num_classes=10)
    >>> critic(torch.zeros(2, 3, 32, 32), torch.tensor([7, -1])).shape
    torch.Size([2])
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        width: int,
        widest: int = 768,
        num_classes: int = 0,
        *,
        blocks: int = 2,
        group: int = 16,
        expansion: int = 2,
    ) -> None:
        super().__init__()
        channels, base = plan(image_shape, width, widest, expansion, group)
        self.num_classes, deepest = num_classes, channels[0]
        self.picture = _conv(image_shape[0], channels[-1], 1, 1.0)
        stages: list[nn.Module] = [
            Residual(channels[-1], blocks * len(channels), expansion, group) for _ in range(blocks)
        ]
        for before, after in pairwise(reversed(channels)):
            stages.append(Down(before, after))
            stages += [Residual(after, blocks * len(channels), expansion, group) for _ in range(blocks)]
        self.main = nn.Sequential(*stages)
        places = base[0] * base[1]
        self.basis = nn.Parameter(torch.randn(deepest, *base) / math.sqrt(places))
        self.head = _linear(deepest, deepest if num_classes else 1)
        self.labels = _linear(num_classes, deepest, gain=1 / math.sqrt(deepest)) if num_classes else None

    def forward(self, images_BCHW: Tensor, labels_B: Tensor | None = None) -> Tensor:
        """logits_B. images_BCHW in [-1, 1]; labels_B as for the generator."""
        x_BCHW = self.main(self.picture(images_BCHW))
        features_BC = (x_BCHW * self.basis.to(x_BCHW.dtype)).sum((2, 3))
        outputs_BC = self.head(features_BC)
        if self.labels is None:
            return outputs_BC.flatten()
        shares_BK = class_shares(labels_B, self.num_classes, len(outputs_BC), like=self.labels.weight)
        return (outputs_BC * self.labels(shares_BK)).sum(1)


# -- the game ---------------------------------------------------------------------------------------------------------


def relativistic_critic(on_real_B: Tensor, on_fake_B: Tensor) -> Tensor:
    """E[softplus(-(D(real) - D(fake)))], real and fake paired by position (Jolicoeur-Martineau 2018; R3GAN, eq. 2).

    >>> round(float(relativistic_critic(torch.zeros(4), torch.zeros(4))), 4)
    0.6931
    """
    return softplus(on_fake_B - on_real_B).mean()


def relativistic_generator(on_real_B: Tensor, on_fake_B: Tensor) -> Tensor:
    """E[softplus(-(D(fake) - D(real)))]: fakes are to look more real than the reals they are paired with."""
    return softplus(on_real_B - on_fake_B).mean()


def penalized_logits(critic: Callable[[Tensor], Tensor], images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """logits_B and the squared length of dD/dx, summed over pixels: squares_B, from one pass through the critic.

    With a graph for the second derivative, also under `torch.no_grad()` and with frozen parameters; in the precision
    around it, since it is taken on every step.

    >>> logits, squares = penalized_logits(lambda x: 4 * x[:, 0, 0, 0], torch.ones(2, 3, 4, 4))
    >>> logits.tolist(), squares.tolist()
    ([4.0, 4.0], [16.0, 16.0])
    """
    with torch.enable_grad():
        images_BCHW = images_BCHW.detach().requires_grad_(True)
        logits_B = critic(images_BCHW).float()
        with slopes_of_inputs_alone():
            (slopes_BCHW,) = torch.autograd.grad(logits_B.sum(), images_BCHW, create_graph=True)
        return logits_B, slopes_BCHW.square().sum((1, 2, 3))


def plan(
    image_shape: tuple[int, int, int], width: int, widest: int, expansion: int, group: int
) -> tuple[list[int], tuple[int, int]]:
    """Channels by resolution, from the coarsest to the picture's, and the coarsest height and width.

    >>> plan((3, 64, 64), 16, 64, 2, 16)
    ([64, 64, 64, 32, 16], (4, 4))
    """
    _, height, side = image_shape
    try:
        count, base = halvings(image_shape)
    except RecipeError:
        raise RecipeError(
            f"R3GAN cannot draw pictures of {height} x {side} pixels: height and width must be 4, 5, 6 or 7 doubled "
            "equally often. Set data.size to one of 8, 16, 28, 32, 48, 64, 96, 128, 256."
        ) from None
    channels = [min(widest, width * 2**level) for level in reversed(range(count + 1))]
    for inner in (channel * expansion for channel in channels):
        if inner > group and inner % group:
            raise RecipeError(
                f"family.group_width = {group}: a layer of {inner} channels does not split into groups of {group}. "
                "Choose family.width and family.widest as multiples of it."
            )
    return channels, base


class Conv2d(nn.Conv2d):
    """A convolution without bias, cheap to differentiate twice."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, after, H, W)."""
        return penalizable_conv2d(x_BCHW, self.weight, padding=self.padding[0], groups=self.groups)  # type: ignore[arg-type]


def _conv(before: int, after: int, kernel: int, gain: float, *, groups: int = 1) -> Conv2d:
    conv = Conv2d(before, after, kernel, padding=kernel // 2, groups=groups, bias=False)
    nn.init.normal_(conv.weight, 0.0, gain / math.sqrt(before // groups * kernel**2))
    return conv


def _linear(inputs: int, outputs: int, gain: float = 1.0) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, 0.0, gain / math.sqrt(inputs))
    return layer
