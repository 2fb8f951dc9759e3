from __future__ import annotations

import os
import sqlite3
import threading
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, func, select, text

import databases
from catalog_rows import an_image, count_images, fill
from databases import created_catalog, open_catalog
from dino_index.catalog import (
    ApiKeyRow,
    Base,
    CalibrationRow,
    Catalog,
    CollectionRow,
    EmbeddingRow,
    ImageRow,
    JobRow,
    RemovalRow,
    ReportRow,
    SettingRow,
    SnapshotRow,
    StoredVectorsRow,
    VerdictRow,
    WhiteningRow,
)
from dino_index.catalog.backup import back_up, copy_catalog, restore
from dino_index.catalog.copying import OWN_SETTING, file_problems
from dino_index.catalog.schema import SCHEMA_REVISION
from dino_index.catalog.sqlite import SqliteStore
from dino_index.catalog.store import upgrade
from dino_index.errors import (
    BackupUnusable,
    CatalogError,
    CatalogNotEmpty,
    CatalogTooNew,
    OutputExists,
    OutputUnwritable,
)

pytestmark = pytest.mark.usefixtures("database")


@pytest.fixture
def catalog(home: Path) -> Catalog:
    """A catalog with rows in every table and an image that is gone again."""
    catalog = created_catalog(home)
    fill(catalog, 5)
    with catalog.writing() as session:
        for number, row in enumerate(session.scalars(select(ImageRow).order_by(ImageRow.id))):
            row.sha256 = bytes([number]) * 32
            row.label, row.facts = f"Ä{number}", {"year": 1900 + number, "where": ["Rom", None]}
            session.add(
                EmbeddingRow(sha256=row.sha256, model_id=1, kind="cls", region="full", vector=bytes(range(256)))
            )
        session.add(RemovalRow(collection_id=1, image_id=77, generation=3))
        session.add(SettingRow(key="model", value={"name": "m"}))
        session.add(ReportRow(path="/r.html", collection_id=1, kind="copies"))
        session.add(
            SnapshotRow(
                collection_id=1, file_name="flat-1.faiss", generation=1, index_type="flat", num_vectors=5,
                num_bytes=9, sha256=bytes(32),
            )
        )  # fmt: skip
        session.add(VerdictRow(first_sha256=bytes(32), second_sha256=b"\xff" * 32, decision="not_copy", note="a\nb'\""))
        session.add(ApiKeyRow(name="page", prefix="ds_abcd", sha256=bytes(32), scope="read", collections=["default"]))
        session.add(
            ApiKeyRow(name="all", prefix="ds_efgh", sha256=b"1" * 32, scope="admin", revoked_at=datetime.now(UTC))
        )
        failures = [{"path": "/photos/é.jpg", "code": "truncated", "message": "ends"}]
        session.add(
            JobRow(
                kind="index", collection="default", status="done", request={"folders": ["/photos"]}, done=5, total=5,
                failures=failures, num_failures=1, result={"added": 4}, attempts=1,
            )
        )  # fmt: skip
        for version in (1, 2):
            key = {"collection_id": 1, "model_id": 1, "version": version}
            session.add(WhiteningRow(**key, data=bytes(range(256)) * version, facts={"images": 5}))
            session.add(CalibrationRow(**key, value={"knots": [[0.5, None], [1, "Ä"]]}))
        session.execute(delete(ImageRow).where(ImageRow.path == "4.jpg"))
        session.scalars(select(CollectionRow)).one().generation = 7
    return catalog


def contents(catalog: Catalog, *, generations: bool = True) -> dict[str, list[tuple[Any, ...]]]:
    """All rows of all tables, the name that a server's database has for itself left out."""
    with catalog.reading() as session:
        found = {}
        for table in Base.metadata.sorted_tables:
            columns = [column for column in table.columns if generations or column.name != "generation"]
            rows = [tuple(row) for row in session.execute(select(*columns))]
            found[table.name] = sorted((row for row in rows if row[0] != OWN_SETTING), key=repr)
    return found


def in_sqlite(file: Path) -> Catalog:
    catalog = Catalog(file.parent, SqliteStore(file))
    databases.opened.append(catalog)
    return catalog


def next_id(catalog: Catalog) -> int:
    with catalog.writing() as session:
        row = an_image("the next one.jpg")
        session.add(row)
        session.flush()
        return row.id


# --- backup


def test_the_sample_has_rows_in_every_table(catalog: Catalog) -> None:
    assert [name for name, rows in contents(catalog).items() if not rows] == ["stored_vectors"]  # see below


def test_a_backup_is_one_sound_sqlite_file_with_everything(catalog: Catalog, tmp_path: Path) -> None:
    counts = back_up(catalog, tmp_path / "backup")
    assert {name: counts[name] for name in ("collection", "image", "embedding")} == {
        "collection": 1, "image": 4, "embedding": 5,
    }  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backup", "home"]
    assert file_problems(tmp_path / "backup") == []
    assert contents(in_sqlite(tmp_path / "backup")) == contents(catalog)
    assert next_id(in_sqlite(tmp_path / "backup")) == 6


def test_a_backup_shows_one_state_while_others_write(catalog: Catalog, home: Path, tmp_path: Path) -> None:
    stop = threading.Event()
    writer = open_catalog(home)

    def write_pairs() -> None:
        number = 0
        while not stop.is_set():
            with writer.writing() as session:
                session.add_all([an_image(f"{number}-a"), an_image(f"{number}-b")])
            number += 1

    thread = threading.Thread(target=write_pairs)
    thread.start()
    try:
        for number in range(3):
            back_up(catalog, tmp_path / f"{number}")
    finally:
        stop.set()
        thread.join()
    sizes = [count_images(in_sqlite(tmp_path / f"{number}")) for number in range(3)]
    assert sizes == sorted(sizes)
    assert all(size % 2 == 0 for size in sizes)
    assert count_images(catalog) % 2 == 0


def test_nothing_is_overwritten_unless_told(catalog: Catalog, tmp_path: Path) -> None:
    file = tmp_path / "backup"
    file.write_text("precious")
    with pytest.raises(OutputExists, match="--force"):
        back_up(catalog, file)
    assert file.read_text() == "precious"
    back_up(catalog, file, force=True)
    assert file_problems(file) == []


def test_the_catalog_is_no_name_for_its_own_backup(catalog: Catalog, home: Path) -> None:
    file = home / "catalog.sqlite3"
    if isinstance(catalog.store, SqliteStore):
        with pytest.raises(OutputExists, match="the catalog itself"):
            back_up(catalog, file, force=True)
    assert count_images(catalog) == 4


def test_a_backup_that_cannot_be_written_says_so_and_leaves_nothing(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OutputUnwritable, match="cannot be written"):
        back_up(catalog, tmp_path / "missing" / "backup")
    (tmp_path / "file").touch()
    with pytest.raises(OutputUnwritable, match="cannot be written"):
        back_up(catalog, tmp_path / "file" / "backup")
    before = sorted(tmp_path.iterdir())

    def fail(source: object, target: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises((OutputUnwritable, CatalogError)):
        back_up(catalog, tmp_path / "backup")
    assert sorted(tmp_path.iterdir()) == before


# --- restore


def test_a_restored_catalog_shares_no_vectors_on_a_server(catalog: Catalog, home: Path, tmp_path: Path) -> None:
    def stored(name: str) -> StoredVectorsRow:
        return StoredVectorsRow(
            name=name, collection_id=1, model_id=1, place="milvus+http://m:1", owner="me", state="current",
            generation=3, index_type="flat", reason="",
        )  # fmt: skip

    with catalog.writing() as session:
        session.add(stored("of the source"))
    back_up(catalog, tmp_path / "backup")
    with created_catalog(tmp_path / "other").writing() as session:
        session.add(stored("of the target"))
    restore(tmp_path / "backup", tmp_path / "other", databases.url_of(tmp_path / "other"))
    with open_catalog(tmp_path / "other").reading() as session:
        rows = [(row.name, row.state) for row in session.scalars(select(StoredVectorsRow))]
    assert rows == [("of the target", "dropped")]


def test_a_restored_catalog_is_the_one_that_was_backed_up(catalog: Catalog, home: Path, tmp_path: Path) -> None:
    back_up(catalog, tmp_path / "backup")
    other = tmp_path / "other"
    done = restore(tmp_path / "backup", other, databases.url_of(other))
    assert (done.rows["image"], done.kept) == (4, None)
    restored = open_catalog(other)
    assert contents(restored) == contents(catalog)
    assert restored.integrity_problems() == []
    assert next_id(restored) == 6  # not 5, which was given to an image that is gone
    assert not list(other.glob("restoring-*"))


def test_a_catalog_that_holds_something_is_replaced_only_when_told(
    catalog: Catalog, home: Path, tmp_path: Path
) -> None:
    back_up(catalog, tmp_path / "backup")
    at_backup = contents(catalog, generations=False)
    with catalog.writing() as session:
        session.execute(delete(ImageRow).where(ImageRow.path != "0.jpg"))
        session.add_all(an_image(f"later-{number}.jpg") for number in range(10))
        session.scalars(select(CollectionRow)).one().generation = 20
    before = contents(catalog)
    with pytest.raises(CatalogNotEmpty, match=r"holds 11 images in 1 collections .* --force"):
        restore(tmp_path / "backup", home, databases.url_of(home))
    assert contents(catalog) == before
    done = restore(tmp_path / "backup", home, databases.url_of(home), force=True)
    assert contents(catalog, generations=False) == at_backup
    with catalog.reading() as session:
        assert session.scalars(select(CollectionRow.generation)).one() == 21  # so that loaded indexes notice
    assert done.kept is not None
    assert done.kept.parent == home
    assert contents(in_sqlite(done.kept)) == before
    assert next_id(catalog) == 16


def test_an_older_backup_is_migrated(home: Path, tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "old")
    upgrade(store, revision="0001")
    store.close()
    with closing(sqlite3.connect(tmp_path / "old")) as connection:
        connection.execute("INSERT INTO model VALUES (1, 'f', 'm', 2, '{}')")
        connection.execute("INSERT INTO collection VALUES (1, 'default', 1, 5, '2026-01-02 03:04:05')")
        connection.commit()
    before = (tmp_path / "old").read_bytes()
    restore(tmp_path / "old", home, databases.url_of(home))
    with open_catalog(home).reading() as session:
        assert session.scalars(select(CollectionRow.index_type)).one() == "auto"
    assert (tmp_path / "old").read_bytes() == before


def test_what_is_no_sound_backup_of_a_known_schema_is_refused(catalog: Catalog, home: Path, tmp_path: Path) -> None:
    backup = tmp_path / "backup"
    with catalog.writing() as session:
        session.add_all(an_image(f"more-{number}.jpg") for number in range(300))
    back_up(catalog, backup)
    data = backup.read_bytes()
    before = contents(catalog)

    def refused(content: bytes | None) -> str:
        if content is None:
            backup.unlink()
        else:
            backup.write_bytes(content)
        with pytest.raises((BackupUnusable, CatalogTooNew)) as caught:
            restore(backup, home, databases.url_of(home), force=True)
        return str(caught.value)

    assert "damaged" in refused(data[:-8192])
    middle = len(data) // 2 // 4096 * 4096
    assert "damaged" in refused(data[:middle] + b"\xa5" * 4096 + data[middle + 4096 :])
    assert "no backup of a catalog" in refused(b"")
    assert "no backup of a catalog" in refused(b"a text" * 1000)
    backup.write_bytes(data)
    with closing(sqlite3.connect(backup)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '0999'")
        connection.commit()
    assert f"schema 0999, and this version knows schemas up to {SCHEMA_REVISION}" in refused(backup.read_bytes())
    backup.unlink()
    with closing(sqlite3.connect(backup)) as connection:
        connection.execute("CREATE TABLE notes (a)")
    assert "no backup of a catalog" in refused(backup.read_bytes())
    assert "cannot be read" in refused(None)
    assert contents(catalog) == before
    assert not list(home.glob("restoring-*"))


def test_a_restore_that_fails_in_the_middle_leaves_the_catalog_as_it_was(
    catalog: Catalog, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    back_up(catalog, tmp_path / "backup")
    before = contents(catalog)

    def fail(connection: object, wanted: object) -> None:
        raise RuntimeError("stopped")

    monkeypatch.setattr("dino_index.catalog.copying._raise_last_ids", fail)
    with pytest.raises(RuntimeError, match="stopped"):
        restore(tmp_path / "backup", home, databases.url_of(home), force=True)
    assert contents(catalog) == before


def test_nobody_sees_a_restore_half_done(catalog: Catalog, home: Path, tmp_path: Path) -> None:
    back_up(catalog, tmp_path / "backup")
    with catalog.reading() as session:
        count = select(func.count()).select_from(ImageRow)
        before = session.scalars(count).one()
        restore(tmp_path / "backup", home, databases.url_of(home), force=True)
        assert session.scalars(count).one() == before == 4


# --- copies to other databases


def test_a_copy_to_another_database_holds_the_same_and_gives_no_id_twice(catalog: Catalog, tmp_path: Path) -> None:
    other = tmp_path / "other"
    copy_catalog(catalog, other, databases.url_of(other))
    assert contents(open_catalog(other)) == contents(catalog)
    back = tmp_path / "back"  # an SQLite file, wherever the others are
    with closing(open_catalog(other)) as source:
        copy_catalog(source, back)
    assert contents(in_sqlite(back / "catalog.sqlite3")) == contents(catalog)
    for copied in (open_catalog(other), in_sqlite(back / "catalog.sqlite3")):
        assert next_id(copied) == 6
        with copied.writing() as session:
            collection = CollectionRow(name="second", model_id=1)
            session.add(collection)
            session.flush()
            assert collection.id == 2


def test_a_copy_replaces_nothing_unless_told(catalog: Catalog, tmp_path: Path) -> None:
    other = tmp_path / "other"
    fill(created_catalog(other), 9)
    with pytest.raises(CatalogNotEmpty, match="holds 9 images"):
        copy_catalog(catalog, other, databases.url_of(other))
    done = copy_catalog(catalog, other, databases.url_of(other), force=True)
    assert done.kept is not None
    assert count_images(in_sqlite(done.kept)) == 9
    assert contents(open_catalog(other), generations=False) == contents(catalog, generations=False)
    assert next_id(open_catalog(other)) == 10


def test_a_catalog_with_nothing_but_verdicts_is_not_empty(catalog: Catalog, tmp_path: Path) -> None:
    other = tmp_path / "other"
    with created_catalog(other).writing() as session:
        session.add(VerdictRow(first_sha256=bytes(32), second_sha256=bytes(32), decision="copy"))
    with pytest.raises(CatalogNotEmpty, match="holds 0 images in 0 collections and 1 verdicts already"):
        copy_catalog(catalog, other, databases.url_of(other))


def test_jobs_that_had_not_ended_do_not_begin_again_in_a_copy(catalog: Catalog, home: Path, tmp_path: Path) -> None:
    with catalog.writing() as session:
        for status in ("queued", "running", "cancelled"):
            session.add(JobRow(kind="index", collection="c", status=status, request={}, owner="host/1/2"))
    copy_catalog(catalog, tmp_path / "other", databases.url_of(tmp_path / "other"))
    with open_catalog(tmp_path / "other").reading() as session:
        copied = session.execute(select(JobRow.status, JobRow.error_code).order_by(JobRow.id)).all()
    assert copied == [("done", None), ("failed", "copied"), ("failed", "copied"), ("cancelled", None)]
    with catalog.reading() as session:
        statuses = session.scalars(select(JobRow.status).order_by(JobRow.id)).all()
    assert statuses == ["done", "queued", "running", "cancelled"]


def test_a_catalog_with_nothing_but_keys_is_not_empty(catalog: Catalog, tmp_path: Path) -> None:
    other = created_catalog(tmp_path / "other")
    with other.writing() as session:
        session.add(ApiKeyRow(name="page", prefix="ds_abcd", sha256=bytes(32), scope="read"))
    with pytest.raises(CatalogNotEmpty, match="holds 0 images in 0 collections and 1 API keys already"):
        copy_catalog(catalog, tmp_path / "other", databases.url_of(tmp_path / "other"))


def test_a_catalog_is_not_copied_onto_itself(catalog: Catalog, home: Path) -> None:
    with pytest.raises(CatalogError, match="is the catalog that is to be copied"):
        copy_catalog(catalog, home, databases.url_of(home), force=True)


def test_text_that_the_other_database_refuses_is_copied_in_the_portable_notation(
    home: Path, tmp_path: Path, database: str
) -> None:
    source = in_sqlite(home / "catalog.sqlite3")
    home.mkdir()
    upgrade(source.store)
    fill(source, 1)
    with source.writing() as session:
        session.connection().exec_driver_sql("UPDATE image SET label = ?", ("a\0b",))
        session.connection().exec_driver_sql("UPDATE image SET metadata = ?", ('{"a\\u0000": NaN}',))
    other = tmp_path / "other"
    copy_catalog(source, other, databases.url_of(other))
    with open_catalog(other).reading() as session:
        row = session.scalars(select(ImageRow)).one()
        assert (row.label, row.facts) == (r"a\x00b", {r"a\x00": None})
        assert session.execute(text("SELECT count(*) FROM image")).scalar() == 1
