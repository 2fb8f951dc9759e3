"""Weighted k-NN classification, as DINO evaluates features with it (arXiv 2104.14294, section 4.1)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def vote(scores: Sequence[float], labels: Sequence[str], temperature: float) -> list[tuple[str, float]]:
    """(label, probability) of each label among the neighbours, most probable first; ties by label.

    scores: cosine of each neighbour, whose vote weighs exp(score / temperature). temperature: above 0.
    Probabilities sum to 1.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, found {temperature}")
    weights = np.exp((np.asarray(scores, np.float64) - max(scores)) / temperature)
    totals: dict[str, float] = {}
    for label, weight in zip(labels, weights / weights.sum(), strict=True):
        totals[label] = totals.get(label, 0.0) + float(weight)
    return sorted(totals.items(), key=lambda item: (-item[1], item[0]))
