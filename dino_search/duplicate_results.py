"""Duplicates as they are told: groups of files, and the pairs that they were made from.

Shapes: P pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dino_index.copy_decisions import Judgement, Verdict
from dino_index.duplicate_groups import Linkage
from dino_search.copy_results import CopyMatch, CopyQuery

Keep = Literal["resolution", "size", "oldest", "newest", "path"]
KEEP_POLICIES: tuple[Keep, ...] = ("resolution", "size", "oldest", "newest", "path")


@dataclass(frozen=True, kw_only=True)
class Duplicate:
    """One file of a group. path: absolute, in the catalog's portable encoding."""

    path: str
    image_id: int
    keep: bool
    score: float
    """With the kept file; 1 for equal bytes and for the kept one itself."""
    identical: bool
    """Has the very bytes of the kept file. Never true of the kept one."""
    direct: bool
    """Is a copy of the kept file by itself, not only of others in the group. True of the kept one."""
    width: int
    height: int
    size: int
    mtime_ns: int
    sha256: str
    relative_path: str
    """Below the folder that was indexed."""


@dataclass(frozen=True, kw_only=True)
class DuplicateGroup:
    """Files that are copies, the one to keep first, then by score."""

    group: int
    """From 1 on."""
    min_score: float
    """The lowest score of all pairs inside."""
    all_compared: bool
    """Whether `min_score` is of all pairs, not of very many."""
    chained: bool
    """Holds pairs that are no copies by themselves."""
    files: list[Duplicate]

    @property
    def kept(self) -> Duplicate:
        return self.files[0]

    @property
    def spare_bytes(self) -> int:
        """What the files that are not kept take."""
        return sum(file.size for file in self.files[1:])


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """All groups, in the order of their first images."""

    collection: str
    model: str
    images: int
    failed: int
    linkage: Linkage
    keep: Keep
    groups: list[DuplicateGroup]
    remarks: list[str] = field(default_factory=list)
    pairs: PairList | None = None
    """What the groups were made from; None where only the groups are at hand."""

    def with_groups(self, groups: list[DuplicateGroup]) -> Duplicates:
        """The same with these groups alone, to be shown a part at a time."""
        return replace(self, groups=groups)

    def to_json(self) -> dict[str, Any]:
        return {
            "collection": self.collection,
            "model": self.model,
            "images": self.images,
            "failed": self.failed,
            "group_by": self.linkage,
            "keep": self.keep,
            "remarks": self.remarks,
            "groups": [
                asdict(group) | {"spare_bytes": group.spare_bytes} for group in self.groups
            ],
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PairList:
    """The pairs of images, as arrays: there may be millions. `matches` writes them out."""

    left_P: NDArray[np.int64]
    right_P: NDArray[np.int64]
    """Image ids, that of the lower content first; of a content, its first image, and that with its identical ones."""
    cosine_P: NDArray[np.float32]
    decisions: list[tuple[Judgement, Verdict | None]]
    names: Mapping[int, tuple[str, str]]
    """(portable path, sha256 in hex) by image id."""

    def __len__(self) -> int:
        return len(self.left_P)

    def queries(self) -> Iterator[CopyQuery]:
        """The pairs by their left image, for a report."""
        for path, matches in groupby(self.matches(), key=lambda match: match.query):
            yield CopyQuery(query=path, matches=list(matches))

    def matches(self) -> Iterator[CopyMatch]:
        """Each pair once, by path; `rank` counts the pairs of the left image, best first."""
        order = sorted(
            range(len(self)),
            key=lambda pair: (
                self.names[int(self.left_P[pair])][0],
                -self.cosine_P[pair],
                self.names[int(self.right_P[pair])][0],
            ),
        )
        rank, before = 0, -1
        for pair in order:
            left, right = int(self.left_P[pair]), int(self.right_P[pair])
            rank = rank + 1 if left == before else 1
            before = left
            judged, verdict = self.decisions[pair]
            score = float(self.cosine_P[pair])
            yield CopyMatch(
                query=self.names[left][0],
                reference=self.names[right][0],
                image_id=right,
                score=score,
                cosine=score,
                rank=rank,
                decision=judged.decision,
                precision=judged.precision,
                reason=judged.reason,
                similar=judged.similar,
                verdict=verdict,
                query_sha256=self.names[left][1],
                reference_sha256=self.names[right][1],
            )
