"""What holds of every operation, whichever there are: the OpenAPI document names them."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from bad_files import make_bad_files
from dino_search.api.keys import ApiKeys
from dino_search.api.problems import STATUS_BY_IMAGE_REASON
from live_servers import talk
from running_service import RunningService, is_problem, running_service
from sample_collections import index_files, jpeg, write_pictures

WITHOUT_KEY = {"/livez", "/readyz", "/metrics"}
# What a request names, where the document asks for it: all of the collection `default`.
VALUES: dict[str, Any] = {
    "collection": "default", "image_id": 1, "job_id": 1, "name": "groups.json", "query_id": 1, "reference_id": 2,
}  # fmt: skip
# Of more than one collection, or of none: bound keys are answered with what they may see.
ABOUT_ALL = {("GET", "/collections"), ("GET", "/jobs")}


class Operation(NamedTuple):
    method: str
    path: str
    described: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.method} {self.path}"

    @property
    def media_types(self) -> dict[str, Any]:
        content: dict[str, Any] = self.described.get("requestBody", {}).get("content", {})
        return content

    def request(self, **values: Any) -> dict[str, Any]:
        """What httpx is to send for a request that has all it needs. values: in place of those in VALUES."""
        known = VALUES | values
        query = {
            each["name"]: known[each["name"]] for each in self.described.get("parameters", [])
            if each["in"] == "query" and each["name"] in known
        }  # fmt: skip
        sent: dict[str, Any] = {"method": self.method, "url": self.path.format(**known), "params": query}
        if self.media_types:
            sent["json"] = self._body(known["collection"])
        return sent

    def _body(self, collection: str) -> dict[str, Any]:
        """A body that is good, and names the collection where it can."""
        pair = {"decision": "copy", "query_id": 1, "reference_id": 2}
        special: dict[str, dict[str, Any]] = {
            "/verdicts": {"verdicts": [pair]},
            "/collections": {},
            "/collections/{collection}/images": {"pictures": [{"image_base64": base64.b64encode(jpeg(1)).decode()}]},
            "/compare": {"a": {"image_id": 1}, "b": {"image_id": 2}, "copy_score": 0.9},
            "/search/batch": {"queries": [{"image_id": 1}]},
            "/jobs": {"kind": "duplicates"},
        }
        body = special.get(self.path, {"image_id": 1})
        return body if "{collection}" in self.path or self.path == "/verdicts" else body | {"collection": collection}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("every")


@pytest.fixture(scope="module")
def keys(folder: Path, tiny_model: Path) -> Iterator[ApiKeys]:
    """Keys of a home with images 1 and 2 in `default`, and a job that waits for ever."""
    write_pictures(folder / "photos", "1.jpg", "2.jpg")
    index_files(folder / "home", tiny_model, folder / "photos")
    with closing(ApiKeys(folder / "home")) as keys:
        keys.add("first", scope="read")
        yield keys


@pytest.fixture(scope="module")
def locked(folder: Path, keys: ApiKeys) -> Iterator[RunningService]:
    """A service that asks for keys, with a job of `default`."""
    with running_service(folder / "home") as running:
        _, key = keys.add("maker", scope="write")
        show_keys(running)
        made = running.http.post("/jobs", json={"kind": "duplicates", "copy_score": 0.9}, headers=bearer(key))
        assert made.status_code == 202, made.text
        yield running


def show_keys(service: RunningService) -> None:
    """The service looks at the keys with its next request, as it does every few seconds."""
    service.app.state.access._read_at = None


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def operations_of(service: RunningService) -> list[Operation]:
    paths = service.http.get("/openapi.json").json()["paths"]
    found = [
        Operation(method.upper(), path, described)
        for path, operations in paths.items()
        for method, described in operations.items()
    ]
    assert len(found) >= 29
    return found


def guarded(service: RunningService) -> list[Operation]:
    return [operation for operation in operations_of(service) if operation.path not in WITHOUT_KEY]


# --- keys


def test_no_operation_answers_without_a_key(locked: RunningService) -> None:
    for operation in guarded(locked):
        # Before anything about the request is looked at, so that nobody learns what is there.
        for values in ({}, {"collection": "none", "image_id": 99, "job_id": 99}):
            answer = locked.http.request(**operation.request(**values))
            assert is_problem(answer, 401, "key-refused"), (str(operation), answer.text)
            assert answer.headers["www-authenticate"].startswith("Bearer")
        empty = locked.http.request(operation.method, operation.path.format(**VALUES))
        assert empty.status_code == 401 or not operation.media_types, str(operation)


def test_no_operation_answers_a_wrong_key(locked: RunningService) -> None:
    for operation in guarded(locked):
        for headers in (bearer("ds_" + "A" * 43), {"X-API-Key": "no"}):
            answer = locked.http.request(**operation.request(), headers=headers)
            # Too many wrong ones, and they are not even looked up.
            assert is_problem(answer, 401, "key-refused") or is_problem(answer, 429, "too-many-attempts"), operation


def test_the_rest_needs_no_key(locked: RunningService) -> None:
    for path in ("/livez", "/readyz", "/metrics", "/", "/web/page.js", "/docs", "/openapi.json"):
        assert locked.http.get(path).status_code == 200, path


def test_every_operation_that_changes_something_refuses_a_key_that_may_only_read(
    locked: RunningService, keys: ApiKeys
) -> None:
    reader, writer = (bearer(keys.add(scope, scope=scope)[1]) for scope in ("read", "write"))
    show_keys(locked)
    # What posts a question changes nothing.
    asks = {"/search", "/search/batch", "/classify", "/embed", "/attention", "/copies", "/compare"}
    needs_admin = []
    for operation in guarded(locked):
        changes = operation.method in ("PUT", "DELETE", "PATCH") or (
            operation.method == "POST" and operation.path not in asks
        )
        answer = locked.http.request(**operation.request(collection="none", image_id=99, job_id=99), headers=reader)
        refused = is_problem(answer, 403, "scope-missing")
        assert refused == changes, (str(operation), answer.text)
        if changes and operation.path.startswith("/collections"):
            sent = operation.request(collection="none", image_id=99)
            if is_problem(locked.http.request(**sent, headers=writer), 403, "scope-missing"):
                needs_admin.append(str(operation))
    assert sorted(needs_admin) == ["DELETE /collections/{collection}", "POST /collections"]


def test_no_operation_reaches_a_collection_that_the_key_is_not_for(locked: RunningService, keys: ApiKeys) -> None:
    bound = bearer(keys.add("bound", scope="admin", collections=["other"])[1])
    show_keys(locked)
    for operation in guarded(locked):
        if (operation.method, operation.path) in ABOUT_ALL:
            continue
        answer = locked.http.request(**operation.request(), headers=bound)
        assert is_problem(answer, 403, "scope-missing"), (str(operation), answer.text)
    for method, path in ABOUT_ALL:
        seen = locked.http.request(method, path, headers=bound)
        assert seen.status_code == 200
        assert "default" not in seen.text, path
    assert is_problem(locked.http.get("/verdicts", headers=bound), 403, "scope-missing")


def test_a_key_decides_about_pictures_of_its_collections_only(
    locked: RunningService, keys: ApiKeys, folder: Path, tiny_model: Path
) -> None:
    write_pictures(folder / "own", "3.jpg", seed=33)
    index_files(folder / "home", tiny_model, folder / "own", collection="own")
    free, bound = (
        bearer(keys.add("a", scope="write", collections=collections)[1]) for collections in (None, ["own"])
    )  # fmt: skip
    show_keys(locked)
    theirs = [
        image["sha256"] for image in locked.http.get("/collections/default/images", headers=free).json()["images"][:2]
    ]
    (own,) = locked.http.get("/collections/own/images", headers=bound).json()["images"]
    foreign = {"query_sha256": theirs[0], "reference_sha256": theirs[1]}
    shared = {"query_sha256": own["sha256"], "reference_sha256": theirs[0]}

    def put(pair: dict[str, str], headers: dict[str, str]) -> httpx.Response:
        return locked.http.put("/verdicts", json={"verdicts": [pair | {"decision": "copy"}]}, headers=headers)

    assert put(foreign, free).status_code == 200
    assert is_problem(put(foreign, bound), 403, "scope-missing")
    assert is_problem(locked.http.delete("/verdicts", params=foreign, headers=bound), 403, "scope-missing")
    assert put(shared, bound).json()["added"] == 1
    (listed,) = locked.http.get("/verdicts?collection=own", headers=bound).json()["verdicts"]
    assert {listed["query"], listed["reference"]} == {own["path"], ""}  # no paths of others
    for pair in (foreign, shared):
        assert locked.http.delete("/verdicts", params=pair, headers=free).status_code == 204


# --- bad pictures


def spots_of_pictures(schema: dict[str, Any]) -> list[tuple[str, ...]]:
    """Where in a JSON body a picture may be, as the path to its `image_base64`; () for a place in a list."""
    properties = schema.get("properties", {})
    spots: list[tuple[str, ...]] = [("image_base64",)] if "image_base64" in properties else []
    for name, field in properties.items():
        inner = field.get("items", {}) if field.get("type") == "array" else field
        spots += [(name, *spot) for spot in spots_of_pictures(inner)]
    return spots


def in_json(schema: dict[str, Any], spot: tuple[str, ...], text: str) -> dict[str, Any]:
    name, *rest = spot
    if not rest:
        return {name: text}
    field = schema["properties"][name]
    is_list = field.get("type") == "array"
    inner = in_json(field["items"] if is_list else field, tuple(rest), text)
    return {name: [inner] if is_list else inner}


def test_every_bad_file_is_a_problem_as_base64(service: RunningService, tmp_path: Path) -> None:
    bad = {tmp_path / name: reason for name, reason in make_bad_files(tmp_path).items()}
    files = {path.read_bytes(): reason for path, reason in bad.items() if path.is_file()}
    asked, wrong = set(), []
    for operation in operations_of(service):
        schema = operation.media_types.get("application/json", {}).get("schema", {})
        for spot in spots_of_pictures(schema):
            asked.add((operation.path, spot))
            for data, reason in files.items():
                body = in_json(schema, spot, base64.b64encode(data).decode())
                if spot[0] in "ab":
                    body = {"a": {"image_id": 1}, "b": {"image_id": 1}} | body
                answer = service.http.request(operation.method, operation.path.format(**VALUES), json=body)
                if not is_problem(answer, STATUS_BY_IMAGE_REASON[reason], f"image-{reason.replace('_', '-')}"):
                    wrong.append((str(operation), spot, reason, answer.status_code, answer.text[:200]))
    assert not wrong
    assert len(files) > 90
    assert {path for path, _ in asked} >= {"/search", "/search/batch", "/compare", "/collections/{collection}/images"}
    assert ("/compare", ("b", "image_base64")) in asked


def test_a_job_of_bad_pictures_names_each(tmp_path: Path, folder: Path, locked: RunningService, keys: ApiKeys) -> None:
    bad = {name: reason for name, reason in make_bad_files(tmp_path).items() if (tmp_path / name).is_file()}
    files = [("image", (name, (tmp_path / name).read_bytes())) for name in bad]
    headers = bearer(keys.add("jobs", scope="write")[1])
    show_keys(locked)
    made = locked.http.post("/jobs", data={"kind": "index", "collection": "bad"}, files=files, headers=headers).json()
    for _ in range(600):
        job = locked.http.get(f"/jobs/{made['id']}", headers=headers).json()
        if job["status"] not in ("queued", "running"):
            break
        time.sleep(0.1)
    assert (job["status"], job["result"]["added"], job["result"]["failed"]) == ("done", 0, len(bad)), job
    assert sorted(failure["code"] for failure in job["failures"]) == sorted(bad.values())


# --- ways out of the folders


WAYS_OUT = [
    "..", "../..", "../../../../../../etc/passwd", "..%2f..%2f..%2f..%2fetc%2fpasswd", "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "%252e%252e%252fetc%252fpasswd", "..%5c..%5cetc%5cpasswd", "....//....//etc/passwd", "/etc/passwd",
    "%2fetc%2fpasswd", "..;/..;/etc/passwd", "%00", "1%00.jpg", "..%c0%af..%c0%afetc/passwd", "~root", "file:///etc/passwd",
    "catalog.sqlite3", "..%2fcatalog.sqlite3",
]  # fmt: skip


def answer_to(service: RunningService, method: str, target: str) -> tuple[int, bytes]:
    """Status and body of the answer to a path as it is: httpx would tidy it."""
    port = httpx.URL(service.url).port
    assert port is not None
    head = f"{method} {target} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    answer = talk(port, head.encode())
    return int(answer.split(b" ", 2)[1]), answer.partition(b"\r\n\r\n")[2]


def test_no_parameter_of_a_path_leads_out(service: RunningService) -> None:
    before = sorted(service.engine.settings.home.rglob("*"))
    num_asked = 0
    for operation in operations_of(service):
        for parameter in operation.described.get("parameters", []):
            if parameter["in"] != "path":
                continue
            for way in WAYS_OUT:
                target = operation.path.format(**VALUES | {parameter["name"]: way})
                status, body = answer_to(service, operation.method, target)
                num_asked += 1
                assert 400 <= status < 500, (str(operation), target, status)
                assert b"/problems/" in body
                assert b"root:" not in body
    assert num_asked > 10 * len(WAYS_OUT)
    assert sorted(service.engine.settings.home.rglob("*")) == before


@pytest.mark.parametrize("way", WAYS_OUT)
def test_the_page_has_no_other_files(service: RunningService, way: str) -> None:
    for below in ("/web/", "/web/page.js/", "/static-offline-docs/"):
        status, body = answer_to(service, "GET", below + way)
        assert status in (400, 404), (below, way, body[:100])
        assert b"root:" not in body


def test_names_of_uploads_lead_nowhere(own_service: RunningService) -> None:
    home = own_service.engine.settings.home
    for number, way in enumerate([*WAYS_OUT, "..\\..\\a.jpg", "a\nb.jpg", "a" * 300 + ".jpg", "CON", "", "."]):
        before = {path for path in home.parent.rglob("*") if home / "uploads" not in path.parents}
        files = {"image": (way, jpeg(100 + number))}
        answer = own_service.http.post("/collections/default/images", files=files)
        assert answer.status_code in (201, 422), (way, answer.text)
        after = {path for path in home.parent.rglob("*") if home / "uploads" not in path.parents}
        assert {path for path in after - before if not path.name.startswith("catalog.sqlite3")} <= {home / "uploads"}


@pytest.mark.parametrize(
    "given",
    ["/", "/etc", "{photos}/../home", "{photos}/..", "{photos}/cat/../../home", "{photos}x", "photos", "~", "$HOME",
     "file:///etc", "s3://a/b", "//etc", "{photos}\0/..", "\\\\server\\share", ""],
)  # fmt: skip
def test_folders_of_jobs_lead_nowhere_else(own_service: RunningService, photos: Path, given: str) -> None:
    for kind in ("index", "copies"):
        body = {"kind": kind, "folders": [given.replace("{photos}", str(photos))]}
        answer = own_service.http.post("/jobs", json=body)
        assert is_problem(answer, 403, "folder-refused") or is_problem(answer, 422, "request-invalid"), answer.text
    assert own_service.http.get("/jobs").json()["jobs"] == []
