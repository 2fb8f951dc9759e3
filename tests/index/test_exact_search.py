"""Exact search against comparing all in float64, whichever way the candidates are chosen."""

from __future__ import annotations

from collections.abc import Callable

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import dino_index.exact_search
import dino_index.matrix_products
from dino_index.exact_search import TIE_MARGIN, ExactSearch, scan
from dino_index.index_types import flat_index
from dino_index.snapshots import Vectors

Floats = NDArray[np.float32]


def unit(vectors_ND: NDArray[np.float64]) -> Floats:
    return np.asarray(vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True), np.float32)


def clustered(rng: np.random.Generator, number: int, dim: int) -> Floats:
    centres = rng.normal(size=(8, dim))
    return unit(centres[rng.integers(0, 8, number)] + 0.3 * rng.normal(size=(number, dim)))


def searcher(vectors_ND: Floats) -> ExactSearch:
    return ExactSearch(flat_index(Vectors(np.arange(len(vectors_ND)), vectors_ND)))


@pytest.fixture(params=["float32", "scan", "products"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way of choosing candidates, forced upon searches that would not take it."""
    force(request.param, monkeypatch)
    return str(request.param)


def force(way: str, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(dino_index.exact_search, "_MIN_VECTORS", 10**9 if way == "float32" else 0)
    patch.setattr(dino_index.exact_search, "_QUERIES_THAT_PAY", 0)
    patch.setattr(dino_index.exact_search, "_MULTIPLICATIONS_OF_AN_IMPORT", 0)
    patch.setattr(dino_index.matrix_products, "bfloat16_is_faster", lambda: way == "products")
    patch.setattr(dino_index.exact_search, "_BLOCK", 1024)


def candidates(
    index: ExactSearch, queries_QD: Floats, k: int, allowed_N: NDArray[np.bool_] | None, way: str
) -> list[NDArray[np.int64]]:
    if way == "scan":
        return [index.candidates(query_D[None], k, allowed_N)[0] for query_D in queries_QD]
    return index.candidates(queries_QD, k, allowed_N)


def must_be_found(
    vectors_ND: Floats, query_D: Floats, k: int, allowed_N: NDArray[np.bool_] | None
) -> NDArray[np.int64]:
    """The k best and those that tie with the last of them."""
    scores_N = vectors_ND.astype(np.float64) @ query_D.astype(np.float64)
    scores_N[~np.isfinite(scores_N)] = -np.inf
    if allowed_N is not None:
        scores_N[~allowed_N] = -np.inf
    lowest = np.sort(scores_N)[-min(k, len(scores_N))]
    return np.flatnonzero((scores_N >= lowest - TIE_MARGIN / 2) & np.isfinite(scores_N))


@pytest.mark.parametrize("num_allowed", [None, 3, 700, 2900])
@pytest.mark.parametrize("k", [1, 10, 40])
def test_none_of_the_nearest_is_missed(way: str, k: int, num_allowed: int | None) -> None:
    rng = np.random.default_rng(k)
    vectors_ND = clustered(rng, 3000, 24)
    vectors_ND[1::50] = vectors_ND[0]  # equal ones, more than k
    vectors_ND[77] = np.nan
    allowed_N = None
    if num_allowed is not None:
        allowed_N = np.zeros(3000, np.bool_)
        allowed_N[rng.permutation(3000)[:num_allowed]] = True
    index = searcher(vectors_ND)
    queries_QD = np.concatenate([vectors_ND[:5], clustered(rng, 20, 24), -vectors_ND[5:8]])
    for query_D, found in zip(queries_QD, candidates(index, queries_QD, k, allowed_N, way), strict=True):
        assert set(must_be_found(vectors_ND, query_D, k, allowed_N)) <= set(found.tolist())
        assert 77 not in found
        assert len(set(found.tolist())) == len(found)
        assert allowed_N is None or allowed_N[found].all()


@given(seed=st.integers(0, 2**32), k=st.integers(1, 20), dim=st.sampled_from([1, 2, 7, 33]), spread=st.floats(0, 2))
@settings(max_examples=40)
def test_rounded_products_miss_nothing_whatever_the_vectors(seed: int, k: int, dim: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    number = int(rng.integers(1, 4000))
    vectors_ND = unit(rng.normal(size=dim) + spread * rng.normal(size=(number, dim)) + 1e-9)
    queries_QD = unit(rng.normal(size=dim) + spread * rng.normal(size=(3, dim)) + 1e-9)
    allowed_N = rng.random(number) < rng.random() if seed % 2 else None
    for way in ("scan", "products"):
        with pytest.MonkeyPatch.context() as patch:
            force(way, patch)
            found = candidates(searcher(vectors_ND), queries_QD, k, allowed_N, way)
        for query_D, positions in zip(queries_QD, found, strict=True):
            assert set(must_be_found(vectors_ND, query_D, k, allowed_N)) <= set(positions.tolist())


@pytest.mark.parametrize("choose", ["scan", "products"])
def test_few_candidates_are_left_to_compare(choose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(choose, monkeypatch)
    rng = np.random.default_rng(0)
    vectors_ND = clustered(rng, 20_000, 96)
    queries_QD = clustered(rng, 8, 96)
    found = candidates(searcher(vectors_ND), queries_QD, 10, None, choose)
    assert np.mean([len(positions) for positions in found]) < 400


def test_the_bound_on_rounding_holds_for_the_worst_query(monkeypatch: pytest.MonkeyPatch) -> None:
    """A query along the difference between a vector and its rounded copy makes the most of it."""
    force("products", monkeypatch)
    rng = np.random.default_rng(0)
    vectors_ND = clustered(rng, 2000, 16)
    rounded = dino_index.exact_search._Rounded(flat_index(Vectors(np.arange(2000), vectors_ND)))
    copy = rounded._index.reconstruct_n(0, 2000)
    queries_QD = unit((vectors_ND - copy).astype(np.float64))
    exact_Q = (queries_QD.astype(np.float64) * vectors_ND).sum(axis=1)
    near_Q = (queries_QD.astype(np.float64) * copy).sum(axis=1)
    error_Q = rounded._error(queries_QD, queries_QD)
    assert (np.abs(exact_Q - near_Q) <= error_Q).all()
    assert np.abs(exact_Q - near_Q).max() > 0.9 * error_Q.max()  # and is no larger than it has to be


@pytest.mark.parametrize("make", [lambda: np.zeros((0, 8), np.float32), lambda: np.full((5, 8), np.nan, np.float32)])
def test_nothing_is_found_where_there_is_nothing(way: str, make: Callable[[], Floats]) -> None:
    queries_QD = unit(np.random.default_rng(0).normal(size=(2, 8)))
    assert [len(found) for found in candidates(searcher(make()), queries_QD, 3, None, way)] == [0, 0]


def test_scanning_rows_equals_searching_them() -> None:
    rng = np.random.default_rng(0)
    vectors_ND = clustered(rng, 40_000, 8)
    allowed_N = rng.random(40_000) < 0.5
    rows = Vectors(np.arange(40_000), vectors_ND)
    queries_QD = clustered(rng, 3, 8)
    for query_D, found in zip(queries_QD, scan(rows, queries_QD, 7, allowed_N), strict=True):
        assert set(must_be_found(vectors_ND, query_D, 7, allowed_N)) <= set(found.tolist())
        assert allowed_N[found].all()


def test_answers_are_those_of_faiss() -> None:
    rng = np.random.default_rng(0)
    vectors_ND, queries_QD = clustered(rng, 10_000, 64), clustered(rng, 40, 64)
    index = faiss.IndexFlatIP(64)
    index.add(vectors_ND)
    _, expected = index.search(queries_QD, 10)
    with pytest.MonkeyPatch.context() as patch:
        force("products", patch)
        for ids, found in zip(expected, searcher(vectors_ND).candidates(queries_QD, 10), strict=True):
            assert set(ids.tolist()) <= set(found.tolist())
