"""Jobs from end to end: over HTTP, in processes of their own, on a small real collection."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient
from sqlalchemy import delete

from catalog_rows import an_image, fill
from dino_index.catalog import Catalog, ImageRow, JobRow, SourceRow
from dino_index.errors import (
    CollectionNotFound,
    DinoSearchError,
    FolderRefused,
    JobConflict,
    JobNotFound,
    KeyRefused,
    ScopeMissing,
    SourceNotFound,
    TooManyJobs,
    UploadRefused,
)
from dino_search.api import job_process
from dino_search.api.access import AccessControl
from dino_search.api.job_process import JobTask
from dino_search.api.job_requests import JOB_REQUEST
from dino_search.api.job_runner import JobRunner
from dino_search.api.jobs import FILES, JobOptions, Jobs
from dino_search.api.keys import ApiKeys
from dino_search.api.middleware import MiddlewareOptions, add_middleware
from dino_search.api.routes import jobs as routes
from dino_search.collection import Collection
from sample_collections import jpeg, write_pictures

STATUS_OF = {
    JobNotFound: 404, CollectionNotFound: 404, SourceNotFound: 404, JobConflict: 409, TooManyJobs: 429,
    FolderRefused: 403, ScopeMissing: 403, UploadRefused: 422, KeyRefused: 401,
}  # fmt: skip


def make_app(jobs: Jobs) -> FastAPI:
    """The routes of jobs alone, with errors as the service answers them."""
    app = FastAPI()
    app.state.jobs = jobs
    app.state.access = AccessControl(ApiKeys(jobs.home), cache_s=0)
    app.include_router(routes.router)
    add_middleware(app, MiddlewareOptions())

    @app.exception_handler(DinoSearchError)
    async def problem(request: Request, error: DinoSearchError) -> JSONResponse:
        return JSONResponse({"type": error.code, "detail": str(error)}, STATUS_OF[type(error)])

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse({"type": "invalid", "detail": str(error)}, 422)

    return app


@dataclass(frozen=True)
class Service:
    """A running service of jobs. photos: the one folder that jobs may read."""

    home: Path
    photos: Path
    jobs: Jobs
    client: TestClient

    def ask(self, **request: Any) -> Any:
        return self.client.post("/jobs", json=request)

    def wait(self, answer: Any, *statuses: str) -> dict[str, Any]:
        """The job that was asked for, once it has ended, or has one of the statuses."""
        assert answer.status_code == 202, answer.text
        return wait_for(self.jobs, answer.json()["id"], *statuses)


def wait_for(jobs: Jobs, job_id: int, *statuses: str) -> dict[str, Any]:
    wanted = statuses or ("done", "failed", "cancelled")
    for _ in range(1200):
        if (job := jobs.get(job_id)).status in wanted:
            return job.to_json()
        time.sleep(0.05)
    raise AssertionError(f"still {job.to_json()}")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One for all tests of this module, which use collections of their own."""
    folder = tmp_path_factory.mktemp("service")
    photos = folder / "photos"
    write_pictures(photos, *(f"{name}/{number}.jpg" for name in ("cat", "dog") for number in range(4)))
    (photos / "cat" / "bad.jpg").write_bytes(jpeg(1)[:200])
    (photos / "dog" / "same.jpg").write_bytes((photos / "cat" / "0.jpg").read_bytes())
    jobs = Jobs(folder / "home", options=JobOptions(index_folders=[photos], poll_s=0.1, max_uploads=5))
    runner = JobRunner(jobs)
    runner.start()
    app = make_app(jobs)
    with TestClient(app) as client:
        yield Service(folder / "home", photos, jobs, client)
    runner.stop()
    app.state.access.close()


@pytest.fixture
def idle(tmp_path: Path) -> Iterator[Service]:
    """A service whose jobs stay in the queue."""
    photos = tmp_path / "photos"
    write_pictures(photos, "0.jpg")
    jobs = Jobs(tmp_path / "home", options=JobOptions(index_folders=[photos], max_queued=3, max_uploads=2))
    app = make_app(jobs)
    with TestClient(app) as client:
        yield Service(tmp_path / "home", photos, jobs, client)
    jobs.close()
    app.state.access.close()


# --- from end to end


@pytest.fixture(scope="module")
def indexed(service: Service) -> dict[str, Any]:
    """The job that has indexed the photos into `default`."""
    return service.wait(service.ask(kind="index", folders=[str(service.photos)], labels="folders"))


def test_an_index_job_does_what_the_command_does(service: Service, indexed: dict[str, Any]) -> None:
    bad = os.path.realpath(service.photos / "cat" / "bad.jpg")
    assert (indexed["status"], indexed["error"], indexed["files"]) == ("done", None, [])
    assert indexed["progress"] == {"done": 10, "total": 10, "failed": 1}
    result = indexed["result"]
    assert (result["added"], result["failed"], result["images"]) == (9, 1, 9)
    assert [(failure["path"], failure["code"]) for failure in indexed["failures"]] == [(bad, "truncated")]
    with Collection.open(home=service.home) as opened:
        assert (opened.info()["images"], opened.info()["labels"]) == (9, 2)
    again = service.wait(service.ask(kind="index", folders=[str(service.photos)]))
    assert (again["result"]["added"], again["result"]["skipped"], again["progress"]["failed"]) == (0, 9, 1)


def test_a_copies_job_leaves_a_report(service: Service, indexed: dict[str, Any]) -> None:
    job = service.wait(service.ask(kind="copies", folders=[str(service.photos / "dog")], copy_score=0.9, k=3, verify=1))
    assert job["status"] == "done", job["error"]
    assert (job["result"]["queries"], job["result"]["copy"], job["result"]["failed"]) == (5, 5, 0)
    assert [file["name"] for file in job["files"]] == list(FILES["copies"])
    for file in job["files"]:
        answer = service.client.get(file["url"])
        assert answer.status_code == 200
        assert answer.headers["content-disposition"].startswith("attachment")
    matches = service.client.get(f"/jobs/{job['id']}/files/matches.json").json()
    assert matches["counts"]["queries"] == 5


def test_a_duplicates_job_leaves_both_reports(service: Service, indexed: dict[str, Any]) -> None:
    job = service.wait(service.ask(kind="duplicates", copy_score=0.99))
    assert job["status"] == "done", job["error"]
    assert (job["result"]["groups"], job["result"]["spare_files"]) == (1, 1)
    groups = service.client.get(f"/jobs/{job['id']}/files/groups.csv").text
    assert "same.jpg" in groups
    assert {file["name"] for file in job["files"]} >= {"groups.html", "report.html"}
    assert service.client.delete(f"/jobs/{job['id']}").status_code == 204
    assert service.client.get(f"/jobs/{job['id']}").status_code == 404
    assert service.client.get(f"/jobs/{job['id']}/files/groups.csv").status_code == 404


def test_pictures_that_are_sent_along_are_indexed_from_the_home(service: Service) -> None:
    files = [("image", (name, jpeg(50 + number), "image/jpeg")) for number, name in enumerate(["a.jpg", "../../b.jpg"])]
    files.append(("image", ("bad.jpg", b"no picture", "image/jpeg")))
    answer = service.client.post("/jobs", data={"kind": "index", "collection": "sent"}, files=files)
    job = service.wait(answer)
    assert (job["status"], job["result"]["added"]) == ("done", 2)
    assert job["request"]["num_uploads"] == 3
    assert [Path(failure["path"]).name for failure in job["failures"]] == ["3-bad.jpg"]
    with Collection.open("sent", home=service.home) as opened:
        (source,) = opened.info()["sources"]
        found = opened.search(jpeg(51), k=1).results[0]
    assert Path(source).parent == service.home / "uploads"
    assert (Path(found.path).name, round(found.score, 3)) == ("2-b.jpg", 1.0)


def test_queries_that_are_sent_along_are_kept_no_longer_than_the_job(service: Service, indexed: dict[str, Any]) -> None:
    before = set((service.home / "uploads").glob("*"))
    picture = (service.photos / "cat" / "2.jpg").read_bytes()
    data = {"kind": "copies", "copy_score": "0.9", "k": "2", "verify": "0"}
    job = service.wait(service.client.post("/jobs", data=data, files={"image": ("q.jpg", picture, "image/jpeg")}))
    assert (job["status"], job["result"]["copy"]) == ("done", 1)
    assert set((service.home / "uploads").glob("*")) == before


def test_a_job_that_cannot_be_done_says_why(service: Service, tmp_path_factory: pytest.TempPathFactory) -> None:
    empty = service.photos / "empty"
    empty.mkdir(exist_ok=True)
    job = service.wait(service.ask(kind="index", collection="none", folders=[str(empty)]))
    assert (job["status"], job["error"]["code"]) == ("failed", "no_images_found")
    link = empty / "out"
    link.symlink_to(tmp_path_factory.mktemp("private"))
    job = service.wait(service.ask(kind="index", collection="none", folders=[str(empty)]))
    link.unlink()
    assert (job["status"], job["error"]["code"]) == ("failed", "folder_refused")


# --- what is asked for


@pytest.mark.parametrize(
    "request_body",
    [{}, {"kind": "pretrain"}, {"kind": "index", "folders": ["/a"], "unknown": 1}, {"kind": "index", "folders": "/a"},
     {"kind": "index"}, {"kind": "copies"}, {"kind": "copies", "folders": ["/a"], "k": 0}, {"kind": "index",
     "folders": [1]},
     {"kind": "duplicates", "folders": ["/a"]}, {"kind": "duplicates", "copy_score": 2}, {"kind": "duplicates",
     "keep": "all"},
     {"kind": "copies", "folders": ["/a"], "target_precision": 1}, {"kind": "index", "folders": ["/a"],
     "collection": ""},
     {"kind": "index", "folders": ["/a"], "labels": "/etc/passwd"}, {"kind": "index", "folders": ["/a"],
     "exclude": [""]}, {"kind": "copies", "folders": ["/a"], "k": True},
     {"kind": "index", "folders": ["/a"], "prune": 1}, [], "a"],
    ids=repr,
)  # fmt: skip
def test_requests_of_no_use_are_refused(idle: Service, request_body: Any) -> None:
    with closing(Catalog.open(idle.home, create=True)):  # type: ignore[type-var]
        pass
    answer = idle.client.post("/jobs", json=request_body)
    assert answer.status_code in (404, 422)
    assert answer.json()["type"] in ("invalid", "upload_refused", "collection_not_found")
    assert idle.jobs.listed() == ([], None)


def test_bodies_of_no_use_are_refused(idle: Service) -> None:
    as_json = {"content-type": "application/json"}
    for body in (b"", b"{", b"\xff", b"[" * 100_000):
        assert idle.client.post("/jobs", content=body, headers=as_json).status_code == 422
    assert idle.client.post("/jobs", content=b"a", headers={"content-type": "text/plain"}).status_code == 415
    picture = {"pictures": ("a.jpg", b"a", "image/jpeg")}
    assert idle.client.post("/jobs", data={"kind": "index"}, files=picture).status_code == 422
    too_many = [("image", (f"{number}.jpg", b"a", "image/jpeg")) for number in range(3)]
    assert idle.client.post("/jobs", data={"kind": "index"}, files=too_many).status_code == 422
    many_more = too_many * 5
    assert idle.client.post("/jobs", data={"kind": "index"}, files=many_more).status_code in (400, 422)
    assert not list((idle.home / "uploads").glob("*"))


@pytest.mark.parametrize("folder", ["/etc", "/", "{photos}/..", "{photos}/../home", "photos", "s3://a/b", "/photos\0"])
def test_folders_that_are_not_allowed_are_refused(idle: Service, folder: str) -> None:
    answer = idle.ask(kind="index", folders=[folder.replace("{photos}", str(idle.photos))])
    assert (answer.status_code, answer.json()["type"]) == (403, "folder_refused")


@pytest.mark.parametrize(
    "name",
    ["../../catalog.sqlite3", "..%2F..%2Fcatalog.sqlite3", "%2e%2e/%2e%2e/catalog.sqlite3", "catalog.sqlite3",
     "groups.csv",
     "matches.csv%00", "matches.csv/", ".", "/etc/passwd", "..\\..\\catalog.sqlite3", "x" * 65],
)  # fmt: skip
def test_only_files_of_the_report_are_given_out(service: Service, indexed: dict[str, Any], name: str) -> None:
    request = JOB_REQUEST.validate_python(
        {"kind": "copies", "folders": [str(service.photos / "dog")], "copy_score": 0.9}
    )
    job_id = service.jobs.submit(request).id
    answer = service.client.get(f"/jobs/{job_id}/files/{name}")
    assert answer.status_code in (404, 405, 422)
    assert b"SQLite" not in answer.content
    if service.jobs.get(job_id).status == "queued":
        service.jobs.cancel(job_id)


def test_no_more_jobs_wait_than_may(idle: Service) -> None:
    folders = [str(idle.photos)]
    assert [idle.ask(kind="index", folders=folders).status_code for _ in range(4)] == [202, 202, 202, 429]
    picture = {"image": ("a.jpg", jpeg(1), "image/jpeg")}
    assert idle.client.post("/jobs", data={"kind": "index"}, files=picture).status_code == 429
    assert not list((idle.home / "uploads").glob("*"))
    assert idle.client.post("/jobs/1/cancel").json()["status"] == "cancelled"
    assert idle.ask(kind="index", folders=folders).status_code == 202
    assert idle.jobs.counts() == {"queued": 3, "running": 0, "done": 0, "failed": 0, "cancelled": 1}


def test_jobs_are_listed_newest_first_page_by_page(idle: Service) -> None:
    for name in ("a", "b", "a"):
        idle.ask(kind="index", collection=name, folders=[str(idle.photos)])
    idle.client.post("/jobs/2/cancel")
    first = idle.client.get("/jobs?limit=2").json()
    second = idle.client.get(f"/jobs?limit=2&cursor={first['next_cursor']}").json()
    assert ([job["id"] for job in first["jobs"]], [job["id"] for job in second["jobs"]]) == ([3, 2], [1])
    assert second["next_cursor"] is None
    assert [job["id"] for job in idle.client.get("/jobs?status=cancelled").json()["jobs"]] == [2]
    assert [job["id"] for job in idle.client.get("/jobs?collection=a").json()["jobs"]] == [3, 1]
    assert "failures" not in first["jobs"][0]
    for query in ("limit=0", "limit=501", "cursor=0", "cursor=x", "status=lost", f"cursor={2**63}"):
        assert idle.client.get(f"/jobs?{query}").status_code == 422


def test_jobs_that_are_not_there_are_not_found(idle: Service) -> None:
    assert idle.client.get("/jobs").json() == {"jobs": [], "next_cursor": None}
    for method, path in (
        ("GET", "/jobs/1"),
        ("POST", "/jobs/1/cancel"),
        ("DELETE", "/jobs/1"),
        ("GET", "/jobs/1/files/a"),
    ):
        assert idle.client.request(method, path).status_code == 404
    assert idle.client.get("/jobs/0").status_code == 422
    assert idle.client.get(f"/jobs/{2**63}").status_code == 422


def test_a_job_in_another_state_is_a_conflict(idle: Service) -> None:
    idle.ask(kind="index", folders=[str(idle.photos)])
    assert idle.client.delete("/jobs/1").status_code == 409
    assert idle.client.post("/jobs/1/cancel").status_code == 202
    assert idle.client.post("/jobs/1/cancel").status_code == 409
    assert idle.client.delete("/jobs/1").status_code == 204


def test_uploads_of_a_job_that_never_ran_are_deleted(idle: Service) -> None:
    picture = {"image": ("a.jpg", jpeg(1), "image/jpeg")}
    assert idle.client.post("/jobs", data={"kind": "index"}, files=picture).status_code == 202
    assert len(list((idle.home / "uploads").glob("*/*"))) == 1
    idle.client.post("/jobs/1/cancel")
    assert not list((idle.home / "uploads").glob("*"))


def test_the_oldest_jobs_that_have_ended_are_forgotten(tmp_path: Path) -> None:
    with closing(Jobs(tmp_path / "home", options=JobOptions(max_ended=2))) as jobs:
        with jobs.door.created_catalog().writing() as session:
            for number, status in enumerate(["done", "queued", "failed", "running", "cancelled", "done"], 1):
                session.add(JobRow(kind="copies", collection="a", status=status, request={"report": f"r{number}"}))
        for number in range(1, 7):
            (jobs.home / "jobs" / f"r{number}").mkdir(parents=True)
        jobs.forget_oldest()
        assert [job.id for job in jobs.listed()[0]] == [6, 5, 4, 2]
        assert sorted(path.name for path in (jobs.home / "jobs").iterdir()) == ["r2", "r4", "r5", "r6"]


def test_parts_of_reports_go_with_the_end_of_their_job(idle: Service) -> None:
    job = idle.jobs.get(idle.ask(kind="index", folders=[str(idle.photos)]).json()["id"])
    reports = idle.home / "jobs"
    for name in (f".{job.request['report']}.0a1b2c3d.partial", ".another.0a1b2c3d.partial"):
        (reports / name).mkdir(parents=True)
    idle.jobs.cancel(job.id)
    assert [path.name for path in reports.iterdir()] == [".another.0a1b2c3d.partial"]


@pytest.mark.parametrize("source", ["", "uploads", "uploads/{token}", "uploads/{token}/deep"])
def test_uploads_stay_while_a_collection_has_an_image_of_them(idle: Service, source: str) -> None:
    picture = {"image": ("a.jpg", jpeg(1), "image/jpeg")}
    idle.client.post("/jobs", data={"kind": "index"}, files=picture)
    catalog = idle.jobs.door.created_catalog()
    fill(catalog, 0)
    token = idle.jobs.get(1).request["uploads"]
    folder = idle.home / "uploads" / token
    place = idle.home / source.format(token=token)
    below = os.path.relpath(folder / "deep", place) if "deep" not in source else "."
    with catalog.writing() as session:
        session.get_one(SourceRow, 1).path = str(place)
        session.add(an_image(f"{below}/1-a.jpg"))
        if "token" not in source:
            session.add(an_image("another.jpg"))
    idle.jobs.cancel(1)
    assert folder.is_dir()
    with catalog.writing() as session:
        session.execute(delete(ImageRow).where(ImageRow.path.contains("1-a.jpg")))
    idle.jobs.tidy(idle.jobs.get(1))
    assert not folder.exists()


def test_jobs_ask_for_scopes_and_collections(idle: Service) -> None:
    with closing(ApiKeys(idle.home)) as keys:
        reader = {"X-API-Key": keys.add("r", scope="read")[1]}
        writer = {"X-API-Key": keys.add("w", scope="write")[1]}
        bound = {"X-API-Key": keys.add("b", scope="write", collections=["a"])[1]}
    asked = {"kind": "index", "folders": [str(idle.photos)]}
    assert [
        idle.client.post("/jobs", json=asked | {"collection": name}, headers=headers).status_code
        for name, headers in (("a", {}), ("a", reader), ("a", writer), ("a", bound), ("b", bound), ("b", writer))
    ] == [401, 403, 202, 202, 403, 202]
    assert [job["id"] for job in idle.client.get("/jobs", headers=reader).json()["jobs"]] == [3, 2, 1]
    assert [job["id"] for job in idle.client.get("/jobs", headers=bound).json()["jobs"]] == [2, 1]
    statuses = {
        path: idle.client.get(path, headers=bound).status_code for path in ("/jobs/1", "/jobs/3", "/jobs?collection=b")
    }
    assert list(statuses.values()) == [200, 403, 403]
    assert idle.client.post("/jobs/3/cancel", headers=bound).status_code == 403
    assert idle.client.post("/jobs/1/cancel", headers=reader).status_code == 403
    assert idle.client.delete("/jobs/3", headers=bound).status_code == 403


# --- cancelled, stopped, killed


NUM_MANY = 320


@pytest.fixture(scope="module")
def many_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So many pictures that indexing them takes some seconds."""
    folder = tmp_path_factory.mktemp("many")
    for number in range(16):
        picture = jpeg(number)
        for copy in range(NUM_MANY // 16):  # other bytes after the picture's end make other images
            (folder / f"{number}-{copy}.jpg").write_bytes(picture + bytes([copy]))
    return folder


SERVE = """
import sys, time
from dino_search.api.job_requests import JOB_REQUEST
from dino_search.api.job_runner import JobRunner
from dino_search.api.jobs import JobOptions, Jobs
jobs = Jobs(sys.argv[1], options=JobOptions(index_folders=[sys.argv[2]], poll_s=0.05))
for kind in sys.argv[3:]:
    asked = {"kind": kind, "folders": [sys.argv[2]]}
    jobs.submit(JOB_REQUEST.validate_python(asked))
runner = JobRunner(jobs)
runner.start()
print("ready", flush=True)
try:
    time.sleep(600)
except KeyboardInterrupt:
    runner.stop()
"""


@pytest.fixture
def serve(home: Path, many_photos: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a service of jobs in a process, which asks for jobs of the given kinds."""
    started: list[subprocess.Popen[str]] = []

    def start(*kinds: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", SERVE, str(home), str(many_photos), *kinds]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def wait_until(is_so: Callable[[], bool], what: str) -> None:
    for _ in range(1200):
        if is_so():
            return
        time.sleep(0.05)
    raise AssertionError(f"in vain: {what}")


def children_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return list(psutil.Process(process.pid).children(recursive=True))


def test_a_job_is_cancelled_with_what_it_recorded_kept(serve: Callable[..., subprocess.Popen[str]], home: Path) -> None:
    process = serve("index", "index")
    with closing(Jobs(home)) as jobs:
        wait_until(lambda: jobs.get(1).done > 0, "progress")
        assert jobs.get(2).status == "queued", "one at a time"
        assert jobs.cancel(2).status == "cancelled"
        assert (jobs.cancel(1).status, jobs.get(1).cancel_asked) == ("running", True)
        job = wait_for(jobs, 1)
    assert (job["status"], job["error"], job["result"]) == ("cancelled", None, None)
    assert 0 < job["progress"]["done"] < job["progress"]["total"] == NUM_MANY
    with Collection.open(home=home) as opened:
        assert 0 < opened.info()["images"] < NUM_MANY
    wait_until(lambda: not children_of(process), "the end of its process")


def test_an_index_job_goes_on_after_its_service_was_killed(
    serve: Callable[..., subprocess.Popen[str]], home: Path
) -> None:
    process = serve("index")
    with closing(Jobs(home)) as jobs:
        wait_until(lambda: jobs.get(1).done > 0, "progress")
        (child,) = children_of(process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        child.wait(timeout=10)  # ends with its service
        assert jobs.get(1).status == "running"
        with Collection.open(home=home) as opened:
            recorded = opened.info()["images"]
        assert 0 < recorded < NUM_MANY
        second = serve()
        job = wait_for(jobs, 1)
        assert (job["status"], job["result"]["added"] + recorded) == ("done", NUM_MANY)
        assert job["result"]["skipped"] == recorded
        second.send_signal(signal.SIGINT)
        second.wait(30)


@pytest.mark.slow
def test_a_job_that_cannot_go_on_says_that_its_service_ended(
    serve: Callable[..., subprocess.Popen[str]], home: Path, many_photos: Path
) -> None:
    with Collection.open(home=home) as opened:
        opened.index(sorted(many_photos.glob("1-*.jpg")))
    process = serve("copies")
    with closing(Jobs(home)) as jobs:
        wait_until(lambda: jobs.get(1).status == "running", "its begin")
        process.send_signal(signal.SIGKILL)
        process.wait()
        serve()
        job = wait_for(jobs, 1)
    assert (job["status"], job["error"]["code"]) == ("failed", "interrupted")
    assert "ask for it again" in job["error"]["message"]


@pytest.mark.slow
def test_a_service_that_is_stopped_puts_its_job_back(serve: Callable[..., subprocess.Popen[str]], home: Path) -> None:
    process = serve("index")
    with closing(Jobs(home)) as jobs:
        wait_until(lambda: jobs.get(1).done > 0, "progress")
        (child,) = children_of(process)
        process.send_signal(signal.SIGINT)
        process.wait(30)
        assert not child.is_running()
        assert jobs.get(1).status == "queued"
        with closing(Catalog.open(home)) as catalog, catalog.reading() as session:  # type: ignore[union-attr, type-var]
            row = session.get_one(JobRow, 1)
            assert (row.attempts, row.owner) == (0, None)


@pytest.mark.slow
def test_a_job_whose_process_is_killed_has_failed(serve: Callable[..., subprocess.Popen[str]], home: Path) -> None:
    process = serve("index")
    with closing(Jobs(home)) as jobs:
        wait_until(lambda: jobs.get(1).done > 0, "progress")
        (child,) = children_of(process)
        child.kill()
        job = wait_for(jobs, 1)
    assert (job["status"], job["error"]["code"]) == ("failed", "job_died")
    assert "signal 9" in job["error"]["message"]


@pytest.mark.slow
def test_a_job_whose_process_somebody_else_stops_begins_again(
    serve: Callable[..., subprocess.Popen[str]], home: Path
) -> None:
    process = serve("index")
    with closing(Jobs(home)) as jobs:
        wait_until(lambda: jobs.get(1).done > 0, "progress")
        (child,) = children_of(process)
        child.terminate()
        job = wait_for(jobs, 1)
    assert (job["status"], job["result"]["images"]) == ("done", NUM_MANY)
    assert job["result"]["skipped"] > 0


def test_a_job_that_is_told_to_end_while_it_starts_does_nothing(home: Path, photos: Path) -> None:
    task = JobTask(
        job_id=1, kind="index", home=str(home), database=None, collection="default", options={}, inputs=[str(photos)],
        allowed_folders=[str(photos)], report=str(home / "report"), max_pixels=10**6, max_bytes=10**6,
    )  # fmt: skip
    job = job_process._Job(task, job_process._Teller(io.StringIO()))
    job.is_stopping = True
    with pytest.raises(job_process._Stopped):
        job.run()
    assert not home.exists()


def test_the_routes_are_described(idle: Service) -> None:
    described = idle.client.get("/openapi.json").json()
    asked = described["paths"]["/jobs"]["post"]
    assert set(asked["requestBody"]["content"]) == {"application/json", "multipart/form-data"}
    kinds = [
        form["properties"]["kind"]["const"]
        for form in asked["requestBody"]["content"]["application/json"]["schema"]["oneOf"]
    ]
    assert kinds == ["index", "copies", "duplicates"]
    schemes = described["components"]["securitySchemes"]
    assert {scheme["type"] for scheme in schemes.values()} == {"http", "apiKey"}
    for path, operations in described["paths"].items():
        assert all(operation["security"] for operation in operations.values()), path


@pytest.mark.parametrize(
    ("kind", "owner", "silent_s", "attempts", "status"),
    [("index", "elsewhere/1/1.00/a", 10, 1, "running"), ("index", "elsewhere/1/1.00/a", 70, 1, "queued"),
     ("copies", "elsewhere/1/1.00/a", 70, 1, "failed"), ("index", "elsewhere/1/1.00/a", 70, 3, "failed"),
     ("index", "{node}/{pid}/1.00/a", 0, 1, "queued"), ("index", "{node}/4000000/1.00/a", 0, 1, "queued"),
     ("index", "{node}/{pid}/{begun}/a", 0, 1, "running"), ("copies", None, 70, 1, "failed")],
)  # fmt: skip
def test_jobs_are_taken_over_from_owners_that_are_gone_and_no_others(
    idle: Service, kind: str, owner: str | None, silent_s: int, attempts: int, status: str
) -> None:
    runner = JobRunner(idle.jobs)
    node, pid, begun, _ = runner.owner.split("/")
    heard = datetime.now(UTC) - timedelta(seconds=silent_s)
    with idle.jobs.door.created_catalog().writing() as session:
        if owner is not None:
            owner = owner.format(node=node, pid=pid, begun=begun)
        session.add(
            JobRow(kind=kind, collection="a", status="running", request={"report": "1"}, owner=owner,
                   heartbeat_at=heard, attempts=attempts)
        )  # fmt: skip
    runner._take_over(idle.jobs.door.created_catalog())
    job = idle.jobs.get(1)
    assert job.status == status
    assert (job.error_code == "interrupted") == (status == "failed")


def test_waiting_jobs_survive_trouble_with_the_catalog(idle: Service, caplog: pytest.LogCaptureFixture) -> None:
    idle.ask(kind="index", folders=["/"])
    runner = JobRunner(idle.jobs)
    database = idle.home / "catalog.sqlite3"
    idle.jobs.door.created_catalog()
    idle.jobs.close()
    content = database.read_bytes()
    database.write_bytes(b"x" * 1000)
    for _ in range(3):
        runner._guarded(runner._round)
    assert caplog.text.count("jobs have to wait") == 1
    database.write_bytes(content)
    runner._guarded(runner._round)
    assert runner._trouble == ""


def test_nothing_secret_is_on_the_command_line_of_a_job(
    serve: Callable[..., subprocess.Popen[str]], home: Path
) -> None:
    process = serve("index")
    wait_until(lambda: bool(children_of(process)), "its process")
    (child,) = children_of(process)
    assert child.cmdline()[1:] == ["-m", "dino_search.api.job_process"]
    assert str(home) not in json.dumps(child.cmdline())
