"""A service in operation: full, left by its clients, its catalog changed or gone, told to end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from dino_search.api.batching import ForwardPasses
from forked_commands import CommandLine
from live_servers import waits_until
from running_service import RunningService, is_problem, running_service
from sample_collections import index_files, jpeg, write_pictures


@contextmanager
def held_passes(service: RunningService, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Semaphore]:
    """Forward passes of the service begin only when the semaphore is released, and all at the end."""
    (passes,) = service.engine._passes.values()
    may_go = threading.Semaphore(0)
    inner = passes.backbone.embed

    def embed(pixels: Any) -> Any:
        assert may_go.acquire(timeout=20)
        return inner(pixels)

    monkeypatch.setattr(passes.backbone, "embed", embed)
    try:
        yield may_go
    finally:
        may_go.release(1000)


def passes_of(service: RunningService) -> ForwardPasses:
    (passes,) = service.engine._passes.values()
    return passes


def search(service: RunningService, seed: int) -> httpx.Response:
    return httpx.post(f"{service.url}/search", files={"image": jpeg(seed)}, timeout=60, trust_env=False)


def test_concurrent_searches_answer_as_single_ones(service: RunningService) -> None:
    alone = [search(service, seed).json() for seed in range(200, 216)]
    with ThreadPoolExecutor(16) as clients:
        together = list(clients.map(lambda seed: search(service, seed).json(), range(200, 216)))
    for one, other in zip(alone, together, strict=True):
        assert [each["image_id"] for each in one["results"]][:1] == [each["image_id"] for each in other["results"]][:1]
        scores = [[each["score"] for each in answer["results"]] for answer in (one, other)]
        assert scores[0] == pytest.approx(scores[1], abs=0.01)  # batches of another size round otherwise


def test_a_full_service_refuses_and_recovers(
    home: Path, photos: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index_files(home, tiny_model, photos)
    with (
        running_service(home, queue_size=3) as service,
        held_passes(service, monkeypatch) as may_go,
        ThreadPoolExecutor(8) as clients,
    ):
        waiting = [clients.submit(search, service, seed) for seed in range(300, 303)]
        assert waits_until(lambda: service.engine.admission.num_taken == 3)
        refused = search(service, 303)
        # Of one address, this client holds all places.
        assert is_problem(refused, 429, "too-many-requests")
        assert int(refused.headers["retry-after"]) >= 1
        assert service.http.get("/readyz").status_code == 200
        assert "dino_search_rejected_total 1.0" in service.http.get("/metrics").text
        assert "dino_search_queue_depth 3.0" in service.http.get("/metrics").text
        may_go.release(1000)
        assert [each.result().status_code for each in waiting] == [200] * 3
        assert search(service, 304).status_code == 200
        assert service.engine.admission.num_taken == 0


def test_a_client_that_goes_leaves_the_queue(own_service: RunningService, monkeypatch: pytest.MonkeyPatch) -> None:
    with held_passes(own_service, monkeypatch) as may_go, ThreadPoolExecutor(2) as clients:
        first = clients.submit(search, own_service, 310)
        assert waits_until(lambda: passes_of(own_service)._running == 1)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{own_service.url}/search", files={"image": jpeg(311)}, timeout=0.5, trust_env=False)
        assert waits_until(lambda: passes_of(own_service).num_waiting == 0)
        assert waits_until(lambda: own_service.engine.admission.num_taken == 1)
        may_go.release(1)
        assert first.result().status_code == 200
        assert 'operation="search",status="499"' in own_service.http.get("/metrics").text


@pytest.mark.parametrize("path", ["/search", "/jobs", "/collections/default/images"])
@pytest.mark.parametrize(
    ("media_type", "begin"),
    [
        ("application/json", b'{"image_base64": "'),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\nabc',
        ),
    ],
    ids=["json", "form"],
)
def test_a_client_that_goes_while_it_sends_is_no_failure_of_the_service(
    service: RunningService, caplog: pytest.LogCaptureFixture, path: str, media_type: str, begin: bytes
) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: {media_type}\r\nContent-Length: 1000\r\n\r\n"
    assert waits_until(lambda: service.engine.num_in_flight == 0)
    with socket.create_connection(("127.0.0.1", httpx.URL(service.url).port or 0)) as connection:
        connection.sendall(head.encode() + begin)
        assert waits_until(lambda: service.engine.num_in_flight == 1)
    assert waits_until(lambda: service.engine.num_in_flight == 0)
    logged = [record.message for record in caplog.records if record.name == "dino_search.api.problems"]
    assert logged == []
    assert 'reason="internal"' not in service.http.get("/metrics").text


def test_a_request_that_takes_too_long_is_given_up(
    home: Path, photos: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index_files(home, tiny_model, photos)
    with running_service(home, request_timeout_s=0.3) as service:
        with held_passes(service, monkeypatch):
            assert is_problem(search(service, 320), 503, "request-timed-out")
            assert waits_until(lambda: service.engine.admission.num_taken == 0)
        assert search(service, 321).status_code == 200


def test_what_another_process_indexes_is_found_by_the_next_search(
    own_service: RunningService, tmp_path: Path, tiny_model: Path
) -> None:
    home = own_service.engine.settings.home
    write_pictures(tmp_path / "more", "new.jpg", seed=330)
    commands = CommandLine(tmp_path / "commands")
    assert commands.run("index", tmp_path / "more", "--home", home).exit_code == 0
    found = search(own_service, 330).json()["results"][0]
    assert (found["score"], Path(found["path"]).name) == (1.0, "new.jpg")
    assert commands.run("remove", tmp_path / "more", "--home", home).exit_code == 0
    assert "new.jpg" not in {Path(each["path"]).name for each in search(own_service, 330).json()["results"]}
    assert commands.run("compact", "--home", home).exit_code == 0
    assert len(search(own_service, 330).json()["results"]) == 8


def test_a_model_that_reindex_gives_the_collection_is_used_by_the_next_search(
    own_service: RunningService, tmp_path: Path, dino_search: Any
) -> None:
    from sample_collections import save_tiny_model

    other = save_tiny_model(tmp_path / "other.safetensors", seed=1)
    before = search(own_service, 331).json()
    dino_search("reindex", "--model", other, "--home", own_service.engine.settings.home)
    after = search(own_service, 331).json()
    assert (before["model"] != after["model"], after["model"]) == (True, str(other))
    assert len(after["results"]) == 8


def test_a_catalog_that_is_gone_is_a_problem_and_serves_again_when_it_is_back(own_service: RunningService) -> None:
    home = own_service.engine.settings.home
    away = home.with_name("away")
    assert search(own_service, 340).status_code == 200
    home.rename(away)
    for answer in (search(own_service, 340), own_service.http.get("/collections")):
        assert is_problem(answer, 503, "catalog-unavailable")
        assert "is gone" in answer.json()["detail"]
    not_ready = own_service.http.get("/readyz")
    assert is_problem(not_ready, 503, "not-ready")
    assert "is gone" in not_ready.json()["reasons"][0]
    assert own_service.http.get("/livez").status_code == 200
    away.rename(home)
    assert search(own_service, 340).status_code == 200
    assert own_service.http.get("/readyz").status_code == 200


def test_another_catalog_in_the_place_of_the_first_is_served(
    own_service: RunningService, photos: Path, tmp_path: Path, tiny_model: Path
) -> None:
    home = own_service.engine.settings.home
    assert len(search(own_service, 341).json()["results"]) == 8
    index_files(tmp_path / "second", tiny_model, photos / "dog")
    for file in home.glob("catalog.sqlite3*"):
        file.unlink()
    for file in (tmp_path / "second").glob("catalog.sqlite3*"):
        os.replace(file, home / file.name)
    assert len(search(own_service, 341).json()["results"]) == 4


def test_a_snapshot_that_is_gone_or_damaged_is_rebuilt_in_memory(
    home: Path, photos: Path, tiny_model: Path, dino_search: Any
) -> None:
    index_files(home, tiny_model, photos)
    dino_search("compact")
    (snapshot,) = home.rglob("*.faiss")
    with running_service(home) as service:
        snapshot.unlink()
        assert len(search(service, 342).json()["results"]) == 8
        index_files(home, tiny_model, *write_pictures(photos, "one-more.jpg", seed=343))
        assert search(service, 343).json()["results"][0]["score"] == 1.0


def test_readiness_names_reasons_while_starting(home: Path, photos: Path, tiny_model: Path) -> None:
    index_files(home, tiny_model, photos)
    with running_service(home) as service:
        service.engine.is_warm = False
        answer = service.http.get("/readyz")
        assert is_problem(answer, 503, "not-ready")
        assert "starting" in answer.json()["reasons"][0]
        service.engine.is_warm = True
        assert service.http.get("/readyz").json() == {"status": "ready", "collections": ["default"]}


def test_an_empty_home_is_ready(home: Path) -> None:
    with running_service(home) as service:
        assert service.http.get("/readyz").json() == {"status": "ready", "collections": []}
    assert not home.exists()


def test_a_draining_service_finishes_what_it_has_and_takes_no_more(
    home: Path, photos: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index_files(home, tiny_model, photos)
    with (
        running_service(home, drain_s=20) as service,
        held_passes(service, monkeypatch) as may_go,
        ThreadPoolExecutor(1) as clients,
    ):
        running = clients.submit(search, service, 350)
        assert waits_until(lambda: passes_of(service)._running == 1)
        service.server.drain()
        assert is_problem(service.http.get("/readyz"), 503, "not-ready")
        refused = search(service, 351)
        assert is_problem(refused, 503, "not-ready")
        assert refused.headers["connection"] == "close"
        may_go.release(1000)
        assert running.result().status_code == 200
        assert waits_until(lambda: service.server.should_exit)


def test_sigterm_ends_the_command_well(home: Path, photos: Path, tiny_model: Path) -> None:
    index_files(home, tiny_model, photos)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "dino_search", "serve", "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)

    def is_ready() -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/readyz", trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    assert waits_until(is_ready, 60)
    process.send_signal(signal.SIGTERM)
    _, written = process.communicate(timeout=30)
    assert (process.returncode, b"Traceback" in written) == (0, False)


def test_metrics_have_each_stage_and_collection(service: RunningService) -> None:
    search(service, 360)
    text = service.http.get("/metrics").text
    for stage in ("decode", "queue", "forward", "search", "catalog"):
        (line,) = (line for line in text.splitlines() if f'stage_seconds_count{{stage="{stage}"}}' in line)
        assert float(line.split()[1]) > 0, stage
    assert 'dino_search_index_images{collection="default"} 8.0' in text
    assert 'dino_search_index_age_seconds{collection="default"}' in text
    assert 'dino_search_requests_total{operation="search",status="200"}' in text
    assert "dino_search_batch_size_count" in text
    opened = service.http.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert opened.text.endswith("# EOF\n")


def test_failures_are_counted_by_reason(service: RunningService) -> None:
    service.http.post("/search", files={"image": b"words"})
    assert 'dino_search_failures_total{reason="image-not-an-image"}' in service.http.get("/metrics").text
