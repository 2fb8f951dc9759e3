"""What the tests of the product share."""

from __future__ import annotations

from pathlib import Path

import pytest

from sample_collections import write_pictures


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Eight pictures in two folders."""
    folder = tmp_path / "photos"
    write_pictures(folder, *(f"{name}/{number}.jpg" for name in ("cat", "dog") for number in range(4)))
    return folder
