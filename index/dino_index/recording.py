"""Writing what became of files into the catalog, a batch in one transaction.

An image's row and its embedding are written together, so that they can never disagree, and everything is looked up
again inside the transaction: another process may have indexed the same files meanwhile.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from sqlalchemy import delete, inspect, select
from sqlalchemy.orm import Session

from dino_index.catalog import EmbeddingRow, ImageRow, RemovalRow, SourceRow, bound_parts
from dino_index.catalog.bulk import insert_rows
from dino_index.catalog.portable_paths import encode_path
from dino_index.collections import (
    CollectionInfo,
    advance_generation,
    hold_model,
    join_path,
    relative_path,
    source_paths,
)
from dino_index.embedding import EmbeddedFile, FailedFile, FileFacts
from dino_index.errors import ImageError
from dino_index.image_files import ListedFile
from dino_index.image_paths import ancestors, is_gone, is_url

# What a killed run loses at most. A transaction costs as much as some 25 images in it.
_IMAGES_A_TRANSACTION = 64
_MAX_TRANSACTION_GROWTH = 8
_MAX_UNRECORDED_S = 1.0


class Sources:
    """The collection's root folders: which one a file belongs to, always the same one."""

    def __init__(self, paths_by_id: Mapping[int, str]) -> None:
        self.paths_by_id = dict(paths_by_id)
        self._ids = {path: source_id for source_id, path in self.paths_by_id.items()}

    @classmethod
    def covering(cls, session: Session, collection: CollectionInfo, paths: Sequence[str]) -> Sources:
        """The collection's sources, with those added that the given absolute paths lack.

        Of a file, the folder that holds it is taken; a URL is taken as it is.
        """
        sources = cls(source_paths(session, collection))
        # Shorter paths first, so that of a folder and its sub-folder only the folder becomes a source.
        for path in sorted(paths, key=len):
            folder = path if is_url(path) or os.path.isdir(path) else os.path.dirname(path)
            if sources.find(folder) is None:
                row = SourceRow(collection_id=collection.id, path=encode_path(folder))
                session.add(row)
                session.flush()
                sources = cls({**sources.paths_by_id, row.id: folder})
        return sources

    def find(self, path: str) -> int | None:
        """Id of the nearest source that holds the path or is it."""
        return next((self._ids[folder] for folder in ancestors(path) if folder in self._ids), None)

    def locate(self, path: str) -> tuple[int, str]:
        """(source id, portable relative path) of a file below one of the sources."""
        source_id = self.find(path)
        assert source_id is not None, path
        return source_id, relative_path(path, self.paths_by_id[source_id])


def record_outcomes(
    batches: Generator[list[EmbeddedFile | FailedFile]],
    record: Callable[[Sequence[EmbeddedFile | FailedFile]], object],
    should_stop: Callable[[], bool],
) -> Iterator[int]:
    """Calls `record` with the outcomes of batches, in parts that are worth a transaction each; yields their numbers.

    should_stop: asked after each batch; what there is by then is the last part.
    """
    unrecorded: list[EmbeddedFile | FailedFile] = []
    recorded_at = time.monotonic()
    # One transaction at a time, beside the forward passes: waiting for a database server would hold them up.
    running: Future[int] | None = None

    def record_part(part: Sequence[EmbeddedFile | FailedFile]) -> int:
        record(part)
        return len(part)

    with closing(batches), ThreadPoolExecutor(1, "record") as recorder:
        for batch in batches:
            unrecorded += batch
            stop = should_stop()
            late = time.monotonic() - recorded_at > _MAX_UNRECORDED_S
            # While one transaction takes long, the next one grows.
            busy = running is not None and not running.done()
            if stop or late or len(unrecorded) >= _IMAGES_A_TRANSACTION * (_MAX_TRANSACTION_GROWTH if busy else 1):
                if running is not None:
                    yield running.result()
                running = recorder.submit(record_part, unrecorded)
                unrecorded, recorded_at = [], time.monotonic()
            if stop:
                break
        if running is not None:
            yield running.result()
        if unrecorded:
            yield record_part(unrecorded)


class BatchRecorder:
    """One transaction's view of one batch. `record` it once.

    Raises FingerprintMismatch when the collection has been given another model than that of the vectors.
    """

    def __init__(self, session: Session, collection: CollectionInfo) -> None:
        hold_model(session, collection)
        self._session = session
        self._collection = collection
        self._sources = Sources(source_paths(session, collection))
        self._new: list[ImageRow] = []
        self.moved_ids: set[int] = set()
        """Images that were found again under another path."""

    def record(
        self,
        outcomes: Sequence[EmbeddedFile | FailedFile],
        labels: Mapping[str, str] | None,
        facts: Mapping[str, dict[str, Any]] | None = None,
    ) -> Counter[str]:
        """Writes the outcomes; returns how many were `added`, `updated`, `skipped`, `failed`.

        labels, facts: by absolute path, for images that get new ones; facts are what a manifest says about one.
        """
        facts = facts or {}
        counts: Counter[str] = Counter()
        rows = self._rows_by_path([outcome.file.path for outcome in outcomes])
        embedded = [outcome for outcome in outcomes if isinstance(outcome, EmbeddedFile)]
        without_vector = store_vectors(self._session, self._collection.model_id, embedded)
        moved = self._rows_by_content([item.facts.sha256 for item in embedded if item.file.path not in rows])
        for outcome in outcomes:
            path = outcome.file.path
            row = rows.get(path)
            if isinstance(outcome, EmbeddedFile) and outcome.facts.sha256 in without_vector:
                # Entered as failed for a reason that the next run tries again.
                error = ImageError("unreadable", "its vector was removed by another command; index it again")
                outcome = FailedFile(outcome.file, error)
            if isinstance(outcome, FailedFile):
                counts[self._record_failure(outcome.file, outcome.error, row)] += 1
                continue
            if row is None and (candidates := moved.get(outcome.facts.sha256)):
                row = candidates.pop()
                row.source_id, row.path = self._sources.locate(path)
                self.moved_ids.add(row.id)
            result = self._record_image(outcome, row, labels, facts.get(path))
            counts["updated" if row is not None and row.id in self.moved_ids else result] += 1
        self._insert_new()
        return counts

    @cached_property
    def _generation(self) -> int:
        """Advanced when the first vector changes, so that a batch without change stays invisible."""
        return advance_generation(self._session, self._collection)

    def _rows_by_path(self, paths: Sequence[str]) -> dict[str, ImageRow]:
        keys = {self._sources.locate(path): path for path in paths}
        found: dict[str, ImageRow] = {}
        for source_id in {source_id for source_id, _ in keys}:
            names = [name for key, name in keys if key == source_id]
            for part in bound_parts(names):
                rows = self._session.scalars(
                    select(ImageRow).where(ImageRow.source_id == source_id, ImageRow.path.in_(part))
                )
                found |= {keys[source_id, row.path]: row for row in rows}
        return found

    def _rows_by_content(self, digests: Sequence[bytes]) -> dict[bytes, list[ImageRow]]:
        """Readable images with the same bytes whose own file is gone: what a moved file leaves behind."""
        found: dict[bytes, list[ImageRow]] = {}
        for part in bound_parts(list(set(digests))):
            rows = self._session.scalars(
                select(ImageRow).where(
                    ImageRow.collection_id == self._collection.id,
                    ImageRow.sha256.in_(part),
                    ImageRow.status == "ok",
                )
            )
            for row in rows:
                if is_gone(join_path(self._sources.paths_by_id[row.source_id], row.path)):
                    assert row.sha256 is not None
                    found.setdefault(row.sha256, []).append(row)
        return found

    def _record_image(
        self,
        item: EmbeddedFile,
        row: ImageRow | None,
        labels: Mapping[str, str] | None,
        manifest_facts: dict[str, Any] | None,
    ) -> str:
        facts, path = item.facts, item.file.path
        if row is None:
            source_id, name = self._sources.locate(path)
            row = ImageRow(collection_id=self._collection.id, source_id=source_id, path=name)
            result = "added"
        else:
            unchanged = row.status == "ok" and row.sha256 == facts.sha256
            relabelled = labels is not None and labels.get(path, row.label) != row.label
            relabelled = relabelled or manifest_facts not in (None, row.facts)
            result = "skipped" if unchanged and not relabelled else "updated"
        if row.status != "ok" or row.sha256 != facts.sha256:
            row.generation = self._generation
        enter_content(row, facts)
        if labels is not None:
            row.label = labels.get(path, row.label)
        if manifest_facts is not None:
            row.facts = manifest_facts
        if result == "added":
            self._new.append(row)
        return result

    def _record_failure(self, file: ListedFile, error: ImageError, row: ImageRow | None) -> str:
        if row is None:
            source_id, name = self._sources.locate(file.path)
            row = ImageRow(
                collection_id=self._collection.id, source_id=source_id, path=name, generation=self._generation
            )
            self._new.append(row)
        elif row.status == "ok":
            if error.reason == "vanished":
                return "skipped"  # as any image whose file is gone: it stays until it is pruned
            forget_vector(self._session, self._collection, row.id, self._generation)
        enter_failure(row, file, error)
        return "failed"

    def _insert_new(self) -> None:
        """Adds the rows of new images, all at once: nobody needs their ids here, which would be asked for singly."""
        # What was changed or removed comes first: a moved image may have left the path that a new one takes.
        self._session.flush()
        given = [attribute for attribute in inspect(ImageRow).column_attrs if attribute.key != "id"]
        now = datetime.now(UTC)
        for row in self._new:
            row.facts = row.facts or {}
            row.added_at = now
        rows = [{item.columns[0].name: getattr(row, item.key) for item in given} for row in self._new]
        insert_rows(self._session.connection(), ImageRow.__table__, rows)


def store_vectors(session: Session, model_id: int, items: Sequence[EmbeddedFile]) -> set[bytes]:
    """Adds the vectors that the catalog lacks; returns the digests of items that have none under the model."""
    digests = {item.facts.sha256 for item in items}
    stored: set[bytes] = set()
    for part in bound_parts(list(digests)):
        stored |= set(
            session.scalars(
                select(EmbeddingRow.sha256).where(
                    EmbeddingRow.model_id == model_id, EmbeddingRow.kind == "cls", EmbeddingRow.sha256.in_(part)
                )
            )
        )
    new = {item.facts.sha256: item for item in items if item.cls_D is not None}
    rows = [
        {"sha256": digest, "model_id": model_id, "kind": kind, "region": "full", "vector": vector.tobytes()}
        for digest, item in new.items()
        for kind, vector in (("cls", item.cls_D), ("gem", item.gem_D))
        if vector is not None and digest not in stored
    ]
    insert_rows(session.connection(), EmbeddingRow.__table__, rows)
    return digests - stored - new.keys()


def enter_content(row: ImageRow, facts: FileFacts) -> None:
    """Makes an image one of these bytes, whatever it was before."""
    row.sha256, row.size, row.mtime_ns = facts.sha256, facts.size, facts.mtime_ns
    row.width, row.height = facts.width, facts.height
    row.status, row.error_code, row.error_message = "ok", None, None


def enter_failure(row: ImageRow, file: ListedFile, error: ImageError) -> None:
    """Makes an image a failed one in the ledger."""
    row.size, row.mtime_ns = file.size, file.mtime_ns
    row.status, row.error_code, row.error_message = "failed", error.reason, str(error)
    row.sha256 = row.width = row.height = None


def forget_vector(session: Session, collection: CollectionInfo, image_id: int, generation: int) -> None:
    """Masks an image's vector in snapshots older than `generation`."""
    session.merge(RemovalRow(collection_id=collection.id, image_id=image_id, generation=generation))


def remove_images(session: Session, collection: CollectionInfo, image_ids: Sequence[int]) -> None:
    """Deletes image rows and masks their vectors. The embeddings stay until `compact`: another image may share them."""
    if not image_ids:
        return
    generation = advance_generation(session, collection)
    for image_id in image_ids:
        forget_vector(session, collection, image_id, generation)
    for part in bound_parts(image_ids):
        session.execute(delete(ImageRow).where(ImageRow.id.in_(part)))
