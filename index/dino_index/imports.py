"""Reading an exported collection back in, a part in one transaction.

Every file of the export is checked before the first row is written. An import that is stopped leaves whole parts; the
same import again goes on from there.

Shapes: N images of a part, D channels.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from sqlalchemy import func, insert, select, text
from sqlalchemy.orm import Session

from dino_index.catalog import (
    Catalog,
    CollectionRow,
    EmbeddingRow,
    ImageRow,
    ModelRow,
    SettingRow,
    SourceRow,
    bound_parts,
)
from dino_index.catalog.portable_paths import decode_path
from dino_index.collections import (
    CollectionInfo,
    advance_generation,
    count_images,
    find_collection,
    join_path,
    relative_path,
    source_paths,
)
from dino_index.copy_exchange import read_copy_tables, store_copy_tables
from dino_index.errors import CollectionNotFound, ExportDamaged, FingerprintMismatch
from dino_index.exchange import (
    FAILED_FILE,
    FAILED_SCHEMA,
    IMAGE_SCHEMA,
    RAW_VECTORS,
    Description,
    metadata_file,
    read_description,
    require_complete,
    vectors_file,
)
from dino_index.model_files import ModelSpec
from dino_index.recording import Sources
from dino_index.vector_stores import vector_store_of

_FAILED_ROWS_A_TRANSACTION = 10_000
# Fewer new vectors than that are searched from the catalog, as after `index`.
# Everything about an image that an import may bring or change, id and generation aside.
_COMPARED = (
    "sha256", "size", "mtime_ns", "width", "height", "label", "facts", "status", "error_code", "error_message",
)  # fmt: skip


@dataclass(kw_only=True)
class ImportSummary:
    """What became of an export's images and failed files."""

    collection: str
    added: int = 0
    updated: int = 0
    """Known under their path with other content, label or metadata: the export's counts."""
    skipped: int = 0
    """Known and the same; or entered as failed in the export and readable here."""
    failed: int = 0
    """Of those above, how many are in the export's ledger."""
    images: int = 0
    """Readable images in the collection after the import."""
    ids: str = "new"
    """`kept`: the images have the ids that they had in the exporting home."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def import_collection(
    catalog: Catalog,
    name: str,
    folder: str | Path,
    model: ModelSpec | None = None,
    *,
    on_part: Callable[[int, int], None] = lambda done, total: None,
) -> ImportSummary:
    """Adds an export's images with vectors, labels and metadata to a collection, which is made when it is not there.

    model: where the weights are on this machine; must be those that the vectors come from.
    on_part: called with images done and in total after each part.
    Raises NotAnExport, ExportTooNew, ExportIncomplete, ExportDamaged, FingerprintMismatch, CatalogErrors.
    """
    folder = Path(folder)
    description = read_description(folder)
    require_complete(description, folder)
    if model is not None and model.fingerprint != description.model.fingerprint:
        raise FingerprintMismatch(
            f"the vectors in {folder} come from {description.model.name} ({description.model.fingerprint[:12]}), not "
            f"from {model.name} ({model.fingerprint[:12]}); leave out --model, or give the file with those weights"
        )
    _require_room(catalog, name, description, folder)
    check_files(description, folder)
    return _Import(catalog, name, folder, description, model).run(on_part)


def check_files(description: Description, folder: Path) -> None:
    """Reads every file of an export once. Raises ExportDamaged for one that is not what was written."""
    for name, expected in description.files.items():
        path = folder / name
        try:
            num_bytes = path.stat().st_size
            if num_bytes != expected.num_bytes:
                raise ExportDamaged(
                    f"{path} has {num_bytes} bytes, expected {expected.num_bytes}; copy the export again"
                )
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected.sha256:
                    raise ExportDamaged(f"{path} is not as it was written (another sha256); copy the export again")
        except OSError as error:
            raise ExportDamaged(f"{path} cannot be read: {error.strerror}; copy the export again") from error


class _Import:
    """One import: what its transactions share."""

    def __init__(
        self, catalog: Catalog, name: str, folder: Path, description: Description, model: ModelSpec | None
    ) -> None:
        self._catalog = catalog
        self._name = name
        self._folder = folder
        self._description = description
        self._model = model
        self._counts: Counter[str] = Counter()

    def run(self, on_part: Callable[[int, int], None]) -> ImportSummary:
        rows = self._description.rows
        done = 0
        for part in range(len(rows)):
            images, vectors = self._read_part(part)
            self._record(images, vectors)
            done += len(images)
            on_part(done, self._description.images)
        for failed in self._read_failed():
            self._record(failed, {})
        tables = read_copy_tables(self._folder, self._description.files)
        with self._catalog.writing() as session:
            collection, keep_ids = self._open(session)
            store_copy_tables(session, collection, tables)
            session.delete(session.get_one(SettingRow, _marker(collection)))
        with self._catalog.reading() as session:
            num_images = count_images(session, collection)["ok"]
        vector_store_of(self._catalog).settle(collection)
        return ImportSummary(
            collection=self._name, images=num_images, failed=self._description.failed,
            ids="kept" if keep_ids else "new", **self._counts,
        )  # fmt: skip

    def _open(self, session: Session) -> tuple[CollectionInfo, bool]:
        """The collection, made where it is missing, and whether images keep the ids of the export."""
        try:
            collection, is_first = find_collection(session, self._name), False
        except CollectionNotFound:
            is_first = session.scalars(select(func.count()).select_from(CollectionRow)).one() == 0
            collection = self._create(session)
        _require_same_fingerprint(collection, self._description, self._folder)
        if self._model is not None:
            row = session.get_one(ModelRow, collection.model_id)
            row.name, row.config = self._model.name, self._model.config()
        marker = session.get(SettingRow, _marker(collection))
        if marker is None or marker.value.get("export_id") != self._description.export_id:
            # Ids are promised never to name another image, so that the old ones serve only in a home without any.
            value = {"export_id": self._description.export_id, "keep_ids": is_first}
            marker = session.merge(SettingRow(key=_marker(collection), value=value))
        return collection, bool(marker.value["keep_ids"])

    def _create(self, session: Session) -> CollectionInfo:
        exported = self._description.model
        model = session.scalars(select(ModelRow).where(ModelRow.fingerprint == exported.fingerprint)).one_or_none()
        if model is None:
            model = ModelRow(**vars(exported))
            session.add(model)
        session.flush()
        session.add(CollectionRow(name=self._name, model_id=model.id, index_type=self._description.index_type))
        session.flush()
        return find_collection(session, self._name)

    def _record(self, images: Sequence[Mapping[str, Any]], vectors: Mapping[str, NDArray[np.float16]]) -> None:
        """One transaction. vectors: (N, D) by kind, in the order of the images; none for failed files."""
        with self._catalog.writing() as session:
            collection, keep_ids = self._open(session)
            placed = _place(session, collection, images)
            self._counts["skipped"] += len(images) - len(placed)
            _store_vectors(session, collection, images, vectors)
            self._counts += _Recorder(session, collection, keep_ids).record(placed)

    def _read_part(self, part: int) -> tuple[list[dict[str, Any]], dict[str, NDArray[np.float16]]]:
        num_rows, num_parts = self._description.rows[part], len(self._description.rows)
        with self._open_table(metadata_file(part, num_parts), IMAGE_SCHEMA) as table:
            images = _images_of(table.read(), "ok")
        if len(images) != num_rows:
            name = metadata_file(part, num_parts)
            raise ExportDamaged(f"{self._folder / name} has {len(images)} rows, expected {num_rows}")
        vectors = {}
        for kind, folder in RAW_VECTORS.items():
            path = self._folder / vectors_file(folder, part, num_parts)
            try:
                vectors_ND = np.load(path, allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise ExportDamaged(f"{path} is no array that NumPy reads: {error}") from error
            expected = (num_rows, self._description.model.dim)
            if not isinstance(vectors_ND, np.ndarray) or (vectors_ND.dtype, vectors_ND.shape) != (np.float16, expected):
                raise ExportDamaged(f"{path} is {vectors_ND.dtype} {vectors_ND.shape}, expected float16 {expected}")
            unsound = ~np.isfinite(vectors_ND).all(axis=1) | ~vectors_ND.any(axis=1)
            if unsound.any():
                raise ExportDamaged(f"{path}: row {int(unsound.argmax())} is no vector (all zero, or not finite)")
            vectors[kind] = vectors_ND
        return images, vectors

    def _read_failed(self) -> Iterator[list[dict[str, Any]]]:
        """The ledger, as much at a time as one transaction takes."""
        path = self._folder / FAILED_FILE
        num_rows = 0
        with self._open_table(FAILED_FILE, FAILED_SCHEMA) as table:
            for batch in table.iter_batches(_FAILED_ROWS_A_TRANSACTION):
                images = _images_of(batch, "failed")
                num_rows += len(images)
                yield images
        if num_rows != self._description.failed:
            raise ExportDamaged(f"{path} has {num_rows} rows, expected {self._description.failed}")

    def _open_table(self, name: str, schema: pa.Schema) -> pq.ParquetFile:
        path = self._folder / name
        try:
            table = pq.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            raise ExportDamaged(f"{path} is no table that Parquet reads: {error}") from error
        if not table.schema_arrow.equals(schema):
            found = table.schema_arrow.names
            table.close()
            raise ExportDamaged(f"{path} has the columns {found}, expected {schema.names} of their types")
        return table


class _Recorder:
    """Writes image rows of one transaction: those that are new at once, the others one by one."""

    def __init__(self, session: Session, collection: CollectionInfo, keep_ids: bool) -> None:
        self._session = session
        self._collection = collection
        self._keep_ids = keep_ids
        self._generation: int | None = None

    def record(self, placed: Mapping[tuple[int, str], Mapping[str, Any]]) -> Counter[str]:
        """placed: columns of each image by (source id, portable path). How many were added, updated, skipped."""
        counts: Counter[str] = Counter()
        known = self._known(list(placed))
        taken = self._taken([columns["id"] for columns in placed.values()]) if self._keep_ids else set()
        new: list[dict[str, Any]] = []
        for key, columns in placed.items():
            row = known.get(key)
            if row is None:
                new.append(self._row(key, columns))
                counts["added"] += 1
            elif row.status == "ok" and columns["status"] == "failed":
                counts["skipped"] += 1
            else:
                counts["updated" if self._change(row, columns) else "skipped"] += 1
        with_id = [row for row in new if self._keep_ids and row["id"] not in taken]
        without_id = [
            {name: value for name, value in row.items() if name != "id"}
            for row in new
            if not self._keep_ids or row["id"] in taken
        ]
        if with_id:
            self._session.execute(insert(ImageRow), with_id)
            _continue_ids(self._session)
        if without_id:
            self._session.execute(insert(ImageRow), without_id)
        return counts

    def _row(self, key: tuple[int, str], columns: Mapping[str, Any]) -> dict[str, Any]:
        source_id, path = key
        place = {"collection_id": self._collection.id, "source_id": source_id, "path": path}
        return {**columns, **place, "generation": self._next_generation()}

    def _taken(self, image_ids: Sequence[int]) -> set[int]:
        """Those of the ids that images have, which another process may have indexed meanwhile."""
        taken: set[int] = set()
        for part in bound_parts(image_ids):
            taken |= set(self._session.scalars(select(ImageRow.id).where(ImageRow.id.in_(part))))
        return taken

    def _change(self, row: ImageRow, columns: Mapping[str, Any]) -> bool:
        """Brings a known image to the export's state; whether anything differed."""
        changed = [name for name in _COMPARED if getattr(row, name) != columns[name]]
        if "sha256" in changed or "status" in changed:
            row.generation = self._next_generation()
        for name in changed:
            setattr(row, name, columns[name])
        return bool(changed)

    def _next_generation(self) -> int:
        if self._generation is None:
            self._generation = advance_generation(self._session, self._collection)
        return self._generation

    def _known(self, keys: Sequence[tuple[int, str]]) -> dict[tuple[int, str], ImageRow]:
        known: dict[tuple[int, str], ImageRow] = {}
        for source_id in {source_id for source_id, _ in keys}:
            for part in bound_parts([path for other_id, path in keys if other_id == source_id]):
                here = ImageRow.source_id == source_id, ImageRow.path.in_(part)
                known |= {(source_id, row.path): row for row in self._session.scalars(select(ImageRow).where(*here))}
        return known


def _images_of(table: pa.Table | pa.RecordBatch, status: str) -> list[dict[str, Any]]:
    """Columns of image rows, and under `source` and `path` where each lies. Raises ExportDamaged."""
    images = []
    for number, row in enumerate(table.to_pylist()):
        try:
            facts = json.loads(row["metadata"])
            digest = bytes.fromhex(row["sha256"]) if status == "ok" else None
            if not isinstance(facts, dict) or (digest is not None and len(digest) != 32):
                raise ValueError("metadata is no object, or sha256 no digest")
            if not row["source"] or not row["path"] or ".." in row["path"].split("/"):
                raise ValueError(f"it lies outside its source: {row['source']!r}, {row['path']!r}")
            if row["image_id"] < 1 or None in (row["size"], row["mtime_ns"]):
                raise ValueError("it lacks its id, size or time of change")
            images.append(
                {
                    "id": row["image_id"], "source": row["source"], "path": row["path"], "sha256": digest,
                    "size": row["size"], "mtime_ns": row["mtime_ns"], "width": row.get("width"),
                    "height": row.get("height"), "label": row["label"], "facts": facts, "status": status,
                    "error_code": row.get("error_code"), "error_message": row.get("error_message"),
                    "added_at": datetime.fromisoformat(row["added_at"]),
                }
            )  # fmt: skip
        except (TypeError, ValueError, KeyError) as error:
            raise ExportDamaged(f"row {number} of the export's {status} files cannot be used: {error}") from error
    return images


def _place(
    session: Session, collection: CollectionInfo, images: Sequence[Mapping[str, Any]]
) -> dict[tuple[int, str], dict[str, Any]]:
    """Columns of each image by (source id, portable path), as this collection's sources have it.

    Sources that are missing are added. The last of several images in one place counts.
    """
    sources = Sources(source_paths(session, collection))
    for portable in sorted({image["source"] for image in images}, key=len):
        if sources.find(decode_path(portable)) is None:
            row = SourceRow(collection_id=collection.id, path=portable)
            session.add(row)
            session.flush()
            sources = Sources({**sources.paths_by_id, row.id: decode_path(portable)})
    placed: dict[tuple[int, str], dict[str, Any]] = {}
    for image in images:
        root = decode_path(image["source"])
        path = join_path(root, image["path"])
        source_id = sources.find(path)
        assert source_id is not None, path
        own = sources.paths_by_id[source_id]
        name = image["path"] if own == root else relative_path(path, own)
        placed[source_id, name] = {key: value for key, value in image.items() if key not in ("source", "path")}
    return placed


def _store_vectors(
    session: Session,
    collection: CollectionInfo,
    images: Sequence[Mapping[str, Any]],
    vectors: Mapping[str, NDArray[np.float16]],
) -> None:
    """Adds the vectors that the catalog lacks under this model."""
    numbers = {image["sha256"]: number for number, image in enumerate(images) if image["sha256"] is not None}
    for part in bound_parts(list(numbers)):
        wanted = (
            EmbeddingRow.model_id == collection.model_id, EmbeddingRow.region == "full", EmbeddingRow.sha256.in_(part),
        )  # fmt: skip
        found = session.execute(select(EmbeddingRow.sha256, EmbeddingRow.kind).where(*wanted))
        stored = {(digest, kind) for digest, kind in found}
        rows = [
            {
                "sha256": digest, "model_id": collection.model_id, "kind": kind, "region": "full",
                "vector": vectors_ND[numbers[digest]].tobytes(),
            }
            for digest in part
            for kind, vectors_ND in vectors.items()
            if (digest, kind) not in stored
        ]  # fmt: skip
        if rows:
            session.execute(insert(EmbeddingRow), rows)


def _continue_ids(session: Session) -> None:
    """Lets the next id follow those that were given: PostgreSQL does not notice them by itself, SQLite does."""
    if session.get_bind().dialect.name == "postgresql":
        last = "(SELECT max(id) FROM image)"
        session.execute(text(f"SELECT setval(pg_get_serial_sequence('image', 'id'), {last})"))


def _require_room(catalog: Catalog, name: str, description: Description, folder: Path) -> None:
    """Raises FingerprintMismatch before anything is read where the collection has another model."""
    with catalog.reading() as session:
        try:
            collection = find_collection(session, name)
        except CollectionNotFound:
            return
    _require_same_fingerprint(collection, description, folder)


def _require_same_fingerprint(collection: CollectionInfo, description: Description, folder: Path) -> None:
    exported = description.model
    if (collection.fingerprint, collection.dim) != (exported.fingerprint, exported.dim):
        raise FingerprintMismatch(
            f"collection {collection.name!r} was built with {collection.model_name} ({collection.fingerprint[:12]}), "
            f"and the vectors in {folder} come from {exported.name} ({exported.fingerprint[:12]}): they cannot be "
            "compared; import into another collection with -c NAME"
        )


def _marker(collection: CollectionInfo) -> str:
    """Key of the setting that says which import into this collection has begun and not ended."""
    return f"import.{collection.id}"
