"""Indexing by a Ray cluster of several nodes on this machine: the same catalog as without, whatever goes away."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from bad_files import make_bad_files
from dino_index.catalog import ImageRow
from dino_index.embedding import EmbeddingSettings
from dino_index.errors import (
    ClusterLost,
    ClusterTooSmall,
    ClusterUnreachable,
    ModelError,
    NodeUnfit,
    RayMissing,
)
from dino_index.image_bytes import DEFAULT_LIMITS
from dino_index.image_files import list_images
from dino_index.indexing import IndexSummary, Progress
from dino_index.model_files import resolve_model
from dino_index.ray_engine import RaySettings, embed_files_on_ray
from dino_index.shares import Share
from forked_commands import CommandLine
from ray_cluster import add_node, has_worker, kill_worker, remove_node, running_cluster
from sample_collections import (
    count_rows,
    errors_of,
    findable,
    ids_of,
    images_of,
    index_files,
    jpeg,
    write_pictures,
    write_shard,
)

pytestmark = pytest.mark.ray
BUNDLED = Path("bundled")


@dataclass(frozen=True)
class Photos:
    """A folder, and what indexing it without a cluster makes."""

    folder: Path
    images: dict[str, dict[str, Any]]
    errors: dict[str, tuple[str | None, str | None]]
    summary: IndexSummary


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Photos:
    """Pictures for some seconds of the bundled model, copies, a shard and unreadable files among them."""
    base = tmp_path_factory.mktemp("ray")
    folder = base / "photos"
    pictures = write_pictures(folder, *(f"{number:04}.jpg" for number in range(220)))
    for number in range(5):
        shutil.copy(pictures[40 * number], folder / f"copy {number}.jpg")
    write_shard(folder / "s.tar", {f"{seed}.jpg": jpeg(seed) for seed in range(220, 230)})
    (folder / "bad").mkdir()
    reasons = make_bad_files(folder / "bad")
    summary = index_files(base / "home", BUNDLED, folder, folder / "s.tar")
    assert (summary.added, summary.failed) == (235, len(reasons))
    return Photos(folder, images_of(base / "home"), errors_of(base / "home"), summary)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head that only the calling process uses, and two nodes with a processor each."""
    with running_cluster(0, 1, 1) as cluster:
        yield cluster


def index_on(
    cluster: Any,
    home: Path,
    photos: Photos,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    share: Share | None = None,
    **ray: Any,
) -> IndexSummary:
    settings = RaySettings(address=cluster.address, **ray)
    return index_files(
        home, BUNDLED, photos.folder, photos.folder / "s.tar", ray=settings, on_progress=on_progress, share=share
    )


def without_rate(summary: IndexSummary) -> IndexSummary:
    return replace(summary, images_per_second=0.0)


def once_some_are_done(action: Callable[[], object]) -> Callable[[Progress], None]:
    """Progress that calls `action` when the first outcomes are recorded."""
    waiting = [action]

    def show(progress: Progress) -> None:
        if waiting and 0 < progress.done < progress.total:
            waiting.pop()()

    return show


def test_a_cluster_makes_the_catalog_that_this_process_makes(cluster: Any, home: Path, photos: Photos) -> None:
    summary = index_on(cluster, home, photos)
    assert without_rate(summary) == without_rate(photos.summary)
    assert images_of(home) == photos.images
    assert errors_of(home) == photos.errors


@pytest.mark.slow
def test_all_shares_on_a_cluster_make_the_catalog_of_one_run(cluster: Any, home: Path, photos: Photos) -> None:
    shares = [index_on(cluster, home, photos, share=Share(number, 2)) for number in (2, 1)]
    for count in ("added", "updated", "skipped", "failed"):
        assert sum(getattr(share, count) for share in shares) == getattr(photos.summary, count), count
    assert shares[0].images == shares[0].added < shares[1].images == photos.summary.images
    assert images_of(home) == photos.images
    assert errors_of(home) == photos.errors
    assert findable(home) == {path for path, image in photos.images.items() if image["status"] == "ok"}


@pytest.mark.slow
def test_a_cluster_rehashes_and_prunes_as_this_process_does(
    cluster: Any, home: Path, tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "photos"
    paths = write_pictures(folder, *(f"{number:02}.jpg" for number in range(40)))
    paths.append(folder / "bad.jpg")
    for path in paths:
        content = b"no picture" if path.stem == "bad" else path.read_bytes()
        path.write_bytes(content.ljust(2000, b"\0"))  # all of one size
    index_files(home, tiny_model, folder)
    shutil.copytree(home, tmp_path / "local")
    ids = ids_of(home)
    change_unseen(paths[0], jpeg(101))
    change_unseen(paths[1], paths[2].read_bytes())
    change_unseen(paths[3], b"no picture")
    change_unseen(paths[-1], jpeg(102))
    paths[4].unlink()
    paths[5].rename(folder / "moved.jpg")
    shutil.copy(paths[6], folder / "copy.jpg")
    (folder / "new.jpg").write_bytes(jpeg(103))

    options: dict[str, Any] = {"rehash": True, "prune": True}
    local = index_files(tmp_path / "local", tiny_model, folder, **options)
    assert (local.added, local.updated, local.removed, local.failed) == (2, 4, 1, 1)
    summary = index_files(home, tiny_model, folder, ray=RaySettings(address=cluster.address), **options)
    assert without_rate(summary) == without_rate(local)
    assert images_of(home) == images_of(tmp_path / "local")
    assert errors_of(home) == errors_of(tmp_path / "local")
    assert findable(home) == findable(tmp_path / "local")
    renamed = {str(paths[5]): str(folder / "moved.jpg")}
    kept = {renamed.get(path, path): image_id for path, image_id in ids.items() if path != str(paths[4])}
    assert kept.items() <= ids_of(home).items()


def change_unseen(path: Path, content: bytes) -> None:
    """Other content in a file whose size and time of change stay."""
    status = path.stat()
    path.write_bytes(content.ljust(status.st_size, b"\0"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_killed_workers_change_nothing(cluster: Any, home: Path, photos: Photos) -> None:
    # Whose vectors are in the catalog before: the same pictures lie in the folder.
    index_files(home, BUNDLED, photos.folder / "s.tar")
    killed = []

    def kill() -> None:
        for node in cluster.worker_nodes:
            killed.append([kill_worker(node, what) for what in ("FileEmbedder", "decode_files")])

    summary = index_on(cluster, home, photos, once_some_are_done(kill))
    assert any(embedder for embedder, _ in killed)
    assert summary.added + summary.skipped == photos.summary.added
    assert images_of(home) == photos.images


def test_an_error_of_the_model_on_a_node_is_the_users(cluster: Any, photos: Photos, tmp_path: Path) -> None:
    spec = resolve_model(BUNDLED)
    weights = tmp_path / "cut.safetensors"
    weights.write_bytes(spec.weights_path.read_bytes()[:100_000])
    files = list_images([photos.folder]).files[:3]
    outcomes = embed_files_on_ray(
        files, replace(spec, weights_path=weights), {}, EmbeddingSettings(), RaySettings(address=cluster.address)
    )
    with pytest.raises(ModelError, match=r"cut\.safetensors is no readable safetensors file"):
        list(outcomes)


def test_more_replicas_than_the_cluster_can_hold_are_refused(cluster: Any, home: Path, photos: Photos) -> None:
    with pytest.raises(ClusterTooSmall, match=r"3 replicas of the model need a processor each.* have 2.*--replicas 2"):
        index_on(cluster, home, photos, replicas=3)


@pytest.mark.slow
def test_a_cluster_whose_processors_others_hold_is_refused(cluster: Any, home: Path, photos: Photos) -> None:
    hold = (
        "import ray, sys, time\n"
        "ray.init(sys.argv[1])\n"
        "held = [ray.remote(num_cpus=1)(lambda: time.sleep(300)).remote() for _ in range(2)]\n"
        "while ray.available_resources().get('CPU', 0): time.sleep(0.1)\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen([sys.executable, "-c", hold, cluster.address], **pipes) as other:  # type: ignore[call-overload]
        assert any(line == "held\n" for line in other.stdout)
        with pytest.raises(ClusterTooSmall, match="of the Ray cluster's 2 only 0 are free"):
            index_on(cluster, home, photos, patience_s=1)
        other.stdin.close()
    assert index_on(cluster, home, photos).added == photos.summary.added


def test_an_address_where_nobody_answers_is_refused(home: Path, photos: Photos) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        ray = RaySettings(address=address)
        with pytest.raises(ClusterUnreachable, match=f"{address} .*refused.*ray start --head"):
            index_files(home, BUNDLED, photos.folder, ray=ray)


@pytest.mark.slow
def test_a_cluster_for_the_run_leaves_nothing_in_the_users_home(
    home: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pictures(tmp_path / "photos", "a.jpg", "b.jpg")
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    # Where no cluster is known; sockets' paths may not be long.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        assert index_files(home, tiny_model, tmp_path / "photos", ray=RaySettings()).added == 2
    assert not list(tmp_path.glob("user/**/*"))


def test_a_ray_client_address_is_refused(home: Path, photos: Photos) -> None:
    with pytest.raises(ClusterUnreachable, match="run dino-search on a node of the cluster"):
        index_files(home, BUNDLED, photos.folder, ray=RaySettings(address="ray://head:10001"))


def test_without_ray_the_command_says_how_to_install_it(
    home: Path, photos: Photos, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RayMissing, match=r"pip install 'ray\[data\]'"):
        index_files(home, BUNDLED, photos.folder, ray=RaySettings())


@pytest.mark.parametrize("digests", [[], [bytes(32)], [bytes([number]) * 31 + b"\0" for number in range(5)]])
def test_known_pictures_are_found_by_their_digest(digests: list[bytes]) -> None:
    from dino_index.ray_stages import KnownPictures

    sizes = {digest: (number, number + 1) for number, digest in enumerate(digests)}
    known = KnownPictures(sizes)
    for digest in [*digests, b"\1" * 32, b"\xff" * 32]:
        assert known.find(digest) == sizes.get(digest)


def test_a_node_with_another_version_is_refused() -> None:
    from dino_index.ray_stages import FileEmbedder, StageSettings

    settings = StageSettings(
        spec=resolve_model(BUNDLED), device="cpu", batch_size=0, limits=DEFAULT_LIMITS, version="0.0",
        weights=None, known=None,  # type: ignore[arg-type]
    )  # fmt: skip
    with pytest.raises(NodeUnfit, match=r"the calling process 0\.0: install the same version"):
        FileEmbedder(settings)(None)


# --- nodes that go away


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [0, 1])
def test_a_removed_node_changes_nothing(home: Path, photos: Photos, replicas: int) -> None:
    with running_cluster(0, 1, 1) as cluster:

        def remove() -> None:
            embedding = [node for node in cluster.worker_nodes if has_worker(node, "FileEmbedder")]
            remove_node(cluster, embedding[0])

        show = once_some_are_done(remove)
        summary = index_on(cluster, home, photos, show, replicas=replicas)
        assert len(cluster.worker_nodes) == 1
    assert without_rate(summary) == without_rate(photos.summary)
    assert images_of(home) == photos.images


@pytest.mark.slow
def test_when_all_nodes_are_gone_what_was_recorded_stays(home: Path, photos: Photos) -> None:
    with running_cluster(0, 1) as cluster:
        show = once_some_are_done(lambda: remove_node(cluster, next(iter(cluster.worker_nodes))))
        with pytest.raises(ClusterLost, match="the same command goes on from there"):
            index_on(cluster, home, photos, show)
        recorded = images_of(home)
        assert 0 < len(recorded) < len(photos.images)
        add_node(cluster, 1)
        assert index_on(cluster, home, photos).images == photos.summary.images
    assert images_of(home) == photos.images


@pytest.mark.slow
def test_a_head_that_is_gone_ends_the_run_with_an_error(
    home: Path, photos: Photos, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "5")
    with running_cluster(1) as cluster:
        show = once_some_are_done(lambda: remove_node(cluster, cluster.head_node))
        with pytest.raises(ClusterLost, match=r"Connection refused.*the same command goes on from there"):
            index_on(cluster, home, photos, show)
    assert 0 < len(images_of(home)) < len(photos.images)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_and_the_next_one_goes_on(
    cluster: Any, home: Path, photos: Photos, tmp_path: Path, number: signal.Signals
) -> None:
    commands = CommandLine(tmp_path / "commands")
    command = ["index", photos.folder, photos.folder / "s.tar", "--model", "bundled"]
    running = commands.start(*command, "--engine", "ray", "--ray-address", cluster.address)
    try:
        while not home.exists() or not count_rows(home, ImageRow):
            assert running.is_alive(), running.stderr()
            time.sleep(0.1)
        running.send(number)
        done = running.wait(60)
    finally:
        commands.end()
    assert done.exit_code == 128 + number
    assert "the same command goes on from there" in done.stderr
    assert len(done.stdout.splitlines()) == 2, done.stdout
    assert 0 < len(images_of(home)) < len(photos.images)
    wait_until_idle(cluster)
    index_files(home, BUNDLED, photos.folder, photos.folder / "s.tar")
    assert images_of(home) == photos.images


def wait_until_idle(cluster: Any) -> None:
    """The ended run leaves no replica behind."""
    deadline = time.monotonic() + 30
    while any(has_worker(node, "FileEmbedder") for node in cluster.worker_nodes):
        assert time.monotonic() < deadline
        time.sleep(0.1)
