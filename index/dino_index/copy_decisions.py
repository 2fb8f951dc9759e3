"""What is said of a pair of pictures, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Decision = Literal["copy", "uncertain", "different"]
Verdict = Literal["copy", "not_copy"]
"""A person's decision on a pair, which goes before everything else."""

Reason = Literal["verdict", "identical", "score", "burst", "plain", "unverified"]
"""What decided: a person's verdict; equal bytes; the score; frames of one burst, which are alike and no copies;
a blank, uniform or text-only page, which the descriptor alone does not tell from others of its kind; patches and
pixels that do not fit, whatever the likeness."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """A decision on a pair, and what it rests on."""

    decision: Decision
    reason: Reason
    precision: float | None
    """Estimated share of copies among all pairs with this score or a better one; None where it is not known."""
    similar: bool = False
    """Frames of one burst."""


def judge(
    decision: Decision,
    precision: float | None,
    *,
    verdict: Verdict | None,
    same_bytes: bool,
    is_burst: Callable[[], bool],
    is_unproven_plain: Callable[[], bool],
    is_refuted: Callable[[], bool] = lambda: False,
) -> Judgement:
    """What is said of a pair whose score alone says `decision`.

    is_burst: whether both are frames of one burst. is_unproven_plain: whether one is a blank, uniform or text-only
    page, and the pixels do not prove that both are the same. is_refuted: whether patches and pixels were compared and
    do not fit. They are asked only where the answer matters.
    """
    if verdict is not None:
        return Judgement(decision="copy" if verdict == "copy" else "different", reason="verdict", precision=precision)
    if same_bytes:
        return Judgement(decision="copy", reason="identical", precision=precision)
    if decision != "different" and is_burst():
        return Judgement(decision="different", reason="burst", precision=precision, similar=True)
    if decision == "copy" and is_unproven_plain():
        return Judgement(decision="uncertain", reason="plain", precision=precision)
    if decision == "copy" and is_refuted():
        return Judgement(decision="uncertain", reason="unverified", precision=precision)
    return Judgement(decision=decision, reason="score", precision=precision)
