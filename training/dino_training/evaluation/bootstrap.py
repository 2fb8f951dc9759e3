"""Confidence intervals by bootstrap: how much a figure would change with other queries of the same kind.

Queries are drawn with replacement, as many as there are; the interval holds the middle 95 % of what the figure then is.
It says nothing about other references, other training images or other runs of the training.

Shapes: Q queries, S samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

NUM_SAMPLES = 500
_CONFIDENCE = 0.95
_SEED = 0
# Draws of so many queries are in memory at a time.
_MAX_DRAWN = 1 << 24

Interval = tuple[float, float]
"""(low, high)."""


def drawn_counts(num_queries: int, *, seed: int = _SEED, num_samples: int = NUM_SAMPLES) -> Iterator[NDArray[np.int64]]:
    """times_Q of each sample: how often each query was drawn. The same ones for the same arguments."""
    rng = np.random.default_rng(seed)
    for _ in range(num_samples):
        yield np.bincount(rng.integers(num_queries, size=num_queries), minlength=num_queries)


def interval_of_mean(values_Q: NDArray[np.floating] | NDArray[np.bool_], *, seed: int = _SEED) -> Interval:
    """Of the mean of a value that each query has by itself. values_Q: one or more."""
    num_queries = len(values_Q)
    values_Q = values_Q.astype(np.float64)
    rng = np.random.default_rng(seed)
    means: list[NDArray[np.float64]] = []
    left = NUM_SAMPLES
    while left:
        num_drawn = min(left, max(1, _MAX_DRAWN // num_queries))
        means.append(values_Q[rng.integers(num_queries, size=(num_drawn, num_queries))].mean(axis=1))
        left -= num_drawn
    return _middle(np.concatenate(means))


def intervals_of(
    figures_of: Callable[[NDArray[np.int64]], tuple[float, ...]], num_queries: int, *, seed: int = _SEED
) -> list[Interval]:
    """Of figures of all queries together. figures_of: what they are where query q counts times_Q[q] times."""
    samples_SF = np.array([figures_of(times_Q) for times_Q in drawn_counts(num_queries, seed=seed)])
    return [_middle(column) for column in samples_SF.T]


def _middle(values_S: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(values_S, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    return float(low), float(high)
