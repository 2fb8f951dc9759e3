from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from dino_index.duplicate_groups import LINKAGES, CopyPairs, NodeGroup, group_pairs, min_score

Scored = dict[tuple[int, int], float]


class Graph:
    """Pairs with scores; all others score 0."""

    def __init__(
        self, num_nodes: int, scored: Scored, *, threshold: float = 0.5, listed: set[Any] | None = None
    ) -> None:
        self.scores_NN = np.eye(num_nodes, dtype=np.float32)
        for (left, right), score in scored.items():
            self.scores_NN[left, right] = self.scores_NN[right, left] = score
        self.threshold = threshold
        self.copies = {pair for pair, score in scored.items() if score >= threshold}
        self.listed = sorted(self.copies if listed is None else listed)
        self.num_asked = 0

    def scores(self, left_A: NDArray[np.int64], right_B: NDArray[np.int64]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = self.scores_NN[np.ix_(left_A, right_B)]
        return found

    def joined(self, left_A: NDArray[np.int64], right_B: NDArray[np.int64]) -> NDArray[np.bool_]:
        self.num_asked += len(left_A) * len(right_B)
        return self.scores(left_A, right_B) >= self.threshold

    def groups(self, linkage: Any, *, apart: Any = (), reverse: bool = False, **options: Any) -> list[NodeGroup]:
        listed = self.listed[::-1] if reverse else self.listed
        left, right = (np.array([pair[side] for pair in listed], np.int64) for side in (0, 1))
        crowded_N = np.zeros(len(self.scores_NN), np.bool_)
        crowded_N[[node for pair in self.copies - set(listed) for node in pair]] = True
        pairs = CopyPairs(
            num_nodes=len(self.scores_NN), left_P=left, right_P=right, score_P=self.scores_NN[left, right],
            crowded_N=crowded_N, apart=frozenset(apart),
        )  # fmt: skip
        return group_pairs(pairs, linkage, self.scores, self.joined, **options)


def members(groups: list[NodeGroup]) -> list[tuple[int, ...]]:
    return [group.members for group in groups]


CHAIN: Scored = {(0, 1): 0.9, (1, 2): 0.8, (2, 3): 0.85}

graphs = st.dictionaries(
    st.tuples(st.integers(0, 9), st.integers(0, 9)).filter(lambda pair: pair[0] < pair[1]),
    st.sampled_from([0.2, 0.6, 0.7, 0.8, 0.9]),
    max_size=30,
)


def test_a_chain_is_one_component_and_shows_its_weakest_pair() -> None:
    (group,) = Graph(5, CHAIN).groups("components")
    assert (group.members, group.min_score, group.all_compared) == ((0, 1, 2, 3), 0.0, True)


def test_a_star_holds_what_is_like_its_centre() -> None:
    (group,) = Graph(5, CHAIN).groups("star")
    assert (group.members, group.centre) == ((0, 1, 2), 1)


def test_complete_groups_grow_along_the_best_pairs() -> None:
    assert members(Graph(5, CHAIN).groups("complete")) == [(0, 1), (2, 3)]


@given(graphs)
def test_components_are_what_flooding_finds(scored: Scored) -> None:
    graph = Graph(10, scored)
    expected, seen = [], set[int]()
    for start in range(10):
        flood, reached = [start], {start}
        while flood:
            node = flood.pop()
            new = {a + b - node for a, b in graph.copies if node in (a, b)} - reached
            reached |= new
            flood += new
        if start not in seen and len(reached) > 1:
            expected.append(tuple(sorted(reached)))
        seen |= reached
    assert members(graph.groups("components")) == expected


@given(graphs)
def test_stars_are_what_the_greedy_rule_says(scored: Scored) -> None:
    graph = Graph(10, scored)
    like = {node: {a + b - node for a, b in graph.copies if node in (a, b)} for node in range(10)}
    free, expected = set(range(10)), []
    for centre in sorted(like, key=lambda node: (-len(like[node]), node)):
        if centre in free and like[centre] & free:
            expected.append(tuple(sorted((like[centre] & free) | {centre})))
            free -= set(expected[-1])
    assert members(graph.groups("star")) == sorted(expected)


@given(graphs)
def test_complete_linkage_is_what_agglomeration_finds(scored: Scored) -> None:
    graph = Graph(10, scored)
    groups = [{node} for node in range(10)]
    for left, right in sorted(graph.copies, key=lambda pair: (-scored[pair], pair)):
        one, other = (next(group for group in groups if node in group) for node in (left, right))
        if one is not other and all(tuple(sorted((a, b))) in graph.copies for a in one for b in other):
            groups.remove(other)
            one |= other
    expected = sorted(tuple(sorted(group)) for group in groups if len(group) > 1)
    assert members(graph.groups("complete")) == expected


@given(graphs, st.sampled_from(LINKAGES))
def test_no_node_is_twice_and_the_order_of_pairs_is_nothing(scored: Scored, linkage: Any) -> None:
    graph = Graph(10, scored)
    groups = graph.groups(linkage)
    nodes = [node for group in groups for node in group.members]
    assert len(nodes) == len(set(nodes))
    assert groups == graph.groups(linkage, reverse=True)
    for group in groups:
        pairs = [graph.scores_NN[pair] for pair in combinations(group.members, 2)]
        assert group.min_score == pytest.approx(min(pairs))


@given(graphs, st.sampled_from(LINKAGES), st.sets(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=6))
def test_what_is_said_to_be_no_copy_never_shares_a_group(scored: Scored, linkage: Any, said: set[Any]) -> None:
    apart = {tuple(sorted(pair)) for pair in said if pair[0] != pair[1]}
    kept = {pair: score for pair, score in scored.items() if pair not in apart}
    for group in Graph(10, kept).groups(linkage, apart=apart):
        assert not apart & set(combinations(group.members, 2))


@given(graphs, st.sampled_from(["star", "complete"]))
def test_pairs_of_crowded_nodes_are_looked_up(scored: Scored, linkage: Any) -> None:
    full = Graph(10, scored)
    # Of each component only some pairs are listed: those of the flood that finds it.
    listed, reached = set(), set[int]()
    for pair in sorted(full.copies):
        if not set(pair) <= reached:
            listed.add(pair)
            reached |= set(pair)
    partial = Graph(10, scored, listed=listed)
    like = {frozenset(pair) for pair in full.copies}
    for group in partial.groups(linkage):
        if linkage == "complete":
            assert {frozenset(pair) for pair in combinations(group.members, 2)} <= like
        else:
            assert group.centre is not None
            assert all(frozenset((group.centre, node)) in like for node in group.members if node != group.centre)


def test_a_crowd_with_few_listed_pairs_is_one_complete_group() -> None:
    everything = dict.fromkeys(combinations(range(30), 2), 0.9)
    graph = Graph(30, everything, listed={(node, node + 1) for node in range(29)})
    for linkage in LINKAGES:
        assert members(graph.groups(linkage)) == [tuple(range(30))]


@pytest.mark.parametrize("linkage", ["star", "complete"])
def test_comparing_is_bounded(linkage: Any) -> None:
    everything = dict.fromkeys(combinations(range(30), 2), 0.9)
    graph = Graph(30, everything, listed={(node, node + 1) for node in range(29)})
    groups = graph.groups(linkage, max_compared=20)
    assert graph.num_asked <= 20
    assert len(groups) > 1
    assert sum(len(group.members) for group in groups) > 20


def test_the_lowest_score_of_a_large_group_is_said_to_be_incomplete() -> None:
    graph = Graph(100, {(0, 99): 0.3})
    graph.scores_NN[graph.scores_NN == 0] = 0.7
    for first, limit, expected, all_compared in (
        (0, 1000, 0.3, True), (0, 10, 0.3, False), (1, 10, 0.7, False),
    ):  # fmt: skip
        lowest, whole = min_score(np.arange(first, 100), graph.scores, limit)  # both ends are always compared
        assert lowest == pytest.approx(expected)
        assert whole == all_compared
