"""A service that far more is asked of than it can do: refusals alone, bounded memory, and itself again afterwards."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from sample_collections import index_files, jpeg, write_pictures

SECONDS = 60
NUM_CLIENTS = 24
QUEUE_SIZE = 4
"""Far fewer than ask, so that most are refused."""
MB = 2**20


@contextmanager
def served(home: Path) -> Iterator[tuple[str, psutil.Process]]:
    """(URL, process) of a service that is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "dino_search", "serve", "--home", str(home), "--port", str(port)]
    environment = os.environ | {"DINO_SEARCH_QUEUE_SIZE": str(QUEUE_SIZE), "DINO_SEARCH_LOG_LEVEL": "error"}
    process = subprocess.Popen(command, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 60
        while not is_ready(url):
            assert time.monotonic() < until, "the service did not start"
            assert process.poll() is None
            time.sleep(0.1)
        yield url, psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def ask(url: str, seconds: float, client: int) -> Counter[int]:
    """Statuses of the searches that one client sends as fast as it is answered."""
    counts: Counter[int] = Counter()
    picture = jpeg(1000 + client)
    until = time.monotonic() + seconds
    with httpx.Client(base_url=url, timeout=30, trust_env=False) as http:
        while time.monotonic() < until:
            counts[http.post("/search", files={"image": picture}).status_code] += 1
    return counts


def ask_together(url: str, seconds: float) -> Counter[int]:
    with ThreadPoolExecutor(NUM_CLIENTS) as threads:
        return sum(threads.map(lambda client: ask(url, seconds, client), range(NUM_CLIENTS)), Counter())


@pytest.mark.slow
def test_an_overloaded_service_refuses_stays_within_its_memory_and_is_itself_again_afterwards(
    tmp_path: Path, tiny_model: Path
) -> None:
    write_pictures(tmp_path / "photos", *(f"{number}.jpg" for number in range(20)))
    index_files(tmp_path / "home", tiny_model, tmp_path / "photos")
    with served(tmp_path / "home") as (url, process):
        ask_together(url, 5)
        warm_mb, warm_files = process.memory_info().rss / MB, process.num_fds()
        levels_mb: list[float] = []
        is_over = threading.Event()

        def watch() -> None:
            while not is_over.wait(0.5):
                levels_mb.append(process.memory_info().rss / MB)

        watching = threading.Thread(target=watch)
        watching.start()
        counts = ask_together(url, SECONDS)
        is_over.set()
        watching.join()
        assert counts.keys() <= {200, 429, 503}, counts
        assert counts[200] > 0
        assert counts[429] + counts[503] > counts[200] / 10, f"this was no overload: {counts}"
        assert max(levels_mb) < 1.05 * warm_mb, f"{warm_mb:.0f} MB after warm-up, {max(levels_mb):.0f} later"
        assert ask(url, 2, 0).keys() == {200}
        assert process.num_fds() <= warm_files + 4
