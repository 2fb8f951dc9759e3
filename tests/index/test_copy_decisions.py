"""What is said of a pair: verdicts, equal bytes, bursts and plain pages go before the score."""

from __future__ import annotations

import pytest

from dino_index.copy_decisions import Decision, Judgement, Reason, Verdict, judge


def judged(
    decision: Decision,
    *,
    verdict: Verdict | None = None,
    same_bytes: bool = False,
    is_burst: bool = False,
    is_unproven_plain: bool = False,
    is_refuted: bool = False,
) -> Judgement:
    return judge(
        decision, 0.5, verdict=verdict, same_bytes=same_bytes, is_burst=lambda: is_burst,
        is_unproven_plain=lambda: is_unproven_plain, is_refuted=lambda: is_refuted,
    )  # fmt: skip


@pytest.mark.parametrize("score_says", ["copy", "uncertain", "different"])
def test_a_person_goes_before_everything(score_says: Decision) -> None:
    said: dict[Verdict, Decision] = {"copy": "copy", "not_copy": "different"}
    for verdict, decision in said.items():
        result = judged(score_says, verdict=verdict, same_bytes=True, is_burst=True, is_unproven_plain=True)
        assert (result.decision, result.reason, result.similar) == (decision, "verdict", False)


@pytest.mark.parametrize("score_says", ["copy", "uncertain", "different"])
def test_equal_bytes_are_a_copy_whatever_they_show(score_says: Decision) -> None:
    result = judged(score_says, same_bytes=True, is_burst=True, is_unproven_plain=True)
    assert (result.decision, result.reason) == ("copy", "identical")


@pytest.mark.parametrize(
    ("score_says", "facts", "decision", "reason"),
    [
        ("copy", set(), "copy", "score"),
        ("uncertain", set(), "uncertain", "score"),
        ("different", set(), "different", "score"),
        ("copy", {"is_burst"}, "different", "burst"),
        ("uncertain", {"is_burst"}, "different", "burst"),
        ("different", {"is_burst"}, "different", "score"),
        ("copy", {"is_unproven_plain"}, "uncertain", "plain"),
        ("uncertain", {"is_unproven_plain"}, "uncertain", "score"),
        ("copy", {"is_refuted"}, "uncertain", "unverified"),
        ("copy", {"is_refuted", "is_unproven_plain"}, "uncertain", "plain"),
    ],
)
def test_bursts_and_plain_pages_are_not_left_to_the_score(
    score_says: Decision, facts: set[str], decision: Decision, reason: Reason
) -> None:
    result = judged(
        score_says, is_burst="is_burst" in facts, is_unproven_plain="is_unproven_plain" in facts,
        is_refuted="is_refuted" in facts,
    )  # fmt: skip
    assert (result.decision, result.reason, result.precision) == (decision, reason, 0.5)
    assert result.similar == (reason == "burst")


def test_the_pictures_are_asked_about_only_where_it_matters() -> None:
    def never() -> bool:
        raise AssertionError

    by_score = judge("different", None, verdict=None, same_bytes=False, is_burst=never, is_unproven_plain=never)
    by_person = judge("copy", None, verdict="copy", same_bytes=False, is_burst=never, is_unproven_plain=never)
    assert (by_score.reason, by_person.reason) == ("score", "verdict")
