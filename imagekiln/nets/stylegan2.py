"""Generator and discriminator of StyleGAN2, for pictures of any size base * 2^k with a base of 4 to 7.

Karras et al. 2020 (arXiv:1912.04958): a mapping network turns z into a style w; styles scale the input channels of the
convolutions, and the outputs are divided by the deviation this gives them (demodulation, equations 1 to 3)

  y_o = sum_i s_i W_oi * x_i / sqrt(sum_{i,k} (s_i W_oik)^2 + 1e-8);

every layer adds noise; pictures of all resolutions are summed (skip generator); the discriminator is residual. Labels
and the plain discriminator are those of the ADA paper (Karras et al. 2020, arXiv:2006.06676). The shared convolution
runs between two scalings of its channels, which equals the modulated weights above and is cheaper than one set of
weights a picture.

Channels: `width` next to the picture, doubled at each halving, at most `widest`. With z of 512, the parameters of
generator and discriminator at 3 channels: 32 pixels (512) 19,947,539 and 21,507,073; 64 pixels (256) 22,243,608 and
23,407,361; 256 pixels (64, eight mapping layers) 24,767,458 and 24,001,089; 1024 pixels (32, eight) 30,370,060 and
29,012,513.

Shapes: B pictures, Z latent and style dimensions, L places a style enters, N values of noise, C channels, O output
channels, H rows, W columns, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import conv_transpose2d

from imagekiln.errors import RecipeError
from imagekiln.nets.dcgan import halvings
from imagekiln.nets.equalized import (
    ACTIVATION_GAIN,
    EPSILON,
    Blur,
    EqualConv2d,
    EqualLinear,
    class_shares,
    leaky,
    minibatch_stddev,
    penalizable_conv2d,
    pixel_norm,
)

TAPS = (1, 3, 3, 1)

MAPPING_LR = 0.01
"""How fast the mapping network learns compared with the rest."""

LABEL_LAYERS = 8
"""Layers of the discriminator's own mapping network for labels."""

AVERAGE_DECAY = 0.995
"""Decay of the moving mean of the styles, an update."""


class Mapping(nn.Module):
    """From latent vectors and labels to styles: styles_BZ.

    latent: length of z; 0 for labels alone. width: length of the style, and of the vector of a label.

    >>> Mapping(8, 16, layers=2, num_classes=3)(torch.randn(2, 8), torch.tensor([0, -1])).shape
    torch.Size([2, 16])
    """

    def __init__(self, latent: int, width: int, layers: int, num_classes: int = 0) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.labels = EqualLinear(num_classes, width) if num_classes else None
        first = latent + (width if num_classes else 0)
        self.layers = nn.ModuleList(
            EqualLinear(width if index else first, width, lr_multiplier=MAPPING_LR) for index in range(layers)
        )

    def forward(self, z_BZ: Tensor, labels_B: Tensor | None = None) -> Tensor:
        """z_BZ: standard normal, (B, 0) without a latent. labels_B: int64, -1 = anything; None = all of them -1."""
        x_BZ = pixel_norm(z_BZ) if z_BZ.shape[1] else z_BZ
        if self.labels is not None:
            label_BZ = self.labels(class_shares(labels_B, self.num_classes, len(z_BZ), like=self.labels.weight))
            x_BZ = torch.cat([x_BZ, pixel_norm(label_BZ.to(x_BZ.dtype))], dim=1)
        for layer in self.layers:
            x_BZ = leaky(layer(x_BZ))
        return x_BZ


class StyleDriven(nn.Module):
    """What generators with styles share: the mapping network, the mean of its styles, and styles by place.

    z_dim: length of z and of the styles. num_styles: places a style enters. The rest as for `Mapping`.

    >>> net = StyleDriven(4, 3, 1, 0)
    >>> net.track(torch.ones(2, 4))
    >>> net.pulled(torch.ones(1, 4), truncation=0.0).allclose(net.mean_style)
    True
    """

    mean_style: Tensor

    def __init__(self, z_dim: int, num_styles: int, mapping_layers: int, num_classes: int) -> None:
        super().__init__()
        self.z_dim, self.num_styles = z_dim, num_styles
        self.mapping = Mapping(z_dim, z_dim, mapping_layers, num_classes)
        self.register_buffer("mean_style", torch.zeros(z_dim))

    def pulled(self, style_BZ: Tensor, truncation: float) -> Tensor:
        """mean + truncation * (style - mean) (StyleGAN, appendix B): below 1 more typical, and less different."""
        return self.mean_style + truncation * (style_BZ - self.mean_style)

    def mixed(self, first_BZ: Tensor, second_BZ: Tensor, crossover_B: Tensor) -> Tensor:
        """styles_BLZ that are the first up to place `crossover` and the second from there on."""
        place_L = torch.arange(self.num_styles, device=first_BZ.device)
        use_first_BL = place_L < crossover_B[:, None]
        return torch.where(use_first_BL[:, :, None], first_BZ[:, None], second_BZ[:, None])

    @torch.no_grad()
    def track(self, styles_BZ: Tensor) -> None:
        """Move the mean of the styles, which truncation pulls to, a little towards these."""
        moved = self.mean_style.lerp(styles_BZ.detach().mean(0).to(self.mean_style), 1 - AVERAGE_DECAY)
        self.mean_style.copy_(torch.where(moved.isfinite(), moved, self.mean_style))


class ModulatedConv2d(nn.Module):
    """A convolution whose input channels are scaled by a style, and whose output is brought back to unit variance.

    before, after: channels. style: length of w. demodulate: False for the layers that make pictures. up: double the
    size, by a transposed convolution and a smoothing filter.

    >>> ModulatedConv2d(4, 6, 3, style=8, up=True)(torch.randn(2, 4, 5, 5), torch.randn(2, 8)).shape
    torch.Size([2, 6, 10, 10])
    """

    def __init__(
        self, before: int, after: int, kernel: int, style: int, *, demodulate: bool = True, up: bool = False
    ) -> None:
        super().__init__()
        self.demodulate, self.padding = demodulate, kernel // 2
        self.weight_scale = 1 / math.sqrt(before * kernel**2)
        self.weight = nn.Parameter(torch.randn(after, before, kernel, kernel))
        self.affine = EqualLinear(style, before, bias_start=1.0)
        self.blur = Blur(TAPS) if up else None

    def forward(self, x_BCHW: Tensor, style_BZ: Tensor) -> Tensor:
        """(B, after, H, W), or twice the height and width."""
        weight = self.weight * self.weight_scale
        scale_BC = self.affine(style_BZ)
        x_BCHW = x_BCHW * scale_BC.to(x_BCHW.dtype)[:, :, None, None]
        if self.blur is None:
            y_BOHW = penalizable_conv2d(x_BCHW, weight, padding=self.padding)
        else:
            y_BOHW = conv_transpose2d(x_BCHW, weight.transpose(0, 1), stride=2)
            y_BOHW = self.blur(y_BOHW, padding=1, gain=4.0)
        if not self.demodulate:
            return y_BOHW
        with torch.autocast(x_BCHW.device.type, enabled=False):
            energy_OC = weight.square().sum((2, 3))
            divisor_BO = (scale_BC.to(weight.dtype).square() @ energy_OC.T + EPSILON).rsqrt()
        return y_BOHW * divisor_BO.to(y_BOHW.dtype)[:, :, None, None]


class Styled(nn.Module):
    """A layer of the generator: modulated convolution, noise of learned strength, bias, leaky ReLU."""

    def __init__(self, before: int, after: int, style: int, *, up: bool = False) -> None:
        super().__init__()
        self.convolve = ModulatedConv2d(before, after, 3, style, up=up)
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(after))

    def forward(self, x_BCHW: Tensor, style_BZ: Tensor, noise_BN: Tensor) -> Tensor:
        """noise_BN: standard normal, one value a place of the output."""
        y_BCHW = self.convolve(x_BCHW, style_BZ)
        shift = noise_BN.view(-1, 1, *y_BCHW.shape[2:]) * self.noise_strength
        return leaky(y_BCHW + shift.to(y_BCHW.dtype) + self.bias.to(y_BCHW.dtype)[:, None, None])


class ToPicture(nn.Module):
    """What a map adds to its resolution's picture: a modulated 1x1 convolution without demodulation, and a bias."""

    def __init__(self, before: int, channels: int, style: int) -> None:
        super().__init__()
        self.convolve = ModulatedConv2d(before, channels, 1, style, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x_BCHW: Tensor, style_BZ: Tensor) -> Tensor:
        """(B, channels, H, W) float32 at least, so that the sum over resolutions is exact."""
        y_BCHW = self.convolve(x_BCHW, style_BZ)
        return y_BCHW.to(self.bias.dtype) + self.bias[:, None, None]


class Generator(StyleDriven):
    """From latent vectors to styles (`mapping`), and from styles and noise to pictures (`synthesize`).

    z_dim: length of z and of the styles. width, widest: channels, see above. num_classes: 0 for a generator without
    labels. Raises `RecipeError` for an impossible size.

    >>> net = Generator(16, (3, 28, 28), width=4, widest=8)
    >>> net.noise_size == 16 + 7 * 7 + 2 * 14 * 14 + 2 * 28 * 28
    True
    >>> net(torch.randn(2, net.noise_size)).shape
    torch.Size([2, 3, 28, 28])
    """

    def __init__(
        self,
        z_dim: int,
        image_shape: tuple[int, int, int],
        width: int,
        widest: int = 512,
        mapping_layers: int = 2,
        num_classes: int = 0,
    ) -> None:
        channels, base = plan(image_shape, width, widest)
        super().__init__(z_dim, 2 * len(channels), mapping_layers, num_classes)
        self.base = base
        self.constant = nn.Parameter(torch.randn(channels[0], *self.base))
        self.layers = nn.ModuleList([Styled(channels[0], channels[0], z_dim)])
        for before, after in pairwise(channels):
            self.layers += [Styled(before, after, z_dim, up=True), Styled(after, after, z_dim)]
        self.pictures = nn.ModuleList(ToPicture(count, image_shape[0], z_dim) for count in channels)
        self.blur = Blur(TAPS)
        base_places = self.base[0] * self.base[1]
        self._noise_sizes = [base_places * 4 ** ((index + 1) // 2) for index in range(len(self.layers))]
        self.noise_size = z_dim + sum(self._noise_sizes)

    def forward(self, noise_BN: Tensor, labels_B: Tensor | None = None, truncation: float = 1.0) -> Tensor:
        """images_BCHW, around [-1, 1], from all that is random of a picture: standard normal (B, noise_size).

        truncation: of all styles, see `pulled`.
        """
        style_BZ = self.mapping(noise_BN[:, : self.z_dim], labels_B)
        if truncation != 1:
            style_BZ = self.pulled(style_BZ, truncation)
        return self.synthesize(style_BZ[:, None].expand(-1, self.num_styles, -1), noise_BN[:, self.z_dim :])

    def synthesize(self, styles_BLZ: Tensor, noise_BN: Tensor) -> Tensor:
        """Pictures from one style a place and the layers' noise, (B, noise_size - z_dim).

        A map's picture and the layer after that map take the same style, so there are `num_styles` = layers + 1.
        """
        noises = noise_BN.split(self._noise_sizes, dim=1)
        x_BCHW = self.constant.expand(len(styles_BLZ), -1, -1, -1)
        picture_BCHW: Tensor | None = None
        for index, layer in enumerate(self.layers):
            x_BCHW = layer(x_BCHW, styles_BLZ[:, index], noises[index])
            if index % 2 == 0:
                added_BCHW = self.pictures[index // 2](x_BCHW, styles_BLZ[:, index + 1])
                picture_BCHW = added_BCHW if picture_BCHW is None else self.blur.up(picture_BCHW) + added_BCHW
        return picture_BCHW  # type: ignore[return-value]  # there is always a first layer


class Halving(nn.Module):
    """A discriminator's block: 3x3, smoothed 3x3 of stride 2, and, if residual, a smoothed and halved 1x1 beside."""

    def __init__(self, before: int, after: int, *, residual: bool) -> None:
        super().__init__()
        self.first = EqualConv2d(before, before, 3)
        self.second = EqualConv2d(before, after, 3, stride=2)
        self.shortcut = EqualConv2d(before, after, 1, bias=False, gain=math.sqrt(0.5)) if residual else None
        self.blur = Blur(TAPS)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """x_BCHW -> (B, after, H / 2, W / 2)."""
        y_BCHW = self.second(self.blur(leaky(self.first(x_BCHW)), padding=2))
        if self.shortcut is None:
            return leaky(y_BCHW)
        # half the variance of the sum is the shortcut's
        return leaky(y_BCHW, ACTIVATION_GAIN * math.sqrt(0.5)) + self.shortcut(self.blur.down(x_BCHW))


class Discriminator(nn.Module):
    """From pictures to one logit each: positive for "real".

    stddev_group: pictures that are compared in the minibatch deviation. residual: False for the plain network of the
    CIFAR-10 preset. Other arguments as for `Generator`.

    >>> critic = Discriminator((3, 32, 32), width=4, widest=16, num_classes=10)
    >>> critic(torch.zeros(2, 3, 32, 32), torch.tensor([7, -1])).shape
    torch.Size([2])
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        width: int,
        widest: int = 512,
        num_classes: int = 0,
        *,
        stddev_group: int = 4,
        residual: bool = True,
    ) -> None:
        super().__init__()
        channels, base = plan(image_shape, width, widest)
        deepest, self.stddev_group = channels[0], stddev_group
        channels = channels[::-1]
        self.first = EqualConv2d(image_shape[0], channels[0], 1)
        self.blocks = nn.Sequential(
            *(Halving(before, after, residual=residual) for before, after in pairwise(channels))
        )
        self.last = EqualConv2d(deepest + 1, deepest, 3)
        self.features = EqualLinear(deepest * base[0] * base[1], deepest)
        self.head = EqualLinear(deepest, deepest if num_classes else 1)
        self.labels = Mapping(0, deepest, LABEL_LAYERS, num_classes) if num_classes else None

    def forward(self, images_BCHW: Tensor, labels_B: Tensor | None = None) -> Tensor:
        """logits_B. images_BCHW in [-1, 1]; labels_B as for the generator."""
        x_BCHW = self.blocks(leaky(self.first(images_BCHW)))
        x_BCHW = leaky(self.last(minibatch_stddev(x_BCHW, self.stddev_group)))
        outputs_BC = self.head(leaky(self.features(x_BCHW.flatten(1))))
        if self.labels is None:
            return outputs_BC.flatten()
        label_BC = self.labels(outputs_BC.new_empty(len(outputs_BC), 0), labels_B)
        return (outputs_BC * label_BC).sum(1) / math.sqrt(label_BC.shape[1])


def path_lengths(synthesize: Callable[[Tensor], Tensor], styles_BLZ: Tensor) -> Tensor:
    """How far a random direction of picture space is from moving with the style: lengths_B, with a graph.

    ||J_w^T y|| with y standard normal over the square root of the number of pixels, squared lengths averaged over the
    places the style enters (StyleGAN2, section 3.2 and appendix B). y is drawn from torch's global generator. In
    float32 at least, also under autocast, `torch.no_grad()` and with frozen parameters.

    >>> lengths = path_lengths(lambda w: 3 * w.view(1, 1, 1, 1), torch.zeros(1, 1, 1))
    >>> lengths.shape, bool(lengths > 0)
    (torch.Size([1]), True)
    """
    with torch.enable_grad(), torch.autocast(styles_BLZ.device.type, enabled=False):
        styles_BLZ = styles_BLZ.to(torch.promote_types(styles_BLZ.dtype, torch.float32))
        if not styles_BLZ.requires_grad:
            styles_BLZ = styles_BLZ.detach().requires_grad_(True)
        images_BCHW = synthesize(styles_BLZ)
        pixels = images_BCHW.shape[2] * images_BCHW.shape[3]
        directions_BCHW = torch.randn_like(images_BCHW) / math.sqrt(pixels)
        (slopes_BLZ,) = torch.autograd.grad((images_BCHW * directions_BCHW).sum(), styles_BLZ, create_graph=True)
        return slopes_BLZ.square().sum(2).mean(1).sqrt()


def plan(image_shape: tuple[int, int, int], width: int, widest: int) -> tuple[list[int], tuple[int, int]]:
    """Channels by resolution, from the coarsest to the picture's, and the coarsest height and width.

    >>> plan((3, 64, 64), 16, 64)
    ([64, 64, 64, 32, 16], (4, 4))
    """
    _, height, side = image_shape
    try:
        count, base = halvings(image_shape)
    except RecipeError:
        raise RecipeError(
            f"A StyleGAN cannot draw pictures of {height} x {side} pixels: height and width must be 4, 5, 6 or 7 "
            "doubled equally often. Set data.size to one of 8, 16, 28, 32, 48, 64, 96, 128, 256."
        ) from None
    return [min(widest, width * 2**level) for level in reversed(range(count + 1))], base
