"""What is in flight, and no new work once the service is about to end."""

from __future__ import annotations

from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from dino_index.errors import NotReady, ServerFull
from dino_search.api.engine import Engine
from dino_search.api.problems import problem_of

_REQUESTS_A_PLACE = 4
PROBES = ("/livez", "/readyz", "/metrics")


class InFlight:
    """ASGI middleware: counts the requests that are being answered, probes aside.

    Refuses further ones beyond a bound, and all once the service is about to end.
    """

    def __init__(self, app: ASGIApp, engine: Engine) -> None:
        self._app = app
        self._engine = engine
        # Their bodies are in memory or on disk, though only so many pictures may wait for a pass.
        self._most = _REQUESTS_A_PLACE * engine.settings.queue_size

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PROBES:
            await self._app(scope, receive, send)
            return
        if self._engine.is_draining:
            answer = problem_of(Request(scope), NotReady("the service is about to end; try again elsewhere"))
            answer.headers["Connection"] = "close"
            await answer(scope, receive, send)
            return
        if self._engine.num_in_flight >= self._most:
            self._engine.metrics.rejected.inc()
            full = ServerFull(
                f"{self._most} requests are being read or answered already; try again later",
                self._engine.admission.retry_after_s,
            )
            await problem_of(Request(scope), full)(scope, receive, send)
            return
        self._engine.num_in_flight += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._engine.num_in_flight -= 1
