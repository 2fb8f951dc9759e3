"""Every bad file of the index's tests, sent to every operation that takes a picture: a problem, and never a failure."""

from __future__ import annotations

from pathlib import Path

import pytest

from bad_files import make_bad_files
from dino_search.api.problems import STATUS_BY_IMAGE_REASON
from running_service import RunningService, is_problem

_OPERATIONS = {
    "/search": "image", "/search/batch": "image", "/classify": "image", "/copies": "image", "/embed": "image",
    "/attention": "image", "/compare": "a", "/collections/default/images": "image",
}  # fmt: skip


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, str]:
    folder = tmp_path_factory.mktemp("bad")
    return {folder / name: reason for name, reason in make_bad_files(folder).items() if (folder / name).is_file()}


@pytest.mark.parametrize("operation", _OPERATIONS)
def test_a_bad_file_is_a_problem_with_its_reason(
    service: RunningService, bad_files: dict[Path, str], shared_photos: Path, operation: str
) -> None:
    wrong = []
    for path, reason in bad_files.items():
        files = {_OPERATIONS[operation]: (path.name, path.read_bytes())}
        if operation == "/compare":
            files["b"] = ("good.jpg", (shared_photos / "cat" / "0.jpg").read_bytes())
        answer = service.http.post(operation, files=files)
        if not is_problem(answer, STATUS_BY_IMAGE_REASON[reason], f"image-{reason.replace('_', '-')}"):
            wrong.append((path.name, reason, answer.status_code, answer.text[:200]))
    assert not wrong
    assert len(bad_files) > 20


def test_no_operation_with_a_picture_is_left_out(service: RunningService) -> None:
    """Of jobs, which look at pictures later, test_every_operation.py has a test."""
    paths = service.http.get("/openapi.json").json()["paths"]
    with_files = {
        path.format(collection="default")
        for path, operations in paths.items()
        for operation in operations.values()
        if "multipart/form-data" in operation.get("requestBody", {}).get("content", {})
    }
    assert with_files == {*_OPERATIONS, "/jobs"}
