from __future__ import annotations

import base64
import hashlib
import json
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from fastapi_offline import FastAPIOffline

from dino_search.api.json_logs import request_id
from dino_search.api.middleware import API_POLICY, PAGE_POLICY, MiddlewareOptions, add_middleware, docs_policy
from live_servers import serving, talk, waits_until

MAX_BYTES = 10_000
TIMEOUT_S = 0.5


def make_app(**options: Any) -> FastAPI:
    """An app of a few operations behind the middleware."""
    app = FastAPI(openapi_url=None)

    @app.post("/bytes")
    async def count(request: Request) -> dict[str, int]:
        return {"bytes": len(await request.body())}

    @app.post("/json")
    async def echo(value: dict[str, str]) -> dict[str, str]:
        return value

    @app.post("/form")
    async def form(request: Request) -> dict[str, int]:
        async with request.form() as fields:
            return {"fields": len(fields)}

    @app.get("/id")
    async def the_id(request: Request) -> dict[str, str | None]:
        return {"state": request.state.request_id, "context": request_id.get()}

    @app.get("/broken")
    async def broken() -> None:
        raise ZeroDivisionError("secret detail")

    @app.get("/half")
    async def half() -> StreamingResponse:
        async def parts() -> AsyncIterator[bytes]:
            yield b"half"
            raise ZeroDivisionError

        return StreamingResponse(parts())

    @app.get("/status/{status}")
    async def with_status(status: int) -> JSONResponse:
        return JSONResponse({}, status)

    @app.get("/")
    @app.get("/web/a.js")
    @app.get("/docs")
    async def page() -> HTMLResponse:
        return HTMLResponse("page")

    @app.get("/own")
    async def own() -> JSONResponse:
        return JSONResponse({}, headers={"Content-Security-Policy": "sandbox", "Cache-Control": "max-age=60"})

    add_middleware(app, MiddlewareOptions(max_body_bytes=MAX_BYTES, body_timeout_s=TIMEOUT_S, **options))
    return app


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with serving(make_app()) as number:
        yield number


@pytest.fixture
def client(port: int) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
        yield client


def is_problem(answer: httpx.Response, status: int, code: str) -> bool:
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert set(problem) == {"type", "title", "status", "detail", "instance", "request_id"}
    assert problem["request_id"] == answer.headers["x-request-id"]
    return (answer.status_code, problem["status"], problem["type"]) == (status, status, f"/problems/{code}")


# --- request ids


def test_a_sane_request_id_is_kept_and_seen_everywhere(client: httpx.Client) -> None:
    answer = client.get("/id", headers={"X-Request-ID": "from-the-proxy_1.2"})
    assert answer.headers["x-request-id"] == "from-the-proxy_1.2"
    assert answer.json() == {"state": "from-the-proxy_1.2", "context": "from-the-proxy_1.2"}


@pytest.mark.parametrize("given", ["", "a b", "x" * 65, '"}{"', "<script>", "é"])
def test_any_other_request_id_is_replaced(client: httpx.Client, given: str) -> None:
    first, second = (client.get("/id", headers=[(b"X-Request-ID", given.encode("latin-1"))]) for _ in range(2))
    made = first.headers["x-request-id"]
    assert (len(made), int(made, 16) > 0) == (32, True)
    assert made != second.headers["x-request-id"]


# --- headers


@pytest.mark.parametrize(
    ("path", "policy"),
    [("/id", API_POLICY), ("/missing", API_POLICY), ("/broken", API_POLICY), ("/", PAGE_POLICY),
     ("/web/a.js", PAGE_POLICY), ("/docs", docs_policy(b"")), ("/own", "sandbox")],
)  # fmt: skip
def test_every_answer_has_a_content_policy_and_the_other_headers(client: httpx.Client, path: str, policy: str) -> None:
    headers = client.get(path).headers
    assert headers["content-security-policy"] == policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "no-referrer"


def test_pages_of_the_documentation_run_the_scripts_that_are_in_them_and_no_others() -> None:
    app = FastAPIOffline()
    add_middleware(app, MiddlewareOptions())
    with serving(app) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
        answer = client.get("/docs")
        assert client.get("/static-offline-docs/swagger-ui.css").status_code == 200
    inline = answer.text.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
    assert f"script-src 'self' 'sha256-{digest}';" in answer.headers["content-security-policy"]


def test_no_page_may_run_scripts_that_are_written_into_it() -> None:
    assert "unsafe" not in PAGE_POLICY + API_POLICY
    assert API_POLICY.startswith("default-src 'none';")


def test_answers_of_the_api_are_not_stored_unless_they_say_so(client: httpx.Client) -> None:
    assert client.get("/id").headers["cache-control"] == "no-store"
    assert client.get("/own").headers["cache-control"] == "max-age=60"
    assert "cache-control" not in client.get("/").headers


@pytest.mark.parametrize(("status", "header"), [(401, "www-authenticate"), (429, "retry-after"), (503, "retry-after")])
def test_what_http_demands_of_some_answers_is_there(client: httpx.Client, status: int, header: str) -> None:
    assert client.get(f"/status/{status}").headers[header]


# --- other origins


def test_other_origins_may_nothing_unless_told(client: httpx.Client) -> None:
    asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in client.options("/bytes", headers=asked).headers
    assert "access-control-allow-origin" not in client.get("/id", headers=asked).headers


def test_given_origins_and_no_others_may_use_the_api() -> None:
    with serving(make_app(cors_origins=["https://a.example"])) as port, httpx.Client(trust_env=False) as client:
        for origin, allowed in (("https://a.example", "https://a.example"), ("https://b.example", None)):
            asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            for answer in (
                client.options(f"http://127.0.0.1:{port}/bytes", headers=asked),
                client.get(f"http://127.0.0.1:{port}/id", headers={"Origin": origin}),
            ):
                assert answer.headers.get("access-control-allow-origin") == allowed
                assert "access-control-allow-credentials" not in answer.headers


# --- errors


def test_an_unexpected_error_tells_the_log_and_not_the_client(
    client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    answer = client.get("/broken")
    assert is_problem(answer, 500, "internal-error")
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text
    assert "ZeroDivisionError: secret detail" in caplog.text


def test_an_answer_that_breaks_off_is_not_taken_for_a_whole_one(client: httpx.Client) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        client.get("/half")


def test_each_request_is_logged_without_its_query(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    def ours() -> list[logging.LogRecord]:
        # The line of the request before may come only now, as this one's may come after its answer.
        return [record for record in caplog.records if getattr(record, "facts", {}).get("path") == "/status/404"]

    with caplog.at_level(logging.INFO, "dino_search.access"):
        client.get("/status/404?filter=private")
        assert waits_until(lambda: bool(ours()))
    (record,) = ours()
    facts = record.facts  # type: ignore[attr-defined]
    assert (facts["method"], facts["path"], facts["status"], facts["bytes"]) == ("GET", "/status/404", 404, 2)
    assert "private" not in str(record.__dict__)


# --- size of bodies


def in_parts(num_bytes: int) -> Iterator[bytes]:
    """A body whose length is not said beforehand."""
    for begin in range(0, num_bytes, 1000):
        yield b"x" * min(1000, num_bytes - begin)


@pytest.mark.parametrize("make", [lambda size: b"x" * size, in_parts], ids=["length said", "chunked"])
def test_a_body_may_be_as_large_as_the_limit_and_no_larger(client: httpx.Client, make: Callable[[int], Any]) -> None:
    assert client.post("/bytes", content=make(MAX_BYTES)).json() == {"bytes": MAX_BYTES}
    assert is_problem(client.post("/bytes", content=make(MAX_BYTES + 1)), 413, "body-too-large")


def test_too_large_a_body_is_refused_whoever_reads_it(client: httpx.Client) -> None:
    as_json = json.dumps({"a": "x" * MAX_BYTES}).encode()
    parts = (as_json[begin : begin + 1000] for begin in range(0, len(as_json), 1000))
    headers = {"content-type": "application/json"}
    assert is_problem(client.post("/json", content=parts, headers=headers), 413, "body-too-large")
    assert is_problem(client.post("/form", files={"a": b"x" * MAX_BYTES}), 413, "body-too-large")


@pytest.mark.parametrize("is_length_said", [True, False])
def test_a_client_that_sends_on_reads_why_its_body_is_refused(port: int, is_length_said: bool) -> None:
    length = f"Content-Length: {3 * MAX_BYTES}" if is_length_said else "Transfer-Encoding: chunked"
    part = b"x" * 1000 if is_length_said else b"3e8\r\n" + b"x" * 1000 + b"\r\n"
    head = f"POST /bytes HTTP/1.1\r\nHost: a\r\n{length}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        # Beyond as much again as a body may have it is cut off.
        for sent in (head, *[part] * (9 if is_length_said else 18)):
            connection.sendall(sent)  # all of it is taken, although the answer is there already
            time.sleep(0.005)
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_a_body_that_is_too_large_by_its_header_is_not_waited_for(port: int) -> None:
    answer = talk(port, f"POST /bytes HTTP/1.1\r\nHost: a\r\nContent-Length: {10**12}\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 413 ")


# --- slow clients


def test_a_body_that_does_not_arrive_ends_with_a_problem_and_the_connection(port: int) -> None:
    begun = time.monotonic()
    answer = talk(port, b"POST /bytes HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nabc")
    assert TIMEOUT_S * 0.9 < time.monotonic() - begun < TIMEOUT_S + 3
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in answer
    assert b"/problems/request-timeout" in answer


def test_a_body_that_trickles_in_is_given_no_more_time(port: int) -> None:
    head = b"POST /bytes HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n"
    answer = talk(port, head, *[b"-"] * 5, pause_s=TIMEOUT_S / 4)
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_others_are_answered_while_one_is_slow(port: int, client: httpx.Client) -> None:
    slow = [
        threading.Thread(target=talk, args=(port, b"POST /bytes HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n"))
        for _ in range(20)
    ]
    for thread in slow:
        thread.start()
    assert client.post("/bytes", content=b"abc").json() == {"bytes": 3}
    for thread in slow:
        thread.join(10)


def test_an_operation_may_take_longer_than_the_body() -> None:
    app = FastAPI()

    @app.post("/slow")
    async def slow(request: Request) -> dict[str, bool]:
        await request.body()
        time.sleep(TIMEOUT_S * 1.5)
        return {"gone": await request.is_disconnected()}

    add_middleware(app, MiddlewareOptions(body_timeout_s=TIMEOUT_S))
    with serving(app) as port, httpx.Client(trust_env=False) as client:
        assert client.post(f"http://127.0.0.1:{port}/slow", content=b"a").json() == {"gone": False}
