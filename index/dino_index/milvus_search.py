"""Nearest vectors of a collection, found by a Milvus server and compared exactly here.

Shapes: Q queries, K results, D channels, C candidates, P vectors of a page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from sqlalchemy.orm import Session

from dino_index.collections import CollectionInfo, generation_of
from dino_index.exact_search import TIE_MARGIN, nearest
from dino_index.index_type_names import FLAT
from dino_index.milvus_server import CALL_TIMEOUT_S, CollectionGone, MilvusServer
from dino_index.vector_index import rank_exactly

if TYPE_CHECKING:
    from pymilvus import MilvusClient

T = TypeVar("T")

ID, GENERATION, VECTOR = "id", "generation", "vector"
# Server 2.3.5 had not built an IVF_PQ of 12,000 vectors after a minute; IVF_SQ8 is the next smallest.
INDEX_TYPES = {FLAT: "FLAT", "hnsw": "HNSW", "ivf": "IVF_FLAT", "ivfpq": "IVF_SQ8"}
MAX_FETCHED = 16_384
"""The server's limit of results of one search, and of rows of one page."""

_FIELDS = [ID, GENERATION, VECTOR]
_SPARE_FOR_TIES = 16
_MIN_EF_SEARCH = 128
_MIN_LISTS_SEARCHED, _LISTS_SEARCHED_FRAC = 32, 1 / 4
# Where so few may be found, fetching them all is as fast as a search among the others for them, and misses none.
_MAX_SCANNED = 2_000
ROWS_PER_PAGE = 2_000
_IDS_PER_SEARCH = 50_000
# A filter that lets this share through is left to us: more neighbours are fetched, and those that pass are kept.
_MIN_SIEVED_FRAC = 0.1
_MAX_ANSWER_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Rows:
    """Vectors that the server gave: their image ids, and the generations in which those got them."""

    ids_C: NDArray[np.int64]
    generations_C: NDArray[np.int64]
    vectors_CD: NDArray[np.float32]

    @classmethod
    def of(cls, entities: Sequence[Mapping[str, Any]], dim: int) -> Rows:
        count = len(entities)
        return cls(
            np.fromiter((entity[ID] for entity in entities), np.int64, count),
            np.fromiter((entity[GENERATION] for entity in entities), np.int64, count),
            np.array([entity[VECTOR] for entity in entities], np.float32).reshape(count, dim),
        )

    def __len__(self) -> int:
        return len(self.ids_C)

    def __getitem__(self, chosen: NDArray[Any]) -> Rows:
        return Rows(self.ids_C[chosen], self.generations_C[chosen], self.vectors_CD[chosen])

    def __add__(self, other: Rows) -> Rows:
        return Rows(
            np.concatenate([self.ids_C, other.ids_C]),
            np.concatenate([self.generations_C, other.generations_C]),
            np.concatenate([self.vectors_CD, other.vectors_CD]),
        )


@dataclass(frozen=True, kw_only=True)
class ServedVectors:
    """What a server holds of a collection. name: the collection's there. timestamp: what a search must have seen."""

    name: str
    timestamp: int
    index_type: str


def guarantee(timestamp: int) -> dict[str, Any]:
    """What has a read wait until the server has come to its own clock's time `timestamp`, and no longer.

    The level Strong waits for the moment of the read itself, each time: half a second, where this takes milliseconds.
    """
    return {"consistency_level": "Customized", "guarantee_timestamp": timestamp}


def num_lists(num_vectors: int) -> int:
    """Of an IVF index: four times the root of the vectors in a segment of the server, at most so many."""
    return max(1, min(int(4 * np.sqrt(min(num_vectors, 500_000))), num_vectors // 39))


class MilvusIndex:
    """The vectors that can be found, as of one generation. For one thread at a time.

    What is replaced or removed after that generation is not found any more, and what is added is not found yet.
    """

    def __init__(
        self,
        server: MilvusServer,
        dim: int,
        generation: int,
        served: ServedVectors,
        renew: Callable[[], ServedVectors],
    ) -> None:
        """dim: D. renew: where the vectors are by now, when the server has them no more under the name they had.

        Raises CollectionGone, VectorStoreErrors.
        """
        self.generation = generation
        self._server = server
        self._dim = dim
        self._served = served
        self._renew = renew
        self._num_vectors = self._count()

    def is_current(self, session: Session, collection: CollectionInfo) -> bool:
        """Whether nothing that can be found has changed since this was loaded."""
        return generation_of(session, collection) == self.generation

    def __len__(self) -> int:
        return self._num_vectors

    def search(
        self, queries_QD: NDArray[np.float32], k: int, *, allowed_ids: NDArray[np.int64] | None = None
    ) -> list[tuple[NDArray[np.int64], NDArray[np.float64]]]:
        """As `VectorSearch.search`. Raises VectorStoreErrors."""
        assert k >= 1, k
        assert queries_QD.shape[1] == self._dim, queries_QD.shape
        queries_QD = np.ascontiguousarray(queries_QD, np.float32)
        if not len(queries_QD):
            return []
        found = self._despite_compaction(lambda: self._candidates(queries_QD, k, allowed_ids))
        return [
            rank_exactly(query_D, rows.ids_C, rows.vectors_CD, k)
            for query_D, rows in zip(queries_QD, found, strict=True)
        ]

    def nearest_to_any(self, queries_QD: NDArray[np.float32], offsets_Q: NDArray[np.float32], number: int) -> Rows:
        """The vectors whose largest sum of a query's product and offset is highest, in no order.

        As far as the server tells them apart. Raises VectorStoreErrors.
        """
        queries_QD = np.ascontiguousarray(queries_QD, np.float32)
        return self._despite_compaction(lambda: self._nearest_to_any(queries_QD, offsets_Q, number))

    def rows_of(self, ids: NDArray[np.int64]) -> Rows:
        """What there is of these, in no order. Raises VectorStoreErrors."""
        return self._despite_compaction(lambda: self._rows_of(ids))

    def _despite_compaction(self, read: Callable[[], T]) -> T:
        """What `read` gives, though another process may have compacted the collection meanwhile."""
        try:
            return read()
        except CollectionGone:
            self._served = self._renew()
            return read()

    def _nearest_to_any(self, queries_QD: NDArray[np.float32], offsets_Q: NDArray[np.float32], number: int) -> Rows:
        num_fetched = number + _SPARE_FOR_TIES
        scores: dict[int, float] = {}
        if num_fetched <= MAX_FETCHED:
            # Without their vectors: most of what is near one query is not among the nearest to any.
            answers = self._hits(queries_QD, num_fetched, "", [ID, GENERATION])
            for offset, hits in zip(offsets_Q.tolist(), answers, strict=True):
                for hit in hits:
                    if hit["entity"][GENERATION] <= self.generation:
                        score = hit["distance"] + offset
                        scores[hit["entity"][ID]] = max(score, scores.get(hit["entity"][ID], score))
        if len(scores) >= min(number, len(self)):
            best = sorted(scores, key=lambda image_id: -scores[image_id])[:number]
            return self._rows_of(np.array(best, np.int64))
        found = Rows.of([], self._dim)
        for page in read_rows(self._server, self._served, self._dim):
            found += page[page.generations_C <= self.generation]
            best_C = (found.vectors_CD @ queries_QD.T + offsets_Q).max(axis=1, initial=-np.inf)
            found = found[np.argsort(-best_C, kind="stable")[:number]]
        return found

    def _rows_of(self, ids: NDArray[np.int64]) -> Rows:
        found = Rows.of([], self._dim)
        for page in read_rows(self._server, self._served, self._dim, ids):
            found += page[page.generations_C <= self.generation]
        return found

    def _count(self) -> int:
        def count(client: MilvusClient) -> int:
            rows = client.query(
                self._served.name, filter="", output_fields=["count(*)"], timeout=CALL_TIMEOUT_S,
                **guarantee(self._served.timestamp),
            )  # fmt: skip
            return int(rows[0]["count(*)"])

        return self._server.call(count)

    def _candidates(self, queries_QD: NDArray[np.float32], k: int, allowed_ids: NDArray[np.int64] | None) -> list[Rows]:
        """The k nearest of each query that the server finds, always k where k exist."""
        num_existing = len(self) if allowed_ids is None else len(allowed_ids)
        if k + _SPARE_FOR_TIES > MAX_FETCHED or (allowed_ids is not None and num_existing <= _MAX_SCANNED):
            return self._scan(queries_QD, k, allowed_ids)
        found = self._search(queries_QD, k) if allowed_ids is None else self._sieve(queries_QD, k, allowed_ids)
        for query, rows in enumerate(found):
            # A graph may not lead to all that a filter lets through, nor to thousands of neighbours.
            if len(rows) < min(k, num_existing):
                (found[query],) = self._scan(queries_QD[query : query + 1], k, allowed_ids)
        return found

    def _sieve(self, queries_QD: NDArray[np.float32], k: int, allowed_ids: NDArray[np.int64]) -> list[Rows]:
        """Among many allowed ids: of more neighbours those that are allowed, else a search for each part of the ids."""
        frac = len(allowed_ids) / max(1, len(self))
        num_wanted = int(2 * (k + _SPARE_FOR_TIES) / frac)
        if frac >= _MIN_SIEVED_FRAC and num_wanted + _SPARE_FOR_TIES <= MAX_FETCHED:
            sieved = [rows[np.isin(rows.ids_C, allowed_ids)] for rows in self._search(queries_QD, num_wanted)]
            if all(len(rows) >= k for rows in sieved):
                return sieved
        found = [Rows.of([], self._dim)] * len(queries_QD)
        ids = np.sort(allowed_ids)
        for begin in range(0, len(ids), _IDS_PER_SEARCH):
            of_part = self._search(queries_QD, k, f"{ID} in {ids[begin : begin + _IDS_PER_SEARCH].tolist()}")
            found = [before + rows for before, rows in zip(found, of_part, strict=True)]
        return found

    def _search(self, queries_QD: NDArray[np.float32], k: int, expression: str = "") -> list[Rows]:
        """By the server's index; queries whose last results may tie with more are searched again with more results."""
        is_lossy = INDEX_TYPES[self._served.index_type] == "IVF_SQ8"
        num_fetched = min(max(4 * k, 64) if is_lossy else k + _SPARE_FOR_TIES, MAX_FETCHED)
        results = [Rows.of([], self._dim)] * len(queries_QD)
        pending = list(range(len(queries_QD)))
        while pending:
            unfinished = []
            for query, hits in zip(pending, self._hits(queries_QD[pending], num_fetched, expression), strict=True):
                rows = Rows.of([hit["entity"] for hit in hits], self._dim)
                results[query] = rows[rows.generations_C <= self.generation]
                if num_fetched > len(rows) or num_fetched == MAX_FETCHED:
                    continue
                scores = rows.vectors_CD @ queries_QD[query]
                # The order of what is stored coarsely says nothing about ties, unless all are equal.
                kth = scores.max() if is_lossy else np.partition(scores, -k)[-k]
                if scores.min() >= kth - TIE_MARGIN:
                    unfinished.append(query)
            pending = unfinished
            num_fetched = min(4 * num_fetched, MAX_FETCHED)
        return results

    def _hits(
        self,
        queries_QD: NDArray[np.float32],
        num_fetched: int,
        expression: str,
        fields: Sequence[str] = (ID, GENERATION, VECTOR),
    ) -> Iterator[Sequence[Mapping[str, Any]]]:
        """What the server finds for each query, not more at a time than an answer should be long."""
        num_probed = max(_MIN_LISTS_SEARCHED, int(_LISTS_SEARCHED_FRAC * num_lists(len(self))))
        parameters = {"ef": max(num_fetched, _MIN_EF_SEARCH), "nprobe": num_probed}
        queries_a_call = max(1, _MAX_ANSWER_BYTES // (num_fetched * self._dim * 4))
        for begin in range(0, len(queries_QD), queries_a_call):
            part_QD = queries_QD[begin : begin + queries_a_call]

            def search(client: MilvusClient, part_QD: NDArray[np.float32] = part_QD) -> Any:
                return client.search(
                    self._served.name, part_QD, limit=num_fetched, filter=expression, output_fields=list(fields),
                    search_params={"metric_type": "IP", "params": parameters}, timeout=CALL_TIMEOUT_S,
                    **guarantee(self._served.timestamp),
                )  # fmt: skip

            yield from self._server.call(search)

    def _scan(self, queries_QD: NDArray[np.float32], k: int, allowed_ids: NDArray[np.int64] | None) -> list[Rows]:
        """The k nearest of each query and all that may tie with them, by fetching all that are allowed."""
        found = [Rows.of([], self._dim)] * len(queries_QD)
        for page in read_rows(self._server, self._served, self._dim, allowed_ids):
            known = page[page.generations_C <= self.generation]
            for query, query_D in enumerate(queries_QD):
                rows = found[query] + known
                near, _ = nearest(np.arange(len(rows)), rows.vectors_CD @ query_D, k)
                found[query] = rows[near]
        return found


def read_rows(
    server: MilvusServer, served: ServedVectors, dim: int, ids: NDArray[np.int64] | None = None
) -> Iterator[Rows]:
    """Everything that a server holds of a collection, or of these images, in pages. Raises as searches do."""
    if ids is not None:
        for begin in range(0, len(ids), ROWS_PER_PAGE):
            part = ids[begin : begin + ROWS_PER_PAGE].tolist()
            yield fetch_rows(server, served, dim, f"{ID} in {part}", ROWS_PER_PAGE)
        return
    first = 0
    while True:
        # With a limit the server gives those with the lowest ids.
        rows = fetch_rows(server, served, dim, f"{ID} >= {first}", ROWS_PER_PAGE)
        yield rows
        if len(rows) < ROWS_PER_PAGE:
            return
        first = int(rows.ids_C.max()) + 1


def fetch_rows(server: MilvusServer, served: ServedVectors, dim: int, expression: str, limit: int) -> Rows:
    """What a server holds of a collection and passes the expression. Raises as searches do."""

    def fetch(client: MilvusClient) -> Any:
        return client.query(
            served.name, filter=expression, output_fields=_FIELDS, limit=limit, timeout=CALL_TIMEOUT_S,
            **guarantee(served.timestamp),
        )  # fmt: skip

    return Rows.of(server.call(fetch), dim)
