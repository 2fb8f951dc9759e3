"""k-NN over many queries at once against the vote of a single one, and the search against plain products."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dino_index.knn import vote
from dino_index.snapshots import normalise
from dino_training.evaluation import neighbours, voting
from dino_training.evaluation.neighbours import nearest_in_blocks
from dino_training.evaluation.voting import NO_CLASS, knn_places


def unit_vectors(number: int, seed: int, dim: int = 12) -> NDArray[np.float32]:
    vectors = np.random.default_rng(seed).standard_normal((number, dim), np.float32)
    return normalise(vectors)


def slow_places(
    train: NDArray[np.float32], classes: NDArray[np.int64], queries: NDArray[np.float32], own: NDArray[np.int64], k: int
) -> list[int]:
    places = []
    for query, own_class in zip(queries, own, strict=True):
        scores = train @ query
        nearest = np.argsort(-scores, kind="stable")[:k]
        # Labels whose order as text is that of the numbers.
        ranked = vote(scores[nearest].tolist(), [f"{classes[position]:06d}" for position in nearest], 0.07)
        names = [label for label, _ in ranked]
        label = f"{own_class:06d}"
        places.append(names.index(label) if label in names else -1)
    return places


@pytest.mark.parametrize(("num_train", "num_classes"), [(300, 7), (150, 150), (5, 2), (40, 1), (1, 1)])
def test_votes_are_those_of_single_queries(num_train: int, num_classes: int) -> None:
    rng = np.random.default_rng(0)
    train, queries = unit_vectors(num_train, 1), unit_vectors(50, 2)
    classes = rng.permutation(np.arange(num_train) % num_classes)
    own = rng.integers(-1, num_classes, size=50)
    places = knn_places(train, classes, queries, own)
    for k in (10, 20, 100, 200):
        assert places[k].tolist() == slow_places(train, classes, queries, own, k), k


def test_blocks_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    train, queries = unit_vectors(900, 1), unit_vectors(70, 2)
    classes, own = rng.integers(9, size=900), rng.integers(9, size=70)
    whole = knn_places(train, classes, queries, own, ks=(1, 5, 30))
    monkeypatch.setattr(neighbours, "_QUERIES_PER_BLOCK", 32)
    monkeypatch.setattr(neighbours, "_VECTORS_PER_BLOCK", 250)
    monkeypatch.setattr(voting, "_MAX_VOTES", 9 * 7)
    parts = knn_places(train, classes, queries, own, ks=(1, 5, 30))
    assert {k: places.tolist() for k, places in parts.items()} == {k: p.tolist() for k, p in whole.items()}


@pytest.mark.parametrize("num_vectors", [7, 64, 1000, 5003])
@pytest.mark.parametrize("k", [1, 10, 60])
def test_the_nearest_are_those_of_a_plain_ranking(num_vectors: int, k: int) -> None:
    queries, vectors = torch.from_numpy(unit_vectors(40, 0)), torch.from_numpy(unit_vectors(num_vectors, 1))
    ((scores, positions),) = nearest_in_blocks(queries, vectors, k)
    expected = (queries @ vectors.T).topk(min(k, num_vectors))
    assert torch.equal(scores, expected.values)
    assert torch.equal(positions, expected.indices)


def test_equal_vectors_are_each_found_once() -> None:
    vectors = torch.from_numpy(np.repeat(unit_vectors(1, 0), 2000, axis=0))
    ((scores, positions),) = nearest_in_blocks(vectors[:3], vectors, 25)
    assert scores.shape == (3, 25)
    assert all(len(set(row)) == 25 for row in positions.tolist())


def test_a_class_that_nobody_votes_for_has_no_place() -> None:
    train = unit_vectors(30, 0)
    places = knn_places(train, np.arange(30) % 3, train[:4], np.array([NO_CLASS, 0, 1, 2]), ks=(1,))
    assert places[1][0] == -1
    own = np.arange(30) % 3
    assert (places[1][1:] == [0 if own[row] == want else -1 for row, want in ((1, 0), (2, 1), (3, 2))]).all()
