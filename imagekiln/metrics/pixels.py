"""Features from pixels alone: principal components of small pictures, fitted on the reference set.

Weak on meaning and good at what needs no meaning, such as copies and lost modes of small pictures; J. Stein et al.,
Exposing flaws of generative model evaluation metrics, arXiv:2306.04675, use 64 components of pixels for their copying
test. With mean mu and the eigenvectors V of the covariance of the reference pixels x,

    f(x) = V^T (x - mu),    largest variance first, each column of V with its largest entry positive

Numbers depend on the reference the components were fitted on, so the hash covers it.

Shapes: B, N images, C channels, H rows, W columns, P pixels, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from imagekiln.errors import DataError
from imagekiln.metrics.features import weights_hash

LARGEST_SIDE = 32
COMPONENTS = 64


class PixelPCA(nn.Module):
    """A `FeatureNetwork` of the leading principal components of pixels, at most 32x32.

    reference_NCHW: the pictures the components are fitted on, float32 in [-1, 1]; at least two.
    num_features: components; there are fewer when the pictures or their pixels are fewer.

    Raises DataError for fewer than two pictures or another shape.

    >>> reference = torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1).expand(3, 1, 2, 2)
    >>> PixelPCA(reference).features(reference).round(decimals=6).tolist()
    [[-2.0], [0.0], [2.0]]
    """

    name = "pixels-pca"

    def __init__(self, reference_NCHW: Tensor, num_features: int = COMPONENTS) -> None:
        super().__init__()
        if reference_NCHW.ndim != 4 or len(reference_NCHW) < 2:
            raise DataError(
                f"PixelPCA got a reference of shape {tuple(reference_NCHW.shape)}; it needs (pictures, channels, "
                "height, width) with at least 2 pictures."
            )
        self.image_shape = tuple(reference_NCHW.shape[1:])
        rows = _small(reference_NCHW).double()
        mean_P = rows.mean(0)
        components_PD = _components(rows - mean_P, num_features)
        self.num_features = components_PD.shape[1]
        self.mean_P: Tensor
        self.components_PD: Tensor
        self.register_buffer("mean_P", mean_P)
        self.register_buffer("components_PD", components_PD)
        self.eval()

    @property
    def hash(self) -> str:
        """sha256 of mean and components."""
        return weights_hash(self)

    def features(self, images_BCHW: Tensor) -> Tensor:
        """features_BD float32 of images_BCHW float32 in [-1, 1]. Raises DataError for pictures of another shape."""
        if tuple(images_BCHW.shape[1:]) != self.image_shape:
            raise DataError(
                f"PixelPCA got pictures of shape {tuple(images_BCHW.shape[1:])}; its components were fitted on "
                f"{self.image_shape}: bring both sets to one size."
            )
        return ((_small(images_BCHW).double() - self.mean_P) @ self.components_PD).float()

    forward = features


def _small(images_BCHW: Tensor) -> Tensor:
    """Pixels_BP of pictures brought to at most 32x32 by averaging areas."""
    height, width = (min(LARGEST_SIDE, side) for side in images_BCHW.shape[2:])
    if (height, width) != tuple(images_BCHW.shape[2:]):
        images_BCHW = functional.interpolate(images_BCHW, (height, width), mode="area")
    return images_BCHW.flatten(1)


def _components(centred_NP: Tensor, count: int) -> Tensor:
    """Eigenvectors_PD of the covariance, largest eigenvalue first; directions without variance are left out."""
    few = len(centred_NP) < centred_NP.shape[1]  # then the pictures' inner products have the same eigenvalues
    values, vectors = torch.linalg.eigh(centred_NP @ centred_NP.T if few else centred_NP.T @ centred_NP)
    rank = int((values > values[-1].clamp(min=0) * 1e-12).sum())
    leading = vectors.flip(1)[:, : max(1, min(count, rank))]
    if few:
        leading = functional.normalize(centred_NP.T @ leading, dim=0)
    largest = leading.gather(0, leading.abs().argmax(0, keepdim=True))
    return (leading * largest.sign()).contiguous()
