"""`POST /copies`, `POST /compare`, `GET /duplicates`, verdicts: as the commands answer."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest

from commands_in_process import Command
from dino_search import copy_runs
from dino_search.api import copying, duplicating
from dino_search.copies import CopyFinder
from running_service import RunningService, is_problem
from sample_collections import jpeg


def printed(dino_search: Command, service: RunningService, *arguments: str | Path) -> Any:
    return dino_search(*arguments, "--home", service.engine.settings.home, "--json").json()


def test_copies_answers_what_the_command_prints(
    service: RunningService, dino_search: Command, new_picture: Path
) -> None:
    fields = {"copy_score": "0.9", "k": "3", "variants": "mirror"}
    answer = service.http.post("/copies", files={"image": (str(new_picture), new_picture.read_bytes())}, data=fields)
    expected = printed(
        dino_search, service, "copies", new_picture, "--copy-score", "0.9", "-k", "3", "--variants", "mirror"
    )
    assert answer.status_code == 200
    assert answer.json() == expected


def test_an_image_of_the_collection_is_a_copy_of_itself(service: RunningService) -> None:
    found = service.http.post("/copies", json={"image_id": 3, "copy_score": 0.9}).json()["queries"][0]["matches"]
    assert (found[0]["image_id"], found[0]["decision"], found[0]["reason"]) == (3, "copy", "identical")
    above = {"image_id": 3, "copy_score": 0.9, "min_score": found[0]["score"]}
    listed = service.http.post("/copies", json=above).json()["queries"][0]["matches"]
    assert [match["image_id"] for match in listed] == [3]


def test_compare_answers_what_the_command_prints(
    service: RunningService, dino_search: Command, new_picture: Path, shared_photos: Path
) -> None:
    other = shared_photos / "dog" / "2.jpg"
    files = {"a": (str(new_picture), new_picture.read_bytes()), "b": (str(other), other.read_bytes())}
    answer = service.http.post("/compare", files=files, data={"copy_score": "0.9"})
    assert answer.json() == printed(dino_search, service, "compare", new_picture, other, "--copy-score", "0.9")


def test_compare_takes_images_by_id_and_no_vectors(service: RunningService) -> None:
    same = service.http.post("/compare", json={"a": {"image_id": 1}, "b": {"image_id": 1}, "copy_score": 0.9}).json()
    assert (same["decision"], same["reason"]) == ("copy", "identical")
    sent = {"a": {"image_id": 1}, "b": {"embedding": [1.0] * 64}, "copy_score": 0.9}
    assert is_problem(service.http.post("/compare", json=sent), 422, "request-invalid")
    assert is_problem(service.http.post("/compare", json={"a": {"image_id": 1}}), 422, "request-invalid")


def test_a_model_without_a_calibration_and_few_images_is_a_problem(service: RunningService) -> None:
    assert is_problem(service.http.post("/copies", json={"image_id": 1}), 409, "calibration-impossible")


def test_what_was_prepared_for_an_earlier_state_is_freed_at_once(
    own_service: RunningService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vectors of whole collections must not wait for the collector of circles, which comes round every few minutes."""
    finders: list[weakref.ref[CopyFinder]] = []

    class Watched(CopyFinder):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            finders.append(weakref.ref(self))

    monkeypatch.setattr(copying, "CopyFinder", Watched)
    asked = {"image_id": 1, "copy_score": 0.9}
    gc.disable()
    try:
        for number in range(3):
            assert own_service.http.post("/copies", json=asked).json()["queries"][0]["matches"]
            new = {"image": (f"{number}.jpg", jpeg(200 + number))}
            assert own_service.http.post("/collections/default/images", files=new).status_code == 201
        assert len(finders) == 3
        assert [finder() is None for finder in finders[:2]] == [True, True]
    finally:
        gc.enable()


def test_duplicates_are_what_the_command_prints_in_pages(
    own_service: RunningService, photos: Path, dino_search: Command
) -> None:
    for number in range(3):
        (photos / f"again-{number}.jpg").write_bytes((photos / "cat" / f"{number}.jpg").read_bytes())
    dino_search("index", photos, "--home", own_service.engine.settings.home)
    expected = printed(dino_search, own_service, "duplicates", "--copy-score", "1", "--unchecked")
    asked = {"copy_score": 1, "unchecked": True, "limit": 2}
    first = own_service.http.get("/duplicates", params=asked).json()
    second = own_service.http.get("/duplicates", params=asked | {"cursor": first["next_cursor"]}).json()
    assert (first["num_groups"], len(first["groups"]), second["next_cursor"]) == (3, 2, None)
    assert first["groups"] + second["groups"] == expected["groups"]
    assert {key: first[key] for key in expected if key != "groups"} == {
        key: value for key, value in expected.items() if key != "groups"
    }


def test_duplicates_are_found_once_for_each_state(
    own_service: RunningService, photos: Path, dino_search: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    inner = copy_runs.duplicates_in

    def counted(*arguments: Any, **options: Any) -> Any:
        found.append(1)
        return inner(*arguments, **options)

    monkeypatch.setattr(duplicating, "duplicates_in", counted)
    asked = {"copy_score": 0.9, "unchecked": True}
    for _ in range(2):
        own_service.http.get("/duplicates", params=asked)
    assert len(found) == 1
    own_service.http.put("/verdicts", json={"verdicts": [{"decision": "copy", "query_id": 1, "reference_id": 2}]})
    own_service.http.get("/duplicates", params=asked)
    assert len(found) == 2
    (photos / "new.jpg").write_bytes(jpeg(50))
    dino_search("index", photos, "--home", own_service.engine.settings.home)
    assert own_service.http.get("/duplicates", params=asked).json()["images"] == 9
    assert len(found) == 3


def test_verdicts_decide_and_are_listed(own_service: RunningService, dino_search: Command) -> None:
    http = own_service.http
    sent = {"verdicts": [{"decision": "not_copy", "query_id": 1, "reference_id": 2, "note": "two cats"}]}
    assert http.put("/verdicts", json=sent).json() == {"added": 1, "changed": 0, "unchanged": 0}
    assert http.put("/verdicts", json=sent).json() == {"added": 0, "changed": 0, "unchanged": 1}
    listed = http.get("/verdicts").json()
    assert listed["verdicts"] == printed(dino_search, own_service, "verdicts", "list")["verdicts"]
    compared = http.post("/compare", json={"a": {"image_id": 2}, "b": {"image_id": 1}, "copy_score": 0.1}).json()
    assert (compared["decision"], compared["verdict"]) == ("different", "not_copy")


def test_verdicts_come_in_pages(own_service: RunningService) -> None:
    pairs = [{"decision": "copy", "query_id": 1, "reference_id": other} for other in (2, 3, 4)]
    own_service.http.put("/verdicts", json={"verdicts": pairs})
    first = own_service.http.get("/verdicts", params={"limit": 2}).json()
    second = own_service.http.get("/verdicts", params={"limit": 2, "cursor": first["next_cursor"]}).json()
    assert [len(first["verdicts"]), len(second["verdicts"]), second["next_cursor"]] == [2, 1, None]


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        ({"query_id": 1}, (422, "request-invalid")),
        ({"query_id": 1, "query_sha256": "00" * 32, "reference_id": 2}, (422, "request-invalid")),
        ({"query_id": 1, "reference_id": 1}, (422, "request-invalid")),
        ({"query_id": 1, "reference_id": 99}, (404, "image-not-found")),
        ({"query_id": 1, "reference_sha256": "00"}, (422, "request-invalid")),
    ],
)
def test_a_verdict_on_no_pair_is_a_problem_and_records_nothing(
    service: RunningService, pair: dict[str, Any], expected: tuple[int, str]
) -> None:
    good = {"decision": "copy", "query_id": 1, "reference_id": 2}
    answer = service.http.put("/verdicts", json={"verdicts": [good, pair | {"decision": "copy"}]})
    assert is_problem(answer, *expected)
    assert service.http.get("/verdicts").json()["verdicts"] == []
