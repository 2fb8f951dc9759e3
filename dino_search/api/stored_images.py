"""What a catalog knows of one image: its file, and its vector."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import select
from sqlalchemy.orm import Session

from dino_index.catalog import CollectionRow, EmbeddingRow, ImageRow, SourceRow
from dino_index.catalog.portable_paths import decode_path
from dino_index.collections import CollectionInfo, join_path
from dino_index.errors import ImageNotFound


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A readable image. path: as the system names it. sha256: of the bytes that were indexed."""

    path: str
    sha256: bytes
    collection: str


def image_file(session: Session, image_id: int) -> ImageFile:
    """Raises ImageNotFound."""
    row = session.execute(
        select(SourceRow.path, ImageRow.path, ImageRow.sha256, CollectionRow.name)
        .join(SourceRow, SourceRow.id == ImageRow.source_id)
        .join(CollectionRow, CollectionRow.id == ImageRow.collection_id)
        .where(ImageRow.id == image_id, ImageRow.status == "ok")
    ).one_or_none()
    if row is None:
        raise ImageNotFound(f"no readable image {image_id} in any collection")
    source, name, sha256, collection = row
    assert sha256 is not None
    return ImageFile(join_path(decode_path(source), name), sha256, collection)


def stored_vector_of(session: Session, collection: CollectionInfo, image_id: int) -> NDArray[np.float16]:
    """The raw [CLS] of an image of the collection, (1, D). Raises ImageNotFound."""
    vector = session.scalars(
        select(EmbeddingRow.vector)
        .join(ImageRow, ImageRow.sha256 == EmbeddingRow.sha256)
        .where(
            ImageRow.id == image_id,
            ImageRow.collection_id == collection.id,
            ImageRow.status == "ok",
            EmbeddingRow.model_id == collection.model_id,
            EmbeddingRow.kind == "cls",
            EmbeddingRow.region == "full",
        )
    ).one_or_none()
    if vector is None:
        raise ImageNotFound(f"no image {image_id} in collection {collection.name!r}; its images: GET /collections")
    return np.frombuffer(vector, np.float16)[None]
