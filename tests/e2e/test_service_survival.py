"""What a served collection survives: slow clients, kills during a job, signals. In a process of `dino-search serve`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest

from bad_files import encoded, picture
from dino_index.errors import ServiceProblem, ServiceUnreachable
from dino_search.client import Client
from sample_collections import index_files, jpeg, write_pictures
from served_command import Serve

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")

NUM_SLOW_CLIENTS = 150
NUM_JOB_IMAGES = 320


def sound(home: Path) -> bool:
    """Whether `dino-search verify` finds nothing wrong."""
    command = [sys.executable, "-m", "dino_search", "verify", "--home", str(home)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return True


def a_search(length: int) -> bytes:
    """The head of a search by a picture in JSON of so many bytes."""
    return b"POST /search HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % length


@pytest.mark.slow
def test_slow_clients_keep_nobody_from_being_answered(
    serve: Serve, home: Path, tmp_path: Path, tiny_model: Path
) -> None:
    write_pictures(tmp_path / "photos", *(f"{number}.jpg" for number in range(4)))
    index_files(home, tiny_model, tmp_path / "photos")
    served = serve(body_timeout_s=3)
    large = encoded(picture(1200, 900, seed=1), "PNG")
    asked_for_much = a_search(len(b'{"image_id": 1}')) + b'{"image_id": 1}'
    kinds = [
        b"",  # says nothing
        b"POST /search HT",  # half a line
        a_search(len(large)) + b'{"image_base64": "',  # and no more of the body
        asked_for_much * 50,  # asks again and again, and reads nothing
    ]
    stopped = threading.Event()
    with ExitStack() as open_connections, Client(served.url, timeout_s=30, retries=0) as client:
        connections = [open_connections.enter_context(served.connect()) for _ in range(NUM_SLOW_CLIENTS)]
        for number, connection in enumerate(connections):
            connection.sendall(kinds[number % len(kinds)])

        def trickle() -> None:
            while not stopped.wait(0.2):
                for number, connection in enumerate(connections):
                    if number % len(kinds) in (1, 2):
                        with suppress(OSError):
                            connection.send(b"A")

        trickling = threading.Thread(target=trickle)
        trickling.start()
        try:
            took_s = []
            until = time.monotonic() + 4  # beyond the time that a request may take to arrive
            while time.monotonic() < until:
                begun = time.monotonic()
                with suppress(ServiceProblem):  # busy is an answer
                    assert client.search(jpeg(2), k=1).results[0].score > 0.99
                client.ready()
                took_s.append(time.monotonic() - begun)
        finally:
            stopped.set()
            trickling.join()
        assert sorted(took_s)[len(took_s) // 2] < 1
        # Those that let it wait were closed; it has room again.
        closed = sum(is_closed(connection) for number, connection in enumerate(connections) if number % len(kinds) < 3)
        assert closed >= NUM_SLOW_CLIENTS // 2
    with Client(served.url) as client:
        assert client.search(3, k=1).results[0].image_id == 3
    code, written = served.end()
    assert (code, "Traceback" in written) == (0, False)


def is_closed(connection: socket.socket) -> bool:
    connection.settimeout(0.05)
    try:
        while connection.recv(65536):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


def test_sigterm_lets_requests_in_flight_end(serve: Serve, home: Path, tmp_path: Path, tiny_model: Path) -> None:
    write_pictures(tmp_path / "photos", "0.jpg")
    index_files(home, tiny_model, tmp_path / "photos")
    served = serve(drain_s=20)
    slow = encoded(picture(2000, 1500, seed=1), "PNG", compress_level=1)
    with Client(served.url, retries=0) as client, ThreadPoolExecutor(4) as threads:
        running = [threads.submit(client.search, slow) for _ in range(4)]
        with httpx.Client(base_url=served.url, trust_env=False) as http:
            for _ in range(500):
                # Decoding begins when a place in the queue is taken.
                if "dino_search_queue_depth 0.0" not in http.get("/metrics").text:
                    break
                time.sleep(0.005)
        code, written = served.end()
        answers = [each.result() for each in running if each.exception() is None]
        refused = [each.exception() for each in running if each.exception() is not None]
    assert (code, "Traceback" in written) == (0, False)
    assert answers, refused
    # What had not arrived yet was refused in words, or met a closed door.
    for each in refused:
        assert isinstance(each, ServiceUnreachable) or (isinstance(each, ServiceProblem) and each.code == "not_ready")


@pytest.mark.slow
def test_a_killed_service_loses_nothing_and_its_job_goes_on(
    serve: Serve, home: Path, tmp_path: Path, tiny_model: Path
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(16):
        data = jpeg(number)
        for copy in range(NUM_JOB_IMAGES // 16):
            (photos / f"{number}-{copy}.jpg").write_bytes(data + bytes([copy]))
    write_pictures(tmp_path / "first", "a.jpg", seed=900)
    index_files(home, tiny_model, tmp_path / "first")
    served = serve(index_folders=photos)
    with Client(served.url) as client:
        uploaded = client.upload("default", [jpeg(901)]).images[0].image_id
        client.put_verdict(1, uploaded or 0, "not_copy")
        job = client.submit_job("index", folders=[str(photos)])
        while client.job(job.id).progress.done == 0:
            time.sleep(0.02)
        before = client.job(job.id)
    served.end(signal.SIGKILL)
    assert before.status == "running"
    assert sound(home)
    with Client(serve(index_folders=photos).url) as client:
        ended = client.wait_for_job(job.id, timeout_s=120)
        assert (ended.status, ended.error) == ("done", None)
        images = list(client.images("default"))
        assert len(images) == NUM_JOB_IMAGES + 2
        assert {image.status for image in images} == {"ok"}
        assert client.search(jpeg(901), k=1).results[0].image_id == uploaded
        assert [verdict.decision for verdict in client.verdicts()] == ["not_copy"]
    assert sound(home)


@pytest.mark.slow
@pytest.mark.parametrize("round_number", range(3))
def test_a_killed_service_keeps_what_it_said_it_had(
    serve: Serve, home: Path, tmp_path: Path, tiny_model: Path, round_number: int
) -> None:
    write_pictures(tmp_path / "first", "a.jpg", seed=900)
    index_files(home, tiny_model, tmp_path / "first")
    served = serve()
    said: list[int] = []
    with Client(served.url, retries=0) as client:

        def send(number: int) -> None:
            with suppress(ServiceUnreachable, ServiceProblem):
                for image in client.upload("default", [jpeg(1000 + number)]).images:
                    said.append(image.image_id or 0)

        with ThreadPoolExecutor(4) as threads:
            for number in range(60):
                threads.submit(send, number)
            while len(said) < 5 + 10 * round_number:
                time.sleep(0.005)
            served.end(signal.SIGKILL)
    assert sound(home)
    with Client(serve().url) as client:
        kept = {image.image_id: image for image in client.images("default")}
        assert set(said) <= kept.keys()
        for image_id in said:
            assert client.thumbnail(image_id)
