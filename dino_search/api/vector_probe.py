"""Whether the vectors' server answers, for `/readyz`: asked in a thread of its own, so that nobody hangs with it."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor

from dino_index.catalog import Catalog
from dino_index.errors import DinoSearchError
from dino_index.vector_stores import server_store_of

_MAX_WAIT_S = 1.0
_FRESH_FOR_S = 2.0


class VectorProbe:
    """For one thread at a time."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "probe-vectors")
        self._asking: Future[None] | None = None
        self._asked_at = 0.0

    def problem(self, catalog: Catalog) -> str | None:
        """Why the server cannot be used, as of the last seconds; None where it can, and where there is none."""
        try:
            store = server_store_of(catalog)
        except DinoSearchError as error:
            return str(error)
        if store is None:
            return None
        now = time.monotonic()
        if self._asking is None or (self._asking.done() and now - self._asked_at > _FRESH_FOR_S):
            self._asking, self._asked_at = self._thread.submit(store.connect, patience_s=0), now
        try:
            self._asking.result(_MAX_WAIT_S)
        except TimeoutError:
            return f"the vector store at {store.place} has not answered for {now - self._asked_at + _MAX_WAIT_S:.0f} s"
        except DinoSearchError as error:
            return str(error)
        return None

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)
