"""Augmentation of what a discriminator sees: DiffAugment, the pipeline of ADA, and how strong it is to be.

Zhao et al. 2020 (arXiv:2006.10738) and Karras et al. 2020 (arXiv:2006.06676, section 2 and appendix B). The
discriminator sees T(picture) of real pictures and fakes alike and never a picture as it is, and the generator learns
through T. So the game compares the distributions T p_data and T p_fake, and it ends at p_fake = p_data only if T, which
acts on distributions, can be undone. Otherwise what T does leaks into the generator.

Every transformation here leaves a picture alone with probability 1 - p and applies a random member of a set otherwise:
T = (1 - p) I + p R. R averages over the set and none of its eigenvalues is longer than 1. Where the set is a whole
group taken evenly (mirroring, quarter turns, all angles, hues, the inversion), R is a projection, T has the eigenvalues
1 and 1 - p, and only p = 1 cannot be undone: then upright pictures are as good as turned ones. For the others p < 1/2
is safe in any case and p < 0.8 in practice. DiffAugment changes every picture, which its paper found not to leak: its
changes are small, a border of zeros tells how far a picture was shifted, and what is cut out of one picture is seen in
others.

All operations are affine functions of the pixels, batched, on the pictures' device, and may be differentiated as often
as one likes; random numbers come from torch's global generator. At p = 0 every picture passes bit by bit. Grey is
treated as a colour picture with three equal channels; of RGBA, A is moved with the rest and keeps its values. Beyond
the border DiffAugment has zeros, ADA's geometry the mirrored picture. The filtering of the ADA paper ("f"), which did
not help there, is left out.

Shapes: B pictures, C channels, H rows, W columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d, grid_sample

from imagekiln.config import AugmentConfig
from imagekiln.core import half_cosine
from imagekiln.errors import RecipeError, did_you_mean

DIFFAUGMENT = ("color", "translation", "cutout")

GROUPS = {
    "blit": ("flip", "turn", "shift"),
    "geometry": ("scale", "rotate", "stretch", "slide"),
    "color": ("brightness", "contrast", "inversion", "hue", "saturation"),
}
"""The three groups that ADA uses unless told otherwise, the paper's "bgc"."""

ADA = (*GROUPS["blit"], *GROUPS["geometry"], *GROUPS["color"])

ADA_MORE = ("noise", "cutout")

INTERVAL_NIMG = 256
"""Real pictures between two corrections of p: four batches of 64 (ADA, section 3)."""

FILTER = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)
"""The orthogonal low-pass of the wavelet symlet 6 (Daubechies 1992)."""

REACH = 5
"""Samples of the doubled map that a pixel takes before its own place."""

CENTRE = sum(index * tap for index, tap in enumerate(FILTER)) / sum(FILTER) - REACH
"""Pixel i stands at 2 i + CENTRE of the doubled map: the filter is not quite symmetric, and delays this much."""


# -- the module -------------------------------------------------------------------------------------------------------


class Augmentation(nn.Module):
    """Random changes of pictures, with the share p of changed ones as a buffer, and with ADA its control.

    config: policy "none" (pictures pass, and there are no buffers), "diffaugment", "ada" (p is adapted) or "ramp"
    (ADA's transformations, p is a function of progress). channels: 1 grey, 3 RGB, 4 RGBA.
    Raises `RecipeError` for an unknown transformation, colours of something else, and a start above the limit.

    The control: r = E[sign(D(real))] goes to 1 as the discriminator learns the training pictures by heart; p rises
    while r is above its target (0.6) and falls while it is below, and runs from 0 to 1 in `speed_kimg` thousands of
    real pictures (ADA, section 3). Nothing waits for the device: p, and what was observed, stay there.

    >>> augment = Augmentation(AugmentConfig(policy="ada"), channels=3)
    >>> images = torch.randn(2, 3, 8, 8)
    >>> torch.equal(augment(images), images), float(augment.p)
    (True, 0.0)
    >>> augment.observe(torch.ones(500))
    >>> augment.adapt(fraction=0.1)
    >>> round(float(augment.p), 6)
    0.001
    """

    p: Tensor
    signs: Tensor
    judged: Tensor

    def __init__(self, config: AugmentConfig, channels: int) -> None:
        super().__init__()
        self.config = config
        self.names: frozenset[str] = frozenset()
        if config.policy == "none":
            return
        self.names = chosen(config.policy, config.transforms)
        colors = {"color", *GROUPS["color"]} & self.names
        if colors and channels not in (1, 3, 4):
            raise RecipeError(
                f"family.augment.transforms: {sorted(colors)[0]!r} changes colours, and these pictures have {channels} "
                "channels. Name transformations without colours, such as 'translation' or 'blit'."
            )
        self.start = 1.0 if config.policy == "diffaugment" else config.p
        if config.policy != "diffaugment" and self.start > config.largest:
            raise RecipeError(
                f"family.augment.p = {self.start:g} is above family.augment.largest = {config.largest:g}. "
                "Lower the one or raise the other."
            )
        self.register_buffer("p", torch.tensor(float(self.start)))
        if config.policy == "ada":
            self.register_buffer("signs", torch.zeros(()))
            self.register_buffer("judged", torch.zeros(()))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """images_BCHW, same shape and dtype, each changed on its own; computed in float32 at least."""
        if not self.names:
            return images_BCHW
        apply = diffaugment if self.config.policy == "diffaugment" else ada
        with torch.autocast(images_BCHW.device.type, enabled=False):
            exact_BCHW = images_BCHW.to(torch.promote_types(images_BCHW.dtype, torch.float32))
            return apply(exact_BCHW, self.p, self.names).to(images_BCHW.dtype)

    @torch.no_grad()
    def observe(self, on_real_B: Tensor) -> None:
        """Take note of the discriminator's logits of augmented training pictures; does nothing in evaluation mode.

        The sign has to mean "real". Where only differences mean something (relativistic losses), D(real) - D(fake).
        """
        if self.training and self.config.policy == "ada":
            self.signs.add_(on_real_B.float().sign().nan_to_num().sum())
            self.judged.add_(len(on_real_B))

    @torch.no_grad()
    def adapt(self, fraction: float) -> None:
        """Move p; to be called once after every training step. fraction: share of the run that is done."""
        if self.config.policy == "ramp":
            self.p.fill_(half_cosine(self.start, self.config.largest, fraction))
        if self.config.policy == "ada":
            due = self.judged >= INTERVAL_NIMG
            share = self.judged / (self.config.speed_kimg * 1000)
            rate = self.signs / self.judged.clamp(min=1)
            moved = adapted(self.p, rate, share, target=self.config.target, largest=self.config.largest)
            self.p.copy_(torch.where(due, moved, self.p))
            self.signs.mul_(~due)
            self.judged.mul_(~due)

    def dials(self) -> Mapping[str, Tensor]:
        """`augment_p` where it is adapted; else there is nothing to turn."""
        return {"augment_p": self.p} if self.config.policy == "ada" else {}


def adapted(p: Tensor, rate: Tensor, share: Tensor, *, target: float, largest: float) -> Tensor:
    """p + sign(rate - target) share, between 0 and `largest`: one correction of the control (ADA, section 3).

    rate: mean sign of the logits of real pictures. share: pictures they were, over those in which p goes from 0 to 1.

    >>> half = torch.tensor(0.5)
    >>> [float(adapted(half, torch.tensor(r), torch.tensor(0.25), target=0.6, largest=0.7)) for r in (0.5, 0.9)]
    [0.25, 0.699999988079071]
    """
    return (p + torch.sign(rate - target) * share).clamp(0.0, largest)


def chosen(policy: str, names: str) -> frozenset[str]:
    """The transformations of a policy that are named, groups written out; all usual ones where none is named.

    Raises `RecipeError` for a name that the policy does not have.

    >>> sorted(chosen("ada", "blit, hue")), sorted(chosen("diffaugment", ""))
    (['flip', 'hue', 'shift', 'turn'], ['color', 'cutout', 'translation'])
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if policy == "diffaugment":
        known: Iterable[str] = DIFFAUGMENT
        wanted = wanted or list(DIFFAUGMENT)
    else:
        known = (*GROUPS, *ADA, *ADA_MORE)
        wanted = wanted or list(GROUPS)
    for name in wanted:
        if name not in known:
            raise RecipeError(
                f"family.augment.transforms: the policy {policy!r} has no transformation {name!r}. "
                f"{did_you_mean(name, list(known))}"
            )
    grouped = GROUPS if policy != "diffaugment" else {}
    return frozenset(part for name in wanted for part in grouped.get(name, (name,)))


# -- which change, and how much ---------------------------------------------------------------------------------------


class _Dice:
    """Random numbers, one a picture; where the coin says no, the value that changes nothing."""

    def __init__(self, images_BCHW: Tensor, p: Tensor) -> None:
        self.count, self.p = len(images_BCHW), p
        self.device, self.dtype = images_BCHW.device, images_BCHW.dtype
        self.thrown_B = torch.zeros(self.count, dtype=torch.bool, device=self.device)

    def coin(self, p: Tensor | None = None) -> Tensor:
        yes_B = torch.rand(self.count, device=self.device) < (self.p if p is None else p)
        self.thrown_B = self.thrown_B | yes_B
        return yes_B

    def uniform(self, low: float, high: float, otherwise: float = 0.0, p: Tensor | None = None) -> Tensor:
        yes_B = self.coin(p)
        value_B = torch.rand(self.count, device=self.device).to(self.dtype) * (high - low) + low
        return torch.where(yes_B, value_B, otherwise)

    def normal(self, deviation: float) -> Tensor:
        yes_B = self.coin()
        return torch.where(yes_B, torch.randn(self.count, device=self.device).to(self.dtype) * deviation, 0.0)

    def power_of_two(self, deviation: float) -> Tensor:
        """2^n with n normal: Lognormal(0, (deviation ln 2)^2)."""
        return torch.exp2(self.normal(deviation))

    def integer(self, end: int) -> Tensor:
        """0, 1, ... end - 1; 0 otherwise."""
        yes_B = self.coin()
        return torch.where(yes_B, torch.randint(end, (self.count,), device=self.device), 0)

    def undo_where_not_thrown(self, changed_BCHW: Tensor, images_BCHW: Tensor) -> Tensor:
        return torch.where(self.thrown_B[:, None, None, None], changed_BCHW, images_BCHW)


def diffaugment(images_BCHW: Tensor, p: Tensor, names: Iterable[str] = DIFFAUGMENT) -> Tensor:
    """DiffAugment (Zhao et al. 2020), each change with probability p a picture.

    "color": brightness + U(-0.5, 0.5), saturation times U(0, 2), contrast times U(0.5, 1.5); "translation": up to an
    eighth of the size, whole pixels; "cutout": a square of half the size. images_BCHW float32 or float64.

    >>> images = torch.randn(2, 3, 8, 8)
    >>> torch.equal(diffaugment(images, torch.tensor(0.0)), images)
    True
    """
    _, channels, height, width = images_BCHW.shape
    names = set(names)
    if "color" in names:
        dice = _Dice(images_BCHW, p)
        strengths = dice.uniform(-0.5, 0.5), dice.uniform(0.0, 2.0, 1.0), dice.uniform(0.5, 1.5, 1.0)
        rgb_BCHW = images_BCHW[:, :3]
        changed_BCHW = dice.undo_where_not_thrown(jitter(rgb_BCHW, *strengths), rgb_BCHW)
        images_BCHW = torch.cat([changed_BCHW, images_BCHW[:, 3:]], dim=1) if channels > 3 else changed_BCHW
    if "translation" in names:
        dice = _Dice(images_BCHW, p)
        yes_B, moves = dice.coin(), []
        for size in (height, width):
            move_B = torch.randint(-round(size / 8), round(size / 8) + 1, (dice.count,), device=dice.device)
            moves.append(torch.where(yes_B, move_B, 0))
        images_BCHW = translate(images_BCHW, *moves)
    return _cut(images_BCHW, p) if "cutout" in names else images_BCHW


def ada(images_BCHW: Tensor, p: Tensor, names: Iterable[str] = ADA) -> Tensor:
    """The pipeline of ADA (Karras et al. 2020, appendix B), each change with probability p a picture.

    In this order: flip left to right (every second time), turn by quarters (half turns where pictures are not square),
    shift by up to an eighth, whole pixels; scale by 2^N(0, 0.2^2), rotate, stretch by s and 1 / s with the same law,
    rotate again, slide by N(0, 0.125^2) sizes; brightness + N(0, 0.2^2), contrast times 2^N(0, 0.5^2), inversion of the
    brightness (every second time), hue by any angle, saturation times 2^N(0, 1); noise of deviation |N(0, 0.1^2)|,
    cutout of half the size. "rotate" stands for two rotations, at least one of which happens with probability p.

    >>> images = torch.randn(2, 3, 8, 8)
    >>> torch.equal(ada(images, torch.tensor(0.0)), images)
    True
    """
    names = set(names)
    if names & set(GROUPS["blit"]):
        images_BCHW = _blitted(images_BCHW, p, names)
    if names & set(GROUPS["geometry"]):
        images_BCHW = _warped(images_BCHW, p, names)
    if names & set(GROUPS["color"]):
        images_BCHW = _recolored(images_BCHW, p, names)
    if "noise" in names:
        deviation_B = _Dice(images_BCHW, p).normal(0.1).abs()
        images_BCHW = images_BCHW + torch.randn_like(images_BCHW) * deviation_B[:, None, None, None]
    return _cut(images_BCHW, p) if "cutout" in names else images_BCHW


def _blitted(images_BCHW: Tensor, p: Tensor, names: set[str]) -> Tensor:
    _, _, height, width = images_BCHW.shape
    dice = _Dice(images_BCHW, p)
    flip_B = dice.integer(2) if "flip" in names else 0 * dice.thrown_B
    turns_B = 0 * flip_B
    if "turn" in names:
        turns_B = dice.integer(4) if height == width else 2 * dice.integer(2)
    rows_B, columns_B = turns_B * 0, turns_B * 0
    if "shift" in names:
        yes_B = dice.coin()
        parts = [torch.rand(dice.count, device=dice.device) / 4 - 1 / 8 for _ in range(2)]
        rows_B, columns_B = (
            torch.where(yes_B, (part * size).round().long(), 0)
            for part, size in zip(parts, (height, width), strict=True)
        )
    return blit(images_BCHW, flip_B > 0, turns_B, rows_B, columns_B)


def _warped(images_BCHW: Tensor, p: Tensor, names: set[str]) -> Tensor:
    _, _, height, width = images_BCHW.shape
    dice = _Dice(images_BCHW, p)
    inverse_B22 = torch.eye(2, dtype=images_BCHW.dtype, device=images_BCHW.device).expand(dice.count, 2, 2)
    shift_B2 = inverse_B22.new_zeros(dice.count, 2)
    either = 1 - (1 - p).sqrt()  # two independent coins of this one, at least one of which says yes with probability p
    if "scale" in names:
        inverse_B22 = inverse_B22 / dice.power_of_two(0.2)[:, None, None]
    if "rotate" in names:
        inverse_B22 = _product(inverse_B22, rotation(dice.uniform(-math.pi, math.pi, p=either)).mT)
    if "stretch" in names:
        factor_B = dice.power_of_two(0.2)
        inverse_B22 = _product(inverse_B22, torch.diag_embed(torch.stack([1 / factor_B, factor_B], dim=1)))
    if "rotate" in names:
        inverse_B22 = _product(inverse_B22, rotation(dice.uniform(-math.pi, math.pi, p=either)).mT)
    if "slide" in names:
        yes_B = dice.coin()
        moves = [torch.randn(dice.count, device=dice.device).to(dice.dtype) / 8 * size for size in (width, height)]
        shift_B2 = torch.where(yes_B[:, None], torch.stack(moves, dim=1), 0.0)
    return dice.undo_where_not_thrown(warp(images_BCHW, inverse_B22, shift_B2), images_BCHW)


def _product(a_B22: Tensor, b_B22: Tensor) -> Tensor:
    """Matrix products in full precision also where the device's own are rounded."""
    return (a_B22[:, :, :, None] * b_B22[:, None]).sum(2)


def _recolored(images_BCHW: Tensor, p: Tensor, names: set[str]) -> Tensor:
    dice = _Dice(images_BCHW, p)
    zero_B = torch.zeros(dice.count, dtype=dice.dtype, device=dice.device)
    brightness_B = dice.normal(0.2) if "brightness" in names else zero_B
    contrast_B = dice.power_of_two(0.5) if "contrast" in names else zero_B + 1
    inversion_B = dice.integer(2) > 0 if "inversion" in names else zero_B > 0
    hue_B = dice.uniform(-math.pi, math.pi) if "hue" in names else zero_B
    saturation_B = dice.power_of_two(1.0) if "saturation" in names else zero_B + 1
    rgb_BCHW = images_BCHW[:, :3]
    changed_BCHW = recolor(rgb_BCHW, brightness_B, contrast_B, inversion_B, hue_B, saturation_B)
    changed_BCHW = dice.undo_where_not_thrown(changed_BCHW, rgb_BCHW)
    return torch.cat([changed_BCHW, images_BCHW[:, 3:]], dim=1) if images_BCHW.shape[1] > 3 else changed_BCHW


def _cut(images_BCHW: Tensor, p: Tensor) -> Tensor:
    _, _, height, width = images_BCHW.shape
    dice = _Dice(images_BCHW, p)
    dice.coin()
    rows_B, columns_B = (torch.randint(size, (dice.count,), device=dice.device) for size in (height, width))
    return dice.undo_where_not_thrown(
        cutout(images_BCHW, rows_B, columns_B, ((height + 1) // 2, (width + 1) // 2)), images_BCHW
    )


# -- the changes themselves -------------------------------------------------------------------------------------------


def mirrored(positions: Tensor, size: int) -> Tensor:
    """Positions beyond a border folded back, the edges of the first and the last of `size` pixels being the mirrors.

    positions: indices or places between them, any shape; the answer is a floating-point tensor.

    >>> mirrored(torch.tensor([-2, -1, 0, 3, 4, 5]), 4).tolist()
    [1.0, 0.0, 0.0, 3.0, 3.0, 2.0]
    """
    return size - (size - (positions + 0.5).remainder(2 * size)).abs() - 0.5


def blit(images_BCHW: Tensor, flip_B: Tensor, turns_B: Tensor, rows_B: Tensor, columns_B: Tensor) -> Tensor:
    """Pictures mirrored left to right where `flip`, then turned, then shifted, all of it exact.

    flip_B: bool. turns_B: int64, quarter turns against the clock; pictures that are not square take even ones only.
    rows_B, columns_B: int64, how far down and to the right; what moves in is the mirrored picture.

    >>> picture = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    >>> zero = torch.zeros(1, dtype=torch.long)
    >>> blit(picture, zero > 0, zero + 1, zero, zero)[0, 0].tolist()
    [[2.0, 4.0], [1.0, 3.0]]
    """
    _, _, H, W = images_BCHW.shape
    index = torch.arange(max(H, W), device=images_BCHW.device)
    rows_BH = mirrored(index[:H] - rows_B[:, None], H).long()
    columns_BW = mirrored(index[:W] - columns_B[:, None], W).long()
    # twice the distance to the middle is a whole number
    y_BHW, x_BHW = (2 * rows_BH - (H - 1))[:, :, None], (2 * columns_BW - (W - 1))[:, None, :]
    turns_B11 = (turns_B % 4)[:, None, None]
    sine_B11 = (turns_B11 == 1).long() - (turns_B11 == 3).long()
    cosine_B11 = (turns_B11 == 0).long() - (turns_B11 == 2).long()
    y_BHW, x_BHW = cosine_B11 * y_BHW + sine_B11 * x_BHW, cosine_B11 * x_BHW - sine_B11 * y_BHW
    x_BHW = torch.where(flip_B[:, None, None], -x_BHW, x_BHW)
    return _picked(images_BCHW, (y_BHW + H - 1) // 2, (x_BHW + W - 1) // 2)


def translate(images_BCHW: Tensor, rows_B: Tensor, columns_B: Tensor) -> Tensor:
    """Pictures shifted down and to the right by whole pixels, zeros moving in.

    >>> picture = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    >>> translate(picture, torch.tensor([1]), torch.tensor([0]))[0, 0].tolist()
    [[0.0, 0.0], [1.0, 2.0]]
    """
    _, _, H, W = images_BCHW.shape
    index = torch.arange(max(H, W), device=images_BCHW.device)
    rows_BH1, columns_B1W = (index[:H] - rows_B[:, None])[:, :, None], (index[:W] - columns_B[:, None])[:, None, :]
    inside_BHW = (rows_BH1 >= 0) & (rows_BH1 < H) & (columns_B1W >= 0) & (columns_B1W < W)
    moved_BCHW = _picked(images_BCHW, rows_BH1.clamp(0, H - 1), columns_B1W.clamp(0, W - 1))
    return torch.where(inside_BHW[:, None], moved_BCHW, 0.0)


def _picked(images_BCHW: Tensor, rows_BHW: Tensor, columns_BHW: Tensor) -> Tensor:
    """The pixels at these rows and columns, the same ones of every channel."""
    _, C, H, W = images_BCHW.shape
    places_BP = (rows_BHW * W + columns_BHW).expand(-1, H, W).flatten(1)
    return images_BCHW.flatten(2).gather(2, places_BP[:, None].expand(-1, C, -1)).unflatten(2, (H, W))


def cutout(images_BCHW: Tensor, rows_B: Tensor, columns_B: Tensor, size: tuple[int, int]) -> Tensor:
    """Pictures with zeros in a box of `size` (height, width) around a pixel, as far as it lies in the picture.

    >>> cutout(torch.ones(1, 1, 3, 3), torch.tensor([0]), torch.tensor([1]), (1, 2))[0, 0].tolist()
    [[0.0, 0.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    _, _, H, W = images_BCHW.shape
    index = torch.arange(max(H, W), device=images_BCHW.device)
    down_BH, along_BW = index[:H] - rows_B[:, None] + size[0] // 2, index[:W] - columns_B[:, None] + size[1] // 2
    box_BHW = ((down_BH >= 0) & (down_BH < size[0]))[:, :, None] & ((along_BW >= 0) & (along_BW < size[1]))[:, None, :]
    return torch.where(box_BHW[:, None], 0.0, images_BCHW)


def jitter(rgb_BCHW: Tensor, brightness_B: Tensor, saturation_B: Tensor, contrast_B: Tensor) -> Tensor:
    """DiffAugment's colours: brightness is added; then distances from a pixel's mean over the channels are multiplied
    by the saturation, and distances from the picture's mean by the contrast.

    >>> picture = torch.tensor([1.0, 0.0, -1.0]).view(1, 3, 1, 1)
    >>> jitter(picture, *torch.tensor([[0.5], [2.0], [0.5]])).flatten().tolist()
    [1.5, 0.5, -0.5]
    """
    brightness, saturation, contrast = (
        value[:, None, None, None] for value in (brightness_B, saturation_B, contrast_B)
    )
    x_BCHW = rgb_BCHW + brightness
    mean_B1HW = x_BCHW.mean(dim=1, keepdim=True)
    x_BCHW = mean_B1HW + saturation * (x_BCHW - mean_B1HW)
    mean_B111 = x_BCHW.mean(dim=(1, 2, 3), keepdim=True)
    return mean_B111 + contrast * (x_BCHW - mean_B111)


def recolor(
    rgb_BCHW: Tensor,
    brightness_B: Tensor,
    contrast_B: Tensor,
    inversion_B: Tensor,
    hue_B: Tensor,
    saturation_B: Tensor,
) -> Tensor:
    """ADA's colours, in this order; hue in radians, inversion bool; three channels or one.

    With m the mean of a pixel's channels and d = x - m its colour, the five matrices of the paper come to

      m -> +-contrast (m + brightness),  d -> contrast saturation R(hue) d,

    with a minus where inverted and R the rotation about the grey axis.

    >>> red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)
    >>> zero, third = torch.zeros(1), torch.tensor([2 * math.pi / 3])
    >>> recolor(red, zero, zero + 1, zero > 0, third, zero + 1).flatten().round(decimals=4).abs().tolist()
    [0.0, 1.0, 0.0]
    """
    brightness, contrast, angle, saturation = (
        value[:, None, None, None] for value in (brightness_B, contrast_B, hue_B, saturation_B)
    )
    sign = torch.where(inversion_B, -1.0, 1.0).to(rgb_BCHW.dtype)[:, None, None, None]
    mean_B1HW = rgb_BCHW.mean(dim=1, keepdim=True)
    d_BCHW = rgb_BCHW - mean_B1HW
    across_BCHW = (d_BCHW.roll(1, 1) - d_BCHW.roll(-1, 1)) / math.sqrt(3)  # the grey axis times d
    turned_BCHW = angle.cos() * d_BCHW + angle.sin() * across_BCHW
    return contrast * (sign * (mean_B1HW + brightness) + saturation * turned_BCHW)


def rotation(angle_B: Tensor) -> Tensor:
    """Matrices of rotations by these angles: matrices_B22.

    >>> rotation(torch.tensor([math.pi / 2])).round().abs().tolist()
    [[[0.0, 1.0], [1.0, 0.0]]]
    """
    cosine_B, sine_B = angle_B.cos(), angle_B.sin()
    return torch.stack([cosine_B, -sine_B, sine_B, cosine_B], dim=1).unflatten(1, (2, 2))


def warp(images_BCHW: Tensor, inverse_B22: Tensor, shift_B2: Tensor) -> Tensor:
    """Pictures under x -> A x + shift, x = (column, row) in pixels from the middle, and the inverse of A given.

    The picture is doubled with an orthogonal wavelet filter, read bilinearly at inverse (x - shift), and halved with
    the same filter, so that little is blurred or folded over (ADA, appendix B); where nothing moves it
    comes back as it was, but for the filter's reach from the border. Beyond the border is the mirrored picture.

    >>> images = torch.randn(1, 3, 32, 32)
    >>> same = warp(images, torch.eye(2)[None], torch.zeros(1, 2))
    >>> bool(torch.allclose(same[:, :, 5:-5, 5:-5], images[:, :, 5:-5, 5:-5], atol=1e-5))
    True
    """
    _, C, H, W = images_BCHW.shape
    taps = _taps(images_BCHW.dtype, images_BCHW.device)

    def places(size: int) -> Tensor:
        """Where the samples are that a halved map of this size is made of, in pixels from the middle."""
        samples = torch.arange(-REACH, 2 * size + REACH, dtype=taps.dtype, device=taps.device)
        return (samples - CENTRE) / 2 - (size - 1) / 2

    x_B1W, y_BH1 = places(W) - shift_B2[:, None, :1], (places(H) - shift_B2[:, 1:])[:, :, None]
    grids = []
    for size, row in ((W, 0), (H, 1)):
        across, down = (inverse_B22[:, row, column, None, None] for column in (0, 1))
        source_BHW = across * x_B1W + down * y_BH1 + (size - 1) / 2
        grids.append((2 * (2 * mirrored(source_BHW, size) + CENTRE) + 1) / (2 * size) - 1)
    grid_BHW2 = torch.stack(grids, dim=3)
    read = _Read.apply(_doubled(images_BCHW, taps), grid_BHW2).flatten(0, 1)[:, None]
    taps = taps / math.sqrt(2)
    read = conv2d(conv2d(read, taps.view(1, 1, -1, 1), stride=(2, 1)), taps.view(1, 1, 1, -1), stride=(1, 2))
    return read.unflatten(0, (-1, C))[:, :, 0]


@cache
def _taps(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The filter, copied to a device once: a copy waits for what the device is doing."""
    with torch.inference_mode(False):
        return torch.tensor(FILTER, dtype=dtype, device=device)


def _doubled(images_BCHW: Tensor, taps: Tensor) -> Tensor:
    """(B, C, 2 H, 2 W): zeros between the pixels, then the filter, the picture being mirrored at its border."""
    for axis in (2, 3):
        size = images_BCHW.shape[axis]
        wider = torch.arange(-(REACH + 1) // 2, size + (REACH + 1) // 2, device=images_BCHW.device)
        images_BCHW = images_BCHW.index_select(axis, mirrored(wider, size).long())
    x, taps = images_BCHW.flatten(0, 1)[:, None], taps * math.sqrt(2)
    cut = 2 * ((REACH + 1) // 2) + REACH
    x = conv_transpose2d(x, taps.view(1, 1, -1, 1), stride=(2, 1), padding=(cut, 0))
    x = conv_transpose2d(x, taps.view(1, 1, 1, -1), stride=(1, 2), padding=(0, cut))
    return x.unflatten(0, images_BCHW.shape[:2])[:, :, 0]


class _Read(torch.autograd.Function):
    """Maps read bilinearly at a grid. It is linear in the maps, so its derivative is its adjoint, whose derivative it
    is in turn; PyTorch's own cannot be differentiated twice. The grid gets no gradient."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, grid: Tensor) -> Tensor:
        ctx.save_for_backward(grid)
        ctx.size = maps.shape
        return grid_sample(maps, grid, mode="bilinear", padding_mode="border", align_corners=False)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        (grid,) = ctx.saved_tensors
        return _ReadAdjoint.apply(slope, grid, ctx.size), None


class _ReadAdjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, slope: Tensor, grid: Tensor, size: Sequence[int]) -> Tensor:
        ctx.save_for_backward(grid)
        bilinear, border = 0, 1
        by_maps, _ = torch.ops.aten.grid_sampler_2d_backward(
            slope.contiguous(), slope.new_zeros(size), grid, bilinear, border, False, [True, False]
        )
        return by_maps

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        (grid,) = ctx.saved_tensors
        return _Read.apply(slope, grid), None, None
