"""Commands and the service with vectors in Milvus: what a user does, and what happens when the server goes."""

from __future__ import annotations

import re
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path

import httpx
import pytest

import dino_index.milvus_server
import dino_index.milvus_store
import sabotage
from commands_in_process import Command
from dino_index.collections import CollectionInfo
from dino_index.milvus_store import MilvusStore
from dino_search import diagnosis
from forked_commands import CommandLine
from live_servers import waits_until
from milvus_server import Server, find_server_program
from running_service import is_problem, running_service
from sample_collections import save_tiny_model, write_pictures
from small_disks import fill, mounted

pytestmark = pytest.mark.milvus

_CUT_FOR_S = 30


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
    assert dino_search("compact").out == f"8 images of 'default' at {milvus.url}\n"
    for command in (("verify",), ("remove", "--purge")):
        assert dino_search(*command).code == 0
    assert len(milvus.client().list_collections()) == 1


def test_copies_are_looked_for_in_milvus(
    dino_search: Command, filled: Path, milvus: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copies(*options: object) -> list[list[str]]:
        """Of each query, the references, best first."""
        ended = dino_search("copies", *sorted(filled.rglob("*.jpg")), "-k", 4, "--copy-score", 0.5, "--json", *options)
        assert ended.code == 0, ended.err
        return [[match["reference"] for match in query["matches"]] for query in ended.json()["queries"]]

    copies()
    assert sorted(counts(milvus).values()) == [8, 8]
    shutil.copy(sorted(filled.rglob("*.jpg"))[0], filled / "same.jpg")
    assert dino_search("index", filled).code == 0
    assert sorted(counts(milvus).values()) == [9, 9]
    found = copies()
    assert len(found) == 9
    assert {len(matches) for matches in found} == {4}
    plain = copies("--no-whitening")
    assert sorted(counts(milvus).values()) == [9, 9]
    # The same catalog searched in memory.
    monkeypatch.delenv("DINO_SEARCH_VECTOR_STORE")
    assert copies() == found
    assert copies("--no-whitening") == plain
    monkeypatch.setenv("DINO_SEARCH_VECTOR_STORE", milvus.url)
    milvus.empty()
    ended = dino_search("verify")
    assert ended.code == 1
    assert "has lost those of the collection" in ended.out
    assert copies() == found
    assert dino_search("verify", "--repair").code == 0
    assert dino_search("verify").code == 0


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


def counts(server: Server) -> dict[str, int]:
    """By name, how many vectors the server has in each of its collections."""
    client = server.client()
    return {
        name: client.query(name, filter="", output_fields=["count(*)"], consistency_level="Strong")[0]["count(*)"]
        for name in client.list_collections()
    }


def test_a_newer_schema_keeps_every_command_off_the_server(
    dino_search: Command, filled: Path, milvus: Server, home: Path
) -> None:
    def exchange_schema(revision: str) -> str:
        with closing(sqlite3.connect(home / "catalog.sqlite3")) as connection, connection:
            (before,) = connection.execute("SELECT version_num FROM alembic_version").fetchone()
            connection.execute("UPDATE alembic_version SET version_num = ?", (revision,))
        return str(before)

    before, picture = counts(milvus), sorted(filled.rglob("*.jpg"))[0]
    own = exchange_schema("9999")
    write_pictures(filled, "another.jpg", seed=77)
    for command in (("index", filled), ("search", picture), ("verify", "--repair"), ("remove", picture), ("compact",)):
        ended = dino_search(*command)
        assert (ended.code, ended.out) == (1, "")
        assert "update dino-search" in ended.err.splitlines()[-1]
    (filled / "another.jpg").unlink()
    exchange_schema(own)
    assert counts(milvus) == before
    assert list(before.values()) == [8]
    assert dino_search("verify").code == 0


def test_doctor_tells_of_the_server_and_of_what_it_lacks(
    filled: Path, milvus: Server, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (check,) = diagnosis._vector_store(home)
    assert check.status == "ok"
    assert re.fullmatch(
        rf"{re.escape(milvus.url)}, Milvus v?\d+\.\d+\.\d+\S*, has the vectors of 1 of 1 collections", check.found
    )
    milvus.empty()
    (check,) = diagnosis._vector_store(home)
    assert check.status == "warning"
    assert "0 of 1 collections (not of default)" in check.found
    assert "verify --repair" in check.advice
    monkeypatch.setenv("DINO_SEARCH_VECTOR_STORE", "milvus+http://127.0.0.1:9")
    away = {check.name: check for check in diagnosis.diagnose(home)}["vector store"]
    assert away.status == "problem"
    assert "milvus+http://127.0.0.1:9 does not answer" in away.found


@pytest.mark.slow
def test_reindex_stores_the_new_vectors_and_drops_the_old(
    dino_search: Command, filled: Path, milvus: Server, tmp_path: Path
) -> None:
    (before,) = counts(milvus)
    other = save_tiny_model(tmp_path / "other.safetensors", seed=1)
    assert dino_search("reindex", "--model", other).code == 0
    assert list(counts(milvus).values()) == [8]
    assert before not in counts(milvus)
    assert_each_picture_finds_itself(dino_search, filled)
    assert dino_search("verify").code == 0


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[CommandLine]:
    commands = CommandLine(tmp_path / "output")
    yield commands
    commands.end()


@pytest.mark.slow
@pytest.mark.parametrize(
    "function",
    [
        "dino_index.milvus_store:drop_vectors", "dino_index.milvus_store:create_vectors",
        "dino_index.milvus_store:upsert_vectors", "dino_index.milvus_store:server_time",
        "dino_index.reindexing:drop_unneeded_embeddings",
    ],
)  # fmt: skip
def test_a_reindex_that_was_killed_is_finished_by_the_next(
    commands: CommandLine, dino_search: Command, filled: Path, milvus: Server, tmp_path: Path, function: str
) -> None:
    (before,) = counts(milvus)
    reindex = ("reindex", "--model", save_tiny_model(tmp_path / "other.safetensors", seed=1))
    assert commands.run(*reindex, prepare=partial(sabotage.die_before, function)).exit_code == 137
    assert dino_search(*reindex).code == 0
    assert_each_picture_finds_itself(dino_search, filled)
    assert dino_search("verify").code == 0
    assert before not in counts(milvus)
    assert dino_search("info", "--json").json()["images_in_snapshot"] == 8


def assert_each_picture_finds_itself(dino_search: Command, folder: Path) -> None:
    pictures = sorted(folder.rglob("*.jpg"))
    found = [dino_search("search", picture, "--json").json()["results"][0] for picture in pictures]
    assert [(result["path"], result["score"]) for result in found] == [(str(picture), 1.0) for picture in pictures]


@pytest.mark.slow
def test_the_service_outlasts_a_network_that_is_cut(filled: Path, milvus: Server, home: Path) -> None:
    picture = sorted(filled.rglob("*.jpg"))[0].read_bytes()
    with running_service(home, vector_store=milvus.url) as service, ThreadPoolExecutor(6) as clients:

        def search() -> httpx.Response:
            return service.http.post("/search", files={"image": picture})

        def assert_refused_soon(answer: httpx.Response, within_s: float) -> None:
            assert is_problem(answer, 503, "vector-store-unavailable")
            assert int(answer.headers["Retry-After"]) > 0
            assert answer.elapsed.total_seconds() < within_s

        assert search().status_code == 200
        milvus.cut()
        mended_at = time.monotonic() + _CUT_FOR_S
        try:
            hanging = [clients.submit(search) for _ in range(6)]
            num_reads = 0
            while not all(each.done() for each in hanging):
                read = service.http.get("/collections")
                assert (read.status_code, read.elapsed.total_seconds() < 2) == (200, True)
                probe = service.http.get("/readyz")
                assert probe.elapsed.total_seconds() < 3
                num_reads += 1
            assert num_reads > 3
            for each in hanging:
                assert_refused_soon(each.result(), 20)
            while time.monotonic() < mended_at:
                assert_refused_soon(search(), 12)
                not_ready = service.http.get("/readyz")
                assert is_problem(not_ready, 503, "not-ready")
                assert milvus.url in not_ready.json()["reasons"][0]
                time.sleep(0.5)
        finally:
            milvus.mend()
        assert waits_until(lambda: search().status_code == 200, 15)
        assert waits_until(lambda: service.http.get("/readyz").status_code == 200, 10)


@pytest.fixture
def many_photos(photos: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """68 pictures, of which a run records eight in a transaction."""
    monkeypatch.setattr("dino_index.recording._IMAGES_A_TRANSACTION", 8)
    monkeypatch.setattr("dino_index.recording._MAX_TRANSACTION_GROWTH", 1)
    write_pictures(photos, *(f"more/{number}.jpg" for number in range(60)), seed=100)
    return photos


@pytest.mark.slow
def test_a_network_that_is_cut_amid_indexing_loses_nothing(
    dino_search: Command, many_photos: Path, tiny_model: Path, milvus: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DINO_SEARCH_VECTOR_STORE", milvus.url)
    whole = MilvusStore.keep_up
    calls: list[float] = []
    later = threading.Timer(_CUT_FOR_S, milvus.mend)

    def keep_up(store: MilvusStore, collection: CollectionInfo) -> None:
        calls.append(time.monotonic())
        if len(calls) == 2:
            milvus.cut()
            later.start()
        whole(store, collection)

    monkeypatch.setattr(MilvusStore, "keep_up", keep_up)
    try:
        ended = dino_search("index", many_photos, "--model", tiny_model, "--json")
        ended_at = time.monotonic()
    finally:
        later.join()
    assert ended.code == 0
    assert len(calls) >= 5
    assert _CUT_FOR_S < ended_at - calls[1] < _CUT_FOR_S + 20
    assert calls[-1] - calls[1] < _CUT_FOR_S  # all was recorded while the server could not be reached
    assert_each_picture_finds_itself(dino_search, many_photos)
    verified = dino_search("verify", "--json").json()
    assert (verified["problems"], verified["images"]) == ([], ended.json()["images"])


@pytest.mark.slow
@pytest.mark.mounts
def test_a_full_disk_of_the_server_ends_indexing_and_loses_nothing(
    dino_search: Command, many_photos: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Server 2.3.5 goes on running, refuses what is to be written, and stays stuck until it is started again."""
    whole = MilvusStore.keep_up
    calls = []
    # A new server takes 395 MB.
    with mounted(tmp_path / "disk", "500m") as disk:
        server = Server(find_server_program(), disk)
        try:
            monkeypatch.setenv("DINO_SEARCH_VECTOR_STORE", server.url)

            def keep_up(store: MilvusStore, collection: CollectionInfo) -> None:
                calls.append(1)
                if len(calls) == 2:
                    fill(disk)
                whole(store, collection)

            monkeypatch.setattr(MilvusStore, "keep_up", keep_up)
            for command in (("index", many_photos, "--model", tiny_model), ("search", many_photos / "more" / "59.jpg")):
                ended = dino_search(*command)
                assert ended.code == 1
                assert "disk" in ended.err.splitlines()[-1]
                assert "run the same command again" in ended.err.splitlines()[-1]
                assert "Traceback" not in ended.err
            assert len(calls) >= 5
            assert dino_search("info", "--json").json()["images"] == 68
            (disk / "filler").unlink()
            server.kill()
            server.start()
            assert dino_search("index", many_photos).code == 0
            assert waits_until(lambda: dino_search("search", many_photos / "more" / "59.jpg").code == 0, 60)
            assert_each_picture_finds_itself(dino_search, many_photos)
            assert dino_search("verify").code == 0
            assert counts(server).popitem()[1] == 68
        finally:
            server.delete()


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

        def copies() -> httpx.Response:
            return service.http.post("/copies", files={"image": picture}, data={"copy_score": "0.5"})

        assert (search().status_code, copies().status_code) == (200, 200)
        milvus.kill()
        for answer in (search(), copies()):
            assert is_problem(answer, 503, "vector-store-unavailable")
            assert int(answer.headers["Retry-After"]) > 0
        assert service.http.get("/collections").status_code == 200
        milvus.start()
        assert waits_until(lambda: search().status_code == 200, 60)
        assert copies().status_code == 200


@pytest.mark.slow
def test_a_server_that_is_killed_amid_indexing_loses_nothing(
    dino_search: Command, many_photos: Path, tiny_model: Path, milvus: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the first batch, back while the run goes on: the run ends well, and both sides agree."""
    monkeypatch.setenv("DINO_SEARCH_VECTOR_STORE", milvus.url)
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
    ended = dino_search("index", many_photos, "--model", tiny_model, "--json")
    assert ended.code == 0
    assert len(calls) >= 5
    picture = many_photos / "more" / "59.jpg"
    assert dino_search("search", picture, "--json").json()["results"][0]["path"] == str(picture)
    verified = dino_search("verify", "--json").json()
    assert (verified["problems"], verified["images"]) == ([], ended.json()["images"])
