"""What searches and classifications make of query vectors, in one state of a collection: for `Collection` and the API.

Shapes: Q queries, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import bindparam, select
from sqlalchemy.orm import Session

from dino_index.catalog import ImageRow, SourceRow, bound_parts
from dino_index.catalog.portable_paths import decode_path, encode_path
from dino_index.collections import CollectionInfo, join_path
from dino_index.errors import CollectionEmpty, NoLabels
from dino_index.filters import Filter, matching_ids
from dino_index.knn import vote
from dino_index.vector_stores import VectorSearch
from dino_search.results import Classification, Classifications, SearchResult, SearchResults

# Built once, as a service runs it for each search.
_BY_ID = (
    select(ImageRow.id, SourceRow.path, ImageRow.path, ImageRow.label)
    .join(SourceRow, SourceRow.id == ImageRow.source_id)
    .where(ImageRow.id.in_(bindparam("ids", expanding=True)))
)


def find_neighbours(
    session: Session,
    collection: CollectionInfo,
    vectors: VectorSearch,
    queries_QD: NDArray[np.float32],
    names: Sequence[str],
    *,
    k: int,
    labelled: bool = False,
    min_score: float | None = None,
    filters: Sequence[Filter] = (),
) -> list[SearchResults]:
    """The k images most like each query, of those that pass; names: what the results call the queries.

    vectors: current in this session. labelled: only images that have a label.
    Raises CollectionEmpty, NoLabels, FilterError.
    """
    if not len(vectors):
        raise CollectionEmpty(
            f"collection {collection.name!r} has no readable image; run: dino-search index FOLDER-WITH-PICTURES"
        )
    allowed = _labelled_ids(session, collection) if labelled else None
    if filters:
        passing = matching_ids(session, collection, filters)
        allowed = passing if allowed is None else np.intersect1d(allowed, passing, assume_unique=True)
        if labelled and not len(allowed):
            raise NoLabels(f"no labelled image of collection {collection.name!r} passes the filter")
    return [
        SearchResults(
            query=name,
            collection=collection.name,
            model=collection.model_name,
            results=_results(session, ids, scores, min_score),
        )
        for name, (ids, scores) in zip(names, vectors.search(queries_QD, k, allowed_ids=allowed), strict=True)
    ]


def classify_by(
    found: Sequence[SearchResults], *, collection: str, model: str, k: int, temperature: float
) -> Classifications:
    """The label of each query by weighted vote of the labelled images that were found for it."""
    results = []
    for neighbours in found:
        labels = [result.label or "" for result in neighbours.results]
        ranked = vote([result.score for result in neighbours.results], labels, temperature)
        results.append(
            Classification(
                query=neighbours.query,
                label=ranked[0][0],
                probability=ranked[0][1],
                probabilities=dict(ranked),
                neighbours=neighbours.results,
            )
        )
    return Classifications(collection=collection, model=model, k=k, temperature=temperature, results=results)


def portable_path(source: str, name: str) -> str:
    """The absolute path of an image row, given both parts in the portable encoding, and in it again."""
    return encode_path(join_path(decode_path(source), name))


def _labelled_ids(session: Session, collection: CollectionInfo) -> NDArray[np.int64]:
    rows = session.scalars(
        select(ImageRow.id).where(
            ImageRow.collection_id == collection.id, ImageRow.status == "ok", ImageRow.label.is_not(None)
        )
    ).all()
    if not rows:
        raise NoLabels(
            f"no image of collection {collection.name!r} has a label; run index again with --labels folders "
            "or --labels FILE.csv"
        )
    return np.array(rows, np.int64)


def _results(
    session: Session, ids: NDArray[np.int64], scores: NDArray[np.float64], min_score: float | None
) -> list[SearchResult]:
    facts: dict[int, tuple[str, str | None]] = {}
    for part in bound_parts(ids.tolist()):
        rows = session.execute(_BY_ID, {"ids": part})
        facts |= {image_id: (portable_path(source, name), label) for image_id, source, name, label in rows}
    return [
        SearchResult(rank=rank, image_id=image_id, path=facts[image_id][0], score=score, label=facts[image_id][1])
        for rank, (image_id, score) in enumerate(zip(ids.tolist(), scores.tolist(), strict=True), 1)
        if min_score is None or score >= min_score
    ]
