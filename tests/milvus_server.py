"""A Milvus server for tests, in a network of its own: it listens on all addresses, with everything open."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from pymilvus import MilvusClient

from dino_index.milvus_server import import_client
from requirements import require

ENVIRONMENT_VARIABLE = "DINO_SEARCH_TEST_MILVUS"
_DEFAULT_ENVIRONMENT = Path(__file__).parents[1] / ".milvus"
_MAX_START_S = 120.0
# As a server that is asked often would be set: tests make many small collections, one after the other.
_QUICK = {
    "queryCoord.checkInterval": 100, "queryCoord.distPullInterval": 100, "queryCoord.checkHandoffInterval": 200,
    "proxy.timeTickInterval": 50, "common.session.ttl": 3, "log.level": "error",
}  # fmt: skip
_numbers = itertools.count()


class Server:
    """A server whose data lies in a temporary folder, and which only this machine can reach."""

    def __init__(self, program: Path, folder: Path | None = None) -> None:
        """folder: where its data lies, else a temporary one."""
        self._program = program
        self._is_temporary = folder is None
        self._folder = folder or Path(tempfile.mkdtemp(prefix="dino-search-milvus-"))
        self._process: subprocess.Popen[bytes] | None = None
        self._network = _Network()
        import_client()  # quiet from here on
        self.start()

    @property
    def url(self) -> str:
        return f"milvus+http://{self._network.address}:19530"

    def start(self) -> None:
        settings = [part for name, value in _QUICK.items() for part in ("--extra-config", f"{name}={value}")]
        with open(self._folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                [*self._network.enter, self._program, "--data", self._folder, "--etcd-log-level", "error", *settings],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        end = time.monotonic() + _MAX_START_S
        while True:
            try:
                self.client().list_collections(timeout=2)
                return
            except Exception:
                is_starting = time.monotonic() < end and self._process.poll() is None
                assert is_starting, (self._folder / "log").read_text()
                time.sleep(0.2)

    def client(self) -> MilvusClient:
        return MilvusClient(self.url.removeprefix("milvus+"), timeout=10)

    def empty(self) -> None:
        """Drops everything that tests left behind."""
        client = self.client()
        for name in client.list_collections(timeout=10):
            client.drop_collection(name, timeout=10)

    def kill(self) -> None:
        """Ends the server at once, as a crash does."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def cut(self) -> None:
        """From here on packets to and from the server vanish; connections stay open and hang."""
        self._network.carry(False)

    def mend(self) -> None:
        self._network.carry(True)

    def delete(self) -> None:
        self.kill()
        self._network.delete()
        if self._is_temporary:
            shutil.rmtree(self._folder)


class _Network:
    """A network namespace with one address, which this machine has the only way to."""

    def __init__(self) -> None:
        # One of 16,384 nets of two addresses, by process: tests may run side by side.
        number = next(_numbers)
        net = 4 * ((os.getpid() + 8191 * number) % 16384)
        self.address, ours = (f"10.231.{net // 256}.{net % 256 + last}" for last in (2, 1))
        self._name = f"dino{os.getpid()}{chr(ord('a') + number)}"
        self._end = end = f"{self._name}-s"
        self.enter = ["ip", "netns", "exec", self._name]
        _run("ip", "netns", "add", self._name)
        _run("ip", "link", "add", self._name, "type", "veth", "peer", "name", end)
        _run("ip", "link", "set", end, "netns", self._name)
        _run("ip", "addr", "add", f"{ours}/30", "dev", self._name)
        _run("ip", "link", "set", self._name, "up")
        _run(*self.enter, "ip", "addr", "add", f"{self.address}/30", "dev", end)
        for name in (end, "lo"):
            _run(*self.enter, "ip", "link", "set", name, "up")

    def carry(self, on: bool) -> None:
        _run(*self.enter, "ip", "link", "set", self._end, "up" if on else "down")

    def delete(self) -> None:
        _run("ip", "netns", "delete", self._name)


def find_server_program() -> Path:
    """`milvus-server` of the environment that was named, else of `.milvus`. Skips where none can be run."""
    environment = Path(os.environ.get(ENVIRONMENT_VARIABLE) or _DEFAULT_ENVIRONMENT)
    program = environment / "bin" / "milvus-server"
    require(
        program.is_file(), f"no Milvus server: install PyPI's milvus into {environment}, or set {ENVIRONMENT_VARIABLE}"
    )
    require(
        _can_separate(), "a Milvus server listens on all addresses, and needs a network of its own: ip netns, as root"
    )
    return program


def _can_separate() -> bool:
    name = f"try{os.getpid()}"  # names of links have 15 letters at most
    try:
        _run("ip", "netns", "add", name)
        _run("ip", "link", "add", name, "type", "veth", "peer", "name", f"{name}-s")
        _run("ip", "link", "delete", name)
    except (OSError, subprocess.CalledProcessError):
        return False
    _run("ip", "netns", "delete", name)
    return True


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
