"""Jobs in either database: taken by one service only, and done there."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

import databases
from dino_search.api.job_requests import JOB_REQUEST
from dino_search.api.job_runner import JobRunner
from dino_search.api.jobs import Job, JobOptions, Jobs
from sample_collections import write_pictures

pytestmark = pytest.mark.usefixtures("database")


@pytest.fixture
def jobs(home: Path, photos: Path) -> Iterator[Jobs]:
    options = JobOptions(index_folders=[photos], poll_s=0.05)
    with closing(Jobs(home, databases.url_of(home), options)) as jobs:
        yield jobs


def submit(jobs: Jobs, photos: Path, collection: str = "default") -> Job:
    asked = {"kind": "index", "folders": [str(photos)], "collection": collection}
    return jobs.submit(JOB_REQUEST.validate_python(asked))


def test_each_job_is_taken_by_one_service(jobs: Jobs, photos: Path) -> None:
    wanted = [submit(jobs, photos).id for _ in range(12)]
    taken: list[int] = []

    def take() -> None:
        with closing(Jobs(jobs.home, jobs.door.database)) as own:
            runner = JobRunner(own)
            while (job := runner._claim(own.door.created_catalog())) is not None:
                taken.append(job.id)

    threads = [threading.Thread(target=take) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(taken) == wanted
    assert jobs.counts()["running"] == 12


def test_an_id_is_not_given_to_another_job(jobs: Jobs, photos: Path) -> None:
    first = submit(jobs, photos)
    jobs.cancel(first.id)
    jobs.forget(first.id)
    assert submit(jobs, photos).id == first.id + 1


def test_a_job_is_done_in_the_database_it_is_kept_in(jobs: Jobs, photos: Path, tmp_path: Path) -> None:
    write_pictures(photos, "more.jpg", seed=20)
    job = submit(jobs, photos)
    runner = JobRunner(jobs)
    runner.start()
    try:
        for _ in range(1200):
            if (now := jobs.get(job.id)).status not in ("queued", "running"):
                break
            time.sleep(0.05)
    finally:
        runner.stop()
    assert (now.status, now.error_message, now.done, now.total) == ("done", None, 9, 9)
    assert now.result is not None
    assert now.result["images"] == 9
