"""PCA whitening of copy vectors: directions in which all pictures differ anyway count less.

Shapes: N vectors, D channels, E channels that are left of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dino_index.matrix_products import product
from dino_index.snapshots import normalise

MIN_IMAGES_PER_DIMENSION = 10
"""Fewer say too little about the directions in which pictures vary least."""

# Full whitening (power 1) blows the smallest directions up to noise: half of it found more copies at every shrinkage.
_POWER = 0.5
_SHRINKAGE = 0.1


@dataclass(frozen=True, eq=False, slots=True)
class Whitening:
    """mean_D, projection_DD: float32. The directions stand in the order of rising variance."""

    mean_D: NDArray[np.float32]
    projection_DD: NDArray[np.float32]

    def apply(self, vectors_ND: NDArray[np.float32]) -> NDArray[np.float32]:
        """Whitened and scaled to unit length."""
        return normalise(product(vectors_ND - self.mean_D, self.projection_DD))

    def reduced(self, num_channels: int) -> Whitening:
        """The same with the directions of the largest variance alone: vectors of E channels. num_channels: 1..D."""
        assert 1 <= num_channels <= self.projection_DD.shape[1], num_channels
        return Whitening(self.mean_D, np.ascontiguousarray(self.projection_DD[:, -num_channels:]))


def fit_whitening(
    vectors_ND: NDArray[np.float32], *, power: float = _POWER, shrinkage: float = _SHRINKAGE
) -> Whitening | None:
    """The whitening that these vectors ask for; None for fewer than 10 a dimension.

    power: 1 gives all directions the same variance, 0 leaves them as they are; the projection scales each by
    variance^(-power/2). shrinkage: 0..1, how far variances are drawn to their mean first (Ledoit and Wolf 2004).
    """
    num_vectors, dim = vectors_ND.shape
    if num_vectors < MIN_IMAGES_PER_DIMENSION * dim:
        return None
    mean_D = vectors_ND.mean(axis=0, dtype=np.float64)
    covariance_DD = np.cov(vectors_ND, rowvar=False, dtype=np.float64)
    variances_D, directions_DD = np.linalg.eigh(covariance_DD)
    average = variances_D.mean()
    if not average > 0:  # equal vectors vary in no direction
        return None
    # Relative to the mean variance, so that the scale of the vectors does not matter.
    shrunk_D = (1 - shrinkage) * np.maximum(variances_D, 0) / average + shrinkage
    projection_DD = directions_DD * shrunk_D ** (-power / 2)
    return Whitening(mean_D.astype(np.float32), projection_DD.astype(np.float32))


def fit_reference_whitening(vectors_ND: NDArray[np.float32]) -> Whitening | None:
    """The whitening of facebookresearch/dino at 7c446df (eval_copy_detection.py); None for fewer than 10 a dimension.

    Unlike `fit_whitening` it takes no mean off, whitens fully, and raises variances to 1e-5 of the largest at least.
    """
    num_vectors, dim = vectors_ND.shape
    if num_vectors < MIN_IMAGES_PER_DIMENSION * dim:
        return None
    wide_ND = vectors_ND.astype(np.float64)
    variances_D, directions_DD = np.linalg.eigh(wide_ND.T @ wide_ND / num_vectors)
    floored_D = np.maximum(variances_D, 1e-5 * variances_D.max())
    return Whitening(np.zeros(dim, np.float32), (directions_DD * floored_D**-0.5).astype(np.float32))
