"""Figures of copy detection from scored pairs, ties counted non-matches first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dino_training.evaluation.rankings import judge_candidates, pairs_of
from dino_training.evaluation.truth import QueryTruth


@dataclass(frozen=True, kw_only=True)
class CopyFigures:
    """micro_ap: average precision over all pairs of all queries. The others are shares of queries with a match."""

    micro_ap: float
    recall_at_p90: float
    rank1: float


def copy_figures(found: Sequence[Sequence[tuple[float, int]]], truth: Sequence[int | None]) -> CopyFigures:
    """Figures of candidates (score, reference) of each query. truth: its reference; None for a query without one."""
    judged = [
        judge_candidates(
            [score for score, _ in pairs],
            [reference for _, reference in pairs],
            QueryTruth(query=query, matches=frozenset(() if own is None else (own,)), ignored=frozenset()),
        )
        for query, (pairs, own) in enumerate(zip(found, truth, strict=True))
    ]
    figures = pairs_of(judged).figures()
    matched = [query for query in judged if query.num_matches]
    return CopyFigures(
        micro_ap=figures.micro_ap,
        recall_at_p90=figures.recall_at_p90,
        rank1=sum(query.is_match_first for query in matched) / len(matched),
    )
