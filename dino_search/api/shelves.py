"""The vectors of one collection as a service keeps them."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime

from sqlalchemy.orm import Session

from dino_index.catalog import Catalog
from dino_index.collections import CollectionInfo
from dino_index.vector_stores import VectorSearch, vector_store_of
from dino_search.api.metrics import Metrics


class Shelf:
    """One collection's vectors, and the one thread that may touch them."""

    def __init__(self, name: str, metrics: Metrics) -> None:
        self.thread = ThreadPoolExecutor(1, f"search-{name[:32]}")
        self._name = name
        self._metrics = metrics
        self._vectors: VectorSearch | None = None
        self._of: tuple[int, int, int, datetime] | None = None
        self._catalog: Catalog | None = None

    def current(self, catalog: Catalog, session: Session, collection: CollectionInfo) -> VectorSearch:
        """The vectors as the session sees the collection; loaded where they have changed. In the shelf's thread."""
        of = id(catalog), collection.id, collection.model_id, collection.created_at
        if self._vectors is None or self._of != of or not self._vectors.is_current(session, collection):
            self._vectors = vector_store_of(catalog).load(session, collection)
            # Held, so that the id of a catalog that was closed is not that of another one.
            self._of, self._catalog = of, catalog
            self._metrics.index_images.labels(self._name).set(len(self._vectors))
        now = time.monotonic()
        self._metrics.index_age.labels(self._name).set_function(lambda: time.monotonic() - now)
        return self._vectors

    def close(self) -> None:
        self.thread.shutdown(cancel_futures=True)
        for gauge in (self._metrics.index_images, self._metrics.index_age):
            with suppress(KeyError):
                gauge.remove(self._name)
