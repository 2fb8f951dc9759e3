"""Giving a collection another model: new embeddings beside the old ones, then one switch.

Until the switch everything works with the old model, searches and indexing runs alike. Embeddings belong to bytes and
a model, so whatever stops a run, the next one goes on from what was recorded. The switch is one transaction. It first
makes sure that every image has an embedding under the new model, those included that other commands added meanwhile.
Ids, labels, metadata and everything keyed by content stay as they are.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import ColumnElement, delete, exists, func, select, update
from sqlalchemy.orm import Session

from dino_index.catalog import (
    Catalog,
    CollectionRow,
    EmbeddingRow,
    ImageRow,
    ModelRow,
    RemovalRow,
    SnapshotRow,
    bound_parts,
)
from dino_index.collections import (
    CollectionInfo,
    advance_generation,
    count_images,
    ensure_model,
    find_collection,
    join_path,
    set_pending_model,
    source_paths,
)
from dino_index.embedding import EmbeddedFile, EmbeddingSettings, FailedFile, FileFacts, embed_files
from dino_index.errors import ReindexRefused
from dino_index.image_files import ListedFile
from dino_index.indexing import Progress
from dino_index.integrity import drop_unneeded_embeddings
from dino_index.model_files import ModelSpec
from dino_index.recording import enter_content, enter_failure, record_outcomes, store_vectors
from dino_index.snapshots import drop_stored
from dino_index.vector_stores import vector_store_of

if TYPE_CHECKING:
    from dino_index.backbones import Backbone, Device


@dataclass(frozen=True, kw_only=True)
class ReindexOptions:
    """How a change of model is made."""

    allow_missing: bool = False
    """Enter images whose file cannot be read any more as failed, instead of refusing to switch."""
    embedding: EmbeddingSettings = field(default_factory=EmbeddingSettings)


@dataclass(kw_only=True)
class ReindexSummary:
    """What became of a change of model."""

    collection: str
    model: str
    previous_model: str
    switched: bool = False
    """Whether this run gave the collection the model; not where it had it already, or where the run was stopped."""
    images: int = 0
    """Readable images in the collection after the run."""
    embedded: int = 0
    """Pictures embedded in this run; copies count once."""
    reused: int = 0
    """Images whose bytes had an embedding under the new model before, of an earlier run or of another collection."""
    updated: int = 0
    """Images whose file had changed since it was indexed, taken with their new content."""
    failed: int = 0
    """Images that were entered as failed, because their file cannot be read any more."""
    images_per_second: float = 0.0
    interrupted: bool = False
    remaining: int = 0
    """Pictures that an interrupted run did not get to."""

    def to_json(self) -> dict[str, str | bool | int | float]:
        """What `reindex --json` prints."""
        keys = "collection model previous_model switched images embedded reused updated failed images_per_second"
        return {key: getattr(self, key) for key in keys.split()}


@dataclass(frozen=True, slots=True)
class _Image:
    """A readable image that has no embedding under the new model yet."""

    id: int
    file: ListedFile
    sha256: bytes


def reindex_collection(
    catalog: Catalog,
    collection: CollectionInfo,
    spec: ModelSpec,
    options: ReindexOptions,
    *,
    device: Device = "auto",
    on_progress: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> ReindexSummary:
    """Embeds all readable images of a collection under another model and makes that the collection's own.

    Afterwards a new snapshot is written, and the old model's embeddings that no other collection needs are dropped.
    should_stop: asked after each batch; the run then ends before the switch and says so in the summary.
    Raises ReindexRefused (files that cannot be read any more; what was embedded stays for the next run),
    ModelErrors, CatalogErrors, CollectionNotFound.
    """
    return _Reindexing(catalog, collection, spec, options, device, on_progress, should_stop).run()


class _Reindexing:
    """One call of `reindex_collection`: state that its phases share."""

    def __init__(
        self,
        catalog: Catalog,
        collection: CollectionInfo,
        spec: ModelSpec,
        options: ReindexOptions,
        device: Device,
        on_progress: Callable[[Progress], None],
        should_stop: Callable[[], bool],
    ) -> None:
        self._catalog = catalog
        self._collection = collection
        self._spec = spec
        self._options = options
        self._device = device
        self._on_progress = on_progress
        self._should_stop = should_stop
        self._backbone: Backbone | None = None
        self._unusable: dict[int, tuple[bytes, FailedFile | FileFacts]] = {}
        """By image id: the bytes that were wanted, and what the file is instead, unreadable or of other content."""
        self._done = 0
        self.summary = ReindexSummary(collection=collection.name, model=spec.name, previous_model=collection.model_name)

    def run(self) -> ReindexSummary:
        if self._collection.fingerprint == self._spec.fingerprint:
            with self._catalog.writing() as session:
                set_pending_model(session, self._collection, None)
                self.summary.images = count_images(session, self._collection)["ok"]
            return self.summary
        self._model_id = self._begin()
        start = time.perf_counter()
        while not self.summary.interrupted:
            with self._catalog.reading() as session:
                to_read = self._to_read(self._missing(session))
            if to_read:
                self._embed(to_read)
            elif self._switch():
                break
        if self._done:
            self.summary.images_per_second = round(self._done / (time.perf_counter() - start), 1)
        with self._catalog.reading() as session:
            collection = find_collection(session, self._collection.name)
            self.summary.images = count_images(session, collection)["ok"]
        if self.summary.switched:
            vector_store_of(self._catalog).compact(collection)
            drop_unneeded_embeddings(self._catalog, self._collection.model_id)
        return self.summary

    def _begin(self) -> int:
        """Id of the new model, noted as the one that is coming, so that nobody drops its embeddings."""
        # Loaded before anything is written: an unusable model must leave no trace.
        dim = self._load_backbone().dim
        with self._catalog.writing() as session:
            model_id = ensure_model(session, self._spec, dim)
            model = session.get_one(ModelRow, model_id)
            if not Path(model.config["weights_path"]).is_file():
                model.name, model.config = self._spec.name, self._spec.config()
            set_pending_model(session, self._collection, model_id)
            session.flush()
            with_vector = exists().where(EmbeddingRow.sha256 == ImageRow.sha256, EmbeddingRow.model_id == model_id)
            self.summary.reused = session.scalars(
                select(func.count()).select_from(ImageRow).where(*self._readable(), with_vector)
            ).one()
        return model_id

    def _readable(self) -> tuple[ColumnElement[bool], ...]:
        return ImageRow.collection_id == self._collection.id, ImageRow.status == "ok"

    def _missing(self, session: Session) -> list[_Image]:
        """Readable images without an embedding under the new model."""
        sources = source_paths(session, self._collection)
        embedded = exists().where(
            EmbeddingRow.sha256 == ImageRow.sha256,
            EmbeddingRow.model_id == self._model_id,
            EmbeddingRow.kind == "cls",
            EmbeddingRow.region == "full",
        )
        rows = session.execute(
            select(ImageRow.id, ImageRow.source_id, ImageRow.path, ImageRow.size, ImageRow.mtime_ns, ImageRow.sha256)
            .where(*self._readable(), ~embedded)
            .order_by(ImageRow.id)
        )
        return [
            _Image(image_id, ListedFile(join_path(sources[source_id], name), size, mtime_ns), sha256 or b"")
            for image_id, source_id, name, size, mtime_ns, sha256 in rows
        ]

    def _to_read(self, missing: Iterable[_Image]) -> list[_Image]:
        """One image for each of the missing contents, of those whose file was not yet found to be of no use."""
        chosen: dict[bytes, _Image] = {}
        for image in missing:
            unusable = self._unusable.get(image.id)
            if unusable is None or unusable[0] != image.sha256:
                chosen.setdefault(image.sha256, image)
        return list(chosen.values())

    def _embed(self, images: Sequence[_Image]) -> None:
        """Embeds and records the images' files; those of no use are remembered."""
        by_path = {image.file.path: image for image in images}
        total = self._done + len(by_path)
        self._report(total)
        batches = embed_files(
            [image.file for image in by_path.values()], self._load_backbone, self._spec.input_size,
            lambda sha256: None, self._options.embedding,
        )  # fmt: skip

        def record(outcomes: Sequence[EmbeddedFile | FailedFile]) -> None:
            embedded = [outcome for outcome in outcomes if isinstance(outcome, EmbeddedFile)]
            self._catalog.write(lambda session: store_vectors(session, self._model_id, embedded))
            for outcome in outcomes:
                image = by_path[outcome.file.path]
                if isinstance(outcome, FailedFile):
                    self._unusable[image.id] = image.sha256, outcome
                    continue
                self.summary.embedded += 1
                if outcome.facts.sha256 != image.sha256:
                    self._unusable[image.id] = image.sha256, outcome.facts

        for num_recorded in record_outcomes(batches, record, self._should_stop):
            self._done += num_recorded
            self._report(total)
        self.summary.remaining = total - self._done
        self.summary.interrupted = self._done < total

    def _switch(self) -> bool:
        """Makes the new model the collection's own; False when there is something to embed first.

        Raises ReindexRefused.
        """
        with self._catalog.writing() as session:
            # Locked where the database locks rows: from here on nobody adds images.
            session.execute(select(CollectionRow.id).where(CollectionRow.id == self._collection.id).with_for_update())
            self._collection = find_collection(session, self._collection.name)
            if self._collection.model_id == self._model_id:
                return True  # another run of the same command was faster
            missing = self._missing(session)
            if self._to_read(missing) or self._forget_lost(session, missing):
                return False
            unusable = [(image.id, self._unusable[image.id][1]) for image in missing]
            failed = {image_id: found for image_id, found in unusable if isinstance(found, FailedFile)}
            self._refuse_losses(failed, count_images(session, self._collection)["ok"])
            generation = advance_generation(session, self._collection)
            session.get_one(CollectionRow, self._collection.id).model_id = self._model_id
            session.execute(update(ImageRow).where(*self._readable()).values(generation=generation))
            for image_id, found in unusable:
                row = session.get_one(ImageRow, image_id)
                if isinstance(found, FailedFile):
                    enter_failure(row, found.file, found.error)
                else:
                    enter_content(row, found)
            # All vectors are new ones: nothing of the old snapshot counts, and no removal has to be masked.
            session.execute(delete(RemovalRow).where(RemovalRow.collection_id == self._collection.id))
            session.execute(delete(SnapshotRow).where(SnapshotRow.collection_id == self._collection.id))
            drop_stored(session, self._collection)
            set_pending_model(session, self._collection, None)
        self.summary.switched = True
        self.summary.failed = len(failed)
        self.summary.updated = len(unusable) - len(failed)
        return True

    def _forget_lost(self, session: Session, missing: Iterable[_Image]) -> bool:
        """Whether embeddings of changed files' new content were dropped by another command; they are read again."""
        new = {image.id: found.sha256 for image in missing
               if isinstance(found := self._unusable[image.id][1], FileFacts)}  # fmt: skip
        stored: set[bytes] = set()
        for part in bound_parts(list(set(new.values()))):
            of_part = EmbeddingRow.model_id == self._model_id, EmbeddingRow.kind == "cls", EmbeddingRow.sha256.in_(part)
            stored |= set(session.scalars(select(EmbeddingRow.sha256).where(*of_part)))
        lost = [image_id for image_id, sha256 in new.items() if sha256 not in stored]
        for image_id in lost:
            del self._unusable[image_id]
        return bool(lost)

    def _refuse_losses(self, failed: dict[int, FailedFile], num_readable: int) -> None:
        """Raises ReindexRefused when images would be lost that nobody agreed to lose, or all of them."""
        if not failed or (self._options.allow_missing and len(failed) < num_readable):
            return
        counts = Counter(failure.error.reason for failure in failed.values())
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
        example = min(failure.file.path for failure in failed.values())
        ways = "bring their files back, or drop those that are gone with: dino-search index PATH --prune"
        if not self._options.allow_missing:
            ways += "; --allow-missing enters them as failed"
        raise ReindexRefused(
            f"collection {self._collection.name!r} stays with {self._collection.model_name}: {len(failed)} of its "
            f"{num_readable} images cannot be embedded under {self._spec.name} "
            f"({reasons}; one is {example}); {ways}; what was embedded is kept for the next run"
        )

    def _report(self, total: int) -> None:
        failed = sum(isinstance(found, FailedFile) for _, found in self._unusable.values())
        self._on_progress(Progress(done=self._done, total=total, failed=failed))

    def _load_backbone(self) -> Backbone:
        from dino_index.backbones import Backbone

        if self._backbone is None:
            self._backbone = Backbone(self._spec, device=self._device)
        return self._backbone
