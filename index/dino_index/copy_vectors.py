"""The vectors that copies are compared by, of all readable images of a collection.

Shapes: N images, D channels of each of [CLS] and GeM, C channels of a copy vector.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session, aliased

from dino_index.catalog import EmbeddingRow, ImageRow
from dino_index.collections import CollectionInfo, option_for
from dino_index.copy_descriptors import CopyDescriptor
from dino_index.errors import CatalogUnavailable
from dino_index.snapshots import Vectors

_ROWS_PER_FETCH = 8192


def load_copy_vectors(
    session: Session, collection: CollectionInfo, descriptor: CopyDescriptor, *, after_generation: int = -1
) -> Vectors:
    """Copy vectors of readable images that got theirs after a generation, by id.

    Read in parts: at no time are there two copies of all vectors.

    Raises CatalogUnavailable for an image without a whole [CLS] and GeM vector.
    """
    num_images = _count_readable(session, collection, after_generation)
    ids_N = np.empty(num_images, np.int64)
    vectors_NC = np.empty((num_images, copy_dim(collection, descriptor)), np.float32)
    begin = 0
    for ids, _, vectors_PC in copy_parts(session, collection, descriptor, after_generation):
        end = begin + len(ids)
        ids_N[begin:end] = ids
        vectors_NC[begin:end] = vectors_PC
        begin = end
    return Vectors(ids_N, vectors_NC)


def readable_ids(session: Session, collection: CollectionInfo) -> list[int]:
    """Of the images that have copy vectors, in order."""
    return list(session.scalars(select(ImageRow.id).where(*_readable(collection)).order_by(ImageRow.id)))


def copy_dim(collection: CollectionInfo, descriptor: CopyDescriptor) -> int:
    """C, the channels of a collection's copy vectors."""
    nothing = np.empty((0, collection.dim), np.float32)
    return int(descriptor.vectors(nothing, nothing).shape[1])


def copy_parts(
    session: Session,
    collection: CollectionInfo,
    descriptor: CopyDescriptor,
    after_generation: int = -1,
    up_to_generation: int | None = None,
) -> Iterator[tuple[list[int], list[int], NDArray[np.float32]]]:
    """(ids, generations, vectors_PC) of consecutive parts of the readable images of these generations, by id.

    Raises CatalogUnavailable for an image without a whole [CLS] and GeM vector.
    """
    num_left = _count_readable(session, collection, after_generation, up_to_generation)
    cls, gem = aliased(EmbeddingRow), aliased(EmbeddingRow)
    statement = (
        select(ImageRow.id, ImageRow.generation, cls.vector.label("cls"), gem.vector.label("gem"))
        .join(cls, cls.sha256 == ImageRow.sha256)
        .join(gem, gem.sha256 == ImageRow.sha256)
        .where(
            *_readable(collection, after_generation, up_to_generation),
            cls.model_id == collection.model_id, cls.kind == "cls", cls.region == "full",
            gem.model_id == collection.model_id, gem.kind == "gem", gem.region == "full",
        )
        .order_by(ImageRow.id)
    )  # fmt: skip
    for rows in session.execute(statement, execution_options={"yield_per": _ROWS_PER_FETCH}).partitions():
        num_left -= len(rows)
        cls_PD, gem_PD = (_matrix(rows, kind, collection) for kind in ("cls", "gem"))
        yield [row.id for row in rows], [row.generation for row in rows], descriptor.vectors(cls_PD, gem_PD)
    if num_left:
        raise _incomplete(collection, f"{num_left} readable images without a [CLS] or GeM vector")


def _readable(collection: CollectionInfo, after: int = -1, up_to: int | None = None) -> list[ColumnElement[bool]]:
    readable = [ImageRow.collection_id == collection.id, ImageRow.status == "ok", ImageRow.generation > after]
    return readable if up_to is None else [*readable, ImageRow.generation <= up_to]


def _count_readable(session: Session, collection: CollectionInfo, after: int = -1, up_to: int | None = None) -> int:
    return session.scalars(select(func.count()).where(*_readable(collection, after, up_to))).one()


def _matrix(part: Any, kind: str, collection: CollectionInfo) -> NDArray[np.float16]:
    blobs = [getattr(row, kind) for row in part]
    if any(len(blob) != 2 * collection.dim for blob in blobs):
        raise _incomplete(collection, f"a vector that is not one of {collection.dim} numbers")
    return np.frombuffer(b"".join(blobs), np.float16).reshape(len(blobs), collection.dim)


def _incomplete(collection: CollectionInfo, found: str) -> CatalogUnavailable:
    return CatalogUnavailable(
        f"collection {collection.name!r} has {found}; run: dino-search verify --repair{option_for(collection.name)}"
    )
