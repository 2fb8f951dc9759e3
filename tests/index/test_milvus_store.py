"""Vectors in Milvus: whatever happens to the server, to a process or to the data, both sides end up the same."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import select, update

import databases
import dino_index.milvus_search
import dino_index.milvus_server
import dino_index.milvus_store
from dino_index.catalog import CollectionRow, RemovalRow, StoredVectorsRow
from dino_index.catalog.sqlite import copy_file
from dino_index.collection_removal import remove_collection
from dino_index.collections import find_collection
from dino_index.errors import IndexTypeInvalid, VectorStoreError, VectorStoreUnavailable
from dino_index.integrity import compact_collection
from dino_index.milvus_server import MilvusAddress
from dino_index.vector_stores import vector_store_of
from milvus_server import Server
from sample_collections import count_rows
from vector_shelf import VectorShelf, random_vectors, unit

DIM = 16
many = partial(random_vectors, dim=DIM)
pytestmark = pytest.mark.milvus


@pytest.fixture
def shelf(milvus_store: Server, home: Path) -> VectorShelf:
    shelf = VectorShelf(home, DIM)
    shelf.put(**many(40))
    return shelf


def assert_right(shelf: VectorShelf) -> None:
    """Search finds what there is, as often as it is asked."""
    rng = np.random.default_rng(1)
    for _ in range(3):
        query = rng.normal(size=DIM)
        found, expected = shelf.search(query, 12), shelf.brute_force(query, 12)
        assert found[0] == expected[0]
        np.testing.assert_allclose(found[1], expected[1], atol=2e-6)


def problem(shelf: VectorShelf) -> str | None:
    return vector_store_of(shelf.catalog).problem(shelf.collection)


def stored(shelf: VectorShelf) -> list[tuple[str, str]]:
    """(name, state) of what the catalog says is on servers."""
    with shelf.catalog.reading() as session:
        return [(row.name, row.state) for row in session.scalars(select(StoredVectorsRow))]


def name_of(shelf: VectorShelf) -> str:
    return next(name for name, state in stored(shelf) if state == "current")


# --- a crash between the catalog's commit and the server


@pytest.mark.parametrize("step", ["upsert_vectors", "delete_vectors", "server_time"])
def test_what_a_crash_kept_from_the_server_the_next_opener_brings(
    shelf: VectorShelf, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    assert_right(shelf)
    gone = list(shelf.vectors)[:5]
    shelf.put(**many(10, prefix="new", seed=2), **many(3, seed=3))
    shelf.remove(*gone)

    def crash(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dino_index.milvus_store, step, crash)
        with pytest.raises(KeyboardInterrupt):
            vector_store_of(shelf.catalog).keep_up(shelf.collection)
    assert_right(shelf)
    assert problem(shelf) is None


def test_many_changes_are_brought_in_turns(shelf: VectorShelf, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_right(shelf)
    monkeypatch.setattr(dino_index.milvus_store, "_IMAGES_A_TURN", 4)
    for number in range(5):
        shelf.put(**many(3, prefix=f"{number}-", seed=number))
        shelf.remove(list(shelf.vectors)[number])
    assert_right(shelf)
    assert problem(shelf) is None


def test_an_image_that_left_and_came_back_is_there(shelf: VectorShelf) -> None:
    assert_right(shelf)
    image_id = next(iter(shelf.vectors))
    with shelf.catalog.writing() as session:
        generation = session.get_one(CollectionRow, shelf.collection.id).generation + 1
        session.merge(RemovalRow(collection_id=shelf.collection.id, image_id=image_id, generation=generation))
        session.get_one(CollectionRow, shelf.collection.id).generation = generation
    assert_right(shelf)
    assert problem(shelf) is None


@pytest.mark.slow
def test_a_fill_that_was_killed_is_dropped_after_a_while(shelf: VectorShelf, milvus_store: Server) -> None:
    assert_right(shelf)
    with shelf.catalog.writing() as session:
        for name, age in (("dino_search_dead", 11), ("dino_search_alive", 9)):
            session.add(
                StoredVectorsRow(
                    name=name, collection_id=shelf.collection.id, model_id=shelf.collection.model_id,
                    place=milvus_store.url, owner=shelf.catalog.identity, state="filling", generation=0,
                    index_type="flat", reason="", changed_at=datetime.now(UTC) - timedelta(minutes=age),
                )
            )  # fmt: skip
    milvus_store.client().create_collection("dino_search_dead", dimension=DIM)
    shelf.compact()
    assert {state for _, state in stored(shelf)} == {"current", "filling"}
    assert sorted(milvus_store.client().list_collections()) == [name_of(shelf)]


@pytest.mark.slow
def test_removals_are_remembered_until_the_server_knows(shelf: VectorShelf) -> None:
    assert_right(shelf)
    shelf.remove(*list(shelf.vectors)[:3])
    shelf.compact(append=True)  # a snapshot in the home
    assert count_rows(shelf.home, RemovalRow) == 3
    assert_right(shelf)
    shelf.compact()
    assert count_rows(shelf.home, RemovalRow) == 0


# --- what the server holds and the catalog does not


def lose_some(shelf: VectorShelf, milvus_store: Server) -> None:
    milvus_store.client().delete(name_of(shelf), ids=list(shelf.vectors)[:2])


def have_more(shelf: VectorShelf, milvus_store: Server) -> None:
    row = {"id": 10**6, "generation": 1, "vector": unit(np.ones(DIM))}
    milvus_store.client().upsert(name_of(shelf), [row])


def have_another(shelf: VectorShelf, milvus_store: Server) -> None:
    row = {"id": next(iter(shelf.vectors)), "generation": 1, "vector": unit(np.ones(DIM))}
    milvus_store.client().upsert(name_of(shelf), [row])


def lose_all(shelf: VectorShelf, milvus_store: Server) -> None:
    milvus_store.client().drop_collection(name_of(shelf))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lose_some, "lacks 2 images of the catalog, has 0 that are not in it, and 0 with another vector"),
        pytest.param(
            have_more,
            "lacks 0 images of the catalog, has 1 that are not in it, and 0 with another vector",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            have_another,
            "lacks 0 images of the catalog, has 0 that are not in it, and 1 with another vector",
            marks=pytest.mark.slow,
        ),
        (lose_all, "has lost those of the collection"),
    ],
)
def test_a_difference_is_found_and_mended(
    shelf: VectorShelf, milvus_store: Server, damage: Callable[[VectorShelf, Server], None], words: str
) -> None:
    assert_right(shelf)
    assert problem(shelf) is None
    damage(shelf, milvus_store)
    # As after a write of ours, whose moment the next look waits for.
    timestamp = milvus_store.client()._get_connection().alloc_timestamp()
    with shelf.catalog.writing() as session:
        session.execute(update(StoredVectorsRow).values(timestamp=timestamp))
    found = problem(shelf)
    assert found is not None
    assert words in found
    compact_collection(shelf.catalog, shelf.collection)
    assert problem(shelf) is None
    assert_right(shelf)


def test_vectors_that_the_server_lost_are_stored_anew_by_a_search(
    shelf: VectorShelf, milvus_store: Server, caplog: pytest.LogCaptureFixture
) -> None:
    assert_right(shelf)
    milvus_store.empty()
    assert_right(shelf)
    assert "has lost the vectors of collection 'default'; storing them anew" in caplog.text


def test_a_copy_of_the_catalog_file_keeps_off_the_vectors_of_the_original(
    shelf: VectorShelf, milvus_store: Server, tmp_path: Path
) -> None:
    assert_right(shelf)
    (tmp_path / "copy").mkdir()
    copy_file(shelf.catalog.path, tmp_path / "copy" / shelf.catalog.path.name)
    copy = databases.open_catalog(tmp_path / "copy")
    with copy.reading() as session:
        assert len(vector_store_of(copy).load(session, find_collection(session, "default"))) == 40
    assert len(milvus_store.client().list_collections()) == 2


# --- one process searches while another works


def test_a_search_goes_on_while_the_collection_is_compacted(shelf: VectorShelf) -> None:
    index = shelf.index()
    shelf.compact()
    query = np.random.default_rng(4).normal(size=DIM)
    assert shelf.search(query, 5, None, index)[0] == shelf.brute_force(query, 5)[0]


@pytest.mark.slow
def test_no_search_is_wrong_while_others_write(shelf: VectorShelf) -> None:
    """Writers add images nearer and nearer to the query: each search finds what was acknowledged before it."""
    query = np.random.default_rng(5).normal(size=DIM)
    stop = threading.Event()
    acknowledged: list[int] = []

    def write() -> None:
        writer = VectorShelf(shelf.home, DIM)
        number = 0
        while not stop.is_set():
            vector = query + (0.5 ** min(number / 8, 9)) * np.roll(query, 1)
            (image_id,) = writer.put(**{f"near {number}": vector}).values()
            acknowledged.append(image_id)
            number += 1

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(8):
            known = list(acknowledged)
            found = set(shelf.search(query, 10_000)[0])
            assert set(known) <= found
    finally:
        stop.set()
        thread.join()
    assert problem(shelf) is None


# --- collections that go, models that change, types


def test_a_collection_that_is_removed_is_dropped_there(shelf: VectorShelf, milvus_store: Server) -> None:
    assert_right(shelf)
    remove_collection(shelf.catalog, "default")
    assert milvus_store.client().list_collections() == []
    assert stored(shelf) == []


def test_a_collection_that_is_removed_without_the_server_is_dropped_later(
    shelf: VectorShelf, milvus_store: Server
) -> None:
    assert_right(shelf)
    shelf.catalog.vectors_url = None
    remove_collection(shelf.catalog, "default")
    assert [state for _, state in stored(shelf)] == ["dropped"]
    other = VectorShelf(shelf.home, DIM)
    other.put(**many(2))
    assert len(other.index()) == 2
    assert stored(other) == [(name_of(other), "current")]
    assert milvus_store.client().list_collections() == [name_of(other)]


def test_factory_strings_of_faiss_are_refused(shelf: VectorShelf) -> None:
    with pytest.raises(IndexTypeInvalid, match="found --index-type IVF16,SQ8"):
        vector_store_of(shelf.catalog).check_type("IVF16,SQ8", DIM)
    with shelf.catalog.writing() as session:
        session.execute(update(CollectionRow).values(index_type="IVF2,SQ8"))
    with pytest.raises(IndexTypeInvalid, match="choose another type: dino-search index PATH --index-type auto"):
        shelf.compact()
    with shelf.catalog.writing() as session:
        session.execute(update(CollectionRow).values(index_type="hnsw"))
    store = vector_store_of(shelf.catalog)
    store.settle(shelf.collection, retype=True)
    with shelf.catalog.reading() as session:
        assert store.facts(session, shelf.collection)["index_type"] == "hnsw"
    assert_right(shelf)


# --- filters


@pytest.mark.parametrize("num_allowed", [1, 30, 300, 580])
def test_every_way_to_filter_finds_the_same(
    milvus_store: Server, home: Path, monkeypatch: pytest.MonkeyPatch, num_allowed: int
) -> None:
    monkeypatch.setattr(dino_index.milvus_search, "_MAX_SCANNED", 10)
    monkeypatch.setattr(dino_index.milvus_search, "_IDS_PER_SEARCH", 50)
    shelf = VectorShelf(home, DIM)
    shelf.put(**many(600))
    index = shelf.index()
    rng = np.random.default_rng(6)
    for fetched in (16_384, 64):  # sieving, and a search for each part of the ids
        monkeypatch.setattr(dino_index.milvus_search, "MAX_FETCHED", fetched)
        for k in (1, 10, 40, 700):
            allowed = np.sort(rng.choice(list(shelf.vectors), num_allowed, replace=False))
            query = rng.normal(size=DIM)
            assert shelf.search(query, k, allowed, index)[0] == shelf.brute_force(query, k, allowed)[0]


# --- the server is away


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dino_index.milvus_server, "PING_TIMEOUT_S", 1.0)
    monkeypatch.setattr(dino_index.milvus_store, "BRIEFLY_S", 1.0)


@pytest.mark.usefixtures("hurried")
def test_a_server_that_nobody_runs_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(databases, "vectors_url", "milvus+http://me:secret@127.0.0.1:9?db=x")
    shelf = VectorShelf(home, DIM)
    shelf.put(**many(3))
    with pytest.raises(VectorStoreUnavailable, match="see that it runs") as raised:
        shelf.index()
    assert "milvus+http://127.0.0.1:9?db=x" in str(raised.value)
    assert "secret" not in str(raised.value)


def test_a_server_that_restarts_loses_nothing(shelf: VectorShelf, milvus_store: Server) -> None:
    """Killed in between, with changes that it was told of, and others that it was not."""
    assert_right(shelf)
    index = shelf.index()
    shelf.put(**many(10, prefix="told", seed=7))
    vector_store_of(shelf.catalog).keep_up(shelf.collection)
    milvus_store.kill()
    shelf.put(**many(10, prefix="not told", seed=8))
    shelf.remove(*list(shelf.vectors)[:4])
    vector_store_of(shelf.catalog).keep_up(shelf.collection)  # says so, and goes on
    milvus_store.start()
    vector_store_of(shelf.catalog).settle(shelf.collection)
    assert_right(shelf)
    assert problem(shelf) is None
    assert len(index.search(unit(np.ones(DIM))[None], 5)[0][0]) == 5


# --- URLs


@pytest.mark.parametrize(
    ("url", "uri", "place"),
    [
        ("milvus+http://host", "http://host:19530", "milvus+http://host:19530"),
        ("milvus+https://u:p%40%2F@host:1/?db=a%20b", "https://host:1", "milvus+https://host:1?db=a+b"),
        ("milvus+http://[::1]:5", "http://[::1]:5", "milvus+http://[::1]:5"),
    ],
)
def test_a_url_says_where_the_server_is(url: str, uri: str, place: str) -> None:
    address = MilvusAddress.parse(url)
    assert (address.uri, address.place) == (uri, place)
    assert "p%40" not in repr(address)
    if address.user:
        assert (address.user, address.password, address.database) == ("u", "p@/", "a b")


@pytest.mark.parametrize(
    "url",
    ["http://host", "milvus+http://", "milvus+http://u:secret@host:x", "milvus+http://u:sec/ret@host",
     "milvus+http://host?timeout=3", "milvus+http://host?db", "host:19530"],
)  # fmt: skip
def test_a_url_that_makes_no_sense_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(VectorStoreError, match=r"expected milvus\+http://USER:PASSWORD@HOST:PORT\?db=NAME") as raised:
        MilvusAddress.parse(url)
    assert "sec" not in str(raised.value).replace("makes no sense", "")


# --- index types


@pytest.mark.slow
@pytest.mark.parametrize("index_type", ["flat", "hnsw", "ivf", "ivfpq"])
def test_each_type_finds_nearly_all_of_the_nearest(milvus_store: Server, home: Path, index_type: str) -> None:
    rng, dim = np.random.default_rng(0), 96
    shelf = VectorShelf(home, dim, index_type)
    # Near a surface of few dimensions, as embeddings are; enough of them for the server to build the index.
    surface = rng.normal(size=(12_200, 24)) @ rng.normal(size=(24, dim))
    vectors_ND = (surface + 0.5 * rng.normal(size=surface.shape)).astype(np.float16)
    shelf.put(**{str(number): vector_D for number, vector_D in enumerate(vectors_ND[200:])})
    shelf.compact()
    facts = milvus_store.client().describe_index(name_of(shelf), "vector")
    assert (facts["index_type"], facts["pending_index_rows"]) == (dino_index.milvus_search.INDEX_TYPES[index_type], 0)
    index = shelf.index()
    ids = np.array(list(shelf.vectors))
    units_ND = np.stack([unit(vector_D.astype(np.float64)) for vector_D in shelf.vectors.values()])
    hits = 0
    for query_D in vectors_ND[:200].astype(np.float64):
        exact = ids[np.argsort(-(units_ND @ query_D))[:10]]
        hits += len(np.intersect1d(exact, shelf.search(query_D, 10, None, index)[0]))
    assert hits / 2000 >= 0.98
