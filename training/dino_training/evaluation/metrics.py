"""Figures of rankings and of scored pairs. Everything here is arithmetic on NumPy arrays.

Which average precision is which:
- `average_precision`: the mean of the precision at each match (scikit-learn's `average_precision_score` where no scores
  are equal). For truth files, and over all pairs of all queries as micro-AP (ISC 2021).
- `trapezoid_average_precision`: the area under the precision-recall curve by trapezoids. INRIA Holidays and Copydays,
  revisited Oxford and Paris report this one; it is a little lower where a match is missed at the top.

Shapes: Q queries, P scored pairs, R matches of one query, N items that were ranked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

HIGH_PRECISION = 0.9
"""The precision at which recall is reported, as ISC 2021 does."""


def average_precision(ranks_R: NDArray[np.int64], num_matches: int) -> float:
    """Mean over all matches of the precision at their rank; 0 for one that was not ranked.

    ranks_R: how many items stand before each match that was ranked, in rising order. num_matches: 1 or more.
    """
    num_found_R = np.arange(1, len(ranks_R) + 1)
    return float((num_found_R / (ranks_R + 1)).sum() / num_matches)


def trapezoid_average_precision(ranks_R: NDArray[np.int64], num_matches: int) -> float:
    """Area under the precision-recall curve, by trapezoids between one match and the next.

    Before the first item precision counts as 1. Arguments as for `average_precision`. The rule of the tools that came
    with Holidays (holidays_map.py) and Oxford buildings, which the revisited sets kept (arXiv 1803.11285).
    """
    before_R = np.arange(len(ranks_R))
    precision_before_R = np.where(ranks_R == 0, 1.0, before_R / np.maximum(ranks_R, 1))
    precision_at_R = (before_R + 1) / (ranks_R + 1)
    return float(((precision_before_R + precision_at_R) / 2).sum() / num_matches)


def precision_at(ranks_R: NDArray[np.int64], k: int) -> float:
    """Share of matches among the first k, as the revisited protocol counts it.

    Where the last match stands before place k, only the places up to it count. ranks_R: all matches, one or more.
    """
    places = min(int(ranks_R.max()) + 1, k)
    return float((ranks_R < places).sum() / places)


def ranks_without_junk(matches_N: NDArray[np.bool_], junk_N: NDArray[np.bool_]) -> NDArray[np.int64]:
    """ranks_R: how many items other than junk stand before each match. Both by place in the ranking, best first."""
    counted_before_N: NDArray[np.int64] = np.cumsum(~junk_N) - ~junk_N
    ranks_R: NDArray[np.int64] = counted_before_N[matches_N & ~junk_N]
    return ranks_R


def worst_order(scores_P: NDArray[np.floating], correct_P: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Positions by falling score; of equal scores, those of non-matches come first, so that ties never help."""
    order_P: NDArray[np.int64] = np.lexsort((correct_P, -scores_P))
    return order_P


@dataclass(frozen=True, kw_only=True)
class PairFigures:
    """micro_ap: average precision over the pairs of all queries in one list. recall_at_p90: the highest share of
    matches found at a score from which on at least 90 % of the pairs are matches."""

    micro_ap: float
    recall_at_p90: float


@dataclass(frozen=True, eq=False)
class ScoredPairs:
    """Pairs of all queries, from the best score to the worst; of equal scores, non-matches first."""

    correct_P: NDArray[np.bool_]
    is_last_of_score_P: NDArray[np.bool_]
    """A threshold takes all pairs of one score."""
    query_P: NDArray[np.int64]
    num_matches_Q: NDArray[np.int64]
    """Matches that each query has in truth, found or not."""

    @classmethod
    def of(
        cls,
        scores_P: NDArray[np.floating],
        correct_P: NDArray[np.bool_],
        query_P: NDArray[np.int64],
        num_matches_Q: NDArray[np.int64],
    ) -> ScoredPairs:
        """The pairs in order, in any order given. query_P: number of the query that each belongs to."""
        order_P = worst_order(scores_P, correct_P)
        # What comes after the last match changes no figure.
        num_kept = int(np.flatnonzero(correct_P[order_P]).max(initial=-1)) + 1
        sorted_P = scores_P[order_P]
        is_last_P = np.append(sorted_P[1:] != sorted_P[:-1], True)[: len(order_P)]
        kept = order_P[:num_kept]
        return cls(correct_P[kept], is_last_P[:num_kept], query_P[kept], num_matches_Q)

    def figures(self, times_Q: NDArray[np.int64] | None = None) -> PairFigures:
        """Micro-AP and recall at precision .9. times_Q: how often each query counts; None for once.

        Both are 0 where no counted query has a match.
        """
        correct_P, is_last_P, num_true = self.correct_P, self.is_last_of_score_P, int(self.num_matches_Q.sum())
        if times_Q is not None:
            times_P = times_Q[self.query_P]
            correct_P = np.repeat(correct_P, times_P)
            # All copies of a pair have its score: only the last one ends it, and that of the last pair that counts.
            is_last_P = _ends(times_P, self.is_last_of_score_P)
            num_true = int((self.num_matches_Q * times_Q).sum())
        if num_true == 0:
            return PairFigures(micro_ap=0.0, recall_at_p90=0.0)
        num_found_P = np.cumsum(correct_P)
        precision_P = num_found_P / np.arange(1, len(correct_P) + 1)
        enough_P = (precision_P >= HIGH_PRECISION) & is_last_P
        return PairFigures(
            micro_ap=float(precision_P[correct_P].sum() / num_true),
            recall_at_p90=float(num_found_P[enough_P].max(initial=0) / num_true),
        )


def _ends(times_P: NDArray[np.int64], is_last_of_score_P: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether each repeated pair is the last one of its score."""
    group_P: NDArray[np.int64] = np.cumsum(is_last_of_score_P) - is_last_of_score_P
    repeated: NDArray[np.int64] = np.repeat(group_P, times_P)
    return np.append(repeated[1:] != repeated[:-1], True)[: len(repeated)]


def top_k_accuracy(places_Q: NDArray[np.int64], k: int) -> float:
    """Share of queries whose own class is among the first k. places_Q: 0 for the first; -1 for not at all."""
    return float(((places_Q >= 0) & (places_Q < k)).mean())


def mean(values: Sequence[float] | NDArray[np.floating]) -> float:
    """The mean as a Python number; 0 of nothing."""
    return float(np.mean(values)) if len(values) else 0.0
