"""Generator of StyleGAN: a style sets the mean and deviation of the maps of every layer, and noise adds detail.

Karras et al. 2019 (arXiv:1812.04948): a mapping network turns z into w; the generator begins with a learned constant;
every layer adds noise of learned strength a channel, and then (equation 1)

  AdaIN(x, y) = y_s (x - mean(x)) / deviation(x) + y_b,   y = A w + (1, 0),

over each map of each picture. Pixels are doubled and smoothed with [1, 2, 1]. It grows as the progressive GAN does, and
its discriminator is that one's with smoothing before halving (`nets.pggan`).

Channels: `width` next to the full picture, doubled at each halving, at most `widest`. Parameters with a z of 512, eight
mapping layers (2,101,248 of them) and 3 channels, growing from 4 pixels: 32 pixels (512) 22,841,356; 64 pixels (256)
25,137,935; 256 pixels (64) 26,086,229; 1024 pixels (16) 26,219,627. Growing from 8, as in the paper, leaves out the
coarsest layer that makes pictures: 1,539 fewer.

Shapes: B pictures, Z latent and style dimensions, L places a style enters, N values of noise, C channels, H rows, W
columns.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from imagekiln.nets.equalized import ACTIVATION_GAIN, EPSILON, Blur, EqualConv2d, EqualLinear, leaky
from imagekiln.nets.pggan import TAPS, doubled, plan, stage_at
from imagekiln.nets.stylegan2 import StyleDriven


def instance_norm(x_BCHW: Tensor) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-8) over every map, in float32 at least, any dtype out.

    >>> instance_norm(torch.tensor([[[[1.0, 3.0]]]])).flatten().tolist()
    [-1.0, 1.0]
    """
    wide_BCHW = x_BCHW.to(torch.promote_types(x_BCHW.dtype, torch.float32))
    centred_BCHW = wide_BCHW - wide_BCHW.mean(dim=(2, 3), keepdim=True)
    variance_BC11 = centred_BCHW.square().mean(dim=(2, 3), keepdim=True)
    return (centred_BCHW * (variance_BC11 + EPSILON).rsqrt()).to(x_BCHW.dtype)


class AdaIn(nn.Module):
    """Adaptive instance normalisation: maps with the deviation and the mean that a style asks for.

    channels: of the maps. style: length of w.

    >>> styled = AdaIn(4, style=8)(torch.randn(2, 4, 5, 5), torch.zeros(2, 8))
    >>> styled.std(dim=(2, 3), correction=0).allclose(torch.ones(2, 4))
    True
    """

    def __init__(self, channels: int, style: int) -> None:
        super().__init__()
        self.affine = EqualLinear(style, 2 * channels)

    def forward(self, x_BCHW: Tensor, style_BZ: Tensor) -> Tensor:
        """x_BCHW, normalised and styled."""
        scale_BC, shift_BC = self.affine(style_BZ).to(x_BCHW.dtype).chunk(2, dim=1)
        return instance_norm(x_BCHW) * (1 + scale_BC[:, :, None, None]) + shift_BC[:, :, None, None]


class Styled(nn.Module):
    """A layer of the generator: convolution (of all but the first), noise, bias, leaky ReLU, style.

    before: channels that come in; 0 for the layer on the constant, which has no convolution. up: double the size before
    the convolution and smooth after it.
    """

    def __init__(self, before: int, after: int, style: int, *, up: bool = False) -> None:
        super().__init__()
        self.convolve = EqualConv2d(before, after, 3, bias=False, gain=ACTIVATION_GAIN) if before else None
        self.blur = Blur(TAPS) if up else None
        self.noise_strength = nn.Parameter(torch.zeros(after))
        self.bias = nn.Parameter(torch.zeros(after))
        self.adain = AdaIn(after, style)

    def forward(self, x_BCHW: Tensor, style_BZ: Tensor, noise_BN: Tensor) -> Tensor:
        """noise_BN: standard normal, one value a place of the output."""
        if self.blur is not None:
            x_BCHW = doubled(x_BCHW)
        if self.convolve is not None:
            x_BCHW = self.convolve(x_BCHW)
        if self.blur is not None:
            x_BCHW = self.blur(x_BCHW)
        noise_B1HW = noise_BN.view(-1, 1, *x_BCHW.shape[2:])
        shift_BCHW = noise_B1HW * self.noise_strength[:, None, None] + self.bias[:, None, None]
        return self.adain(leaky(x_BCHW + shift_BCHW.to(x_BCHW.dtype), gain=1), style_BZ)


class Generator(StyleDriven):
    """From latent vectors to styles (`mapping`), and from styles and noise to pictures (`synthesize`).

    z_dim: length of z and of the styles. num_classes: 0 for a generator without labels. Other arguments and `level` as
    in `nets.pggan.Generator`. Raises `RecipeError` for an impossible size.

    >>> net = Generator(16, (3, 28, 28), width=4, widest=8)
    >>> net.noise_size == 16 + 2 * (7 * 7 + 14 * 14 + 28 * 28)
    True
    >>> net(torch.randn(2, net.noise_size), level=0.5).shape
    torch.Size([2, 3, 14, 14])
    """

    level: Tensor

    def __init__(
        self,
        z_dim: int,
        image_shape: tuple[int, int, int],
        width: int,
        widest: int = 512,
        mapping_layers: int = 8,
        num_classes: int = 0,
        grow_from: int = 4,
    ) -> None:
        channels, (height, side), first = planned = plan(image_shape, width, widest, grow_from)
        super().__init__(z_dim, 2 * len(channels), mapping_layers, num_classes)
        self.plan = planned
        self.register_buffer("level", torch.tensor(float(first)))
        self.constant = nn.Parameter(torch.ones(channels[0], height, side))
        self.layers = nn.ModuleList([Styled(0, channels[0], z_dim), Styled(channels[0], channels[0], z_dim)])
        for before, after in pairwise(channels):
            self.layers += [Styled(before, after, z_dim, up=True), Styled(after, after, z_dim)]
        self.pictures = nn.ModuleList(EqualConv2d(count, image_shape[0], 1) for count in channels[first:])
        self._noise_sizes = [height * side * 4 ** (index // 2) for index in range(len(self.layers))]
        self.noise_size = z_dim + sum(self._noise_sizes)

    def forward(
        self,
        noise_BN: Tensor,
        labels_B: Tensor | None = None,
        *,
        level: float,
        truncation: float = 1.0,
        truncated: int | None = None,
    ) -> Tensor:
        """images_BCHW, around [-1, 1], from all that is random of a picture: standard normal (B, noise_size).

        truncation: of the styles of the first `truncated` places (None = all), see `pulled`.
        """
        style_BZ = self.mapping(noise_BN[:, : self.z_dim], labels_B)
        styles_BLZ = style_BZ[:, None].expand(-1, self.num_styles, -1)
        if truncation != 1:
            count = self.num_styles if truncated is None else truncated
            typical_BZ = self.pulled(style_BZ, truncation)
            styles_BLZ = self.mixed(typical_BZ, style_BZ, torch.full((len(style_BZ),), count, device=style_BZ.device))
        return self.synthesize(styles_BLZ, noise_BN[:, self.z_dim :], level=level)

    def synthesize(self, styles_BLZ: Tensor, noise_BN: Tensor, *, level: float) -> Tensor:
        """Pictures of a level from one style a layer and the layers' noise, (B, noise_size - z_dim)."""
        stage, alpha = stage_at(level)
        noises = noise_BN.split(self._noise_sizes, dim=1)
        x_BCHW = self.constant.expand(len(styles_BLZ), -1, -1, -1)
        previous_BCHW = x_BCHW
        for index in range(self.styles_at(level)):
            if index == 2 * stage:
                previous_BCHW = x_BCHW
            x_BCHW = self.layers[index](x_BCHW, styles_BLZ[:, index], noises[index])
        picture_BCHW = self._picture(x_BCHW, stage)
        if alpha == 1:
            return picture_BCHW
        return doubled(self._picture(previous_BCHW, stage - 1)).lerp(picture_BCHW, alpha)

    def styles_at(self, level: float) -> int:
        """Places a style enters in the layers that are in use."""
        return 2 * stage_at(level)[0] + 2

    def _picture(self, x_BCHW: Tensor, stage: int) -> Tensor:
        """float32 at least, so that fading is exact."""
        return self.pictures[stage - self.plan.first](x_BCHW).to(self.constant.dtype)
