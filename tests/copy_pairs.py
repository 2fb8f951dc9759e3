"""Pairs and queries of copy detection as tests need them, without any model."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from dino_index.catalog.portable_paths import encode_path
from dino_search.copy_results import CopyMatch, CopyQuery


def sha256_of(path: Path) -> str:
    """Of the bytes of a file that is there, of the name of another."""
    return hashlib.sha256(path.read_bytes() if path.is_file() else bytes(path)).hexdigest()


def a_match(query: Path, reference: Path, score: float = 1.0, **fields: Any) -> CopyMatch:
    decision = "copy" if score >= 1 else "uncertain" if score >= 0.5 else "different"
    values: dict[str, Any] = {
        "query": encode_path(str(query)), "reference": encode_path(str(reference)), "image_id": 1, "score": score,
        "cosine": 0.5, "rank": 1, "decision": decision, "precision": 0.9, "reason": "score",
        "query_sha256": sha256_of(query), "reference_sha256": sha256_of(reference),
    }  # fmt: skip
    return CopyMatch(**values | fields)


def a_query(query: Path, *matches: CopyMatch) -> CopyQuery:
    return CopyQuery(query=encode_path(str(query)), matches=list(matches))


def a_failed_query(query: Path, reason: str = "truncated: the file ends before the picture does") -> CopyQuery:
    return CopyQuery(query=encode_path(str(query)), status="failed", reason=reason)
