"""The Python client, against a real running service: each operation, and what it makes of problems."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, get_type_hints

import httpx
import numpy as np
import pytest
from PIL import Image

from bad_files import exif_orientation, picture
from dino_index.errors import ImageError, RequestTimedOut, ServiceError, ServiceProblem, ServiceUnreachable
from dino_index.images import decode, load_image
from dino_search import Collection, client
from dino_search.api import schemas
from dino_search.api.keys import ApiKeys
from dino_search.client import Client
from running_service import RunningService, running_service
from sample_collections import index_files, jpeg, write_pictures


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_pictures(folder, *(f"{name}/{number}.jpg" for name in ("cat", "dog") for number in range(4)))
    return folder


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, photos: Path, tiny_model: Path) -> Iterator[RunningService]:
    """A service on eight pictures, images 1 to 8, labelled by folder; other collections are the tests' own."""
    home = tmp_path_factory.mktemp("service") / "home"
    index_files(home, tiny_model, photos, labels="folders")
    (home / "models").mkdir(exist_ok=True)
    (home / "models" / "tiny.safetensors").write_bytes(tiny_model.read_bytes())
    with running_service(home, index_folders=[photos]) as running:
        yield running


@pytest.fixture
def asked(service: RunningService) -> Iterator[Client]:
    with Client(service.url) as made:
        yield made


def ids(results: schemas.SearchResults | schemas.BatchQuery) -> list[int]:
    return [found.image_id for found in results.results]


def problem_of(work: Callable[[], Any]) -> ServiceProblem:
    with pytest.raises(ServiceProblem) as met:
        work()
    return met.value


# --- pictures


def test_every_kind_of_query_finds_what_the_collection_finds(
    service: RunningService, asked: Client, photos: Path
) -> None:
    path = photos / "cat" / "2.jpg"
    with Collection.open(home=service.engine.settings.home) as collection:
        expected = collection.search(path, k=4).to_json()["results"]
    vector = asked.embed(path).embedding
    pixels = Image.open(path)
    queries: list[client.Query] = [path, str(path), path.read_bytes(), pixels, 3, vector, np.array(vector, np.float32)]
    for query in queries:
        found = asked.search(query, k=4)
        assert ids(found) == [each["image_id"] for each in expected], type(query)
        assert found.results[0].score == pytest.approx(1, abs=2e-5)
    assert asked.search(path, k=4).query == "2.jpg"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16"])
def test_pixels_of_any_mode_are_sent_without_loss(mode: str) -> None:
    if mode == "LAB":
        pixels = Image.merge("LAB", picture(seed=40).split())
    else:
        pixels = picture(seed=40).convert("I" if mode == "I;16" else "RGB").convert(mode)
    sent, meant = decode(client._encoded(pixels)).pixels_HWC, load_image(pixels).pixels_HWC
    assert np.array_equal(sent, meant)


def test_pixels_are_turned_as_their_exif_says_and_sent_without_the_rest_of_it(asked: Client) -> None:
    exif = exif_orientation(6)
    exif[0x010E] = "where I live"
    buffer = io.BytesIO()
    picture(120, 60, seed=41).save(buffer, "PNG", exif=exif)
    pixels = Image.open(buffer)
    assert asked.embed(pixels).embedding == asked.embed(buffer.getvalue()).embedding
    assert b"where I live" not in client._encoded(pixels)
    assert pixels.getexif()[0x010E] == "where I live"


def test_options_of_a_search_are_passed_on(asked: Client) -> None:
    assert ids(asked.search(5, k=2)) == ids(asked.search(5, k=8))[:2]
    assert ids(asked.search(5, min_score=1.0)) == [5]
    cats = asked.search(jpeg(4), filters=["label = cat", "id > 1"]).results
    assert sorted(found.image_id for found in cats) == [2, 3, 4]
    assert problem_of(lambda: asked.search(5, collection="none")).code == "collection_not_found"


def test_batches_may_be_of_files_or_mixed(asked: Client, photos: Path) -> None:
    files: list[client.Query] = [photos / "cat" / "0.jpg", jpeg(5), b"words"]
    answers = asked.search_batch(files, k=1).queries
    assert [(each.query, each.status) for each in answers] == [
        ("0.jpg", "ok"), ("picture", "ok"), ("picture", "failed")
    ]  # fmt: skip
    mixed = asked.search_batch([*files, 7], k=1).queries
    assert [ids(each) for each in mixed] == [[1], [6], [], [7]]
    assert problem_of(lambda: asked.search_batch([])).code == "request_invalid"


def test_classify_copies_compare_and_attention(asked: Client, photos: Path) -> None:
    (classified,) = asked.classify(photos / "dog" / "1.jpg", k=1).results
    assert classified.label == "dog"
    copies = asked.copies(photos / "dog" / "1.jpg", copy_score=0.9, k=3, variants="none").queries[0]
    assert [copies.query, copies.matches[0].image_id, copies.matches[0].decision] == ["1.jpg", 6, "copy"]
    for pair in ((6, 6), (photos / "dog" / "1.jpg", jpeg(5)), (6, jpeg(5))):
        assert asked.compare(*pair, copy_score=0.9).reason == "identical"
    assert Image.open(io.BytesIO(asked.attention(jpeg(5)))).format == "PNG"
    assert np.shape(asked.attention_maps(6, head=0).maps) == (1, 2, 2)


def test_a_file_that_cannot_be_read_is_told_before_anything_is_sent(asked: Client, tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    for name, reason in (("none.jpg", "vanished"), ("empty.jpg", "empty"), (".", "not_a_file")):
        with pytest.raises(ImageError) as met:
            asked.search(tmp_path / name)
        assert met.value.reason == reason


def test_file_names_of_all_kinds_arrive(asked: Client, tmp_path: Path) -> None:
    for name in ("Grüße 写真 🌄.jpg", "caf\udce9.jpg", 'a "b".jpg'):
        path = tmp_path / name
        path.write_bytes(jpeg(1))
        assert asked.search(path, k=1).query.endswith(".jpg")
    assert asked.search(tmp_path / "Grüße 写真 🌄.jpg", k=1).query == "Grüße 写真 🌄.jpg"


def test_a_url_is_for_the_service_to_fetch(asked: Client) -> None:
    assert problem_of(lambda: asked.search("https://example.org/a.jpg")).code == "fetching_off"


# --- collections, images, verdicts


def test_collections_and_images_come_and_go(asked: Client, tmp_path: Path) -> None:
    name = "a b&ü?#%"
    made = asked.create_collection(name, model="tiny")
    assert (made, asked.collection(name)) == (asked.collections()[0], made)
    write_pictures(tmp_path, "a.jpg", seed=60)
    sent = asked.upload(name, [tmp_path / "a.jpg", jpeg(61), picture(seed=62)], label="x")
    assert [(image.file, image.status) for image in sent.images] == [
        ("a.jpg", "added"), ("picture", "added"), ("picture", "added")
    ]  # fmt: skip
    listed = list(asked.images(name, page_size=2))
    assert [image.image_id for image in listed] == [image.image_id for image in sent.images]
    assert {image.label for image in asked.images(name, filters=["label = x"])} == {"x"}
    first = listed[0].image_id
    assert asked.image(name, first) == listed[0]
    asked.remove_image(name, first)
    gone = problem_of(lambda: asked.image(name, first))
    assert (gone.code, gone.status) == ("image_not_found", 404)
    assert problem_of(lambda: asked.image("default", listed[1].image_id)).code == "image_not_found"
    asked.delete_collection(name)
    assert [each.collection for each in asked.collections()] == ["default"]


def test_a_thumbnail_is_a_small_jpeg(asked: Client) -> None:
    made = Image.open(io.BytesIO(asked.thumbnail(1, side=96)))
    assert (made.format, max(made.size)) == ("JPEG", 96)


def test_duplicates_come_as_pages_and_one_by_one(asked: Client) -> None:
    rules: client.DuplicateRules = {"copy_score": 0.96, "unchecked": True, "group": "complete"}
    page = asked.duplicates(**rules, limit=1)
    groups = list(asked.duplicate_groups(**rules, page_size=1))
    assert (page.images, page.group_by, page.groups) == (8, "complete", groups[:1])
    assert len(groups) == page.num_groups > 1


def test_verdicts_are_put_listed_and_taken_back(asked: Client) -> None:
    digest = asked.image("default", 3).sha256
    assert digest is not None
    assert asked.put_verdict(1, 2, "copy").added == 1
    assert asked.put_verdict(digest, 1, "not_copy", note="two").added == 1
    assert [each.note for each in asked.verdicts(page_size=1)] == ["", "two"]
    assert len(list(asked.verdicts(collection="default"))) == 2
    asked.delete_verdict(2, 1)
    assert [each.note for each in asked.verdicts()] == ["two"]
    gone = problem_of(lambda: asked.delete_verdict(1, 2))
    assert (gone.status, gone.code) == (404, "verdict_not_found")
    asked.delete_verdict(1, digest)
    assert list(asked.verdicts()) == []


# --- jobs


def test_a_job_of_folders_is_listed_cancelled_and_forgotten(asked: Client, photos: Path) -> None:
    job = asked.submit_job("index", collection="by-job", folders=[str(photos)], labels="folders", prune=None)
    assert (job.status, job.request["folders"]) == ("queued", [str(photos.resolve())])
    with pytest.raises(RequestTimedOut, match=f"job {job.id} is"):
        asked.wait_for_job(job.id, timeout_s=0)
    assert problem_of(lambda: asked.forget_job(job.id)).code == "job_conflict"
    asked.cancel_job(job.id)
    ended = asked.wait_for_job(job.id, timeout_s=60, poll_s=0.05)
    assert ended.status == "cancelled"
    assert [each.id for each in asked.jobs(collection="by-job", status="cancelled", page_size=1)] == [job.id]
    assert problem_of(lambda: asked.cancel_job(job.id)).code == "job_conflict"
    asked.forget_job(job.id)
    assert problem_of(lambda: asked.job(job.id)).code == "job_not_found"


def test_a_job_of_pictures_leaves_files(asked: Client) -> None:
    job = asked.submit_job("copies", pictures=[jpeg(5), jpeg(90)], copy_score=0.9, k=2, verify=0)
    done = asked.wait_for_job(job.id, poll_s=0.05)
    assert done.status == "done", done.error
    assert b"query" in asked.job_file(job.id, "matches.csv")
    assert problem_of(lambda: asked.job_file(job.id, "../matches.csv")).status == 404


# --- problems


def test_a_problem_carries_its_facts(asked: Client) -> None:
    problem = problem_of(lambda: asked.search(99))
    assert isinstance(problem, ServiceError)
    assert (problem.status, problem.code, problem.retry_after_s) == (404, "image_not_found", None)
    assert problem.detail == str(problem) == "no image 99 in collection 'default'; its images: GET /collections"
    assert len(problem.request_id or "") == 32
    assert problem_of(lambda: asked.search(b"words")).code == "image_not_an_image"


def test_a_service_that_is_not_ready_says_why(service: RunningService, asked: Client) -> None:
    assert asked.ready().collections == ["default"]
    service.engine.is_warm = False
    problem = problem_of(asked.ready)
    service.engine.is_warm = True
    assert (problem.code, problem.status) == ("not_ready", 503)
    assert "starting" in problem.reasons[0]


def test_a_key_opens_a_service_that_asks_for_one(home: Path) -> None:
    with closing(ApiKeys(home)) as keys:
        _, key = keys.add("a", scope="read")
    with running_service(home) as service, Client(service.url) as stranger, Client(service.url, key) as known:
        assert problem_of(stranger.collections).code == "key_refused"
        assert known.collections() == []
        assert problem_of(lambda: known.create_collection("a")).code == "scope_missing"


def test_nobody_there_is_a_clear_error() -> None:
    with Client("http://127.0.0.1:1") as asked, pytest.raises(ServiceUnreachable, match="is the service running there"):
        asked.collections()
    with pytest.raises(ValueError, match="url: expected one that begins"):
        Client("localhost:8000")


Asked = Callable[[httpx.Request], httpx.Response]


def client_of(*answers: httpx.Response | Exception, **options: Any) -> tuple[Client, list[httpx.Request]]:
    """A client of something that gives these answers, or fails so, the last one for good; and what it was asked."""
    requests: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        given = answers[min(len(requests), len(answers)) - 1]
        if isinstance(given, Exception):
            raise given
        return given

    return Client("http://busy.test/below", transport=httpx.MockTransport(answer), **options), requests


def busy(status: int = 429, retry_after: str = "1") -> httpx.Response:
    content = {"type": "/problems/too-many-requests", "detail": "full"}
    headers = {"Content-Type": "application/problem+json", "Retry-After": retry_after}
    return httpx.Response(status, json=content, headers=headers)


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


def test_a_busy_service_is_asked_again_after_the_wait_that_it_names(slept: list[float]) -> None:
    asked, requests = client_of(busy(retry_after="2"), busy(503), httpx.Response(200, json={"collections": []}))
    assert asked.collections() == []
    assert ([request.url.path for request in requests], slept) == (["/below/collections"] * 3, [2, 1])


def test_it_is_asked_no_more_often_than_allowed(slept: list[float]) -> None:
    asked, requests = client_of(busy(), retries=2)
    problem = problem_of(asked.collections)
    assert (problem.code, problem.retry_after_s, len(requests), slept) == ("too_many_requests", 1, 3, [1, 1])
    asked, requests = client_of(busy(), retries=0)
    problem_of(asked.collections)
    assert len(requests) == 1


def test_a_picture_is_sent_whole_each_time(slept: list[float], tmp_path: Path) -> None:
    (path,) = write_pictures(tmp_path, "a.jpg")
    asked, requests = client_of(busy(), httpx.Response(200, json={"bad": 1}))
    assert problem_of(lambda: asked.search(path)).code == "answer_invalid"
    bodies = [request.content for request in requests]
    assert len(bodies) == 2
    assert all(path.read_bytes() in body for body in bodies)


def test_what_should_not_be_done_twice_is_repeated_only_where_it_was_not_begun(slept: list[float]) -> None:
    asked, requests = client_of(busy(503))
    for work in (
        lambda: asked.submit_job("duplicates"), lambda: asked.create_collection("a"), lambda: asked.forget_job(1),
        lambda: asked.remove_image("a", 1), lambda: asked.delete_collection("a"), lambda: asked.delete_verdict(1, 2),
        lambda: asked.cancel_job(1),
    ):  # fmt: skip
        requests.clear()
        problem_of(work)
        assert len(requests) == 1
    asked, requests = client_of(busy(429), retries=1)
    problem_of(lambda: asked.submit_job("duplicates"))
    assert len(requests) == 2


@pytest.mark.parametrize(
    "lost", [httpx.Response(502), httpx.Response(504), httpx.ReadError("reset"), httpx.RemoteProtocolError("no answer")]
)
def test_what_was_lost_with_a_service_is_asked_again_of_another(
    slept: list[float], lost: httpx.Response | Exception
) -> None:
    asked, requests = client_of(lost, httpx.Response(200, json={"collections": []}))
    assert asked.collections() == []
    assert (len(requests), len(slept)) == (2, 1)
    asked, requests = client_of(lost, retries=2)
    with pytest.raises((ServiceProblem, ServiceUnreachable)):
        asked.submit_job("duplicates")
    assert len(requests) == 1
    with pytest.raises((ServiceProblem, ServiceUnreachable)):
        asked.collections()
    assert len(requests) == 4


@pytest.mark.parametrize("retry_after", ["30", "", "soon", "-1", "Wed, 21 Oct 2026 07:28:00 GMT"])
def test_who_would_have_to_wait_long_or_does_not_know_is_told(slept: list[float], retry_after: str) -> None:
    asked, requests = client_of(busy(retry_after=retry_after))
    problem = problem_of(asked.collections)
    assert problem.retry_after_s == (30 if retry_after == "30" else None)
    assert (len(requests), slept) == (1, [])


@pytest.mark.parametrize(
    ("answer", "status", "code"),
    [
        (httpx.Response(502, text="<html>Bad Gateway</html>"), 502, "http_502"),
        (httpx.Response(302, headers={"Location": "http://elsewhere.test/"}), 302, "http_302"),
        (httpx.Response(500, content=b"{", headers={"Content-Type": "application/problem+json"}), 500, "http_500"),
        (httpx.Response(500, content=b"[]", headers={"Content-Type": "application/problem+json"}), 500, "http_500"),
        (httpx.Response(500, json="no", headers={"Content-Type": "application/problem+json"}), 500, "http_500"),
        (httpx.Response(200, text="<html>Welcome</html>"), 200, "answer_invalid"),
        (httpx.Response(200, json={"collections": [{}]}), 200, "answer_invalid"),
    ],
)
def test_what_no_dino_search_answers_is_a_problem_too(answer: httpx.Response, status: int, code: str) -> None:
    asked, _ = client_of(answer)
    problem = problem_of(asked.collections)
    assert (problem.status, problem.code) == (status, code)
    assert "busy.test" in problem.detail


# --- its shape


@pytest.mark.parametrize(
    ("rules", "model"),
    [(client.PairRules, schemas.CompareRequest), (client.CopiesRules, schemas.CopiesRequest)],
)
def test_rules_are_the_fields_of_the_requests(rules: Any, model: Any) -> None:
    pictures = {"a", "b", *schemas.PictureGiven.model_fields}
    assert set(get_type_hints(rules)) == set(model.model_fields) - pictures


def test_rules_of_duplicates_are_the_parameters(service: RunningService) -> None:
    operation = service.http.get("/openapi.json").json()["paths"]["/duplicates"]["get"]
    parameters = {parameter["name"] for parameter in operation["parameters"]}
    assert set(get_type_hints(client.DuplicateRules)) == parameters - {"cursor", "limit"}


def test_every_operation_that_a_program_may_want_has_a_method(
    service: RunningService, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = service.http.get("/openapi.json").json()
    operations = {operation["operationId"] for each in document["paths"].values() for operation in each.values()}
    renamed = {
        "list_collections": "collections", "show_collection": "collection", "list_images": "images",
        "show_image": "image", "add_images": "upload", "delete_image": "remove_image", "put_verdicts": "put_verdict",
        "list_verdicts": "verdicts", "create_job": "submit_job", "list_jobs": "jobs", "get_job": "job",
        "get_job_file": "job_file", "readyz": "ready",
    }  # fmt: skip
    missing = {name for name in operations if not hasattr(Client, renamed.get(name, name))}
    assert missing == {"livez", "metrics"}


def test_importing_the_client_loads_nothing_heavy() -> None:
    script = "import sys, dino_search.client; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"torch", "faiss", "sqlalchemy", "fastapi", "timm", "numpy", "dino_search.api.app"}
    assert not heavy & set(loaded)
