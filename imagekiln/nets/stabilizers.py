"""Stabilizers of adversarial training besides penalties and augmentation: small things that any game may use.

`Stabilizers` puts those that a recipe turns on into their places; each of them is a function of its own.
Each keeps the discriminator from being too sure, or too blind. Tseng et al. 2021 (arXiv:2104.03310) LeCam; Zhang et al.
2020 (arXiv:1910.12027) and Zhao et al. 2021 (arXiv:2002.04724) consistency; Salimans et al. 2016 (arXiv:1606.03498)
feature matching and minibatch discrimination; Sonderby et al. 2017 (arXiv:1610.04490) and Arjovsky & Bottou 2017
(arXiv:1701.04862) instance noise. Random numbers come from torch's global generator.

Shapes: B pictures, C channels, H rows, W columns, F features, K kernels, D dimensions of a kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from imagekiln.config import StabilizeConfig, StabilizeCriticConfig
from imagekiln.errors import UsageError
from imagekiln.nets.adversarial import Critic
from imagekiln.nets.augmentation import blit

Scheme = Literal["orthogonal", "normal", "xavier", "he"]

LAYERS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)
"""What `initialize` sets."""


# -- the discriminator's answers --------------------------------------------------------------------------------------


class LeCam(nn.Module):
    """E[(D(real) - a_fake)^2] + E[(D(fake) - a_real)^2], a being moving averages of the answers (Tseng et al. 2021).

    Answers to real pictures are pulled to where fakes have been and the other way round, so the discriminator cannot
    drive them apart; for the Wasserstein loss it bounds a LeCam divergence. Without its weight (try 0.3).
    Called in training mode, it first moves the averages towards this batch; they start as the first batch's means.
    A number added to all answers is added to the averages as well, so that games in which only differences of answers
    count (Wasserstein, relativistic) are not given an anchor.

    >>> lecam = LeCam()
    >>> float(lecam(torch.tensor([1.0, 3.0]), torch.tensor([-1.0, -1.0])))
    19.0
    """

    sum_real: Tensor
    sum_fake: Tensor
    mass: Tensor

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        for name in ("sum_real", "sum_fake", "mass"):
            self.register_buffer(name, torch.zeros(()))

    def forward(self, on_real_B: Tensor, on_fake_B: Tensor) -> Tensor:
        """The penalty, a scalar; differentiable by the answers, not by the averages."""
        if self.training:
            self._move(on_real_B, on_fake_B)
        mass = torch.where(self.mass > 0, self.mass, 1.0)  # the sums forget their start: no average leans to 0
        a_real, a_fake = (self.sum_real / mass).to(on_real_B.dtype), (self.sum_fake / mass).to(on_real_B.dtype)
        return (on_real_B - a_fake).square().mean() + (on_fake_B - a_real).square().mean()

    @torch.no_grad()
    def _move(self, on_real_B: Tensor, on_fake_B: Tensor) -> None:
        fresh = torch.stack([on_real_B.mean().float(), on_fake_B.mean().float(), torch.ones_like(self.mass)])
        finite = fresh.isfinite().all()
        for buffer, value in zip((self.sum_real, self.sum_fake, self.mass), fresh, strict=True):
            buffer.copy_(torch.where(finite, buffer.lerp(value, 1 - self.decay), buffer))


def consistency(on_images_B: Tensor, on_changed_B: Tensor) -> Tensor:
    """E[(D(x) - D(T(x)))^2]: an answer is not to depend on a change T that keeps what a picture shows.

    For real pictures it is CR (Zhang et al. 2020), and with a second term for fakes bCR (Zhao et al. 2021);
    both weights are 10 there, and T mirrors and shifts. The game itself is played on unchanged pictures,
    so T need not be one that can be undone. Gradients flow through both answers.

    >>> float(consistency(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])))
    2.0
    """
    return (on_images_B - on_changed_B).square().mean()


def exchange_labels(on_real_B: Tensor, on_fake_B: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Answers with some pairs exchanged, which is to call those real pictures fake and those fakes real.

    share: probability of an exchange, for every pair by position; at most a few percent are of use. Works with any loss
    of the critic, but with a linear one (Wasserstein) does no more than shrink it to 1 - 2 share. Both inputs have the
    same shape; with a share of 0 nothing is drawn.

    >>> [part.tolist() for part in exchange_labels(torch.ones(2), torch.zeros(2), share=1.0)]
    [[0.0, 0.0], [1.0, 1.0]]
    """
    if not share:
        return on_real_B, on_fake_B
    exchanged_B = torch.rand(len(on_real_B), device=on_real_B.device) < share
    return torch.where(exchanged_B, on_fake_B, on_real_B), torch.where(exchanged_B, on_real_B, on_fake_B)


# -- the discriminator's features -------------------------------------------------------------------------------------


def feature_matching(real_BF: Tensor, fake_BF: Tensor) -> Tensor:
    """||E f(real) - E f(fake)||^2, a generator's objective on features of the critic (Salimans et al. 2016, sec. 3.1).

    Differentiable by the features of fakes alone.

    >>> float(feature_matching(torch.ones(4, 3), torch.zeros(2, 3)))
    3.0
    """
    return (real_BF.detach().mean(0) - fake_BF.mean(0)).square().sum()


class MinibatchDiscrimination(nn.Module):
    """Features with numbers attached that say how near the other pictures of the batch are: (B, F + K).

    o_ik = sum over j != i of exp(-||M_ik - M_jk||_1) with M = f T, K kernels of D numbers (Salimans et al. 2016,
    section 3.2; the constant 1 of a picture with itself is left out). A generator that draws one picture over and over
    is found out. Pictures influence one another's logits: not to be used with penalties on the gradient of one picture.

    >>> MinibatchDiscrimination(3, kernels=2)(torch.ones(4, 3))[:, 3:].tolist()[0]
    [3.0, 3.0]
    """

    def __init__(self, features: int, kernels: int = 32, dims: int = 5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features, kernels, dims) / math.sqrt(features))

    def forward(self, x_BF: Tensor) -> Tensor:
        """x_BF with K numbers between 0 and B - 1 behind it."""
        return torch.cat([x_BF, self.nearness(x_BF)], dim=1)

    def nearness(self, x_BF: Tensor) -> Tensor:
        """The numbers alone: o_BK."""
        M_BKD = torch.einsum("bf,fkd->bkd", x_BF, self.weight.to(x_BF.dtype))
        apart_BBK = (M_BKD[:, None] - M_BKD[None]).abs().sum(3)
        others_BB1 = 1 - torch.eye(len(x_BF), dtype=x_BF.dtype, device=x_BF.device)[:, :, None]
        return (torch.exp(-apart_BBK) * others_BB1).sum(1)


# -- the discriminator's pictures -------------------------------------------------------------------------------------


def instance_noise(images_BCHW: Tensor, deviation: float) -> Tensor:
    """images_BCHW + deviation e with e standard normal, for real pictures and fakes alike.

    Two distributions that do not overlap can be told apart by a discriminator without a slope; noise makes them
    overlap (Arjovsky & Bottou 2017; Sonderby et al. 2017). It should fade: see `fading`. Without noise
    nothing is drawn.

    >>> images = torch.zeros(2, 3, 4, 4)
    >>> instance_noise(images, 0.0) is images
    True
    """
    if not deviation:
        return images_BCHW
    return images_BCHW + deviation * torch.randn_like(images_BCHW)


def fading(start: float, fraction: float) -> float:
    """From `start` to 0 along a line, as `fraction`, the share of the run that is done, goes from 0 to 1.

    >>> fading(0.2, 0.0), fading(0.2, 0.75), fading(0.2, 1.0)
    (0.2, 0.05, 0.0)
    """
    return start * (1 - fraction)


def mirrored_and_shifted(images_BCHW: Tensor) -> Tensor:
    """Pictures shifted by up to an eighth of height and width, in whole pixels, and half of them mirrored sideways.

    The change of bCR (Zhao et al. 2021). What moves in is the picture, mirrored at its border.

    >>> mirrored_and_shifted(torch.ones(2, 3, 8, 8)).eq(1).all().item()
    True
    """
    count, _, *size = images_BCHW.shape
    device = images_BCHW.device
    flip_B = torch.rand(count, device=device) < 0.5
    furthest = [round(side / 8) for side in size]
    shifts = [torch.randint(-most, most + 1, (count,), device=device) for most in furthest]
    return blit(images_BCHW, flip_B, torch.zeros_like(shifts[0]), *shifts)


# -- in a game --------------------------------------------------------------------------------------------------------


class Stabilizers(nn.Module):
    """What `family.stabilize` turns on, in the three places where it acts: pictures, answers, and the critic's loss.

    Of what is off nothing is drawn or computed, and there are no buffers.

    >>> stabilize = Stabilizers(StabilizeConfig())
    >>> images, answers = torch.ones(2, 3, 8, 8), torch.ones(2)
    >>> stabilize.seen(images, 0.0) is images, stabilize.exchanged(answers, -answers)[0] is answers
    (True, True)
    """

    def __init__(self, config: StabilizeCriticConfig) -> None:
        super().__init__()
        self.config = config
        self.label_noise = config.label_noise if isinstance(config, StabilizeConfig) else 0.0
        self.lecam = LeCam() if config.lecam else None

    def seen(self, images_BCHW: Tensor, fraction: float) -> Tensor:
        """What the discriminator is to see of real pictures or (augmented) fakes. fraction: share of the run done."""
        return instance_noise(images_BCHW, fading(self.config.instance_noise, fraction))

    def exchanged(self, on_real_B: Tensor, on_fake_B: Tensor) -> tuple[Tensor, Tensor]:
        """The answers that the discriminator's loss is to take for those to real pictures and to fakes."""
        return exchange_labels(on_real_B, on_fake_B, self.label_noise)

    def penalty(self, critic: Critic, seen: Sequence[Tensor], answers: Sequence[Tensor]) -> Tensor | float:
        """What is added to the critic's loss: LeCam and consistency with their weights, 0.0 where there is neither.

        seen: real pictures and fakes as the critic saw them. answers: what it said of each, not exchanged. critic: says
        it of changed pictures. This change comes after augmentation and noise: those the critic is to notice, or the
        generator would learn to make them.
        """
        total: Tensor | float = 0.0
        if self.lecam is not None:
            total = total + self.config.lecam * self.lecam(*answers)
        if self.config.consistency:
            for images_BCHW, on_images_B in zip(seen, answers, strict=True):
                on_changed_B = critic(mirrored_and_shifted(images_BCHW)).float()
                total = total + self.config.consistency * consistency(on_images_B, on_changed_B)
        return total


# -- the start --------------------------------------------------------------------------------------------------------


def initialize_weight(weight: Tensor, scheme: Scheme) -> None:
    """Set one weight, in place, by a scheme of `initialize`; raises `UsageError` for an unknown one."""
    if scheme == "orthogonal":
        nn.init.orthogonal_(weight)
    elif scheme == "normal":
        nn.init.normal_(weight, 0.0, 0.02)
    elif scheme == "xavier":
        nn.init.xavier_uniform_(weight)
    elif scheme == "he":
        nn.init.kaiming_normal_(weight, nonlinearity="relu")
    else:
        raise UsageError(f"No initialisation is called {scheme!r}: choose orthogonal, normal, xavier or he.")


@torch.no_grad()
def initialize(module: nn.Module, scheme: Scheme) -> nn.Module:
    """Set the weights of all linear layers, convolutions and embeddings in a module, biases to zero; the module itself.

    orthogonal: rows perpendicular and of length 1 (Saxe et al. 2014, arXiv:1312.6120; BigGAN). normal: N(0, 0.02^2)
    (DCGAN). xavier: uniform, variance 2 / (fan-in + fan-out) (Glorot & Bengio 2010). he: normal, variance 2 / fan-in
    (He et al. 2015, arXiv:1502.01852). Normalisation layers are left alone. To be used before spectral normalisation,
    which starts from the weights it finds; raises `UsageError` after it, and for an unknown scheme.

    >>> weight = initialize(nn.Linear(4, 4), "orthogonal").weight
    >>> bool(torch.allclose(weight @ weight.T, torch.eye(4), atol=1e-5))
    True
    """
    for name, layer in module.named_modules():
        if not isinstance(layer, LAYERS):
            continue
        if parametrize.is_parametrized(layer, "weight"):
            raise UsageError(
                f"The layer {name or type(layer).__name__!r} has a computed weight (such as a spectrally normalised "
                "one): initialise it before that."
            )
        initialize_weight(layer.weight, scheme)
        bias = getattr(layer, "bias", None)
        if bias is not None:
            nn.init.zeros_(bias)
    return module
