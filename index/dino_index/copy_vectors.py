"""The vectors that copies are compared by, of all readable images of a collection.

Shapes: N images, D channels of each of [CLS] and GeM, C channels of a copy vector.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import func, select
from sqlalchemy.orm import Session, aliased

from dino_index.catalog import EmbeddingRow, ImageRow
from dino_index.collections import CollectionInfo, option_for
from dino_index.copy_descriptors import CopyDescriptor
from dino_index.errors import CatalogUnavailable
from dino_index.snapshots import Vectors

_ROWS_PER_FETCH = 8192


def load_copy_vectors(session: Session, collection: CollectionInfo, descriptor: CopyDescriptor) -> Vectors:
    """Copy vectors of readable images, by id. Read in parts: at no time are there two copies of all vectors.

    Raises CatalogUnavailable for an image without a whole [CLS] and GeM vector.
    """
    num_images = session.scalars(
        select(func.count()).where(ImageRow.collection_id == collection.id, ImageRow.status == "ok")
    ).one()
    nothing = np.empty((0, collection.dim), np.float32)
    dim = descriptor.vectors(nothing, nothing).shape[1]
    ids_N = np.empty(num_images, np.int64)
    vectors_NC = np.empty((num_images, dim), np.float32)
    begin = 0
    for ids, cls_PD, gem_PD in _raw_parts(session, collection):
        end = begin + len(ids)
        if end > num_images:
            break
        ids_N[begin:end] = ids
        vectors_NC[begin:end] = descriptor.vectors(cls_PD, gem_PD)
        begin = end
    if begin != num_images:
        raise _incomplete(collection, f"{num_images - begin} readable images without a [CLS] or GeM vector")
    return Vectors(ids_N, vectors_NC)


def _raw_parts(
    session: Session, collection: CollectionInfo
) -> Iterator[tuple[list[int], NDArray[np.float16], NDArray[np.float16]]]:
    """(ids, cls, gem) of consecutive parts, by id."""
    cls, gem = aliased(EmbeddingRow), aliased(EmbeddingRow)
    statement = (
        select(ImageRow.id, cls.vector.label("cls"), gem.vector.label("gem"))
        .join(cls, cls.sha256 == ImageRow.sha256)
        .join(gem, gem.sha256 == ImageRow.sha256)
        .where(
            ImageRow.collection_id == collection.id,
            ImageRow.status == "ok",
            cls.model_id == collection.model_id, cls.kind == "cls", cls.region == "full",
            gem.model_id == collection.model_id, gem.kind == "gem", gem.region == "full",
        )
        .order_by(ImageRow.id)
    )  # fmt: skip
    for part in session.execute(statement, execution_options={"yield_per": _ROWS_PER_FETCH}).partitions():
        yield [row.id for row in part], *(_matrix(part, kind, collection) for kind in ("cls", "gem"))  # type: ignore[misc]


def _matrix(part: Any, kind: str, collection: CollectionInfo) -> NDArray[np.float16]:
    blobs = [getattr(row, kind) for row in part]
    if any(len(blob) != 2 * collection.dim for blob in blobs):
        raise _incomplete(collection, f"a vector that is not one of {collection.dim} numbers")
    return np.frombuffer(b"".join(blobs), np.float16).reshape(len(blobs), collection.dim)


def _incomplete(collection: CollectionInfo, found: str) -> CatalogUnavailable:
    return CatalogUnavailable(
        f"collection {collection.name!r} has {found}; run: dino-search verify --repair{option_for(collection.name)}"
    )
