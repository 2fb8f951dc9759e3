"""Approximate nearest vectors: candidates from any FAISS index, compared exactly afterwards.

Shapes: N stored vectors, Q queries, D channels.
"""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from dino_index.exact_search import MAX_FETCHED_GPU, TIE_MARGIN, nearest, scan, selecting
from dino_index.index_types import Rows, num_to_fetch, search_parameters

# Where no more than so many vectors, or this share of all, may be found, comparing them all is as fast as searching
# among the others for them, and misses none.
_MAX_SCANNED = 5_000
_MAX_SCANNED_FRAC = 0.02
# A filter leaves fewer vectors on the way of a search, which then looks further, up to so many times as far.
_MAX_EFFORT = 8.0


class ApproximateSearch:
    """A FAISS index over positions beside the vectors that it was built from. For one thread at a time."""

    def __init__(self, index: faiss.Index, rows: Rows, *, gpu_index: faiss.Index | None = None) -> None:
        """gpu_index: a clone, which answers searches without a filter: GPUs take none."""
        self._index = index
        self._rows = rows
        self._gpu_index = gpu_index

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def dim(self) -> int:
        return self._rows.dim

    def rows(self, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """The vectors at these positions, unit length."""
        return self._rows.rows(positions)

    def candidates(
        self, queries_QD: NDArray[np.float32], k: int, allowed_N: NDArray[np.bool_] | None = None
    ) -> list[NDArray[np.int64]]:
        """For each query the positions of its k nearest vectors as far as the index finds them, always k where k exist.

        allowed_N: which vectors may be found; None for all.
        """
        num_allowed = len(self) if allowed_N is None else int(allowed_N.sum())
        max_scanned_frac = 0.0 if allowed_N is None else _MAX_SCANNED_FRAC
        if num_allowed <= max(k, _MAX_SCANNED, max_scanned_frac * len(self)):
            return scan(self._rows, queries_QD, k, allowed_N)
        found = self._search(queries_QD, k, allowed_N, num_allowed)
        incomplete = [query for query, positions in enumerate(found) if positions is None]
        if incomplete:
            scanned = scan(self._rows, queries_QD[incomplete], k, allowed_N)
            for query, positions in zip(incomplete, scanned, strict=True):
                found[query] = positions
        return [positions for positions in found if positions is not None]

    def _search(
        self, queries_QD: NDArray[np.float32], k: int, allowed_N: NDArray[np.bool_] | None, num_allowed: int
    ) -> list[NDArray[np.int64] | None]:
        """Positions for each query; None where only comparing all can tell."""
        effort = min(_MAX_EFFORT, len(self) / num_allowed)
        num_fetched = min(num_to_fetch(self._index, k), len(self))
        fetched = self._positions(queries_QD, num_fetched, selecting(allowed_N), effort)
        results: list[NDArray[np.int64] | None] = []
        for query_D, positions in zip(queries_QD, fetched, strict=True):
            positions = positions[positions >= 0]
            near, scores = nearest(positions, self._rows.rows(positions) @ query_D, k)
            # Many equal vectors: those with lower ids may be among what was not fetched.
            all_tie = len(near) == num_fetched < num_allowed and scores.min() >= scores.max() - TIE_MARGIN
            results.append(None if len(near) < k or all_tie else near)
        return results

    def _positions(
        self, queries_QD: NDArray[np.float32], num_fetched: int, selection: Any, effort: float
    ) -> NDArray[np.int64]:
        """What FAISS finds, -1 where it finds no more; nothing where the type cannot leave vectors out."""
        if selection is None and self._gpu_index is not None and num_fetched <= MAX_FETCHED_GPU:
            return self._gpu_index.search(queries_QD, num_fetched)[1]
        parameters = search_parameters(self._index, selection, effort)
        try:
            return self._index.search(queries_QD, num_fetched, params=parameters)[1]
        except RuntimeError:
            if parameters is None:
                raise
            return np.full((len(queries_QD), 0), -1)
