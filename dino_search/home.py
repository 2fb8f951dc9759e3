"""The home folder, where snapshots lie, and the database, where the catalog is kept."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HOME_VARIABLE = "DINO_SEARCH_HOME"
DATABASE_VARIABLE = "DINO_SEARCH_DATABASE"


def default_home() -> Path:
    """`DINO_SEARCH_HOME` where it is set, else the platform's folder for user data."""
    if given := os.environ.get(HOME_VARIABLE):
        return Path(given).expanduser()
    from platformdirs import user_data_path

    return user_data_path("dino-search", appauthor=False)


def default_database() -> str | None:
    """`DINO_SEARCH_DATABASE`, the URL of a PostgreSQL database; None for an SQLite file in the home folder."""
    return os.environ.get(DATABASE_VARIABLE) or None


@contextmanager
def database_given(url: str) -> Iterator[None]:
    """Until its end this is the default database, for processes that are started meanwhile, too."""
    before = os.environ.get(DATABASE_VARIABLE)
    os.environ[DATABASE_VARIABLE] = url
    try:
        yield
    finally:
        if before is None:
            del os.environ[DATABASE_VARIABLE]
        else:
            os.environ[DATABASE_VARIABLE] = before
