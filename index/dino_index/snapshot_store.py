"""Vectors of a catalog's collections in snapshot files of the home."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from dino_index.catalog import Catalog, CollectionRow, ImageRow, SnapshotRow
from dino_index.catalog.portable_paths import encode_path
from dino_index.collections import CollectionInfo, generation_of
from dino_index.index_type_names import AUTO, NAMED_INDEX_TYPES

if TYPE_CHECKING:
    from dino_index.copy_descriptors import CopyDescriptor
    from dino_index.copy_search import CopyReferences
    from dino_index.held_references import HeldReferences
    from dino_index.vector_index import VectorIndex

# Vectors in no snapshot are read from the catalog when a search starts, which takes a millisecond a hundred.
_MIN_DELTA_TO_COMPACT = 1000
_MAX_DELTA_FRAC = 0.1


class SnapshotStore:
    """See `VectorStore`; imports FAISS when it is needed. Cheap to make."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    @property
    def place(self) -> str:
        return str(self._catalog.snapshots_folder)

    def connect(self) -> None:
        pass

    def check_type(self, asked: str, dim: int) -> None:
        if asked not in NAMED_INDEX_TYPES:
            from dino_index.index_types import check_index_type

            check_index_type(asked, dim)

    def weigh(self, session: Session, collection: CollectionInfo, num_vectors: int) -> None:
        from dino_index.snapshots import next_choice

        next_choice(session, collection, num_vectors)

    def load(self, session: Session, collection: CollectionInfo) -> VectorIndex:
        from dino_index.vector_index import VectorIndex

        return VectorIndex.load(self._catalog, session, collection)

    def load_copies(
        self,
        session: Session,
        collection: CollectionInfo,
        descriptor: CopyDescriptor,
        before: CopyReferences | None = None,
    ) -> HeldReferences:
        """From the catalog: there is no file of copy vectors."""
        from dino_index.copy_vectors import load_copy_vectors, readable_ids
        from dino_index.held_references import HeldReferences, Origin
        from dino_index.vector_kinds import CopyVectors

        origin = Origin(
            collection_id=collection.id,
            model_id=collection.model_id,
            whitening_sha256=CopyVectors(descriptor).whitening_sha256,
            generation=generation_of(session, collection),
        )
        if not isinstance(before, HeldReferences) or before.origin is None or not origin.continues(before.origin):
            return HeldReferences(load_copy_vectors(session, collection, descriptor), origin)
        changed = load_copy_vectors(session, collection, descriptor, after_generation=before.origin.generation)
        return before.updated(readable_ids(session, collection), changed, origin)

    def keep_up(self, collection: CollectionInfo) -> None:
        pass  # searches read what is new from the catalog

    def settle(self, collection: CollectionInfo, *, retype: bool = False) -> None:
        def is_needed(session: Session) -> bool:
            worth = _is_worth_a_snapshot(session, collection)
            return worth or (retype and _wants_another_type(session, collection))

        if self._catalog.read(is_needed):
            from dino_index.snapshots import write_snapshot

            self._catalog.outlast(lambda: write_snapshot(self._catalog, collection, append=True))

    def compact(self, collection: CollectionInfo) -> None:
        from dino_index.snapshots import write_snapshot

        write_snapshot(self._catalog, collection)

    def problem(self, collection: CollectionInfo) -> str | None:
        from dino_index.snapshot_comparison import snapshot_problem

        return snapshot_problem(self._catalog, collection)

    def facts(self, session: Session, collection: CollectionInfo) -> dict[str, Any]:
        snapshot = session.get(SnapshotRow, collection.id)
        return {
            "vector_store": encode_path(self.place),
            "index_type": snapshot.index_type if snapshot else "flat",
            "index_reason": snapshot.reason if snapshot else "few enough to compare all without an index file",
            "images_in_snapshot": snapshot.num_vectors if snapshot else 0,
        }


def _is_worth_a_snapshot(session: Session, collection: CollectionInfo) -> bool:
    """Whether so much has changed since the snapshot that starting a search would be slow."""
    snapshot = session.get(SnapshotRow, collection.id)
    num_before, since = (snapshot.num_vectors, snapshot.generation) if snapshot else (0, -1)
    if since == generation_of(session, collection):
        return False
    changed = ImageRow.collection_id == collection.id, ImageRow.generation > since
    delta = session.scalars(select(func.count()).where(*changed)).one()
    return delta >= max(_MIN_DELTA_TO_COMPACT, _MAX_DELTA_FRAC * num_before)


def _wants_another_type(session: Session, collection: CollectionInfo) -> bool:
    """Whether the type that was asked for is not there and can be: few vectors may train nothing but `flat`."""
    snapshot = session.get(SnapshotRow, collection.id)
    built = snapshot.index_type if snapshot else AUTO
    if session.get_one(CollectionRow, collection.id).index_type in (AUTO, built):
        return False
    from dino_index.snapshots import count_vectors, next_choice

    num_vectors = count_vectors(session, collection)
    return num_vectors > 0 and next_choice(session, collection, num_vectors).name != built
