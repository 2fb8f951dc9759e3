"""Which database the catalogs of the running test are in; the fixture `database` decides."""

from __future__ import annotations

from pathlib import Path

from dino_index.catalog import Catalog

vectors_url: str | None = None
"""The server that vectors are searched by; None for snapshots. Replaced by the fixture `vector_store`."""
opened: list[Catalog] = []
"""Closed at the end of the test."""


def url_of(home: Path) -> str | None:
    """The URL of a home's catalog; None for its SQLite file. Replaced by the fixture."""
    return None


def open_catalog(home: Path, *, create: bool = False) -> Catalog:
    """The catalog of a home, which exists or is to be made."""
    catalog = Catalog.open(home, create=create, url=url_of(home), vectors_url=vectors_url)
    assert catalog is not None
    opened.append(catalog)
    return catalog


def created_catalog(home: Path) -> Catalog:
    """The catalog of a home, which is made if it does not exist."""
    return open_catalog(home, create=True)
