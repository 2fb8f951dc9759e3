"""Every test is repeatable and alone: seeded, offline, with a home folder of its own."""

from __future__ import annotations

import gc
import ipaddress
import os
import random
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

import databases
import milvus_server
from postgres_server import URL_VARIABLE, Catalogs, Server, find_server_binaries
from sample_collections import save_tiny_model

# Read when huggingface_hub is imported, and inherited by the commands that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"

# A shell starts background jobs with Ctrl-C ignored, and so would be the commands that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


# Half a minute to minutes each.
_LONG_FILES = {
    "test_survival.py", "test_learning.py", "test_replicas.py", "test_milvus_store.py", "test_milvus_copies.py",
    "test_vector_index.py", "test_jobs.py", "test_models_command.py", "test_reindex_command.py",
    "test_copies_command.py", "test_web_page.py", "test_pretrain_command.py", "test_service_operation.py",
    "test_openapi_conformance.py", "test_ray_engine.py", "test_packaging.py",
}  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of what takes seconds in Milvus, the quick tests run one kind and seed, beside SQLite.

    Where several processes share the files, the long ones begin, so that all processes end at about the same time.
    """
    for item in items:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        is_further = given.get("database") == "postgresql" or given.get("seed", 0) > 0 or given.get("kind") == "coarse"
        if given.get("vector_store") == "milvus" and is_further:
            item.add_marker("slow")
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: item.path.name not in _LONG_FILES)


def pytest_collection_finish() -> None:
    """What was imported and collected up to here stays: to look through it for garbage is a twentieth of the time."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """The same random numbers in every run, whichever tests ran before."""
    random.seed(0)
    np.random.seed(0)
    # A torch imported only later starts from a fixed seed of its own.
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def _catalogs_closed() -> Iterator[None]:
    """Catalogs that the test opened are closed at its end, before their database goes."""
    yield
    while databases.opened:
        databases.opened.pop().close()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder for the test, which DINO_SEARCH_HOME names; commands that it starts inherit it."""
    folder = tmp_path / "home"
    monkeypatch.setenv("DINO_SEARCH_HOME", str(folder))
    monkeypatch.delenv("DINO_SEARCH_DATABASE", raising=False)
    monkeypatch.delenv("DINO_SEARCH_VECTOR_STORE", raising=False)
    return folder


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Server]:
    """A PostgreSQL server of these tests' own, to be restarted; it runs at the begin and at the end of a test."""
    server = Server(find_server_binaries())
    yield server
    server.delete()


@pytest.fixture(scope="session")
def postgres_url(request: pytest.FixtureRequest) -> str:
    """A PostgreSQL database with the right to make schemas: the given one, else of the tests' own server."""
    given = os.environ.get(URL_VARIABLE)
    return given or str(request.getfixturevalue("postgres_server").url)


@pytest.fixture
def postgres(postgres_url: str) -> Iterator[Catalogs]:
    """Catalogs on PostgreSQL, an empty one for each home that is asked for."""
    catalogs = Catalogs(postgres_url)
    yield catalogs
    catalogs.drop()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def database(request: pytest.FixtureRequest, home: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The test runs twice: with its catalogs in SQLite, and in PostgreSQL. A module asks for it by `usefixtures`."""
    if request.param == "postgresql":
        catalogs: Catalogs = request.getfixturevalue("postgres")
        monkeypatch.setattr(databases, "url_of", catalogs.url_of)
        monkeypatch.setenv("DINO_SEARCH_DATABASE", catalogs.url_of(home))
    return str(request.param)


@pytest.fixture(scope="session")
def the_milvus_server() -> Iterator[milvus_server.Server]:
    server = milvus_server.Server(milvus_server.find_server_program())
    yield server
    server.delete()


@pytest.fixture
def milvus(the_milvus_server: milvus_server.Server) -> Iterator[milvus_server.Server]:
    """A Milvus server of these tests' own, empty, to be restarted; it runs at the begin and at the end of a test."""
    yield the_milvus_server
    the_milvus_server.empty()


@pytest.fixture
def milvus_store(milvus: milvus_server.Server, monkeypatch: pytest.MonkeyPatch) -> milvus_server.Server:
    """The same server, which the catalogs that tests open keep their vectors in."""
    monkeypatch.setattr(databases, "vectors_url", milvus.url)
    return milvus


@pytest.fixture(params=["snapshots", pytest.param("milvus", marks=pytest.mark.milvus)])
def vector_store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The test runs twice: with vectors in snapshots, and in Milvus. A module asks for it by `usefixtures`."""
    if request.param == "milvus":
        server: milvus_server.Server = request.getfixturevalue("milvus_store")
        monkeypatch.setenv("DINO_SEARCH_VECTOR_STORE", server.url)
    return str(request.param)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights file that loads and embeds in milliseconds, for tests that are not about likeness."""
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny.safetensors")


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """Connections from the test process reach this machine only."""

    class LocalSocket(socket.socket):
        def connect(self, address: Any) -> None:
            self._refuse_remote(address)
            super().connect(address)

        def connect_ex(self, address: Any) -> int:
            self._refuse_remote(address)
            return super().connect_ex(address)

        def _refuse_remote(self, address: Any) -> None:
            if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_loopback(str(address[0])):
                self.close()
                # Not an OSError: code that copes with a lost connection would hide it.
                raise RuntimeError(f"a test tried to reach {address[0]}: tests run offline")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "socket", LocalSocket)
        yield


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"
