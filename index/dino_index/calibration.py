"""From scores to decisions: how many of the pairs with such a score, or a better one, are copies.

Of Q calibrating queries, each an edited copy of one reference, it is known how their true pairs and their false pairs
score. For a threshold s these give `found(s)`, the share of true pairs at or above it, and `false_pairs(s)`, the false
pairs at or above it that a query brings along. Where a share p of queries has a match, the pairs from s on hold copies
with

    precision(s) = p * found(s) / (p * found(s) + false_pairs(s)).

False pairs are rare where decisions are made, so beyond the last few seen their number follows an exponential tail
(peaks over threshold), rounded up by its own uncertainty; and it grows with the number of references.

Shapes: Q queries, K candidates, S scores of the stored curve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dino_index.copy_decisions import Decision

DEFAULT_TARGET_PRECISION = 0.99
DEFAULT_MATCH_SHARE = 0.5
MIN_QUERIES = 50
"""Fewer say too little about rare false pairs."""

_NUM_KNOTS = 96
_FALSE_PAIRS_AT_BEGIN = 3
_NUM_IN_TAIL = 20
# Below this, pairs from a score on are mostly no copies: such a pair is called different.
_MIN_UNCERTAIN_PRECISION = 0.5


@dataclass(frozen=True, kw_only=True)
class Check:
    """How decisions turned out on pictures that the calibration did not see."""

    num_queries: int
    target_precision: float
    precision: float | None
    """Of the pairs that were called copies; None where none was."""
    found: float
    """Share of true pairs that were called copies."""
    num_decided: int


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Estimated precision by score. scores_S ascend; found_S and false_pairs_S do not."""

    scores_S: tuple[float, ...]
    found_S: tuple[float, ...]
    false_pairs_S: tuple[float, ...]
    num_queries: int
    num_references: int
    """In the collection that was searched: a larger one holds more false pairs."""
    origin: str
    """What it was made from, in words."""
    check: Check | None = None
    """On other pictures; None where there were too few."""

    def precision(self, score: float, *, num_references: int, match_share: float = DEFAULT_MATCH_SHARE) -> float:
        """Estimated share of copies among all pairs with this score or a better one, 0..1; grows with the score.

        num_references: images that were searched. match_share: of the queries that have a match, above 0, up to 1.
        """
        return float(np.interp(score, self.scores_S, self._precisions(num_references, match_share)))

    def threshold(
        self, target_precision: float, *, num_references: int, match_share: float = DEFAULT_MATCH_SHARE
    ) -> float:
        """The lowest score from which on the estimated precision is at least this; infinite where it never is."""
        precisions_S = self._precisions(num_references, match_share)
        reached = np.flatnonzero(precisions_S >= target_precision)
        if not len(reached):
            return math.inf
        first = int(reached[0])
        if first == 0:
            return self.scores_S[0]
        below, above = precisions_S[first - 1], precisions_S[first]
        share = (target_precision - below) / (above - below)
        return self.scores_S[first - 1] + float(share) * (self.scores_S[first] - self.scores_S[first - 1])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Calibration:
        columns = {key: tuple(value[key]) for key in ("scores_S", "found_S", "false_pairs_S")}
        check = Check(**value["check"]) if value["check"] else None
        return cls(**value | columns | {"check": check})

    def _precisions(self, num_references: int, match_share: float) -> NDArray[np.float64]:
        if not 0 < match_share <= 1:
            raise ValueError(f"match_share must be above 0 and up to 1, found {match_share}")
        # Not below what was seen: of 600 photographs, queries have about as many false pairs as of 1,450.
        growth = max(1.0, num_references / self.num_references)
        true_S = match_share * np.array(self.found_S)
        precisions_S = true_S / np.maximum(true_S + growth * np.array(self.false_pairs_S), 1e-12)
        monotone_S: NDArray[np.float64] = np.maximum.accumulate(precisions_S)
        return monotone_S


@dataclass(frozen=True, kw_only=True)
class DecisionRule:
    """Which scores make a copy. copy_score: from here on `copy`; uncertain_score: from here on not `different`."""

    copy_score: float
    uncertain_score: float
    calibration: Calibration | None = None
    num_references: int = 1
    match_share: float = DEFAULT_MATCH_SHARE

    @classmethod
    def at_precision(
        cls, calibration: Calibration, target_precision: float, *, num_references: int, match_share: float
    ) -> DecisionRule:
        """Copies are the pairs from where on the estimated precision is at least `target_precision`, 0..1."""
        if not 0 < target_precision < 1:
            raise ValueError(f"target_precision must be between 0 and 1, found {target_precision}")

        def threshold(precision: float) -> float:
            return calibration.threshold(precision, num_references=num_references, match_share=match_share)

        copy_score = threshold(target_precision)
        return cls(
            copy_score=copy_score,
            uncertain_score=min(copy_score, threshold(_MIN_UNCERTAIN_PRECISION)),
            calibration=calibration,
            num_references=num_references,
            match_share=match_share,
        )

    def decide(self, score: float) -> tuple[Decision, float | None]:
        """The decision, and the estimated precision of all pairs from this score on, where that is known."""
        precision = None
        if self.calibration is not None:
            precision = self.calibration.precision(
                score, num_references=self.num_references, match_share=self.match_share
            )
        if score >= self.copy_score:
            return "copy", precision
        return ("uncertain" if score >= self.uncertain_score else "different"), precision


@dataclass(frozen=True, kw_only=True)
class CalibratingQuery:
    """Scores of one query's candidates."""

    true_score: float | None
    """Of the pair with what it is a copy of; None where that was no candidate."""
    false_scores: Sequence[float]
    has_match: bool = True
    """Whether there is a reference that it is a copy of."""


def fit_calibration(queries: Sequence[CalibratingQuery], *, num_references: int, origin: str) -> Calibration:
    """The calibration that the queries give, checked by halves: each on what the other half says.

    Raises ValueError for fewer than `MIN_QUERIES` queries.
    """
    if len(queries) < MIN_QUERIES:
        raise ValueError(f"a calibration takes {MIN_QUERIES} queries or more, found {len(queries)}")
    calibration = _fit(queries, num_references, origin)
    if len(queries) < 2 * MIN_QUERIES:
        return calibration
    halves = queries[::2], queries[1::2]
    checks = [
        check_calibration(_fit(one, num_references, origin), other, num_references=num_references)
        for one, other in (halves, halves[::-1])
    ]
    return replace(calibration, check=_joined(checks))


def check_calibration(
    calibration: Calibration,
    queries: Sequence[CalibratingQuery],
    *,
    num_references: int,
    target_precision: float = DEFAULT_TARGET_PRECISION,
    match_share: float = DEFAULT_MATCH_SHARE,
) -> Check:
    """What the decisions of a calibration are worth on other queries."""
    threshold = calibration.threshold(target_precision, num_references=num_references, match_share=match_share)
    num_matching = sum(query.has_match for query in queries)
    num_true = sum(query.true_score is not None and query.true_score >= threshold for query in queries)
    num_false = sum(score >= threshold for query in queries for score in query.false_scores)
    # As if of all queries that share had a match.
    true_pairs = match_share * num_true / max(num_matching, 1)
    false_pairs = num_false / len(queries)
    return Check(
        num_queries=len(queries),
        target_precision=target_precision,
        precision=true_pairs / (true_pairs + false_pairs) if num_true + num_false else None,
        found=num_true / max(num_matching, 1),
        num_decided=num_true + num_false,
    )


def _joined(checks: Sequence[Check]) -> Check:
    """One check over the queries of all."""
    decided = sum(check.num_decided for check in checks)
    correct = sum((check.precision or 0) * check.num_decided for check in checks)
    num_queries = sum(check.num_queries for check in checks)
    return Check(
        num_queries=num_queries,
        target_precision=checks[0].target_precision,
        precision=correct / decided if decided else None,
        found=sum(check.found * check.num_queries for check in checks) / num_queries,
        num_decided=decided,
    )


def _fit(queries: Sequence[CalibratingQuery], num_references: int, origin: str) -> Calibration:
    true_T = np.sort([query.true_score for query in queries if query.true_score is not None])
    false_F = np.sort([score for query in queries for score in query.false_scores])[::-1]
    if not len(true_T):
        true_T = np.array([0.0])
    # From where a query brings along several false pairs, up to the best true pair: nothing is decided outside.
    lowest = false_F[min(_FALSE_PAIRS_AT_BEGIN * len(queries), len(false_F)) - 1] if len(false_F) else true_T[0]
    scores_S = np.linspace(lowest, max(true_T[-1], lowest + 1e-3), _NUM_KNOTS)
    # A score that half a query reaches stands for those better than all that were seen.
    num_matching = max(sum(query.has_match for query in queries), 1)
    found_S = np.maximum(len(true_T) - np.searchsorted(true_T, scores_S), 0.5) / num_matching
    false_S = _false_pairs(false_F, scores_S) / len(queries)
    return Calibration(
        scores_S=tuple(map(float, scores_S)),
        found_S=tuple(map(float, found_S)),
        false_pairs_S=tuple(map(float, false_S)),
        num_queries=len(queries),
        num_references=num_references,
        origin=origin,
    )


def _false_pairs(false_F: NDArray[np.float64], scores_S: NDArray[np.float64]) -> NDArray[np.float64]:
    """How many false pairs reach each score: those seen, and one more; beyond the best few, an exponential tail.

    false_F: descending.
    """
    seen_S = np.searchsorted(-false_F, -scores_S, side="right").astype(np.float64)
    if len(false_F) <= _NUM_IN_TAIL:
        return seen_S + 1
    onset = false_F[_NUM_IN_TAIL - 1]
    excess = float((false_F[:_NUM_IN_TAIL] - onset).mean())
    # The mean excess of n is uncertain by 1/sqrt(n) of itself.
    excess *= 1 + 1 / math.sqrt(_NUM_IN_TAIL)
    tail_S = (_NUM_IN_TAIL + 1) * np.exp(-np.maximum(scores_S - onset, 0) / max(excess, 1e-6))
    return np.where(scores_S > onset, tail_S, seen_S + 1)
