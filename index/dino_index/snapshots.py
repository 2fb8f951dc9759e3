"""Snapshots: FAISS files that hold a collection's vectors as of one generation.

A snapshot is derived: whatever happens to the file, the catalog has all it was made from. Files are written under
a temporary name, synced and renamed; the row that points to them changes last.

Shapes: N images, D channels.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import faiss
import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from dino_index.catalog import Catalog, EmbeddingRow, ImageRow, RemovalRow, SnapshotRow, storage_errors
from dino_index.collections import CollectionInfo, check_model, generation_of, hold_model, option_for
from dino_index.errors import CatalogUnavailable

INDEX_TYPE = "flat"

_ROWS_PER_FETCH = 8192


@dataclass(frozen=True, slots=True)
class Vectors:
    """ids_N: int64. vectors_ND: float32, unit length."""

    ids_N: NDArray[np.int64]
    vectors_ND: NDArray[np.float32]


class SnapshotDamaged(Exception):
    """The file that the catalog points to is missing, cut short or not what was written."""


def load_vectors(session: Session, collection: CollectionInfo, *, after_generation: int = -1) -> Vectors:
    """Search vectors (normalised [CLS]) of readable images that got theirs after a generation.

    Raises CatalogUnavailable for a vector of the wrong length.
    """
    changed = (
        select(ImageRow.id, EmbeddingRow.vector)
        .join(EmbeddingRow, EmbeddingRow.sha256 == ImageRow.sha256)
        .where(
            ImageRow.collection_id == collection.id,
            ImageRow.status == "ok",
            ImageRow.generation > after_generation,
            EmbeddingRow.model_id == collection.model_id,
            EmbeddingRow.kind == "cls",
            EmbeddingRow.region == "full",
        )
        .order_by(ImageRow.id)
    )
    num_images = session.scalars(select(func.count()).select_from(changed.subquery())).one()
    # Filled in place: at no time are there two copies of all vectors.
    ids_N = np.empty(num_images, np.int64)
    vectors_ND = np.empty((num_images, collection.dim), np.float32)
    begin = 0
    for part in session.execute(changed, execution_options={"yield_per": _ROWS_PER_FETCH}).partitions():
        end = begin + len(part)
        ids_N[begin:end] = [row.id for row in part]
        if any(len(row.vector) != 2 * collection.dim for row in part):
            raise CatalogUnavailable(
                f"collection {collection.name!r} has an embedding that is no vector of {collection.dim} numbers; "
                f"run: dino-search verify --repair{option_for(collection.name)}"
            )
        raw = np.frombuffer(b"".join(row.vector for row in part), np.float16)
        vectors_ND[begin:end] = normalise(raw.reshape(len(part), collection.dim))
        begin = end
    return Vectors(ids_N, vectors_ND)


def stored_vector(session: Session, collection: CollectionInfo, sha256: bytes) -> NDArray[np.float16] | None:
    """The raw [CLS] of these bytes, (1, D), where the catalog has it and it is whole."""
    vector = session.scalars(
        select(EmbeddingRow.vector).where(
            EmbeddingRow.sha256 == sha256,
            EmbeddingRow.model_id == collection.model_id,
            EmbeddingRow.kind == "cls",
            EmbeddingRow.region == "full",
        )
    ).one_or_none()
    if vector is None or len(vector) != 2 * collection.dim:
        return None
    return np.frombuffer(vector, np.float16)[None]


def normalise(vectors_ND: NDArray[np.float16 | np.float32]) -> NDArray[np.float32]:
    """Rows scaled to unit length, in float32; a row of zeros stays zero."""
    wide_ND = vectors_ND.astype(np.float32)
    norms_N1 = np.linalg.norm(wide_ND, axis=1, keepdims=True)
    result: NDArray[np.float32] = wide_ND / np.maximum(norms_N1, np.float32(1e-12))
    return result


def build_index(vectors: Vectors) -> faiss.Index:
    """An exact inner-product index that answers with image ids."""
    index = faiss.IndexIDMap2(faiss.IndexFlatIP(vectors.vectors_ND.shape[1]))
    index.add_with_ids(vectors.vectors_ND, vectors.ids_N)
    return index


def write_snapshot(catalog: Catalog, collection: CollectionInfo) -> None:
    """Writes a snapshot of the present state and points the catalog to it. One process at a time.

    Raises FingerprintMismatch when the collection has been given another model meanwhile.
    """
    folder = snapshot_folder(catalog, collection)
    with storage_errors(catalog.home), _locked(folder):
        with catalog.reading() as session:
            check_model(session, collection)
            generation = generation_of(session, collection)
            index = build_index(load_vectors(session, collection))
        path = folder / f"{INDEX_TYPE}-{generation}-{uuid4().hex[:8]}.faiss"
        _write_synced(path, index)
        row = SnapshotRow(
            collection_id=collection.id,
            file_name=path.name,
            generation=generation,
            index_type=INDEX_TYPE,
            num_vectors=index.ntotal,
            num_bytes=path.stat().st_size,
            sha256=_file_digest(path),
        )
        with catalog.writing() as session:
            hold_model(session, collection)
            before = session.get(SnapshotRow, collection.id)
            # The one before is kept: a reader may have learned its name and not opened it yet.
            keep = {path.name, before.file_name} if before else {path.name}
            session.merge(row)
            outdated = RemovalRow.collection_id == collection.id, RemovalRow.generation <= generation
            session.execute(delete(RemovalRow).where(*outdated))
        for file in folder.iterdir():
            if file.name not in keep and file.suffix in (".faiss", ".partial"):
                file.unlink(missing_ok=True)


def read_snapshot(catalog: Catalog, collection: CollectionInfo, row: SnapshotRow) -> faiss.Index:
    """The index in the file that `row` points to. Raises SnapshotDamaged."""
    path = snapshot_folder(catalog, collection) / row.file_name
    try:
        num_bytes = path.stat().st_size
        if num_bytes != row.num_bytes:
            raise SnapshotDamaged(f"{path} has {num_bytes} bytes, expected {row.num_bytes}")
        # Not by name: FAISS takes only names that are UTF-8.
        with open(path, "rb") as file:
            index = faiss.read_index(faiss.PyCallbackIOReader(file.read))  # type: ignore[attr-defined]
    except (OSError, RuntimeError) as error:
        raise SnapshotDamaged(f"{path} cannot be read: {error}") from error
    if index.ntotal != row.num_vectors or index.d != collection.dim:
        raise SnapshotDamaged(f"{path} holds {index.ntotal} vectors of {index.d}, expected {row.num_vectors}")
    return index


def snapshot_ids(index: faiss.Index) -> NDArray[np.int64]:
    """Image ids of an index's vectors, in their order."""
    ids: NDArray[np.int64] = faiss.vector_to_array(index.id_map)  # type: ignore[attr-defined]
    return ids


def snapshot_is_intact(catalog: Catalog, collection: CollectionInfo, row: SnapshotRow) -> bool:
    """Whether the snapshot's file still has the very bytes that were written."""
    try:
        return _file_digest(snapshot_folder(catalog, collection) / row.file_name) == row.sha256
    except OSError:
        return False


def snapshot_folder(catalog: Catalog, collection: CollectionInfo) -> Path:
    return catalog.home / "snapshots" / str(collection.id)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        yield


def _write_synced(path: Path, index: faiss.Index) -> None:
    """Writes the file whole or not at all. Raises OSError."""
    partial = path.with_suffix(".partial")
    try:
        # FAISS says why a write failed only in words; the system's own error is what callers understand.
        with open(partial, "wb") as file:
            faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))  # type: ignore[attr-defined]
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _file_digest(path: Path) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
