"""Score normalisation: how much a query looks like anything at all is taken off its scores (ISC 2021).

A query that resembles many pictures, such as a plain sky, has high cosines with all of them. Its *bias* is the mean
cosine with the pictures of a background set that are most like it, and its scores are cosine - bias. That is one inner
product of vectors with one more channel, [query ‖ -bias] and [reference ‖ 1], which any inner-product index computes.

The nearest of few pictures are less near than those of many: biases by a small background are raised to what one of
`MAX_BACKGROUND` would give, so that a score means the same in collections of any size.

Shapes: Q queries, B background images, N references, C channels.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from dino_index.matrix_products import product

MAX_BACKGROUND = 2048
# The background may hold copies of the query: the very best are passed over.
_NUM_PASSED_OVER = 2
_NUM_NEAREST = 10
# Below this many the nearest of the background are not near.
MIN_BACKGROUND = 64
_MEAN_RANK = _NUM_PASSED_OVER + (_NUM_NEAREST + 1) / 2


def biases(queries_QC: NDArray[np.float32], background_BC: NDArray[np.float32]) -> NDArray[np.float32]:
    """What to take off the cosines of each query, float32, but for `size_correction`.

    background_BC: unit vectors, `MIN_BACKGROUND` or more.
    """
    return _mean_of_nearest(product(queries_QC, background_BC.T))


def size_correction(background_BC: NDArray[np.float32]) -> float:
    """What biases by one of `MAX_BACKGROUND` such pictures would be more than those by these; 0 for so many.

    The upper cosines of pictures with one another lie about as those of a normal distribution do, whose deviation
    follows from how much nearer the nearest of all are than those of one half. background_BC: `MIN_BACKGROUND` or more.
    """
    num_background = len(background_BC)
    if num_background >= MAX_BACKGROUND:
        return 0.0
    cosines_BB = product(background_BC, background_BC.T)
    np.fill_diagonal(cosines_BB, -1)
    whole = float(_mean_of_nearest(cosines_BB).mean())
    half = float(np.mean([_mean_of_nearest(cosines_BB[:, first::2]).mean() for first in (0, 1)]))
    of_half, of_whole, of_most = map(_quantile_of_nearest, (num_background / 2, num_background, MAX_BACKGROUND))
    return max(0.0, whole - half) * (of_most - of_whole) / (of_whole - of_half)


def _mean_of_nearest(cosines_QB: NDArray[np.float32]) -> NDArray[np.float32]:
    num_nearest = _NUM_PASSED_OVER + _NUM_NEAREST
    assert cosines_QB.shape[1] >= num_nearest, cosines_QB.shape
    nearest_QK = np.partition(cosines_QB, -num_nearest, axis=1)[:, -num_nearest:]
    nearest_QK.sort(axis=1)
    means_Q: NDArray[np.float32] = nearest_QK[:, :_NUM_NEAREST].mean(axis=1)
    return means_Q


def _quantile_of_nearest(num_background: float) -> float:
    """Where the nearest of so many lie, in deviations above the mean of all."""
    return NormalDist().inv_cdf(1 - _MEAN_RANK / num_background)


def extended_queries(queries_QC: NDArray[np.float32], biases_Q: NDArray[np.float32]) -> NDArray[np.float32]:
    """Queries with the channel that takes their bias off."""
    return np.ascontiguousarray(np.concatenate([queries_QC, -biases_Q[:, None]], axis=1), np.float32)


def extended_references(references_NC: NDArray[np.float32]) -> NDArray[np.float32]:
    """References with the channel that a query's bias meets."""
    ones_N1 = np.ones((len(references_NC), 1), np.float32)
    return np.concatenate([references_NC, ones_N1], axis=1, dtype=np.float32)
