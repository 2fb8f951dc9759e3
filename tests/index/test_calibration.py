"""Calibration: from scores to estimated precision and decisions."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dino_index.calibration import (
    MIN_QUERIES,
    CalibratingQuery,
    Calibration,
    DecisionRule,
    check_calibration,
    fit_calibration,
)

NUM_REFERENCES = 500


def drawn(number: int, seed: int, *, separation: float = 6.0) -> list[CalibratingQuery]:
    """True pairs score about `separation`, a tenth of them is missed; the 20 false pairs of a query about 0."""
    rng = np.random.default_rng(seed)
    return [
        CalibratingQuery(
            true_score=None if rng.random() < 0.1 else float(rng.normal(separation, 1.5)),
            false_scores=rng.normal(0, 1, 20).tolist(),
        )
        for _ in range(number)
    ]


def fitted(number: int = 400, seed: int = 0, **drawing: float) -> Calibration:
    return fit_calibration(drawn(number, seed, **drawing), num_references=NUM_REFERENCES, origin="test")


@pytest.mark.parametrize("seed", range(5))
def test_decisions_at_99_percent_keep_98_on_other_queries_and_find_most_of_what_can_be(seed: int) -> None:
    calibration, unseen = fitted(300, seed), drawn(2000, seed + 100)
    check = check_calibration(calibration, unseen, num_references=NUM_REFERENCES)
    assert check.precision is not None
    assert check.precision >= 0.98
    assert check.found >= 0.6 * best_in_hindsight(unseen)


def best_in_hindsight(queries: list[CalibratingQuery]) -> float:
    """The largest share of true pairs at a threshold that keeps precision .99, half of the queries having a match."""
    pairs = [(query.true_score, True) for query in queries if query.true_score is not None]
    pairs += [(score, False) for query in queries for score in query.false_scores]
    num_true = num_false = best = 0
    for _, is_true in sorted(pairs, reverse=True):
        num_true, num_false = num_true + is_true, num_false + (not is_true)
        if 0.5 * num_true >= 0.99 * (0.5 * num_true + num_false):
            best = num_true
    return best / len(queries)


@given(st.floats(-20, 20), st.floats(0, 5), st.floats(0.01, 1))
def test_precision_grows_with_the_score_and_with_the_share_of_matches(
    score: float, more: float, match_share: float
) -> None:
    calibration = CALIBRATION
    at = calibration.precision(score, num_references=NUM_REFERENCES, match_share=match_share)
    assert 0 <= at <= 1
    assert calibration.precision(score + more, num_references=NUM_REFERENCES, match_share=match_share) >= at
    assert calibration.precision(score, num_references=NUM_REFERENCES, match_share=1) >= at


CALIBRATION = fitted(200)


def test_the_threshold_is_where_the_precision_is_reached() -> None:
    threshold = CALIBRATION.threshold(0.95, num_references=NUM_REFERENCES)
    assert CALIBRATION.precision(threshold, num_references=NUM_REFERENCES) == pytest.approx(0.95, abs=1e-6)
    assert CALIBRATION.precision(threshold - 0.2, num_references=NUM_REFERENCES) < 0.95


def test_a_larger_collection_asks_for_a_higher_score_and_a_smaller_one_for_no_lower() -> None:
    seen = CALIBRATION.threshold(0.99, num_references=NUM_REFERENCES)
    assert CALIBRATION.threshold(0.99, num_references=100 * NUM_REFERENCES) > seen
    assert CALIBRATION.threshold(0.99, num_references=10) == seen


def test_where_copies_cannot_be_told_nothing_is_called_one() -> None:
    blind = fitted(300, separation=0.0)
    rule = DecisionRule.at_precision(blind, 0.99, num_references=NUM_REFERENCES, match_share=0.5)
    assert rule.copy_score == math.inf
    assert rule.decide(100.0)[0] != "copy"


def test_decisions_follow_the_two_scores() -> None:
    rule = DecisionRule.at_precision(CALIBRATION, 0.99, num_references=NUM_REFERENCES, match_share=0.5)
    assert rule.uncertain_score < rule.copy_score
    assert rule.decide(rule.copy_score)[0] == "copy"
    assert rule.decide((rule.copy_score + rule.uncertain_score) / 2)[0] == "uncertain"
    decision, precision = rule.decide(rule.uncertain_score - 1)
    assert decision == "different"
    assert precision is not None
    assert precision < 0.5


def test_a_rule_by_score_alone_estimates_nothing() -> None:
    assert DecisionRule(copy_score=0.8, uncertain_score=0.8).decide(0.9) == ("copy", None)
    assert DecisionRule(copy_score=0.8, uncertain_score=0.8).decide(0.7) == ("different", None)


def test_a_calibration_with_enough_queries_says_how_it_did_on_others() -> None:
    assert fitted(MIN_QUERIES).check is None
    check = fitted(2 * MIN_QUERIES).check
    assert check is not None
    assert check.num_queries == 2 * MIN_QUERIES


def test_it_survives_json() -> None:
    assert Calibration.from_json(json.loads(json.dumps(CALIBRATION.to_json()))) == CALIBRATION
    unchecked = fitted(MIN_QUERIES)
    assert Calibration.from_json(json.loads(json.dumps(unchecked.to_json()))) == unchecked


def test_too_few_queries_and_shares_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="50 queries or more, found 49"):
        fitted(MIN_QUERIES - 1)
    for share in (0, 1.5):
        with pytest.raises(ValueError, match="match_share must be above 0"):
            CALIBRATION.precision(1.0, num_references=10, match_share=share)
    with pytest.raises(ValueError, match="target_precision must be between"):
        DecisionRule.at_precision(CALIBRATION, 99, num_references=10, match_share=0.5)
