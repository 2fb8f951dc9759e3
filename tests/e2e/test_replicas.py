"""Two services on one catalog in PostgreSQL, behind the nginx of `deploy/`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from sqlalchemy import select

from deploy_files import nginx_configuration, program
from dino_index.catalog import Catalog, JobRow
from dino_search import Collection
from dino_search.client import Client
from live_servers import waits_until
from postgres_server import Catalogs
from sample_collections import jpeg, write_pictures
from served_command import Serve, Served

pytestmark = [pytest.mark.postgres, pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")]

NUM_IMAGES = 24
NUM_CLIENTS = 6
NUM_JOBS = 4


@pytest.fixture
def replicas(
    serve: Serve, postgres: Catalogs, home: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Served, Served]:
    monkeypatch.setenv("DINO_SEARCH_DATABASE", postgres.url_of(home))
    write_pictures(tmp_path / "photos", *(f"{number}.jpg" for number in range(NUM_IMAGES)))
    with Collection.open(home=home, model=tiny_model) as collection:
        assert collection.index(tmp_path / "photos").added == NUM_IMAGES
    return serve(index_folders=tmp_path / "photos"), serve(index_folders=tmp_path / "photos")


@pytest.fixture
def proxied(replicas: tuple[Served, Served], tmp_path: Path) -> Iterator[Callable[[], Client]]:
    """Makes clients of both services at one address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = "{}:{}".format(*free.getsockname())
    services = [f"127.0.0.1:{replica.port}" for replica in replicas]
    configuration = nginx_configuration(tmp_path, tls=address, services=services)
    site = tmp_path / "site.conf"
    # All clients are one to it.
    site.write_text(site.read_text().replace("rate=20r/s", "rate=10000r/s"))
    command: list[str | Path] = [
        program("nginx"),
        "-p",
        tmp_path,
        "-c",
        configuration,
        "-e",
        "stderr",
        "-g",
        "daemon off;",
    ]
    with subprocess.Popen(command) as nginx:

        def client() -> Client:
            return Client(f"https://{address}", transport=httpx.HTTPTransport(verify=False))

        def answers() -> bool:
            with closing(socket.socket()) as probe:
                return probe.connect_ex(("127.0.0.1", int(address.rpartition(":")[2]))) == 0

        assert waits_until(answers)
        yield client
        nginx.terminate()


def test_a_service_that_is_killed_under_load_fails_no_request(
    replicas: tuple[Served, Served], proxied: Callable[[], Client]
) -> None:
    begun, done = threading.Barrier(NUM_CLIENTS + 1), threading.Event()

    def search(number: int) -> int:
        with proxied() as client:
            assert client.search(jpeg(number), k=1).results[0].score > 0.99
            begun.wait()
            count = 0
            while not done.is_set():
                wanted = (number + count) % NUM_IMAGES
                assert client.search(jpeg(wanted), k=1).results[0].path.endswith(f"/{wanted}.jpg")
                count += 1
            return count

    with ThreadPoolExecutor(NUM_CLIENTS) as threads:
        running = [threads.submit(search, number) for number in range(NUM_CLIENTS)]
        begun.wait()
        time.sleep(1)
        replicas[0].end(signal.SIGKILL)
        time.sleep(2)
        done.set()
        assert all(each.result() for each in running)


def test_what_one_service_is_told_the_other_knows(
    replicas: tuple[Served, Served], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Client(replicas[0].url) as first, Client(replicas[1].url) as second:
        first.put_verdict(1, 2, "not_copy")
        assert [verdict.decision for verdict in second.verdicts()] == ["not_copy"]
        uploaded = second.upload("default", [jpeg(500)]).images[0].image_id
        assert uploaded is not None
        assert first.search(jpeg(500), k=1).results[0].image_id == uploaded
        assert first.thumbnail(uploaded)
        second.remove_image("default", uploaded)
        assert first.search(jpeg(500), k=1).results[0].image_id != uploaded


def test_each_job_is_run_by_one_service(
    replicas: tuple[Served, Served], postgres: Catalogs, home: Path, tmp_path: Path
) -> None:
    folders = [tmp_path / "photos" / str(number) for number in range(NUM_JOBS)]
    for number, folder in enumerate(folders):
        write_pictures(folder, "a.jpg", seed=1000 + number)
    with Client(replicas[0].url) as first, Client(replicas[1].url) as second:
        jobs = [
            (first, second)[number % 2].submit_job("index", folders=[str(folder)]).id
            for number, folder in enumerate(folders)
        ]
        ended = [second.wait_for_job(job, timeout_s=120) for job in jobs]
        assert len(list(first.images("default"))) == NUM_IMAGES + NUM_JOBS
    assert {(job.status, job.error) for job in ended} == {("done", None)}
    catalog = Catalog.open(home, url=postgres.url_of(home))
    assert catalog is not None
    with closing(catalog), catalog.reading() as session:
        assert session.scalars(select(JobRow.attempts)).all() == [1] * NUM_JOBS
