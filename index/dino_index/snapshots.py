"""Snapshots: files that hold a collection's vectors, indexed, as of one generation.

A snapshot is derived: whatever happens to the file, the catalog has all it was made from. Files are written under
a temporary name, synced and renamed; the row that points to them changes last.

A file begins with a FAISS index, which plain `faiss.read_index` opens. A flat one holds image ids and float32 vectors.
The others number vectors from 0 on, and after the index follow, from an offset divisible by 64, the image ids (int64,
-1 for an image that is gone) and the raw vectors (float16), which candidates are compared with exactly. Both parts are
mapped into memory, not read: opening takes the same time for any size, and processes share the pages.

Shapes: N images, D channels.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import faiss
import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from sqlalchemy import bindparam, delete, func, select, update
from sqlalchemy.orm import Session

from dino_index.approximate_search import ApproximateSearch
from dino_index.catalog import (
    Catalog,
    CollectionRow,
    EmbeddingRow,
    ImageRow,
    RemovalRow,
    SnapshotRow,
    StoredVectorsRow,
    storage_errors,
)
from dino_index.catalog.schema import DROPPED
from dino_index.collections import CollectionInfo, check_model, generation_of, hold_model, option_for
from dino_index.errors import CatalogUnavailable
from dino_index.exact_search import ExactSearch
from dino_index.index_type_names import FLAT
from dino_index.index_types import (
    Choice,
    add_rows,
    build_index,
    can_append,
    choose_index_type,
    flat_index,
    gpu_clone,
)
from dino_index.memory import available_bytes

_ROWS_PER_FETCH = 8192
_ALIGNMENT = 64
# Vectors that are gone stay in an index that is added to, and are passed over in each search.
_MAX_GONE_FRAC = 0.1
_GONE = -1
# Held out of the index while its search effort is chosen, so they must be no special ones.
_NUM_SHUFFLED = 4096
# Built once, as a service runs it for each picture.
_BY_CONTENT = select(EmbeddingRow.vector).where(
    EmbeddingRow.sha256 == bindparam("sha256"),
    EmbeddingRow.model_id == bindparam("model_id"),
    EmbeddingRow.kind == "cls",
    EmbeddingRow.region == "full",
)


@dataclass(frozen=True, slots=True)
class Vectors:
    """ids_N: int64. vectors_ND: float32, unit length."""

    ids_N: NDArray[np.int64]
    vectors_ND: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.ids_N)

    @property
    def dim(self) -> int:
        return int(self.vectors_ND.shape[1])

    def rows(self, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        return self.vectors_ND[positions]


@dataclass(frozen=True, slots=True)
class StoredVectors:
    """ids_N: int64, -1 where the image is gone. raw_ND: float16 as in the catalog; both may be mapped files."""

    ids_N: NDArray[np.int64]
    raw_ND: NDArray[np.float16]

    def __len__(self) -> int:
        return len(self.ids_N)

    @property
    def dim(self) -> int:
        return int(self.raw_ND.shape[1])

    def rows(self, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        return normalise(self.raw_ND[positions])


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Vectors that can be searched, and the images that they belong to."""

    ids_N: NDArray[np.int64]
    """Image id of each position; -1 where the image is gone."""
    searcher: ExactSearch | ApproximateSearch


class SnapshotDamaged(Exception):
    """The file that the catalog points to is missing, cut short or not what was written."""


def load_vectors(session: Session, collection: CollectionInfo, *, after_generation: int = -1) -> Vectors:
    """Search vectors (normalised [CLS]) of readable images that got theirs after a generation.

    Raises CatalogUnavailable for a vector of the wrong length.
    """
    num_images = count_vectors(session, collection, after_generation=after_generation)
    # Filled in place: at no time are there two copies of all vectors.
    ids_N = np.empty(num_images, np.int64)
    vectors_ND = np.empty((num_images, collection.dim), np.float32)
    for begin, ids, _, raw in stored_parts(session, collection, after_generation):
        ids_N[begin : begin + len(ids)] = ids
        vectors_ND[begin : begin + len(ids)] = normalise(raw)
    return Vectors(ids_N, vectors_ND)


def count_vectors(
    session: Session, collection: CollectionInfo, *, after_generation: int = -1, up_to_generation: int | None = None
) -> int:
    """How many readable images got their vector after a generation, and not after another."""
    changed = _changed(collection, after_generation, up_to_generation).subquery()
    return session.scalars(select(func.count()).select_from(changed)).one()


def stored_vector(session: Session, collection: CollectionInfo, sha256: bytes) -> NDArray[np.float16] | None:
    """The raw [CLS] of these bytes, (1, D), where the catalog has it and it is whole."""
    vector = session.scalars(_BY_CONTENT, {"sha256": sha256, "model_id": collection.model_id}).one_or_none()
    if vector is None or len(vector) != 2 * collection.dim:
        return None
    return np.frombuffer(vector, np.float16)[None]


def normalise(vectors_ND: NDArray[np.float16 | np.float32]) -> NDArray[np.float32]:
    """Rows scaled to unit length, in float32; a row of zeros stays zero."""
    wide_ND = _widened(vectors_ND) if vectors_ND.dtype == np.float16 else vectors_ND.astype(np.float32)
    norms_N = np.sqrt(np.einsum("nd,nd->n", wide_ND, wide_ND))
    result: NDArray[np.float32] = wide_ND / np.maximum(norms_N, np.float32(1e-12))[:, None]
    return result


def _widened(raw_ND: NDArray[Any]) -> NDArray[np.float32]:
    """float16 to float32 by FAISS, five times as fast as NumPy."""
    codec = faiss.IndexScalarQuantizer(raw_ND.shape[1], faiss.ScalarQuantizer.QT_fp16)
    wide_ND: NDArray[np.float32] = codec.sa_decode(np.ascontiguousarray(raw_ND).view(np.uint8))
    return wide_ND


def exact_snapshot(vectors: Vectors) -> Snapshot:
    """An exact index of these vectors, in memory."""
    return Snapshot(vectors.ids_N, ExactSearch(flat_index(vectors)))


def write_snapshot(catalog: Catalog, collection: CollectionInfo, *, append: bool = False) -> None:
    """Writes a snapshot of the present state and points the catalog to it. One process at a time.

    append: add to the present snapshot's index where that is possible, instead of building anew. Bytes of removed
    vectors then stay in the file, though nothing finds them.
    Raises TooLittleMemory, CatalogErrors; FingerprintMismatch when the collection was given another model meanwhile.
    """
    folder = snapshot_folder(catalog, collection)
    with storage_errors(catalog.home), _locked(folder):
        work = folder / f"{uuid4().hex[:8]}.partial"
        try:
            _write(catalog, collection, folder, work, append)
        finally:
            work.unlink(missing_ok=True)


def next_choice(session: Session, collection: CollectionInfo, num_vectors: int) -> Choice:
    """What would be built for so many vectors. Raises TooLittleMemory."""
    asked = session.get_one(CollectionRow, collection.id).index_type
    return choose_index_type(asked, num_vectors, collection.dim, available=available_bytes())


def read_snapshot(catalog: Catalog, collection: CollectionInfo, row: SnapshotRow) -> Snapshot:
    """The snapshot in the file that `row` points to. Raises SnapshotDamaged."""
    path = snapshot_folder(catalog, collection) / row.file_name
    try:
        num_bytes = path.stat().st_size
        if num_bytes != row.num_bytes:
            raise SnapshotDamaged(f"{path} has {num_bytes} bytes, expected {row.num_bytes}")
        index = _read_index(path, mapped=True)
        if index.d != collection.dim or (index.ntotal != row.num_vectors and row.index_type == FLAT):
            raise SnapshotDamaged(f"{path} holds {index.ntotal} vectors of {index.d}, expected {row.num_vectors}")
        num_gpus = faiss.get_num_gpus()
        if isinstance(index, faiss.IndexIDMap | faiss.IndexIDMap2):
            ids_N: NDArray[np.int64] = faiss.vector_to_array(index.id_map)
            flat = faiss.downcast_index(index.index)
            flat.referenced_objects = [index]  # type: ignore[attr-defined]  # owns it, and the mapped file
            return Snapshot(ids_N, ExactSearch(flat, gpu_index=gpu_clone(flat, num_gpus)))
        stored = _stored_in(path, index.ntotal, collection.dim)
    except (OSError, RuntimeError, ValueError) as error:
        raise SnapshotDamaged(f"{path} cannot be read: {error}") from error
    num_vectors = int((stored.ids_N != _GONE).sum())
    if num_vectors != row.num_vectors:
        raise SnapshotDamaged(f"{path} holds {num_vectors} vectors, expected {row.num_vectors}")
    return Snapshot(stored.ids_N, ApproximateSearch(index, stored, gpu_index=gpu_clone(index, num_gpus)))


def snapshot_ids(snapshot: Snapshot) -> NDArray[np.int64]:
    """Ids of the images in a snapshot."""
    ids: NDArray[np.int64] = snapshot.ids_N[snapshot.ids_N != _GONE]
    return ids


def snapshot_is_intact(catalog: Catalog, collection: CollectionInfo, row: SnapshotRow) -> bool:
    """Whether the snapshot's file still has the very bytes that were written."""
    try:
        return _file_digest(snapshot_folder(catalog, collection) / row.file_name) == row.sha256
    except OSError:
        return False


def snapshot_folder(catalog: Catalog, collection: CollectionInfo) -> Path:
    return catalog.snapshots_folder / str(collection.id)


def _write(catalog: Catalog, collection: CollectionInfo, folder: Path, work: Path, append: bool) -> None:
    with catalog.reading() as session:
        check_model(session, collection)
        generation = generation_of(session, collection)
        choice = next_choice(session, collection, count_vectors(session, collection))
        before = session.get(SnapshotRow, collection.id)
        session.expunge_all()
        grown = _grown(catalog, session, collection, before, choice) if append and before else None
        if grown is None:
            stored = _copy_vectors(session, collection, work)
    # Building may take long, and a database that is being read cannot tidy up behind its writers.
    if grown is None:
        index, choice = build_index(choice, stored)
        ids_N, raw_parts, reason = stored.ids_N, [stored.raw_ND], choice.reason
    else:
        assert before is not None
        index, ids_N, raw_parts = grown
        reason = before.reason
    path = folder / f"{FLAT if choice.name == FLAT else 'ann'}-{generation}-{uuid4().hex[:8]}.faiss"
    if choice.name == FLAT:
        _write_synced(path, _numbered(index, ids_N))
    else:
        _write_synced(path, index, ids_N, raw_parts)
    row = SnapshotRow(
        collection_id=collection.id,
        file_name=path.name,
        generation=generation,
        index_type=choice.name,
        reason=reason,
        num_vectors=int((ids_N != _GONE).sum()),
        num_bytes=path.stat().st_size,
        sha256=_file_digest(path),
    )
    with catalog.writing() as session:
        hold_model(session, collection)
        before = session.get(SnapshotRow, collection.id)
        # The one before is kept: a reader may have learned its name and not opened it yet.
        keep = {path.name, before.file_name} if before else {path.name}
        session.merge(row)
        forget_removals(session, collection)
    for file in folder.iterdir():
        if file.name not in keep and file.suffix in (".faiss", ".partial"):
            file.unlink(missing_ok=True)


def _grown(
    catalog: Catalog, session: Session, collection: CollectionInfo, before: SnapshotRow, choice: Choice
) -> tuple[faiss.Index, NDArray[np.int64], list[NDArray[np.float16]]] | None:
    """(index, ids, raw vectors in parts): the present snapshot with what came since; None to build it anew."""
    if before.index_type != choice.name or choice.name == FLAT:
        return None
    path = snapshot_folder(catalog, collection) / before.file_name
    try:
        if path.stat().st_size != before.num_bytes:
            return None
        index = _read_index(path, mapped=False)
        old = _stored_in(path, index.ntotal, collection.dim)
    except (OSError, RuntimeError, ValueError):
        return None
    delta_ids, delta_raw = _later_vectors(session, collection, before.generation)
    gone = np.isin(old.ids_N, masked_ids(session, collection, before.generation, delta_ids)) | (old.ids_N == _GONE)
    num_vectors = len(old) + len(delta_ids)
    if gone.sum() > _MAX_GONE_FRAC * len(old) or not can_append(index, num_vectors):
        return None
    delta = StoredVectors(delta_ids, delta_raw)
    add_rows(index, delta, 0, len(delta))
    ids_N = np.concatenate([np.where(gone, _GONE, old.ids_N), delta_ids])
    return index, ids_N, [old.raw_ND, delta_raw]


def masked_ids(
    session: Session, collection: CollectionInfo, after_generation: int, delta_ids: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Images whose vector in a snapshot of that generation no longer counts, given those that got another since."""
    removed = session.scalars(
        select(RemovalRow.image_id).where(
            RemovalRow.collection_id == collection.id, RemovalRow.generation > after_generation
        )
    ).all()
    return np.union1d(np.array(removed, np.int64), delta_ids)


def forget_removals(session: Session, collection: CollectionInfo) -> None:
    """Drops the notes of removals that neither the snapshot nor a vector server has to be told any more."""
    stored = StoredVectorsRow.collection_id == collection.id, StoredVectorsRow.state != DROPPED
    told = [
        *session.scalars(select(SnapshotRow.generation).where(SnapshotRow.collection_id == collection.id)),
        *session.scalars(select(StoredVectorsRow.generation).where(*stored)),
    ]
    if told:
        known = RemovalRow.collection_id == collection.id, RemovalRow.generation <= min(told)
        session.execute(delete(RemovalRow).where(*known))


def drop_stored(session: Session, collection: CollectionInfo) -> None:
    """Has everything dropped that vector servers hold of a collection, as soon as they are reached."""
    ours = StoredVectorsRow.collection_id == collection.id
    session.execute(update(StoredVectorsRow).where(ours).values(state=DROPPED))


def _changed(collection: CollectionInfo, after_generation: int, up_to_generation: int | None = None) -> Any:
    changed = (
        select(ImageRow.id, ImageRow.generation, EmbeddingRow.vector)
        .join(EmbeddingRow, EmbeddingRow.sha256 == ImageRow.sha256)
        .where(
            ImageRow.collection_id == collection.id,
            ImageRow.status == "ok",
            ImageRow.generation > after_generation,
            EmbeddingRow.model_id == collection.model_id,
            EmbeddingRow.kind == "cls",
            EmbeddingRow.region == "full",
        )
    )
    return changed if up_to_generation is None else changed.where(ImageRow.generation <= up_to_generation)


def stored_parts(
    session: Session, collection: CollectionInfo, after_generation: int = -1, up_to_generation: int | None = None
) -> Iterator[tuple[int, list[int], list[int], NDArray[np.float16]]]:
    """(begin, ids, generations, raw vectors) of consecutive parts, by id. Raises CatalogUnavailable."""
    changed = _changed(collection, after_generation, up_to_generation).order_by(ImageRow.id)
    begin = 0
    for part in session.execute(changed, execution_options={"yield_per": _ROWS_PER_FETCH}).partitions():
        if any(len(row.vector) != 2 * collection.dim for row in part):
            raise CatalogUnavailable(
                f"collection {collection.name!r} has an embedding that is no vector of {collection.dim} numbers; "
                f"run: dino-search verify --repair{option_for(collection.name)}"
            )
        raw = np.frombuffer(b"".join(row.vector for row in part), np.float16)
        yield begin, [row.id for row in part], [row.generation for row in part], raw.reshape(len(part), collection.dim)
        begin += len(part)


def _later_vectors(
    session: Session, collection: CollectionInfo, after_generation: int
) -> tuple[NDArray[np.int64], NDArray[np.float16]]:
    ids: list[int] = []
    parts = [np.empty((0, collection.dim), np.float16)]
    for _, part_ids, _, raw in stored_parts(session, collection, after_generation):
        ids += part_ids
        parts.append(raw)
    return np.array(ids, np.int64), np.concatenate(parts)


def _copy_vectors(session: Session, collection: CollectionInfo, path: Path) -> StoredVectors:
    """All vectors of the collection in a file of their own, mapped; the last ones are a random choice of them."""
    num_images = count_vectors(session, collection)
    if not num_images:
        return StoredVectors(np.empty(0, np.int64), np.empty((0, collection.dim), np.float16))
    ids_N = np.empty(num_images, np.int64)
    with open(path, "wb") as file:
        for begin, ids, _, raw in stored_parts(session, collection):
            ids_N[begin : begin + len(ids)] = ids
            _write_rows(file, raw)
    raw_ND: NDArray[np.float16] = np.memmap(path, np.float16, "r+", shape=(num_images, collection.dim))
    num_last = min(_NUM_SHUFFLED, num_images // 2)
    last = np.arange(num_images - num_last, num_images)
    others = np.random.default_rng(0).choice(num_images - num_last, num_last, replace=False)
    for array in (ids_N, raw_ND):
        array[last], array[others] = array[others], array[last]
    return StoredVectors(ids_N, raw_ND)


def _numbered(flat: faiss.Index, ids_N: NDArray[np.int64]) -> faiss.Index:
    """The index answering with image ids."""
    # FAISS numbers only an index that is still empty, and would then copy all that is added.
    numbered = faiss.IndexIDMap2(faiss.IndexFlatIP(flat.d))
    numbered.index = flat
    numbered.referenced_objects = [flat]  # type: ignore[attr-defined]
    faiss.copy_array_to_vector(np.ascontiguousarray(ids_N), numbered.id_map)
    numbered.ntotal = flat.ntotal
    return numbered


def _read_index(path: Path, *, mapped: bool) -> faiss.Index:
    """Raises RuntimeError, OSError."""
    flags = faiss.IO_FLAG_MMAP_IFC if mapped else 0
    with open(path, "rb") as file:
        # FAISS takes only names that are UTF-8; this one leads to any open file.
        by_number = f"/dev/fd/{file.fileno()}"
        if os.path.exists(by_number):
            return faiss.read_index(by_number, flags)
        return faiss.read_index(faiss.PyCallbackIOReader(file.read))  # type: ignore[attr-defined]


def _stored_in(path: Path, num_vectors: int, dim: int) -> StoredVectors:
    """Ids and raw vectors at the end of a snapshot file. Raises OSError, ValueError."""
    offset = path.stat().st_size - num_vectors * (8 + 2 * dim)
    with open(path, "rb") as file:
        if offset <= 0:
            raise ValueError("it holds an index without vectors")
        file.seek(offset)
        ids_N = np.fromfile(file, np.int64, num_vectors)
        raw_ND: NDArray[np.float16] = np.memmap(
            file, np.float16, "r", offset=offset + 8 * num_vectors, shape=(num_vectors, dim)
        )
    return StoredVectors(ids_N, raw_ND)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        yield


def _write_synced(
    path: Path,
    index: faiss.Index,
    ids_N: NDArray[np.int64] | None = None,
    raw_parts: Sequence[NDArray[np.float16]] = (),
) -> None:
    """Writes the file whole or not at all. Raises OSError."""
    partial = path.with_suffix(".partial")
    try:
        # FAISS says why a write failed only in words; the system's own error is what callers understand.
        with open(partial, "wb") as file:
            faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))  # type: ignore[attr-defined]
            if ids_N is not None:
                file.write(bytes(-file.tell() % _ALIGNMENT))
                file.write(ids_N.tobytes())
                for raw_ND in raw_parts:
                    _write_rows(file, raw_ND)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _write_rows(file: Any, raw_ND: NDArray[np.float16]) -> None:
    """Not by `tofile`, whose error does not say that the disk is full."""
    for begin in range(0, len(raw_ND), _ROWS_PER_FETCH):
        file.write(np.ascontiguousarray(raw_ND[begin : begin + _ROWS_PER_FETCH]).tobytes())


def _file_digest(path: Path) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
