"""Removing a whole collection from a catalog: its rows and index files. Pictures on the disk stay."""

from __future__ import annotations

import shutil

from sqlalchemy import delete

from dino_index.catalog import (
    CalibrationRow,
    Catalog,
    CollectionRow,
    ImageRow,
    RemovalRow,
    ReportRow,
    SnapshotRow,
    SourceRow,
    WhiteningRow,
)
from dino_index.collections import find_collection, set_pending_model
from dino_index.integrity import drop_unneeded_embeddings
from dino_index.snapshots import drop_stored, snapshot_folder
from dino_index.vector_stores import server_store_of


def remove_collection(catalog: Catalog, name: str) -> None:
    """Forgets a collection in one transaction, then its index files and the embeddings that no other one needs.

    What a kill leaves of the latter goes with the next `compact` or `remove --purge` of any collection. Verdicts stay.
    Raises CollectionNotFound, CatalogErrors.
    """
    with catalog.writing() as session:
        collection = find_collection(session, name)
        set_pending_model(session, collection, None)
        for table in (ReportRow, WhiteningRow, CalibrationRow, RemovalRow, SnapshotRow, ImageRow, SourceRow):
            session.execute(delete(table).where(table.collection_id == collection.id))
        drop_stored(session, collection)
        session.execute(delete(CollectionRow).where(CollectionRow.id == collection.id))
    shutil.rmtree(snapshot_folder(catalog, collection), ignore_errors=True)
    if (server := server_store_of(catalog)) is not None:
        server.forget(collection)
    drop_unneeded_embeddings(catalog, collection.model_id)
