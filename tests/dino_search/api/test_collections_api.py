"""Collections and their images over HTTP: listed, made, sent to, removed; and thumbnails."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bad_files import picture
from dino_search import Collection
from running_service import RunningService, is_problem, running_service
from sample_collections import index_files, jpeg


def uploads_in(service: RunningService) -> list[Path]:
    return [path for path in (service.engine.settings.home / "uploads").rglob("*") if path.is_file()]


def send(service: RunningService, *pictures: bytes, collection: str = "default", **fields: str) -> Any:
    files = [("image", (f"{number}.jpg", data)) for number, data in enumerate(pictures)]
    return service.http.post(f"/collections/{collection}/images", files=files, data=fields)


def test_a_collection_is_described_as_info_does(service: RunningService) -> None:
    with Collection.open(home=service.engine.settings.home) as collection:
        info = collection.info()
    listed = service.http.get("/collections").json()["collections"]
    assert listed == [service.http.get("/collections/default").json()]
    assert listed[0] == {key: info[key] for key in listed[0]}
    assert is_problem(service.http.get("/collections/nope"), 404, "collection-not-found")


def test_images_come_in_pages_by_id(service: RunningService) -> None:
    seen: list[int] = []
    cursor: int | None = 0
    while cursor is not None:
        page = service.http.get("/collections/default/images", params={"limit": 3, "cursor": cursor}).json()
        assert len(page["images"]) <= 3
        seen += [image["image_id"] for image in page["images"]]
        cursor = page["next_cursor"]
    assert seen == list(range(1, 9))


def test_images_pass_filters(service: RunningService) -> None:
    asked: dict[str, Any] = {"filter": ["label = dog", "id > 5"], "limit": 2}
    page = service.http.get("/collections/default/images", params=asked).json()
    assert [image["image_id"] for image in page["images"]] == [6, 7]
    assert page["next_cursor"] == 7
    assert {image["label"] for image in page["images"]} == {"dog"}
    assert is_problem(service.http.get("/collections/default/images?filter=what"), 422, "filter")


def test_a_picture_that_is_sent_is_found_at_once_and_kept_by_content(own_service: RunningService) -> None:
    answer = send(own_service, jpeg(70), label="bridge")
    (image,) = answer.json()["images"]
    assert (answer.status_code, image["status"], image["file"]) == (201, "added", "0.jpg")
    (kept,) = uploads_in(own_service)
    assert kept.read_bytes() == jpeg(70)
    found = own_service.http.post("/search", files={"image": jpeg(70)}, data={"k": 1}).json()["results"]
    assert [found[0]["image_id"], found[0]["label"], found[0]["path"]] == [image["image_id"], "bridge", str(kept)]


def test_what_is_sent_equals_what_index_makes_of_the_same_bytes(
    own_service: RunningService, tmp_path: Path, tiny_model: Path
) -> None:
    (tmp_path / "same").mkdir()
    (tmp_path / "same" / "one.jpg").write_bytes(jpeg(71))
    index_files(own_service.engine.settings.home, tiny_model, tmp_path / "same", collection="indexed")
    own_service.http.post("/collections", json={"collection": "sent", "model": "bundled"})
    sent = send(own_service, jpeg(71)).json()["images"][0]["image_id"]
    by_id = own_service.http.post("/embed", json={"image_id": sent}).json()["embedding"]
    indexed = own_service.http.get("/collections/indexed/images").json()["images"][0]["image_id"]
    other = own_service.http.post("/embed", json={"image_id": indexed, "collection": "indexed"}).json()["embedding"]
    assert by_id == other


def test_sending_the_same_again_adds_nothing(own_service: RunningService) -> None:
    first = send(own_service, jpeg(72), jpeg(72)).json()
    again = send(own_service, jpeg(72)).json()
    assert (first["added"], again["added"], again["skipped"]) == (2, 0, 1) or first["added"] == 1
    assert own_service.http.get("/collections/default").json()["images"] == 9
    assert {image["image_id"] for image in first["images"] + again["images"]} == {9}


def test_what_is_no_picture_is_reported_beside_those_that_are(own_service: RunningService) -> None:
    sent = send(own_service, b"words", jpeg(73)).json()
    assert [image["status"] for image in sent["images"]] == ["failed", "added"]
    assert sent["images"][0]["reason"].startswith("not_an_image: ")
    assert len(uploads_in(own_service)) == 1


def test_pictures_can_be_sent_as_json(own_service: RunningService) -> None:
    pictures = [{"image_base64": base64.b64encode(jpeg(74)).decode(), "name": "a.jpg"}]
    sent = own_service.http.post("/collections/default/images", json={"pictures": pictures, "label": "x"}).json()
    assert (sent["added"], sent["images"][0]["file"]) == (1, "a.jpg")
    listed = own_service.http.get("/collections/default/images", params={"filter": "uploaded_as = a.jpg"}).json()
    assert [image["label"] for image in listed["images"]] == ["x"]


def test_an_image_that_is_deleted_is_found_no_more_and_its_uploaded_file_goes(own_service: RunningService) -> None:
    image_id = send(own_service, jpeg(75)).json()["images"][0]["image_id"]
    assert own_service.http.delete(f"/collections/default/images/{image_id}").status_code == 204
    assert uploads_in(own_service) == []
    found = own_service.http.post("/search", files={"image": jpeg(75)}).json()["results"]
    assert image_id not in [each["image_id"] for each in found]
    answer = own_service.http.delete(f"/collections/default/images/{image_id}")
    assert is_problem(answer, 404, "image-not-found")


def test_a_file_that_was_indexed_stays_when_its_image_is_deleted(own_service: RunningService, photos: Path) -> None:
    assert own_service.http.delete("/collections/default/images/1").status_code == 204
    assert (photos / "cat" / "0.jpg").is_file()


def test_an_uploaded_file_stays_while_another_collection_has_it(own_service: RunningService, tiny_model: Path) -> None:
    models = own_service.engine.settings.home / "models"
    models.mkdir(exist_ok=True)
    (models / "tiny.safetensors").write_bytes(tiny_model.read_bytes())
    made = own_service.http.post("/collections", json={"collection": "other", "model": "tiny"})
    assert (made.status_code, made.json()["images"]) == (201, 0)
    ids = [
        send(own_service, jpeg(76), collection=name).json()["images"][0]["image_id"] for name in ("default", "other")
    ]
    own_service.http.delete(f"/collections/default/images/{ids[0]}")
    assert len(uploads_in(own_service)) == 1
    assert own_service.http.delete("/collections/other").status_code == 204
    assert uploads_in(own_service) == []
    assert [each["collection"] for each in own_service.http.get("/collections").json()["collections"]] == ["default"]


def test_a_collection_can_be_made_where_nothing_has_been_indexed(home: Path, tiny_model: Path) -> None:
    (home / "models").mkdir(parents=True)
    (home / "models" / "tiny.safetensors").write_bytes(tiny_model.read_bytes())
    with running_service(home) as service:
        assert service.http.get("/collections").json() == {"collections": []}
        assert is_problem(service.http.post("/search", json={"image_id": 1}), 404, "collection-not-found")
        asked = {"collection": "default", "model": "tiny"}
        assert service.http.post("/collections", json=asked).status_code == 201
        assert is_problem(service.http.post("/collections", json=asked), 409, "collection-exists")
        assert is_problem(service.http.post("/search", files={"image": jpeg(1)}), 409, "collection-empty")
        assert send(service, jpeg(1)).status_code == 201
        found = service.http.post("/search", files={"image": jpeg(1)}).json()["results"]
        assert [each["score"] for each in found] == [1.0]


@pytest.mark.parametrize("model", ["../../etc/passwd", "/etc/passwd", "nothing", ".hidden"])
def test_a_collections_model_is_one_of_the_home(service: RunningService, model: str) -> None:
    answer = service.http.post("/collections", json={"collection": "new", "model": model})
    assert is_problem(answer, 422, "request-invalid")


def test_a_removed_collection_and_another_of_its_name_are_not_mixed_up(
    own_service: RunningService, photos: Path, tiny_model: Path
) -> None:
    assert len(own_service.http.post("/search", json={"image_id": 1}).json()["results"]) == 8
    assert own_service.http.delete("/collections/default").status_code == 204
    assert is_problem(own_service.http.post("/search", json={"image_id": 1}), 404, "collection-not-found")
    index_files(own_service.engine.settings.home, tiny_model, photos / "cat")
    found = own_service.http.post("/search", files={"image": (photos / "cat" / "1.jpg").read_bytes()}).json()
    assert len(found["results"]) == 4


def test_a_thumbnail_is_small_upright_and_without_metadata(own_service: RunningService, photos: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    exif[0x010E] = "where I live"
    buffer = io.BytesIO()
    picture(600, 300, seed=9).save(buffer, "JPEG", exif=exif)
    image_id = send(own_service, buffer.getvalue()).json()["images"][0]["image_id"]
    answer = own_service.http.get(f"/images/{image_id}/thumbnail", params={"side": 100})
    made = Image.open(io.BytesIO(answer.content))
    assert (made.format, made.size) == ("JPEG", (96, 192))
    assert not made.getexif()
    assert b"where I live" not in answer.content


def test_a_thumbnail_is_not_sent_twice_to_who_has_it(service: RunningService) -> None:
    first = service.http.get("/images/1/thumbnail")
    again = service.http.get("/images/1/thumbnail", headers={"If-None-Match": f'"x", W/{first.headers["etag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    other = service.http.get("/images/1/thumbnail?side=96", headers={"If-None-Match": first.headers["etag"]})
    assert other.status_code == 200


def test_a_thumbnail_of_a_file_that_is_gone_or_another_by_now_is_a_problem(
    own_service: RunningService, photos: Path
) -> None:
    (photos / "cat" / "0.jpg").unlink()
    (photos / "cat" / "1.jpg").write_bytes(jpeg(80))
    for image_id in (1, 2):
        assert is_problem(own_service.http.get(f"/images/{image_id}/thumbnail"), 404, "image-vanished")
    assert is_problem(own_service.http.get("/images/99/thumbnail"), 404, "image-not-found")


def test_thumbnails_are_kept_within_their_bound(service: RunningService) -> None:
    cache = service.engine.thumbnails
    sizes = []
    for _ in range(2):
        for image_id in range(1, 9):
            service.http.get(f"/images/{image_id}/thumbnail")
        sizes.append(cache.num_bytes)
    assert sizes[0] == sizes[1] > 0
    before, cache.max_bytes = cache.max_bytes, sizes[0] // 2
    service.http.get("/images/1/thumbnail?side=768")
    assert 0 < cache.num_bytes <= cache.max_bytes
    cache.max_bytes = before
