"""The index types that have names; imports nothing, for commands that only need to know them."""

from __future__ import annotations

AUTO, FLAT = "auto", "flat"
NAMED_INDEX_TYPES = (AUTO, FLAT, "hnsw", "ivf", "ivfpq")
