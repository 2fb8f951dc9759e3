"""The files of a copy report: what they hold, and that they are whole or not there."""

from __future__ import annotations

import base64
import csv
import errno
import io
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from bad_files import encoded, exif_orientation, picture
from copy_pairs import a_failed_query, a_match, a_query
from dino_index.errors import OutputExists, OutputUnwritable
from dino_search import copy_report_page
from dino_search.collection import Collection
from dino_search.copy_report import FILES, CopyReport
from dino_search.copy_results import CopyQuery
from sample_collections import index_files, write_pictures

SQUARE = ((0.25, 0.25), (0.75, 0.25), (0.75, 0.75), (0.25, 0.75))


def a_report(folder: Path, *queries: CopyQuery, **options: Any) -> Path:
    given = {"title": "A title", "collection": "default", "model": "m"} | options
    with CopyReport(folder, **given) as report:
        for query in queries:
            report.add(query)
    return folder


def csv_rows(file: Path) -> list[dict[str, str]]:
    with open(file, newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def data_of(page: Path, name: str) -> Any:
    """A block of data of the page, as a browser finds it: up to the first end of a script."""
    text = page.read_text("utf-8")
    begin = text.index(f'id="{name}">') + len(f'id="{name}">')
    return json.loads(text[begin : text.index("</script", begin)])


def thumbnails_of(page: Path) -> list[Image.Image | None]:
    blocks = re.findall(r'<script type="text/plain" id="thumbnails-\d+">([^<]*)\n</script>', page.read_text("utf-8"))
    found: list[Image.Image | None] = []
    for line in "\n".join(blocks).split("\n"):
        if not line:
            found.append(None)
            continue
        width, height, data = line.split(",")
        thumbnail = Image.open(io.BytesIO(base64.b64decode(data)))
        assert thumbnail.size == (int(width), int(height))
        found.append(thumbnail)
    return found


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if "partial" in path.name or "page-" in path.name]


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return write_pictures(tmp_path / "photos", "q.jpg", "a.jpg", "b.jpg")


# --- what they hold


def test_every_file_holds_the_same_pairs(tmp_path: Path, paths: list[Path]) -> None:
    query, a, b = paths
    transform = ((1.0, 0.0, 3.5), (0.0, 1.0, -2.0))
    found = a_query(
        query,
        a_match(query, a, 2.5, query_area=SQUARE, reference_area=SQUARE, transform=transform, verified=True,
                variant="mirror", verdict="copy", reason="verdict"),
        a_match(query, b, -0.125, rank=2, precision=None, similar=True, reason="burst"),
    )  # fmt: skip
    other, bad = a_query(a), a_failed_query(tmp_path / "bad.jpg")
    report = a_report(tmp_path / "report", found, other, bad, facts={"target precision": "0.99"})
    assert sorted(path.name for path in report.iterdir()) == sorted(FILES)
    assert (report / "matches.csv").read_text().splitlines() == [
        "query,reference,score,cosine,rank,decision,precision",
        f"{query},{a},2.5,0.5,1,copy,0.9",
        f"{query},{b},-0.125,0.5,2,different,",
    ]
    assert (report / "queries.csv").read_text().splitlines() == [
        "query,status,reason",
        f"{query},ok,",
        f"{a},ok,",
        f"{tmp_path}/bad.jpg,failed,truncated: the file ends before the picture does",
    ]
    written = json.loads((report / "matches.json").read_text())
    assert written["facts"] == {"target precision": "0.99"}
    assert written["counts"] == {
        "queries": 3, "failed": 1, "queries_with_copies": 1, "candidates": 2, "copy": 1, "uncertain": 0,
        "different": 1, "similar": 1, "listed": 2,
    }  # fmt: skip
    assert [row["status"] for row in written["queries"]] == ["ok", "ok", "failed"]
    expected = [match.to_json() for match in found.matches]
    assert written["matches"] == json.loads(json.dumps(expected))
    rows = pq.read_table(report / "matches.parquet").to_pylist()
    assert rows == json.loads(json.dumps(expected))
    assert [row[:3] for row in data_of(report / "report.html", "rows")] == [[0, 1, 2.5], [0, 2, -0.125]]
    assert [path for path, _ in data_of(report / "report.html", "pictures")] == [str(path) for path in paths]


def test_min_score_filters_the_rows_listed_and_nothing_else(tmp_path: Path, paths: list[Path]) -> None:
    query, a, b = paths
    given = a_query(query, a_match(query, a, 0.7), a_match(query, b, 0.2, rank=2))
    all_counts = json.loads((a_report(tmp_path / "all", given) / "matches.json").read_text())["counts"]
    report = a_report(tmp_path / "report", given, min_score=0.7)
    assert [row["reference"] for row in csv_rows(report / "matches.csv")] == [str(a)]
    assert len(csv_rows(report / "queries.csv")) == 1
    counts = json.loads((report / "matches.json").read_text())["counts"]
    assert counts == all_counts | {"listed": 1}
    assert pq.read_metadata(report / "matches.parquet").num_rows == 1
    assert "1 pairs with a score below 0.7 are not listed" in (report / "report.html").read_text()
    assert len(data_of(report / "report.html", "rows")) == 1


def test_the_page_shows_the_first_rows_and_the_tables_all(tmp_path: Path, paths: list[Path]) -> None:
    query, a, b = paths
    queries = [a_query(query, *(a_match(query, path, number / 10) for path in (a, b))) for number in range(10)]
    report = a_report(tmp_path / "report", *queries, limit=3)
    assert len(csv_rows(report / "matches.csv")) == 20
    assert [row[2] for row in data_of(report / "report.html", "rows")] == [0.0, 0.0, 0.1]
    assert "shows the first 3 of 20 pairs" in (report / "report.html").read_text()


def test_nothing_to_report_is_a_report(tmp_path: Path) -> None:
    report = a_report(tmp_path / "report")
    assert sorted(path.name for path in report.iterdir()) == sorted(FILES)
    assert csv_rows(report / "matches.csv") == csv_rows(report / "queries.csv") == []
    assert json.loads((report / "matches.json").read_text())["matches"] == []
    assert pq.read_table(report / "matches.parquet").num_rows == 0
    assert data_of(report / "report.html", "rows") == data_of(report / "report.html", "pictures") == []
    bad = a_report(tmp_path / "bad", *(a_failed_query(tmp_path / f"{number}.jpg") for number in range(3)))
    assert "3 queries could not be used" in (bad / "report.html").read_text()
    assert str(tmp_path / "2.jpg") in (bad / "report.html").read_text()


def test_a_long_list_of_bad_queries_is_cut_short_on_the_page_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copy_report_page, "_MAX_FAILED_SHOWN", 2)
    report = a_report(tmp_path / "report", *(a_failed_query(tmp_path / f"{number}.jpg") for number in range(5)))
    page = (report / "report.html").read_text()
    assert "5 queries could not be used" in page
    assert "The first 2; all are in" in page
    assert len(csv_rows(report / "queries.csv")) == 5


def test_a_score_that_is_no_number_breaks_no_file(tmp_path: Path, paths: list[Path]) -> None:
    query, a, b = paths
    report = a_report(
        tmp_path / "report", a_query(query, a_match(query, a, math.inf), a_match(query, b, 1, cosine=math.nan))
    )
    assert len(json.loads((report / "matches.json").read_text())["matches"]) == 2
    assert len(data_of(report / "report.html", "rows")) == 2


# --- names that files may have


HOSTILE = [
    '"quoted", and a comma.jpg',
    "two\nlines.jpg",
    "carriage\rreturn.jpg",
    "</script><script>alert(1)</script>.jpg",
    "<!--<script>.jpg",
    "'><img src=x onerror=alert(1)>.jpg",
    "=cmd|' /C calc'!A0.jpg",
    "{{ 7*7 }}{% raw %}.jpg",
    "\u2028\u202e é 图.jpg",
    "back\\slash \\xe9.jpg",
]


@pytest.mark.skipif(os.name != "posix", reason="other systems refuse such names")
@pytest.mark.parametrize("name", HOSTILE)
def test_any_name_comes_back_from_every_file(tmp_path: Path, name: str) -> None:
    name = name.replace("/", "")
    (tmp_path / "photos").mkdir()
    path = tmp_path / "photos" / name
    path.write_bytes(encoded(picture(), "JPEG"))
    match = a_match(path, path)
    report = a_report(
        tmp_path / "report", a_query(path, match), a_failed_query(path, name), title=name, facts={name: name}
    )
    wanted = match.query
    assert [(row["query"], row["reference"]) for row in csv_rows(report / "matches.csv")] == [(wanted, wanted)]
    assert [row["query"] for row in csv_rows(report / "queries.csv")] == [wanted, wanted]
    assert json.loads((report / "matches.json").read_text())["matches"][0]["query"] == wanted
    assert pq.read_table(report / "matches.parquet").to_pylist()[0]["reference"] == wanted
    assert [path for path, _ in data_of(report / "report.html", "pictures")] == [wanted]
    text = (report / "report.html").read_text("utf-8")
    assert len(re.findall("<script", text)) == 5
    assert len(re.findall("</script", text)) == 5
    assert "<img" not in text
    assert len(thumbnails_of(report / "report.html")) == 1


@pytest.mark.skipif(os.name != "posix", reason="paths of other systems begin otherwise")
def test_no_cell_of_the_tables_is_a_formula(tmp_path: Path) -> None:
    path = tmp_path / "=1+1.jpg"
    report = a_report(
        tmp_path / "report", a_query(path, a_match(path, tmp_path / "@x.jpg")), a_failed_query(tmp_path / "+1.jpg")
    )
    for name in ("matches.csv", "queries.csv"):
        for row in csv_rows(report / name):
            assert all(cell[:1] not in ("=", "+", "@", "\t", "\r") for cell in row.values())


def test_names_that_are_not_utf_8_find_their_picture(tmp_path: Path) -> None:
    try:
        (path,) = write_pictures(tmp_path, "caf\udce9.jpg")
    except OSError:
        pytest.skip("this file system refuses the name")
    report = a_report(tmp_path / "report", a_query(path, a_match(path, path)))
    assert csv_rows(report / "matches.csv")[0]["query"].endswith(r"caf\xe9.jpg")
    (thumbnail,) = thumbnails_of(report / "report.html")
    assert thumbnail is not None


# --- pictures


def test_a_picture_that_is_shown_often_is_in_the_page_once(tmp_path: Path, paths: list[Path]) -> None:
    query, a, b = paths
    report = a_report(
        tmp_path / "report",
        a_query(query, a_match(query, a), a_match(query, b)),
        a_query(a, a_match(a, query), a_match(a, b)),
        a_query(query, a_match(query, a)),
    )
    assert len(thumbnails_of(report / "report.html")) == 3
    assert [row[:2] for row in data_of(report / "report.html", "rows")] == [[0, 1], [0, 2], [1, 0], [1, 2], [0, 1]]


def test_each_picture_keeps_its_number_over_many_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_report_page, "_PICTURES_A_BLOCK", 3)
    monkeypatch.setattr(copy_report_page, "_MAX_PENDING", 2)
    sizes = [(40 + number, 20) for number in range(10)]
    paths = []
    for number, (width, height) in enumerate(sizes):
        paths.append(tmp_path / f"{number}.png")
        if number != 4:  # one that is gone
            paths[-1].write_bytes(encoded(picture(width, height), "PNG"))
    report = a_report(tmp_path / "report", a_query(paths[0], *(a_match(paths[0], path) for path in paths[1:])))
    found = [thumbnail and thumbnail.size for thumbnail in thumbnails_of(report / "report.html")]
    assert found == [None if number == 4 else size for number, size in enumerate(sizes)]


def test_thumbnails_are_small_upright_and_without_metadata(tmp_path: Path) -> None:
    exif = exif_orientation(6)
    exif[0x010F] = "Secret Camera Maker"
    path = tmp_path / "phone.jpg"
    path.write_bytes(encoded(picture(600, 400), "JPEG", exif=exif))
    report = a_report(tmp_path / "report", a_query(path, a_match(path, path)))
    (thumbnail,) = thumbnails_of(report / "report.html")
    assert thumbnail is not None
    assert thumbnail.size == (107, 160)
    assert not thumbnail.getexif()
    assert b"Secret Camera Maker" not in (report / "report.html").read_bytes()


# --- whole or not at all


@pytest.mark.parametrize("exists", [False, True], ids=["a new folder", "a folder with something in it"])
def test_an_interrupted_report_leaves_nothing(tmp_path: Path, paths: list[Path], exists: bool) -> None:
    folder = tmp_path / "report"
    if exists:
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
    query, a, _ = paths
    before = sorted(tmp_path.rglob("*"))

    def interrupted(report: CopyReport) -> None:
        with report:
            report.add(a_query(query, a_match(query, a)))
            assert len(leftovers(tmp_path)) > 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted(CopyReport(folder, title="t", collection="default", model="m"))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("failing", ["os.replace", "os.fsync", "pyarrow.parquet.ParquetWriter.write_table"])
def test_a_disk_that_fills_up_leaves_no_file_under_a_final_name(
    tmp_path: Path, paths: list[Path], monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    folder = tmp_path / "report"
    folder.mkdir()

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    query, a, _ = paths
    monkeypatch.setattr(failing, fail)
    with pytest.raises(OutputUnwritable, match="No space left on device; free some space"):
        a_report(folder, a_query(query, a_match(query, a)))
    assert list(folder.iterdir()) == []


def test_nothing_existing_is_overwritten_unless_told(tmp_path: Path, paths: list[Path]) -> None:
    query, a, b = paths
    folder = tmp_path / "report"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    a_report(folder, a_query(query, a_match(query, a)))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(OutputExists, match=r"matches\.csv exists already; .* --force"):
        a_report(folder, a_query(query, a_match(query, b)))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    a_report(folder, a_query(query, a_match(query, b)), force=True)
    assert [row["reference"] for row in csv_rows(folder / "matches.csv")] == [str(b)]
    assert (folder / "notes.txt").read_text() == "mine"
    assert leftovers(tmp_path) == []
    with pytest.raises(OutputExists, match="is no folder"):
        a_report(folder / "notes.txt", force=True)


def test_a_report_that_appears_meanwhile_is_not_overwritten(tmp_path: Path, paths: list[Path]) -> None:
    query, a, b = paths
    folder = tmp_path / "deep" / "report"

    def overtaken(report: CopyReport) -> None:
        with report:
            report.add(a_query(query, a_match(query, a)))
            a_report(folder, a_query(query, a_match(query, b)))

    with pytest.raises(OutputExists, match="exists already"):
        overtaken(CopyReport(folder, title="t", collection="default", model="m"))
    assert [row["reference"] for row in csv_rows(folder / "matches.csv")] == [str(b)]
    assert leftovers(tmp_path) == []


@pytest.mark.skipif(os.name != "posix", reason="as other systems report it")
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputUnwritable, match=r"file/report cannot be written: (Not a dir|File exists)"):
        a_report(tmp_path / "file" / "report")


# --- purging


def test_a_purge_finds_every_file_that_names_the_image(
    tmp_path: Path, home: Path, tiny_model: Path, paths: list[Path]
) -> None:
    query, a, b = paths
    index_files(home, tiny_model, a, b)
    with Collection.open(home=home) as collection:
        for name, reference in (("names", a), ("silent", b)):
            options: dict[str, Any] = {"title": "t", "collection": "default", "model": "m"}
            with CopyReport(tmp_path / name, **options) as report:
                report.add(a_query(query, a_match(query, reference)))
            assert report.record_in(collection)
        found = collection.purge([a]).reports
    assert found == sorted(str(tmp_path / "names" / name) for name in FILES if name != "queries.csv")
