"""`dino-search serve` in a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from dino_index.errors import ServiceProblem, ServiceUnreachable
from dino_search.client import Client


@dataclass(frozen=True)
class Served:
    """A process of `dino-search serve`."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def end(self, number: int = signal.SIGTERM) -> tuple[int, bytes]:
        """Its exit code, and what it wrote."""
        self.process.send_signal(number)
        return self.process.wait(timeout=60), self.log.read_bytes()


Serve = Callable[..., Served]


def start_service(started: ExitStack, folder: Path, **settings: object) -> Served:
    """Starts the command on the test's home, settings as the environment has them; ready when it returns.

    started: ends it. folder: for its log.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    names = {f"DINO_SEARCH_{name.upper()}": str(value) for name, value in settings.items()}
    # Into a file: a pipe that nobody reads would hold up who writes to it.
    log = folder / f"serve-{port}.log"
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "dino_search", "serve", "--port", str(port)],
            env=os.environ | names, stderr=file,
        )  # fmt: skip
    started.enter_context(process)
    started.callback(process.kill)
    served = Served(process, port, log)
    with Client(served.url, timeout_s=10) as client:
        for _ in range(1200):
            with suppress(ServiceProblem, ServiceUnreachable):
                client.ready()
                return served
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
    raise AssertionError("the service did not get ready")
