"""Nearest vectors of a collection: its snapshot, what was added since (the delta), less what was removed (the mask).

Shapes: Q queries, K results, D channels.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sqlalchemy.orm import Session

from dino_index.approximate_search import ApproximateSearch
from dino_index.catalog import Catalog, SnapshotRow
from dino_index.collections import CollectionInfo, generation_of
from dino_index.exact_search import ExactSearch, nearest
from dino_index.snapshots import (
    Snapshot,
    SnapshotDamaged,
    exact_snapshot,
    load_vectors,
    masked_ids,
    read_snapshot,
)

logger = logging.getLogger(__name__)

_SCORE_DECIMALS = 6


@dataclass(frozen=True, slots=True)
class _Part:
    """Some of the vectors, and which of them count."""

    ids_N: NDArray[np.int64]
    searcher: ExactSearch | ApproximateSearch
    counts_N: NDArray[np.bool_] | None
    """None where all do."""

    @classmethod
    def of(cls, snapshot: Snapshot, masked: NDArray[np.int64]) -> _Part:
        counts_N = snapshot.ids_N >= 0
        if len(masked):
            counts_N &= ~np.isin(snapshot.ids_N, masked)
        return cls(snapshot.ids_N, snapshot.searcher, None if counts_N.all() else counts_N)

    def __len__(self) -> int:
        return len(self.ids_N) if self.counts_N is None else int(self.counts_N.sum())

    def candidates(
        self, queries_QD: NDArray[np.float32], k: int, allowed_ids: NDArray[np.int64] | None
    ) -> list[NDArray[np.int64]]:
        allowed_N = self.counts_N
        if allowed_ids is not None:
            allowed_N = np.isin(self.ids_N, allowed_ids)
            allowed_N &= self.counts_N if self.counts_N is not None else True
        return self.searcher.candidates(queries_QD, k, allowed_N)


class VectorIndex:
    """The vectors that can be found, as of one generation. For one thread at a time."""

    def __init__(self, generation: int, snapshot: Snapshot, delta: Snapshot, masked: NDArray[np.int64]) -> None:
        """masked: ids whose vector in the snapshot no longer counts."""
        self.generation = generation
        self._parts = [_Part.of(snapshot, masked)]
        if len(delta.ids_N):
            self._parts.append(_Part.of(delta, np.empty(0, np.int64)))

    @classmethod
    def load(cls, catalog: Catalog, session: Session, collection: CollectionInfo) -> VectorIndex:
        """The index as `session` sees the collection.

        A snapshot file that is missing or damaged is replaced in memory from the catalog, with a warning.
        """
        generation = generation_of(session, collection)
        row = session.get(SnapshotRow, collection.id)
        if row is not None:
            try:
                snapshot = read_snapshot(catalog, collection, row)
            except SnapshotDamaged as error:
                logger.warning("%s; searching a copy rebuilt from the catalog, which `compact` writes anew", error)
            else:
                delta = load_vectors(session, collection, after_generation=row.generation)
                masked = masked_ids(session, collection, row.generation, delta.ids_N)
                return cls(generation, snapshot, exact_snapshot(delta), masked)
        nothing = np.empty(0, np.int64)
        everything = exact_snapshot(load_vectors(session, collection))
        return cls(generation, everything, Snapshot(nothing, everything.searcher), nothing)

    def is_current(self, session: Session, collection: CollectionInfo) -> bool:
        """Whether nothing that can be found has changed since this was loaded."""
        return generation_of(session, collection) == self.generation

    def __len__(self) -> int:
        return sum(len(part) for part in self._parts)

    def search(
        self, queries_QD: NDArray[np.float32], k: int, *, allowed_ids: NDArray[np.int64] | None = None
    ) -> list[tuple[NDArray[np.int64], NDArray[np.float64]]]:
        """As `VectorSearch.search`."""
        assert k >= 1, k
        assert queries_QD.shape[1] == self._parts[0].searcher.dim, queries_QD.shape
        queries_QD = np.ascontiguousarray(queries_QD, np.float32)
        by_part = [part.candidates(queries_QD, k, allowed_ids) for part in self._parts]
        return [
            _best(query_D, list(zip(self._parts, positions, strict=True)), k)
            for query_D, positions in zip(queries_QD, zip(*by_part, strict=True), strict=True)
        ]


def _best(
    query_D: NDArray[np.float32], candidates: Sequence[tuple[_Part, NDArray[np.int64]]], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The k best candidates by exact score."""
    ids = np.concatenate([part.ids_N[positions] for part, positions in candidates])
    return rank_exactly(
        query_D, ids, np.concatenate([part.searcher.rows(positions) for part, positions in candidates]), k
    )


def rank_exactly(
    query_D: NDArray[np.float32], ids: NDArray[np.int64], vectors_CD: NDArray[np.float32], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(ids, scores) of the k best candidates: cosine to 6 decimals, best first, ties by id."""
    # Float32 leaves only those that may be among the best. Final scores are float64 sums, so that equal vectors tie
    # wherever they lie.
    near, _ = nearest(np.arange(len(ids)), vectors_CD @ query_D, k)
    rounded = np.round(vectors_CD[near].astype(np.float64) @ query_D.astype(np.float64), _SCORE_DECIMALS)
    order = np.lexsort((ids[near], -rounded))[:k]
    return ids[near][order], rounded[order]
