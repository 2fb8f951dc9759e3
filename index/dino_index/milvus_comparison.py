"""Whether a Milvus server holds the vectors that the catalog has, all and no others.

Shapes: N images of a part, D channels.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import select
from sqlalchemy.orm import Session

from dino_index.catalog import Catalog, ImageRow, bound_parts
from dino_index.collections import CollectionInfo
from dino_index.milvus_search import ID, MAX_FETCHED, ROWS_PER_PAGE, Rows, ServedVectors, fetch_rows
from dino_index.milvus_server import MilvusServer
from dino_index.vector_kinds import VectorKind

_LAST_ID = 2**63 - 1
# Whitened vectors are matrix products, whose last bits depend on how many are computed at once.
_MAX_ROUNDING = 1e-5


def find_difference(
    catalog: Catalog,
    session: Session,
    collection: CollectionInfo,
    kind: VectorKind,
    generation: int,
    server: MilvusServer,
    served: ServedVectors,
) -> str | None:
    """What the server lacks, has too much or otherwise, in words; what changes meanwhile is no difference.

    generation: the session's, which the server has been told of.
    Raises CollectionGone, VectorStoreErrors, CatalogErrors.
    """
    num_surplus = num_different = last = 0
    missing: list[int] = []
    dim = kind.dim(collection)
    for stored, end in _parts(session, collection, kind):
        held = fetch_rows(server, served, dim, f"{ID} > {last} and {ID} <= {end}", MAX_FETCHED)
        last = end
        missing += np.setdiff1d(stored.ids_C, held.ids_C).tolist()
        held = held[held.generations_C <= generation]
        num_surplus += len(np.setdiff1d(held.ids_C, stored.ids_C))
        _, in_stored, in_held = np.intersect1d(stored.ids_C, held.ids_C, return_indices=True)
        same = stored.generations_C[in_stored] == held.generations_C[in_held]
        differences_CD = np.abs(stored.vectors_CD[in_stored] - held.vectors_CD[in_held])
        same &= (differences_CD <= _MAX_ROUNDING).all(axis=1)
        num_different += int((~same).sum())
    num_missing = len(_unchanged(catalog, missing, generation))
    if not (num_missing or num_surplus or num_different):
        return None
    return (
        f"it lacks {num_missing} images of the catalog, has {num_surplus} that are not in it, and {num_different} with "
        "another vector"
    )


def _parts(session: Session, collection: CollectionInfo, kind: VectorKind) -> Iterator[tuple[Rows, int]]:
    """(images with a sound vector, the last id they cover) by id; the last part covers all ids that are left."""
    for ids, generations, vectors_ND in kind.parts(session, collection):
        for begin in range(0, len(ids), ROWS_PER_PAGE):
            chosen = slice(begin, begin + ROWS_PER_PAGE)
            rows = Rows(np.array(ids[chosen], np.int64), np.array(generations[chosen], np.int64), vectors_ND[chosen])
            yield rows[np.asarray(np.isfinite(rows.vectors_CD).all(axis=1))], ids[chosen][-1]
    nothing: NDArray[np.float32] = np.empty((0, kind.dim(collection)), np.float32)
    yield Rows(np.empty(0, np.int64), np.empty(0, np.int64), nothing), _LAST_ID


def _unchanged(catalog: Catalog, ids: list[int], generation: int) -> list[int]:
    """Those of the images that are still in the catalog as they were in a generation."""
    unchanged: list[int] = []
    with catalog.reading() as session:
        for part in bound_parts(ids):
            as_before = ImageRow.id.in_(part), ImageRow.status == "ok", ImageRow.generation <= generation
            unchanged += session.scalars(select(ImageRow.id).where(*as_before)).all()
    return unchanged
