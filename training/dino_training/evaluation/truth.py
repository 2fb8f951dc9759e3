"""What is right: which references each query matches, read from files and found among the pictures.

Positions are those of pictures in the queries' and the references' `Pictures`.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dino_index.catalog.portable_paths import encode_path
from dino_index.errors import EvaluationImpossible, TruthUnusable
from dino_training.evaluation.features import Pictures
from dino_training.evaluation.names import PictureNames

_COLUMNS = {"query", "reference"}
_YES, _NO = {"1", "true", "yes", "junk"}, {"", "0", "false", "no"}
_ISC_HEADER = ["query_id", "reference_id"]


@dataclass(kw_only=True)
class NamedTruth:
    """As a file has it, by names. A query that matches nothing has an empty set."""

    matches: dict[str, set[str]] = field(default_factory=dict)
    junk: dict[str, set[str]] = field(default_factory=dict)

    def add(self, query: str, *, match: str = "", junk: str = "") -> None:
        matches = self.matches.setdefault(query, set())
        if match:
            matches.add(match)
        if junk:
            self.junk.setdefault(query, set()).add(junk)


def read_truth(path: Path) -> NamedTruth:
    """A CSV file with the columns `query`, `reference` and, if it has that, `junk`; a row for each pair.

    An empty reference: the query has no match. junk: 1, true or yes says that the row's reference is neither right nor
    wrong for the query; a file name says so of that reference, and the row's own reference is a match.
    Raises TruthUnusable, also for a file without rows.
    """
    truth = NamedTruth()
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            rows = csv.DictReader(file)
            columns = [name.strip() for name in rows.fieldnames or ()]
            if not set(columns) >= _COLUMNS or set(columns) - _COLUMNS - {"junk"}:
                raise TruthUnusable(
                    f"{path} must have the columns query, reference and perhaps junk in its first line, found "
                    f"{', '.join(columns) or 'nothing'}"
                )
            rows.fieldnames = columns
            for row in rows:
                query, reference, junk = ((row.get(name) or "").strip() for name in ("query", "reference", "junk"))
                if not query or None in row:
                    raise TruthUnusable(
                        f"{path}, line {rows.line_num}: expected a query, a reference or nothing, and perhaps junk; "
                        f"found {[value for value in row.values() if value]}"
                    )
                if junk.lower() in _YES:
                    truth.add(query, junk=reference)
                else:
                    truth.add(query, match=reference, junk="" if junk.lower() in _NO else junk)
    except (OSError, csv.Error) as error:
        raise TruthUnusable(f"the truth file {path} cannot be read: {error}") from error
    if not truth.matches:
        raise TruthUnusable(f"{path} has no rows: expected a row for each query and reference that match")
    return truth


def read_isc_truth(path: Path) -> NamedTruth:
    """The ground truth of ISC 2021 (DISC21): `query,reference` ids a line, the first line perhaps their names.

    An empty reference: the query has no match. Raises TruthUnusable.
    """
    truth = NamedTruth()
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.reader(file), 1):
                if not row or [value.strip() for value in row] in (_ISC_HEADER, sorted(_COLUMNS)):
                    continue
                if len(row) != 2 or not row[0].strip():
                    raise TruthUnusable(f"{path}, line {number}: expected a query id and a reference id, found {row}")
                truth.add(row[0].strip(), match=row[1].strip())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TruthUnusable(f"the truth file {path} cannot be read: {error}") from error
    if not truth.matches:
        raise TruthUnusable(f"{path} has no rows: expected a query id and a reference id in each")
    return truth


@dataclass(frozen=True, kw_only=True)
class QueryTruth:
    """One query. query: its position. matches, ignored: positions of references; ignored are junk, and itself."""

    query: int
    matches: frozenset[int]
    ignored: frozenset[int]


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What is right for the pictures that are there."""

    queries: list[QueryTruth]
    missing_queries: list[str] = field(default_factory=list)
    """Names in truth that no readable query has, or several have; what truth says of them is left out."""
    missing_references: list[str] = field(default_factory=list)
    own_references: list[str] = field(default_factory=list)
    """Queries that are references as well, the same file: left out of their own ranking."""
    not_in_truth: int = 0
    """Queries that truth does not name, and that are therefore not searched with."""

    @property
    def num_matched(self) -> int:
        """Queries with a match."""
        return sum(bool(query.matches) for query in self.queries)

    def to_json(self) -> dict[str, Any]:
        return {
            "num_queries": len(self.queries),
            "num_queries_with_match": self.num_matched,
            "num_matches": sum(len(query.matches) for query in self.queries),
            "missing": {"queries": self.missing_queries, "references": self.missing_references},
            "queries_among_references": self.own_references,
            "queries_not_in_truth": self.not_in_truth,
        }

    def remarks(self) -> list[str]:
        """What people should know, in words."""
        remarks = [f"{len(self.queries)} queries, {self.num_matched} of them with a match"]
        for what, names in (("queries", self.missing_queries), ("references", self.missing_references)):
            if names:
                remarks.append(
                    f"{len(names)} {what} that truth names are not there, cannot be read or are not the only ones of "
                    f"that name, and were left out: {_some(names)}"
                )
        if self.own_references:
            remarks.append(f"{len(self.own_references)} queries are references as well, and left out of their ranking")
        if self.not_in_truth:
            remarks.append(f"{self.not_in_truth} queries are not in truth, and were not searched with")
        return remarks


def find_truth(named: NamedTruth, queries: Pictures, references: Pictures, *, search_all: bool = False) -> Truth:
    """Truth by position.

    search_all: queries that it does not name have no match, where they are else not searched with.

    Raises EvaluationImpossible where no query with a match is left.
    """
    query_names = PictureNames(queries.folder, queries.paths)
    reference_names = PictureNames(references.folder, references.paths)
    own_position = SamePictures(references)
    found: dict[int, QueryTruth] = {}
    missing_queries: list[str] = []
    missing_references: set[str] = set()

    def positions(names: Iterable[str]) -> set[int]:
        by_name = {name: reference_names.position_of(name) for name in names}
        missing_references.update(name for name, position in by_name.items() if position is None)
        return {position for position in by_name.values() if position is not None}

    for name, matches in named.matches.items():
        if (query := query_names.position_of(name)) is None:
            missing_queries.append(name)
            continue
        own = own_position.of(queries.paths[query])
        matched, junk = positions(matches) - own, positions(named.junk.get(name, ())) | own
        if (before := found.get(query)) is not None:  # called by another name
            matched, junk = matched | before.matches, junk | before.ignored
        found[query] = QueryTruth(query=query, matches=frozenset(matched - junk), ignored=frozenset(junk))
    unnamed = [query for query in range(len(queries)) if query not in found]
    if search_all:
        for query in unnamed:
            own = own_position.of(queries.paths[query])
            found[query] = QueryTruth(query=query, matches=frozenset(), ignored=frozenset(own))
    truth = Truth(
        queries=[found[query] for query in sorted(found)],
        missing_queries=[encode_path(name) for name in sorted(missing_queries)],
        missing_references=[encode_path(name) for name in sorted(missing_references)],
        own_references=[
            encode_path(queries.paths[query]) for query in sorted(found) if own_position.of(queries.paths[query])
        ],
        not_in_truth=0 if search_all else len(unnamed),
    )
    refuse_without_matches(truth, references)
    return truth


def refuse_without_matches(truth: Truth, references: Pictures) -> None:
    """Raises EvaluationImpossible."""
    if not truth.num_matched:
        raise EvaluationImpossible(
            f"expected a query with a match among {len(references)} references, found none: {len(truth.queries)} "
            f"queries without one, {len(truth.missing_queries)} queries{_such_as(truth.missing_queries)} and "
            f"{len(truth.missing_references)} references{_such_as(truth.missing_references)} that truth names and that "
            "are not there; names in truth are file names or paths below the folders"
        )


class SamePictures:
    """Which references are the same files as others, whatever path leads there."""

    def __init__(self, references: Pictures) -> None:
        self._positions: dict[str, set[int]] = {}
        for position, path in enumerate(references.paths):
            self._positions.setdefault(os.path.realpath(path), set()).add(position)

    def of(self, path: str) -> set[int]:
        """Positions of a file among the references."""
        return self._positions.get(os.path.realpath(path), set())


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _such_as(names: Sequence[str]) -> str:
    return f" ({_some(names)})" if names else ""
