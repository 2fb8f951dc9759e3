"""Bringing a collection up to date with the files under given paths: plan, embed, record, prune.

Whatever stops a run, each batch that was recorded stays, and the next run goes on from there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import literal, select, update
from sqlalchemy.orm import Session

from dino_index.catalog import Catalog, CollectionRow, EmbeddingRow, ImageRow, ModelRow
from dino_index.collections import (
    CollectionInfo,
    count_images,
    create_collection,
    find_collection,
    join_path,
    model_of,
    require_same_model,
    source_paths,
)
from dino_index.embedding import EmbeddedFile, EmbeddingSettings, FailedFile, embed_files
from dino_index.errors import CollectionNotFound, ImageError, ModelNotNamed, NoImagesFound, PruneRefused
from dino_index.image_files import ListedFile, Listing, ListingFailure, check_patterns
from dino_index.image_paths import absolute_path, ancestors, is_below, is_gone, is_shard_name, parent_of, split_member
from dino_index.labels import FROM_FOLDERS, labels_from_csv, labels_from_folders
from dino_index.model_files import ModelSpec
from dino_index.model_store import models_folder
from dino_index.recording import BatchRecorder, Sources, record_outcomes, remove_images
from dino_index.shares import Share
from dino_index.source_listing import by_image, list_sources, shard_files, sidecar_values
from dino_index.vector_stores import vector_store_of

if TYPE_CHECKING:
    from dino_index.backbones import Backbone, Device
    from dino_index.ray_engine import RaySettings

# Reasons that lie outside the file's content: worth another try although the file looks unchanged.
_RETRIED_REASONS = frozenset({"permission", "unreadable", "vanished", "broken_link", "not_a_file"})
_MAX_PRUNED_FRAC = 0.2
# Single files become images of a source for each folder, or of one that holds many of the folders.
_MAX_SOURCES_A_RUN = 16
_CHECKS_AT_ONCE = 16
_ROWS_PER_FETCH = 8192
# An index of fewer fits anywhere.
_MIN_IMAGES_TO_WEIGH = 10_000


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
    index_type: str | None = None
    """`auto`, `flat`, `hnsw`, `ivf`, `ivfpq` or a FAISS factory string; None keeps the collection's."""
    share: Share | None = None
    """Index only this share of the files, as one of several processes; None for all."""
    embedding: EmbeddingSettings = field(default_factory=EmbeddingSettings)
    ray: RaySettings | None = None
    """Embed on a Ray cluster; None for this process."""

    def __post_init__(self) -> None:
        check_patterns(self.exclude)
        if self.share is not None and self.prune:
            # The file may have moved into the share of a process that has yet to find it there.
            raise ValueError(
                "a share of the files is not pruned, as a file that is gone may be found again under another path in "
                "another share; prune when all shares are done: dino-search index PATH --prune"
            )


@dataclass(kw_only=True)
class IndexSummary:
    """What a run did, counted in files."""

    added: int = 0
    updated: int = 0
    """New content, a new label or new metadata, readable again, or found again under another path."""
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
    repeated: int = 0
    """Rows of manifests that name a file again."""
    interrupted: bool = False
    remaining: int = 0
    """Files that an interrupted run did not get to."""

    def to_json(self) -> dict[str, int | float]:
        """The counts that `index --json` prints."""
        keys = "added updated skipped removed failed ignored images images_per_second".split()
        return {key: getattr(self, key) for key in keys}

    @property
    def readable(self) -> int:
        """Images under the given paths, or in the run's share of them, that can be found after it."""
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
    facts: dict[str, Any] | None

    def is_unchanged(self, file: ListedFile) -> bool:
        return self.is_of(file) and self.error_code not in _RETRIED_REASONS

    def is_of(self, file: ListedFile) -> bool:
        """Whether the file was read, or was tried to be, as it is listed."""
        # A server that does not say how large a file is leaves its version to tell.
        return file.size in (self.size, -1) and self.mtime_ns == file.mtime_ns


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

    paths: folders, files, manifests, tar shards and URLs; see `list_sources`.
    model: None takes the collection's own, or `default_model` for a new collection.
    should_stop: asked after each batch; the run then ends early and says so in the summary.
    Raises SourceNotFound, NoImagesFound (nothing at all to read), PruneRefused (after everything else is done),
    LabelFileError, ManifestError, BackendMissing, ModelNotNamed (a share of a new collection), FingerprintMismatch and
    other ModelErrors, IndexTypeInvalid, TooLittleMemory, CatalogErrors.
    """
    given = [absolute_path(path) for path in paths]
    missing = _missing_roots(catalog, collection_name, given) if options.prune and options.prune_any else set()
    listing = list_sources([path for path in given if path not in missing], exclude=options.exclude)
    vector_store_of(catalog).connect()
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


def _update_images(session: Session, rows: list[dict[str, Any]]) -> None:
    session.execute(update(ImageRow), rows)


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
        self._vectors = vector_store_of(catalog)
        self._given = given
        self._missing = missing
        self._listing = listing
        # All of them, whatever the share: the collection's folders and the matching of labels depend on all.
        self._files = [*listing.files, *(file for shard in listing.shards for file in shard_files(shard))]
        self._options = options
        self._device = device
        self._backbone: Backbone | None = None
        sidecar_labels, sidecar_facts = sidecar_values(listing)
        self._facts: dict[str, dict[str, Any]] = sidecar_facts | by_image(listing.facts, listing)
        self._moved_ids: set[int] = set()
        self.summary = IndexSummary(
            ignored=sum(listing.ignored.values()),
            ignored_by_type=dict(listing.ignored),
            skipped_folders=dict(listing.skipped_folders),
            skipped_files=dict(listing.skipped_files),
            repeated=listing.num_repeated,
        )
        self._labels = self._read_labels(sidecar_labels)

    def open_collection(self, name: str, model: ModelSpec | None, default_model: Callable[[], ModelSpec]) -> None:
        with self._catalog.reading() as session:
            try:
                collection = find_collection(session, name)
            except CollectionNotFound:
                collection = None
        nothing_listed = not self._files and not self._listing.failures
        if nothing_listed and (collection is None or not self._options.prune):
            raise NoImagesFound(self._nothing_found())
        if collection is None:
            if model is None and self._options.share is not None:
                raise ModelNotNamed(
                    f"collection {name!r} is new, and processes that share its files must not each choose a model: "
                    "name the same one in all of them, as in --model bundled"
                )
            self._spec = model or default_model()
            # Loaded before the collection exists: an unusable model must leave no trace.
            dim = self._load_backbone().dim
            if self._options.ray is not None:
                self._backbone = None  # its memory is the cluster's
            self._check_index_type(dim)
            collection = self._catalog.write(lambda session: create_collection(session, name, self._spec, dim))
        elif model is None:
            self._spec = model_of(collection, models_folder(self._catalog.home))
        else:
            require_same_model(collection, model)
            self._spec = model
            self._remember_place_of_weights(collection)
        self._collection = collection
        self._remember_index_type()
        known_sources = self._catalog.read(lambda session: Sources(source_paths(session, collection)))
        if uncovered := self._places_without(known_sources):
            self._catalog.write(lambda session: Sources.covering(session, collection, uncovered))

    def plan(self) -> None:
        """Sorts listed files into unchanged ones and those to read; finds images whose file is gone."""
        known = self._catalog.read(self._known_images)
        self._to_read: list[ListedFile] = []
        self._num_new_elsewhere = 0
        changed: list[dict[str, Any]] = []
        for file in self._files:
            image = known.pop(file.path, None)
            if not self._is_ours(file.path):
                self._num_new_elsewhere += image is None
            elif image is None or self._options.rehash or not image.is_unchanged(file):
                self._to_read.append(file)
            elif image.status == "failed":
                self.summary.failed += 1
            elif values := self._new_values(file.path, image):
                changed.append({"id": image.id} | values)
                self.summary.updated += 1
            else:
                self.summary.skipped += 1
        self._require_memory()
        self._unlistable: list[str] = []
        self._failures: list[ListingFailure] = []
        for failure in self._listing.failures:
            if not self._is_ours(failure.path):
                self._unlistable.append(failure.path)
                continue
            image = known.get(failure.path)
            # A manifest names it and it is not there: as any image whose file is gone, it stays until it is pruned.
            if image is not None and image.status == "ok" and failure.reason == "vanished":
                self.summary.skipped += not self._options.prune
                continue
            known.pop(failure.path, None)
            self._failures.append(failure)
            self._unlistable.append(failure.path)
        self._unseen = {path: image for path, image in known.items() if self._is_ours(path)}
        # Together, as the values that change are the same for most images.
        for columns in {tuple(values) for values in changed}:
            rows = [values for values in changed if tuple(values) == columns]
            self._catalog.write(partial(_update_images, rows=rows))

    def _is_ours(self, path: str) -> bool:
        return self._options.share is None or self._options.share.holds(path)

    def _new_values(self, path: str, image: _KnownImage) -> dict[str, Any]:
        """What labels and manifests say otherwise about an image than the catalog."""
        values: dict[str, Any] = {}
        if self._labels is not None and self._labels.get(path, image.label) != image.label:
            values["label"] = self._labels[path]
        if self._facts.get(path, image.facts) != image.facts:
            values["facts"] = self._facts[path]
        return values

    def embed_and_record(self, on_progress: Callable[[Progress], None], should_stop: Callable[[], bool]) -> None:
        self._embedded_digests = self._load_embedded_digests() if self._to_read else set()
        self._record(
            [
                FailedFile(ListedFile(failure.path, 0, 0), ImageError(failure.reason, failure.message))
                for failure in self._failures
            ]
        )
        start, done, total = time.perf_counter(), 0, len(self._to_read)
        on_progress(Progress(done=0, total=total, failed=self.summary.failed))
        for num_recorded in record_outcomes(self._embed(), self._record, should_stop):
            done += num_recorded
            on_progress(Progress(done=done, total=total, failed=self.summary.failed))
        self.summary.interrupted = done < total
        self.summary.remaining = total - done
        if done:
            self.summary.images_per_second = round(done / (time.perf_counter() - start), 1)

    def _embed(self) -> Generator[list[EmbeddedFile | FailedFile]]:
        """Outcomes of the files to read, by the engine that was asked for."""
        options = self._options
        if options.ray is None or not self._to_read:
            return embed_files(
                self._to_read, self._load_backbone, self._spec.input_size, self._find_embedded, options.embedding
            )
        from dino_index.ray_engine import embed_files_on_ray

        known = self._catalog.read(self._load_embedded_sizes) if self._embedded_digests else {}
        return embed_files_on_ray(self._to_read, self._spec, known, options.embedding, options.ray, self._device)

    def forget_vanished_failures(self) -> None:
        """Drops failed entries of files that are gone and of folders that could be listed again."""
        failed = {path: image.id for path, image in self._unseen.items() if image.status == "failed"}
        vanished = self._vanished(failed)
        looked_through = set(self._listing.looked_through)
        self._remove(
            [
                image_id
                for path, image_id in failed.items()
                if path in vanished or path in looked_through or os.path.isdir(path)
            ]
        )

    def prune(self) -> None:
        readable = {path: image.id for path, image in self._unseen.items() if image.status == "ok"}
        gone = [readable[path] for path in self._vanished(readable)]
        if gone and not self._options.prune_any:
            num_before = len(gone) + self.summary.readable
            empty = [path for path in self._listing.looked_through if self._is_empty(path)]
            if empty or len(gone) > _MAX_PRUNED_FRAC * num_before:
                reason = f"{empty[0]} is empty" if empty else f"that is more than {_MAX_PRUNED_FRAC:.0%}"
                raise PruneRefused(
                    f"refused to drop {len(gone)} of {num_before} images whose files are gone: {reason}; "
                    "check that everything is mounted, or repeat with --prune --yes"
                )
        self._remove(gone)

    def compact_if_worthwhile(self) -> None:
        """Stores vectors when so much has changed since the last time that starting a search would be slow.

        Also when another type of index is wanted than there is. Of several processes with a share of the files each,
        the one that finds the others' files recorded, too, writes it: the last, or the last few.
        """
        if self._options.share is not None and not self._is_whole():
            return
        self._vectors.settle(self._collection, retype=True)

    def _is_whole(self) -> bool:
        """Whether all listed files, those of other shares too, are in the catalog as they were listed."""
        # Asked after this run's last commit: of two processes that end at once, at least one sees the other's.
        known = self._catalog.read(self._known_images)
        return all((image := known.get(file.path)) is not None and image.is_of(file) for file in self._files)

    def _check_index_type(self, dim: int) -> None:
        if self._options.index_type is not None:
            self._vectors.check_type(self._options.index_type, dim)

    def _remember_index_type(self) -> None:
        """Stores the type that was asked for, if it is another than before."""
        asked = self._options.index_type
        if asked is None:
            return
        self._check_index_type(self._collection.dim)
        if asked != self._catalog.read(self._asked_index_type):
            change = update(CollectionRow).where(CollectionRow.id == self._collection.id).values(index_type=asked)
            self._catalog.write(lambda session: session.execute(change))

    def _asked_index_type(self, session: Session) -> str:
        return session.get_one(CollectionRow, self._collection.id).index_type

    def _require_memory(self) -> None:
        """Raises TooLittleMemory before anything is embedded for an index that could then not be built."""

        def weigh(session: Session) -> None:
            num_images = count_images(session, self._collection)["ok"] + len(self._to_read) + self._num_new_elsewhere
            if num_images >= _MIN_IMAGES_TO_WEIGH:
                self._vectors.weigh(session, self._collection, num_images)

        self._catalog.read(weigh)

    def finish(self) -> IndexSummary:
        self.summary.images = self._catalog.read(lambda session: count_images(session, self._collection))["ok"]
        return self.summary

    def _read_labels(self, sidecar_labels: dict[str, str]) -> dict[str, str] | None:
        """Label by path: what a manifest says goes before what was asked for, and that before what shards say."""
        of_manifests: dict[str, str] = by_image(self._listing.labels, self._listing)
        if self._options.labels is None:
            return (sidecar_labels | of_manifests) or None
        files = [file.path for file in self._files]
        places = [*self._given, *(shard.path for shard in self._listing.shards)]
        if self._options.labels == FROM_FOLDERS:
            return sidecar_labels | labels_from_folders(places, files) | of_manifests
        labels = labels_from_csv(self._options.labels, places, set(files))
        self.summary.unmatched_labels = len(labels.keys() - set(files))
        return sidecar_labels | labels | of_manifests

    def _places_without(self, sources: Sources) -> list[str]:
        """Folders and URLs that need a source of their own, for everything listed to lie below one."""
        places = [path for path in self._given if path not in self._missing and _is_folder(path, self._listing)]
        uncovered = [path for path in places if sources.find(path) is None]
        roots = set(uncovered)
        parents: set[str] = set()
        for path in (*(each.path for each in self._files), *(each.path for each in self._listing.failures)):
            parent = _folder_of(path)
            if parent not in parents and sources.find(path) is None and not roots.intersection(ancestors(path)):
                parents.add(parent)
        return uncovered + (sorted(parents) if len(parents) <= _MAX_SOURCES_A_RUN else _common_folders(parents))

    def _load_backbone(self) -> Backbone:
        from dino_index.backbones import Backbone

        if self._backbone is None:
            # Of a model that embeds elsewhere, this process only asks how long its vectors are.
            device = self._device if self._options.ray is None else "cpu"
            self._backbone = Backbone(self._spec, device=device)
        return self._backbone

    def _remember_place_of_weights(self, collection: CollectionInfo) -> None:
        """The same weights under another path: later commands find them there."""
        if self._spec.config() != collection.model_config:

            def remember(session: Session) -> None:
                row = session.get_one(ModelRow, collection.model_id)
                row.name, row.config = self._spec.name, self._spec.config()

            self._catalog.write(remember)

    def _known_images(self, session: Session) -> dict[str, _KnownImage]:
        """Images under the given paths, or named by a manifest, by absolute path."""
        known: dict[str, _KnownImage] = {}
        places = {*self._given, *(shard.path for shard in self._listing.shards)}
        listed = {file.path for file in self._listing.files}
        for failure in self._listing.failures:
            (places if is_shard_name(failure.path) else listed).add(failure.path)
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
                # JSON is slow to read and of use only beside something to compare it with.
                ImageRow.facts if self._facts else literal(None),
            ).where(ImageRow.collection_id == self._collection.id),
            execution_options={"yield_per": _ROWS_PER_FETCH},
        )
        for image_id, source_id, name, size, mtime_ns, status, error_code, label, facts in rows:
            path = join_path(sources[source_id], name)
            if path in listed or not places.isdisjoint(ancestors(path)):
                known[path] = _KnownImage(image_id, size, mtime_ns, status, error_code, label, facts)
        return known

    def _find_embedded(self, sha256: bytes) -> tuple[int, int] | None:
        """Width and height of an image with these bytes whose vectors under this model are in the catalog."""
        if sha256 not in self._embedded_digests:
            return None
        size = (
            select(ImageRow.width, ImageRow.height)
            .join(EmbeddingRow, EmbeddingRow.sha256 == ImageRow.sha256)
            .where(
                ImageRow.sha256 == sha256,
                ImageRow.status == "ok",
                EmbeddingRow.model_id == self._collection.model_id,
            )
            .limit(1)
        )
        row = self._catalog.read(lambda session: session.execute(size).one_or_none())
        return (row.width, row.height) if row else None

    def _load_embedded_digests(self) -> set[bytes]:
        """Bytes that have vectors under this model: asking the catalog about each file costs a millisecond."""
        of_model = EmbeddingRow.model_id == self._collection.model_id, EmbeddingRow.kind == "cls"
        digests = select(EmbeddingRow.sha256).where(*of_model)
        streamed = {"yield_per": _ROWS_PER_FETCH}
        return self._catalog.read(lambda session: set(session.scalars(digests, execution_options=streamed)))

    def _load_embedded_sizes(self, session: Session) -> dict[bytes, tuple[int, int]]:
        """`_find_embedded` of all bytes at once, for processes without the catalog."""
        rows: Iterable[Any] = session.execute(
            select(ImageRow.sha256, ImageRow.width, ImageRow.height)
            .join(EmbeddingRow, EmbeddingRow.sha256 == ImageRow.sha256)
            .where(
                ImageRow.status == "ok",
                EmbeddingRow.model_id == self._collection.model_id,
                EmbeddingRow.kind == "cls",
            ),
            execution_options={"yield_per": _ROWS_PER_FETCH},
        )
        return {sha256: (width, height) for sha256, width, height in rows}

    def _record(self, batch: Sequence[EmbeddedFile | FailedFile]) -> None:
        """Writes a batch in one transaction."""
        if not batch:
            return

        def record(session: Session) -> tuple[Mapping[str, int], set[int]]:
            recorder = BatchRecorder(session, self._collection)
            return recorder.record(batch, self._labels, self._facts), recorder.moved_ids

        counts, moved_ids = self._catalog.write(record)
        self._vectors.keep_up(self._collection)
        for name, count in counts.items():
            setattr(self.summary, name, getattr(self.summary, name) + count)
        self._embedded_digests.update(item.facts.sha256 for item in batch if isinstance(item, EmbeddedFile))
        self.summary.moved += len(moved_ids)
        self._moved_ids |= moved_ids

    def _vanished(self, paths: Iterable[str]) -> set[str]:
        """Those of the images not listed whose file is gone.

        Not those below a folder, shard or URL that could not be listed: nobody knows about them.
        """
        unlistable = set(self._unlistable)
        candidates = [
            path
            for path in paths
            if self._unseen[path].id not in self._moved_ids
            and not any(place in unlistable for place in ancestors(path))
        ]
        # Side by side, as a server is asked about each URL.
        with ThreadPoolExecutor(_CHECKS_AT_ONCE, "gone") as pool:
            return {path for path, is_lost in zip(candidates, pool.map(is_gone, candidates), strict=True) if is_lost}

    def _is_empty(self, place: str) -> bool:
        """Whether a given folder holds nothing at all, or a shard or URL no image: more likely out of reach."""
        if os.path.isdir(place):
            return not os.listdir(place)
        return not any(is_below(file.path, place) for file in self._files)

    def _remove(self, image_ids: list[int]) -> None:
        if image_ids:
            self._catalog.write(lambda session: remove_images(session, self._collection, image_ids))
            self.summary.removed += len(image_ids)

    def _nothing_found(self) -> str:
        where = ", ".join(self._given)
        ignored = sum(self._listing.ignored.values())
        found = f"found {ignored} other files ({', '.join(sorted(self._listing.ignored))})" if ignored else "found none"
        return f"expected images under {where}, {found}; run: dino-search index FOLDER-WITH-PICTURES"


def _missing_roots(catalog: Catalog, collection_name: str, given: Sequence[str]) -> set[str]:
    """Those of the given paths that are gone and under which the collection has images."""
    gone = [path for path in given if is_gone(path)]
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


def _is_folder(path: str, listing: Listing) -> bool:
    """Whether a given path is a folder, or a URL of one."""
    return path in listing.looked_through and not is_shard_name(path)


def _folder_of(path: str) -> str:
    """The folder or URL that a file, or the shard of a member, lies in."""
    member = split_member(path)
    return parent_of(member[0] if member else path)


def _common_folders(folders: Iterable[str]) -> list[str]:
    """For each top folder or bucket, the deepest folder that holds all of the given ones in it."""
    groups: dict[str, list[str]] = {}
    for folder in folders:
        places = [place for place in ancestors(folder) if parent_of(place) != place] or [folder]
        groups.setdefault(places[-1], []).append(folder)
    return [_common_folder(group) for group in groups.values()]


def _common_folder(folders: Sequence[str]) -> str:
    common = folders[0]
    while not all(is_below(folder, common) for folder in folders):
        common = parent_of(common)
    return common
