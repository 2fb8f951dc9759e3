"""The formulas against scikit-learn and against slow obvious versions, on random input full of ties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, top_k_accuracy_score

from dino_training.evaluation.metrics import (
    ScoredPairs,
    average_precision,
    precision_at,
    ranks_without_junk,
    top_k_accuracy,
    trapezoid_average_precision,
    worst_order,
)

# A pair: its score, of few different ones, so that many tie; whether it is a match; whose query it is.
PAIRS = st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.integers(0, 3)), min_size=1, max_size=40)
PLACES = st.lists(st.sampled_from(["match", "junk", "other"]), min_size=1, max_size=30)


def pairs_of(pairs: list[tuple[int, bool, int]], missed: list[int]) -> ScoredPairs:
    num_matches = np.array(missed) + np.bincount([query for _, correct, query in pairs if correct], minlength=4)
    scores, correct, queries = (np.array(column) for column in zip(*pairs, strict=True))
    return ScoredPairs.of(scores.astype(np.float64), correct.astype(bool), queries, num_matches)


def slow_micro_ap(pairs: list[tuple[int, bool, int]], num_matches: int) -> float:
    ordered = sorted(pairs, key=lambda pair: (-pair[0], pair[1]))
    total, found = 0.0, 0
    for number, (_, correct, _) in enumerate(ordered, 1):
        if correct:
            found += 1
            total += found / number
    return total / num_matches if num_matches else 0.0


def slow_recall_at_p90(pairs: list[tuple[int, bool, int]], num_matches: int) -> float:
    best = 0.0
    for threshold in {score for score, _, _ in pairs}:
        called = [correct for score, correct, _ in pairs if score >= threshold]
        if 10 * sum(called) >= 9 * len(called):
            best = max(best, sum(called) / num_matches if num_matches else 0.0)
    return best


@given(PAIRS, st.lists(st.integers(0, 3), min_size=4, max_size=4))
def test_figures_over_pairs_agree_with_a_slow_version(pairs: list[tuple[int, bool, int]], missed: list[int]) -> None:
    tested = pairs_of(pairs, missed)
    num_matches = sum(missed) + sum(correct for _, correct, _ in pairs)
    assert tested.figures().micro_ap == pytest.approx(slow_micro_ap(pairs, num_matches))
    assert tested.figures().recall_at_p90 == pytest.approx(slow_recall_at_p90(pairs, num_matches))


@given(PAIRS, st.lists(st.integers(0, 3), min_size=4, max_size=4), st.lists(st.integers(0, 3), min_size=4, max_size=4))
def test_a_query_that_counts_several_times_is_so_many_queries(
    pairs: list[tuple[int, bool, int]], missed: list[int], times: list[int]
) -> None:
    repeated = [pair for pair in pairs for _ in range(times[pair[2]])]
    weighted = pairs_of(pairs, missed).figures(np.array(times))
    num_matches = sum(n * (missed[q] + sum(c for _, c, q2 in pairs if q2 == q)) for q, n in enumerate(times))
    assert weighted.micro_ap == pytest.approx(slow_micro_ap(repeated, num_matches))
    assert weighted.recall_at_p90 == pytest.approx(slow_recall_at_p90(repeated, num_matches))


@given(st.integers(0, 10_000))
def test_average_precision_is_scikit_learns_where_nothing_ties(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, correct = rng.permutation(50).astype(float), rng.random(50) < 0.2
    correct[rng.integers(50)] = True
    expected = average_precision_score(correct, scores)
    ranks = np.flatnonzero(correct[worst_order(scores, correct)])
    assert average_precision(ranks, len(ranks)) == pytest.approx(expected)
    one_query = np.zeros(50, np.int64)
    pairs = ScoredPairs.of(scores, correct, one_query, np.array([correct.sum()]))
    assert pairs.figures().micro_ap == pytest.approx(expected)


def test_ties_never_help() -> None:
    scores, correct = np.ones(10), np.arange(10) == 0
    pairs = ScoredPairs.of(scores, correct, np.zeros(10, np.int64), np.array([1]))
    assert pairs.figures().micro_ap == pytest.approx(0.1)


def test_a_threshold_takes_all_pairs_of_one_score() -> None:
    correct = np.array([True] * 9 + [True, False])
    scores = np.array([2.0] * 9 + [1.0, 1.0])
    pairs = ScoredPairs.of(scores, correct, np.zeros(11, np.int64), np.array([10]))
    assert pairs.figures().recall_at_p90 == pytest.approx(1.0)  # 10 of 11
    correct[0] = False
    pairs = ScoredPairs.of(scores, correct, np.zeros(11, np.int64), np.array([9]))
    assert pairs.figures().recall_at_p90 == 0  # 8 of 9, then 9 of 11


def test_no_pair_and_no_match_give_nothing() -> None:
    empty = ScoredPairs.of(np.array([]), np.array([], bool), np.array([], np.int64), np.array([2]))
    assert (empty.figures().micro_ap, empty.figures().recall_at_p90) == (0, 0)
    wrong = ScoredPairs.of(np.array([1.0]), np.array([False]), np.array([0]), np.array([0]))
    assert (wrong.figures().micro_ap, wrong.figures(np.array([3])).recall_at_p90) == (0, 0)


def revisited_protocol(places: list[str], num_matches: int, k: int) -> tuple[float, float]:
    """mAP and mP@k of one query, step by step as the protocol words them: junk moves what is behind it up."""
    positions = [number for number, place in enumerate(places) if place == "match"]
    positions = [number - places[:number].count("junk") for number in positions]
    area = 0.0
    for found, position in enumerate(positions):
        before = 1.0 if position == 0 else found / position
        area += (before + (found + 1) / (position + 1)) / 2 / num_matches
    one_based = [position + 1 for position in positions]
    reach = min(max(one_based), k)
    return area, sum(position <= reach for position in one_based) / reach


@given(PLACES, st.sampled_from([1, 5, 10]))
def test_the_revisited_protocol_agrees_with_a_slow_version(places: list[str], k: int) -> None:
    matches, junk = (np.array([place == kind for place in places]) for kind in ("match", "junk"))
    ranks = ranks_without_junk(matches, junk)
    if not len(ranks):
        return
    area, precision = revisited_protocol(places, len(ranks), k)
    assert trapezoid_average_precision(ranks, len(ranks)) == pytest.approx(area)
    assert precision_at(ranks, k) == pytest.approx(precision)


def test_perfect_rankings_have_full_marks_and_missed_matches_none() -> None:
    first: NDArray[np.int64] = np.arange(3)
    assert trapezoid_average_precision(first, 3) == average_precision(first, 3) == 1
    assert trapezoid_average_precision(first, 6) == average_precision(first, 6) == 0.5
    nothing = np.array([], np.int64)
    assert trapezoid_average_precision(nothing, 2) == average_precision(nothing, 2) == 0


@given(st.integers(0, 10_000), st.integers(1, 4))
def test_top_k_accuracy_is_scikit_learns(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    votes, classes = rng.random((30, 6)), rng.integers(6, size=30)
    places = (votes > votes[np.arange(30), classes][:, None]).sum(axis=1)
    assert top_k_accuracy(places, k) == pytest.approx(top_k_accuracy_score(classes, votes, k=k, labels=range(6)))


def test_a_class_without_a_place_is_never_right() -> None:
    assert top_k_accuracy(np.array([-1, 0, 5]), 5) == pytest.approx(1 / 3)
