from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bad_files import make_bad_files, make_good_files
from databases import open_catalog
from dino_index.backbones import Backbone
from dino_index.catalog import CollectionRow, EmbeddingRow, ImageRow
from dino_index.collections import find_collection
from dino_index.embedding import EmbeddingSettings
from dino_index.errors import (
    CollectionError,
    FingerprintMismatch,
    LabelFileError,
    ModelError,
    ModelNotFound,
    NoImagesFound,
    PruneRefused,
    SourceNotFound,
)
from dino_index.images import load_image
from dino_index.indexing import IndexSummary, Progress
from dino_index.integrity import compact_collection
from dino_index.model_files import resolve_model
from dino_index.recording import remove_images
from sample_collections import (
    count_rows,
    findable,
    ids_of,
    images_of,
    index_files,
    jpeg,
    save_tiny_model,
    write_pictures,
)

pytestmark = pytest.mark.usefixtures("database")
Index = Callable[..., IndexSummary]
posix_only = pytest.mark.skipif(os.name != "posix", reason="links need a POSIX system")


@pytest.fixture
def index(home: Path, tiny_model: Path) -> Index:
    """Indexes the given paths into the test's home, with the tiny model."""

    def run(*paths: str | Path, model: Path = tiny_model, **options: Any) -> IndexSummary:
        return index_files(home, model, *paths, **options)

    return run


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six pictures in two folders."""
    folder = tmp_path / "photos"
    write_pictures(folder, "a/1.jpg", "a/2.jpg", "a/3.jpg", "b/4.jpg", "b/5.jpg", "b/6.jpg")
    return folder


def counts(summary: IndexSummary) -> dict[str, int]:
    """What is not zero of a run."""
    names = "added updated skipped removed failed ignored moved".split()
    return {name: getattr(summary, name) for name in names if getattr(summary, name)}


def touch_later(path: Path, seconds: int = 10) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + seconds * 10**9))


def names(paths: set[str], root: Path) -> set[str]:
    return {os.path.relpath(path, root) for path in paths}


# --- adding and skipping


def test_a_first_run_adds_everything_and_a_second_skips_it(index: Index, home: Path, photos: Path) -> None:
    first = index(photos)
    assert (counts(first), first.images) == ({"added": 6}, 6)
    before = images_of(home)
    second = index(photos)
    assert (counts(second), second.images) == ({"skipped": 6}, 6)
    assert images_of(home) == before
    assert findable(home) == set(before)


def test_unchanged_files_are_neither_opened_nor_is_the_model_loaded(
    index: Index, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index(photos)
    monkeypatch.setattr("dino_index.embedding.read_file", pytest.fail)
    monkeypatch.setattr("dino_index.backbones.Backbone", pytest.fail)
    assert counts(index(photos)) == {"skipped": 6}


def test_vectors_are_those_of_the_backbone(index: Index, home: Path, photos: Path, tiny_model: Path) -> None:
    index(photos)
    backbone = Backbone(resolve_model(tiny_model))
    for path, facts in images_of(home).items():
        picture = load_image(path, size=(32, 32))
        assert (facts["width"], facts["height"]) == (picture.width, picture.height)
        for kind, expected in zip(("cls", "gem"), backbone.embed(picture.pixels_HWC[None]), strict=True):
            np.testing.assert_allclose(np.frombuffer(facts[kind], np.float16), expected[0], rtol=0.02, atol=0.02)


def test_new_files_are_added_beside_old_ones(index: Index, home: Path, photos: Path) -> None:
    index(photos)
    ids = ids_of(home)
    write_pictures(photos, "c/7.jpg", seed=50)
    assert counts(index(photos)) == {"added": 1, "skipped": 6}
    assert ids.items() < ids_of(home).items()


def test_a_touched_file_with_the_same_content_counts_as_unchanged(index: Index, home: Path, photos: Path) -> None:
    index(photos)
    before = images_of(home), ids_of(home)
    touch_later(photos / "a/1.jpg")
    assert counts(index(photos)) == {"skipped": 6}
    assert (images_of(home), ids_of(home)) == before


def test_a_changed_file_keeps_its_id_and_gets_a_new_vector(index: Index, home: Path, photos: Path) -> None:
    index(photos)
    path, before, ids = str(photos / "a/1.jpg"), images_of(home), ids_of(home)
    (photos / "a/1.jpg").write_bytes(jpeg(99))
    touch_later(photos / "a/1.jpg")
    assert counts(index(photos)) == {"updated": 1, "skipped": 5}
    after = images_of(home)
    assert ids_of(home) == ids
    assert after[path]["cls"] != before[path]["cls"]
    assert {name: facts for name, facts in after.items() if name != path} == {
        name: facts for name, facts in before.items() if name != path
    }


def test_rehash_finds_a_change_that_left_size_and_time_alone(index: Index, home: Path, photos: Path) -> None:
    path = photos / "a/1.jpg"
    old = jpeg(99)
    new = jpeg(98)
    old, new = (data.ljust(max(len(old), len(new)), b"\0") for data in (old, new))
    path.write_bytes(old)
    status = path.stat()
    index(photos)
    before = images_of(home)[str(path)]
    path.write_bytes(new)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert counts(index(photos)) == {"skipped": 6}
    assert counts(index(photos, rehash=True)) == {"updated": 1, "skipped": 5}
    assert images_of(home)[str(path)]["cls"] != before["cls"]


# --- moved and copied files


@pytest.mark.parametrize("new", ["a/renamed.jpg", "c/d/1.jpg", "1.jpg"])
def test_a_moved_file_keeps_its_id_and_vector(index: Index, home: Path, photos: Path, new: str) -> None:
    index(photos)
    ids, before = ids_of(home), images_of(home)
    (photos / new).parent.mkdir(parents=True, exist_ok=True)
    (photos / "a/1.jpg").rename(photos / new)
    assert counts(index(photos)) == {"updated": 1, "moved": 1, "skipped": 5}
    assert ids_of(home)[str(photos / new)] == ids[str(photos / "a/1.jpg")]
    assert str(photos / "a/1.jpg") not in ids_of(home)
    assert images_of(home)[str(photos / new)] == before[str(photos / "a/1.jpg")]
    assert counts(index(photos, prune=True)) == {"skipped": 6}


def test_a_file_moved_to_another_source_keeps_its_id(index: Index, home: Path, photos: Path, tmp_path: Path) -> None:
    index(photos)
    ids = ids_of(home)
    other = tmp_path / "other"
    shutil.move(photos / "b", other)
    assert counts(index(other)) == {"updated": 3, "moved": 3}
    assert {name: ids_of(home)[str(other / name)] for name in ("4.jpg", "5.jpg", "6.jpg")} == {
        name: ids[str(photos / "b" / name)] for name in ("4.jpg", "5.jpg", "6.jpg")
    }
    assert counts(index(photos, prune=True)) == {"skipped": 3}
    assert len(findable(home)) == 6


def test_two_files_that_change_places_each_get_the_others_vector(index: Index, home: Path, photos: Path) -> None:
    index(photos)
    before = images_of(home)
    one, other = photos / "a/1.jpg", photos / "b/4.jpg"
    one.rename(photos / "x")
    other.rename(one)
    (photos / "x").rename(other)
    assert counts(index(photos, rehash=True)) == {"updated": 2, "skipped": 4}
    after = images_of(home)
    assert after[str(one)]["cls"] == before[str(other)]["cls"]
    assert after[str(other)]["cls"] == before[str(one)]["cls"]


def test_of_two_copies_one_that_moves_takes_its_own_id(index: Index, home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    write_pictures(folder, "one.jpg")
    shutil.copy(folder / "one.jpg", folder / "two.jpg")
    index(folder)
    ids = ids_of(home)
    (folder / "two.jpg").rename(folder / "three.jpg")
    assert counts(index(folder)) == {"updated": 1, "moved": 1, "skipped": 1}
    assert ids_of(home) == {str(folder / "one.jpg"): ids[str(folder / "one.jpg")],
                            str(folder / "three.jpg"): ids[str(folder / "two.jpg")]}  # fmt: skip


def test_the_same_bytes_are_embedded_once(
    index: Index, home: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded: list[int] = []
    embed = Backbone.embed

    def counting(self: Backbone, pixels_BHWC: Any) -> Any:
        embedded.append(len(pixels_BHWC))
        return embed(self, pixels_BHWC)

    monkeypatch.setattr(Backbone, "embed", counting)
    for number in range(4):
        shutil.copy(photos / "a/1.jpg", photos / f"b/copy-{number}.jpg")
    assert counts(index(photos)) == {"added": 10}
    shutil.copy(photos / "a/2.jpg", photos / "later.jpg")
    assert counts(index(photos)) == {"added": 1, "skipped": 10}
    assert sum(embedded) == 6
    assert count_rows(home, EmbeddingRow) == 2 * 6
    assert len(findable(home)) == 11


def test_two_collections_share_embeddings_and_nothing_else(
    index: Index, home: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index(photos)
    monkeypatch.setattr(Backbone, "embed", pytest.fail)
    assert counts(index(photos / "a", collection="second")) == {"added": 3}
    assert count_rows(home, EmbeddingRow) == 2 * 6
    assert findable(home, "second") == {str(photos / f"a/{number}.jpg") for number in (1, 2, 3)}
    (photos / "a/1.jpg").unlink()
    index(photos / "a", collection="second", prune=True, prune_any=True)
    assert len(findable(home, "second")) == 2
    assert len(findable(home)) == 6


# --- roots


def test_a_parent_after_its_child_adds_each_file_once(index: Index, home: Path, photos: Path) -> None:
    assert counts(index(photos / "a")) == {"added": 3}
    ids = ids_of(home)
    assert counts(index(photos)) == {"added": 3, "skipped": 3}
    assert ids.items() < ids_of(home).items()
    assert len(ids_of(home)) == 6


def test_a_child_after_its_parent_adds_nothing(index: Index, home: Path, photos: Path) -> None:
    index(photos)
    assert counts(index(photos / "a")) == {"skipped": 3}
    assert counts(index(photos / "b" / "4.jpg")) == {"skipped": 1}
    assert len(ids_of(home)) == 6


def test_roots_given_together_overlap_without_harm(index: Index, home: Path, photos: Path) -> None:
    assert counts(index(photos / "a", photos, photos / "b/4.jpg", str(photos) + "/")) == {"added": 6}
    assert len(ids_of(home)) == 6


def test_a_name_that_merely_begins_like_a_root_is_not_below_it(index: Index, home: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path, "a/1.jpg", "ab/2.jpg")
    index(tmp_path / "a", tmp_path / "ab")
    shutil.rmtree(tmp_path / "ab")
    assert counts(index(tmp_path / "a", prune=True)) == {"skipped": 1}
    assert names(set(ids_of(home)), tmp_path) == {"a/1.jpg", "ab/2.jpg"}


def test_relative_roots_are_remembered_as_absolute_ones(
    index: Index, home: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos)
    index(".")
    assert counts(index(photos)) == {"skipped": 6}
    assert names(findable(home), photos) == {f"a/{i}.jpg" for i in (1, 2, 3)} | {f"b/{i}.jpg" for i in (4, 5, 6)}


def test_a_missing_path_is_refused_before_anything_is_done(index: Index, photos: Path, home: Path) -> None:
    with pytest.raises(SourceNotFound, match="missing: no such file or folder"):
        index(photos, photos / "missing")
    assert count_rows(home, CollectionRow) == 0


def test_a_folder_without_images_names_what_was_found(index: Index, home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    with pytest.raises(NoImagesFound, match="found none"):
        index(folder)
    (folder / "a.txt").write_text("text")
    (folder / "b.mp4").write_bytes(b"film")
    with pytest.raises(NoImagesFound, match=r"found 2 other files \(text, video\)"):
        index(folder)
    assert count_rows(home, CollectionRow) == 0


# --- pruning


def test_vanished_files_stay_until_they_are_pruned(index: Index, home: Path, photos: Path) -> None:
    index(photos)
    (photos / "a/1.jpg").unlink()
    assert counts(index(photos)) == {"skipped": 5}
    assert len(findable(home)) == 6
    assert counts(index(photos, prune=True)) == {"skipped": 5, "removed": 1}
    assert findable(home) == set(ids_of(home))
    assert len(findable(home)) == 5


def test_only_what_lies_under_the_given_paths_is_pruned(index: Index, home: Path, photos: Path) -> None:
    index(photos)
    (photos / "a/1.jpg").unlink()
    assert counts(index(photos / "b", prune=True)) == {"skipped": 3}
    assert len(ids_of(home)) == 6


def test_pruning_more_than_a_fifth_is_refused_after_everything_else_is_done(
    index: Index, home: Path, photos: Path
) -> None:
    write_pictures(photos, *(f"c/{number}.jpg" for number in range(4)), seed=20)
    index(photos)
    for number in range(2):
        (photos / f"c/{number}.jpg").unlink()
    assert counts(index(photos, prune=True)) == {"skipped": 8, "removed": 2}  # exactly a fifth
    for name in ("a/1.jpg", "a/2.jpg"):
        (photos / name).unlink()
    write_pictures(photos, "new.jpg", seed=40)
    with pytest.raises(PruneRefused, match=r"refused to drop 2 of 9 images .* more than 20%.* --prune --yes"):
        index(photos, prune=True)
    assert len(findable(home)) == 9
    assert counts(index(photos, prune=True, prune_any=True)) == {"skipped": 7, "removed": 2}
    assert len(findable(home)) == 7


def test_an_empty_root_is_taken_for_a_disk_that_is_not_mounted(index: Index, home: Path, photos: Path) -> None:
    write_pictures(photos, *(f"many/{number}.jpg" for number in range(20)), seed=20)
    index(photos, photos / "a")
    shutil.rmtree(photos / "a")
    (photos / "a").mkdir()
    with pytest.raises(PruneRefused, match="a is empty"):
        index(photos, photos / "a", prune=True)
    with pytest.raises(PruneRefused, match="a is empty"):
        index(photos / "a", prune=True)
    assert counts(index(photos / "a", prune=True, prune_any=True)) == {"removed": 3}
    assert len(findable(home)) == 23


def test_a_missing_root_is_pruned_only_when_told_so(index: Index, home: Path, photos: Path) -> None:
    index(photos)
    shutil.rmtree(photos / "a")
    with pytest.raises(SourceNotFound):
        index(photos / "a", photos / "b", prune=True)
    assert len(ids_of(home)) == 6
    assert counts(index(photos / "a", photos / "b", prune=True, prune_any=True)) == {"skipped": 3, "removed": 3}
    with pytest.raises(SourceNotFound):  # nothing of it is known: more likely a slip of the pen
        index(photos / "a", photos / "b", prune=True, prune_any=True)
    assert len(findable(home)) == 3


def test_excluded_files_are_not_pruned(index: Index, home: Path, photos: Path) -> None:
    index(photos)
    summary = index(photos, exclude=["a"], prune=True)
    assert counts(summary) == {"skipped": 3}
    assert len(findable(home)) == 6


def refuse_listing(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """As for an unprivileged user before a closed folder: it cannot be listed, and nothing in it is there."""
    scandir, lexists = os.scandir, os.path.lexists

    def guarded_scandir(path: Any = ".") -> Any:
        if str(path) == str(folder):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded_scandir)
    monkeypatch.setattr(os.path, "lexists", lambda path: not str(path).startswith(f"{folder}/") and lexists(path))


def test_what_lies_in_a_folder_that_cannot_be_listed_is_not_pruned(
    index: Index, home: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index(photos)
    refuse_listing(monkeypatch, photos / "a")
    assert counts(index(photos, prune=True, prune_any=True)) == {"skipped": 3, "failed": 1}
    assert len(findable(home)) == 6
    assert images_of(home)[str(photos / "a")]["error_code"] == "permission"


def test_a_folder_that_can_be_listed_again_leaves_the_ledger(
    index: Index, home: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        refuse_listing(patch, photos / "a")
        assert counts(index(photos)) == {"added": 3, "failed": 1}
    summary = index(photos)
    assert (summary.added, summary.failed) == (3, 0)
    assert {facts["status"] for facts in images_of(home).values()} == {"ok"}


# --- the ledger


def test_every_good_file_is_indexed_and_every_bad_one_is_in_the_ledger(
    index: Index, home: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    reasons, sizes = make_bad_files(folder), make_good_files(folder)
    (folder / "film.mp4").write_bytes(b"no image")
    summary = index(folder)
    assert (summary.added, summary.failed, summary.ignored) == (len(sizes), len(reasons), 1)
    assert len(reasons) > 40
    images = {os.path.basename(path): facts for path, facts in images_of(home).items()}
    assert {name: facts["error_code"] for name, facts in images.items() if facts["status"] == "failed"} == reasons
    good = {name: (facts["width"], facts["height"]) for name, facts in images.items() if facts["status"] == "ok"}
    assert good == sizes
    assert names(findable(home), folder) == set(sizes)
    again = index(folder)
    assert (again.added, again.skipped, again.failed) == (0, len(sizes), len(reasons))


def test_a_failed_file_that_is_put_right_becomes_an_image(index: Index, home: Path, photos: Path) -> None:
    path = photos / "a/1.jpg"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert counts(index(photos)) == {"added": 5, "failed": 1}
    image_id = ids_of(home)[str(path)]
    assert counts(index(photos)) == {"skipped": 5, "failed": 1}
    path.write_bytes(whole)
    assert counts(index(photos)) == {"updated": 1, "skipped": 5}
    assert ids_of(home)[str(path)] == image_id
    assert str(path) in findable(home)
    assert images_of(home)[str(path)]["error_code"] is None


def test_an_image_that_is_damaged_later_leaves_search(index: Index, home: Path, photos: Path) -> None:
    index(photos)
    path = photos / "a/1.jpg"
    path.write_bytes(b"no picture any more")
    assert counts(index(photos)) == {"failed": 1, "skipped": 5}
    assert str(path) not in findable(home)
    assert len(findable(home)) == 5
    facts = images_of(home)[str(path)]
    assert (facts["status"], facts["error_code"], facts["sha256"]) == ("failed", "not_an_image", None)


def test_a_failed_file_that_is_gone_leaves_the_ledger(index: Index, home: Path, photos: Path) -> None:
    (photos / "bad.jpg").write_bytes(b"bad")
    index(photos)
    (photos / "bad.jpg").unlink()
    assert counts(index(photos)) == {"skipped": 6, "removed": 1}
    assert len(ids_of(home)) == 6


@posix_only
def test_a_broken_link_that_leads_somewhere_again_becomes_an_image(index: Index, home: Path, photos: Path) -> None:
    (photos / "link.jpg").symlink_to(photos.parent / "target.jpg")
    assert counts(index(photos)) == {"added": 6, "failed": 1}
    write_pictures(photos.parent, "target.jpg", seed=70)
    assert counts(index(photos)) == {"updated": 1, "skipped": 6}
    assert str(photos / "link.jpg") in findable(home)


def test_a_file_that_vanishes_before_it_is_read_stops_nothing(index: Index, home: Path, photos: Path) -> None:
    index(photos / "a")
    (photos / "a/1.jpg").write_bytes(jpeg(77))

    def delete(progress: Progress) -> None:
        if not progress.done:
            (photos / "a/1.jpg").unlink()
            (photos / "b/4.jpg").unlink()

    summary = index(photos, on_progress=delete)
    assert (summary.added, summary.images) == (2, 5)
    # The one that was known stays as it was until it is pruned; the other was never seen.
    assert str(photos / "a/1.jpg") in findable(home)
    assert str(photos / "b/4.jpg") not in findable(home)
    index(photos)
    assert str(photos / "b/4.jpg") not in ids_of(home)


# --- labels


def labels_of(home: Path, root: Path) -> dict[str, str | None]:
    return {os.path.relpath(path, root): facts["label"] for path, facts in images_of(home).items()}


def test_labels_come_from_the_first_folder_below_the_given_path(index: Index, home: Path, photos: Path) -> None:
    write_pictures(photos, "a/deep/er/7.jpg", "loose.jpg", seed=30)
    index(photos, labels="folders")
    expected = {f"a/{i}.jpg": "a" for i in (1, 2, 3)} | {f"b/{i}.jpg": "b" for i in (4, 5, 6)}
    assert labels_of(home, photos) == expected | {"a/deep/er/7.jpg": "a", "loose.jpg": None}


def test_a_folder_without_folders_is_one_class(index: Index, home: Path, photos: Path) -> None:
    index(photos / "a", labels="folders")
    assert set(labels_of(home, photos).values()) == {"a"}


@posix_only
def test_a_folder_whose_name_is_not_utf_8_is_a_class_too(index: Index, home: Path, tmp_path: Path) -> None:
    try:
        write_pictures(tmp_path / "photos", "caf\udce9/1.jpg", "bar/2.jpg")
    except OSError:
        pytest.skip("this file system refuses the name")
    index(tmp_path / "photos", labels="folders")
    assert set(labels_of(home, tmp_path).values()) == {r"caf\xe9", "bar"}


def write_labels(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_labels_come_from_a_csv_file(index: Index, home: Path, photos: Path, tmp_path: Path) -> None:
    labels = write_labels(
        tmp_path / "labels.csv", "label,path,more", "cat,a/1.jpg,x", f'"big, dog",{photos / "b/4.jpg"},', "cow,no.jpg,"
    )
    summary = index(photos, labels=labels)
    assert labels_of(home, photos) == {"a/1.jpg": "cat", "b/4.jpg": "big, dog"} | dict.fromkeys(
        ("a/2.jpg", "a/3.jpg", "b/5.jpg", "b/6.jpg")
    )
    assert summary.unmatched_labels == 1


def test_paths_in_a_csv_file_may_be_relative_to_it(index: Index, home: Path, photos: Path) -> None:
    labels = write_labels(photos / "labels.csv", "\ufeffpath,label", "a/1.jpg,cat", "./b/../b/4.jpg,dog")
    index(photos / "a", photos / "b", labels=labels)
    found = labels_of(home, photos)
    assert (found["a/1.jpg"], found["b/4.jpg"], found["a/2.jpg"]) == ("cat", "dog", None)


def test_relabelling_unchanged_images_counts_as_updating(index: Index, home: Path, photos: Path) -> None:
    index(photos)
    before = images_of(home)
    assert counts(index(photos, labels="folders")) == {"updated": 6}
    assert counts(index(photos, labels="folders")) == {"skipped": 6}
    labels = write_labels(photos / "labels.csv", "path,label", "a/1.jpg,cat")
    assert counts(index(photos, labels=labels)) == {"updated": 1, "skipped": 5, "ignored": 1}
    after = images_of(home)
    assert labels_of(home, photos)["a/1.jpg"] == "cat"
    assert labels_of(home, photos)["a/2.jpg"] == "a"
    assert all(after[path]["cls"] == facts["cls"] for path, facts in before.items())


def test_a_run_without_labels_keeps_those_that_are_there(index: Index, home: Path, photos: Path) -> None:
    index(photos, labels="folders")
    before = labels_of(home, photos)
    touch_later(photos / "a/1.jpg")
    (photos / "a/2.jpg").write_bytes(jpeg(60))
    index(photos)
    assert labels_of(home, photos) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"file,class\n1.jpg,cat\n", r"must have the columns path and label .* found file, class"),
        (b"", "found nothing"),
        (b"path,label\n1.jpg\n", "line 2: expected a path and a label"),
        (b"path,label\n,cat\n", "line 2: expected a path and a label"),
        (b"path,label\n1.jpg,caf\xe9\n", "line 2: .*UTF-8"),
        ("path,label\n1.jpg,cat\n".encode("utf-16"), "must have the columns path and label"),
        (None, "cannot be read"),
    ],
)
def test_a_label_file_that_cannot_be_used_stops_the_run_before_it_starts(
    index: Index, home: Path, photos: Path, tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "labels.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LabelFileError, match=message):
        index(photos, labels=path)
    assert count_rows(home, CollectionRow) == 0


# --- interruption, and the same whichever way


@pytest.mark.parametrize("after", [1, 3])
def test_an_interrupted_run_goes_on_to_the_same_collection(
    index: Index, home: Path, photos: Path, tmp_path: Path, tiny_model: Path, after: int
) -> None:
    write_pictures(photos, *(f"more/{number}.jpg" for number in range(12)), seed=20)
    (photos / "more/bad.jpg").write_bytes(b"bad")
    embedding = EmbeddingSettings(batch_size=4, workers=2)
    asked = iter(range(1, 100))
    first = index(photos, labels="folders", embedding=embedding, should_stop=lambda: next(asked) == after)
    assert first.interrupted
    assert first.remaining == 19 - 4 * after
    assert first.images == 4 * after
    assert len(findable(home)) == 4 * after
    second = index(photos, labels="folders", embedding=embedding)
    assert not second.interrupted
    assert (second.skipped, second.images) == (first.added, 18)
    index_files(tmp_path / "other home", tiny_model, photos, labels="folders", embedding=embedding)
    assert images_of(home) == images_of(tmp_path / "other home")


def test_an_interrupted_run_prunes_nothing(index: Index, home: Path, photos: Path) -> None:
    index(photos / "a")
    (photos / "a/1.jpg").unlink()
    summary = index(
        photos, prune=True, prune_any=True, embedding=EmbeddingSettings(batch_size=1), should_stop=lambda: True
    )
    assert summary.interrupted
    assert summary.removed == 0
    assert str(photos / "a/1.jpg") in findable(home)


def test_being_asked_to_stop_after_the_last_batch_changes_nothing(index: Index, photos: Path) -> None:
    summary = index(photos, should_stop=lambda: True)
    assert (summary.interrupted, summary.remaining, summary.images) == (False, 0, 6)


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 1), (5, 3), (64, 8)])
def test_neither_batch_size_nor_workers_change_what_is_recorded(
    home: Path, tiny_model: Path, photos: Path, tmp_path: Path, batch_size: int, workers: int
) -> None:
    shutil.copy(photos / "a/1.jpg", photos / "b/copy.jpg")
    (photos / "b/bad.jpg").write_bytes(b"bad")
    index_files(home, tiny_model, photos)
    other = tmp_path / "other"
    index_files(other, tiny_model, photos, embedding=EmbeddingSettings(batch_size=batch_size, workers=workers))
    one, two = images_of(home), images_of(other)
    assert one.keys() == two.keys()
    for path, facts in one.items():
        for key, value in facts.items():
            if key in ("cls", "gem"):
                first, second = (np.frombuffer(blob, np.float16).astype(np.float32) for blob in (value, two[path][key]))
                assert first @ second > 0.999 * np.linalg.norm(first) * np.linalg.norm(second)
            else:
                assert two[path][key] == value, (path, key)


def test_progress_counts_up_to_the_files_to_read(index: Index, photos: Path) -> None:
    index(photos / "a")
    (photos / "b/bad.jpg").write_bytes(b"bad")
    seen: list[Progress] = []
    index(photos, on_progress=seen.append, embedding=EmbeddingSettings(batch_size=1))
    assert [progress.done for progress in seen] == sorted(progress.done for progress in seen)
    assert (seen[0].done, seen[0].total) == (0, 4)
    assert (seen[-1].done, seen[-1].total, seen[-1].failed) == (4, 4, 1)


# --- several runs at once


def test_two_runs_at_once_add_each_file_once(home: Path, tiny_model: Path, photos: Path) -> None:
    write_pictures(photos, *(f"more/{number}.jpg" for number in range(30)), seed=20)
    failures: list[BaseException] = []

    def run(*paths: Path) -> None:
        try:
            index_files(home, tiny_model, *paths, embedding=EmbeddingSettings(batch_size=2))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=paths) for paths in ((photos,), (photos / "more", photos / "a"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert failures == []
    assert len(ids_of(home)) == 36
    assert len(findable(home)) == 36
    assert count_rows(home, EmbeddingRow) == 2 * 36


def test_another_run_may_add_a_root_with_copies_meanwhile(index: Index, home: Path, photos: Path) -> None:
    elsewhere = photos.parent / "elsewhere"
    shutil.copytree(photos, elsewhere)

    def index_elsewhere(progress: Progress) -> None:
        if not progress.done:
            index(elsewhere)

    assert counts(index(photos, on_progress=index_elsewhere)) == {"added": 6}
    assert len(findable(home)) == 12


def test_another_run_may_remove_and_compact_meanwhile(index: Index, home: Path, photos: Path) -> None:
    known = photos.parent / "known"
    shutil.copytree(photos / "b", known)
    index(known)

    def remove_known(progress: Progress) -> None:
        if progress.done != 1:
            return
        catalog = open_catalog(home)
        with catalog.writing() as session:
            collection = find_collection(session, "default")
            remove_images(session, collection, list(ids_of(home).values())[:3])
        compact_collection(catalog, collection)
        catalog.close()

    index(photos, on_progress=remove_known, embedding=EmbeddingSettings(batch_size=1, workers=8))
    images = images_of(home)
    assert [path for path, facts in images.items() if facts["status"] == "ok" and "cls" not in facts] == []
    index(photos)
    assert {str(photos / "b" / name) for name in ("4.jpg", "5.jpg", "6.jpg")} <= findable(home)


# --- models


def test_another_model_is_refused_with_both_names(index: Index, home: Path, photos: Path, tmp_path: Path) -> None:
    index(photos)
    before = images_of(home)
    other = save_tiny_model(tmp_path / "other.safetensors", seed=1)
    write_pictures(photos, "new.jpg", seed=50)
    with pytest.raises(FingerprintMismatch) as caught:
        index(photos, model=other)
    message = str(caught.value)
    assert "tiny.safetensors" in message
    assert f"--model {other}" in message
    assert "-c NAME" in message
    assert images_of(home) == before


def test_the_same_weights_under_another_name_are_accepted_and_remembered(
    index: Index, home: Path, photos: Path, tmp_path: Path
) -> None:
    first = save_tiny_model(tmp_path / "first.safetensors")
    index(photos / "a", model=first)
    second = tmp_path / "second.safetensors"
    first.rename(second)
    assert counts(index(photos, model=second)) == {"added": 3, "skipped": 3}
    assert len(findable(home)) == 6


@pytest.mark.parametrize("problem", ["missing weights", "unknown architecture", "cut short", "no file"])
def test_a_model_that_cannot_be_used_leaves_no_collection(
    index: Index, home: Path, photos: Path, tmp_path: Path, problem: str
) -> None:
    path = tmp_path / "model.safetensors"
    if problem == "missing weights":
        save_tiny_model(path, architecture_args={"depth": 2, "embed_dim": 64, "num_heads": 1, "img_size": 32})
    elif problem == "unknown architecture":
        save_tiny_model(path, architecture="vit_gigantic")
    elif problem == "cut short":
        save_tiny_model(path)
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ModelNotFound if problem == "no file" else ModelError):
        index(photos, model=path)
    if home.exists():
        assert count_rows(home, CollectionRow) == count_rows(home, ImageRow) == 0


@pytest.mark.parametrize("name", ["", "two\nlines", "\udcff", "x" * 256])
def test_a_collection_needs_a_printable_name(index: Index, home: Path, photos: Path, name: str) -> None:
    with pytest.raises(CollectionError, match="1 to 255 printable characters"):
        index(photos, collection=name)
    assert count_rows(home, CollectionRow) == 0
