"""`dino-search serve` in a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from dino_index.errors import ServiceProblem, ServiceUnreachable
from dino_search.client import Client
from forked_commands import CommandLine, Running


@dataclass(frozen=True)
class Served:
    """A process of `dino-search serve`."""

    running: Running
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def end(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        """Its exit code, and what it wrote."""
        self.running.send(number)
        ended = self.running.wait(timeout_s=60)
        return ended.exit_code, ended.stderr


Serve = Callable[..., Served]


def start_service(started: ExitStack, folder: Path, **settings: object) -> Served:
    """Starts the command on the test's home, settings as the environment has them; ready when it returns.

    started: ends it. folder: for what it writes.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    commands = CommandLine(folder / f"serve-{port}")
    started.callback(commands.end)
    with patch.dict(os.environ, {f"DINO_SEARCH_{name.upper()}": str(value) for name, value in settings.items()}):
        running = commands.start("serve", "--port", port)
    served = Served(running, port)
    with Client(served.url, timeout_s=10) as client:
        for _ in range(1200):
            with suppress(ServiceProblem, ServiceUnreachable):
                client.ready()
                return served
            assert running.is_alive(), running.stderr()
            time.sleep(0.05)
    raise AssertionError("the service did not get ready")
