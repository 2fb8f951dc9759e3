from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from dino_index.near_pairs import DisjointSets, NearPairs, near_pairs, spanning_forest
from dino_index.snapshots import StoredVectors, Vectors, normalise


def with_copies(
    number: int, num_copies: int, *, dim: int = 32, noise: float = 0.3, seed: int = 0
) -> NDArray[np.float32]:
    """Unit vectors, of which so many are noisy copies of others."""
    rng = np.random.default_rng(seed)
    vectors_NC = normalise(rng.standard_normal((number, dim), np.float32))
    source, target = rng.permutation(number)[: 2 * num_copies].reshape(2, -1)
    noise_NC = normalise(rng.standard_normal((num_copies, dim), np.float32))
    vectors_NC[target] = normalise(vectors_NC[source] + noise * noise_NC)
    return vectors_NC


def rows_of(vectors_NC: NDArray[np.float32]) -> Vectors:
    return Vectors(np.arange(len(vectors_NC)), vectors_NC)


def as_set(pairs: NearPairs) -> set[tuple[int, int]]:
    return set(zip(pairs.left_P.tolist(), pairs.right_P.tolist(), strict=True))


def brute_force(vectors_NC: NDArray[np.float32], min_cosine: float) -> dict[tuple[int, int], float]:
    wide_NC = vectors_NC.astype(np.float64)
    return {
        (left, right): float(cosine)
        for left in range(len(wide_NC))
        for right in range(left + 1, len(wide_NC))
        if (cosine := wide_NC[left] @ wide_NC[right]) >= min_cosine
    }


def components(num_nodes: int, pairs: Any) -> list[int]:
    sets = DisjointSets(num_nodes)
    for left, right in pairs:
        sets.join(left, right)
    return [int(root) for root in sets.roots()]


@pytest.mark.parametrize("min_cosine", [0.4, 0.8, 0.95])
def test_few_vectors_are_all_compared(min_cosine: float) -> None:
    vectors_NC = with_copies(400, 60)
    expected = brute_force(vectors_NC, min_cosine)
    found = near_pairs(rows_of(vectors_NC), min_cosine)
    assert as_set(found) == set(expected)
    assert len(found) == len(expected)
    assert found.cosine_P == pytest.approx([expected[pair] for pair in sorted(expected)], abs=1e-5)
    assert not found.crowded_N.any()


def test_blocks_and_their_seams_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors_NC = with_copies(300, 100)
    whole = near_pairs(rows_of(vectors_NC), 0.5)
    monkeypatch.setattr("dino_index.near_pairs._BLOCK_SCORES", 700)
    assert as_set(near_pairs(rows_of(vectors_NC), 0.5)) == as_set(whole)


@pytest.mark.parametrize("noise", [0.3, 0.9])
def test_lists_find_nearly_all_pairs_and_no_others(noise: float) -> None:
    vectors_NC = with_copies(6000, 1500, noise=noise)
    exact = near_pairs(rows_of(vectors_NC), 0.7)
    found = near_pairs(rows_of(vectors_NC), 0.7, max_exact=1000)
    assert as_set(found) <= as_set(exact)
    assert len(found) >= 0.98 * len(exact) > 500


def test_the_same_vectors_give_the_same_pairs() -> None:
    rows = rows_of(with_copies(4000, 500))
    first, second = (near_pairs(rows, 0.7, max_exact=100) for _ in range(2))
    assert as_set(first) == as_set(second)
    assert first.cosine_P.tolist() == second.cosine_P.tolist()


@pytest.mark.parametrize("max_exact", [10, 100_000])
def test_no_vector_or_one_has_no_pair(max_exact: int) -> None:
    for number in (0, 1):
        assert len(near_pairs(rows_of(np.full((number, 4), 0.5, np.float32)), 0.5, max_exact=max_exact)) == 0


@pytest.mark.parametrize("max_exact", [10, 100_000])
def test_zeros_and_numbers_that_are_none_are_like_nothing(max_exact: int) -> None:
    vectors_NC = with_copies(2000, 200)
    vectors_NC[:3] = 0
    vectors_NC[3:6] = np.nan
    vectors_NC[6] = np.inf
    found = near_pairs(rows_of(vectors_NC), 0.8, max_exact=max_exact)
    assert len(found) > 100
    assert min(found.left_P) > 6


def test_half_precision_vectors_are_read_as_they_are_stored() -> None:
    vectors_NC = with_copies(500, 100)
    stored = StoredVectors(np.arange(500), vectors_NC.astype(np.float16))
    assert as_set(near_pairs(stored, 0.8)) == as_set(near_pairs(rows_of(vectors_NC), 0.8))


@pytest.mark.parametrize("max_exact", [100, 100_000])
def test_thousands_of_equal_vectors_stay_few_pairs_and_one_component(max_exact: int) -> None:
    vectors_NC = with_copies(4000, 100)
    equal = np.arange(500, 3500)
    vectors_NC[equal] = vectors_NC[500]
    found = near_pairs(rows_of(vectors_NC), 0.8, max_exact=max_exact)
    assert len(found) < 3000 * 70
    roots = np.array(components(4000, as_set(found)))
    assert len(set(roots[equal])) == 1
    assert found.crowded_N[equal].sum() > 2900
    assert found.crowded_N.sum() <= 3000 + 100


@given(st.integers(0, 10_000), st.integers(1, 5))
def test_crowded_vectors_keep_the_components_at_every_cosine(seed: int, max_partners: int) -> None:
    rng = np.random.default_rng(seed)
    vectors_NC = normalise(np.abs(rng.standard_normal((40, 3))).astype(np.float32))
    every = near_pairs(rows_of(vectors_NC), 0.3)
    kept = near_pairs(rows_of(vectors_NC), 0.3, max_partners=max_partners)
    assert as_set(kept) <= as_set(every)
    listed = as_set(kept)
    for left, right in as_set(every) - listed:
        assert kept.crowded_N[left]
        assert kept.crowded_N[right]
    for cosine in (0.3, 0.9, 0.97, 0.99):
        # A 65,536th of the range is what the forest rounds scores to.
        chosen = [p for p, score in zip(sorted(as_set(every)), every.cosine_P, strict=True) if score >= cosine + 1e-4]
        of_kept = [p for p, score in zip(sorted(listed), kept.cosine_P, strict=True) if score >= cosine]
        roots = components(40, of_kept)
        assert all(roots[left] == roots[right] for left, right in chosen)


@pytest.mark.parametrize("max_exact", [100, 100_000])
def test_what_is_not_allowed_displaces_nothing(max_exact: int) -> None:
    vectors_NC = np.repeat(with_copies(20, 0), 100, axis=0)
    folder_N = np.arange(2000) % 2
    found = near_pairs(
        rows_of(vectors_NC), 0.9, max_partners=3, max_exact=max_exact,
        allowed=lambda left, right: folder_N[left] != folder_N[right],
    )  # fmt: skip
    assert (folder_N[found.left_P] != folder_N[found.right_P]).all()
    roots = np.array(components(2000, as_set(found)))
    assert [len(set(roots[begin : begin + 100])) for begin in range(0, 2000, 100)] == [1] * 20


@given(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11), st.integers(0, 5)), max_size=60))
def test_the_spanning_forest_is_a_maximum_one(edges: list[tuple[int, int, int]]) -> None:
    edges = [edge for edge in edges if edge[0] != edge[1]]
    left, right, score = (
        (np.array(column, np.int64) for column in zip(*edges, strict=True)) if edges else [np.empty(0, np.int64)] * 3
    )
    chosen = spanning_forest(left, right, score.astype(np.float32), 12)
    sets, weight = DisjointSets(12), 0
    for left_node, right_node, worth in sorted(edges, key=lambda edge: -edge[2]):
        weight += worth if sets.join(left_node, right_node) else 0
    assert int(score[chosen].sum()) == weight
    assert components(12, [edges[hit][:2] for hit in chosen]) == [int(root) for root in sets.roots()]


@pytest.mark.parametrize("min_cosine", [0.0, -1.0, 1.5, float("nan")])
def test_a_cosine_that_makes_no_sense_is_refused(min_cosine: float) -> None:
    with pytest.raises(ValueError, match="min_cosine must be above 0"):
        near_pairs(rows_of(np.eye(3, dtype=np.float32)), min_cosine)
