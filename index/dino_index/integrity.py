"""Checking that a collection is whole, repairing what can be, and keeping the home small.

Catalog and vectors are written together, so faults come from outside: damaged disks, deleted files, other programs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from sqlalchemy import ColumnElement, and_, delete, exists, or_, select
from sqlalchemy.orm import Session

from dino_index.catalog import Catalog, CollectionRow, EmbeddingRow, ImageRow, SourceRow
from dino_index.catalog.portable_paths import decode_path
from dino_index.collections import (
    CollectionInfo,
    advance_generation,
    check_model,
    hold_model,
    join_path,
    pending_models,
)
from dino_index.image_paths import is_gone
from dino_index.recording import forget_vector
from dino_index.vector_stores import vector_store_of

_ROWS_PER_FETCH = 8192
_UNSYNCHRONISED = {"synchronize_session": False}


@dataclass(kw_only=True)
class IntegrityReport:
    """What `verify` found. `problems` stay; `repaired` were put right in this run."""

    images_checked: int = 0
    problems: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)


def verify_collection(
    catalog: Catalog,
    collection: CollectionInfo,
    *,
    reindex: Callable[[Sequence[str]], object] | None = None,
) -> IntegrityReport:
    """Compares database, embeddings and stored vectors with each other.

    reindex: given to repair; reads files anew, by absolute path, after their faulty embeddings were deleted.
    Raises CatalogErrors.
    """
    report = IntegrityReport()
    report.problems += [f"the database file: {problem}" for problem in catalog.integrity_problems()]
    faulty = _faulty_images(catalog, collection, report)
    if faulty and reindex:
        _discard(catalog, collection, list(faulty))
        _give_up_on_lost_files(catalog, collection, faulty)
        reindex([path for path in sorted(set(faulty.values())) if not _is_lost(path)])
        still_faulty = _faulty_images(catalog, collection, IntegrityReport())
        readable = _readable_ids(catalog, collection)
        for image_id, path in faulty.items():
            if image_id in readable and image_id not in still_faulty:
                report.repaired.append(f"{path}: its embedding was damaged")
            else:
                fate = "is gone" if _is_lost(path) else "cannot be read"
                report.problems.append(f"{path}: its embedding was damaged and its file {fate}")
    else:
        report.problems += [f"{path}: its embedding is missing or damaged" for path in faulty.values()]
    vectors = vector_store_of(catalog)
    problem = vectors.problem(collection)
    if problem and reindex:
        vectors.compact(collection)
        remaining = vectors.problem(collection)
        (report.problems if remaining else report.repaired).append(problem)
    elif problem:
        report.problems.append(problem)
    return report


def compact_collection(catalog: Catalog, collection: CollectionInfo) -> None:
    """Stores the vectors anew, drops embeddings that no collection needs, and gives free pages back."""
    vector_store_of(catalog).compact(collection)
    with catalog.writing() as session:
        session.execute(delete(EmbeddingRow).where(_unneeded(session)), execution_options=_UNSYNCHRONISED)
    catalog.reclaim_space()


def drop_unneeded_embeddings(catalog: Catalog, model_id: int) -> None:
    """Drops a model's embeddings that no collection needs, in transactions that others need not wait for long.

    What a kill leaves of them goes with the next `compact_collection`.
    """
    done = b""
    while True:
        with catalog.writing() as session:
            of_model = EmbeddingRow.model_id == model_id, EmbeddingRow.sha256 > done
            part = session.scalars(
                select(EmbeddingRow.sha256).where(*of_model).order_by(EmbeddingRow.sha256).limit(_ROWS_PER_FETCH)
            ).all()
            if not part:
                return
            unneeded = delete(EmbeddingRow).where(*of_model, EmbeddingRow.sha256 <= part[-1], _unneeded(session))
            session.execute(unneeded, execution_options=_UNSYNCHRONISED)
            done = part[-1]


def _unneeded(session: Session) -> ColumnElement[bool]:
    """Whether no image of a collection under the embedding's model, present or coming, has its bytes."""
    coming = (
        and_(CollectionRow.id == collection_id, EmbeddingRow.model_id == model_id)
        for collection_id, model_id in pending_models(session).items()
    )
    return ~exists().where(
        ImageRow.sha256 == EmbeddingRow.sha256,
        ImageRow.collection_id == CollectionRow.id,
        or_(CollectionRow.model_id == EmbeddingRow.model_id, *coming),
    )


def _faulty_images(catalog: Catalog, collection: CollectionInfo, report: IntegrityReport) -> dict[int, str]:
    """Absolute path by id of readable images without a sound embedding of either kind."""
    sound: dict[bytes, int] = {}
    with catalog.reading() as session:
        check_model(session, collection)
        embeddings = session.execute(
            select(EmbeddingRow.sha256, EmbeddingRow.vector).where(
                EmbeddingRow.model_id == collection.model_id,
                EmbeddingRow.region == "full",
                EmbeddingRow.kind.in_(("cls", "gem")),
            ),
            execution_options={"yield_per": _ROWS_PER_FETCH},
        )
        for digest, vector in embeddings:
            sound[digest] = sound.get(digest, 0) + _is_sound(vector, collection.dim)
        images = session.execute(
            select(ImageRow.id, ImageRow.sha256, SourceRow.path, ImageRow.path)
            .join(SourceRow, SourceRow.id == ImageRow.source_id)
            .where(ImageRow.collection_id == collection.id, ImageRow.status == "ok")
        ).all()
    report.images_checked = len(images)
    return {
        image_id: join_path(decode_path(source), name)
        for image_id, digest, source, name in images
        if digest is None or sound.get(digest, 0) != 2
    }


def _readable_ids(catalog: Catalog, collection: CollectionInfo) -> set[int]:
    with catalog.reading() as session:
        ours = ImageRow.collection_id == collection.id, ImageRow.status == "ok"
        return set(session.scalars(select(ImageRow.id).where(*ours)))


def _is_sound(vector: bytes, dim: int) -> bool:
    if len(vector) != 2 * dim:
        return False
    values = np.frombuffer(vector, np.float16)
    return bool(np.isfinite(values).all() and values.any())


def _discard(catalog: Catalog, collection: CollectionInfo, image_ids: Sequence[int]) -> None:
    """Deletes faulty embeddings, and makes the images look unread so that indexing reads them again."""
    with catalog.writing() as session:
        hold_model(session, collection)
        for image_id in image_ids:
            image = session.get_one(ImageRow, image_id)
            session.execute(
                delete(EmbeddingRow).where(
                    EmbeddingRow.sha256 == image.sha256, EmbeddingRow.model_id == collection.model_id
                )
            )
            image.sha256, image.mtime_ns = b"", 0


def _give_up_on_lost_files(catalog: Catalog, collection: CollectionInfo, faulty: Mapping[int, str]) -> None:
    """Enters images with neither a sound embedding nor a file into the ledger."""
    lost = [image_id for image_id, path in faulty.items() if _is_lost(path)]
    if not lost:
        return
    with catalog.writing() as session:
        generation = advance_generation(session, collection)
        for image_id in lost:
            image = session.get_one(ImageRow, image_id)
            image.status, image.error_code, image.sha256 = "failed", "vanished", None
            image.error_message = "its embedding was damaged and the file is gone"
            forget_vector(session, collection, image_id, generation)


def _is_lost(path: str) -> bool:
    """Whether an image's file is known not to be there."""
    return is_gone(path) or (os.path.islink(path) and not os.path.exists(path))
