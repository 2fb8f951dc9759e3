"""Indexing by a Ray cluster of several nodes on this machine: the same catalog as without, whatever goes away."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bad_files import make_bad_files
from dino_index.embedding import EmbeddingSettings
from dino_index.errors import ClusterError, ClusterLost, ClusterTooSmall, ClusterUnreachable, ModelError, RayMissing
from dino_index.indexing import IndexSummary, Progress
from dino_index.model_files import resolve_model
from dino_index.ray_engine import RaySettings, embed_files_on_ray
from requirements import require
from sample_collections import images_of, index_files, jpeg, write_pictures, write_shard

try:
    from ray_cluster import kill_worker, remove_node, running_cluster, workers
except ModuleNotFoundError:
    running_cluster = None  # type: ignore[assignment]

pytestmark = [
    pytest.mark.ray,
    # Ray's own, of a node that is ended.
    pytest.mark.filterwarnings("ignore::ResourceWarning:ray"),
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
]
BUNDLED = Path("bundled")


@dataclass(frozen=True)
class Photos:
    """A folder, and what indexing it without a cluster makes."""

    folder: Path
    num_pictures: int
    images: dict[str, dict[str, Any]]
    summary: IndexSummary


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Photos:
    """Pictures for some seconds of the bundled model, copies, a shard and unreadable files among them."""
    base = tmp_path_factory.mktemp("ray")
    folder = base / "photos"
    pictures = write_pictures(folder, *(f"{number:04}.jpg" for number in range(300)))
    for number in range(5):
        shutil.copy(pictures[50 * number], folder / f"copy {number}.jpg")
    shard = write_shard(base / "s.tar", {f"{seed}.jpg": jpeg(seed) for seed in range(1000, 1010)})
    os.rename(shard, folder / "s.tar")
    (folder / "bad").mkdir()
    reasons = make_bad_files(folder / "bad")
    summary = index_files(base / "home", BUNDLED, folder, folder / "s.tar")
    assert (summary.added, summary.failed) == (315, len(reasons))
    return Photos(folder, 315 + len(reasons), images_of(base / "home"), summary)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head that only the calling process uses, and two nodes with a processor each."""
    require(running_cluster is not None, "ray is not installed")
    with running_cluster(0, 1, 1) as cluster:
        yield cluster


def index_on(
    cluster: Any,
    home: Path,
    photos: Photos,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    replicas: int = 0,
    **options: Any,
) -> IndexSummary:
    ray = RaySettings(address=cluster.address, replicas=replicas)
    return index_files(
        home, BUNDLED, photos.folder, photos.folder / "s.tar", ray=ray, on_progress=on_progress, **options
    )


def once_some_are_done(action: Callable[[], object]) -> Callable[[Progress], None]:
    """Progress that calls `action` when the first outcomes are recorded."""
    waiting = [action]

    def show(progress: Progress) -> None:
        if waiting and 0 < progress.done < progress.total:
            waiting.pop()()

    return show


def assert_alike(home: Path, photos: Photos) -> None:
    """The catalog has what it has without the cluster; vectors may differ in their last bits."""
    images = images_of(home)
    assert images.keys() == photos.images.keys()
    for path, expected in photos.images.items():
        assert images[path] == expected, path


def test_a_cluster_makes_the_catalog_that_this_process_makes(cluster: Any, home: Path, photos: Photos) -> None:
    summary = index_on(cluster, home, photos)
    assert summary.to_json() | {"images_per_second": 0} == photos.summary.to_json() | {"images_per_second": 0}
    assert_alike(home, photos)
