"""The home folder, where files lie, the database that keeps the catalog, and the server that searches vectors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HOME_VARIABLE = "DINO_SEARCH_HOME"
DATABASE_VARIABLE = "DINO_SEARCH_DATABASE"
VECTOR_STORE_VARIABLE = "DINO_SEARCH_VECTOR_STORE"


def default_home() -> Path:
    """`DINO_SEARCH_HOME` where it is set, else the platform's folder for user data."""
    if given := os.environ.get(HOME_VARIABLE):
        return Path(given).expanduser()
    from platformdirs import user_data_path

    return user_data_path("dino-search", appauthor=False)


def default_database() -> str | None:
    """`DINO_SEARCH_DATABASE`, the URL of a PostgreSQL database; None for an SQLite file in the home folder."""
    return os.environ.get(DATABASE_VARIABLE) or None


def default_vector_store() -> str | None:
    """`DINO_SEARCH_VECTOR_STORE`, the URL of a Milvus server; None for snapshots in the home folder."""
    return os.environ.get(VECTOR_STORE_VARIABLE) or None


@contextmanager
def variable_given(name: str, value: str) -> Iterator[None]:
    """Until its end the environment has this, for processes that are started meanwhile, too."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
