"""Writing a collection out: Parquet, .npy and FAISS files that other programs open, and `import` restores.

Shapes: N images of a part, D channels.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args
from uuid import uuid4

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from sqlalchemy import Row, Select, and_, select
from sqlalchemy.orm import Session, aliased

from dino_index.catalog import Catalog, CollectionRow, EmbeddingRow, ImageRow, SourceRow
from dino_index.catalog.portable_paths import decode_path, encode_path
from dino_index.collections import CollectionInfo, count_images, find_collection, join_path, option_for
from dino_index.copy_exchange import write_copy_tables
from dino_index.errors import CatalogUnavailable, DinoSearchError, OutputExists, OutputUnwritable
from dino_index.exchange import (
    DESCRIPTION,
    FAILED_FILE,
    FAILED_SCHEMA,
    FAISS_FILE,
    IMAGE_SCHEMA,
    METADATA,
    RAW_VECTORS,
    UNIT_VECTORS,
    Description,
    ExportedFile,
    ExportedModel,
    metadata_file,
    read_description,
    vectors_file,
)
from dino_index.snapshots import normalise

ExportFormat = Literal["all", "embeddings", "faiss"]

# A part is in memory while it is written: some 100 MB of vectors for 384 channels, and the rows.
_ROWS_A_PART = 50_000
_ROWS_PER_FETCH = 2048


@dataclass(frozen=True, kw_only=True)
class ExportSummary:
    """What was written."""

    folder: Path
    collection: str
    images: int
    failed: int
    parts: int
    num_bytes: int

    def to_json(self) -> dict[str, Any]:
        return {
            "folder": encode_path(str(self.folder)), "collection": self.collection, "images": self.images,
            "failed": self.failed, "parts": self.parts, "bytes": self.num_bytes,
        }  # fmt: skip


def export_collection(
    catalog: Catalog,
    name: str,
    folder: str | Path,
    *,
    form: ExportFormat = "all",
    force: bool = False,
    rows_a_part: int = _ROWS_A_PART,
) -> ExportSummary:
    """Writes one state of a collection into a new folder, whole or not at all.

    form: `all`; `embeddings` leaves the FAISS file out; `faiss` writes that file and the metadata alone.
    force: an earlier export in `folder` is replaced; anything else there is refused in any case.
    Raises OutputExists, OutputUnwritable, CollectionNotFound, CatalogErrors.
    """
    assert form in get_args(ExportFormat), form
    folder = Path(folder).absolute()
    _refuse_existing(folder, force)
    # In this order: what goes wrong with the folder must not look like trouble with the home.
    with catalog.reading() as session, _new_folder(folder) as partial:
        summary = _Export(session, name, partial, form, rows_a_part).write()
    return ExportSummary(
        folder=folder, collection=name, images=summary.images, failed=summary.failed, parts=len(summary.rows),
        num_bytes=sum(file.num_bytes for file in summary.files.values()),
    )  # fmt: skip


class _Export:
    """One export: what its steps share."""

    def __init__(self, session: Session, name: str, folder: Path, form: ExportFormat, rows_a_part: int) -> None:
        self._session = session
        self._collection = find_collection(session, name)
        self._folder = folder
        self._form = form
        self._rows_a_part = rows_a_part
        self._files: dict[str, ExportedFile] = {}

    def write(self) -> Description:
        counts = count_images(self._session, self._collection)
        num_images = counts["ok"]
        rows = [min(self._rows_a_part, num_images - begin) for begin in range(0, num_images, self._rows_a_part)]
        for name in (METADATA, *((UNIT_VECTORS, *RAW_VECTORS.values()) if self._form != "faiss" else ())):
            (self._folder / name).mkdir()
        index = FlatIndexFile(self._folder / FAISS_FILE, self._collection.dim) if self._form != "embeddings" else None
        with index or nullcontext():
            last_id = -1
            for part, num_rows in enumerate(rows):
                loaded = _load_part(self._session, self._collection, last_id, num_rows)
                last_id = loaded.ids[-1]
                self._write_part(loaded, part, len(rows))
                if index is not None:
                    index.add(normalise(loaded.vectors["cls"]))
        if index is not None:
            self._note(FAISS_FILE)
        self._write_failed()
        if self._form != "faiss":
            for name in write_copy_tables(self._session, self._collection, self._folder):
                self._note(name)
        description = self._describe(num_images, counts["failed"], rows)
        _write_text(self._folder / DESCRIPTION, json.dumps(description.to_json(), indent=1))
        return description

    def _write_part(self, part: _Part, number: int, num_parts: int) -> None:
        name = metadata_file(number, num_parts)
        pq.write_table(pa.Table.from_pylist(part.rows, schema=IMAGE_SCHEMA), self._folder / name)
        self._note(name)
        if self._form == "faiss":
            return
        vectors = {UNIT_VECTORS: normalise(part.vectors["cls"]).astype(np.float16)}
        vectors |= {RAW_VECTORS[kind]: raw_ND for kind, raw_ND in part.vectors.items()}
        for folder, vectors_ND in vectors.items():
            name = vectors_file(folder, number, num_parts)
            with open(self._folder / name, "wb") as file:
                np.save(file, vectors_ND, allow_pickle=False)
            self._note(name)

    def _write_failed(self) -> None:
        """The ledger, a page of rows at a time."""
        rows = (
            _file_columns(row.ImageRow, row.source)
            | {"error_code": row.ImageRow.error_code, "error_message": row.ImageRow.error_message}
            for row in _pages(self._session, _images(self._collection, "failed"))
        )
        with pq.ParquetWriter(self._folder / FAILED_FILE, FAILED_SCHEMA) as writer:
            page: list[dict[str, Any]] = []
            for row in rows:
                page.append(row)
                if len(page) == _ROWS_PER_FETCH:
                    writer.write_table(pa.Table.from_pylist(page, schema=FAILED_SCHEMA))
                    page = []
            writer.write_table(pa.Table.from_pylist(page, schema=FAILED_SCHEMA))
        self._note(FAILED_FILE)

    def _note(self, name: str) -> None:
        """Enters a finished file, once it is on the disk, into the description."""
        path = self._folder / name
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self._files[name] = ExportedFile(num_bytes=path.stat().st_size, sha256=digest)

    def _describe(self, num_images: int, num_failed: int, rows: list[int]) -> Description:
        collection = self._collection
        asked = self._session.get_one(CollectionRow, collection.id).index_type
        model = ExportedModel(
            name=collection.model_name, fingerprint=collection.fingerprint, dim=collection.dim,
            config=collection.model_config,
        )  # fmt: skip
        return Description(
            export_id=uuid4().hex, written_at=datetime.now(UTC).isoformat(timespec="seconds"),
            collection=collection.name, index_type=asked, model=model, images=num_images, failed=num_failed,
            rows=rows, files=self._files,
        )  # fmt: skip


@dataclass(kw_only=True)
class _Part:
    """Images with consecutive ids. vectors: raw float16 (N, D) by kind."""

    ids: list[int] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    vectors: dict[str, NDArray[np.float16]] = field(default_factory=dict)


def _load_part(session: Session, collection: CollectionInfo, after_id: int, num_rows: int) -> _Part:
    """The next readable images after an id. Raises CatalogUnavailable for one without its two vectors."""
    cls, gem = (aliased(EmbeddingRow) for _ in range(2))
    wanted: Select[*tuple[Any, ...]] = _images(collection, "ok").where(ImageRow.id > after_id).limit(num_rows)
    for kind, vectors in (("cls", cls), ("gem", gem)):
        of_image = and_(
            vectors.sha256 == ImageRow.sha256, vectors.model_id == collection.model_id,
            vectors.kind == kind, vectors.region == "full",
        )  # fmt: skip
        wanted = wanted.outerjoin(vectors, of_image).add_columns(vectors.vector.label(kind))
    part = _Part(vectors={kind: np.empty((num_rows, collection.dim), np.float16) for kind in RAW_VECTORS})
    for number, row in enumerate(_pages(session, wanted)):
        image: ImageRow = row.ImageRow
        for kind, vectors_ND in part.vectors.items():
            raw: bytes | None = getattr(row, kind)
            if image.sha256 is None or raw is None or len(raw) != 2 * collection.dim:
                raise CatalogUnavailable(
                    f"image {image.id} of collection {collection.name!r} has no whole {kind} vector; "
                    f"run: dino-search verify --repair{option_for(collection.name)}"
                )
            vectors_ND[number] = np.frombuffer(raw, np.float16)
        assert image.sha256 is not None
        part.ids.append(image.id)
        part.rows.append(
            _file_columns(image, row.source)
            | {"sha256": image.sha256.hex(), "width": image.width, "height": image.height}
        )
    assert len(part.ids) == num_rows, (len(part.ids), num_rows)
    return part


def _images(collection: CollectionInfo, status: str) -> Select[ImageRow, str]:
    return (
        select(ImageRow, SourceRow.path.label("source"))
        .join(SourceRow, SourceRow.id == ImageRow.source_id)
        .where(ImageRow.collection_id == collection.id, ImageRow.status == status)
        .order_by(ImageRow.id)
    )


def _pages(session: Session, rows: Select[*tuple[Any, ...]]) -> Iterator[Row[*tuple[Any, ...]]]:
    """The rows, of which only a page is in memory: a session keeps unchanged objects no longer than their user."""
    for page in session.execute(rows, execution_options={"yield_per": _ROWS_PER_FETCH}).partitions():
        yield from page


def _file_columns(image: ImageRow, source: str) -> dict[str, Any]:
    """What both tables say about a file."""
    added_at = image.added_at if image.added_at.tzinfo else image.added_at.replace(tzinfo=UTC)
    return {
        "image_path": _readable_path(join_path(decode_path(source), image.path)),
        "image_id": image.id,
        "source": source,
        "path": image.path,
        "label": image.label,
        "size": image.size,
        "mtime_ns": image.mtime_ns,
        "added_at": added_at.astimezone(UTC).isoformat(),
        "metadata": json.dumps(image.facts, ensure_ascii=False),
    }


def _readable_path(path: str) -> str:
    """The path as other programs can open it; in the portable encoding where it is no UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return encode_path(path)
    return path


class FlatIndexFile:
    """A FAISS file of an exact inner-product index, written vector by vector: it is never in memory as a whole.

    Byte for byte what `faiss.write_index` writes. A vector's id is its number in the order of adding.
    """

    _COUNT_AT = 8
    """Where the header has the number of vectors; it ends in the number of floats. Both 64 bits, little-endian."""

    def __init__(self, path: Path, dim: int) -> None:
        self._file = open(path, "wb")  # noqa: SIM115 (closed by __exit__)
        self._dim = dim
        self._num_vectors = 0
        self._header = faiss.serialize_index(faiss.IndexFlatIP(dim)).tobytes()
        self._file.write(self._header)

    def __enter__(self) -> FlatIndexFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._file as file:
            if kind is None:
                header = bytearray(self._header)
                header[self._COUNT_AT : self._COUNT_AT + 8] = self._num_vectors.to_bytes(8, "little")
                header[-8:] = (self._num_vectors * self._dim).to_bytes(8, "little")
                file.seek(0)
                file.write(header)

    def add(self, vectors_ND: NDArray[np.float32]) -> None:
        assert vectors_ND.dtype == np.float32, vectors_ND.dtype
        assert vectors_ND.shape[1] == self._dim, vectors_ND.shape
        self._file.write(np.ascontiguousarray(vectors_ND, "<f4").data)
        self._num_vectors += len(vectors_ND)


def _refuse_existing(folder: Path, force: bool) -> None:
    if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        read_description(folder)
    except DinoSearchError as error:
        raise OutputExists(
            f"{folder} exists already and is no earlier export, so it is not touched, with --force neither; "
            "choose another name"
        ) from error
    if not force:
        raise OutputExists(f"{folder} exists already; choose another name or add --force to replace that export")


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that takes its place at the end, or goes away. Raises OutputUnwritable."""
    unique = uuid4().hex[:8]
    partial, before = (folder.with_name(f".{folder.name}.{unique}.{what}") for what in ("partial", "before"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        if folder.is_dir():
            os.rename(folder, before)
        try:
            os.rename(partial, folder)
        except BaseException:
            if before.is_dir():
                os.rename(before, folder)
            raise
    except OSError as error:
        advice = "free some space or choose" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "choose"
        raise OutputUnwritable(
            f"{folder} cannot be written: {error.strerror or error}; {advice} another place; nothing was left there"
        ) from error
    finally:
        for leftover in (partial, before):
            shutil.rmtree(leftover, ignore_errors=True)


def _write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def exported_paths(folder: Path) -> Iterator[Sequence[str]]:
    """The `image_path` of every image and failed file of an export, some at a time.

    Raises OSError and pyarrow's errors for a folder that is no sound export.
    """
    for path in [*sorted((folder / METADATA).glob("*.parquet")), folder / FAILED_FILE]:
        with pq.ParquetFile(path) as table:
            for batch in table.iter_batches(columns=["image_path"]):
                yield batch.column(0).to_pylist()
