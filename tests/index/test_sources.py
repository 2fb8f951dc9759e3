"""Indexing what lies elsewhere than in folders: manifests, tar shards, URLs."""

from __future__ import annotations

import functools
import http.server
import importlib
import os
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bad_files import make_bad_files
from dino_index import shards
from dino_index.catalog import SourceRow
from dino_index.errors import BackendMissing, ImageError, ManifestError, NoImagesFound, PruneRefused, SourceNotFound
from dino_index.image_bytes import ReadLimits, read_file
from dino_index.image_paths import absolute_path, is_gone, split_member
from dino_index.indexing import IndexSummary
from sample_collections import (
    count_rows,
    findable,
    ids_of,
    images_of,
    index_files,
    jpeg,
    write_pictures,
    write_shard,
)

Index = Callable[..., IndexSummary]


@pytest.fixture
def index(home: Path, tiny_model: Path) -> Index:
    def run(*paths: str | Path, **options: Any) -> IndexSummary:
        return index_files(home, tiny_model, *paths, **options)

    return run


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """An empty folder, apart from the home."""
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def counts(summary: IndexSummary) -> dict[str, int]:
    """What is not zero of a run."""
    names = "added updated skipped removed failed ignored moved repeated".split()
    return {name: getattr(summary, name) for name in names if getattr(summary, name)}


def write_manifest(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# --- manifests


def test_manifest_labels_and_metadata_are_stored(index: Index, home: Path, tmp_path: Path) -> None:
    a, b = write_pictures(tmp_path, "a.jpg", "sub/b.jpg")
    manifest = write_manifest(tmp_path / "list.csv", "path,label,year", "a.jpg,cat,1987", f"{b},,")
    assert counts(index(manifest)) == {"added": 2}
    images = images_of(home)
    assert (images[str(a)]["label"], images[str(a)]["facts"]) == ("cat", {"year": "1987"})
    assert (images[str(b)]["label"], images[str(b)]["facts"]) == (None, {"year": None})
    assert counts(index(manifest)) == {"skipped": 2}
    assert findable(home) == {str(a), str(b)}


def test_changed_metadata_updates_an_unchanged_file_and_embeds_nothing(
    index: Index, home: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, c = write_pictures(data, "a.jpg", "b.jpg", "c.jpg")
    lines = ["path,label,year,place", "a.jpg,cat,1987,here", "b.jpg,cat,1988,here", "c.jpg,cat,1989,here"]
    index(write_manifest(data / "list.csv", *lines))
    monkeypatch.setattr("dino_index.embedding.read_file", pytest.fail)
    lines[1:3] = ["a.jpg,dog,1987,there", "b.jpg,dog,1988,here"]
    assert counts(index(write_manifest(data / "list.csv", *lines))) == {"updated": 2, "skipped": 1}
    images = images_of(home)
    assert images[str(a)]["facts"] == {"year": "1987", "place": "there"}
    assert [images[str(path)]["label"] for path in (a, b, c)] == ["dog", "dog", "cat"]
    # A run that knows nothing of labels and metadata leaves them.
    assert counts(index(data)) == {"skipped": 3, "ignored": 1}
    assert images_of(home) == images


def test_files_that_a_manifest_names_and_are_not_there_are_in_the_ledger_with_their_line(
    index: Index, home: Path, data: Path
) -> None:
    write_pictures(data, "a.jpg", "b.jpg")
    manifest = write_manifest(data / "list.txt", "a.jpg", "gone.jpg", "no/such/shard.tar", "b.jpg")
    assert counts(index(manifest)) == {"added": 2, "failed": 2}
    images = images_of(home)
    assert images[str(data / "gone.jpg")]["error_code"] == "vanished"
    assert images[str(data / "no/such/shard.tar")]["error_code"] == "vanished"
    assert counts(index(manifest)) == {"skipped": 2, "failed": 2}
    write_pictures(data, "gone.jpg", seed=20)
    assert counts(index(manifest)) == {"skipped": 2, "updated": 1, "failed": 1}
    # A run over the folder, which names nothing, forgets what is not there.
    assert counts(index(data)) == {"skipped": 3, "removed": 1, "ignored": 1}


def test_rows_that_name_a_file_again_are_counted_and_the_first_one_counts(
    index: Index, home: Path, tmp_path: Path
) -> None:
    (a,) = write_pictures(tmp_path, "a.jpg")
    manifest = write_manifest(tmp_path / "list.csv", "path,label", "a.jpg,first", "./a.jpg,second", f"{a},third")
    assert counts(index(manifest, tmp_path / "a.jpg")) == {"added": 1, "repeated": 2}
    assert images_of(home)[str(a)]["label"] == "first"


def test_manifest_in_a_folder_is_no_manifest(index: Index, tmp_path: Path) -> None:
    write_pictures(tmp_path, "photos/a.jpg", "b.jpg")
    write_manifest(tmp_path / "photos/list.txt", "../b.jpg")
    assert counts(index(tmp_path / "photos")) == {"added": 1, "ignored": 1}


def test_a_manifest_with_a_mistake_is_refused_before_anything_is_done(index: Index, home: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path, "a.jpg")
    with pytest.raises(ManifestError, match=r"list\.csv must have the column path"):
        index(write_manifest(tmp_path / "list.csv", "file", "a.jpg"))
    with pytest.raises(NoImagesFound, match="found none"):
        index(write_manifest(tmp_path / "empty.txt", ""))
    assert not home.exists() or count_rows(home, SourceRow) == 0


def test_vanished_files_of_a_manifest_are_pruned_like_others(index: Index, home: Path, tmp_path: Path) -> None:
    paths = write_pictures(tmp_path, *(f"{number}.jpg" for number in range(6)))
    manifest = write_manifest(tmp_path / "list.txt", *(path.name for path in paths))
    index(manifest)
    paths[0].unlink()
    assert counts(index(manifest)) == {"skipped": 6}
    assert len(findable(home)) == 6
    assert counts(index(manifest, prune=True)) == {"skipped": 5, "removed": 1}
    assert str(paths[0]) not in findable(home)
    for path in paths[1:4]:
        path.unlink()
    with pytest.raises(PruneRefused, match="refused to drop 3 of 5"):
        index(manifest, prune=True)
    # What it named before and does not now is no business of the manifest's.
    write_manifest(manifest, "5.jpg")
    assert counts(index(manifest, prune=True)) == {"skipped": 1}


def test_a_manifest_over_many_folders_gets_few_sources(index: Index, home: Path, data: Path) -> None:
    paths = write_pictures(data, *(f"{number}/deep/a.jpg" for number in range(20)))
    (data / "lists").mkdir()
    manifest = write_manifest(data / "lists/list.txt", *map(str, paths))
    assert counts(index(manifest)) == {"added": 20}
    assert count_rows(home, SourceRow) == 1
    assert set(ids_of(home)) == set(map(str, paths))
    assert counts(index(data)) == {"skipped": 20, "ignored": 1}


# --- shards


def test_members_of_a_shard_are_indexed_under_paths_below_it(index: Index, home: Path, tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "s.tar", {"1.jpg": jpeg(1), "1.cls": b"3", "./x//2.jpg": jpeg(2)})
    other = write_shard(tmp_path / "t.tar", {"1.jpg": jpeg(3)})
    expected = {f"{shard}/1.jpg", f"{shard}/x/2.jpg", f"{other}/1.jpg"}
    assert counts(index(shard, other)) == {"added": 3, "ignored": 1}
    assert findable(home) == expected
    assert {facts["size"] for facts in images_of(home).values()} == {len(jpeg(number)) for number in (1, 2, 3)}
    assert counts(index(shard, other, shard)) == {"skipped": 3, "ignored": 1}
    assert counts(index(f"{shard}/x/2.jpg")) == {"skipped": 1}
    for path in expected:
        assert split_member(path) is not None
    assert read_file(f"{shard}/x/2.jpg").data == jpeg(2)


def test_unchanged_members_are_not_read(
    index: Index, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = write_shard(tmp_path / "s.tar", {f"{number}.jpg": jpeg(number) for number in range(4)})
    index(shard)
    before = ids_of(home)
    with monkeypatch.context() as patch:
        patch.setattr("dino_index.embedding.read_file", pytest.fail)
        assert counts(index(shard)) == {"skipped": 4}
    status = shard.stat()
    write_shard(shard, {"0.jpg": jpeg(0), "1.jpg": jpeg(9), "4.jpg": jpeg(4)})
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    assert counts(index(shard)) == {"added": 1, "updated": 1, "skipped": 1}
    assert counts(index(shard, prune=True, prune_any=True)) == {"skipped": 3, "removed": 2}
    assert {path: ids_of(home)[path] for path in (f"{shard}/0.jpg", f"{shard}/1.jpg")}.items() <= before.items()


@pytest.mark.parametrize("cut", ["in a picture", "at a header"])
def test_members_before_the_cut_are_indexed_and_the_shard_is_in_the_ledger(
    index: Index, home: Path, tmp_path: Path, cut: str
) -> None:
    shard = write_shard(tmp_path / "s.tar", {f"{number}.jpg": jpeg(number) for number in range(4)})
    whole = shard.read_bytes()
    with tarfile.open(shard) as tar:
        third = tar.getmembers()[2]
    shard.write_bytes(whole[: third.offset_data + 100 if cut == "in a picture" else third.offset])
    assert counts(index(shard)) == {"added": 2, "failed": 1}
    assert images_of(home)[str(shard)]["error_code"] == "truncated"
    assert counts(index(shard)) == {"skipped": 2, "failed": 1}
    shard.write_bytes(whole)
    assert counts(index(shard)) == {"added": 2, "skipped": 2, "removed": 1}
    assert str(shard) not in images_of(home)


def test_a_shard_that_is_cut_or_gone_loses_no_image_to_pruning(index: Index, home: Path, tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "s.tar", {f"{number}.jpg": jpeg(number) for number in range(4)})
    manifest = write_manifest(tmp_path / "list.txt", "s.tar")
    index(shard)
    with tarfile.open(shard) as tar:
        second = tar.getmembers()[1]
    os.truncate(shard, second.offset)
    assert counts(index(shard, prune=True, prune_any=True)) == {"skipped": 1, "failed": 1}
    assert len(findable(home)) == 4
    shard.unlink()
    with pytest.raises(SourceNotFound):
        index(shard, prune=True)
    assert counts(index(manifest, prune=True, prune_any=True)) == {"failed": 1}
    assert len(findable(home)) == 4
    assert counts(index(shard, prune=True, prune_any=True))["removed"] >= 4


def test_a_renamed_shard_keeps_ids_and_vectors(index: Index, home: Path, tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "s.tar", {f"{number}.jpg": jpeg(number) for number in range(3)})
    index(shard)
    ids = sorted(ids_of(home).values())
    moved = shard.rename(tmp_path / "t.tar")
    assert counts(index(moved)) == {"updated": 3, "moved": 3}
    assert sorted(ids_of(home).values()) == ids
    assert findable(home) == {f"{moved}/{number}.jpg" for number in range(3)}


def test_shards_in_folders_are_left_alone_and_those_known_stay(index: Index, home: Path, data: Path) -> None:
    write_pictures(data, "a.jpg")
    shard = write_shard(data / "s.tar", {"1.jpg": jpeg(1)})
    summary = index(data)
    assert (counts(summary), summary.ignored_by_type) == ({"added": 1, "ignored": 1}, {"tar shard": 1})
    assert counts(index(shard)) == {"added": 1}
    assert counts(index(data, prune=True)) == {"skipped": 1, "ignored": 1}
    assert len(findable(home)) == 2


def test_labels_of_shards_come_from_manifests_folders_and_csv_files(index: Index, home: Path, tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "s.tar", {"cow/1.jpg": jpeg(1), "2.jpg": jpeg(2)})
    index(shard, labels="folders")
    assert {path: facts["label"] for path, facts in images_of(home).items()} == {
        f"{shard}/cow/1.jpg": "cow", f"{shard}/2.jpg": None,
    }  # fmt: skip
    labels = write_manifest(tmp_path / "labels.csv", "path,label", "s.tar/2.jpg,two", "cow/1.jpg,one")
    index(shard, labels=labels)
    assert {facts["label"] for facts in images_of(home).values()} == {"one", "two"}
    index(write_manifest(tmp_path / "list.csv", "path,label,year", "s.tar,all,1987"))
    assert [(facts["label"], facts["facts"]) for facts in images_of(home).values()] == [("all", {"year": "1987"})] * 2


def test_samples_of_webdataset_bring_labels_and_metadata(index: Index, home: Path, tmp_path: Path) -> None:
    members = {
        "a/1.cls": b"7\n", "a/1.jpg": jpeg(1), "a/1.json": b'{"year": 1987, "x": NaN}', "a/1.mask.png": jpeg(2),
        "2.jpg": jpeg(3), "2.json": b"[1]", "3.jpg": jpeg(4), "3.cls": b"\xff", "4.jpg": jpeg(5), "4.json": b"{",
        "5.jpg": jpeg(6), "5.json": b" " * (2 << 20),
    }  # fmt: skip
    shard = write_shard(tmp_path / "s.tar", members)
    summary = index(shard)
    assert (counts(summary), summary.skipped_files) == (
        {"added": 6, "ignored": 6}, {"unreadable .cls or .json in a shard": 4},
    )  # fmt: skip
    images = images_of(home)
    for name in ("a/1.jpg", "a/1.mask.png"):
        assert (images[f"{shard}/{name}"]["label"], images[f"{shard}/{name}"]["facts"]) == (
            "7",
            {"year": 1987, "x": None},
        )
    assert {
        (images[f"{shard}/{name}.jpg"]["label"], str(images[f"{shard}/{name}.jpg"]["facts"])) for name in "2345"
    } == {(None, "{}")}
    assert counts(index(shard))["skipped"] == 6
    index(shard, labels="folders")
    assert images_of(home)[f"{shard}/a/1.jpg"]["label"] == "a"


def test_exclude_counts_inside_shards(index: Index, home: Path, tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "s.tar", {"raw/1.jpg": jpeg(1), "2.jpg": jpeg(2), "3.png.jpg": jpeg(3)})
    summary = index(shard, exclude=["raw/", "3.*"])
    assert (counts(summary), summary.skipped_files) == ({"added": 1}, {"excluded": 2})
    assert findable(home) == {f"{shard}/2.jpg"}


def test_bad_members_are_in_the_ledger_for_the_reason_of_bad_files(index: Index, home: Path, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    reasons = make_bad_files(tmp_path / "files")
    bad = {name: (tmp_path / "files" / name).read_bytes() for name in reasons if (tmp_path / "files" / name).is_file()}
    shard = write_shard(tmp_path / "bad.tar", {"good.jpg": jpeg(1)} | bad)
    index(shard)
    found = {os.path.basename(path): facts["error_code"] for path, facts in images_of(home).items()}
    assert found == {name: reasons[name] for name in bad} | {"good.jpg": None}


def test_compressed_shards_are_refused(index: Index, tmp_path: Path) -> None:
    write_shard(tmp_path / "s.tar.gz", {"1.jpg": jpeg(1)})
    with pytest.raises(SourceNotFound, match="compressed archive; unpack it"):
        index(tmp_path / "s.tar.gz")


def test_members_are_read_by_their_place_and_not_by_going_through_the_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = write_shard(tmp_path / "s.tar", {f"{number}.jpg": jpeg(number % 3) for number in range(50)})
    assert read_file(shard / "7.jpg").data == jpeg(1)
    monkeypatch.setattr("tarfile.open", pytest.fail)
    assert read_file(shard / "49.jpg").data == jpeg(1)
    for name, reason in (("50.jpg", "vanished"), ("", "vanished")):
        with pytest.raises(ImageError) as caught:
            read_file(f"{shard}/{name}")
        assert caught.value.reason == reason
    with pytest.raises(ImageError) as caught:
        read_file(shard / "7.jpg", ReadLimits(max_bytes=100))
    assert caught.value.reason == "too_large"


def test_memory_of_shards_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards.forget_shards()
    monkeypatch.setattr(shards, "_MAX_REMEMBERED", 10)
    for number in range(6):
        write_shard(tmp_path / f"{number}.tar", {f"{at}.jpg": jpeg(0) for at in range(4)})
        assert read_file(tmp_path / f"{number}.tar/3.jpg").data == jpeg(0)
    assert len(shards._remembered_shards) == 2
    assert read_file(tmp_path / "0.tar/3.jpg").data == jpeg(0)


def test_last_of_members_with_one_name_counts_as_when_unpacked(index: Index, home: Path, tmp_path: Path) -> None:
    shard = tmp_path / "s.tar"
    write_shard(shard, {"1.jpg": jpeg(1)})
    write_shard(tmp_path / "t.tar", {"1.jpg": jpeg(2)})
    with tarfile.open(shard, "a") as tar:
        tar.add(tmp_path / "t.tar", "x.bin")
        (tmp_path / "1.jpg").write_bytes(jpeg(2))
        tar.add(tmp_path / "1.jpg", "./1.jpg")
    summary = index(shard)
    assert summary.ignored_by_type == {"shard member": 1, "replaced shard member": 1}
    assert read_file(shard / "1.jpg").data == jpeg(2)


def test_a_folder_called_like_a_shard_is_a_folder(index: Index, home: Path, tmp_path: Path) -> None:
    (path,) = write_pictures(tmp_path, "photos.tar/a.jpg")
    assert counts(index(tmp_path / "photos.tar")) == {"added": 1}
    assert findable(home) == {str(path)}


def test_a_member_whose_name_leads_out_of_the_shard_is_ignored(index: Index, home: Path, tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "s.tar", {"../evil.jpg": jpeg(1), "/abs.jpg": jpeg(2), "a/../b.jpg": jpeg(3)})
    assert counts(index(shard)) == {"added": 1, "ignored": 2}
    assert findable(home) == {f"{shard}/abs.jpg"}


# --- URLs


@pytest.fixture
def bucket() -> Iterator[Any]:
    """An empty file system in memory, as fsspec has it."""
    from fsspec.implementations.memory import MemoryFileSystem

    filesystem = MemoryFileSystem()
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]
    yield filesystem
    filesystem.store.clear()


def test_a_folder_behind_a_url_is_listed_with_all_below_it(index: Index, home: Path, bucket: Any) -> None:
    for number, name in enumerate(
        ("a.jpg", "sub/deep/b.PNG", "@eaDir/t.jpg", ".hidden/c.jpg", "film.mp4", "raw/d.jpg")
    ):
        bucket.pipe_file(f"/photos/{name}", jpeg(number))
    summary = index("memory://photos/", exclude=["raw"])
    assert counts(summary) == {"added": 2, "ignored": 1}
    assert summary.skipped_folders == {"thumbnails": 1, "hidden": 1, "excluded": 1}
    assert set(ids_of(home)) == {"memory://photos/a.jpg", "memory://photos/sub/deep/b.PNG"}
    assert counts(index("memory://photos")) == {"added": 1, "skipped": 2, "ignored": 1}
    assert read_file("memory://photos/a.jpg").data == jpeg(0)


def test_changed_files_behind_urls_are_read_again_and_others_not(
    index: Index, home: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        bucket.pipe_file(f"/photos/{number}.jpg", jpeg(number))
    index("memory://photos", labels="folders")
    with monkeypatch.context() as patch:
        patch.setattr("dino_index.embedding.read_file", pytest.fail)
        assert counts(index("memory://photos")) == {"skipped": 3}
    bucket.pipe_file("/photos/1.jpg", jpeg(9))
    assert counts(index("memory://photos")) == {"updated": 1, "skipped": 2}
    assert {facts["label"] for facts in images_of(home).values()} == {"photos"}


def test_pruning_below_a_url(index: Index, home: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(6):
        bucket.pipe_file(f"/photos/{number}.jpg", jpeg(number))
    index("memory://photos")
    bucket.rm("/photos/0.jpg")
    assert counts(index("memory://photos", prune=True)) == {"skipped": 5, "removed": 1}

    def out_of_reach(*arguments: Any, **options: Any) -> None:
        raise OSError("no route to the server")

    with monkeypatch.context() as patch:
        for name in ("info", "ls", "find"):
            patch.setattr(type(bucket), name, out_of_reach)
        with pytest.raises(SourceNotFound, match="no route to the server"):
            index("memory://photos", prune=True, prune_any=True)
        assert not is_gone("memory://photos/1.jpg")
        with pytest.raises(ImageError) as caught:
            read_file("memory://photos/1.jpg")
        assert caught.value.reason == "unreadable"
    bucket.rm("/photos", recursive=True)
    with pytest.raises(SourceNotFound):
        index("memory://photos", prune=True)
    assert len(findable(home)) == 5
    assert is_gone("memory://photos/1.jpg")


def test_manifests_and_shards_behind_urls(index: Index, home: Path, bucket: Any, tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "s.tar", {f"{number}.jpg": jpeg(number) for number in range(3)})
    bucket.pipe_file("/data/s.tar", shard.read_bytes())
    bucket.pipe_file("/data/a.jpg", jpeg(7))
    bucket.pipe_file("/data/list.csv", b"path,label\na.jpg,cat\nmemory://data/s.tar,cow\nmemory://data/none.jpg,\n")
    assert counts(index("memory://data/list.csv")) == {"added": 4, "failed": 1}
    images = images_of(home)
    assert {path: facts["label"] for path, facts in images.items() if facts["status"] == "ok"} == {
        "memory://data/a.jpg": "cat", **{f"memory://data/s.tar/{number}.jpg": "cow" for number in range(3)},
    }  # fmt: skip
    assert images["memory://data/none.jpg"]["error_code"] == "vanished"
    assert read_file("memory://data/s.tar/1.jpg").data == jpeg(1)
    assert counts(index("memory://data/s.tar", "memory://data/a.jpg")) == {"skipped": 4}


def test_a_shard_behind_a_url_that_is_cut_short(index: Index, home: Path, bucket: Any, tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "s.tar", {f"{number}.jpg": jpeg(number) for number in range(3)})
    bucket.pipe_file("/data/s.tar", shard.read_bytes()[: len(jpeg(0)) + 1700])
    assert counts(index("memory://data/s.tar")) == {"added": 1, "failed": 1}
    assert images_of(home)["memory://data/s.tar"]["error_code"] == "truncated"


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """URL of a web server over the test's folder `web`."""
    (tmp_path / "web").mkdir()
    handler = functools.partial(QuietHandler, directory=str(tmp_path / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{web.server_port}"
        web.shutdown()
        thread.join()


def test_pages_of_links_over_http_are_folders(index: Index, home: Path, server: str, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    write_pictures(tmp_path / "web", "photos/a b.jpg", "photos/sub/c.jpg", "photos/notes.txt")
    assert counts(index(f"{server}/photos/")) == {"added": 2, "ignored": 1}
    assert set(ids_of(home)) == {f"{server}/photos/a%20b.jpg", f"{server}/photos/sub/c.jpg"}
    assert counts(index(f"{server}/photos")) == {"skipped": 2, "ignored": 1}
    assert counts(index(f"{server}/photos/sub/c.jpg")) == {"skipped": 1}
    (tmp_path / "web/photos/sub/c.jpg").unlink()
    assert counts(index(f"{server}/photos", prune=True, prune_any=True)) == {"skipped": 1, "ignored": 1, "removed": 1}
    with pytest.raises(SourceNotFound, match="no such file"):
        index(f"{server}/nothing.jpg")


def test_a_web_server_that_is_down_is_not_one_without_files(index: Index, home: Path, server: str) -> None:
    pytest.importorskip("aiohttp")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), QuietHandler) as closed:
        port = closed.server_port
    url = f"http://127.0.0.1:{port}/a.jpg"
    assert not is_gone(url)
    assert is_gone(f"{server}/a.jpg")
    with pytest.raises(ImageError) as caught:
        read_file(url)
    assert caught.value.reason == "unreadable"


def test_a_missing_backend_names_the_extra(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = importlib.import_module("fsspec.registry")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(registry._registry, "s3", raising=False)
    with pytest.raises(BackendMissing, match=r"s3://.*pip install 'dino-search\[remote\]'"):
        index("s3://bucket/photos")
    with pytest.raises(ImageError, match=r"pip install 'dino-search\[remote\]'"):
        read_file("s3://bucket/photos/a.jpg")
    assert not is_gone("s3://bucket/photos/a.jpg")
    with pytest.raises(BackendMissing, match="nonsense://; is it spelt right"):
        index("nonsense://bucket")


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ("S3://bucket/a/", "s3://bucket/a"),
        ("memory://", "memory://"),
        ("file:///photos/a%20b.jpg", "/photos/a b.jpg"),
        ("/photos/../a/", "/a"),
    ],
)
@pytest.mark.skipif(os.name != "posix", reason="paths as on POSIX")
def test_paths_are_stored_in_one_form(given: str, path: str) -> None:
    assert absolute_path(given) == path
