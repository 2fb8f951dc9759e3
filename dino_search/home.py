"""The home folder: where catalog and snapshots lie."""

from __future__ import annotations

import os
from pathlib import Path

HOME_VARIABLE = "DINO_SEARCH_HOME"


def default_home() -> Path:
    """`DINO_SEARCH_HOME` where it is set, else the platform's folder for user data."""
    if given := os.environ.get(HOME_VARIABLE):
        return Path(given).expanduser()
    from platformdirs import user_data_path

    return user_data_path("dino-search", appauthor=False)
