"""Apps in a real server on loopback, and clients that speak to it byte by byte."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn


@contextmanager
def serving(app: Any, **options: Any) -> Iterator[int]:
    """The app in a server of its own, options as `uvicorn.Config` has them; its port."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", **options))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield int(listening.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(10)


def waits_until(condition: Callable[[], bool], within_s: float = 20) -> bool:
    """Whether the condition comes true in that time."""
    until = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


def talk(port: int, *parts: bytes, pause_s: float = 0.0) -> bytes:
    """What the server answers to these bytes, up to the end of the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        # A server that has answered may have closed the connection before all was sent.
        with suppress(BrokenPipeError, ConnectionResetError):
            for number, part in enumerate(parts):
                time.sleep(pause_s if number else 0)
                connection.sendall(part)
        answer = b""
        with suppress(ConnectionResetError):
            while received := connection.recv(65536):
                answer += received
        return answer
