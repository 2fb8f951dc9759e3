"""All pairs of vectors that are alike, found without comparing all with all.

Up to some ten thousand vectors every one is compared with every other, block by block. Of more, each vector is put
into the list of its nearest of about 3 √N centroids (k-means of a sample) and compared with what lies in the lists of
its `num_probes` nearest ones: a pair is found where either looks into the other's list. Both steps take time that
grows with N √N. How many lists are looked into is chosen from pairs that are known: those of a sample of the vectors
with all others, compared exactly; where these are few, partners made up for the sample, at cosines from the asked one
to 1, each leaning towards another stored vector. The number is what finds the wanted share of them.

Memory is that of the vectors, of a block of products, and of at most `max_partners` pairs a vector and what a block's
spanning forest adds: among thousands of vectors that are all alike, each keeps its best partners, and of the other
pairs those of a maximum spanning forest. So what is connected at any cosine, by all pairs, is connected by the kept.

Shapes: N vectors, C channels, P pairs, H hits of a block, B rows and L columns of a block, S samples, K lists.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from dino_index.index_types import ROWS_PER_PART, Rows

Filter = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.bool_]]
"""Which of the pairs (left_P, right_P) count."""

MAX_PARTNERS = 64
MAX_EXACT = 30_000
"""Up to here all are compared with all: some seconds."""

_BLOCK_SCORES = 1 << 22
_MAX_BLOCK_ROWS = 1024
_CENTROIDS_PER_ROOT = 3
_TRAINING_VECTORS_PER_LIST = 40
_TRAINING_ITERATIONS = 6
_NUM_SAMPLES = 1000
_MAX_SAMPLE_PAIRS = 20_000
_MIN_SAMPLE_PAIRS = 200
_WANTED_RECALL = 0.995
# Never fewer: samples are only like the rest.
_MIN_PROBES = 8
_MAX_PROBES = 512
# 20 bytes each: beyond, memory goes before recall.
_MAX_VISITS = 1 << 27
_SCORE_DECIMALS = 6
# Levels that scores are sorted by: integers of 16 bits sort five times as fast as numbers.
_NUM_LEVELS = 1 << 16
_FIRST_CHUNK = 4096


@dataclass(frozen=True, slots=True)
class NearPairs:
    """Pairs of positions, each once, sorted.

    left_P < right_P: int64. cosine_P: float32, rounded to 6 decimals, at most 1.
    crowded_N: bool; vectors of which not all pairs are listed. A pair that is not listed has two of them.
    """

    left_P: NDArray[np.int64]
    right_P: NDArray[np.int64]
    cosine_P: NDArray[np.float32]
    crowded_N: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.left_P)


def near_pairs(
    rows: Rows,
    min_cosine: float,
    *,
    allowed: Filter | None = None,
    max_partners: int = MAX_PARTNERS,
    max_exact: int = MAX_EXACT,
    on_progress: Callable[[float], None] = lambda done_frac: None,
) -> NearPairs:
    """All pairs whose cosine is at least `min_cosine`; for more than `max_exact` vectors, nearly all.

    allowed: asked before pairs are chosen among many, so that what it refuses displaces nothing. May be asked of
    a pair in either order.
    max_partners: a vector that has more of them after it, in the order of positions, keeps that many best ones.
    A vector of zeros, or one that is not finite, is like none.
    Raises ValueError for a cosine that is not above 0 and at most 1, or max_partners below 1.
    """
    if not 0 < min_cosine <= 1:
        raise ValueError(f"min_cosine must be above 0 and at most 1, found {min_cosine}")
    if max_partners < 1:
        raise ValueError(f"max_partners must be at least 1, found {max_partners}")
    blocks = _Blocks(rows, min_cosine, allowed, max_partners)
    lists = _Lists.of(rows, min_cosine) if len(rows) > max_exact else None
    if lists is None:
        _compare_all(blocks, on_progress)
    else:
        _compare_lists(blocks, lists, on_progress)
    return blocks.pairs()


def _compare_all(blocks: _Blocks, on_progress: Callable[[float], None]) -> None:
    num_rows = len(blocks.rows)
    positions_N = np.arange(num_rows)
    begin = 0
    while begin < num_rows:
        end = min(num_rows, begin + block_rows(num_rows - begin))
        blocks.compare(positions_N[begin:end], positions_N[begin:], num_shared=end - begin)
        begin = end
        on_progress(begin / num_rows)


def _compare_lists(blocks: _Blocks, lists: _Lists, on_progress: Callable[[float], None]) -> None:
    for done, (residents, visitors) in enumerate(lists, 1):
        members = np.concatenate([residents, visitors])
        begin = 0
        while begin < len(residents):
            end = min(len(residents), begin + block_rows(len(members) - begin))
            blocks.compare(residents[begin:end], members[begin:], num_shared=end - begin)
            begin = end
        if done % 64 == 0:
            on_progress(done / len(lists))
    on_progress(1.0)


def block_rows(num_columns: int) -> int:
    """How many rows are multiplied with so many columns at once."""
    return int(np.clip(_BLOCK_SCORES // max(1, num_columns), 1, _MAX_BLOCK_ROWS))


class _Blocks:
    """Compares blocks of rows, and collects the pairs."""

    def __init__(self, rows: Rows, min_cosine: float, allowed: Filter | None, max_partners: int) -> None:
        self.rows = rows
        self._min_cosine = min_cosine
        self._allowed = allowed
        self._max_partners = max_partners
        self._parts: list[tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]] = []
        self._crowded_N = np.zeros(len(rows), np.bool_)
        finite_N = np.empty(len(rows), np.bool_)
        for begin in range(0, len(rows), ROWS_PER_PART):
            positions = np.arange(begin, min(begin + ROWS_PER_PART, len(rows)))
            finite_N[positions] = np.isfinite(rows.rows(positions)).all(axis=1)
        self._finite_N = None if finite_N.all() else finite_N

    def compare(self, rows_B: NDArray[np.int64], columns_L: NDArray[np.int64], *, num_shared: int) -> None:
        """num_shared: the first columns are the rows themselves, and each of their pairs is looked at once."""
        columns_LC = self.rows.rows(columns_L)
        rows_BC = columns_LC[:num_shared] if num_shared == len(rows_B) else self.rows.rows(rows_B)
        with np.errstate(invalid="ignore"):
            scores_BL = rows_BC @ columns_LC.T
        if self._finite_N is not None:
            scores_BL[~self._finite_N[rows_B]] = -1
            scores_BL[:, ~self._finite_N[columns_L]] = -1
        # The margin keeps what rounding lifts to the asked cosine.
        # Flat, as NumPy finds them eight times as fast so.
        hit_H = np.flatnonzero(scores_BL >= self._min_cosine - 10.0**-_SCORE_DECIMALS)
        row_H, column_H = np.divmod(hit_H, len(columns_L))
        score_H = np.round(scores_BL[row_H, column_H], _SCORE_DECIMALS)
        kept_H = ((column_H >= num_shared) | (column_H > row_H)) & (score_H >= np.float32(self._min_cosine))
        row_H, column_H, score_H = row_H[kept_H], column_H[kept_H], score_H[kept_H]
        if self._allowed is not None and len(row_H):
            kept_H = self._allowed(rows_B[row_H], columns_L[column_H])
            row_H, column_H, score_H = row_H[kept_H], column_H[kept_H], score_H[kept_H]
        number_B = np.bincount(row_H, minlength=len(rows_B))
        if len(number_B) and number_B.max() > self._max_partners:
            chosen_H = self._best_of_rows(row_H, score_H, number_B)
            chosen_H[spanning_forest(row_H, column_H + (len(rows_B) - num_shared), score_H,
                                     len(rows_B) - num_shared + len(columns_L))] = True  # fmt: skip
            self._crowded_N[rows_B[row_H[~chosen_H]]] = True
            self._crowded_N[columns_L[column_H[~chosen_H]]] = True
            row_H, column_H, score_H = row_H[chosen_H], column_H[chosen_H], score_H[chosen_H]
        if len(row_H):
            left_H, right_H = rows_B[row_H].astype(np.int32), columns_L[column_H].astype(np.int32)
            self._parts.append((np.minimum(left_H, right_H), np.maximum(left_H, right_H), np.minimum(score_H, 1)))

    def _best_of_rows(
        self, row_H: NDArray[np.int64], score_H: NDArray[np.float32], number_B: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """The best hits of each row; of equal ones the first columns. Hits come row by row."""
        chosen_H = np.ones(len(row_H), np.bool_)
        ends_B = np.cumsum(number_B)
        for row in np.flatnonzero(number_B > self._max_partners):
            hits = slice(ends_B[row] - number_B[row], ends_B[row])
            scores = score_H[hits]
            lowest = np.partition(scores, -self._max_partners)[-self._max_partners]
            better = scores > lowest
            ties = np.flatnonzero(scores == lowest)[: self._max_partners - int(better.sum())]
            better[ties] = True
            chosen_H[hits] = better
        return chosen_H

    def pairs(self) -> NearPairs:
        if not self._parts:
            none = np.empty(0, np.int64)
            return NearPairs(none, none, np.empty(0, np.float32), self._crowded_N)
        left_P, right_P, score_P = (np.concatenate(arrays) for arrays in zip(*self._parts, strict=True))
        self._parts.clear()
        # A pair that was found from both sides may differ in its last digit; the higher one counts.
        order_P = np.lexsort((-score_P, right_P, left_P))
        left_P, right_P, score_P = left_P[order_P], right_P[order_P], score_P[order_P]
        first_P = np.ones(len(left_P), np.bool_)
        first_P[1:] = (left_P[1:] != left_P[:-1]) | (right_P[1:] != right_P[:-1])
        return NearPairs(
            left_P[first_P].astype(np.int64), right_P[first_P].astype(np.int64), score_P[first_P], self._crowded_N
        )


def spanning_forest(
    left_H: NDArray[np.int64], right_H: NDArray[np.int64], score_H: NDArray[np.float32], num_nodes: int
) -> NDArray[np.int64]:
    """Which pairs make a maximum spanning forest (Kruskal), scores taken to a 65,536th of their range.

    Most pairs are looked at by NumPy alone: those whose ends the better ones have joined.
    """
    if not len(left_H):
        return np.empty(0, np.int64)
    lowest, highest = float(score_H.min()), float(score_H.max())
    scale = (_NUM_LEVELS - 1) / max(highest - lowest, 1e-9)
    level_H = ((highest - score_H) * scale).astype(np.uint16)
    order_H = np.argsort(level_H, kind="stable")
    forest = DisjointSets(num_nodes)
    chosen: list[int] = []
    begin, size = 0, _FIRST_CHUNK
    while begin < len(order_H) and forest.num_sets > 1:
        part = order_H[begin : begin + size]
        begin += size
        roots_N = forest.roots()
        part = part[roots_N[left_H[part]] != roots_N[right_H[part]]]
        for hit, left, right in zip(part.tolist(), left_H[part].tolist(), right_H[part].tolist(), strict=True):
            if forest.join(left, right):
                chosen.append(hit)
        # Fewer and fewer pairs join anything, and larger and larger chunks can be looked at.
        size = min(2 * size, _BLOCK_SCORES)
    return np.array(chosen, np.int64)


class DisjointSets:
    """Numbers from 0 to `num_nodes` - 1, joined step by step."""

    def __init__(self, num_nodes: int) -> None:
        self._parents = list(range(num_nodes))
        self.num_sets = num_nodes

    def find(self, node: int) -> int:
        """The lowest number of the node's set."""
        parents = self._parents
        while parents[node] != node:
            parents[node] = parents[parents[node]]
            node = parents[node]
        return node

    def join(self, left: int, right: int) -> bool:
        """Makes one set of two; False where they were one."""
        left, right = self.find(left), self.find(right)
        if left == right:
            return False
        self._parents[max(left, right)] = min(left, right)
        self.num_sets -= 1
        return True

    def roots(self) -> NDArray[np.int64]:
        """The lowest number of each node's set."""
        roots_N = np.array(self._parents, np.int64)
        while True:
            above_N = roots_N[roots_N]
            if (above_N == roots_N).all():
                return roots_N
            roots_N = above_N


class _Lists:
    """Which vectors live in each list, and which come to look."""

    def __init__(self, nearest_NP: NDArray[np.int32], num_lists: int) -> None:
        """nearest_NP: lists of each vector, nearest first."""
        self.num_probes = nearest_NP.shape[1]
        self._num_lists = num_lists
        self._residents, self._resident_ends = _sorted_by(nearest_NP[:, 0], num_lists)
        visits, self._visitor_ends = _sorted_by(nearest_NP[:, 1:].ravel(), num_lists)
        # In place: there may be a hundred million visits.
        visits //= max(1, self.num_probes - 1)
        self._visitors = visits

    def __len__(self) -> int:
        return self._num_lists

    def __iter__(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        for number in range(self._num_lists):
            yield (
                self._residents[self._resident_ends[number] : self._resident_ends[number + 1]],
                self._visitors[self._visitor_ends[number] : self._visitor_ends[number + 1]],
            )

    @classmethod
    def of(cls, rows: Rows, min_cosine: float) -> _Lists | None:
        """Lists for these vectors; None where comparing all with all would not take longer."""
        num_rows = len(rows)
        num_lists = int(_CENTROIDS_PER_ROOT * math.sqrt(num_rows))
        rng = np.random.default_rng(0)
        index = _trained(rows, num_lists, rng)
        num_probes = _choose_probes(rows, index, min_cosine, rng)
        if 2 * num_probes >= num_lists:
            return None
        nearest_NP = np.empty((num_rows, num_probes), np.int32)
        for begin in range(0, num_rows, ROWS_PER_PART):
            positions = np.arange(begin, min(begin + ROWS_PER_PART, num_rows))
            nearest_NP[positions] = index.search(_finite(rows, positions), num_probes)[1]
        return cls(nearest_NP, num_lists)


def _sorted_by(lists_V: NDArray[np.int32], num_lists: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(places, ends): the places in `lists_V` that hold list k are places[ends[k] : ends[k + 1]]."""
    ends = np.concatenate([[0], np.cumsum(np.bincount(lists_V, minlength=num_lists))])
    return np.argsort(lists_V, kind="stable"), ends


def _trained(rows: Rows, num_lists: int, rng: np.random.Generator) -> Any:
    """A FAISS index of the centroids."""
    num_training = min(len(rows), _TRAINING_VECTORS_PER_LIST * num_lists)
    sample = np.sort(rng.choice(len(rows), num_training, replace=False))
    means = faiss.Kmeans(
        rows.dim, num_lists, niter=_TRAINING_ITERATIONS, spherical=True, seed=1,
        min_points_per_centroid=1, max_points_per_centroid=_TRAINING_VECTORS_PER_LIST,
    )  # fmt: skip
    means.train(_finite(rows, sample))
    return means.index


def _choose_probes(rows: Rows, index: Any, min_cosine: float, rng: np.random.Generator) -> int:
    """How many lists each vector looks into, so that the wanted share of known pairs is found."""
    sample = rng.choice(len(rows), min(_NUM_SAMPLES, len(rows)), replace=False)
    left_SC, right_SC = _known_pairs(rows, sample, min_cosine, rng)
    if len(left_SC) < _MIN_SAMPLE_PAIRS:
        left_SC, right_SC = _made_up_pairs(rows, sample, min_cosine, rng)
    most = min(_MAX_PROBES, int(index.ntotal), max(_MIN_PROBES, _MAX_VISITS // len(rows)))
    needed_parts = [np.empty(0, np.int64)]
    for begin in range(0, len(left_SC), _NUM_SAMPLES):
        of_left = index.search(left_SC[begin : begin + _NUM_SAMPLES], most)[1]
        of_right = index.search(right_SC[begin : begin + _NUM_SAMPLES], most)[1]
        needed_parts.append(
            1 + np.minimum(_rank_in(of_left, of_right[:, :1], most), _rank_in(of_right, of_left[:, :1], most))
        )
    needed_S = np.sort(np.concatenate(needed_parts))
    if not len(needed_S):
        return _MIN_PROBES
    wanted = int(needed_S[math.ceil(_WANTED_RECALL * len(needed_S)) - 1])
    return min(max(_MIN_PROBES, wanted), most)


def _known_pairs(
    rows: Rows, sample: NDArray[np.int64], min_cosine: float, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Pairs of sampled vectors with any others, found exactly; a random choice where they are many."""
    sample_SC = _finite(rows, sample)
    parts: list[NDArray[np.int64]] = []
    for begin in range(0, len(rows), ROWS_PER_PART):
        positions = np.arange(begin, min(begin + ROWS_PER_PART, len(rows)))
        found = np.flatnonzero(sample_SC @ _finite(rows, positions).T >= min_cosine)
        chosen = found if len(found) <= _MAX_SAMPLE_PAIRS else rng.choice(found, _MAX_SAMPLE_PAIRS, replace=False)
        number, position = np.divmod(chosen, len(positions))
        parts.append(np.stack([number, positions[position]]))
    number_P, right_P = np.concatenate(parts, axis=1)
    others = np.flatnonzero(sample[number_P] != right_P)
    others = rng.permutation(others)[:_MAX_SAMPLE_PAIRS]
    return sample_SC[number_P[others]], _finite(rows, right_P[others])


def _made_up_pairs(
    rows: Rows, sample: NDArray[np.int64], min_cosine: float, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The sampled vectors, and partners at cosines from `min_cosine` to 1, turned towards other stored vectors."""
    stored_SC, others_SC = _finite(rows, sample), _finite(rows, rng.choice(len(rows), len(sample), replace=False))
    others_SC = others_SC - np.einsum("sc,sc->s", others_SC, stored_SC)[:, None] * stored_SC
    norms_S = np.linalg.norm(others_SC, axis=1)
    usable_S = (norms_S > 1e-3) & (np.linalg.norm(stored_SC, axis=1) > 0.5)
    stored_SC, others_SC = stored_SC[usable_S], others_SC[usable_S] / norms_S[usable_S, None]
    cosines_S1 = rng.uniform(min_cosine, 1, (len(stored_SC), 1)).astype(np.float32)
    return stored_SC, cosines_S1 * stored_SC + np.sqrt(1 - cosines_S1**2) * others_SC


def _rank_in(lists_SK: NDArray[np.int64], wanted_S1: NDArray[np.int64], absent: int) -> NDArray[np.int64]:
    """At which place each row holds its wanted list; `absent` where it does not."""
    same_SK = lists_SK == wanted_S1
    ranks: NDArray[np.int64] = np.where(same_SK.any(axis=1), same_SK.argmax(axis=1), absent)
    return ranks


def _finite(rows: Rows, positions: NDArray[np.int64]) -> NDArray[np.float32]:
    """The vectors, zeros in place of numbers that k-means refuses."""
    vectors: NDArray[np.float32] = np.nan_to_num(rows.rows(positions), nan=0.0, posinf=0.0, neginf=0.0)
    return vectors
