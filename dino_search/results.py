"""What searches and classifications answer, and the JSON that every interface prints of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """One found image. score: cosine, at most 1. path: absolute, in the catalog's portable encoding."""

    rank: int
    image_id: int
    path: str
    score: float
    label: str | None


@dataclass(frozen=True, kw_only=True)
class SearchResults:
    """Images like the query, best first."""

    query: str
    collection: str
    model: str
    results: list[SearchResult]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Classification:
    """One classified query. label: the most probable. probabilities: of every label among the neighbours."""

    query: str
    label: str
    probability: float
    probabilities: dict[str, float]
    neighbours: list[SearchResult]


@dataclass(frozen=True, kw_only=True)
class Classifications:
    """Classified queries, in the order that they were given."""

    collection: str
    model: str
    k: int
    temperature: float
    results: list[Classification]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
