"""Problems: how errors leave the service, as RFC 9457 `application/problem+json`.

`type` is `/problems/CODE`, CODE being the `code` of the error with `-` for `_`; of an image it is `image-REASON`. Both
are stable. Every class of DinoSearchError has its status here, once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dino_index.errors import DinoSearchError, ImageError, NotReady

logger = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
_MAX_VALIDATION_PROBLEMS = 8
# Of errors that tell when to try again, and of all others that pass by themselves.
_RETRY_AFTER_S = 5
_FAILED = "the service failed; its log says why, under the request id"

STATUS_BY_CODE: dict[str, int] = {
    "error": 500,
    "image": 422,  # by reason, see below
    "model": 503, "model_not_found": 503, "architecture_unknown": 503, "weights_mismatch": 503,
    "checkpoint_refused": 503, "hub_unavailable": 503, "fingerprint_mismatch": 409, "out_of_memory": 503,
    "attention_unavailable": 409, "model_not_named": 409,
    "catalog": 503, "catalog_unavailable": 503, "catalog_damaged": 503, "database_away": 503, "catalog_too_new": 503,
    "catalog_not_empty": 409, "backup_unusable": 422, "storage_full": 503,
    "vector_store": 503, "vector_store_unavailable": 503,
    "collection": 422, "collection_not_found": 404, "verdict_not_found": 404, "collection_empty": 409,
    "collection_exists": 409, "reindex_refused": 409, "no_labels": 409, "image_not_found": 404,
    "index_type_invalid": 422, "too_little_memory": 503,
    "source": 422, "source_not_found": 404, "no_images_found": 422, "prune_refused": 409, "manifest": 422,
    "set_file_unusable": 422, "backend_missing": 422, "relocation_refused": 409,
    "cluster": 500, "ray_missing": 500, "cluster_unreachable": 500, "cluster_too_small": 500, "cluster_lost": 500,
    "node_unfit": 500,
    "filter": 422,
    "recipe": 500, "run": 500, "run_exists": 500, "run_not_found": 500, "too_few_images": 500,
    "training_diverged": 500,
    "evaluation": 500, "truth_unusable": 500, "evaluation_impossible": 500,
    "exchange": 422, "not_an_export": 422, "export_too_new": 422, "export_incomplete": 422, "export_damaged": 422,
    "calibration_impossible": 409,
    "action": 409, "action_unsupported": 409, "action_log_unusable": 409,
    "access": 403, "key_refused": 401, "scope_missing": 403, "too_many_attempts": 429, "key_not_found": 404,
    "fetch": 422, "fetch_refused": 403, "fetch_failed": 422,
    "job": 409, "job_not_found": 404, "job_conflict": 409, "folder_refused": 403, "upload_refused": 422,
    "too_many_jobs": 429,
    "service": 500, "settings_invalid": 500, "request_invalid": 422, "media_type_refused": 415, "fetching_off": 403,
    "too_many_requests": 429, "server_full": 503, "request_timed_out": 503, "not_ready": 503,
    "service_unreachable": 500, "service_problem": 500,
    "label_file": 422, "verdict_file": 422, "output_exists": 409, "output_unwritable": 503,
}  # fmt: skip

STATUS_BY_IMAGE_REASON: dict[str, int] = {
    "empty": 422, "truncated": 422, "corrupt": 422,
    "too_large": 413, "too_many_pixels": 413,
    "not_an_image": 415, "unsupported": 415,
    # Of the file of an image in a collection: it cannot be had any more.
    "permission": 404, "unreadable": 404, "vanished": 404, "broken_link": 404, "not_a_file": 404,
}  # fmt: skip


def status_of(error: DinoSearchError) -> int:
    """The HTTP status that an error is answered with."""
    if isinstance(error, ImageError):
        return STATUS_BY_IMAGE_REASON[error.reason]
    return STATUS_BY_CODE[error.code]


def code_of(error: DinoSearchError) -> str:
    """What stands behind `/problems/` in the problem's `type`."""
    code = f"image_{error.reason}" if isinstance(error, ImageError) else error.code
    return code.replace("_", "-")


def problem(
    request: Request,
    status: int,
    code: str,
    detail: str,
    *,
    headers: Mapping[str, str] | None = None,
    **members: Any,
) -> JSONResponse:
    """A problem as the answer to a request. members: further ones, such as `reasons`."""
    engine = getattr(request.app.state, "engine", None)
    if engine is not None:
        engine.metrics.failures.labels(code).inc()
    content = {
        "type": f"/problems/{code}",
        "title": code.replace("-", " ").capitalize(),
        "status": status,
        "detail": detail,
        "instance": request.url.path,
        "request_id": getattr(request.state, "request_id", None),
    }
    return JSONResponse(content | members, status_code=status, headers=dict(headers or {}), media_type=MEDIA_TYPE)


def problem_of(request: Request, error: DinoSearchError) -> JSONResponse:
    """The answer to a request that ended with an error."""
    status = status_of(error)
    headers = {}
    if status in (429, 503):
        headers["Retry-After"] = str(math.ceil(getattr(error, "retry_after_s", _RETRY_AFTER_S)))
    members = {"reasons": error.reasons} if isinstance(error, NotReady) else {}
    detail = str(error)
    if status == 500:
        logger.error("%s ended with an error that no request should meet", request.url.path, exc_info=error)
        detail = _FAILED
    return problem(request, status, code_of(error), detail, headers=headers, **members)


def add_handlers(app: FastAPI) -> None:
    """Has every error that leaves an operation answered as a problem."""

    async def answer_expected(request: Request, error: Exception) -> Response:
        assert isinstance(error, DinoSearchError)
        return problem_of(request, error)

    async def answer_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return problem(request, 422, "request-invalid", in_words(list(error.errors())))

    async def answer_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        phrase = HTTPStatus(error.status_code).phrase
        code = phrase.lower().replace(" ", "-")
        headers = dict(error.headers or {})
        methods = _methods_of(app, request.url.path) if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED else []
        if methods:
            # The router names those of one route, and several may share a path. Of what is not documented, none do.
            headers = {name: value for name, value in headers.items() if name.lower() != "allow"}
            headers["Allow"] = ", ".join(methods)
        return problem(request, error.status_code, code, str(error.detail), headers=headers)

    app.add_exception_handler(DinoSearchError, answer_expected)
    app.add_exception_handler(RequestValidationError, answer_invalid)
    app.add_exception_handler(HTTPException, answer_http)
    app.add_middleware(UnexpectedErrors)


def _methods_of(app: FastAPI, path: str) -> list[str]:
    """What can be done at a path."""
    return sorted(
        method.upper()
        for template, operations in app.openapi()["paths"].items()
        if compile_path(template)[0].match(path)
        for method in operations
    )


class UnexpectedErrors:
    """ASGI middleware: an error that nobody expected is logged, and answered without a word about the program."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            logger.exception("a request to %s failed", scope.get("path"))
            if started or scope["type"] != "http":
                raise
            await problem(Request(scope), 500, "internal", _FAILED)(scope, receive, send)


def in_words(problems: list[Any]) -> str:
    """What pydantic found wrong, in one line."""
    lines = []
    for found in problems[:_MAX_VALIDATION_PROBLEMS]:
        place = ".".join(str(part) for part in found["loc"] if part not in ("body", "query", "path"))
        lines.append(f"{place}: {found['msg']}" if place else str(found["msg"]))
    if len(problems) > _MAX_VALIDATION_PROBLEMS:
        lines.append(f"and {len(problems) - _MAX_VALIDATION_PROBLEMS} more")
    return "; ".join(lines)


_SCHEMA = {
    "type": "object",
    "required": ["type", "title", "status", "detail", "instance"],
    "properties": {
        "type": {"type": "string", "description": "Stable: `/problems/CODE`."},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string", "description": "What was expected, what was found, what to do."},
        "instance": {"type": "string"},
        "request_id": {"type": ["string", "null"]},
        "reasons": {"type": "array", "items": {"type": "string"}},
    },
}
_MEANINGS = {
    400: "The request cannot be understood.",
    401: "A key is needed, and none that is known was given.",
    403: "The key does not allow this.",
    404: "There is no such collection, image or verdict.",
    405: "There is no such method here.",
    409: "The collection's state does not allow this.",
    413: "The body, or a picture in it, is larger than allowed.",
    415: "The body is no JSON or form, or the picture of no kind that can be read.",
    422: "A field or a picture cannot be used.",
    429: "Too many requests of this client wait already.",
    500: "The service failed.",
    503: "The service is full, starting, ending, or cannot reach its catalog.",
}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The problems that an operation may answer with, for its documentation: those named, and what any may."""
    retry_after = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
    return {
        status: {
            "description": _MEANINGS[status],
            "content": {MEDIA_TYPE: {"schema": _SCHEMA}},
            **({"headers": retry_after} if status in (429, 503) else {}),
        }
        for status in sorted({*statuses, 400, 401, 403, 405, 422, 429, 500, 503})
    }
