"""`dino-search duplicates` from end to end, with a model that tells only equal pictures to be equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from commands_in_process import Command
from dino_search.collection import Collection
from sample_collections import index_files, write_pictures, write_shard

SAME = ("--copy-score", "1")


@pytest.fixture
def photos(tmp_path: Path, home: Path, tiny_model: Path) -> Path:
    """Four pictures, two of them again, one file that is no picture."""
    folder = tmp_path / "photos"
    write_pictures(folder, *(f"{number}.jpg" for number in range(4)))
    (folder / "more").mkdir()
    for name in ("0.jpg", "1.jpg"):
        (folder / "more" / name).write_bytes((folder / name).read_bytes())
    (folder / "bad.jpg").write_bytes(b"no picture")
    index_files(home, tiny_model, folder)
    return folder


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_groups_are_printed_with_the_file_to_keep(photos: Path, dino_search: Command) -> None:
    ended = dino_search("duplicates", *SAME)
    assert ended.code == 0
    lines = [line.split("\t") for line in ended.out.splitlines()]
    assert [line[:2] for line in lines] == [["1", "keep"], ["1", "identical"], ["2", "keep"], ["2", "identical"]]
    assert {line[3] for line in lines} == {
        str(photos / name) for name in ("0.jpg", "1.jpg", "more/0.jpg", "more/1.jpg")
    }
    assert "2 groups among 6 images; 2 files need not be kept" in ended.err
    assert "1 files could not be read" in ended.err


def test_json_says_the_same_as_the_collection(photos: Path, dino_search: Command, home: Path) -> None:
    with Collection.open(home=home) as collection:
        expected = json.loads(json.dumps(collection.duplicates(copy_score=1.0).to_json()))
    assert dino_search("duplicates", *SAME, "--json").json() == expected
    assert [len(group["files"]) for group in expected["groups"]] == [2, 2]


def test_files_of_one_folder_can_be_ignored(photos: Path, dino_search: Command) -> None:
    (photos / "0-again.jpg").write_bytes((photos / "2.jpg").read_bytes())
    dino_search("index", photos)
    groups = dino_search("duplicates", *SAME, "--json").json()["groups"]
    fewer = dino_search("duplicates", *SAME, "--json", "--ignore-same-folder").json()["groups"]
    assert (len(groups), len(fewer)) == (3, 2)


def test_the_report_is_written_once_and_known_to_purge(photos: Path, tmp_path: Path, dino_search: Command) -> None:
    report = tmp_path / "report"
    assert dino_search("duplicates", *SAME, "--report", report).code == 0
    assert files_of(report) == {
        "groups.csv", "groups.json", "groups.html",
        "matches.csv", "matches.json", "matches.parquet", "queries.csv", "report.html",
    }  # fmt: skip
    again = dino_search("duplicates", *SAME, "--report", report)
    assert (again.code, again.out) == (1, "")
    assert "already; choose another folder or add --force" in again.err
    assert dino_search("duplicates", *SAME, "--report", report, "--force").code == 0
    purged = dino_search("remove", "--purge", photos / "0.jpg", "--json").json()
    assert purged["reports"] == sorted(str(report / name) for name in files_of(report))


def test_without_yes_nothing_is_done(photos: Path, tmp_path: Path, dino_search: Command) -> None:
    before = files_of(tmp_path)
    ended = dino_search("duplicates", *SAME, "--apply", "move", "--to", tmp_path / "out")
    assert ended.code == 0
    assert [line.split("\t")[0] for line in ended.out.splitlines()] == ["move", "move"]
    assert "nothing was done: move would take 2 files" in ended.err
    assert files_of(tmp_path) == before


def test_moved_files_go_from_the_collection_with_the_next_prune_and_come_back(
    photos: Path, tmp_path: Path, dino_search: Command
) -> None:
    before = files_of(photos)
    ended = dino_search("duplicates", *SAME, "--apply", "move", "--to", tmp_path / "out", "--yes", "--json")
    applied = ended.json()
    assert len(applied["done"]) == 2
    assert len(files_of(tmp_path / "out")) == 2
    assert "until the next: dino-search index FOLDER --prune" in ended.err
    assert dino_search("index", photos, "--prune", "--yes", "--json").json()["removed"] == 2
    assert dino_search("duplicates", *SAME).out == ""
    undone = dino_search("duplicates", "--undo", applied["log"])
    assert (undone.code, files_of(photos)) == (0, before)
    assert "2 files put back" in undone.err


def test_linked_files_stay_indexed(photos: Path, dino_search: Command) -> None:
    assert dino_search("duplicates", *SAME, "--apply", "hardlink", "--yes").code == 0
    assert (photos / "0.jpg").samefile(photos / "more" / "0.jpg")
    ended = dino_search("index", photos, "--json").json()
    assert (ended["added"], ended["images"]) == (0, 6)
    again = dino_search("duplicates", *SAME, "--apply", "hardlink", "--yes")
    assert again.out.count("shares its bytes with the kept file already") == 2


def test_an_undo_that_cannot_put_all_back_exits_1(photos: Path, tmp_path: Path, dino_search: Command) -> None:
    log = tmp_path / "log.jsonl"
    dino_search("duplicates", *SAME, "--apply", "move", "--to", tmp_path / "out", "--yes", "--log", log)
    moved = next(path for path in (tmp_path / "out").rglob("*.jpg"))
    moved.unlink()
    ended = dino_search("duplicates", "--undo", log, "--json")
    assert ended.code == 1
    assert (len(ended.json()["restored"]), len(ended.json()["failed"])) == (1, 1)


def test_moving_into_an_indexed_folder_is_remarked(photos: Path, dino_search: Command) -> None:
    ended = dino_search("duplicates", *SAME, "--apply", "move", "--to", photos / "out", "--yes")
    assert "the next index of that folder adds what is moved there again" in ended.err


def test_images_of_a_shard_are_reported_and_left(
    tmp_path: Path, home: Path, tiny_model: Path, dino_search: Command
) -> None:
    (picture,) = write_pictures(tmp_path, "photos/a.jpg")
    shard = write_shard(tmp_path / "s.tar", {"b.jpg": picture.read_bytes()})
    index_files(home, tiny_model, picture.parent, shard)
    before = shard.read_bytes()
    for keep in ("oldest", "newest"):
        ended = dino_search(
            "duplicates", *SAME, "--keep", keep, "--apply", "move", "--to", tmp_path / "out", "--yes", "--json"
        )
        assert ended.json()["done"] == []
        assert "is inside a tar shard" in ended.json()["skipped"][0]["reason"]
    assert shard.read_bytes() == before
    assert picture.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--group", "cliques"], "expected one of components, star, complete, found 'cliques'"),
        (["--keep", "best"], "expected one of resolution, size"),
        (["--copy-score", "1.5"], "expected more than 0 and at most 1"),
        (["--apply", "delete"], "expected one of move, trash, hardlink, found 'delete'"),
        (["--apply", "move"], "--apply move needs --to DIR"),
        (["--apply", "trash", "--to", "x"], "--apply move needs --to DIR"),
        (["--yes"], "--yes belongs to --apply"),
    ],
)
def test_wrong_options_are_wrong_usage(dino_search: Command, options: list[Any], message: str) -> None:
    ended = dino_search("duplicates", *options)
    assert ended.code == 2
    assert message in " ".join(ended.err.replace("│", " ").split())


def test_a_collection_of_one_image_and_an_unknown_one(
    tmp_path: Path, home: Path, tiny_model: Path, dino_search: Command
) -> None:
    assert "nothing has been indexed yet" in dino_search("duplicates").err
    write_pictures(tmp_path / "photos", "a.jpg")
    index_files(home, tiny_model, tmp_path / "photos")
    ended = dino_search("duplicates", "--report", tmp_path / "report")
    assert (ended.code, ended.out) == (0, "")
    assert "0 groups among 1 images" in ended.err
    assert dino_search("duplicates", "-c", "other").code == 1
