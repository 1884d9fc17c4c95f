"""Losses, penalties and constraints of adversarial training: pure functions of logits, pictures and weights.

A critic (discriminator) answers one logit D a picture, positive for "real". Every loss is a mean over the batch, to be
minimised by the network in its name. Sources: Goodfellow et al. 2014 (arXiv:1406.2661) for minimax and non-saturating;
Mao et al. 2017 (arXiv:1611.04076) least squares; Lim & Ye 2017 (arXiv:1705.02894) hinge; Arjovsky et al. 2017
(arXiv:1701.07875) wasserstein and clipping; Gulrajani et al. 2017 (arXiv:1704.00028) the one-centred penalty; Mescheder
et al. 2018 (arXiv:1801.04406) the zero-centred one; Karras et al. 2018 (arXiv:1710.10196) drift; Brock et al. 2019
(arXiv:1809.11096) orthogonality.

Penalties differentiate the critic with respect to its input, with a graph for the second derivative, also under
`torch.no_grad()` and with frozen parameters, and in float32 whatever the precision around them.

Shapes: B pictures, C channels, H rows, W columns, D values of one picture, R rows, K columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

Critic = Callable[[Tensor], Tensor]
"""logits_B of images_BCHW."""


# -- losses of the critic ---------------------------------------------------------------------------------------------


def cross_entropy_critic(
    on_real_B: Tensor,
    on_fake_B: Tensor,
    *,
    smooth_real: float | Tensor = 0.0,
    smooth_fake: float | Tensor = 0.0,
) -> Tensor:
    """-E[log sigma(D(real))] - E[log(1 - sigma(D(fake)))] (Goodfellow et al. 2014, eq. 1), with label smoothing.

    smooth_real, smooth_fake: the targets become 1 - smooth_real and smooth_fake; both in [0, 0.5). A number for all, or
    one a picture: 0.3 * torch.rand(B) are noisy labels.

    With targets a and b the best discriminator answers sigma(D) = (a p_data + b p_fake) / (p_data + p_fake). With b > 0
    the density of the fakes stands in the numerator: where there is no data the fakes are no longer told that they are
    wrong. Smooth the real side only (Salimans et al. 2016, arXiv:1606.03498, section 3.4), unless to study this.

    >>> zero = torch.zeros(4)
    >>> round(float(cross_entropy_critic(zero, zero)), 4)
    1.3863
    """
    real = (1 - smooth_real) * softplus(-on_real_B) + smooth_real * softplus(on_real_B)
    fake = smooth_fake * softplus(-on_fake_B) + (1 - smooth_fake) * softplus(on_fake_B)
    return real.mean() + fake.mean()


def hinge_critic(on_real_B: Tensor, on_fake_B: Tensor) -> Tensor:
    """E[max(0, 1 - D(real))] + E[max(0, 1 + D(fake))] (Lim & Ye 2017; Miyato et al. 2018, eq. 16).

    >>> float(hinge_critic(torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0])))
    1.5
    """
    return relu(1 - on_real_B).mean() + relu(1 + on_fake_B).mean()


def wasserstein_critic(on_real_B: Tensor, on_fake_B: Tensor) -> Tensor:
    """E[D(fake)] - E[D(real)] (Arjovsky et al. 2017, eq. 2): minus the estimated distance, if D is 1-Lipschitz."""
    return on_fake_B.mean() - on_real_B.mean()


def least_squares_critic(on_real_B: Tensor, on_fake_B: Tensor) -> Tensor:
    """(E[(D(real) - 1)^2] + E[D(fake)^2]) / 2 (Mao et al. 2017, eq. 9)."""
    return ((on_real_B - 1).square().mean() + on_fake_B.square().mean()) / 2


# -- losses of the generator ------------------------------------------------------------------------------------------


def minimax_generator(on_fake_B: Tensor) -> Tensor:
    """E[log(1 - sigma(D(fake)))] (Goodfellow et al. 2014, eq. 1).

    Its slope in D is -sigma(D): it vanishes where the discriminator is sure, that is when the generator needs it most.
    """
    return -softplus(on_fake_B).mean()


def non_saturating_generator(on_fake_B: Tensor) -> Tensor:
    """-E[log sigma(D(fake))] (Goodfellow et al. 2014, section 3): the same fixed point, slope sigma(D) - 1."""
    return softplus(-on_fake_B).mean()


def linear_generator(on_fake_B: Tensor) -> Tensor:
    """-E[D(fake)]: the generator's side of both the wasserstein and the hinge loss."""
    return -on_fake_B.mean()


def least_squares_generator(on_fake_B: Tensor) -> Tensor:
    """E[(D(fake) - 1)^2] / 2 (Mao et al. 2017, eq. 9)."""
    return (on_fake_B - 1).square().mean() / 2


# -- penalties --------------------------------------------------------------------------------------------------------


def input_gradients(critic: Critic, images_BCHW: Tensor) -> Tensor:
    """dD/dx of every picture, flattened: gradients_BD, with a graph, so that it can be differentiated again.

    Pictures must not influence one another's logits: no batch normalisation in the critic.
    """
    with torch.enable_grad(), torch.autocast(images_BCHW.device.type, enabled=False):
        images_BCHW = (
            images_BCHW.detach().to(torch.promote_types(images_BCHW.dtype, torch.float32)).requires_grad_(True)
        )
        (gradients_BCHW,) = torch.autograd.grad(critic(images_BCHW).sum(), images_BCHW, create_graph=True)
        return gradients_BCHW.flatten(1)


def gradient_penalty(critic: Critic, real_BCHW: Tensor, fake_BCHW: Tensor) -> Tensor:
    """E[(||dD/dx||_2 - 1)^2] at x = e real + (1 - e) fake, e ~ U[0, 1] a picture (Gulrajani et al. 2017, eq. 3).

    Without its weight lambda. e is drawn from torch's global generator.

    >>> real, fake = torch.randn(2, 8, 3, 4, 4)
    >>> float(gradient_penalty(lambda x: 4 * x[:, 0, 0, 0], real, fake))
    9.0
    """
    share_B111 = torch.rand(len(real_BCHW), 1, 1, 1, device=real_BCHW.device)
    between_BCHW = share_B111 * real_BCHW + (1 - share_B111) * fake_BCHW
    with torch.enable_grad():
        norm_B = torch.linalg.vector_norm(input_gradients(critic, between_BCHW), dim=1)
        return (norm_B - 1).square().mean()


def zero_centred_penalty(critic: Critic, images_BCHW: Tensor) -> Tensor:
    """E[||dD/dx||_2^2]: gamma / 2 times it is R1 on real pictures, R2 on fakes (Mescheder et al. 2018, eqs. 9, 10).

    >>> float(zero_centred_penalty(lambda x: 4 * x[:, 0, 0, 0], torch.randn(8, 3, 4, 4)))
    16.0
    """
    with torch.enable_grad():
        return input_gradients(critic, images_BCHW).square().sum(1).mean()


def drift(on_real_B: Tensor) -> Tensor:
    """E[D(real)^2]: keeps a critic without an anchor near zero; weight 1e-3 (Karras et al. 2018, appendix A.1)."""
    return on_real_B.square().mean()


def orthogonal_penalty(weights: Iterable[Tensor], *, diagonal: bool = False) -> Tensor:
    """Sum over matrices of ||W W^T - I||_F^2, a convolution's kernels being the rows (Brock et al. 2019, section 3.1).

    weights: tensors of two or more dimensions, the first of them the outputs; at least one.
    diagonal: False leaves the diagonal out (the relaxed form): rows are to be perpendicular, their lengths are free.

    >>> float(orthogonal_penalty([2 * torch.eye(3)])), float(orthogonal_penalty([2 * torch.eye(3)], diagonal=True))
    (0.0, 27.0)
    """
    penalties = []
    for weight in weights:
        matrix_RK = weight.flatten(1)
        products_RR = matrix_RK @ matrix_RK.T
        target_R = torch.ones_like(products_RR[0]) if diagonal else products_RR.diagonal()
        penalties.append((products_RR - torch.diag(target_R)).square().sum())
    return torch.stack(penalties).sum()


# -- constraints ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def clip_weights_(parameters: Iterable[Tensor], largest: float) -> None:
    """Cut every value to [-largest, largest], in place (Arjovsky et al. 2017, algorithm 1, line 7)."""
    for parameter in parameters:
        parameter.clamp_(-largest, largest)
