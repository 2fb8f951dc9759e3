"""Rankings of references, judged by truth: which places the matches have, and the scored pairs of all queries.

Scores that are equal count against the ranking: what is no match is taken to stand first.

Shapes: Q queries, N references, D channels, R matches of one query, K candidates of one query.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dino_index.matrix_products import product
from dino_training.evaluation.bootstrap import interval_of_mean, intervals_of
from dino_training.evaluation.metrics import ScoredPairs, average_precision, mean, worst_order
from dino_training.evaluation.results import Figure
from dino_training.evaluation.truth import QueryTruth

_SCORE_DECIMALS = 6
_MAX_PRODUCTS = 1 << 24
# Pairs of all queries that figures over pairs are taken of; each query has at least so many candidates.
_MAX_PAIRS = 1_000_000
_MIN_CANDIDATES = 100


@dataclass(frozen=True, kw_only=True, eq=False)
class Judged:
    """One query's ranking. ranks_R: how many counted references stand before each match that was found, rising.

    scores_K, correct_K: its candidates, for figures over the pairs of all queries.
    """

    ranks_R: NDArray[np.int64]
    num_matches: int
    scores_K: NDArray[np.float64]
    correct_K: NDArray[np.bool_]

    @property
    def is_match_first(self) -> bool:
        return bool((self.ranks_R[:1] == 0).any())


def judge_candidates(
    scores_K: Sequence[float], references_K: Sequence[int], truth: QueryTruth, k: int | None = None
) -> Judged:
    """A list of candidates in any order; ignored ones are taken out, matches that are not in it were not found.

    k: only the best so many count; None for all.
    """
    kept = [number for number, reference in enumerate(references_K) if reference not in truth.ignored]
    scores = np.array([scores_K[number] for number in kept], np.float64).round(_SCORE_DECIMALS)
    correct = np.array([references_K[number] in truth.matches for number in kept], np.bool_)
    order = worst_order(scores, correct)[:k]
    return Judged(
        ranks_R=np.flatnonzero(correct[order]),
        num_matches=len(truth.matches),
        scores_K=scores[order],
        correct_K=correct[order],
    )


def judge_all(scores_N: NDArray[np.float32], truth: QueryTruth, num_candidates: int) -> Judged:
    """The ranking of all references. num_candidates: best of them that figures over pairs are taken of."""
    counted_N = np.ones(len(scores_N), np.bool_)
    counted_N[list(truth.ignored)] = False
    correct_N = np.zeros(len(scores_N), np.bool_)
    correct_N[list(truth.matches)] = True
    scores = scores_N[counted_N].astype(np.float64).round(_SCORE_DECIMALS)
    correct = correct_N[counted_N]
    own_R, others = np.sort(scores[correct])[::-1], np.sort(scores[~correct])
    before_R = len(others) - np.searchsorted(others, own_R, side="left")
    if len(scores) > num_candidates:
        # Where scores tie at the last place, non-matches stay, and matches go.
        lowest = np.partition(scores, -num_candidates)[-num_candidates]
        near = np.flatnonzero(scores >= lowest)
        scores, correct = scores[near], correct[near]
    order = worst_order(scores, correct)[:num_candidates]
    return Judged(
        ranks_R=before_R + np.arange(len(own_R)),
        num_matches=len(truth.matches),
        scores_K=scores[order],
        correct_K=correct[order],
    )


def judge_by_cosine(
    queries_QD: NDArray[np.float32], references_ND: NDArray[np.float32], truth: Sequence[QueryTruth]
) -> list[Judged]:
    """The rankings of all references by cosine. queries_QD: a row for each of `truth`; all of unit length."""
    num_candidates = max(_MIN_CANDIDATES, _MAX_PAIRS // max(1, len(truth)))
    return [
        judge_all(scores_N, query, num_candidates)
        for scores_N, query in zip(_rows_of_scores(queries_QD, references_ND), truth, strict=True)
    ]


def _rows_of_scores(
    queries_QD: NDArray[np.float32], references_ND: NDArray[np.float32]
) -> Iterator[NDArray[np.float32]]:
    size = max(1, _MAX_PRODUCTS // len(references_ND))
    for begin in range(0, len(queries_QD), size):
        yield from product(queries_QD[begin : begin + size], references_ND.T)


def pairs_of(judged: Sequence[Judged]) -> ScoredPairs:
    """The candidates of all queries in one list. judged: one or more."""
    return ScoredPairs.of(
        np.concatenate([query.scores_K for query in judged]),
        np.concatenate([query.correct_K for query in judged]),
        np.repeat(np.arange(len(judged)), [len(query.scores_K) for query in judged]),
        np.array([query.num_matches for query in judged], np.int64),
    )


def truth_figures(judged: Sequence[Judged], *, seed: int = 0) -> list[Figure]:
    """Micro-AP and recall at precision .9 over all pairs; mAP and first place over the queries with a match."""
    pairs = pairs_of(judged)
    found = pairs.figures()

    def of_sample(times_Q: NDArray[np.int64]) -> tuple[float, float]:
        sampled = pairs.figures(times_Q)
        return sampled.micro_ap, sampled.recall_at_p90

    intervals = intervals_of(of_sample, len(judged), seed=seed)
    matched = [query for query in judged if query.num_matches]
    precisions = np.array([average_precision(query.ranks_R, query.num_matches) for query in matched])
    first = np.array([query.is_match_first for query in matched])
    return [
        Figure(keys=("micro_ap",), value=found.micro_ap, interval=intervals[0]),
        Figure(keys=("recall_at_p90",), value=found.recall_at_p90, interval=intervals[1]),
        Figure(keys=("map",), value=mean(precisions), interval=interval_of_mean(precisions, seed=seed)),
        Figure(keys=("rank1",), value=mean(first), interval=interval_of_mean(first, seed=seed)),
    ]
