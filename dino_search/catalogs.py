"""Whole catalogs: backed up, restored, copied to another database; snapshots follow."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import select

from dino_index.catalog import Catalog, CollectionRow, SnapshotRow
from dino_index.catalog.backup import Replacement, back_up, copy_catalog, restore
from dino_index.collections import find_collection
from dino_index.errors import CollectionNotFound


@dataclass(frozen=True, kw_only=True)
class CatalogCopy:
    """What was copied, counted in rows."""

    collections: int
    images: int
    embeddings: int
    kept: Path | None = None
    """The file with what was in the target before; None where nothing was, or nothing was replaced."""
    snapshots_written: int = 0
    """Index files that were missing in the home."""

    @classmethod
    def of(cls, rows: dict[str, int], *, kept: Path | None = None, snapshots_written: int = 0) -> CatalogCopy:
        return cls(
            collections=rows["collection"],
            images=rows["image"],
            embeddings=rows["embedding"],
            kept=kept,
            snapshots_written=snapshots_written,
        )


def back_up_catalog(file: Path, *, home: Path, database: str | None, force: bool = False) -> CatalogCopy:
    """Writes the catalog into one portable file while others work on it.

    Raises CollectionNotFound when there is no catalog yet; OutputExists, OutputUnwritable, CatalogErrors.
    """
    with closing(_existing(home, database)) as catalog:
        return CatalogCopy.of(back_up(catalog, file, force=force))


def restore_catalog(file: Path, *, home: Path, database: str | None, force: bool = False) -> CatalogCopy:
    """Fills the catalog from such a file. Raises as `dino_index.catalog.backup.restore` does."""
    return _with_snapshots(restore(file, home, database, force=force), home, database)


def copy_catalog_to(target: str, *, home: Path, database: str | None, force: bool = False) -> CatalogCopy:
    """Copies the catalog into a PostgreSQL database (`target` is a URL) or into the SQLite file of a home folder.

    Raises CollectionNotFound when there is no catalog yet; CatalogErrors.
    """
    is_url = "://" in target
    target_home, target_url = (home, target) if is_url else (Path(target), None)
    with closing(_existing(home, database)) as catalog:
        replacement = copy_catalog(catalog, target_home, target_url, force=force)
    return _with_snapshots(replacement, target_home, target_url)


def _existing(home: Path, database: str | None) -> Catalog:
    catalog = Catalog.open(home, url=database)
    if catalog is None:
        where = "in the database" if database else f"under {home}"
        raise CollectionNotFound(f"nothing has been indexed yet {where}; run: dino-search index FOLDER-WITH-PICTURES")
    return catalog


def _with_snapshots(replacement: Replacement, home: Path, database: str | None) -> CatalogCopy:
    """Writes those snapshots that the catalog points to and the home lacks."""
    from dino_index.snapshots import snapshot_is_intact, write_snapshot

    num_written = 0
    with closing(_existing(home, database)) as catalog:
        with catalog.reading() as session:
            names = session.scalars(
                select(CollectionRow.name).join(SnapshotRow, SnapshotRow.collection_id == CollectionRow.id)
            )
            collections = [find_collection(session, name) for name in names.all()]
            rows = {item.id: session.get_one(SnapshotRow, item.id) for item in collections}
            session.expunge_all()
        for collection in collections:
            if not snapshot_is_intact(catalog, collection, rows[collection.id]):
                write_snapshot(catalog, collection)
                num_written += 1
    return CatalogCopy.of(replacement.rows, kept=replacement.kept, snapshots_written=num_written)
