"""Figures of copy detection from scored pairs, ties counted non-matches first.

Shapes: Q queries, P scored pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class CopyFigures:
    """micro_ap: average precision over all pairs of all queries. The others are shares of queries with a match."""

    micro_ap: float
    recall_at_p90: float
    rank1: float


def copy_figures(found: Sequence[Sequence[tuple[float, int]]], truth: Sequence[int | None]) -> CopyFigures:
    """Figures of candidates (score, reference) of each query. truth: its reference; None for a query without one."""
    num_true = sum(reference is not None for reference in truth)
    pairs = [(score, reference == own) for pairs, own in zip(found, truth, strict=True) for score, reference in pairs]
    scores_P, correct_P = np.array([score for score, _ in pairs]), np.array([correct for _, correct in pairs])
    order = np.lexsort((correct_P, -scores_P))
    correct_P = correct_P[order]
    num_found_P = np.cumsum(correct_P)
    precision_P = num_found_P / np.arange(1, len(correct_P) + 1)
    # A threshold takes all pairs of one score.
    last_of_score_P = np.append(np.diff(scores_P[order]) != 0, True)
    enough_P = (precision_P >= 0.9) & last_of_score_P
    return CopyFigures(
        micro_ap=float((precision_P * correct_P).sum() / num_true),
        recall_at_p90=float(num_found_P[enough_P].max(initial=0) / num_true),
        rank1=float(np.mean([_is_first(p, own) for p, own in zip(found, truth, strict=True) if own is not None])),
    )


def _is_first(pairs: Sequence[tuple[float, int]], own: int) -> bool:
    own_score = next((score for score, reference in pairs if reference == own), None)
    return own_score is not None and all(score < own_score for score, reference in pairs if reference != own)
