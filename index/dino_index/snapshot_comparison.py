"""A collection's index file compared with the catalog."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from dino_index.catalog import Catalog, ImageRow, RemovalRow, SnapshotRow
from dino_index.collections import CollectionInfo, generation_of
from dino_index.snapshots import (
    Snapshot,
    SnapshotDamaged,
    read_snapshot,
    snapshot_ids,
    snapshot_is_intact,
)


def snapshot_problem(catalog: Catalog, collection: CollectionInfo) -> str | None:
    """What is wrong with the snapshot, in a line; None where it agrees with the catalog or there is none."""
    with catalog.reading() as session:
        row = session.get(SnapshotRow, collection.id)
        if row is None:
            return None
        try:
            snapshot = read_snapshot(catalog, collection, row)
        except SnapshotDamaged as error:
            return f"snapshot: {error}"
        if not snapshot_is_intact(catalog, collection, row):
            return f"snapshot: the bytes of {row.file_name} are not those that were written"
        if row.generation > generation_of(session, collection):
            return f"snapshot: {row.file_name} is newer than the catalog"
        return _difference(session, collection, row, snapshot)


def _difference(session: Session, collection: CollectionInfo, row: SnapshotRow, snapshot: Snapshot) -> str | None:
    """Whether the snapshot holds exactly the images that it should, later changes aside."""
    ours = ImageRow.collection_id == collection.id
    settled = select(ImageRow.id).where(ours, ImageRow.status == "ok", ImageRow.generation <= row.generation)
    changed = select(ImageRow.id).where(ours, ImageRow.generation > row.generation)
    removed = select(RemovalRow.image_id).where(
        RemovalRow.collection_id == collection.id, RemovalRow.generation > row.generation
    )
    later = set(session.scalars(changed)) | set(session.scalars(removed))
    in_snapshot = set(snapshot_ids(snapshot).tolist()) - later
    in_catalog = set(session.scalars(settled)) - later
    if in_snapshot == in_catalog:
        return None
    missing, surplus = len(in_catalog - in_snapshot), len(in_snapshot - in_catalog)
    return f"snapshot: {row.file_name} lacks {missing} images of the catalog and has {surplus} that are not in it"
