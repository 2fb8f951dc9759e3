from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from numpy.typing import NDArray
from sqlalchemy import select

import dino_index.approximate_search
import dino_index.index_types
import dino_index.indexing
import dino_index.snapshots
from databases import open_catalog
from dino_index.catalog import CollectionRow, SnapshotRow
from dino_index.errors import CollectionNotFound, IndexTypeInvalid, TooLittleMemory
from dino_index.index_types import (
    build_index,
    check_index_type,
    choose_index_type,
    gpu_clone,
    is_lossy,
    search_parameters,
)
from dino_index.integrity import verify_collection
from dino_index.memory import available_bytes
from dino_index.snapshots import StoredVectors
from sample_collections import findable, index_files, write_pictures
from vector_shelf import VectorShelf, unit

DIM = 16
APPROXIMATE = ("hnsw", "ivf", "ivfpq", "IVF8,SQ8", "HNSW16", "PCA8,IVF4,Flat", "IVF4,PQ4x4,RFlat")
EVERY = ("auto", "flat", *APPROXIMATE)


def clustered(rng: np.random.Generator, number: int) -> NDArray[np.float16]:
    centres = np.random.default_rng(1).normal(size=(10, DIM))
    return (centres[rng.integers(0, 10, number)] + 0.4 * rng.normal(size=(number, DIM))).astype(np.float16)


def named(vectors_ND: NDArray[np.float16], prefix: str = "") -> dict[str, NDArray[np.float16]]:
    return {f"{prefix}{number}": vector_D for number, vector_D in enumerate(vectors_ND)}


@pytest.fixture(params=EVERY)
def shelf(request: pytest.FixtureRequest, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[VectorShelf]:
    """600 vectors in a snapshot of each type, which is searched as if they were too many to compare all."""
    monkeypatch.setattr(dino_index.approximate_search, "_MAX_SCANNED", 0)
    monkeypatch.setattr(dino_index.approximate_search, "_MAX_SCANNED_FRAC", 0.02)
    shelf = VectorShelf(home, DIM, request.param)
    shelf.put(**named(clustered(np.random.default_rng(0), 600)))
    shelf.compact()
    yield shelf
    shelf.catalog.close()


def built(shelf: VectorShelf) -> tuple[str, str, int]:
    with shelf.catalog.reading() as session:
        row = session.scalars(select(SnapshotRow)).one()
        return row.index_type, row.reason, row.num_vectors


def check(shelf: VectorShelf, num_queries: int = 25, allowed: NDArray[np.int64] | None = None) -> None:
    """Exact scores, best first, ties by id, nothing that may not be found, k where k exist, and most of the nearest."""
    rng, index, k = np.random.default_rng(7), shelf.index(), 10
    exact = built(shelf)[0] == "flat"
    possible = set(shelf.vectors) & (set(shelf.vectors) if allowed is None else set(allowed.tolist()))
    shares = []
    for query_D in clustered(rng, num_queries).astype(np.float64):
        ids, scores = shelf.search(query_D, k, allowed, index)
        expected, expected_scores = shelf.brute_force(query_D, k, allowed)
        assert len(ids) == len(expected) == len(set(ids))
        assert set(ids) <= possible
        by_id = dict(zip(*shelf.brute_force(query_D, len(shelf.vectors), allowed), strict=True))
        np.testing.assert_allclose(scores, [by_id[image_id] for image_id in ids], atol=2e-6)
        assert [(-score, image_id) for image_id, score in zip(ids, scores, strict=True)] == sorted(
            (-score, image_id) for image_id, score in zip(ids, scores, strict=True)
        )
        if exact:
            assert ids == expected
        shares.append(len(set(ids) & set(expected)) / len(expected) if expected else 1.0)
        assert not expected_scores or scores[0] <= expected_scores[0] + 2e-6
    assert np.mean(shares) > 0.9


def test_every_type_answers_exactly_for_what_it_finds(shelf: VectorShelf) -> None:
    asked = shelf.asked_type()
    assert built(shelf)[0] == ("flat" if asked == "auto" else asked)
    check(shelf)


def test_every_type_finds_what_was_added_and_nothing_that_was_removed_or_replaced(shelf: VectorShelf) -> None:
    rng = np.random.default_rng(2)
    shelf.put(**named(clustered(rng, 40), "new"), **named(clustered(rng, 20)))
    shelf.remove(*rng.permutation(list(shelf.vectors))[:50].tolist())
    assert len(shelf.index()) == len(shelf.vectors)
    check(shelf)


def test_every_type_keeps_to_the_allowed_images(shelf: VectorShelf) -> None:
    rng = np.random.default_rng(3)
    ids = np.array(list(shelf.vectors))
    for number in (0, 1, 5, 11, 100, 400):
        check(shelf, 10, np.concatenate([rng.permutation(ids)[:number], [10**9]]))


def test_every_type_finds_k_where_most_are_gone_or_far_away(shelf: VectorShelf) -> None:
    query_D = clustered(np.random.default_rng(4), 1)[0].astype(np.float64)
    nearest, _ = shelf.brute_force(query_D, 580)
    shelf.remove(*nearest)
    ids, _ = shelf.search(query_D, 15)
    assert len(ids) == 15
    assert len(shelf.search(query_D, 100)[0]) == 20


def test_every_type_orders_equal_vectors_by_id_however_many_there_are(shelf: VectorShelf) -> None:
    same_D = clustered(np.random.default_rng(5), 1)[0]
    copies = shelf.put(**named(np.tile(same_D, (300, 1)), "same"))
    shelf.compact()
    shelf.put(same7=clustered(np.random.default_rng(6), 1)[0])
    ids, scores = shelf.search(same_D.astype(np.float64), 20)
    assert ids == sorted(set(copies.values()) - {copies["same7"]})[:20]
    assert scores == [1.0] * 20


def test_every_type_passes_over_damaged_vectors(shelf: VectorShelf) -> None:
    broken = shelf.put(broken=np.full(DIM, np.nan, np.float16))["broken"]
    shelf.compact()
    for query_D in clustered(np.random.default_rng(8), 5).astype(np.float64):
        ids, scores = shelf.search(query_D, 601)
        assert broken not in ids
        assert len(ids) == 600
        assert np.isfinite(scores).all()


def test_every_type_passes_verification(shelf: VectorShelf) -> None:
    def snapshot_problems() -> list[str]:
        problems = verify_collection(shelf.catalog, shelf.collection).problems
        return [problem for problem in problems if problem.startswith("snapshot")]

    assert snapshot_problems() == []
    shelf.remove(*list(shelf.vectors)[:10])
    shelf.put(**named(clustered(np.random.default_rng(9), 20), "new"))
    shelf.compact(append=True)
    assert snapshot_problems() == []
    (path,) = [path for path in shelf.snapshots() if path == shelf.snapshots()[-1]]
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert "are not those that were written" in snapshot_problems()[0]


# --- adding to what is there


@pytest.mark.parametrize("index_type", ["hnsw", "ivf", "ivfpq", "IVF8,SQ8", "HNSW16"])
def test_compaction_adds_to_an_index_without_building_it_anew(
    home: Path, index_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dino_index.approximate_search, "_MAX_SCANNED", 0)
    rng = np.random.default_rng(0)
    shelf = VectorShelf(home, DIM, index_type)
    shelf.put(**named(clustered(rng, 500)))
    shelf.compact()
    reason = built(shelf)[1]
    monkeypatch.setattr(dino_index.snapshots, "build_index", None)  # nobody may call it
    for step in range(3):
        shelf.put(**named(clustered(rng, 20), f"new{step}-"), **named(clustered(rng, 5)))
        shelf.remove(*rng.permutation(list(shelf.vectors))[:5].tolist())
        shelf.compact(append=True)
        assert built(shelf) == (index_type, reason, len(shelf.vectors))
        assert len(shelf.index()) == len(shelf.vectors)
        check(shelf)
    shelf.catalog.close()


def test_an_index_is_built_anew_once_much_of_it_is_gone(home: Path) -> None:
    shelf = VectorShelf(home, DIM, "hnsw")
    shelf.put(**named(clustered(np.random.default_rng(0), 300)))
    shelf.compact()
    size = shelf.snapshots()[-1].stat().st_size
    shelf.remove(*list(shelf.vectors)[:20])
    shelf.compact(append=True)
    assert shelf.snapshots()[-1].stat().st_size == size  # they are in it still
    shelf.remove(*list(shelf.vectors)[:20])
    shelf.compact(append=True)
    assert shelf.snapshots()[-1].stat().st_size < size
    check(shelf)
    shelf.catalog.close()


def test_compaction_without_leave_to_append_keeps_no_byte_of_a_removed_vector(home: Path) -> None:
    shelf = VectorShelf(home, DIM, "ivf")
    shelf.put(**named(clustered(np.random.default_rng(0), 300)))
    secret_D = np.linspace(1, 2, DIM).astype(np.float16)
    secret = shelf.put(secret=secret_D)["secret"]
    shelf.compact()
    assert secret_D.tobytes() in shelf.snapshots()[-1].read_bytes()
    shelf.remove(secret)
    shelf.compact()
    assert secret_D.tobytes() not in shelf.snapshots()[-1].read_bytes()
    shelf.catalog.close()


# --- which type


@pytest.mark.parametrize(
    ("num_vectors", "num_gpus", "expected"),
    [(10, 0, "flat"), (199_999, 0, "flat"), (200_000, 0, "hnsw"), (5_000_000, 0, "ivf"), (50_000_000, 0, "ivf"),
     (1_000_000, 1, "flat"), (2_000_000, 1, "ivf"), (50_000_000, 8, "ivf")],
)  # fmt: skip
def test_auto_goes_by_number_and_device(num_vectors: int, num_gpus: int, expected: str) -> None:
    choice = choose_index_type("auto", num_vectors, 384, num_gpus=num_gpus)
    assert choice.name == expected
    assert f"{num_vectors:,} vectors" in choice.reason
    assert ("GPU" in choice.reason) == bool(num_gpus)


def test_auto_takes_a_smaller_type_where_memory_is_short() -> None:
    large = choose_index_type("auto", 10**6, 384, num_gpus=0)
    small = choose_index_type("auto", 10**6, 384, num_gpus=0, available=large.num_bytes - 1)
    assert (large.name, small.name) == ("hnsw", "ivfpq")
    assert "hnsw would take 1." in small.reason
    assert small.num_bytes < large.num_bytes


def test_too_little_memory_is_an_error_that_names_what_would_fit() -> None:
    ivfpq = choose_index_type("ivfpq", 10**7, 384)
    with pytest.raises(TooLittleMemory, match=r"type flat of 10,000,000 .* 15\.\d GB .* use --index-type ivfpq"):
        choose_index_type("flat", 10**7, 384, available=ivfpq.num_bytes)
    with pytest.raises(TooLittleMemory, match=r"found 1\.0 MB available; use a machine with more$"):
        choose_index_type("auto", 10**7, 384, num_gpus=0, available=10**6)


@pytest.mark.parametrize("name", ["flat", "hnsw", "ivf", "ivfpq", "IVF256,SQ8", "HNSW16,Flat"])
def test_the_estimate_is_no_less_than_what_the_index_takes(name: str) -> None:
    rng = np.random.default_rng(0)
    rows = StoredVectors(np.arange(4000), rng.normal(size=(4000, 64)).astype(np.float16))
    choice = choose_index_type(name, len(rows), 64)
    index, _ = build_index(choice, rows)
    taken = len(faiss.serialize_index(index))
    assert taken <= choice.num_bytes
    assert choice.num_bytes < 4 * taken + 60e6  # nor far from it


def test_a_small_collection_needs_little_memory() -> None:
    assert choose_index_type("auto", 100, 384, available=2_000_000).name == "flat"


def test_memory_is_what_the_container_has_left(tmp_path: Path) -> None:
    machine = available_bytes(tmp_path)
    assert machine > 1e6
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("800000\n")
    assert available_bytes(tmp_path) == 200_000
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 300000\n")
    assert available_bytes(tmp_path) == 500_000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes(tmp_path) > 1e6


@pytest.mark.parametrize("name", ["auto", "flat", "hnsw", "ivf", "ivfpq", "IVF64,Flat", "OPQ4,IVF16,PQ4", "SQ8"])
def test_known_types_are_accepted(name: str) -> None:
    check_index_type(name, DIM)


@pytest.mark.parametrize("name", ["", "Ivf", "nonsense", "PQ5", "IVF0,Flat", "IDMap,Flat", "IVF16,", "NSG16"])
def test_what_is_no_type_is_refused_with_the_types_that_there_are(name: str) -> None:
    with pytest.raises(IndexTypeInvalid, match=r"^--index-type "):
        check_index_type(name, DIM)


@pytest.mark.parametrize(("asked", "number"), [("ivfpq", 10), ("IVF64,Flat", 40), ("IVF4,PQ4x8", 100), ("ivf", 3)])
def test_too_few_vectors_to_train_are_searched_exactly_until_there_are_more(
    home: Path, asked: str, number: int
) -> None:
    shelf = VectorShelf(home, DIM, asked)
    shelf.put(**named(clustered(np.random.default_rng(0), number)))
    shelf.compact()
    if asked == "ivf":
        assert built(shelf)[0] == "ivf"  # one list takes any
    else:
        assert built(shelf)[0] == "flat"
        assert "few" in built(shelf)[1]
    check(shelf)
    shelf.put(**named(clustered(np.random.default_rng(1), 700), "more"))
    shelf.compact(append=True)
    assert built(shelf)[0] == asked
    check(shelf)
    shelf.catalog.close()


@pytest.mark.parametrize(
    ("factory", "lossy"),
    [("Flat", False), ("SQfp16", False), ("HNSW16", False), ("HNSW16_SQfp16", False), ("IVF4,Flat", False),
     ("SQ8", True), ("IVF4,PQ4", True), ("HNSW16_SQ8", True), ("PCA8,Flat", True), ("LSH", True)],
)  # fmt: skip
def test_lossy_types_are_known(factory: str, lossy: bool) -> None:
    metric = faiss.METRIC_L2 if factory == "LSH" else faiss.METRIC_INNER_PRODUCT
    assert is_lossy(faiss.index_factory(DIM, factory, metric)) == lossy


def test_nothing_is_cloned_without_a_gpu_nor_what_gpus_cannot_hold() -> None:
    flat = faiss.index_factory(DIM, "Flat", faiss.METRIC_INNER_PRODUCT)
    graph = faiss.index_factory(DIM, "HNSW16", faiss.METRIC_INNER_PRODUCT)
    assert gpu_clone(flat, 0) is None
    assert gpu_clone(graph, 1) is None


def test_search_parameters_reach_the_index_inside() -> None:
    for factory, effort in itertools.product(("PCA8,IVF16,Flat", "IVF16,Flat", "IVF16,SQ8,RFlat", "HNSW8"), (1.0, 2.0)):
        index = faiss.index_factory(DIM, factory, faiss.METRIC_INNER_PRODUCT)
        vectors_ND = clustered(np.random.default_rng(0), 300).astype(np.float32)
        index.train(vectors_ND)
        index.add(vectors_ND)
        chosen = faiss.IDSelectorRange(100, 120)
        _, found = index.search(vectors_ND[:5], 10, params=search_parameters(index, chosen, effort))
        assert set(found.ravel().tolist()) <= {-1, *range(100, 120)}
        assert (found >= 0).any()


# --- the command's option


def stored(home: Path) -> tuple[str, str | None]:
    catalog = open_catalog(home)
    with catalog.reading() as session:
        asked = session.scalars(select(CollectionRow.index_type)).one()
        built = session.scalars(select(SnapshotRow.index_type)).one_or_none()
    catalog.close()
    return asked, built


def test_a_changed_type_is_remembered_and_built(home: Path, tiny_model: Path, tmp_path: Path) -> None:
    photos = write_pictures(tmp_path / "photos", *(f"{number}.jpg" for number in range(6)))
    index_files(home, tiny_model, tmp_path / "photos")
    assert stored(home) == ("auto", None)
    for index_type in ("hnsw", "flat", "IVF2,Flat"):
        index_files(home, tiny_model, tmp_path / "photos", index_type=index_type)
        assert stored(home) == (index_type, index_type)
        assert findable(home) == set(map(str, photos))
    index_files(home, tiny_model, tmp_path / "photos")
    assert stored(home) == ("IVF2,Flat", "IVF2,Flat")
    write_pictures(tmp_path / "photos", "another.jpg", seed=100)
    index_files(home, tiny_model, tmp_path / "photos", index_type="ivfpq")
    assert stored(home) == ("ivfpq", "flat")  # too few to train it
    assert len(findable(home)) == 7


def test_a_type_that_is_none_is_refused_before_anything_is_indexed(
    home: Path, tiny_model: Path, tmp_path: Path
) -> None:
    write_pictures(tmp_path / "photos", "a.jpg")
    with pytest.raises(IndexTypeInvalid, match="found 'IVF8,PQ7'"):
        index_files(home, tiny_model, tmp_path / "photos", index_type="IVF8,PQ7")
    with pytest.raises(CollectionNotFound):
        findable(home)
    index_files(home, tiny_model, tmp_path / "photos")
    with pytest.raises(IndexTypeInvalid):
        index_files(home, tiny_model, tmp_path / "photos", index_type="nonsense")
    assert stored(home) == ("auto", None)


def test_too_little_memory_stops_a_run_before_it_embeds(
    home: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pictures(tmp_path / "photos", "a.jpg", "b.jpg")
    monkeypatch.setattr(dino_index.indexing, "_MIN_IMAGES_TO_WEIGH", 2)
    monkeypatch.setattr(dino_index.snapshots, "available_bytes", lambda: 1000)
    with pytest.raises(TooLittleMemory, match="2 vectors of 64 channels"):
        index_files(home, tiny_model, tmp_path / "photos")
    monkeypatch.undo()
    monkeypatch.setenv("DINO_SEARCH_HOME", str(home))
    assert findable(home) == set()


def test_scores_are_cosines_of_the_stored_numbers(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lossy codes choose candidates and never score them."""
    monkeypatch.setattr(dino_index.approximate_search, "_MAX_SCANNED", 0)
    shelf = VectorShelf(home, DIM, "IVF4,PQ4x4")
    shelf.put(**named(clustered(np.random.default_rng(0), 300)))
    shelf.compact()
    query_D: NDArray[Any] = clustered(np.random.default_rng(1), 1)[0].astype(np.float64)
    ids, scores = shelf.search(query_D, 10)
    for image_id, score in zip(ids, scores, strict=True):
        assert score == round(float(unit(shelf.vectors[image_id].astype(np.float64)) @ unit(query_D)), 6) or (
            abs(score - float(unit(shelf.vectors[image_id].astype(np.float64)) @ unit(query_D))) < 1.5e-6
        )
    shelf.catalog.close()
