"""Nearest vectors of a collection: its snapshot, what was added since (the delta), less what was removed (the mask).

Shapes: Q queries, K results, D channels.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray
from sqlalchemy import select
from sqlalchemy.orm import Session

from dino_index.catalog import Catalog, RemovalRow, SnapshotRow
from dino_index.collections import CollectionInfo, generation_of
from dino_index.snapshots import SnapshotDamaged, Vectors, build_index, load_vectors, read_snapshot, snapshot_ids

logger = logging.getLogger(__name__)

_SCORE_DECIMALS = 6
_SPARE_FOR_TIES = 16
# Float32 sums of the same products in another order differ in the seventh digit. They only choose candidates, with
# this margin; final scores are float64 sums, so that equal vectors tie wherever they lie.
_TIE_MARGIN = 2e-6


class VectorIndex:
    """The vectors that can be found, as of one generation. For one thread at a time."""

    def __init__(self, generation: int, snapshot: faiss.Index, delta: Vectors, masked_ids: NDArray[np.int64]) -> None:
        self.generation = generation
        self._snapshot = snapshot
        self._delta = delta
        self._masked_ids = masked_ids
        """Ids whose vector in the snapshot no longer counts."""

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
                delta = load_vectors(session, collection, after_generation=row.generation)
                return cls(generation, snapshot, delta, _masked_ids(session, collection, row.generation, delta))
            except SnapshotDamaged as error:
                logger.warning("%s; searching a copy rebuilt from the catalog, which `compact` writes anew", error)
        everything = load_vectors(session, collection)
        nothing = Vectors(np.empty(0, np.int64), np.empty((0, collection.dim), np.float32))
        return cls(generation, build_index(everything), nothing, nothing.ids_N)

    def is_current(self, session: Session, collection: CollectionInfo) -> bool:
        """Whether nothing that can be found has changed since this was loaded."""
        return generation_of(session, collection) == self.generation

    def __len__(self) -> int:
        masked = int(np.isin(snapshot_ids(self._snapshot), self._masked_ids).sum()) if len(self._masked_ids) else 0
        return self._snapshot.ntotal - masked + len(self._delta.ids_N)

    def search(
        self, queries_QD: NDArray[np.float32], k: int, *, allowed_ids: NDArray[np.int64] | None = None
    ) -> list[tuple[NDArray[np.int64], NDArray[np.float64]]]:
        """For each query (ids, scores) of its k nearest vectors: cosine to 6 decimals, best first, ties by id.

        queries_QD: float32, unit length. k: at least 1; fewer come back only where fewer exist.
        allowed_ids: the only images to find; None for all.
        """
        assert k >= 1, k
        assert queries_QD.shape[1] == self._snapshot.d, queries_QD.shape
        delta = self._delta
        if allowed_ids is not None:
            kept = np.isin(delta.ids_N, allowed_ids)
            delta = Vectors(delta.ids_N[kept], delta.vectors_ND[kept])
        delta_scores_QN = queries_QD @ delta.vectors_ND.T
        results = []
        for query_D, delta_scores_N in zip(queries_QD, delta_scores_QN, strict=True):
            candidates = self._search_snapshot(query_D, k, allowed_ids), (delta, delta_scores_N)
            results.append(_best(query_D, candidates, k))
        return results

    def _search_snapshot(
        self, query_D: NDArray[np.float32], k: int, allowed_ids: NDArray[np.int64] | None
    ) -> tuple[Vectors, NDArray[np.float32]]:
        """At least the k best of the snapshot with their scores, and all that may tie with the last of them."""
        parameters = self._selection(allowed_ids)
        num_fetched = min(k + _SPARE_FOR_TIES, self._snapshot.ntotal)
        while num_fetched:
            scores, ids = (row[0] for row in self._snapshot.search(query_D[None], num_fetched, params=parameters))
            found = ids >= 0
            ids, scores = ids[found], scores[found]
            complete = len(ids) < num_fetched or num_fetched == self._snapshot.ntotal
            if complete or scores[-1] < scores[k - 1] - _TIE_MARGIN:
                return Vectors(ids, self._snapshot.reconstruct_batch(ids)), scores
            num_fetched = min(4 * num_fetched, self._snapshot.ntotal)
        return Vectors(np.empty(0, np.int64), np.empty((0, self._snapshot.d), np.float32)), np.empty(0, np.float32)

    def _selection(self, allowed_ids: NDArray[np.int64] | None) -> Any:
        """FAISS search parameters that leave out masked ids and keep to the allowed ones; None for no limit."""
        if allowed_ids is not None:
            wanted = np.setdiff1d(allowed_ids, self._masked_ids)
            return faiss.SearchParameters(sel=faiss.IDSelectorBatch(wanted))  # type: ignore[call-arg]
        if len(self._masked_ids):
            unmasked = faiss.IDSelectorNot(faiss.IDSelectorBatch(self._masked_ids))
            return faiss.SearchParameters(sel=unmasked)  # type: ignore[call-arg]
        return None


def _masked_ids(
    session: Session, collection: CollectionInfo, after_generation: int, delta: Vectors
) -> NDArray[np.int64]:
    removed = session.scalars(
        select(RemovalRow.image_id).where(
            RemovalRow.collection_id == collection.id, RemovalRow.generation > after_generation
        )
    ).all()
    return np.union1d(np.array(removed, np.int64), delta.ids_N)


def _best(
    query_D: NDArray[np.float32], candidates: Sequence[tuple[Vectors, NDArray[np.float32]]], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The k best candidates by exact score; the scores that they come with only spare computing it for all."""
    scores = np.concatenate([scores_N for _, scores_N in candidates])
    scores = scores[np.isfinite(scores)]
    lowest = np.partition(scores, -k)[-k] - _TIE_MARGIN if len(scores) > k else -np.inf
    near = [(vectors, np.flatnonzero(scores_N >= lowest)) for vectors, scores_N in candidates]
    ids = np.concatenate([vectors.ids_N[kept] for vectors, kept in near])
    vectors_ND = np.concatenate([vectors.vectors_ND[kept] for vectors, kept in near])
    rounded = np.round(vectors_ND.astype(np.float64) @ query_D.astype(np.float64), _SCORE_DECIMALS)
    order = np.lexsort((ids, -rounded))[:k]
    return ids[order], rounded[order]
