"""Removing images so that nothing of them stays in the home: rows, vectors, index files, freed pages.

The steps can be repeated: a purge that was stopped is finished by the next one, also by one without any image.
"""

from __future__ import annotations

import html
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock
from sqlalchemy import delete, exists, func, select, text
from sqlalchemy.orm import Session

from dino_index.catalog import (
    Catalog,
    CollectionRow,
    EmbeddingRow,
    ImageRow,
    JobRow,
    RemovalRow,
    ReportRow,
    SnapshotRow,
    SourceRow,
    bound_parts,
    storage_errors,
)
from dino_index.catalog.portable_paths import decode_path, encode_path
from dino_index.collections import CollectionInfo, find_collection, join_path, relative_path
from dino_index.copy_settings import drop_whitenings
from dino_index.image_paths import is_below
from dino_index.recording import remove_images
from dino_index.snapshots import snapshot_folder, write_snapshot
from dino_index.vector_stores import server_store_of
from dino_index.verdicts import drop_verdicts

EXPORT_KIND = "export"
PARQUET_KIND = "parquet"
"""What the catalog calls a table whose text columns `PARQUET_PATHS` name images: it is compressed, so not searched."""
PARQUET_PATHS = ("query", "reference")
UPLOADS_FOLDER = "uploads"
"""Of a home: pictures that were sent to the service, and lie nowhere else."""
EVALUATION_FOLDER = "evaluation"
"""Of a home: vectors that evaluations keep of pictures anywhere, to be made again at any time."""
_LOCK = "lock"
_DATABASE_LOG = "*-wal"
_BACKUPS = "*.backup*"


@dataclass(kw_only=True)
class PurgeReport:
    """What a purge removed, and what it found that it does not touch."""

    images: int = 0
    vectors: int = 0
    """Of bytes that no image of any collection has any more, those of earlier removals included."""
    snapshots: int = 0
    """Index files written anew."""
    verdicts: int = 0
    """Decisions on pairs of which one picture is no image of any collection any more, by this purge or before it."""
    whitenings: int = 0
    """Learned from such a picture; the calibrations that follow from them go too."""
    uploads: int = 0
    """Files in the home that had been sent to the service."""
    shared: list[str] = field(default_factory=list)
    """`COLLECTION: PATH` of images that have the same bytes, or are the same files, and keep their vectors."""
    reports: list[str] = field(default_factory=list)
    """Files written from this home that name a purged image."""
    backups: list[str] = field(default_factory=list)
    """Copies of the catalog in the home, which may hold the purged images."""
    problems: list[str] = field(default_factory=list)
    """What could not be done, in words."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def purge_images(catalog: Catalog, collection: CollectionInfo, image_ids: Sequence[int]) -> PurgeReport:
    """Removes images and every trace of them from the home.

    image_ids: may be empty; what earlier removals and unfinished purges left behind goes in any case.
    Raises CatalogErrors; the same purge without images then finishes it.
    """
    report = PurgeReport()
    paths = _paths_of(catalog, image_ids)
    # Before their rows: what is repeated after a stop finds them by these.
    report.uploads = _delete_uploads(catalog, image_ids, paths)
    _remove_rows(catalog, collection, image_ids, paths, report)
    report.snapshots = _rewrite_snapshots(catalog)
    if (server := server_store_of(catalog)) is not None:
        report.snapshots += server.purge()
    shutil.rmtree(catalog.home / EVALUATION_FOLDER, ignore_errors=True)
    catalog.reclaim_space()
    _check_log(catalog, report)
    report.reports = _reports_that_name(catalog, paths)
    report.backups = sorted(encode_path(str(path)) for path in catalog.home.rglob(_BACKUPS))
    return report


def record_report(catalog: Catalog, collection_name: str, path: str | Path, kind: str) -> None:
    """Remembers that a file shows images of a collection, for `purge_images` to look into. Raises CatalogErrors."""
    with catalog.writing() as session:
        collection = find_collection(session, collection_name)
        portable = encode_path(os.path.abspath(path))
        session.merge(ReportRow(path=portable, collection_id=collection.id, kind=kind))


def _paths_of(catalog: Catalog, image_ids: Sequence[int]) -> set[str]:
    """Absolute paths, as the operating system names them."""
    paths: set[str] = set()
    with catalog.reading() as session:
        for part in bound_parts(image_ids):
            paths |= {path for _, path, _ in _located(session, ImageRow.id.in_(part))}
    return paths


def _located(session: Session, *conditions: Any) -> list[tuple[str, str, bytes | None]]:
    """(collection's name, absolute path, sha256) of images."""
    rows = session.execute(
        select(CollectionRow.name, SourceRow.path, ImageRow.path, ImageRow.sha256)
        .join(SourceRow, SourceRow.id == ImageRow.source_id)
        .join(CollectionRow, CollectionRow.id == ImageRow.collection_id)
        .where(*conditions)
        .order_by(CollectionRow.name, ImageRow.id)
    )
    return [(name, join_path(decode_path(source), path), digest) for name, source, path, digest in rows]


def _remove_rows(
    catalog: Catalog, collection: CollectionInfo, image_ids: Sequence[int], paths: set[str], report: PurgeReport
) -> None:
    """One transaction: image rows, embeddings that nobody shares, and the images' folders if they are now empty."""
    with catalog.writing() as session:
        _overwrite_deleted(session)
        digests: set[bytes] = set()
        source_ids: set[int] = set()
        for part in bound_parts(image_ids):
            for digest, source_id in session.execute(
                select(ImageRow.sha256, ImageRow.source_id).where(ImageRow.id.in_(part))
            ):
                digests |= {digest} if digest else set()
                source_ids.add(source_id)
        remove_images(session, collection, image_ids)
        report.images = len(image_ids)
        for shared in bound_parts(sorted(digests)):
            for name, path, _ in _located(session, ImageRow.sha256.in_(shared)):
                report.shared.append(f"{name}: {encode_path(path)}")
        unused = ~exists().where(ImageRow.sha256 == EmbeddingRow.sha256)
        report.vectors = session.scalars(select(func.count()).select_from(EmbeddingRow).where(unused)).one()
        # Vectors without an image are all that is known of what was removed before.
        digests |= set(session.scalars(select(EmbeddingRow.sha256).where(unused).distinct()))
        session.execute(delete(EmbeddingRow).where(unused))
        gone = digests - _still_there(session, digests)
        report.verdicts = drop_verdicts(session, gone)
        report.whitenings = drop_whitenings(session, gone)
        _forget_failures(session, paths)
        emptied = ~exists().where(ImageRow.source_id == SourceRow.id)
        for source_part in bound_parts(sorted(source_ids)):
            session.execute(delete(SourceRow).where(SourceRow.id.in_(source_part), emptied))


def _delete_uploads(catalog: Catalog, image_ids: Sequence[int], paths: Iterable[str]) -> int:
    """Deletes those files among `paths` that lie in the home's uploads and are no other image's; how many."""
    folder = os.path.join(os.path.abspath(catalog.home / UPLOADS_FOLDER), "")
    uploads = {path for path in paths if path.startswith(folder)}
    if not uploads:
        return 0
    chosen, others = set(image_ids), set()
    with catalog.reading() as session:
        for source_id, portable in session.execute(select(SourceRow.id, SourceRow.path)).all():
            source = decode_path(portable)
            names = {relative_path(path, source): path for path in uploads if is_below(path, source)}
            for part in bound_parts(sorted(names)):
                named = select(ImageRow.id, ImageRow.path).where(
                    ImageRow.source_id == source_id, ImageRow.path.in_(part)
                )
                others |= {names[name] for number, name in session.execute(named) if number not in chosen}
    uploads -= others
    num_deleted = 0
    for path in uploads:
        with storage_errors(catalog.home), suppress(FileNotFoundError):
            os.unlink(path)
            num_deleted += 1
        with suppress(OSError):  # not empty yet
            os.rmdir(os.path.dirname(path))
    return num_deleted


def _forget_failures(session: Session, paths: Iterable[str]) -> None:
    """Takes files out of what jobs say could not be read; they stay counted."""
    portable = {encode_path(path) for path in paths}
    for row in session.scalars(select(JobRow).where(JobRow.num_failures > 0)):
        kept = [failure for failure in row.failures if failure["path"] not in portable]
        if len(kept) < len(row.failures):
            row.failures = kept


def _still_there(session: Session, digests: set[bytes]) -> set[bytes]:
    """Those of the sha256 that images of any collection have."""
    found: set[bytes] = set()
    for part in bound_parts(sorted(digests)):
        found |= {
            digest for digest in session.scalars(select(ImageRow.sha256).where(ImageRow.sha256.in_(part))) if digest
        }
    return found


def _overwrite_deleted(session: Session) -> None:
    """Has SQLite write zeros over what is deleted. PostgreSQL cannot; its VACUUM FULL leaves deleted rows out."""
    if session.get_bind().dialect.name == "sqlite":
        session.execute(text("PRAGMA secure_delete = ON"))


def _rewrite_snapshots(catalog: Catalog) -> int:
    """Leaves no index file in the home that holds the vector of a removed or replaced image; how many were written.

    Other collections count as well: they may have dropped an image of the same bytes since their index was written.
    """
    # Named by ids of collections, and listed before those: one that is made meanwhile keeps its files.
    folders = {path for path in catalog.snapshots_folder.glob("*") if path.name.isdecimal()}
    with catalog.reading() as session:
        names = session.scalars(select(CollectionRow.name)).all()
        collections = [find_collection(session, name) for name in names]
    num_written = 0
    for collection in collections:
        with catalog.reading() as session:
            outdated = _holds_removed_vectors(session, collection)
        if outdated:
            write_snapshot(catalog, collection)
            num_written += 1
        _delete_outdated_files(catalog, collection)
    known = {snapshot_folder(catalog, collection) for collection in collections}
    for folder in folders - known:
        # Of a collection that is gone.
        with storage_errors(catalog.home):
            shutil.rmtree(folder)
    return num_written


def _holds_removed_vectors(session: Session, collection: CollectionInfo) -> bool:
    row = session.get(SnapshotRow, collection.id)
    if row is None:
        return False
    later = RemovalRow.collection_id == collection.id, RemovalRow.generation > row.generation
    if session.scalar(select(RemovalRow.image_id).where(*later).limit(1)) is not None:
        return True
    # An image whose content changed since has no removal row: its new vector masks the old one.
    newer = ImageRow.collection_id == collection.id, ImageRow.generation > row.generation
    return session.scalar(select(ImageRow.id).where(*newer).limit(1)) is not None


def _delete_outdated_files(catalog: Catalog, collection: CollectionInfo) -> None:
    """Deletes all index files but the current one, that before it included."""
    folder = snapshot_folder(catalog, collection)
    if not folder.is_dir():
        return
    with storage_errors(catalog.home), FileLock(folder / _LOCK):
        with catalog.reading() as session:
            row = session.get(SnapshotRow, collection.id)
            current = Path(row.file_name).stem if row else None
        for file in folder.iterdir():
            if file.name != _LOCK and file.stem != current:
                file.unlink(missing_ok=True)


def _check_log(catalog: Catalog, report: PurgeReport) -> None:
    """Notes a write-ahead log that could not be emptied, as another process was reading from it."""
    for log in catalog.home.glob(_DATABASE_LOG):
        if log.stat().st_size:
            report.problems.append(
                f"{encode_path(str(log))} could not be emptied, as another process uses the catalog, and may hold old "
                "rows; end that process, then run: dino-search remove --purge"
            )


def _reports_that_name(catalog: Catalog, paths: Iterable[str]) -> list[str]:
    """Written files that still exist and name one of the paths. Those that are gone are forgotten."""
    with catalog.reading() as session:
        rows = {row.path: row.kind for row in session.scalars(select(ReportRow))}
    gone = [portable for portable in rows if not os.path.lexists(decode_path(portable))]
    if gone:
        with catalog.writing() as session:
            for part in bound_parts(gone):
                session.execute(delete(ReportRow).where(ReportRow.path.in_(part)))
    wanted = set(paths)
    if not wanted:
        return []
    return sorted(
        portable
        for portable, kind in rows.items()
        if portable not in gone and _names_one(Path(decode_path(portable)), kind, wanted)
    )


def _names_one(report: Path, kind: str, paths: set[str]) -> bool:
    """Whether a file or exported folder names one of the paths; one that cannot be read counts as if it did."""
    if kind in (EXPORT_KIND, PARQUET_KIND):
        import pyarrow as pa

        from dino_index.exports import exported_paths

        known = paths | {encode_path(path) for path in paths}
        try:
            named = exported_paths(report) if kind == EXPORT_KIND else _parquet_paths(report)
            return any(not known.isdisjoint(some) for some in named)
        except (OSError, pa.ArrowException):
            return True
    try:
        content = report.read_bytes()
    except OSError:
        return True
    return any(spelling in content for path in paths for spelling in _spellings(path))


def _parquet_paths(file: Path) -> Iterator[Sequence[str]]:
    """What a table names, some at a time. Raises OSError and pyarrow's errors."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as table:
        for batch in table.iter_batches(columns=list(PARQUET_PATHS)):
            for column in batch.columns:
                yield column.to_pylist()


def _spellings(path: str) -> set[bytes]:
    """A path as text files, CSV, JSON, pages and JSON within pages write it."""
    portable = encode_path(path)
    in_page = html.escape(portable).replace("&#x27;", "&#39;").replace("&quot;", "&#34;")  # as the pages' templates do
    spelled = [portable, in_page, portable.replace('"', '""')]
    for in_json in (json.dumps(portable)[1:-1], json.dumps(portable, ensure_ascii=False)[1:-1]):
        spelled += [in_json, in_json.replace("<", r"\u003c")]
    return {os.fsencode(path)} | {text.encode() for text in spelled}
