"""`export`, `import` and `remove --purge` as people run them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from commands_in_process import Command
from dino_search import Collection
from dino_search.copy_report import FILES
from sample_collections import count_rows, ids_of, images_of
from small_disks import mounted


@pytest.fixture
def filled(dino_search: Command, photos: Path, tiny_model: Path) -> Path:
    """The folder of pictures and a broken one, indexed with labels."""
    (photos / "bad.jpg").write_bytes(b"bad")
    assert dino_search("index", photos, "--model", tiny_model, "--labels", "folders").code == 0
    return photos


def test_export_and_import_answer_people_and_programs(
    dino_search: Command, filled: Path, home: Path, tmp_path: Path
) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    ended = dino_search("export", out)
    assert ended.code == 0
    assert ended.out.startswith(f"8 images and 1 failed files of 'default' in {out}\n")
    values = dino_search("export", out, "--force", "--json").json()
    assert {key: values[key] for key in ("collection", "images", "failed", "parts")} == {
        "collection": "default", "images": 8, "failed": 1, "parts": 1,
    }  # fmt: skip
    written = [path for path in out.rglob("*") if path.is_file() and path.name != "export.json"]
    assert values["bytes"] == sum(path.stat().st_size for path in written)
    ended = dino_search("import", out, "-c", "back", "--home", other)
    assert ended.out == "9 added, 0 updated, 0 unchanged, 1 of them failed\n8 images in collection 'back'\n"
    assert images_of(other, "back") == images_of(home)
    again = dino_search("import", out, "-c", "back", "--home", other, "--json").json()
    assert again == {
        "collection": "back", "added": 0, "updated": 0, "skipped": 9, "failed": 1, "images": 8, "ids": "new",
    }  # fmt: skip


def test_searches_in_an_imported_collection_answer_the_same(
    dino_search: Command, filled: Path, home: Path, tmp_path: Path
) -> None:
    dino_search("export", tmp_path / "out")
    dino_search("import", tmp_path / "out", "--home", tmp_path / "other")
    query = filled / "cat" / "0.jpg"
    here, there = (
        dino_search("search", query, "--home", place, "--json").json() for place in (home, tmp_path / "other")
    )
    assert here == there


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("export", "photos"), 1, "not touched"),
        (("export", "out", "--format", "csv"), 2, "--format"),
        (("export", "out", "-c", "none"), 1, "no collection 'none'"),
        (("import", "photos"), 1, "expected export.json"),
        (("import", "nowhere"), 1, "found no folder"),
        (("remove",), 2, "at least one"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(
    dino_search: Command, filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...], code: int, message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    ended = dino_search(*arguments)
    assert ended.code == code
    assert message in ended.err
    assert code == 2 or ended.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_refused_import_makes_no_home(dino_search: Command, photos: Path, home: Path) -> None:
    assert dino_search("import", photos).code == 1
    assert not home.exists()


def test_purge_lists_the_contact_sheet_that_shows_the_image(
    dino_search: Command, filled: Path, home: Path, tmp_path: Path
) -> None:
    sheet, other_sheet = tmp_path / "sheet.html", tmp_path / "other.html"
    dino_search("search", filled / "cat" / "0.jpg", "-k", "1", "--html", sheet)
    dino_search("search", filled / "dog" / "3.jpg", "-k", "1", "--html", other_sheet)
    dino_search("export", tmp_path / "out")
    ended = dino_search("remove", "--purge", filled / "cat" / "0.jpg", "--json")
    assert ended.code == 0
    assert ended.json() == {
        "collection": "default", "images": 1, "vectors": 2, "snapshots": 0, "verdicts": 0, "whitenings": 0,
        "uploads": 0, "shared": [], "reports": sorted([str(sheet), str(tmp_path / "out")]), "backups": [],
        "problems": [],
    }  # fmt: skip
    assert str(filled / "cat" / "0.jpg") not in ids_of(home)
    assert sheet.exists()
    ended = dino_search("remove", "--purge", filled / "dog")
    assert ended.out.splitlines()[0] == "4 images purged from 'default', with 8 vectors"
    assert f"report\t{other_sheet}" in ended.out.splitlines()


def test_purge_without_path_cleans_up(dino_search: Command, filled: Path, home: Path) -> None:
    assert dino_search("remove", filled / "cat", "--json").json() == {"collection": "default", "images": 4}
    ended = dino_search("remove", "--purge")
    assert (ended.code, ended.out) == (0, "0 images purged from 'default', with 8 vectors\n")


def test_python_has_the_same(filled: Path, home: Path, tmp_path: Path) -> None:
    with Collection.open() as collection:
        assert collection.export(tmp_path / "out").images == 8
        assert collection.purge([filled / "cat"]).images == 4
    with Collection.open("back") as collection:
        assert collection.import_from(tmp_path / "out").images == 8
        assert len(collection.search(filled / "cat" / "0.jpg", k=9).results) == 8


@pytest.mark.mounts
def test_search_writes_a_page_although_the_home_is_read_only(
    dino_search: Command, filled: Path, home: Path, tmp_path: Path
) -> None:
    import shutil
    import subprocess

    with mounted(tmp_path / "disk", "20m") as disk:
        shutil.copytree(home, disk / "home")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        page = tmp_path / "page.html"
        ended = dino_search("search", filled / "cat" / "0.jpg", "--home", disk / "home", "--html", page)
    assert ended.code == 0
    assert page.exists()
    assert "remove --purge will not know" in ended.err


def test_demo_is_known_to_purge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dino_index.catalog import ReportRow
    from dino_search import demonstration

    monkeypatch.setattr(demonstration, "PHOTOGRAPHS", ("coins",))
    with Collection.open("demo", home=tmp_path / "home") as collection:
        demonstration.run_demonstration(tmp_path / "demo", collection)
        assert count_rows(tmp_path / "home", ReportRow) == 6
        report = collection.purge([tmp_path / "demo" / "photos"])
    expected = {"contact-sheet.html", *(f"copies/{name}" for name in FILES)}
    assert report.reports == sorted(os.path.join(tmp_path, "demo", name) for name in expected - {"copies/queries.csv"})
