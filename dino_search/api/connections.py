"""HTTP connections that are closed when a client keeps the server waiting for a request.

uvicorn waits without end for the first request of a connection, for the rest of a request's head, and for the rest of a
body that nobody reads any more: a client that opens many such connections would use up the server's files. A connection
that is idle between two requests is another thing: proxies keep those, and uvicorn's `timeout_keep_alive` ends them.
"""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


class TimedConnection(H11Protocol):
    """uvicorn's connection, with a limit to the time in which a request that has begun is not there yet."""

    max_wait_s: ClassVar[float] = 20.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._waiting_since: float | None = self.loop.time()
        self._timer: asyncio.TimerHandle | None = self.loop.call_later(self.max_wait_s, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_answering():
            self._waiting_since = None
        elif self._waiting_since is None:  # a further request begins
            self._waiting_since = self.loop.time()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        # The next request may have been there already, whole or in part, and the body of this one not yet.
        is_idle = self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]
        self._waiting_since = None if self._is_answering() or is_idle else self.loop.time()

    def _is_answering(self) -> bool:
        cycle: Any = self.cycle  # None before the first request, whatever its annotation says
        return cycle is not None and not cycle.response_complete

    def _look(self) -> None:
        waited_s = 0.0 if self._waiting_since is None else self.loop.time() - self._waiting_since
        if waited_s >= self.max_wait_s:
            self._timer = None
            self.transport.close()
            return
        self._timer = self.loop.call_later(self.max_wait_s - waited_s, self._look)


def timed_connections(max_wait_s: float) -> type[asyncio.Protocol]:
    """What `uvicorn.Config(http=...)` takes. max_wait_s: from the first byte of a request's head to its last one."""
    facts: dict[str, Any] = {"max_wait_s": max_wait_s}
    return type("TimedConnection", (TimedConnection,), facts)
