from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient

from dino_index.errors import DinoSearchError, KeyRefused, ScopeMissing, TooManyAttempts
from dino_search.api.access import (
    AccessControl,
    Admin,
    FailureCounts,
    KeyMode,
    Read,
    Write,
    current_key,
    reaches_collection,
    require_collection,
)
from dino_search.api.keys import ApiKey, ApiKeys, Scope
from dino_search.api.middleware import MiddlewareOptions, add_middleware

CACHE_S = 3.0


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def keys(home: Path) -> Iterator[ApiKeys]:
    with closing(ApiKeys(home)) as keys:
        yield keys


Service = Callable[..., TestClient]


@pytest.fixture
def service(keys: ApiKeys, clock: Clock) -> Iterator[Service]:
    """An app with an operation for each scope."""
    started: list[AccessControl] = []
    clients: list[TestClient] = []

    def start(mode: KeyMode = "auto") -> TestClient:
        app = FastAPI()
        access = app.state.access = AccessControl(keys, mode, cache_s=CACHE_S, clock=clock)

        @app.get("/read", dependencies=[Read])
        def read() -> str | None:  # in a thread, as most operations
            key = current_key()
            return key.name if key else None

        @app.post("/write", dependencies=[Write])
        async def write(body: dict[str, str]) -> list[str]:
            require_collection(body["collection"])
            return [name for name in ("a", "b") if reaches_collection(name)]

        @app.delete("/collections/{collection}", dependencies=[Admin])
        async def delete(collection: str) -> str:
            return collection

        @app.get("/open")
        async def live() -> str:
            return "alive"

        @app.exception_handler(DinoSearchError)
        async def problem(request: Request, error: DinoSearchError) -> JSONResponse:
            status = {KeyRefused: 401, ScopeMissing: 403, TooManyAttempts: 429}.get(type(error), 503)
            return JSONResponse({"code": error.code, "detail": str(error)}, status)

        add_middleware(app, MiddlewareOptions())
        started.append(access)
        clients.append(TestClient(app))
        return clients[-1]

    yield start
    for client in clients:
        client.close()
    for access in started:
        access.close()


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def refused(answer: Any, status: int, code: str) -> bool:
    return (answer.status_code, answer.json()["code"]) == (status, code)


def test_without_any_key_everybody_may_do_everything(service: Service) -> None:
    client = service()
    assert client.get("/read").json() is None
    assert client.post("/write", json={"collection": "a"}).json() == ["a", "b"]
    assert client.delete("/collections/a").json() == "a"


def test_keys_are_needed_as_soon_as_there_is_one(service: Service, keys: ApiKeys, clock: Clock) -> None:
    client = service()
    assert client.get("/read").status_code == 200
    _, key = keys.add("laptop", scope="read")
    clock.now += CACHE_S
    answer = client.get("/read")
    assert refused(answer, 401, "key_refused")
    assert answer.headers["www-authenticate"].startswith("Bearer")
    assert client.get("/read", headers=bearer(key)).json() == "laptop"
    assert client.get("/read", headers={"X-API-Key": key}).json() == "laptop"
    assert client.get("/open").json() == "alive"


def test_revoking_the_last_key_does_not_open_the_service(service: Service, keys: ApiKeys) -> None:
    known, key = keys.add("laptop", scope="read")
    keys.revoke(known.id)
    client = service()
    assert refused(client.get("/read"), 401, "key_refused")
    assert refused(client.get("/read", headers=bearer(key)), 401, "key_refused")


def test_a_catalog_that_vanishes_does_not_open_the_service(
    service: Service, keys: ApiKeys, clock: Clock, home: Path
) -> None:
    _, key = keys.add("laptop", scope="read")
    client = service()
    assert client.get("/read", headers=bearer(key)).status_code == 200
    shutil.move(home, home.with_name("aside"))
    clock.now += CACHE_S
    assert client.get("/read").status_code == 401
    assert client.get("/read", headers=bearer(key)).status_code == 401
    shutil.move(home.with_name("aside"), home)
    clock.now += CACHE_S
    assert client.get("/read", headers=bearer(key)).status_code == 200


def test_keys_can_be_demanded_before_there_is_one_and_switched_off(service: Service, keys: ApiKeys) -> None:
    assert refused(service("required").get("/read"), 401, "key_refused")
    keys.add("laptop", scope="read")
    assert service("off").get("/read").status_code == 200


@pytest.mark.parametrize(
    ("scope", "statuses"), [("read", (200, 403, 403)), ("write", (200, 200, 403)), ("admin", (200, 200, 200))]
)
def test_a_key_allows_what_its_scope_says(
    service: Service, keys: ApiKeys, scope: Scope, statuses: tuple[int, ...]
) -> None:
    headers = bearer(keys.add("a", scope=scope)[1])
    client = service()
    answers = (
        client.get("/read", headers=headers),
        client.post("/write", json={"collection": "a"}, headers=headers),
        client.delete("/collections/a", headers=headers),
    )
    assert tuple(answer.status_code for answer in answers) == statuses
    needed = {answer.json()["detail"].split("scope ")[1].split(",")[0] for answer in answers if answer.is_error}
    assert needed <= {"write", "admin"}


def test_a_key_for_some_collections_reaches_no_other(service: Service, keys: ApiKeys) -> None:
    headers = bearer(keys.add("a", scope="admin", collections=["a"])[1])
    client = service()
    assert client.post("/write", json={"collection": "a"}, headers=headers).json() == ["a"]
    for answer in (
        client.post("/write", json={"collection": "b"}, headers=headers),
        client.delete("/collections/b", headers=headers),
        client.get("/read?collection=b", headers=headers),
        client.get("/read?collection=a&collection=b", headers=headers),
    ):
        assert refused(answer, 403, "scope_missing")
    assert client.delete("/collections/a", headers=headers).status_code == 200


def test_one_request_has_nothing_of_the_key_of_another(service: Service, keys: ApiKeys) -> None:
    bound = bearer(keys.add("bound", scope="write", collections=["a"])[1])
    free = bearer(keys.add("free", scope="write")[1])
    client = service()
    for _ in range(3):
        assert client.post("/write", json={"collection": "a"}, headers=bound).json() == ["a"]
        assert client.post("/write", json={"collection": "b"}, headers=free).json() == ["a", "b"]


@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": "Bearer"}, {"Authorization": "Bearer "}, {"Authorization": "Basic {key}"},
     {"Authorization": "{key}"}, {"X-API-Key": ""}, {"X-API-Key": "{key} "[:-2]}, {"X-API-Key": "ds_" + "A" * 43},
     {"Authorization": "Bearer {key}{key}"}, {"Cookie": "key={key}"}],
    ids=repr,
)  # fmt: skip
def test_what_is_no_valid_key_is_refused(service: Service, keys: ApiKeys, headers: dict[str, str]) -> None:
    _, key = keys.add("a", scope="admin")
    given = {name: value.replace("{key}", key) for name, value in headers.items()}
    assert refused(service().get("/read", headers=given), 401, "key_refused")
    assert refused(service().get(f"/read?api_key={key}&key={key}"), 401, "key_refused")


def test_a_revoked_key_ends_within_seconds(service: Service, keys: ApiKeys, clock: Clock) -> None:
    known, key = keys.add("a", scope="read")
    client = service()
    assert client.get("/read", headers=bearer(key)).status_code == 200
    keys.revoke(known.id)
    clock.now += CACHE_S
    assert client.get("/read", headers=bearer(key)).status_code == 401


def test_not_every_request_reads_the_catalog(
    service: Service, keys: ApiKeys, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, key = keys.add("a", scope="read")
    reads, listed = [], keys.listed

    def count() -> list[ApiKey]:
        reads.append(1)
        return listed()

    monkeypatch.setattr(keys, "listed", count)
    client = service()
    for _ in range(10):
        client.get("/read", headers=bearer(key))
        client.get("/read", headers=bearer("ds_wrong"))
        clock.now += 0.5
    assert 2 <= len(reads) <= 4


def test_last_uses_are_recorded_in_the_end(service: Service, keys: ApiKeys) -> None:
    _, key = keys.add("used", scope="read")
    keys.add("unused", scope="read")
    before = datetime.now(UTC)
    client = service()
    client.get("/read", headers=bearer(key))
    client.app.state.access.close()  # type: ignore[attr-defined]
    used, unused = keys.listed()
    assert used.last_used_at is not None
    assert used.last_used_at >= before
    assert unused.last_used_at is None


def test_wrong_keys_are_answered_a_few_times_and_right_ones_always(
    service: Service, keys: ApiKeys, clock: Clock
) -> None:
    _, key = keys.add("a", scope="read")
    client = service()
    answers = [client.get("/read", headers=bearer("ds_wrong")) for _ in range(15)]
    assert [answer.status_code for answer in answers] == [401] * 10 + [429] * 5
    assert answers[-1].headers["retry-after"]
    assert client.get("/read", headers=bearer(key)).status_code == 200
    clock.now += 61
    assert client.get("/read", headers=bearer("ds_wrong")).status_code == 401


def test_failures_are_counted_for_each_client_and_network() -> None:
    clock = Clock()
    counts = FailureCounts(2, 60, clock)
    assert [counts.note("192.0.2.1") for _ in range(3)] == [None, None, 60]
    assert counts.note("192.0.2.2") is None
    assert [counts.note(f"2001:db8:1:1::{number}") for number in range(3)] == [None, None, 60]
    assert counts.note("2001:db8:1:2::1") is None
    clock.now += 59.5
    assert counts.note("192.0.2.1") == 1
    clock.now += 1
    assert counts.note("192.0.2.1") is None


def test_very_many_clients_take_no_more_memory() -> None:
    counts = FailureCounts(2, 60, Clock())
    for number in range(FailureCounts._MAX_CLIENTS + 500):
        counts.note(f"client {number}")
    assert len(counts._failed_at) == FailureCounts._MAX_CLIENTS


def test_logs_name_no_key(service: Service, keys: ApiKeys, caplog: pytest.LogCaptureFixture) -> None:
    _, key = keys.add("laptop", scope="read")
    client = service()
    with caplog.at_level(logging.DEBUG):
        client.get("/read", headers=bearer(key))
        client.get("/read", headers=bearer("ds_a-wrong-key-of-somebody"))
    written = "\n".join(str(record.__dict__) for record in caplog.records if record.name.startswith("dino_search"))
    assert "1 laptop" in written
    assert key not in written
    assert "somebody" not in written
