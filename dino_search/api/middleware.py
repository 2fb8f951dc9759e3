"""What every request passes through before an operation sees it, as pure ASGI so that bodies are never gathered here.

From the outside in: request id; security headers; CORS, where it is on; log line and unexpected errors; limits of size
and time of the body. `add_middleware` puts them around an app.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from uuid import uuid4

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dino_search.api.json_logs import request_id

logger = logging.getLogger(__name__)
access_logger = logging.getLogger("dino_search.access")

REQUEST_ID_HEADER = "X-Request-ID"
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

API_POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
# Nothing from elsewhere, and no script or style that stands in the page itself.
PAGE_POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)
# The pages of the API's documentation begin with a script that is written into them: it is named by its hash. What they
# load writes styles into the page.
DOCS_POLICY = (
    "default-src 'self'; script-src 'self'{hashes}; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'none'; frame-ancestors 'none'"
)
_INLINE_SCRIPT = re.compile(rb"<script>(.*?)</script>", re.DOTALL)
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}

_TITLES = {
    408: ("request-timeout", "The request did not arrive in time"),
    413: ("body-too-large", "The request's body is too large"),
    500: ("internal-error", "Something went wrong in the service"),
}


@dataclass(frozen=True, kw_only=True)
class MiddlewareOptions:
    """Limits and headers. cors_origins: pages of these origins may use the API; none by default."""

    max_body_bytes: int = 64 * 1024 * 1024
    body_timeout_s: float = 20.0
    """From the first byte of the body that is asked for to the last."""
    cors_origins: Sequence[str] = ()
    page_paths: Sequence[str] = ("/web/",)
    """What lies below has the page's policy, as has `/`."""
    docs_paths: Sequence[str] = ("/docs", "/redoc", "/static-offline-docs/")


def add_middleware(app: Starlette, options: MiddlewareOptions) -> None:
    """Puts all of it around the app, in order."""
    # The one that is added last is the outermost.
    app.add_middleware(BodyLimits, max_body_bytes=options.max_body_bytes, body_timeout_s=options.body_timeout_s)
    app.add_middleware(AccessLog)
    if options.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(options.cors_origins),
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "X-API-Key", REQUEST_ID_HEADER],
            expose_headers=[REQUEST_ID_HEADER, "Retry-After"],
        )
    app.add_middleware(SecurityHeaders, page_paths=options.page_paths, docs_paths=options.docs_paths)
    app.add_middleware(RequestIds)


class RequestIds:
    """Gives each request an id, its own where that is sane: in `scope["state"]`, the logs and the answer's header."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        chosen = given if _SANE_ID.fullmatch(given) else uuid4().hex
        scope.setdefault("state", {})["request_id"] = chosen
        token = request_id.set(chosen)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = chosen
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            request_id.reset(token)


class AccessLog:
    """A line a request, without its query; and an answer without details where an operation failed unexpectedly."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status, num_bytes = time.perf_counter(), 0, 0

        async def send_counted(message: Message) -> None:
            nonlocal status, num_bytes
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body":
                num_bytes += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, send_counted)
        except Exception:
            logger.exception("an operation failed unexpectedly")
            if status:
                raise  # the server ends the connection, so that nobody takes the answer for a whole one
            detail = "the service's log says what, under this request id"
            await send_problem(scope, send_counted, 500, detail)
        finally:
            client = scope.get("client")
            facts = {
                "method": scope["method"], "path": scope["path"], "status": status or 499, "bytes": num_bytes,
                "ms": round(1000 * (time.perf_counter() - begun), 1), "client": client[0] if client else None,
            }  # fmt: skip
            if (key := scope.get("state", {}).get("api_key")) is not None:
                facts["key"] = f"{key.id} {key.name}"
            access_logger.info("%s %s %s", scope["method"], scope["path"], status or 499, extra={"facts": facts})


class SecurityHeaders:
    """Headers that browsers keep to, and those that HTTP demands of 401, 429 and 503. What is there already stays."""

    def __init__(self, app: ASGIApp, *, page_paths: Sequence[str], docs_paths: Sequence[str]) -> None:
        self._app = app
        self._page_paths = tuple(page_paths)
        self._docs_paths = tuple(docs_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_page = scope["path"] == "/" or scope["path"].startswith(self._page_paths)
        is_docs = scope["path"].startswith(self._docs_paths)
        policy = PAGE_POLICY if is_page else API_POLICY
        held: Message | None = None

        async def send_with_headers(message: Message) -> None:
            nonlocal held
            if is_docs and message["type"] == "http.response.start":
                held = message  # until its body is known
                return
            if held is not None:
                MutableHeaders(scope=held).setdefault("Content-Security-Policy", docs_policy(message.get("body", b"")))
                begin, held = held, None
                await send_begin(begin)
                await send(message)
                return
            await send_begin(message)

        async def send_begin(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.setdefault("Content-Security-Policy", policy)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                if not (is_page or is_docs):
                    headers.setdefault("Cache-Control", "no-store")
                if message["status"] == 401:
                    headers.setdefault("WWW-Authenticate", 'Bearer realm="dino-search"')
                if message["status"] in (429, 503):
                    headers.setdefault("Retry-After", "1")
            await send(message)

        await self._app(scope, receive, send_with_headers)


def docs_policy(page: bytes) -> str:
    """The policy under which the scripts in a page of the documentation run, and no others."""
    digests = (hashlib.sha256(script).digest() for script in _INLINE_SCRIPT.findall(page))
    return DOCS_POLICY.format(hashes="".join(f" 'sha256-{base64.b64encode(digest).decode()}'" for digest in digests))


class BodyLimits:
    """Refuses bodies that are larger, or take longer, than they may: 413 and 408.

    The size is looked at before anything is read where the client says it, and while reading in any case. An operation
    that is reading sees the client as gone; whatever it answers then, ours is sent in its place.
    """

    def __init__(self, app: ASGIApp, *, max_body_bytes: int, body_timeout_s: float) -> None:
        self._app = app
        self._max_bytes = max_body_bytes
        self._timeout_s = body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        said = Headers(scope=scope).get("Content-Length", "")
        if said.isascii() and said.isdigit() and int(said[:20]) > self._max_bytes:
            await self._refuse_size(scope, receive, send)
            return
        refusal = 0
        has_answered = is_complete = False
        num_bytes = 0
        deadline: float | None = None

        async def receive_limited() -> Message:
            nonlocal refusal, is_complete, num_bytes, deadline
            if refusal:
                return {"type": "http.disconnect"}
            if is_complete:
                return await receive()
            loop = asyncio.get_running_loop()
            deadline = deadline or loop.time() + self._timeout_s
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                refusal = 408
                return {"type": "http.disconnect"}
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                refusal = 413
                return {"type": "http.disconnect"}
            is_complete = not message.get("more_body", False)
            return message

        async def send_unless_refused(message: Message) -> None:
            nonlocal has_answered
            if not refusal:
                has_answered |= message["type"] == "http.response.start"
                await send(message)

        try:
            await self._app(scope, receive_limited, send_unless_refused)
        except Exception:
            if not refusal or has_answered:
                raise
        if refusal and not has_answered:
            if refusal == 413:
                await self._refuse_size(scope, receive, send)
            else:
                # What is left of the body would be taken for the next request.
                detail = f"expected the whole body within {self._timeout_s:g} s"
                await send_problem(scope, send, 408, detail, close=True)

    async def _refuse_size(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers at once, and closes the connection when the client has stopped sending, within bounds.

        If it were closed before, the client's system would throw the answer away with what can no longer be sent.
        """
        detail = f"expected a body of at most {self._max_bytes} bytes, found more"
        await send_problem(scope, send, 413, detail, close=True, is_end=False)
        # A client that asks before it sends has its answer.
        if "expect" not in Headers(scope=scope):
            with suppress(TimeoutError):
                async with asyncio.timeout(self._timeout_s):
                    num_bytes = 0
                    while num_bytes <= self._max_bytes:
                        message = await receive()
                        num_bytes += len(message.get("body", b""))
                        if not message.get("more_body", False):
                            break
        await send({"type": "http.response.body"})


async def send_problem(
    scope: Scope, send: Send, status: int, detail: str, *, close: bool = False, is_end: bool = True
) -> None:
    """Answers with a problem (RFC 9457) that arose before any operation, or outside of what one expects.

    close: the connection ends with the answer; is_end: which is now.
    """
    code, title = _TITLES[status]
    problem = {
        "type": f"/problems/{code}", "title": title, "status": status, "detail": detail, "instance": scope["path"],
        "request_id": scope.get("state", {}).get("request_id"),
    }  # fmt: skip
    body = json.dumps(problem).encode()
    headers = [(b"content-type", b"application/problem+json"), (b"content-length", str(len(body)).encode())]
    if close:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": not is_end})
