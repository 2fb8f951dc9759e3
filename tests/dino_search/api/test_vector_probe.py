"""The probe of the vectors' server never hangs with it, and sees it go and come back."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from databases import created_catalog
from dino_index.errors import VectorStoreUnavailable
from dino_search.api import vector_probe
from dino_search.api.vector_probe import VectorProbe
from live_servers import waits_until
from running_service import is_problem, running_service


class Store:
    """A server's store that answers when it may, and then what it is told to."""

    place = "milvus+http://somewhere:19530"

    def __init__(self) -> None:
        self.may_answer = threading.Event()
        self.error: Exception | None = None
        self.num_asked = 0

    def connect(self, *, patience_s: float) -> None:
        self.num_asked += 1
        assert patience_s == 0
        assert self.may_answer.wait(60)
        if self.error is not None:
            raise self.error


def test_a_server_that_hangs_fails_or_is_back_is_seen(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, catalog = Store(), created_catalog(home)
    monkeypatch.setattr(vector_probe, "server_store_of", lambda _: store)
    monkeypatch.setattr(vector_probe, "_MAX_WAIT_S", 0.05)
    probe = VectorProbe()
    for _ in range(3):
        assert "somewhere:19530 has not answered" in (probe.problem(catalog) or "")
    assert store.num_asked == 1
    store.error = VectorStoreUnavailable("it is away")
    store.may_answer.set()
    assert waits_until(lambda: probe.problem(catalog) == "it is away")
    monkeypatch.setattr(vector_probe, "_FRESH_FOR_S", 0.0)
    store.error = None
    assert waits_until(lambda: probe.problem(catalog) is None)
    monkeypatch.setattr(vector_probe, "_FRESH_FOR_S", 60.0)
    num_asked = store.num_asked
    assert probe.problem(catalog) is None
    assert store.num_asked == num_asked
    probe.close()


def test_vectors_in_the_home_are_never_away(home: Path) -> None:
    assert VectorProbe().problem(created_catalog(home)) is None


def test_a_service_without_its_vectors_is_not_ready(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    created_catalog(home)
    with running_service(home) as service:

        def away(probe: Any, catalog: Any) -> str:
            return "the vectors are away"

        monkeypatch.setattr(VectorProbe, "problem", away)
        answer = service.http.get("/readyz")
        assert is_problem(answer, 503, "not-ready")
        assert answer.json()["reasons"] == ["the vectors are away"]
