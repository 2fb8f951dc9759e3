from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from databases import open_catalog
from dino_index.catalog import SourceRow
from dino_index.catalog.portable_paths import encode_path
from dino_index.errors import CollectionNotFound, RelocationRefused, SourceNotFound
from dino_index.indexing import IndexSummary
from dino_index.relocation import Relocation, relocate
from sample_collections import findable, ids_of, images_of, index_files, jpeg, write_pictures, write_shard

Index = Callable[..., IndexSummary]


@pytest.fixture
def index(home: Path, tiny_model: Path) -> Index:
    def run(*paths: str | Path, **options: Any) -> IndexSummary:
        return index_files(home, tiny_model, *paths, **options)

    return run


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "photos"
    write_pictures(folder, "a/1.jpg", "a/2.jpg", "b/3.jpg", "b/4.jpg", "5.jpg")
    return folder


def moved(home: Path, old: str | Path, new: str | Path, **options: Any) -> Relocation:
    catalog = open_catalog(home)
    try:
        return relocate(catalog, str(old), new, **options)
    finally:
        catalog.close()


def sources(home: Path) -> set[str]:
    catalog = open_catalog(home)
    with catalog.reading() as session:
        found = set(session.scalars(select(SourceRow.path)))
    catalog.close()
    return found


def assert_all_unchanged(summary: IndexSummary, num_images: int) -> None:
    assert (summary.skipped, summary.added, summary.updated, summary.moved) == (num_images, 0, 0, 0)


def test_a_moved_root_is_followed_and_nothing_is_embedded_again(
    index: Index, home: Path, photos: Path, tmp_path: Path
) -> None:
    index(photos)
    ids, before = ids_of(home), images_of(home)
    new = tmp_path / "elsewhere" / "pictures"
    new.parent.mkdir()
    shutil.move(photos, new)
    done = moved(home, photos, new)
    assert (done.images, done.checked, done.missing, done.changed) == (5, 5, 0, 0)
    assert done.collections == ["default"]
    assert ids_of(home) == {path.replace(str(photos), str(new)): image_id for path, image_id in ids.items()}
    assert images_of(home) == {path.replace(str(photos), str(new)): facts for path, facts in before.items()}
    assert findable(home) == set(ids_of(home))
    assert sources(home) == {str(new)}
    assert_all_unchanged(index(new, prune=True), 5)


def test_a_folder_above_several_sources_moves_them_all(index: Index, home: Path, photos: Path, tmp_path: Path) -> None:
    index(photos / "a")
    index(photos / "b", photos / "5.jpg")
    new = tmp_path / "new"
    shutil.move(tmp_path / "data", new)
    assert moved(home, tmp_path / "data", new).images == 5
    assert_all_unchanged(index(new), 5)


def test_a_folder_inside_a_source_gets_a_source_of_its_own(
    index: Index, home: Path, photos: Path, tmp_path: Path
) -> None:
    index(photos)
    ids = ids_of(home)
    new = tmp_path / "apart"
    shutil.move(photos / "a", new)
    assert moved(home, photos / "a", new).images == 2
    assert sources(home) == {str(photos), str(new)}
    assert ids_of(home)[str(new / "1.jpg")] == ids[str(photos / "a/1.jpg")]
    assert_all_unchanged(index(new), 2)
    assert_all_unchanged(index(photos, prune=True), 3)


def test_a_folder_that_moved_within_its_source_stays_in_it(index: Index, home: Path, photos: Path) -> None:
    index(photos)
    (photos / "a").rename(photos / "c")
    assert moved(home, photos / "a", photos / "c").images == 2
    assert sources(home) == {str(photos)}
    assert_all_unchanged(index(photos, prune=True), 5)


def test_a_folder_that_moved_below_itself(index: Index, home: Path, photos: Path, tmp_path: Path) -> None:
    write_pictures(photos, "a/a/1.jpg", "a/a/a/1.jpg", seed=30)
    index(photos)
    index(photos / "a")
    (photos / "a").rename(tmp_path / "aside")
    (photos / "a").mkdir()
    (tmp_path / "aside").rename(photos / "a/a")
    before = images_of(home)
    assert moved(home, photos / "a", photos / "a/a").images == 4
    after = images_of(home)
    assert after == {path.replace("/photos/a/", "/photos/a/a/"): facts for path, facts in before.items()}
    assert_all_unchanged(index(photos), 7)


def test_sources_above_and_below_the_new_place_keep_to_the_nearest_one(
    index: Index, home: Path, photos: Path, tmp_path: Path
) -> None:
    mount = tmp_path / "mount"
    write_pictures(mount, "photos/other.jpg", "photos/b/other.jpg", "x.jpg", seed=40)
    index(mount / "photos/b")
    index(mount)
    index(photos)
    shutil.copytree(photos, mount / "photos", dirs_exist_ok=True)
    shutil.rmtree(photos)
    assert moved(home, photos, mount / "photos").images == 5
    assert_all_unchanged(index(mount, prune=True), 8)
    assert_all_unchanged(index(mount / "photos"), 7)


def test_a_drive_of_windows_is_followed_to_a_mount(index: Index, home: Path, photos: Path, tmp_path: Path) -> None:
    index(photos)
    catalog = open_catalog(home)
    with catalog.writing() as session:
        session.execute(update(SourceRow).values(path=encode_path("D:\\Data\\photos")))
    catalog.close()
    with pytest.raises(SourceNotFound, match="found none"):
        moved(home, "D:\\Data\\pho", photos)
    shutil.move(photos / "a", tmp_path / "A")
    assert moved(home, "d:/data/photos/A", tmp_path / "A").images == 2
    assert moved(home, "D:\\", photos.parent.parent, unchecked=True).missing == 3
    assert sources(home) == {str(tmp_path / "Data/photos"), str(tmp_path / "A")}
    assert moved(home, tmp_path / "Data/photos", photos).missing == 0
    assert_all_unchanged(index(photos, tmp_path / "A"), 5)


def test_a_renamed_shard_and_one_below_a_url(index: Index, home: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    shard = write_shard(tmp_path / "s.tar", {"1.jpg": jpeg(1), "x/2.jpg": jpeg(2)})
    index(shard)
    new = shard.rename(tmp_path / "new" / "t.tar")
    assert moved(home, shard, new).images == 2
    assert_all_unchanged(index(new), 2)
    with pytest.raises(RelocationRefused, match="2 are missing"):
        moved(home, tmp_path / "new", "memory://nowhere")
    moved(home, tmp_path / "new", "memory://bucket/new", unchecked=True)
    assert set(ids_of(home)) == {"memory://bucket/new/t.tar/1.jpg", "memory://bucket/new/t.tar/x/2.jpg"}
    moved(home, "memory://bucket", tmp_path)
    assert_all_unchanged(index(new), 2)


def test_missing_files_and_other_sizes_are_refused_with_numbers(
    index: Index, home: Path, photos: Path, tmp_path: Path
) -> None:
    index(photos)
    before = ids_of(home)
    new = tmp_path / "new"
    shutil.copytree(photos, new)
    (new / "a/1.jpg").unlink()
    (new / "a/2.jpg").write_bytes(b"?")
    with pytest.raises(RelocationRefused, match=r"of 5 .* 1 are missing and 1 have another size, such as .*--yes"):
        moved(home, photos, new)
    assert ids_of(home) == before
    done = moved(home, photos, new, unchecked=True)
    assert (done.missing, done.changed) == (1, 1)
    assert findable(home) == {path.replace(str(photos), str(new)) for path in before}


def test_images_known_at_both_places_are_refused(index: Index, home: Path, photos: Path, tmp_path: Path) -> None:
    index(photos)
    new = tmp_path / "new"
    shutil.copytree(photos / "a", new / "a")
    index(new)
    before = ids_of(home)
    with pytest.raises(RelocationRefused, match=r"knows 2 of the images .* dino-search remove"):
        moved(home, photos, new, unchecked=True)
    assert ids_of(home) == before


def test_all_collections_or_the_one_named(index: Index, home: Path, photos: Path, tmp_path: Path) -> None:
    index(photos)
    index(photos / "a", collection="second")
    new = tmp_path / "new"
    shutil.copytree(photos, new)
    done = moved(home, photos, new, collection="second")
    assert (done.images, done.collections) == (2, ["second"])
    assert set(ids_of(home, "second")) == {str(new / "a/1.jpg"), str(new / "a/2.jpg")}
    assert all(path.startswith(str(photos)) for path in ids_of(home))
    assert moved(home, photos, new).collections == ["default"]
    with pytest.raises(SourceNotFound, match="expected images of any collection"):
        moved(home, photos, new)
    with pytest.raises(CollectionNotFound):
        moved(home, new, photos, collection="third")


def test_failed_entries_move_along_and_are_not_looked_for(
    index: Index, home: Path, photos: Path, tmp_path: Path
) -> None:
    (photos / "bad.jpg").write_bytes(b"bad")
    index(photos)
    (photos / "bad.jpg").unlink()
    new = tmp_path / "new"
    shutil.move(photos, new)
    done = moved(home, photos, new)
    assert (done.images, done.checked) == (6, 5)
    assert images_of(home)[str(new / "bad.jpg")]["status"] == "failed"
