"""Errors as problems: each has a status and a type, and nothing else leaves the service."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dino_index.errors import DinoSearchError, ImageError
from dino_search.api.problems import STATUS_BY_CODE, STATUS_BY_IMAGE_REASON
from running_service import RunningService, is_problem

_STATUSES = {400, 401, 403, 404, 409, 413, 415, 422, 429, 500, 503}


def errors(root: type[DinoSearchError] = DinoSearchError) -> Iterator[type[DinoSearchError]]:
    yield root
    for subclass in root.__subclasses__():
        yield from errors(subclass)


def test_every_error_has_a_status_and_every_status_an_error() -> None:
    assert {error.code for error in errors()} == STATUS_BY_CODE.keys()
    assert ImageError.REASONS.keys() == STATUS_BY_IMAGE_REASON.keys()
    assert {*STATUS_BY_CODE.values(), *STATUS_BY_IMAGE_REASON.values()} <= _STATUSES


def test_an_unexpected_failure_tells_nothing_about_the_program(
    service: RunningService, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("a secret of the program")

    monkeypatch.setattr(service.engine, "check_k", fail)
    answer = service.http.post("/search", json={"image_id": 1})
    assert is_problem(answer, 500, "internal")
    assert "secret" not in answer.text
    assert service.http.get("/livez").status_code == 200


def test_every_operation_documents_its_problems(service: RunningService) -> None:
    document = service.http.get("/openapi.json").json()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            documented = {
                status for status, answer in operation["responses"].items()
                if "application/problem+json" in answer.get("content", {})
            }  # fmt: skip
            wanted = {"/livez": set(), "/metrics": set(), "/readyz": {"503"}}.get(path, {"422", "429", "500", "503"})
            assert wanted <= documented, (method, path)
            assert "HTTPValidationError" not in str(operation), (method, path)


def test_the_documentation_needs_no_other_server(service: RunningService) -> None:
    page = service.http.get("/docs").text
    assert "//cdn" not in page
    for link in ("swagger-ui.css", "swagger-ui-bundle.js"):
        assert f"/static-offline-docs/{link}" in page
        assert service.http.get(f"/static-offline-docs/{link}").status_code == 200
