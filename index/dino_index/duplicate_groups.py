"""Groups of copies, from pairs that are copies.

- `components`: what is connected, over however many steps; a chain may hold two pictures that are nothing alike.
- `star`: each member is a copy of the group's centre. Centres are taken by their number of copies, most first.
- `complete`: each two members are copies (complete linkage): groups grow along the best pairs first, and two of them
  become one only where all pairs between them are pairs.

The result depends on the pairs alone, not on their order: ties go by position. Pairs that a person said are no copies
never end up in one group, whatever connects them.

Time is about that of sorting the pairs. Two things compare vectors: pairs of crowded vectors that are not listed
(`star`, `complete`), and each group's lowest score. The first is bounded by `MAX_COMPARED` pairs; then `complete` no
longer joins, and `star` leaves out, what is not known to be alike: what they promise still holds, in more and smaller
groups. In a group of more than `MAX_MEMBERS_COMPARED`, the lowest score is that of all members with so many of them,
evenly chosen, and `all_compared` is False.

Shapes: N nodes, P pairs, A and B members.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dino_index.near_pairs import DisjointSets, block_rows

Linkage = Literal["components", "star", "complete"]
LINKAGES: tuple[Linkage, ...] = ("components", "star", "complete")

Scores = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]]
"""scores_AB of each of the first nodes with each of the second."""
Joined = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.bool_]]
"""Whether each of the first nodes is a copy of each of the second, (A, B)."""

MAX_COMPARED = 500_000_000
MAX_MEMBERS_COMPARED = 4096


@dataclass(frozen=True, kw_only=True)
class CopyPairs:
    """Pairs that are copies of each other, each once.

    crowded_N: nodes that may have more copies than are listed. apart: pairs that must not share a group.
    """

    num_nodes: int
    left_P: NDArray[np.int64]
    right_P: NDArray[np.int64]
    score_P: NDArray[np.float32]
    crowded_N: NDArray[np.bool_]
    apart: frozenset[tuple[int, int]] = frozenset()


@dataclass(frozen=True, kw_only=True)
class NodeGroup:
    """Two or more nodes, ascending. min_score: the lowest of all pairs inside, listed or not."""

    members: tuple[int, ...]
    centre: int | None
    """Of a star."""
    min_score: float
    all_compared: bool


def group_pairs(
    pairs: CopyPairs, linkage: Linkage, scores: Scores, joined: Joined, *, max_compared: int = MAX_COMPARED
) -> list[NodeGroup]:
    """Groups of two and more, ordered by their first member; each node is in one at most.

    joined: asked about pairs of crowded nodes that are not listed.
    """
    check = _PairCheck(pairs, joined, max_compared)
    found: list[tuple[list[int], int | None]]
    if linkage == "components":
        found = [(members, None) for members in _components(pairs)]
    elif linkage == "star":
        found = _stars(pairs, check)
    else:
        found = [(members, None) for members in _cliques(pairs, check)]
    groups = []
    for members, centre in sorted(found):
        lowest, all_compared = min_score(np.array(members), scores)
        groups.append(NodeGroup(members=tuple(members), centre=centre, min_score=lowest, all_compared=all_compared))
    return groups


def min_score(members_A: NDArray[np.int64], scores: Scores, limit: int = MAX_MEMBERS_COMPARED) -> tuple[float, bool]:
    """(lowest score of all pairs, whether all were compared)."""
    columns_B = members_A
    if len(members_A) > limit:
        columns_B = members_A[np.linspace(0, len(members_A) - 1, limit).astype(np.int64)]
    lowest = np.inf
    begin = 0
    while begin < len(members_A):
        rows = members_A[begin : begin + block_rows(len(columns_B))]
        scores_AB = scores(rows, columns_B).copy()
        scores_AB[rows[:, None] == columns_B[None]] = np.inf
        lowest = min(lowest, float(scores_AB.min()))
        begin += len(rows)
    return round(lowest, 6), len(columns_B) == len(members_A)


class _PairCheck:
    """Asks whether pairs that are not listed are copies, up to a limit."""

    def __init__(self, pairs: CopyPairs, joined: Joined, max_compared: int) -> None:
        self.crowded_N = pairs.crowded_N
        self._joined = joined
        self._left = max_compared

    def __call__(self, left: Sequence[int], right: Sequence[int]) -> NDArray[np.bool_]:
        """(A, B); all False once the limit is reached."""
        self._left -= len(left) * len(right)
        if self._left < 0:
            return np.zeros((len(left), len(right)), np.bool_)
        parts = []
        rows_A, columns_B = np.array(left, np.int64), np.array(right, np.int64)
        step = block_rows(len(right))
        for begin in range(0, len(left), step):
            parts.append(self._joined(rows_A[begin : begin + step], columns_B))
        return np.concatenate(parts)


class _Apart:
    """Which sets of nodes must not become one."""

    def __init__(self, pairs: Iterable[tuple[int, int]]) -> None:
        self._others: dict[int, set[int]] = defaultdict(set)
        for left, right in pairs:
            self._others[left].add(right)
            self._others[right].add(left)

    def __call__(self, left: int, right: int) -> bool:
        return right in self._others.get(left, ())

    def merge(self, kept: int, gone: int) -> None:
        """The set `gone` has become part of `kept`."""
        for other in self._others.pop(gone, set()):
            self._others[other].discard(gone)
            self._others[other].add(kept)
            self._others[kept].add(other)


def _best_first(pairs: CopyPairs) -> Iterable[tuple[int, int]]:
    order_P = np.lexsort((pairs.right_P, pairs.left_P, -pairs.score_P))
    return zip(pairs.left_P[order_P].tolist(), pairs.right_P[order_P].tolist(), strict=True)


def _components(pairs: CopyPairs) -> list[list[int]]:
    sets = DisjointSets(pairs.num_nodes)
    apart = _Apart(pairs.apart)
    for left, right in _best_first(pairs):
        left, right = sets.find(left), sets.find(right)
        if left != right and not apart(left, right):
            sets.join(left, right)
            apart.merge(min(left, right), max(left, right))
    return _members_of(sets, pairs)


def _members_of(sets: DisjointSets, pairs: CopyPairs) -> list[list[int]]:
    members: dict[int, list[int]] = defaultdict(list)
    for node in np.union1d(pairs.left_P, pairs.right_P).tolist():
        members[sets.find(node)].append(node)
    return [group for group in members.values() if len(group) > 1]


def _neighbours(pairs: CopyPairs) -> dict[int, set[int]]:
    neighbours: dict[int, set[int]] = defaultdict(set)
    for left, right in zip(pairs.left_P.tolist(), pairs.right_P.tolist(), strict=True):
        neighbours[left].add(right)
        neighbours[right].add(left)
    return neighbours


def _stars(pairs: CopyPairs, check: _PairCheck) -> list[tuple[list[int], int | None]]:
    neighbours = _neighbours(pairs)
    component_of: dict[int, list[int]] = {}
    if pairs.crowded_N.any():
        component_of = {node: group for group in _components(pairs) for node in group}
    apart = _Apart(pairs.apart)
    free = set(neighbours)
    groups: list[tuple[list[int], int | None]] = []
    for centre in sorted(neighbours, key=lambda node: (-len(neighbours[node]), node)):
        if centre not in free:
            continue
        members = neighbours[centre] & free
        if pairs.crowded_N[centre]:
            others = [node for node in component_of.get(centre, ()) if node in free and node != centre]
            if others:
                members |= {node for node, is_copy in zip(others, check([centre], others)[0], strict=True) if is_copy}
        chosen = [centre]
        for node in sorted(members):
            if not pairs.apart or not any(apart(node, other) for other in chosen):
                chosen.append(node)
        if len(chosen) > 1:
            free -= set(chosen)
            groups.append((sorted(chosen), centre))
    return groups


def _cliques(pairs: CopyPairs, check: _PairCheck) -> list[list[int]]:
    """Complete linkage: counts, between each two groups, the pairs that are known."""
    sets = DisjointSets(pairs.num_nodes)
    apart = _Apart(pairs.apart)
    members: dict[int, list[int]] = {}
    links: dict[int, dict[int, int]] = defaultdict(dict)
    for left, right in zip(pairs.left_P.tolist(), pairs.right_P.tolist(), strict=True):
        members[left], members[right] = [left], [right]
        links[left][right] = links[right][left] = 1
    crowded = {node for node in members if pairs.crowded_N[node]}
    for left, right in _best_first(pairs):
        left, right = sets.find(left), sets.find(right)
        if left == right or apart(left, right):
            continue
        if links[left].get(right, 0) < len(members[left]) * len(members[right]):
            # A pair that is not listed has two crowded ends: without one, all are listed, and one of them is missing.
            if left not in crowded or right not in crowded:
                continue
            if not check(members[left], members[right]).all():
                continue
        sets.join(left, right)
        kept, gone = min(left, right), max(left, right)
        apart.merge(kept, gone)
        members[kept] += members.pop(gone)
        crowded |= {kept} if gone in crowded else set()
        links[kept].pop(gone, None)
        for other, number in links.pop(gone).items():
            if other != kept:
                links[kept][other] = links[kept].get(other, 0) + number
                links[other][kept] = links[kept][other]
                links[other].pop(gone)
    return [sorted(group) for group in members.values() if len(group) > 1]
