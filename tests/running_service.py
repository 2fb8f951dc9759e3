"""A service on a port of this machine, in a thread of the test's process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

from dino_search.api.engine import Engine
from dino_search.api.serving import Server, make_server
from dino_search.api.settings import ServiceSettings
from live_servers import waits_until

_STARTS_WITHIN_S = 60


@dataclass(frozen=True, kw_only=True)
class RunningService:
    """http: asks it. Nothing else of it is to be touched while it runs, but by tests that put something in its way."""

    url: str
    http: httpx.Client
    server: Server
    app: FastAPI

    @property
    def engine(self) -> Engine:
        engine: Engine = self.app.state.engine
        return engine


@contextmanager
def running_service(home: Path, *, ready: bool = True, **settings: Any) -> Iterator[RunningService]:
    """A service on this home until the block ends. ready: wait until it is. settings: of `ServiceSettings`."""
    server = make_server(ServiceSettings(home=home, port=0, **settings))
    thread = threading.Thread(target=server.run, name="service")
    thread.start()
    try:
        assert waits_until(lambda: server.started, _STARTS_WITHIN_S), "the service did not start"
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as http:
            if ready:
                is_ready = waits_until(lambda: http.get("/readyz").status_code == 200, _STARTS_WITHIN_S)
                assert is_ready, "the service did not become ready"
            app = server.config.app
            assert isinstance(app, FastAPI)
            yield RunningService(url=url, http=http, server=server, app=app)
    finally:
        server.should_exit = True
        thread.join()


def is_problem(answer: httpx.Response, status: int, code: str) -> bool:
    """Whether an answer is this problem, whole and of the right media type."""
    if answer.headers.get("content-type") != "application/problem+json":
        return False
    content = answer.json()
    whole = {"type", "title", "status", "detail", "instance", "request_id"} <= content.keys()
    return whole and (answer.status_code, content["status"], content["type"]) == (status, status, f"/problems/{code}")
