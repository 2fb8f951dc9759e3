"""A small server that speaks as much of the hub's protocol as fetching a file takes, on this machine, in a thread."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"

Files = dict[str, dict[str, bytes]]


class Hub:
    """Repositories with files, what was asked, and how the server behaves."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self.asked: list[str] = []
        """Method and path of each request, in order."""
        self.agents: set[str] = set()
        self.status = 200
        """Another one is the answer to everything."""
        self.body_ends_after: int | None = None
        """Bytes of a download after which the connection is cut."""
        self.pauses_after: int | None = None
        """Bytes of a download after which nothing more comes, for as long as the test takes."""
        self.chunk_pause_s = 0.0
        """Between chunks of 1000 bytes."""
        self.gated = False
        self.stopped = threading.Event()
        self.address = ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def _answer(self, *, with_body: bool) -> None:
        hub = self.hub
        hub.asked.append(f"{self.command} {self.path}")
        hub.agents.add(self.headers.get("User-Agent", ""))
        if hub.status != 200:
            return self._refuse(hub.status, {})
        repository, _, rest = self.path.strip("/").partition("/resolve/")
        name = rest.partition("/")[2]
        if repository not in hub.files:
            return self._refuse(401, {"X-Error-Code": "RepoNotFound"})
        if hub.gated:
            return self._refuse(403, {"X-Error-Code": "GatedRepo"})
        content = hub.files[repository].get(name)
        if content is None:
            return self._refuse(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self._send(content)
        return None

    def _refuse(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": "0"}).items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, content: bytes) -> None:
        hub = self.hub
        for start in range(0, len(content), 1000):
            if hub.body_ends_after is not None and start >= hub.body_ends_after:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            if hub.pauses_after is not None and start >= hub.pauses_after:
                hub.stopped.wait()
                return
            try:
                self.wfile.write(content[start : start + 1000])
            except OSError:  # the client has gone
                return
            if hub.chunk_pause_s:
                time.sleep(hub.chunk_pause_s)


@contextmanager
def serving(files: Files) -> Iterator[Hub]:
    """A hub with these files by repository and name, at `hub.address`, until the block ends."""
    hub = Hub(files)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def silent_hub() -> Iterator[str]:
    """The address of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def wait_until(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
