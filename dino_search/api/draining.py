"""What is in flight, and no new work once the service is about to end."""

from __future__ import annotations

from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from dino_index.errors import NotReady
from dino_search.api.engine import Engine
from dino_search.api.problems import problem_of

PROBES = ("/livez", "/readyz", "/metrics")


class InFlight:
    """ASGI middleware: counts the requests that are being answered, probes aside, and refuses them at the end."""

    def __init__(self, app: ASGIApp, engine: Engine) -> None:
        self._app = app
        self._engine = engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PROBES:
            await self._app(scope, receive, send)
            return
        if self._engine.is_draining:
            answer = problem_of(Request(scope), NotReady("the service is about to end; try again elsewhere"))
            answer.headers["Connection"] = "close"
            await answer(scope, receive, send)
            return
        self._engine.num_in_flight += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._engine.num_in_flight -= 1
