"""`POST /search`, `/search/batch`, `/classify`, `/embed` and `/attention`: what they answer, as the commands do."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bad_files import encoded, picture
from dino_search import Collection
from running_service import RunningService, is_problem


def as_file(path: Path) -> dict[str, Any]:
    return {"image": (path.name, path.read_bytes())}


def of_collection(service: RunningService) -> Collection:
    return Collection.open(home=service.engine.settings.home)


def test_search_by_form_answers_what_the_command_prints(service: RunningService, new_picture: Path) -> None:
    answer = service.http.post("/search", files=as_file(new_picture), data={"k": "3"})
    with of_collection(service) as collection:
        expected = collection.search(new_picture, k=3).to_json()
    assert answer.status_code == 200
    assert answer.json() == expected | {"query": new_picture.name}


@pytest.mark.parametrize("as_uri", [False, True])
def test_search_by_base64_answers_as_by_form(service: RunningService, new_picture: Path, as_uri: bool) -> None:
    text = base64.b64encode(new_picture.read_bytes()).decode()
    sent = {"image_base64": f"data:image/jpeg;base64,{text}" if as_uri else text, "k": 3}
    by_form = service.http.post("/search", files=as_file(new_picture), data={"k": 3}).json()
    assert service.http.post("/search", json=sent).json()["results"] == by_form["results"]


def test_search_by_image_id_finds_the_image_itself_first(service: RunningService) -> None:
    found = service.http.post("/search", json={"image_id": 5, "k": 2}).json()["results"]
    assert [found[0]["image_id"], found[0]["score"], len(found)] == [5, 1.0, 2]


def test_a_vector_that_embed_gave_searches_like_its_picture(service: RunningService, new_picture: Path) -> None:
    embedded = service.http.post("/embed", files=as_file(new_picture)).json()
    assert len(embedded["embedding"]) == embedded["dim"] == 64
    assert np.linalg.norm(embedded["embedding"]) == pytest.approx(1, abs=1e-6)
    scaled = [1000 * value for value in embedded["embedding"]]
    by_vector = service.http.post("/search", json={"embedding": scaled}).json()["results"]
    by_picture = service.http.post("/search", files=as_file(new_picture)).json()["results"]
    assert [each["image_id"] for each in by_vector] == [each["image_id"] for each in by_picture]
    assert [each["score"] for each in by_vector] == pytest.approx([each["score"] for each in by_picture], abs=2e-6)


def test_filters_and_lowest_score_leave_results_out(service: RunningService) -> None:
    cats = service.http.post("/search", json={"image_id": 5, "filter": ["label = cat", "width >= 1"]}).json()["results"]
    assert [each["label"] for each in cats] == ["cat"] * 4
    best = service.http.post("/search", json={"image_id": 5, "min_score": 1.0}).json()["results"]
    assert [each["image_id"] for each in best] == [5]


def test_a_form_may_have_several_filters(service: RunningService, new_picture: Path) -> None:
    fields = {"filter": ["label = dog", "id <= 6"]}
    found = service.http.post("/search", files=as_file(new_picture), data=fields).json()["results"]
    assert sorted(each["image_id"] for each in found) == [5, 6]


def test_a_batch_answers_for_each_picture_and_says_which_one_is_none(
    service: RunningService, shared_photos: Path
) -> None:
    good = shared_photos / "cat" / "1.jpg"
    files = [("image", ("one.jpg", good.read_bytes())), ("image", ("two.txt", b"words"))]
    answer = service.http.post("/search/batch", files=files, data={"k": 1})
    first, second = answer.json()["queries"]
    alone = service.http.post("/search", files={"image": ("one.jpg", good.read_bytes())}, data={"k": 1}).json()
    assert (answer.status_code, first) == (200, alone | {"status": "ok", "reason": ""})
    assert (second["query"], second["status"], second["results"]) == ("two.txt", "failed", [])
    assert "no known image format" in second["reason"]


def test_a_batch_without_a_usable_picture_is_a_problem(service: RunningService) -> None:
    sent = {"queries": [{"image_id": 99}, {"image_id": 98}]}
    assert is_problem(service.http.post("/search/batch", json=sent), 404, "image-not-found")


def test_a_batch_of_more_pictures_than_allowed_is_refused(service: RunningService) -> None:
    answer = service.http.post("/search/batch", json={"queries": [{"image_id": 1}] * 65})
    assert is_problem(answer, 422, "request-invalid")
    files = [("image", ("x.jpg", b"x"))] * 65
    assert is_problem(service.http.post("/search/batch", files=files), 422, "request-invalid")


def test_classify_answers_what_the_command_prints(service: RunningService, new_picture: Path) -> None:
    answer = service.http.post("/classify", files=as_file(new_picture), data={"k": 5, "temperature": 0.1})
    with of_collection(service) as collection:
        expected = collection.classify(new_picture, k=5, temperature=0.1).to_json()
    expected["results"][0]["query"] = new_picture.name
    assert answer.json() == expected


def test_attention_is_drawn_in_the_pictures_shape(service: RunningService) -> None:
    wide = encoded(picture(200, 100, seed=3), "PNG")
    answer = service.http.post("/attention", files={"image": ("wide.png", wide)})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
    assert Image.open(io.BytesIO(answer.content)).size == (200, 100)


def test_attention_maps_have_a_share_for_each_patch(service: RunningService) -> None:
    maps = np.array(service.http.post("/attention", json={"image_id": 1, "format": "maps"}).json()["maps"])
    assert maps.shape == (1, 2, 2)  # a head; 32 px in patches of 16
    assert 0.5 < maps.sum() < 1
    assert is_problem(service.http.post("/attention", json={"image_id": 1, "head": 7}), 422, "request-invalid")


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ({}, (422, "request-invalid")),
        ({"image_id": 1, "image_base64": "AAAA"}, (422, "request-invalid")),
        ({"image_id": 0}, (422, "request-invalid")),
        ({"image_id": 2**63}, (422, "request-invalid")),
        ({"image_id": 1, "k": 0}, (422, "request-invalid")),
        ({"image_id": 1, "k": 1001}, (422, "request-invalid")),
        ({"image_id": 1, "kk": 1}, (422, "request-invalid")),
        ({"image_id": 1, "embedding": None}, (422, "request-invalid")),
        ({"image_id": True}, (422, "request-invalid")),
        ({"embedding": [True, 1.0] * 32}, (422, "request-invalid")),
        ({"image_id": "1", "k": "2"}, (200, "")),
        ({"image_id": 99}, (404, "image-not-found")),
        ({"image_id": 1, "collection": "nope"}, (404, "collection-not-found")),
        ({"image_id": 1, "filter": ["x"]}, (422, "filter")),
        ({"image_id": 1, "filter": ["nokey = 1"]}, (422, "filter")),
        ({"embedding": [1.0]}, (422, "request-invalid")),
        ({"embedding": [0.0] * 64}, (422, "request-invalid")),
        ({"embedding": [1e308] * 64}, (200, "")),
        ({"embedding": [5e-324] * 64}, (200, "")),
        ({"image_base64": "no base64!"}, (422, "request-invalid")),
        ({"image_base64": ""}, (422, "image-empty")),
        ({"image_url": "http://127.0.0.1/x.jpg"}, (403, "fetching-off")),
        ({"image_id": 1, "min_score": "much"}, (422, "request-invalid")),
    ],
)
def test_what_cannot_be_asked_is_a_problem(
    service: RunningService, sent: dict[str, Any], expected: tuple[int, str]
) -> None:
    answer = service.http.post("/search", json=sent)
    if expected[0] == 200:
        assert answer.status_code == 200
    else:
        assert is_problem(answer, *expected)


@pytest.mark.parametrize(
    ("body", "media_type", "expected"),
    [
        (b"{", "application/json", (422, "request-invalid")),
        (b"[]", "application/json", (422, "request-invalid")),
        (b"\xff\xfe", "application/json", (422, "request-invalid")),
        (b"[" * 100_000, "application/json", (422, "request-invalid")),
        (b'{"embedding": [NaN]}', "application/json", (422, "request-invalid")),
        (b"x=1", "application/x-www-form-urlencoded", (415, "media-type-refused")),
        (b"", "", (415, "media-type-refused")),
        (b"x", "multipart/form-data", (422, "request-invalid")),
        (b"x", "multipart/form-data; boundary=abc", (422, "request-invalid")),
    ],
)
def test_a_body_that_cannot_be_read_is_a_problem(
    service: RunningService, body: bytes, media_type: str, expected: tuple[int, str]
) -> None:
    headers = {"content-type": media_type} if media_type else {}
    assert is_problem(service.http.post("/search", content=body, headers=headers), *expected)


def test_a_file_in_another_field_or_twice_is_a_problem(service: RunningService) -> None:
    for files in ([("picture", b"x")], [("image", b"x"), ("image", b"y")]):
        assert is_problem(service.http.post("/search", files=files), 422, "request-invalid")


def test_an_unknown_path_and_method_are_problems(service: RunningService) -> None:
    assert is_problem(service.http.get("/nothing"), 404, "not-found")
    assert is_problem(service.http.put("/search"), 405, "method-not-allowed")
