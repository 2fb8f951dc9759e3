"""Every operation of the OpenAPI document, asked all sorts of things by schemathesis: it answers as is documented."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import hypothesis
import pytest
import schemathesis
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import CHECKS
from schemathesis.generation import GenerationMode

from running_service import RunningService, running_service
from sample_collections import index_files, jpeg, write_pictures

NUM_EXAMPLES = 10
NUM_SLOW_EXAMPLES = 200
# Left out: that what fits the schema is accepted. Random bytes are no picture, and random texts no filter.
CHECKED = [
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance",
    "response_schema_conformance", "negative_data_rejection", "missing_required_header",
]  # fmt: skip
# What the service has, which chance would not find.
COLLECTION = "default"
KNOWN = {"collection": COLLECTION, "image_id": 1, "query_id": 1, "reference_id": 2, "job_id": 1, "name": "groups.json"}
DESTRUCTIVE = ("delete", "cancel")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[RunningService]:
    """A service with six images, and a job that has left a report."""
    folder = tmp_path_factory.mktemp("conformance")
    write_pictures(folder / "photos", *(f"{name}/{number}.jpg" for name in ("cat", "dog") for number in range(3)))
    index_files(folder / "home", tiny_model, folder / "photos", labels="folders")
    with running_service(folder / "home", index_folders=[folder / "photos"]) as running:
        running.http.post("/jobs", json={"kind": "duplicates", "copy_score": 0.9, "unchecked": True})
        yield running


@pytest.fixture(scope="module")
def operations(service: RunningService) -> list[Any]:
    """All operations, those that take something away last."""
    schema = schemathesis.openapi.from_url(f"{service.url}/openapi.json")
    found = [cast(Any, result).ok() for result in schema.get_all_operations()]
    return sorted(found, key=lambda operation: any(word in operation.label.lower() for word in DESTRUCTIVE))


def asked_of(operation: Any, mode: GenerationMode, num_examples: int, aimed: bool) -> tuple[Counter[int], list[str]]:
    """How often each status was answered, and what was wrong. aimed: at things that the service has."""
    statuses: Counter[int] = Counter()
    wrong: list[str] = []
    checks = CHECKS.get_by_names(CHECKED)

    @hypothesis.settings(
        max_examples=num_examples,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        if aimed:
            aim(case)
        answer = case.call()
        statuses[answer.status_code] += 1
        try:
            case.validate_response(answer, checks=checks)
        except Exception as failure:
            wrong.append(f"{case.as_curl_command()}\n-> {answer.status_code} {answer.content[:500]!r}\n{failure}")

    try:
        ask()
    except Unsatisfiable:  # nothing can be wrong with the request of a probe
        assert mode is GenerationMode.NEGATIVE
        assert not operation.body
    return statuses, wrong


def aim(case: Any) -> None:
    """Has a request name what is there, and ask about a picture."""
    for part in (case.path_parameters, case.query, case.body):
        if isinstance(part, dict):
            part.update({name: KNOWN[name] for name in KNOWN if name in part})
            if isinstance(part.get("filter"), list):
                part["filter"] = ["id >= 1"]
    if isinstance(case.body, dict) and "image" in case.body:
        case.body["image"] = [jpeg(1)] if isinstance(case.body["image"], list) else jpeg(1)


def asked_of_all(operations: list[Any], num_examples: int) -> tuple[dict[str, Counter[int]], list[str]]:
    statuses: dict[str, Counter[int]] = {}
    wrong = []
    for operation in operations:
        for mode, aimed in ((GenerationMode.POSITIVE, False), (GenerationMode.POSITIVE, True),
                            (GenerationMode.NEGATIVE, False)):  # fmt: skip
            counts, failures = asked_of(operation, mode, num_examples, aimed)
            statuses.setdefault(operation.label, Counter()).update(counts)
            wrong += failures
    return statuses, wrong


def test_every_operation_answers_as_documented(operations: list[Any]) -> None:
    statuses, wrong = asked_of_all(operations, NUM_EXAMPLES)
    assert not wrong, "\n\n".join(wrong)
    assert len(statuses) == len(operations) >= 29
    # It was not all refused at the door.
    fine = {label for label, counts in statuses.items() if any(status < 300 for status in counts)}
    assert len(fine) > 20, statuses


@pytest.mark.slow
def test_every_operation_answers_as_documented_for_long(operations: list[Any]) -> None:
    _, wrong = asked_of_all(operations, NUM_SLOW_EXAMPLES)
    assert not wrong, "\n\n".join(wrong)


def test_the_document_says_who_needs_a_key(service: RunningService) -> None:
    document = service.http.get("/openapi.json").json()
    schemes = document["components"]["securitySchemes"]
    bearer, header = schemes["HTTPBearer"], schemes["APIKeyHeader"]
    assert (bearer["type"], bearer["scheme"]) == ("http", "bearer")
    assert (header["type"], header["in"], header["name"]) == ("apiKey", "header", "X-API-Key")
    open_to_all = {
        path for path, operations in document["paths"].items()
        for operation in operations.values() if "security" not in operation
    }  # fmt: skip
    assert open_to_all == {"/livez", "/readyz", "/metrics"}


def test_the_document_has_the_api_and_not_the_page(service: RunningService) -> None:
    paths = set(service.http.get("/openapi.json").json()["paths"])
    assert {"/search", "/jobs", "/jobs/{job_id}/files/{name}"} <= paths
    assert not {path for path in paths if path == "/" or path.startswith(("/web", "/docs", "/static", "/openapi"))}
