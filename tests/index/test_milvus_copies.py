"""Copy vectors in Milvus: the candidates are those that a search of all vectors in memory finds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from sqlalchemy import delete, select, update

import dino_index.milvus_search
import dino_index.milvus_store
from dino_index.catalog import CollectionRow, EmbeddingRow, StoredVectorsRow
from dino_index.copy_descriptors import CopyDescriptor
from dino_index.copy_search import Candidate, CopySearch
from dino_index.copy_vectors import load_copy_vectors
from dino_index.errors import CatalogUnavailable
from dino_index.held_references import HeldReferences
from dino_index.vector_stores import vector_store_of
from dino_index.whitening import Whitening
from milvus_server import Server
from vector_shelf import VectorShelf, random_vectors, unit

DIM = 16
many = partial(random_vectors, dim=DIM)
pytestmark = pytest.mark.milvus


@pytest.fixture
def shelf(milvus_store: Server, home: Path) -> VectorShelf:
    shelf = VectorShelf(home, DIM)
    shelf.put(**many(60))
    return shelf


def settle(shelf: VectorShelf) -> None:
    """What the end of a run of `index` does."""
    vector_store_of(shelf.catalog).settle(shelf.collection)


def whitened(seed: int = 1) -> CopyDescriptor:
    """A whitening, and a background by which each view has a bias of its own."""
    rng = np.random.default_rng(seed)
    mean_D, projection_DD = rng.normal(0, 0.1, 2 * DIM), rng.normal(size=(2 * DIM, 2 * DIM))
    whitening = Whitening(mean_D.astype(np.float32), projection_DD.astype(np.float32))
    background = CopyDescriptor().vectors(*views(100, seed))
    return CopyDescriptor(whitening=whitening, background_BC=background)


def views(number: int = 5, seed: int = 9) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
    rng = np.random.default_rng(seed)
    cls_VD, gem_VD = rng.normal(size=(2, number, DIM)).astype(np.float16)
    return cls_VD, gem_VD


def search(shelf: VectorShelf, descriptor: CopyDescriptor) -> CopySearch:
    with shelf.catalog.reading() as session:
        references = vector_store_of(shelf.catalog).load_copies(session, shelf.collection, descriptor)
    return CopySearch(references, descriptor)


def in_memory(shelf: VectorShelf, descriptor: CopyDescriptor) -> CopySearch:
    with shelf.catalog.reading() as session:
        return CopySearch(HeldReferences(load_copy_vectors(session, shelf.collection, descriptor)), descriptor)


def assert_same(found: list[Candidate], expected: list[Candidate]) -> None:
    assert [candidate.image_id for candidate in found] == [candidate.image_id for candidate in expected]
    for one, other in zip(found, expected, strict=True):
        assert (one.score, one.cosine) == pytest.approx((other.score, other.cosine), abs=3e-6)
        assert one.views[0] == other.views[0]


def assert_right(shelf: VectorShelf, descriptor: CopyDescriptor, k: int = 7) -> None:
    served, held = search(shelf, descriptor), in_memory(shelf, descriptor)
    for seed in range(3):
        assert_same(served.candidates(*views(seed=seed), k), held.candidates(*views(seed=seed), k))
    first, last = min(shelf.vectors), max(shelf.vectors)
    assert served.cosine(last, first) == pytest.approx(held.cosine(last, first), abs=1e-6)
    assert served.cosine(first, first) == pytest.approx(1, abs=1e-6)


def stored(shelf: VectorShelf) -> list[tuple[str, str]]:
    """(kind, name on the server) of what the catalog says is there and in use."""
    with shelf.catalog.reading() as session:
        rows = session.scalars(select(StoredVectorsRow).where(StoredVectorsRow.state == "current"))
        return sorted((row.kind, row.name) for row in rows)


def name_of(shelf: VectorShelf, kind: str = "copies") -> str:
    return dict(stored(shelf))[kind]


def problem(shelf: VectorShelf) -> str | None:
    return vector_store_of(shelf.catalog).problem(shelf.collection)


@pytest.mark.parametrize(
    "descriptor", [pytest.param(CopyDescriptor(), marks=pytest.mark.slow), whitened()], ids=["plain", "whitened"]
)
def test_candidates_are_those_of_a_search_in_memory(shelf: VectorShelf, descriptor: CopyDescriptor) -> None:
    assert len(views(5)[0]) == 5
    assert_right(shelf, descriptor)
    assert_right(shelf, descriptor, k=100)  # more than there are


@pytest.mark.parametrize(
    "index_type", ["hnsw", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ivf", "ivfpq"))]
)
def test_approximate_types_find_them_too(milvus_store: Server, home: Path, index_type: str) -> None:
    shelf = VectorShelf(home, DIM, index_type)
    shelf.put(**many(3000))
    descriptor = whitened()
    served, held = search(shelf, descriptor), in_memory(shelf, descriptor)
    for seed in range(10):
        found, expected = (
            [candidate.image_id for candidate in each.candidates(*views(seed=seed), 10)] for each in (served, held)
        )
        assert found[:5] == expected[:5]
        assert len(set(found) & set(expected)) >= 9


def test_more_candidates_than_one_answer_holds_are_fetched_in_pages(
    shelf: VectorShelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dino_index.milvus_search, "MAX_FETCHED", 50)
    monkeypatch.setattr(dino_index.milvus_search, "ROWS_PER_PAGE", 11)
    assert_right(shelf, whitened(), k=40)


def test_every_change_is_found_at_once(shelf: VectorShelf) -> None:
    descriptor = whitened()
    settle(shelf)
    assert_right(shelf, descriptor)
    shelf.put(**many(10, prefix="new", seed=2), **many(3, seed=3))
    assert_right(shelf, descriptor)
    shelf.remove(*list(shelf.vectors)[:5])
    assert_right(shelf, descriptor)
    assert [kind for kind, _ in stored(shelf)] == ["copies", "search"]
    assert problem(shelf) is None


def test_the_end_of_a_run_brings_them(shelf: VectorShelf, milvus_store: Server) -> None:
    descriptor = whitened()
    assert_right(shelf, descriptor)
    shelf.put(**many(10, prefix="new", seed=2))
    settle(shelf)
    with shelf.catalog.reading() as session:
        known = set(session.scalars(select(StoredVectorsRow.generation)))
        assert known == {session.get_one(CollectionRow, shelf.collection.id).generation}


def test_a_search_goes_by_the_state_that_it_was_opened_in(shelf: VectorShelf) -> None:
    descriptor = whitened()
    before, expected = search(shelf, descriptor), in_memory(shelf, descriptor)
    cls_VD, gem_VD = views()
    shelf.put(**{f"same {number}": cls_VD[0] for number in range(3)})
    assert_right(shelf, descriptor)
    assert_same(before.candidates(cls_VD, gem_VD, 7), expected.candidates(cls_VD, gem_VD, 7))


def test_nothing_is_stored_before_copies_are_looked_for(shelf: VectorShelf, milvus_store: Server) -> None:
    shelf.compact()
    assert [kind for kind, _ in stored(shelf)] == ["search"]
    assert len(milvus_store.client().list_collections()) == 1


def test_another_whitening_has_them_stored_anew(shelf: VectorShelf, milvus_store: Server) -> None:
    settle(shelf)
    assert_right(shelf, whitened())
    before = name_of(shelf)
    background = whitened(seed=2).background_BC
    assert_right(shelf, CopyDescriptor(whitening=whitened().whitening, background_BC=background))
    assert name_of(shelf) == before
    assert_right(shelf, whitened(seed=2))
    assert name_of(shelf) != before
    assert sorted(milvus_store.client().list_collections()) == sorted(name for _, name in stored(shelf))
    assert problem(shelf) is None


@pytest.mark.parametrize("step", ["upsert_vectors", pytest.param("server_time", marks=pytest.mark.slow)])
def test_what_a_crash_kept_from_the_server_the_next_search_brings(
    shelf: VectorShelf, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    descriptor = whitened()
    assert_right(shelf, descriptor)
    shelf.put(**many(10, prefix="new", seed=2))
    shelf.remove(*list(shelf.vectors)[:5])

    def crash(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dino_index.milvus_store, step, crash)
        with pytest.raises(KeyboardInterrupt):
            search(shelf, descriptor)
    assert_right(shelf, descriptor)
    assert problem(shelf) is None


def lose_some(shelf: VectorShelf, milvus_store: Server) -> None:
    milvus_store.client().delete(name_of(shelf), ids=list(shelf.vectors)[:2])


def have_another(shelf: VectorShelf, milvus_store: Server) -> None:
    row = {"id": next(iter(shelf.vectors)), "generation": 1, "vector": unit(np.ones(2 * DIM))}
    milvus_store.client().upsert(name_of(shelf), [row])


def lose_all(shelf: VectorShelf, milvus_store: Server) -> None:
    milvus_store.client().drop_collection(name_of(shelf))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lose_some, "copy vectors in Milvus at {}: it lacks 2 images of the catalog, has 0 that are not in it, and 0"),
        pytest.param(have_another, "has 0 that are not in it, and 1 with another vector", marks=pytest.mark.slow),
        pytest.param(
            lose_all, "copy vectors in Milvus at {}: it has lost those of the collection", marks=pytest.mark.slow
        ),
    ],
)
def test_a_difference_is_found_and_mended(
    shelf: VectorShelf, milvus_store: Server, damage: Callable[[VectorShelf, Server], None], words: str
) -> None:
    assert_right(shelf, whitened())
    assert problem(shelf) is None
    damage(shelf, milvus_store)
    # As after a write of ours, whose moment the next look waits for.
    timestamp = milvus_store.client()._get_connection().alloc_timestamp()
    with shelf.catalog.writing() as session:
        session.execute(update(StoredVectorsRow).values(timestamp=timestamp))
    found = problem(shelf)
    assert found is not None
    assert words.format(milvus_store.url) in found
    shelf.compact()
    assert problem(shelf) is None
    assert_right(shelf, whitened())


def test_vectors_that_the_server_lost_are_stored_anew_by_a_search(shelf: VectorShelf, milvus_store: Server) -> None:
    assert_right(shelf, whitened())
    milvus_store.empty()
    assert_right(shelf, whitened())


def test_a_search_goes_on_while_they_are_stored_anew(shelf: VectorShelf) -> None:
    descriptor = whitened()
    before = search(shelf, descriptor)
    shelf.compact()
    assert_same(before.candidates(*views(), 7), in_memory(shelf, descriptor).candidates(*views(), 7))


def test_an_image_without_a_vector_is_an_error_that_says_how_to_repair(shelf: VectorShelf) -> None:
    with shelf.catalog.writing() as session:
        some = select(EmbeddingRow.sha256).where(EmbeddingRow.kind == "gem").limit(2)
        session.execute(delete(EmbeddingRow).where(EmbeddingRow.kind == "gem", EmbeddingRow.sha256.in_(some)))
    with pytest.raises(CatalogUnavailable, match=r"2 readable images without .* run: dino-search verify --repair"):
        search(shelf, whitened())
    assert [kind for kind, _ in stored(shelf)] == []
