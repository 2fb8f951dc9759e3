from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from dino_index.collections import generation_of
from dino_index.vector_stores import vector_store_of
from vector_shelf import VectorShelf, unit

DIM = 8
pytestmark = pytest.mark.usefixtures("database", "vector_store")


@pytest.fixture
def shelf(home: Path, database: str, vector_store: str) -> Iterator[VectorShelf]:
    shelf = VectorShelf(home, DIM)
    yield shelf
    shelf.catalog.close()


def some(rng: np.random.Generator, kind: str = "smooth") -> NDArray[np.float16]:
    """A vector like no other, or a coarse one that will meet its equals."""
    if kind == "smooth":
        return rng.normal(size=DIM).astype(np.float16)
    vector_D = rng.integers(-1, 2, DIM)
    vector_D[0] = 1
    return vector_D.astype(np.float16)


def many(
    rng: np.random.Generator, number: int, prefix: str = "", kind: str = "smooth"
) -> dict[str, NDArray[np.float16]]:
    return {f"{prefix}{i}": some(rng, kind) for i in range(number)}


def assert_same(found: tuple[list[int], list[float]], expected: tuple[list[int], list[float]]) -> None:
    assert found[0] == expected[0]
    np.testing.assert_allclose(found[1], expected[1], atol=2e-6)


@pytest.mark.parametrize("kind", ["smooth", "coarse"])
@pytest.mark.parametrize("seed", range(4))
def test_search_equals_brute_force_whatever_happened_before(shelf: VectorShelf, kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = [f"image-{number}" for number in range(60)]
    for _ in range(16):
        match rng.choice(["put", "put", "put", "remove", "compact"]):
            case "put":  # adds some and replaces others
                shelf.put(**{str(name): some(rng, kind) for name in rng.choice(names, rng.integers(1, 9))})
            case "remove" if shelf.vectors:
                ids = rng.permutation(list(shelf.vectors))[: rng.integers(1, 6)]
                shelf.remove(*ids.tolist())
            case "compact":
                shelf.compact()
        index = shelf.index()
        assert len(index) == len(shelf.vectors)
        for k in (1, int(rng.integers(2, 12)), len(shelf.vectors) + 5):
            query = some(rng, kind).astype(np.float64)
            assert_same(shelf.search(query, k, None, index), shelf.brute_force(query, k))
            allowed = rng.choice(80, 20, replace=False).astype(np.int64)
            assert_same(shelf.search(query, k, allowed, index), shelf.brute_force(query, k, allowed))


def test_equal_vectors_tie_by_id_however_many_there_are(shelf: VectorShelf) -> None:
    rng = np.random.default_rng(0)
    same = some(rng)
    shelf.put(**many(rng, 20, "a"), **dict.fromkeys((f"b{i}" for i in range(60)), same))
    shelf.compact()
    shelf.put(**dict.fromkeys((f"c{i}" for i in range(30)), same), **many(rng, 10, "d"))
    replaced = shelf.put(b7=some(rng))["b7"]
    for k in (1, 5, 59, 70, 89):
        ids, scores = shelf.search(same.astype(np.float64), k)
        assert scores == [1.0] * k
        assert ids == shelf.brute_force(same.astype(np.float64), k)[0]
        assert replaced not in ids


def test_copies_tie_by_id_although_one_is_in_the_snapshot_and_one_is_not(home: Path) -> None:
    # Sums in another order end in other digits: a tie must not depend on where a vector lies.
    rng, dim = np.random.default_rng(0), 192
    shelf = VectorShelf(home, dim)
    vectors = {f"{i}": rng.normal(size=dim).astype(np.float16) for i in range(300)}
    later = shelf.put(**vectors)
    shelf.compact()
    # Replaced, so that it is in the delta under the lower id; its copy is in the snapshot.
    shelf.put(**{f"copy of {name}": vector for name, vector in vectors.items()})
    shelf.compact()
    shelf.put(**vectors)
    index = shelf.index()
    queries = np.stack([vector.astype(np.float32) for vector in vectors.values()])
    queries += 0.3 * rng.normal(size=queries.shape).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    for name, (ids, scores) in zip(vectors, index.search(queries, 2), strict=True):
        assert ids[0] == later[name]
        assert scores[0] == scores[1]


def test_compaction_changes_no_answer(shelf: VectorShelf) -> None:
    rng = np.random.default_rng(0)
    shelf.put(**many(rng, 40, kind="coarse"))
    shelf.compact()
    shelf.put(**many(rng, 10, "new", kind="coarse"))
    queries = [some(rng, "coarse").astype(np.float64) for _ in range(20)]
    before = [shelf.search(query, 50) for query in queries]
    shelf.compact()
    assert [shelf.search(query, 50) for query in queries] == before


def test_k_images_are_found_although_most_of_the_snapshot_is_masked(shelf: VectorShelf) -> None:
    rng = np.random.default_rng(0)
    ids = list(shelf.put(**many(rng, 100)).values())
    shelf.compact()
    query = some(rng).astype(np.float64)
    shelf.remove(*shelf.brute_force(query, 90)[0])
    found, _ = shelf.search(query, 10)
    assert sorted(found) == sorted(set(ids) & shelf.vectors.keys())
    assert len(found) == 10


def test_fewer_come_back_only_where_fewer_exist(shelf: VectorShelf) -> None:
    rng = np.random.default_rng(0)
    shelf.put(**many(rng, 4))
    query = some(rng).astype(np.float64)
    assert len(shelf.search(query, 10)[0]) == 4
    assert len(shelf.search(query, 10, np.array(list(shelf.vectors)[:2]))[0]) == 2
    assert shelf.search(query, 10, np.array([], np.int64)) == ([], [])
    shelf.remove(*shelf.vectors)
    assert shelf.search(query, 10) == ([], [])
    shelf.compact()
    assert shelf.search(query, 10) == ([], [])


def test_several_queries_are_answered_as_each_alone(shelf: VectorShelf) -> None:
    rng = np.random.default_rng(0)
    shelf.put(**many(rng, 30))
    shelf.compact()
    shelf.put(**many(rng, 10, "new"))
    queries_QD = rng.normal(size=(40, DIM)).astype(np.float32)
    queries_QD /= np.linalg.norm(queries_QD, axis=1, keepdims=True)
    together = shelf.index().search(queries_QD, 7)
    alone = [shelf.index().search(query_D[None], 7)[0] for query_D in queries_QD]
    for (ids, scores), (ids_alone, scores_alone) in zip(together, alone, strict=True):
        np.testing.assert_array_equal(ids, ids_alone)
        np.testing.assert_array_equal(scores, scores_alone)


def test_an_index_knows_when_it_is_out_of_date(shelf: VectorShelf) -> None:
    rng = np.random.default_rng(0)
    shelf.put(**many(rng, 3))
    index = shelf.index()

    def current() -> bool:
        with shelf.catalog.reading() as session:
            return index.is_current(session, shelf.collection)

    assert current()
    shelf.compact()  # changes where vectors lie, not which there are
    assert current()
    shelf.put(a=some(rng))
    assert not current()


def test_an_index_shows_the_state_that_its_session_saw(shelf: VectorShelf, vector_store: str) -> None:
    rng = np.random.default_rng(0)
    first = shelf.put(**many(rng, 5))
    shelf.compact()
    query = some(rng).astype(np.float64)
    before = shelf.brute_force(query, 10)
    with shelf.catalog.reading() as session:
        generation_of(session, shelf.collection)  # the state is fixed by the first read
        writer = VectorShelf(shelf.home, DIM)
        writer.vectors = dict(shelf.vectors)
        writer.put(**many(rng, 5, "new"))
        writer.remove(first["0"], first["1"])
        writer.compact()
        index = vector_store_of(shelf.catalog).load(session, shelf.collection)
    ((ids, scores),) = index.search(unit(query)[None], 10)
    if vector_store == "milvus":  # what was removed since is not found any more, what was added is not found yet
        removed = {first["0"], first["1"]}
        kept = [(image_id, score) for image_id, score in zip(*before, strict=True) if image_id not in removed]
        before = [image_id for image_id, _ in kept], [score for _, score in kept]
    assert_same((ids.tolist(), scores.tolist()), before)
    assert_same(shelf.search(query, 10), writer.brute_force(query, 10))


def test_a_vector_that_is_damaged_is_not_found_and_hides_no_other(shelf: VectorShelf) -> None:
    rng = np.random.default_rng(0)
    shelf.put(**many(rng, 5))
    broken = shelf.put(broken=np.full(DIM, np.nan, np.float16))["broken"]
    query = some(rng).astype(np.float64)
    for _ in ("in the delta", "in the snapshot"):
        for k in (3, 6):
            ids, scores = shelf.search(query, k)
            assert len(ids) == min(k, 5)
            assert broken not in ids
            assert np.isfinite(scores).all()
        shelf.compact()
