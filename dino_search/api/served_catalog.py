"""The catalog as requests read and write it: in threads of its own, with errors that say what is the matter with it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from sqlalchemy.orm import Session

from dino_index.catalog import Catalog
from dino_index.errors import CatalogUnavailable, CollectionNotFound
from dino_search.api.catalog_door import CatalogDoor
from dino_search.api.metrics import Metrics
from dino_search.api.settings import ServiceSettings
from dino_search.api.threads import in_thread

T = TypeVar("T")

_NUM_THREADS = 4


class ServedCatalog:
    """Everything but `in_thread` may wait for a database: not on the event loop."""

    def __init__(self, settings: ServiceSettings, metrics: Metrics) -> None:
        self.threads = ThreadPoolExecutor(_NUM_THREADS, "catalog")
        self._door = CatalogDoor(settings.home, settings.database, settings.vector_store)
        self._metrics = metrics
        self._was_there = False

    def opened(self) -> Catalog:
        """The home's catalog. It is opened anew where its file is another one by now.

        Raises CollectionNotFound where nothing has been indexed yet, CatalogUnavailable where it has gone.
        """
        catalog = self._door.catalog()
        if catalog is None and self._was_there:
            raise CatalogUnavailable(
                f"the catalog in {self._door.home} is gone; put it back, the service then goes on by itself"
            )
        if catalog is None:
            raise CollectionNotFound(
                f"nothing has been indexed yet under {self._door.home}; run: dino-search index FOLDER-WITH-PICTURES"
            )
        self._was_there = True
        return catalog

    def create(self) -> None:
        """Makes the catalog where nothing has been indexed yet. Raises CatalogErrors."""
        try:
            self.opened()
        except CollectionNotFound:
            self._door.created_catalog()

    def read(self, work: Callable[[Session], T]) -> T:
        """What `work` gives back of a reading session."""
        with self._metrics.stage("catalog"), self.opened().reading() as session:
            return work(session)

    def write(self, work: Callable[[Session], T]) -> T:
        """What `work` gives back of a writing session."""
        with self._metrics.stage("catalog"), self.opened().writing() as session:
            return work(session)

    async def in_thread(self, work: Callable[..., T], *args: Any) -> T:
        """What `work` gives back, done in one of the threads."""
        return await in_thread(self.threads, work, *args)

    def close(self) -> None:
        """Ends the threads, after what they are at, and releases the database."""
        self.threads.shutdown(cancel_futures=True)
        self._door.close()
