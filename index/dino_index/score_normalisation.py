"""Score normalisation: how much a query looks like anything at all is taken off its scores (ISC 2021).

A query that resembles many pictures, such as a plain sky, has high cosines with all of them. Its *bias* is the mean
cosine with the pictures of a background set that are most like it, and its scores are cosine - factor * bias. That is
one inner product of vectors with one more channel, [query ‖ -factor * bias] and [reference ‖ 1], so that any
inner-product index computes it.

Shapes: Q queries, B background images, N references, C channels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dino_index.matrix_products import product

MAX_BACKGROUND = 2048
# The background may hold copies of the query: the very best are passed over.
_NUM_PASSED_OVER = 2
_NUM_NEAREST = 10
# Below this many the nearest of the background are not near.
MIN_BACKGROUND = 64


def biases(
    queries_QC: NDArray[np.float32], background_BC: NDArray[np.float32], factor: float = 1.0
) -> NDArray[np.float32]:
    """What to take off the cosines of each query, float32. background_BC: unit vectors, `MIN_BACKGROUND` or more."""
    cosines_QB = product(queries_QC, background_BC.T)
    num_nearest = _NUM_PASSED_OVER + _NUM_NEAREST
    assert cosines_QB.shape[1] >= num_nearest, cosines_QB.shape
    nearest_QK = np.partition(cosines_QB, -num_nearest, axis=1)[:, -num_nearest:]
    nearest_QK.sort(axis=1)
    means_Q: NDArray[np.float32] = factor * nearest_QK[:, :_NUM_NEAREST].mean(axis=1)
    return means_Q


def extended_queries(queries_QC: NDArray[np.float32], biases_Q: NDArray[np.float32]) -> NDArray[np.float32]:
    """Queries with the channel that takes their bias off."""
    return np.ascontiguousarray(np.concatenate([queries_QC, -biases_Q[:, None]], axis=1), np.float32)


def extended_references(references_NC: NDArray[np.float32]) -> NDArray[np.float32]:
    """References with the channel that a query's bias meets."""
    ones_N1 = np.ones((len(references_NC), 1), np.float32)
    return np.concatenate([references_NC, ones_N1], axis=1, dtype=np.float32)
