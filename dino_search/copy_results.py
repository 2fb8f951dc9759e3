"""What copy detection answers: pairs of pictures, what is said of each and why; and queries without any."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from dino_index.copy_decisions import Decision, Reason, Verdict

Point = tuple[float, float]
"""(x, y) as fractions of the upright picture's width and height."""

QueryStatus = Literal["ok", "failed"]


@dataclass(frozen=True, kw_only=True)
class CopyMatch:
    """One candidate pair. Paths are absolute, in the catalog's portable encoding."""

    query: str
    reference: str
    image_id: int
    """Of the reference."""
    score: float
    """What ranks and decides: after normalisation and verification; unbounded."""
    cosine: float
    """Of the copy descriptors that matched best, at most 1."""
    rank: int
    """1 is the query's best."""
    decision: Decision
    precision: float | None
    """Estimated share of copies among all pairs with this score or a better one; None without a calibration."""
    reason: Reason
    verdict: Verdict | None = None
    similar: bool = False
    """Frames of one burst: alike, and no copies of each other."""
    verified: bool | None = None
    """Whether patches of both pictures fit one transform; None where that was not looked into, or a file is gone."""
    variant: str = "as_is"
    """What was done to the query before it matched: `as_is`, `mirror`, `rotate_90` ..."""
    query_area: tuple[Point, ...] | None = None
    """Corners of the matched area in the query; None where it is not known."""
    reference_area: tuple[Point, ...] | None = None
    transform: tuple[tuple[float, float, float], tuple[float, float, float]] | None = None
    """Affine, of pixels of the query to pixels of the reference, both upright."""
    query_sha256: str
    """Hex; with `reference_sha256` the pair that a verdict is about."""
    reference_sha256: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class CopyQuery:
    """One query and its candidates, best first; or why it could not be used."""

    query: str
    status: QueryStatus = "ok"
    reason: str = ""
    """For a failed query: what is wrong with the file."""
    matches: list[CopyMatch] = field(default_factory=list)

    @property
    def outcome(self) -> Literal["failed", "copy", "uncertain", "different"]:
        """`failed`, or the best decision among the candidates."""
        decisions = {match.decision for match in self.matches}
        if self.status == "failed":
            return "failed"
        return "copy" if "copy" in decisions else "uncertain" if "uncertain" in decisions else "different"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
