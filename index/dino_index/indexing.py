"""Bringing a collection up to date with the files under given paths: plan, embed, record, prune.

Whatever stops a run, each batch that was recorded stays, and the next run goes on from there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import func, select, update

from dino_index.catalog import Catalog, EmbeddingRow, ImageRow, ModelRow, SnapshotRow
from dino_index.collections import (
    CollectionInfo,
    count_images,
    create_collection,
    find_collection,
    generation_of,
    join_path,
    model_of,
    require_same_model,
    source_paths,
)
from dino_index.embedding import EmbeddedFile, EmbeddingSettings, FailedFile, embed_files
from dino_index.errors import CollectionNotFound, ImageError, NoImagesFound, PruneRefused
from dino_index.image_files import ListedFile, Listing, check_patterns, list_images
from dino_index.labels import FROM_FOLDERS, labels_from_csv, labels_from_folders
from dino_index.model_files import ModelSpec
from dino_index.recording import BatchRecorder, Sources, in_transactions, is_below, remove_images

if TYPE_CHECKING:
    from dino_index.backbones import Backbone, Device

# Reasons that lie outside the file's content: worth another try although the file looks unchanged.
_RETRIED_REASONS = frozenset({"permission", "unreadable", "vanished", "broken_link", "not_a_file"})
_MAX_PRUNED_FRAC = 0.2
# Vectors in no snapshot are read from the catalog when a search starts, which takes a millisecond a hundred.
_MIN_DELTA_TO_COMPACT = 1000
_MAX_DELTA_FRAC = 0.1


@dataclass(frozen=True, kw_only=True)
class IndexOptions:
    """How a run treats files, apart from where they are."""

    exclude: Sequence[str] = ()
    """Glob patterns of files and folders to leave out; see `list_images`."""
    rehash: bool = False
    """Compare contents instead of size and time of change."""
    prune: bool = False
    """Drop images under the given paths whose file is gone."""
    prune_any: bool = False
    """Prune even when a root is missing or empty, or more than a fifth would go."""
    labels: str | Path | None = None
    """`folders`, or a CSV file with the columns path and label."""
    embedding: EmbeddingSettings = field(default_factory=EmbeddingSettings)

    def __post_init__(self) -> None:
        check_patterns(self.exclude)


@dataclass(kw_only=True)
class IndexSummary:
    """What a run did, counted in files."""

    added: int = 0
    updated: int = 0
    """New content, a new label, readable again, or found again under another path."""
    skipped: int = 0
    """Unchanged."""
    removed: int = 0
    failed: int = 0
    """In failed state after the run, unchanged ones included."""
    ignored: int = 0
    """No images by name and content."""
    images: int = 0
    """Readable images in the whole collection after the run."""
    images_per_second: float = 0.0
    moved: int = 0
    ignored_by_type: Mapping[str, int] = field(default_factory=dict)
    skipped_folders: Mapping[str, int] = field(default_factory=dict)
    skipped_files: Mapping[str, int] = field(default_factory=dict)
    unmatched_labels: int = 0
    interrupted: bool = False
    remaining: int = 0
    """Files that an interrupted run did not get to."""

    def to_json(self) -> dict[str, int | float]:
        """The counts that `index --json` prints."""
        keys = "added updated skipped removed failed ignored images images_per_second".split()
        return {key: getattr(self, key) for key in keys}

    @property
    def readable(self) -> int:
        """Images under the given paths that can be found after the run."""
        return self.added + self.updated + self.skipped


@dataclass(frozen=True, slots=True)
class _KnownImage:
    """What the catalog has about a file."""

    id: int
    size: int
    mtime_ns: int
    status: str
    error_code: str | None
    label: str | None

    def is_unchanged(self, file: ListedFile) -> bool:
        same = self.size == file.size and self.mtime_ns == file.mtime_ns
        return same and self.error_code not in _RETRIED_REASONS


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is, in files to read."""

    done: int
    total: int
    failed: int


def index_paths(
    catalog: Catalog,
    collection_name: str,
    paths: Sequence[str | os.PathLike[str]],
    model: ModelSpec | None,
    default_model: Callable[[], ModelSpec],
    options: IndexOptions,
    *,
    device: Device = "auto",
    on_progress: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> IndexSummary:
    """Indexes the images under the given paths into a collection, which is made when it does not exist.

    model: None takes the collection's own, or `default_model` for a new collection.
    should_stop: asked after each batch; the run then ends early and says so in the summary.
    Raises SourceNotFound, NoImagesFound (nothing at all to read), PruneRefused (after everything else is done),
    LabelFileError, FingerprintMismatch and other ModelErrors, CatalogErrors.
    """
    given = [os.path.abspath(os.fspath(path)) for path in paths]
    missing = _missing_roots(catalog, collection_name, given) if options.prune and options.prune_any else set()
    listing = list_images([path for path in given if path not in missing], exclude=options.exclude)
    run = _Run(catalog, given, missing, listing, options, device)
    run.open_collection(collection_name, model, default_model)
    run.plan()
    run.embed_and_record(on_progress, should_stop)
    if not run.summary.interrupted:
        run.forget_vanished_failures()
        if options.prune:
            run.prune()
    run.compact_if_worthwhile()
    return run.finish()


class _Run:
    """One call of `index_paths`: state that its phases share."""

    def __init__(
        self,
        catalog: Catalog,
        given: list[str],
        missing: set[str],
        listing: Listing,
        options: IndexOptions,
        device: Device,
    ) -> None:
        self._catalog = catalog
        self._given = given
        self._listed = [path for path in given if path not in missing]
        self._listing = listing
        self._options = options
        self._device = device
        self._backbone: Backbone | None = None
        self._labels = self._read_labels()
        self._moved_ids: set[int] = set()
        self.summary = IndexSummary(
            ignored=sum(listing.ignored.values()),
            ignored_by_type=dict(listing.ignored),
            skipped_folders=dict(listing.skipped_folders),
            skipped_files=dict(listing.skipped_files),
        )

    def open_collection(self, name: str, model: ModelSpec | None, default_model: Callable[[], ModelSpec]) -> None:
        with self._catalog.reading() as session:
            try:
                collection = find_collection(session, name)
            except CollectionNotFound:
                collection = None
        nothing_listed = not self._listing.files and not self._listing.failures
        if nothing_listed and (collection is None or not self._options.prune):
            raise NoImagesFound(self._nothing_found())
        if collection is None:
            self._spec = model or default_model()
            # Loaded before the collection exists: an unusable model must leave no trace.
            dim = self._load_backbone().dim
            with self._catalog.writing() as session:
                collection = create_collection(session, name, self._spec, dim)
        elif model is None:
            self._spec = model_of(collection)
        else:
            require_same_model(collection, model)
            self._spec = model
            self._remember_place_of_weights(collection)
        self._collection = collection
        with self._catalog.reading() as session:
            known_sources = Sources(source_paths(session, collection))
        if any(known_sources.find(path) is None for path in self._listed):
            with self._catalog.writing() as session:
                Sources.covering(session, collection, self._listed)

    def plan(self) -> None:
        """Sorts listed files into unchanged ones and those to read; finds images whose file is gone."""
        known = self._known_images()
        self._to_read: list[ListedFile] = []
        relabelled: dict[int, str] = {}
        for file in self._listing.files:
            image = known.pop(file.path, None)
            if image is None or self._options.rehash or not image.is_unchanged(file):
                self._to_read.append(file)
            elif image.status == "failed":
                self.summary.failed += 1
            elif self._labels is not None and self._labels.get(file.path, image.label) != image.label:
                relabelled[image.id] = self._labels[file.path]
                self.summary.updated += 1
            else:
                self.summary.skipped += 1
        if self._labels is not None:
            self.summary.unmatched_labels = len(self._labels.keys() - {file.path for file in self._listing.files})
        self._unlistable = [failure.path for failure in self._listing.failures]
        for path in self._unlistable:
            known.pop(path, None)
        self._unseen = known
        if relabelled:
            with self._catalog.writing() as session:
                session.execute(
                    update(ImageRow), [{"id": image_id, "label": label} for image_id, label in relabelled.items()]
                )

    def embed_and_record(self, on_progress: Callable[[Progress], None], should_stop: Callable[[], bool]) -> None:
        self._embedded_digests = self._load_embedded_digests() if self._to_read else set()
        self._record(
            [
                FailedFile(ListedFile(failure.path, 0, 0), ImageError(failure.reason, failure.message))
                for failure in self._listing.failures
            ]
        )
        start, done, total = time.perf_counter(), 0, len(self._to_read)
        on_progress(Progress(done=0, total=total, failed=self.summary.failed))
        batches = embed_files(
            self._to_read, self._load_backbone, self._spec.input_size, self._find_embedded,
            self._options.embedding,
        )  # fmt: skip
        for outcomes in in_transactions(batches, should_stop):
            self._record(outcomes)
            done += len(outcomes)
            on_progress(Progress(done=done, total=total, failed=self.summary.failed))
        self.summary.interrupted = done < total
        self.summary.remaining = total - done
        if done:
            self.summary.images_per_second = round(done / (time.perf_counter() - start), 1)

    def forget_vanished_failures(self) -> None:
        """Drops failed entries of files that are gone and of folders that could be listed again."""
        failed = {path: image.id for path, image in self._unseen.items() if image.status == "failed"}
        vanished = self._vanished()
        self._remove([image_id for path, image_id in failed.items() if path in vanished or os.path.isdir(path)])

    def prune(self) -> None:
        gone = [image.id for image in self._vanished().values() if image.status == "ok"]
        if gone and not self._options.prune_any:
            num_before = len(gone) + self.summary.readable
            empty = [path for path in self._given if os.path.isdir(path) and not os.listdir(path)]
            if empty or len(gone) > _MAX_PRUNED_FRAC * num_before:
                reason = f"{empty[0]} is empty" if empty else f"that is more than {_MAX_PRUNED_FRAC:.0%}"
                raise PruneRefused(
                    f"refused to drop {len(gone)} of {num_before} images whose files are gone: {reason}; "
                    "check that everything is mounted, or repeat with --prune --yes"
                )
        self._remove(gone)

    def compact_if_worthwhile(self) -> None:
        """Writes a snapshot when so much has changed since the last one that starting a search would be slow."""
        with self._catalog.reading() as session:
            snapshot = session.get(SnapshotRow, self._collection.id)
            num_before, since = (snapshot.num_vectors, snapshot.generation) if snapshot else (0, -1)
            if since == generation_of(session, self._collection):
                return
            delta = session.scalars(
                select(func.count()).where(ImageRow.collection_id == self._collection.id, ImageRow.generation > since)
            ).one()
        if delta >= max(_MIN_DELTA_TO_COMPACT, _MAX_DELTA_FRAC * num_before):
            from dino_index.snapshots import write_snapshot

            write_snapshot(self._catalog, self._collection)

    def finish(self) -> IndexSummary:
        with self._catalog.reading() as session:
            self.summary.images = count_images(session, self._collection)["ok"]
        return self.summary

    def _read_labels(self) -> dict[str, str] | None:
        if self._options.labels is None:
            return None
        files = [file.path for file in self._listing.files]
        if self._options.labels == FROM_FOLDERS:
            return labels_from_folders(self._given, files)
        return labels_from_csv(self._options.labels, self._given)

    def _load_backbone(self) -> Backbone:
        from dino_index.backbones import Backbone

        if self._backbone is None:
            self._backbone = Backbone(self._spec, device=self._device)
        return self._backbone

    def _remember_place_of_weights(self, collection: CollectionInfo) -> None:
        """The same weights under another path: later commands find them there."""
        if self._spec.config() != collection.model_config:
            with self._catalog.writing() as session:
                row = session.get_one(ModelRow, collection.model_id)
                row.name, row.config = self._spec.name, self._spec.config()

    def _known_images(self) -> dict[str, _KnownImage]:
        """Images under the given paths by absolute path."""
        known: dict[str, _KnownImage] = {}
        with self._catalog.reading() as session:
            sources = source_paths(session, self._collection)
            rows = session.execute(
                select(
                    ImageRow.id,
                    ImageRow.source_id,
                    ImageRow.path,
                    ImageRow.size,
                    ImageRow.mtime_ns,
                    ImageRow.status,
                    ImageRow.error_code,
                    ImageRow.label,
                ).where(ImageRow.collection_id == self._collection.id)
            )
            for image_id, source_id, name, size, mtime_ns, status, error_code, label in rows:
                path = join_path(sources[source_id], name)
                if any(is_below(path, given) for given in self._given):
                    known[path] = _KnownImage(image_id, size, mtime_ns, status, error_code, label)
        return known

    def _find_embedded(self, sha256: bytes) -> tuple[int, int] | None:
        """Width and height of an image with these bytes whose vectors under this model are in the catalog."""
        if sha256 not in self._embedded_digests:
            return None
        with self._catalog.reading() as session:
            row = session.execute(
                select(ImageRow.width, ImageRow.height)
                .join(EmbeddingRow, EmbeddingRow.sha256 == ImageRow.sha256)
                .where(
                    ImageRow.sha256 == sha256,
                    ImageRow.status == "ok",
                    EmbeddingRow.model_id == self._collection.model_id,
                )
                .limit(1)
            ).one_or_none()
        return (row.width, row.height) if row else None

    def _load_embedded_digests(self) -> set[bytes]:
        """Bytes that have vectors under this model: asking the catalog about each file costs a millisecond."""
        with self._catalog.reading() as session:
            of_model = EmbeddingRow.model_id == self._collection.model_id, EmbeddingRow.kind == "cls"
            return set(session.scalars(select(EmbeddingRow.sha256).where(*of_model)))

    def _record(self, batch: Sequence[EmbeddedFile | FailedFile]) -> None:
        if not batch:
            return
        with self._catalog.writing() as session:
            recorder = BatchRecorder(session, self._collection)
            counts = recorder.record(batch, self._labels)
        for name, count in counts.items():
            setattr(self.summary, name, getattr(self.summary, name) + count)
        self._embedded_digests.update(item.facts.sha256 for item in batch if isinstance(item, EmbeddedFile))
        self.summary.moved += len(recorder.moved_ids)
        self._moved_ids |= recorder.moved_ids

    def _vanished(self) -> dict[str, _KnownImage]:
        """Images under the given paths that were not listed and whose file is gone.

        Not those below a folder that could not be listed: nobody knows about them.
        """
        return {
            path: image
            for path, image in self._unseen.items()
            if image.id not in self._moved_ids
            and not any(is_below(path, folder) for folder in self._unlistable)
            and not os.path.lexists(path)
        }

    def _remove(self, image_ids: list[int]) -> None:
        if image_ids:
            with self._catalog.writing() as session:
                remove_images(session, self._collection, image_ids)
            self.summary.removed += len(image_ids)

    def _nothing_found(self) -> str:
        where = ", ".join(self._given)
        ignored = sum(self._listing.ignored.values())
        found = f"found {ignored} other files ({', '.join(sorted(self._listing.ignored))})" if ignored else "found none"
        return f"expected images under {where}, {found}; run: dino-search index FOLDER-WITH-PICTURES"


def _missing_roots(catalog: Catalog, collection_name: str, given: Sequence[str]) -> set[str]:
    """Those of the given paths that are gone and under which the collection has images."""
    gone = [path for path in given if not os.path.lexists(path)]
    if not gone:
        return set()
    with catalog.reading() as session:
        try:
            collection = find_collection(session, collection_name)
        except CollectionNotFound:
            return set()
        sources = source_paths(session, collection)
        rows = session.execute(select(ImageRow.source_id, ImageRow.path).where(ImageRow.collection_id == collection.id))
        paths = [join_path(sources[source_id], name) for source_id, name in rows]
    return {root for root in gone if any(is_below(path, root) for path in paths)}
