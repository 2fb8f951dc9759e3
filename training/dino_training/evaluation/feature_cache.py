"""Raw vectors of pictures that were embedded before, by the sha256 of what was embedded, a file for each fingerprint.

The cache is derived and may be deleted at any time. One that cannot be used costs forward passes, no results.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_TABLE = """
CREATE TABLE IF NOT EXISTS vector (
    sha256 BLOB PRIMARY KEY, width INTEGER NOT NULL, height INTEGER NOT NULL, cls BLOB NOT NULL, gem BLOB NOT NULL
) WITHOUT ROWID
"""
_TIMEOUT_S = 30.0

RawVectors = tuple[NDArray[np.float16], NDArray[np.float16]]
"""(cls_D, gem_D)."""


class FeatureCache:
    """Vectors under one fingerprint. For one thread, except `size_of`."""

    def __init__(self, folder: Path, fingerprint: str, on_remark: Callable[[str], None]) -> None:
        """folder: is made. on_remark: told where the cache cannot be used, once."""
        self._path = folder / f"{fingerprint}.sqlite3"
        self._on_remark = on_remark
        self._database: sqlite3.Connection | None = None
        self._sizes: dict[bytes, tuple[int, int]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(self._path, timeout=_TIMEOUT_S)
            self._database.execute(_TABLE)
            rows = self._database.execute("SELECT sha256, width, height FROM vector")
            self._sizes = {sha256: (width, height) for sha256, width, height in rows}
        except (OSError, sqlite3.Error) as error:
            self._give_up(error)

    def size_of(self, sha256: bytes) -> tuple[int, int] | None:
        """(width, height) of a picture whose vectors are here; in any thread."""
        return self._sizes.get(sha256)

    def get(self, sha256: bytes) -> RawVectors | None:
        """None where they are not here, or cannot be read any more."""
        if self._database is None or sha256 not in self._sizes:
            return None
        try:
            row = self._database.execute("SELECT cls, gem FROM vector WHERE sha256 = ?", (sha256,)).fetchone()
        except sqlite3.Error as error:
            self._give_up(error)
            return None
        return None if row is None else (np.frombuffer(row[0], np.float16), np.frombuffer(row[1], np.float16))

    def add(self, entries: Iterable[tuple[bytes, tuple[int, int], RawVectors]]) -> None:
        """(sha256, (width, height), vectors) of pictures, in one transaction."""
        entries = list(entries)
        if self._database is None or not entries:
            return
        rows = [(sha256, *size, cls_D.tobytes(), gem_D.tobytes()) for sha256, size, (cls_D, gem_D) in entries]
        try:
            with self._database:
                self._database.executemany("INSERT OR REPLACE INTO vector VALUES (?, ?, ?, ?, ?)", rows)
        except sqlite3.Error as error:
            self._give_up(error)
            return
        self._sizes |= {sha256: size for sha256, size, _ in entries}

    def close(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None

    def _give_up(self, error: Exception) -> None:
        self._on_remark(f"the cache of features {self._path} cannot be used ({error}); going on without it")
        self._sizes = {}
        with suppress(sqlite3.Error):
            self.close()
