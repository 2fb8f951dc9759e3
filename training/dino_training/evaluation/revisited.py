"""Revisited Oxford and Paris (arXiv 1803.11285): their ground truth, and their figures.

Shapes: R matches of one query.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dino_index.errors import TruthUnusable
from dino_training.evaluation.bootstrap import interval_of_mean
from dino_training.evaluation.metrics import mean, precision_at, trapezoid_average_precision
from dino_training.evaluation.plain_pickles import as_list, read_plain_pickle
from dino_training.evaluation.rankings import Judged
from dino_training.evaluation.results import Figure

_PLACES = (1, 5, 10)
_KINDS = ("easy", "hard", "junk")
DIFFICULTIES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}
"""Which of a query's lists are matches and which are passed over."""

Box = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class RevisitedQuery:
    """lists: positions in the list of references, by easy, hard and junk. box: left, top, right, bottom in pixels."""

    name: str
    lists: Mapping[str, frozenset[int]]
    box: Box | None


@dataclass(frozen=True, kw_only=True)
class RevisitedTruth:
    """references: their names, without extension."""

    references: list[str]
    queries: list[RevisitedQuery]


def read_revisited(path: Path) -> RevisitedTruth:
    """A file such as gnd_roxford5k.pkl, of which nothing is run. Raises TruthUnusable."""
    try:
        return _parse(read_plain_pickle(path))
    except (TruthUnusable, KeyError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, TruthUnusable) and str(error).startswith(str(path)):
            raise
        found = f"nothing under {error}" if isinstance(error, KeyError) else str(error)
        raise TruthUnusable(
            f"{path}: expected a revisited ground truth with imlist, qimlist and for each query easy, hard and junk; "
            f"found: {found}"
        ) from error


def _parse(content: Any) -> RevisitedTruth:
    if not isinstance(content, dict):
        raise TruthUnusable(f"a {type(content).__name__}")
    references, names = _names(content["imlist"]), _names(content["qimlist"])
    entries = as_list(content["gnd"])
    if len(entries) != len(names):
        raise TruthUnusable(f"{len(names)} queries and ground truth for {len(entries)}")
    if not names:
        raise TruthUnusable("no query")
    return RevisitedTruth(
        references=references,
        queries=[_parse_query(name, entry, len(references)) for name, entry in zip(names, entries, strict=True)],
    )


def _names(value: Any) -> list[str]:
    names = as_list(value)
    if not all(isinstance(name, str) for name in names):
        raise TruthUnusable("names that are no text")
    return names


def _parse_query(name: str, entry: Any, num_references: int) -> RevisitedQuery:
    if not isinstance(entry, dict):
        raise TruthUnusable(f"a {type(entry).__name__} as the ground truth of {name}")
    lists = {kind: frozenset(int(position) for position in as_list(entry[kind])) for kind in _KINDS}
    if outside := [position for kind in _KINDS for position in lists[kind] if not 0 <= position < num_references]:
        raise TruthUnusable(f"{name} names reference {outside[0]} of {num_references}")
    box: Box | None = None
    if (found := entry.get("bbx")) is not None:
        values = [float(value) for value in as_list(found)]
        if len(values) != 4 or not np.isfinite(values).all() or values[0] >= values[2] or values[1] >= values[3]:
            raise TruthUnusable(f"{name} has the box {values}, expected left, top, right, bottom")
        box = (values[0], values[1], values[2], values[3])
    return RevisitedQuery(name=name, lists=lists, box=box)


def revisited_figures(judged: Mapping[str, Sequence[Judged]], *, seed: int = 0) -> list[Figure]:
    """mAP (by trapezoids) and mP@1, 5, 10 for each difficulty, over the queries that have a match in it.

    judged: of each query that has one, by difficulty.
    """
    figures = []
    for difficulty, queries in judged.items():
        columns: dict[tuple[str, ...], list[float]]
        columns = {("map",): [trapezoid_average_precision(query.ranks_R, query.num_matches) for query in queries]}
        for k in _PLACES:
            columns["mp", str(k)] = [precision_at(query.ranks_R, k) for query in queries]
        figures += [
            Figure(keys=(difficulty, *keys), value=mean(values), interval=interval_of_mean(np.array(values), seed=seed))
            for keys, values in columns.items()
        ]
    return figures
