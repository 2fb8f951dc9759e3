"""What `remove --purge` promises: nothing of a purged image stays in any file of the home."""

from __future__ import annotations

import os
import sqlite3
import threading
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save
from sqlalchemy import select

from databases import open_catalog
from dino_index.catalog import EmbeddingRow, ImageRow, JobRow, RemovalRow, ReportRow, SourceRow
from dino_index.catalog.portable_paths import encode_path
from dino_index.collections import find_collection
from dino_index.copy_settings import SINGLE_IMAGES, add_whitening
from dino_index.errors import CatalogError
from dino_index.exports import export_collection
from dino_index.integrity import verify_collection
from dino_index.purging import EXPORT_KIND, PARQUET_KIND, UPLOADS_FOLDER, PurgeReport, purge_images, record_report
from dino_index.recording import remove_images
from dino_index.snapshots import normalise, write_snapshot
from dino_index.verdicts import RecordedVerdict, load_verdicts, ordered_pair, record_verdicts
from sample_collections import (
    count_rows,
    findable,
    ids_of,
    images_of,
    index_files,
    save_tiny_model,
    write_pictures,
)

SECRET = "a-very-secret-name"


def purge(home: Path, *paths: Path, collection: str = "default") -> PurgeReport:
    ids = ids_of(home, collection)
    with closing(open_catalog(home)) as catalog:
        with catalog.reading() as session:
            info = find_collection(session, collection)
        return purge_images(catalog, info, [ids[str(path)] for path in paths])


def remove(home: Path, *paths: Path, collection: str = "default") -> None:
    ids = ids_of(home, collection)
    with closing(open_catalog(home)) as catalog, catalog.writing() as session:
        remove_images(session, find_collection(session, collection), [ids[str(path)] for path in paths])


def compact(home: Path, collection: str = "default") -> None:
    with closing(open_catalog(home)) as catalog:
        with catalog.reading() as session:
            info = find_collection(session, collection)
        write_snapshot(catalog, info)


def traces(home: Path, path: Path, collection: str = "default") -> dict[str, bytes]:
    """Byte sequences that give an image away."""
    image = images_of(home, collection)[str(path)]
    found = {"file name": path.name.encode(), "sha256": image["sha256"]}
    for kind in ("cls", "gem"):
        raw_1D = np.frombuffer(image[kind], np.float16)[None]
        found |= {f"raw {kind}": image[kind], f"unit {kind}": normalise(raw_1D).tobytes()}
    return found


def files_with(home: Path, traces: dict[str, bytes]) -> dict[str, set[str]]:
    """Names of the home's files that hold each trace."""
    contents = {path.name: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    return {trace: {name for name, data in contents.items() if needle in data} for trace, needle in traces.items()}


@pytest.fixture
def secret(home: Path, tiny_model: Path, tmp_path: Path) -> Path:
    """The one to purge, among a dozen pictures, in the catalog, in two index files and in removal rows' reach."""
    photos = tmp_path / "photos"
    paths = write_pictures(photos, *(f"{number}.jpg" for number in range(6)), f"deep/{SECRET}.jpg")
    index_files(home, tiny_model, photos)
    compact(home)
    write_pictures(photos, *(f"more/{number}.jpg" for number in range(5)), seed=100)
    index_files(home, tiny_model, photos)
    compact(home)
    return paths[-1]


def test_nothing_of_a_purged_image_stays_in_the_home(home: Path, secret: Path) -> None:
    wanted = traces(home, secret)
    before = files_with(home, wanted)
    assert all(before[trace] for trace in ("file name", "sha256", "raw cls", "raw gem", "unit cls"))
    assert len([name for name in before["unit cls"] if name.endswith(".faiss")]) == 2
    others = findable(home) - {str(secret)}
    report = purge(home, secret)
    assert files_with(home, wanted) == {trace: set() for trace in wanted}
    assert (report.images, report.vectors, report.snapshots) == (1, 2, 1)
    assert (report.shared, report.reports, report.backups, report.problems) == ([], [], [], [])
    assert findable(home) == others
    assert count_rows(home, RemovalRow) == 0
    assert secret.exists()


def test_catalog_and_index_agree_after_a_purge(home: Path, secret: Path) -> None:
    purge(home, secret)
    with closing(open_catalog(home)) as catalog:
        with catalog.reading() as session:
            info = find_collection(session, "default")
        assert verify_collection(catalog, info).problems == []


def test_purge_finds_what_only_the_log_holds(home: Path, secret: Path) -> None:
    # A reader keeps the log from being folded into the database while the image is written.
    with closing(sqlite3.connect(home / "catalog.sqlite3")) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM image").fetchone()
        wanted = traces(home, secret)
        (label_row,) = [ids_of(home)[str(secret)]]
        with closing(open_catalog(home)) as catalog, catalog.writing() as session:
            session.get_one(ImageRow, label_row).label = "label-in-the-log"
        wanted["label"] = b"label-in-the-log"
        assert any("wal" in name for name in files_with(home, wanted)["label"])
    purge(home, secret)
    assert files_with(home, wanted) == {trace: set() for trace in wanted}


def test_purge_says_when_another_process_keeps_the_log(
    home: Path, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dino_index.catalog.sqlite.BUSY_TIMEOUT_S", 0.2)
    wanted = traces(home, secret)
    with closing(sqlite3.connect(home / "catalog.sqlite3")) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM image").fetchone()
        report = purge(home, secret)
        assert len(report.problems) == 1
        assert "remove --purge" in report.problems[0]
    assert purge(home).problems == []
    assert files_with(home, wanted) == {trace: set() for trace in wanted}


def test_purge_without_images_clears_what_removals_left(home: Path, secret: Path) -> None:
    wanted = traces(home, secret)
    remove(home, secret)
    left = files_with(home, wanted)
    assert left["raw cls"]
    assert left["unit cls"]
    report = purge(home)
    assert (report.images, report.vectors) == (0, 2)
    assert files_with(home, wanted) == {trace: set() for trace in wanted}


@pytest.mark.parametrize("step", ["_rewrite_snapshots", "_delete_outdated_files", "_check_log"])
def test_purge_that_was_stopped_is_finished_by_the_next(
    home: Path, secret: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = traces(home, secret)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"dino_index.purging.{step}", stop)
        with pytest.raises(KeyboardInterrupt):
            purge(home, secret)
    assert str(secret) not in findable(home)
    purge(home)
    assert files_with(home, wanted) == {trace: set() for trace in wanted}


def test_vectors_that_others_share_stay_and_are_named(
    home: Path, secret: Path, tiny_model: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "elsewhere" / "copy.jpg"
    copy.parent.mkdir()
    copy.write_bytes(secret.read_bytes())
    index_files(home, tiny_model, copy, collection="second")
    wanted = traces(home, secret)
    report = purge(home, secret)
    assert (report.images, report.vectors) == (1, 0)
    assert report.shared == [f"second: {copy}"]
    found = files_with(home, wanted)
    assert found["raw cls"] == {"catalog.sqlite3"}
    assert found["unit cls"] == found["file name"] == set()
    assert findable(home, "second") == {str(copy)}
    assert purge(home, copy, collection="second").vectors == 2
    assert files_with(home, wanted) == {trace: set() for trace in wanted}


def test_index_files_of_other_collections_are_cleaned_too(
    home: Path, secret: Path, tiny_model: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "elsewhere" / "copy.jpg"
    copy.parent.mkdir()
    copy.write_bytes(secret.read_bytes())
    write_pictures(tmp_path / "elsewhere", "other.jpg", seed=40)
    index_files(home, tiny_model, copy.parent, collection="second")
    compact(home, "second")
    remove(home, copy, collection="second")
    wanted = traces(home, secret)
    assert purge(home, secret).snapshots == 2
    assert files_with(home, wanted) == {trace: set() for trace in wanted}
    assert findable(home, "second") == {str(copy.parent / "other.jpg")}


def test_content_that_was_replaced_goes_as_well(home: Path, secret: Path, tiny_model: Path) -> None:
    wanted = traces(home, secret)
    del wanted["file name"]
    write_pictures(secret.parent, secret.name, seed=77)
    index_files(home, tiny_model, secret)
    assert files_with(home, wanted)["unit cls"]
    purge(home)
    assert files_with(home, wanted) == {trace: set() for trace in wanted}
    assert str(secret) in findable(home)


def test_vectors_of_every_model_go(home: Path, secret: Path, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "two.safetensors", seed=1)
    index_files(home, other, secret, collection="second")
    first, second = traces(home, secret), traces(home, secret, "second")
    assert purge(home, secret).shared == [f"second: {secret}"]
    assert purge(home, secret, collection="second").vectors == 4
    for wanted in (first, second):
        assert files_with(home, wanted) == {trace: set() for trace in wanted}


def test_purging_a_whole_folder_forgets_the_folder(home: Path, secret: Path, tiny_model: Path, tmp_path: Path) -> None:
    private = tmp_path / "private-folder-name"
    paths = write_pictures(private, "1.jpg", "2.jpg", seed=60)
    (private / "bad.jpg").write_bytes(b"bad")
    index_files(home, tiny_model, private)
    purge(home, *paths)
    assert count_rows(home, SourceRow) == 2
    purge(home, private / "bad.jpg")
    assert count_rows(home, SourceRow) == 1
    assert files_with(home, {"folder": b"private-folder-name"}) == {"folder": set()}
    index_files(home, tiny_model, private)
    assert findable(home) >= set(map(str, paths))


def test_a_collection_can_be_purged_empty(home: Path, secret: Path, tiny_model: Path) -> None:
    everything = [Path(path) for path in ids_of(home)]
    assert purge(home, *everything).vectors == count_rows(home, EmbeddingRow) + 2 * len(everything)
    assert count_rows(home, ImageRow) == 0
    index_files(home, tiny_model, secret)
    assert findable(home) == {str(secret)}


def test_index_files_of_collections_that_are_gone_are_deleted(home: Path, secret: Path) -> None:
    wanted = traces(home, secret)
    (current, _) = sorted((home / "snapshots").rglob("*.faiss"))
    (home / "snapshots" / "77").mkdir()
    (home / "snapshots" / "77" / "old.faiss").write_bytes(current.read_bytes())
    purge(home, secret)
    assert files_with(home, wanted) == {trace: set() for trace in wanted}


def test_backups_are_listed(home: Path, secret: Path) -> None:
    backup = home / "catalog.sqlite3.schema-0001.backup"
    backup.write_bytes(b"older rows")
    assert purge(home, secret).backups == [str(backup)]


@pytest.mark.parametrize(
    "write",
    [
        lambda path, name: path.write_text(f'<figcaption title="{name}">'),
        lambda path, name: path.write_text(f"query,reference\n{name},x.jpg\n", encoding="utf-8"),
        lambda path, name: path.write_text(__import__("json").dumps([name])),
        lambda path, name: pq.write_table(pa.table({"query": ["x.jpg"], "reference": [name], "rank": [1]}), path),
        lambda path, name: path.write_bytes(b"PAR1 and nothing that can be read"),
    ],
    ids=["page", "csv", "json", "parquet", "parquet that is damaged"],
)
def test_reports_that_name_the_image_are_listed(home: Path, secret: Path, tmp_path: Path, write: Any) -> None:
    names, silent, gone = (tmp_path / name for name in ("names.html", "silent.html", "gone.html"))
    write(names, str(secret))
    silent.write_text(f"{secret}x".replace(".jpg", ".png"))
    kind = PARQUET_KIND if names.read_bytes().startswith(b"PAR1") else "contact sheet"
    with closing(open_catalog(home)) as catalog:
        for path in (silent, gone):
            record_report(catalog, "default", path, "contact sheet")
        for _ in range(2):  # written again
            record_report(catalog, "default", names, kind)
    assert purge(home, secret).reports == [str(names)]
    assert names.exists()
    assert count_rows(home, ReportRow) == 2


def test_reports_are_searched_for_names_as_pages_tables_and_json_spell_them(
    home: Path, tiny_model: Path, tmp_path: Path
) -> None:
    import csv
    import json

    from jinja2 import Environment

    (picture,) = write_pictures(tmp_path / "odd 'names' & \"more\" <ä>", "x.jpg")
    index_files(home, tiny_model, picture)
    page, data, table, script = (tmp_path / name for name in ("page.html", "data.json", "t.csv", "script.html"))
    with open(table, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerow([encode_path(str(picture)), 1])
    script.write_text(json.dumps(encode_path(str(picture)), ensure_ascii=False).replace("<", r"\u003c"), "utf-8")
    page.write_text(Environment(autoescape=True).from_string("<p>{{ name }}</p>").render(name=str(picture)))
    data.write_text(json.dumps({"path": encode_path(str(picture))}))
    with closing(open_catalog(home)) as catalog:
        for path in (page, data, table, script):
            record_report(catalog, "default", path, "page")
    assert purge(home, picture).reports == sorted(map(str, (page, data, table, script)))


def test_verdicts_on_a_purged_image_go_with_its_last_copy(
    home: Path, secret: Path, tiny_model: Path, tmp_path: Path
) -> None:
    wanted = {"sha256": images_of(home)[str(secret)]["sha256"]}
    others = {path: image["sha256"] for path, image in images_of(home).items() if path != str(secret)}
    outside = b"\xee" * 32
    pairs = [ordered_pair(wanted["sha256"], outside), *(ordered_pair(digest, outside) for digest in others.values())]
    with closing(open_catalog(home)) as catalog, catalog.writing() as session:
        at = datetime(2026, 1, 1, tzinfo=UTC)
        record_verdicts(session, [RecordedVerdict(pair=pair, decision="copy", decided_at=at) for pair in pairs])
    first, second = Path(min(others)), Path(max(others))
    remove(home, first)
    report = purge(home, secret)  # with what the removal had left behind
    assert (report.images, report.verdicts) == (1, 2)
    assert files_with(home, wanted) == {"sha256": set()}
    (tmp_path / "photos" / "copy.jpg").write_bytes(second.read_bytes())
    index_files(home, tiny_model, tmp_path / "photos" / "copy.jpg")
    assert purge(home, second).verdicts == 0
    with closing(open_catalog(home)) as catalog, catalog.reading() as session:
        assert set(load_verdicts(session)) == set(pairs) - {pairs[0], ordered_pair(others[str(first)], outside)}


def test_a_whitening_that_holds_the_vector_of_a_purged_image_goes(home: Path, secret: Path) -> None:
    wanted = traces(home, secret)
    del wanted["file name"]
    digest, vector = wanted["sha256"], np.frombuffer(wanted["raw cls"], np.float16)
    with closing(open_catalog(home)) as catalog, catalog.writing() as session:
        info = find_collection(session, "default")
        held: dict[str, Any] = {"background": vector[None], SINGLE_IMAGES: np.frombuffer(digest, np.uint8)[None]}
        add_whitening(session, info, save(held), {}, after=0)
    assert purge(home, secret).whitenings == 1
    assert files_with(home, wanted) == {trace: set() for trace in wanted}


def test_exports_that_hold_the_image_are_listed(home: Path, secret: Path, tmp_path: Path) -> None:
    earlier, later = tmp_path / "earlier", tmp_path / "later"
    with closing(open_catalog(home)) as catalog:
        export_collection(catalog, "default", earlier)
        record_report(catalog, "default", earlier, EXPORT_KIND)
    assert purge(home, secret).reports == [str(earlier)]
    (another,) = [Path(path) for path in ids_of(home) if path.endswith("photos/1.jpg")]
    with closing(open_catalog(home)) as catalog:
        export_collection(catalog, "default", later)
        record_report(catalog, "default", later, EXPORT_KIND)
    (later / "failed.parquet").unlink()  # what cannot be read counts
    assert purge(home, another).reports == [str(earlier), str(later)]


def test_searches_go_on_during_a_purge(home: Path, secret: Path) -> None:
    failures: list[BaseException] = []
    done = threading.Event()

    def search() -> None:
        try:
            while not done.is_set():
                findable(home)
        except (CatalogError, AssertionError, KeyError) as error:
            failures.append(error)

    # `findable` asks twice, and a path may go in between: only what is purged may be missing.
    searcher = threading.Thread(target=search)
    searcher.start()
    purge(home, secret)
    done.set()
    searcher.join()
    assert [failure for failure in failures if not isinstance(failure, KeyError)] == []
    assert str(secret) not in findable(home)
    assert os.path.exists(secret)


def test_a_purge_deletes_pictures_that_were_sent_to_the_service_and_what_jobs_say_of_them(
    home: Path, tiny_model: Path
) -> None:
    folder = home / UPLOADS_FOLDER / "one"
    sent, other, bad = write_pictures(folder, "0001-sent.jpg", "0002-other.jpg", "0003-bad.jpg")
    bad.write_bytes(bad.read_bytes()[:100])
    index_files(home, tiny_model, folder)
    index_files(home, tiny_model, other, collection="second")
    failures = [{"path": str(path), "code": "truncated", "message": "ends"} for path in (bad, Path("/elsewhere.jpg"))]
    with closing(open_catalog(home)) as catalog, catalog.writing() as session:
        session.add(JobRow(kind="index", collection="default", status="done", request={}, failures=failures,
                           num_failures=2))  # fmt: skip
    wanted = {"name": bad.name.encode()}
    report = purge(home, sent, other, bad)
    assert report.uploads == 2
    assert [path.name for path in folder.iterdir()] == [other.name], "which is an image of another collection, too"
    assert files_with(home, wanted) == {"name": set()}
    with closing(open_catalog(home)) as catalog, catalog.reading() as session:
        row = session.scalars(select(JobRow)).one()
        assert ([failure["path"] for failure in row.failures], row.num_failures) == (["/elsewhere.jpg"], 2)
    purge(home, other, collection="second")
    assert not folder.exists()
