from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import suppress

import httpx
import pytest
from fastapi import FastAPI, Request

from dino_search.api.connections import timed_connections
from live_servers import serving, talk

WAIT_S = 0.4
HEAD = b"POST /slow HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\n"


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    app = FastAPI()

    @app.get("/quick")
    @app.post("/unread")
    async def quick() -> str:
        return "done"

    @app.post("/slow")
    def slow() -> str:
        time.sleep(3 * WAIT_S)
        return "done"

    @app.post("/read")
    async def read(request: Request) -> int:
        return len(await request.body())

    with serving(app, http=timed_connections(WAIT_S)) as number:
        yield number


@pytest.mark.parametrize(
    "parts",
    [[], [b"GET /qui"], [b"GET /quick HTTP/1.1\r\nHost: a\r\n"], [b"GET /quick HTTP/1.1\r\n", *[b"X-A: a\r\n"] * 6]],
    ids=["nothing", "half a line", "half a head", "a head that trickles in"],
)
def test_a_connection_without_a_request_is_closed(port: int, parts: list[bytes]) -> None:
    begun = time.monotonic()
    with suppress(OSError):  # closed while we were sending
        assert talk(port, *parts, pause_s=WAIT_S / 4) == b""
    assert WAIT_S * 0.9 < time.monotonic() - begun < WAIT_S + 2


def test_a_connection_without_a_further_request_is_closed(port: int) -> None:
    request = b"GET /quick HTTP/1.1\r\nHost: a\r\n\r\n"
    answer = talk(port, request, request, b"GET /qui", pause_s=WAIT_S / 2)
    assert answer.count(b"200 OK") == 2


def test_an_idle_connection_is_kept_between_requests(port: int) -> None:
    request = b"GET /quick HTTP/1.1\r\nHost: a\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        for _ in range(3):
            connection.sendall(request)
            answer = b""
            while not answer.endswith(b'"done"'):
                answer += (part := connection.recv(10_000))
                assert part, "closed"
            time.sleep(2.5 * WAIT_S)
        connection.sendall(request[:8])
        begun = time.monotonic()
        assert connection.recv(10_000) == b""
    assert WAIT_S * 0.9 < time.monotonic() - begun < WAIT_S + 2


def test_a_body_that_nobody_reads_keeps_no_connection(port: int) -> None:
    head = b"POST /unread HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n"
    begun = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(head)
        with suppress(OSError):
            for _ in range(20):
                connection.sendall(b"x")
                time.sleep(WAIT_S / 4)
        assert time.monotonic() - begun < WAIT_S * 4


def test_an_answer_may_take_longer(port: int) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
        assert client.post("/slow", content=b"abc").json() == "done"
        assert client.get("/quick").json() == "done"


def test_a_client_that_goes_on_asking_is_kept(port: int) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
        streams = set()
        for _ in range(8):
            answer = client.post("/read", content=b"abc")
            streams.add(answer.extensions["network_stream"].get_extra_info("client_addr"))
            time.sleep(WAIT_S / 4)
    assert len(streams) == 1


def test_requests_that_are_sent_together_are_all_answered(port: int) -> None:
    assert talk(port, (HEAD + b"abc") * 2).count(b"200 OK") == 2
