from __future__ import annotations

import csv
import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import dino_search.duplicate_report as reports
from dino_index.catalog.portable_paths import encode_path
from dino_index.errors import OutputExists, OutputUnwritable
from dino_search.duplicate_report import COLUMNS, FILE_NAMES, write_duplicate_report
from dino_search.duplicate_results import Duplicate, DuplicateGroup, Duplicates
from page_text import Page
from requirements import require
from sample_collections import write_pictures

NASTY = ['"><script>alert(1)<x>.jpg', "' onerror='alert(1).jpg", "&lt;b&gt;.jpg", "{{ 7*7 }}.jpg", 'a\n"b",\r\nc.jpg']


def group_of(*paths: Path, number: int = 1, **changed: Any) -> DuplicateGroup:
    files = [
        Duplicate(
            path=encode_path(str(path)), image_id=place, keep=place == 0, score=1 - place / 10, identical=place == 1,
            direct=place != 2,
            width=40, height=30, size=1500, mtime_ns=1, sha256="ab", relative_path=path.name,
        )
        for place, path in enumerate(paths)
    ]  # fmt: skip
    facts: dict[str, Any] = {"group": number, "min_score": 0.8, "all_compared": True, "chained": False, "files": files}
    return DuplicateGroup(**(facts | changed))


def found(*groups: DuplicateGroup, **changed: Any) -> Duplicates:
    facts: dict[str, Any] = {"collection": "default", "model": "m", "images": 9, "failed": 0, "linkage": "components",
                             "keep": "resolution", "groups": list(groups)}  # fmt: skip
    return Duplicates(**(facts | changed))


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "groups.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_report_lists_each_file_of_each_group(tmp_path: Path) -> None:
    paths = write_pictures(tmp_path, "a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg")
    groups = group_of(*paths[:3]), group_of(*paths[3:], number=2, chained=True, min_score=0.25)
    written = write_duplicate_report(tmp_path / "report", found(*groups, failed=2, remarks=["A remark."]))
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == sorted(FILE_NAMES)
    assert [path.name for path in written] == list(FILE_NAMES)
    table = rows(tmp_path / "report")
    assert tuple(table[0]) == COLUMNS
    assert [(row["group"], Path(row["path"]).name, row["keep"], row["identical"]) for row in table] == [
        ("1", "a.jpg", "true", "false"), ("1", "b.jpg", "false", "true"), ("1", "c.jpg", "false", "false"),
        ("2", "d.jpg", "true", "false"), ("2", "e.jpg", "false", "true"),
    ]  # fmt: skip
    assert [row["min_score"] for row in table] == ["0.800000"] * 3 + ["0.250000"] * 2
    assert (
        json.loads((tmp_path / "report" / "groups.json").read_text("utf-8"))
        == found(*groups, failed=2, remarks=["A remark."]).to_json()
    )
    page = Page(tmp_path / "report" / "groups.html")
    assert len(page.pictures()) == 5
    assert page.text.count("keep") == 2
    assert "chained" in page.text
    assert page.text.count("over others") == 1
    assert "A remark." in page.text
    assert "2 files could not be read" in page.text


@pytest.mark.skipif(os.name != "posix", reason="other systems refuse such names")
@pytest.mark.parametrize("name", NASTY)
def test_names_are_text_and_never_markup_or_rows(tmp_path: Path, name: str) -> None:
    nasty, plain = write_pictures(tmp_path, name, "plain.jpg")
    write_duplicate_report(tmp_path / "report", found(group_of(nasty, plain)))
    assert [row["path"] for row in rows(tmp_path / "report")] == [str(nasty), str(plain)]
    page = Page(tmp_path / "report" / "groups.html")
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert [set(attributes) for attributes in images] == [{"src", "alt"}] * 2
    assert images[0]["alt"] == name.replace("\r\n", "\n")
    assert [tag for tag, _ in page.tags].count("script") == 1  # the page's own


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    write_duplicate_report(tmp_path / "report", found(group_of(*write_pictures(tmp_path, "a.jpg", "b.jpg"))))
    text = (tmp_path / "report" / "groups.html").read_text("utf-8")
    page = Page(tmp_path / "report" / "groups.html")
    assert "http" not in text
    assert "url(" not in text
    assert not {"link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}


def test_thumbnails_are_limited_and_pictures_that_are_gone_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_pictures(tmp_path, *(f"{number}.jpg" for number in range(8)))
    paths[0].unlink()
    write_duplicate_report(tmp_path / "report", found(group_of(*paths)), limit=4)
    page = Page(tmp_path / "report" / "groups.html")
    assert len(page.pictures()) == 3
    assert page.text.count("no thumbnail") == 5
    assert "4 pictures are shown by name only, beyond 4 thumbnails" in page.text
    monkeypatch.setattr(reports, "_THUMBNAILS_PER_GROUP", 2)
    write_duplicate_report(tmp_path / "other", found(group_of(*paths)))
    assert "and 6 more, listed in groups.csv" in Page(tmp_path / "other" / "groups.html").text
    assert len(rows(tmp_path / "other")) == 8


def test_no_duplicates_make_an_empty_report(tmp_path: Path) -> None:
    write_duplicate_report(tmp_path / "report", found())
    assert rows(tmp_path / "report") == []
    assert "No duplicates." in Page(tmp_path / "report" / "groups.html").text


def test_an_existing_report_is_overwritten_only_by_force(tmp_path: Path) -> None:
    paths = write_pictures(tmp_path, "a.jpg", "b.jpg")
    folder = tmp_path / "report"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    write_duplicate_report(folder, found())  # nothing of it is there
    with pytest.raises(OutputExists, match=r"holds groups\.csv, groups\.json, groups\.html already"):
        write_duplicate_report(folder, found(group_of(*paths)))
    assert rows(folder) == []
    write_duplicate_report(folder, found(group_of(*paths)), force=True)
    assert len(rows(folder)) == 2
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("step", ["_write_table", "_write_page"])
def test_a_report_that_is_interrupted_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(reports, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_duplicate_report(tmp_path / "report", found())
    assert [path for path in tmp_path.iterdir() if "report" in path.name] == []


def test_a_report_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputUnwritable, match="cannot be written: Not a directory"):
        write_duplicate_report(tmp_path / "file" / "report", found())


@pytest.mark.browser
def test_the_page_sorts_and_filters_in_a_browser(tmp_path: Path) -> None:
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    require(importlib.util.find_spec("playwright") is not None and browser_path is not None, "needs playwright")
    from playwright.sync_api import sync_playwright

    paths = write_pictures(tmp_path, *(f"{number}.jpg" for number in range(6)), NASTY[0])
    groups = [
        group_of(*paths[:2]), group_of(*paths[2:5], number=2, min_score=0.3, chained=True),
        group_of(*paths[5:], number=3, min_score=0.5),
    ]  # fmt: skip
    write_duplicate_report(tmp_path / "report", found(*groups))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page()
        alerts: list[str] = []

        def note(dialog: Any) -> None:
            alerts.append(dialog.message)
            dialog.dismiss()

        page.on("dialog", note)
        page.on("pageerror", lambda error: alerts.append(str(error)))
        page.goto((tmp_path / "report" / "groups.html").as_uri())

        def shown() -> list[str]:
            numbers = page.eval_on_selector_all(
                "section:not([hidden])", "sections => sections.map(section => section.dataset.group)"
            )
            return [str(number) for number in numbers]

        assert shown() == ["1", "2", "3"]
        page.select_option("#sort", "score")
        assert shown() == ["2", "3", "1"]
        page.select_option("#sort", "files")
        assert shown()[0] == "2"
        page.check("#chained")
        assert shown() == ["2"]
        page.uncheck("#chained")
        page.fill("#text", "<SCRIPT>")
        assert shown() == ["3"]
        assert page.text_content("#count") == "1 of 3 groups"
        assert alerts == []
        browser.close()
