"""The way of a long-running process to a catalog that may come, go and be replaced meanwhile."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path

from dino_index.catalog import Catalog
from dino_index.catalog.sqlite import SqliteStore


class CatalogDoor:
    """Opens the catalog of a home, or of a database by URL, when it is needed. Safe to use from several threads.

    An SQLite file that is deleted, or replaced by another one, stays open under its old name for whoever had it open:
    it is looked for by name each time, and opened again where it is another one.
    """

    def __init__(self, home: Path, database: str | None = None, vector_store: str | None = None) -> None:
        self.home = Path(home).expanduser().absolute()
        self.database = database
        self._vector_store = vector_store
        self._lock = threading.Lock()
        self._catalog: Catalog | None = None
        self._file: tuple[int, int] | None = None

    def catalog(self) -> Catalog | None:
        """The catalog; None where there is none yet. Raises CatalogErrors."""
        with self._lock:
            return self._opened(create=False)

    def created_catalog(self) -> Catalog:
        """The catalog, which is made where there is none. Raises CatalogErrors."""
        with self._lock:
            catalog = self._opened(create=True)
            assert catalog is not None
            return catalog

    def close(self) -> None:
        """Releases the database; the door can be used again."""
        with self._lock:
            self._release()

    def _opened(self, *, create: bool) -> Catalog | None:
        if self._catalog is not None and self._file_now() != self._file:
            self._release()
        if self._catalog is None:
            self._catalog = Catalog.open(self.home, create=create, url=self.database, vectors_url=self._vector_store)
            self._file = self._file_now()
        return self._catalog

    def _file_now(self) -> tuple[int, int] | None:
        if self._catalog is None or not isinstance(self._catalog.store, SqliteStore):
            return None
        with suppress(OSError):
            found = os.stat(self._catalog.path)
            return found.st_dev, found.st_ino
        return None

    def _release(self) -> None:
        if self._catalog is not None:
            self._catalog.close()
        self._catalog, self._file = None, None
