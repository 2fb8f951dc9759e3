"""Commands and the service with vectors in Milvus: what a user does, and what happens when the server goes."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

import dino_index.milvus_server
import dino_index.milvus_store
from commands_in_process import Command
from dino_index.collections import CollectionInfo
from dino_index.milvus_store import MilvusStore
from live_servers import waits_until
from milvus_server import Server
from running_service import is_problem, running_service
from sample_collections import write_pictures

pytestmark = pytest.mark.milvus


@pytest.fixture
def filled(
    dino_search: Command, photos: Path, tiny_model: Path, milvus: Server, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The folder of pictures, indexed, with their vectors in Milvus from the environment on."""
    monkeypatch.setenv("DINO_SEARCH_VECTOR_STORE", milvus.url)
    assert dino_search("index", photos, "--model", tiny_model, "--labels", "folders").code == 0
    return photos


def test_every_command_works_on_vectors_in_milvus(
    dino_search: Command, filled: Path, milvus: Server, tiny_model: Path, home: Path
) -> None:
    picture = sorted(filled.rglob("*.jpg"))[0]
    assert dino_search("search", picture, "--json").json()["results"][0]["path"] == str(picture)
    info = dino_search("info", "--json").json()
    assert (info["vector_store"], info["images_in_snapshot"]) == (milvus.url, info["images"])
    assert not list(home.rglob("*.faiss"))
    label = info["labels"] and dino_search("search", picture, "--json").json()["results"][0]["label"]
    found = dino_search("search", picture, "--filter", f"label = {label}", "--json").json()["results"]
    assert {result["label"] for result in found} == {label}
    (new,) = write_pictures(filled, "another.jpg", seed=77)
    assert dino_search("index", filled).code == 0
    assert dino_search("search", new, "--json").json()["results"][0]["path"] == str(new)
    assert dino_search("remove", picture).code == 0
    assert str(picture) not in {r["path"] for r in dino_search("search", picture, "--json").json()["results"]}
    for command in (("compact",), ("verify",), ("remove", "--purge")):
        assert dino_search(*command).code == 0
    assert len(milvus.client().list_collections()) == 1


def test_the_option_goes_before_the_environment(dino_search: Command, filled: Path) -> None:
    ended = dino_search("--vector-store", "milvus+http://127.0.0.1:9?x=1", "info")
    assert ended.code == 1
    assert "the URL of the vector store makes no sense" in ended.err


def test_verify_finds_what_the_server_lacks_and_mends_it(dino_search: Command, filled: Path, milvus: Server) -> None:
    milvus.empty()
    ended = dino_search("verify")
    assert ended.code == 1
    assert "has lost those of the collection" in ended.out
    assert dino_search("verify", "--repair").code == 0
    assert dino_search("verify").code == 0


@pytest.mark.slow
def test_the_service_outlasts_a_server_that_is_killed(
    filled: Path, milvus: Server, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (dino_index.milvus_server, dino_index.milvus_store):
        monkeypatch.setattr(module, "BRIEFLY_S", 1.0)
    picture = sorted(filled.rglob("*.jpg"))[0].read_bytes()
    with running_service(home, vector_store=milvus.url) as service:

        def search() -> httpx.Response:
            return service.http.post("/search", files={"image": picture})

        assert search().status_code == 200
        milvus.kill()
        answer = search()
        assert is_problem(answer, 503, "vector-store-unavailable")
        assert int(answer.headers["Retry-After"]) > 0
        assert service.http.get("/collections").status_code == 200
        milvus.start()
        assert waits_until(lambda: search().status_code == 200, 60)


@pytest.mark.slow
def test_a_server_that_is_killed_amid_indexing_loses_nothing(
    dino_search: Command, photos: Path, tiny_model: Path, milvus: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the first batch, back while the run goes on: the run ends well, and both sides agree."""
    monkeypatch.setenv("DINO_SEARCH_VECTOR_STORE", milvus.url)
    monkeypatch.setattr("dino_index.recording._IMAGES_A_TRANSACTION", 8)
    monkeypatch.setattr("dino_index.recording._MAX_TRANSACTION_GROWTH", 1)
    write_pictures(photos, *(f"more/{number}.jpg" for number in range(60)), seed=100)
    whole = MilvusStore.keep_up
    calls = []

    def keep_up(store: MilvusStore, collection: CollectionInfo) -> None:
        calls.append(1)
        if len(calls) == 2:
            milvus.kill()
        whole(store, collection)
        if len(calls) == 4:
            milvus.start()

    monkeypatch.setattr(MilvusStore, "keep_up", keep_up)
    ended = dino_search("index", photos, "--model", tiny_model, "--json")
    assert ended.code == 0
    assert len(calls) >= 5
    picture = photos / "more" / "59.jpg"
    assert dino_search("search", picture, "--json").json()["results"][0]["path"] == str(picture)
    verified = dino_search("verify", "--json").json()
    assert (verified["problems"], verified["images"]) == ([], ended.json()["images"])
