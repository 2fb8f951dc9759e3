"""A service that the tests of a module share; what it holds, they only read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from running_service import RunningService, running_service
from sample_collections import index_files, write_pictures


@pytest.fixture(scope="module")
def shared_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures in two folders, and one that is nowhere indexed."""
    folder = tmp_path_factory.mktemp("photos")
    write_pictures(folder, *(f"{name}/{number}.jpg" for name in ("cat", "dog") for number in range(4)))
    write_pictures(folder.parent / f"{folder.name}-other", "new.jpg", seed=100)
    return folder


@pytest.fixture(scope="module")
def new_picture(shared_photos: Path) -> Path:
    """One that is nowhere indexed."""
    return shared_photos.parent / f"{shared_photos.name}-other" / "new.jpg"


@pytest.fixture(scope="module")
def service(
    tmp_path_factory: pytest.TempPathFactory, shared_photos: Path, tiny_model: Path
) -> Iterator[RunningService]:
    """A service on the eight pictures, labelled by folder."""
    home = tmp_path_factory.mktemp("service") / "home"
    index_files(home, tiny_model, shared_photos, labels="folders")
    with running_service(home) as running:
        yield running


@pytest.fixture
def own_service(home: Path, photos: Path, tiny_model: Path) -> Iterator[RunningService]:
    """A service that the test may change."""
    index_files(home, tiny_model, photos, labels="folders")
    with running_service(home) as running:
        yield running
