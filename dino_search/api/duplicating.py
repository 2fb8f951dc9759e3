"""Duplicates in a service: found once for each state of a collection and its verdicts, then kept."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, cast

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from dino_index.catalog import VerdictRow
from dino_index.collections import CollectionInfo, find_collection, generation_of
from dino_search.api.engine import Engine
from dino_search.api.threads import in_thread
from dino_search.copy_runs import duplicates_in
from dino_search.duplicate_results import Duplicates
from dino_search.duplicates import DuplicateOptions

if TYPE_CHECKING:
    from dino_index.backbones import Backbone

_MAX_KNOWN = 4


class Duplicating:
    """Coroutines of the engine's event loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._thread = ThreadPoolExecutor(1, "duplicates")
        self._known: OrderedDict[Hashable, asyncio.Future[Duplicates]] = OrderedDict()

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    async def duplicates(
        self, options: DuplicateOptions, *, collection: str, target_precision: float, copy_score: float | None
    ) -> Duplicates:
        """As `Collection.duplicates` finds them.

        Who gives up waiting leaves the search going on, so that asking again is no waste.
        Raises CollectionNotFound, ModelError, CatalogErrors.
        """
        engine = self._engine
        info, state = await engine.catalog.in_thread(
            engine.catalog.read, lambda session: _state_of(session, collection)
        )
        key = state, options, target_precision, copy_score
        running = self._known.get(key)
        if running is None or (running.done() and (running.cancelled() or running.exception())):
            running = asyncio.ensure_future(self._find(info, options, target_precision, copy_score))
            running.add_done_callback(lambda done: done.cancelled() or done.exception())  # met by who asks again
            self._known[key] = running
        self._known.move_to_end(key)
        while len(self._known) > _MAX_KNOWN:
            self._known.popitem(last=False)
        return await asyncio.shield(running)

    async def _find(
        self, info: CollectionInfo, options: DuplicateOptions, target_precision: float, copy_score: float | None
    ) -> Duplicates:
        engine = self._engine
        passes = await engine.passes_of(info)
        return await in_thread(
            self._thread,
            lambda: duplicates_in(
                engine.catalog.opened(), info, engine.models, options,
                target_precision=target_precision, copy_score=copy_score,
                load_backbone=lambda: cast("Backbone", passes.shared),
            ),
        )  # fmt: skip


def _state_of(session: Session, name: str) -> tuple[CollectionInfo, Hashable]:
    """The collection, and what changes whenever its duplicates may be others."""
    collection = find_collection(session, name)
    verdicts = session.execute(select(func.count(), func.max(VerdictRow.decided_at))).one()
    return collection, (collection.id, collection.model_id, generation_of(session, collection), *verdicts)
