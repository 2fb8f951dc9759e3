from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import func, select, text

import databases
from catalog_rows import an_image, count_images, fill
from databases import created_catalog, open_catalog
from dino_index.catalog import Base, Catalog, CollectionRow, ImageRow, SettingRow
from dino_index.catalog.copying import file_problems
from dino_index.catalog.database import MIGRATIONS, open_store
from dino_index.catalog.schema import SCHEMA_REVISION
from dino_index.catalog.sqlite import SqliteStore
from dino_index.catalog.store import WRITE, Store, revision_of, upgrade
from dino_index.errors import CatalogError, CatalogTooNew

pytestmark = pytest.mark.usefixtures("database")

NEXT = f"{int(SCHEMA_REVISION) + 1:04}"


def store_of(home: Path) -> Store:
    """The database of a home, as `upgrade` takes it."""
    return open_catalog(home).store


# --- opening


def test_nothing_is_made_unless_asked(tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert Catalog.open(home, url=databases.url_of(home)) is None
    assert not home.exists()


def test_a_new_catalog_has_the_present_schema(home: Path) -> None:
    catalog = created_catalog(home)
    assert count_images(catalog) == 0
    with catalog.reading() as session:
        assert revision_of(session.connection()) == SCHEMA_REVISION
    assert not list(home.glob("*.backup"))


def test_many_processes_may_create_the_catalog_at_once(home: Path) -> None:
    script = (
        "import os, sys; from dino_index.catalog import Catalog; from sqlalchemy import text\n"
        "catalog = Catalog.open(sys.argv[1], create=True, url=os.environ.get('DINO_SEARCH_DATABASE'))\n"
        "with catalog.reading() as s: s.execute(text('SELECT * FROM image'))"
    )
    running = [subprocess.Popen([sys.executable, "-c", script, str(home)]) for _ in range(3)]
    assert [process.wait(timeout=60) for process in running] == [0, 0, 0]


# --- transactions


def test_what_fails_in_the_middle_of_writing_leaves_nothing(home: Path) -> None:
    catalog = created_catalog(home)
    fill(catalog)

    def write_half() -> None:
        with catalog.writing() as session:
            session.add(an_image("new.jpg"))
            session.flush()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert count_images(catalog) == 3


def test_a_reader_sees_one_state_while_others_commit(home: Path) -> None:
    catalog = created_catalog(home)
    fill(catalog)
    count = select(func.count()).select_from(ImageRow)
    with catalog.reading() as session:
        before = session.scalars(count).one()
        with open_catalog(home).writing() as writing:
            writing.execute(text("DELETE FROM image"))
        assert (before, session.scalars(count).one()) == (3, 3)
    assert count_images(catalog) == 0


def test_a_second_writer_waits_and_sees_what_the_first_wrote(home: Path) -> None:
    catalog = created_catalog(home)
    fill(catalog)
    second = open_catalog(home)
    started, seen = threading.Event(), []

    def write() -> None:
        started.set()
        with second.writing() as session:
            seen.append(session.scalars(select(func.count()).select_from(ImageRow)).one())
            session.add(an_image("second.jpg"))

    with catalog.writing() as session:
        session.connection()  # the transaction begins with its first statement
        thread = threading.Thread(target=write)
        thread.start()
        assert started.wait(10)
        session.add(an_image("first.jpg"))
        thread.join(timeout=0.2)
        assert thread.is_alive()
    thread.join(timeout=60)
    assert (seen, count_images(catalog)) == ([4], 5)


def test_writers_that_all_count_first_lose_no_update(home: Path) -> None:
    catalog = created_catalog(home)
    fill(catalog)

    def advance(catalog: Catalog) -> None:
        for _ in range(10):
            with catalog.writing() as session:
                session.scalars(select(CollectionRow)).one().generation += 1

    threads = [threading.Thread(target=advance, args=(open_catalog(home),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    with catalog.reading() as session:
        assert session.scalars(select(CollectionRow.generation)).one() == 40


def test_reading_changes_nothing(home: Path, database: str) -> None:
    catalog = created_catalog(home)
    if database == "postgresql":
        with pytest.raises(CatalogError, match="takes no changes"), catalog.reading() as session:
            session.add(SettingRow(key="a", value={}))


def test_references_are_enforced(home: Path) -> None:
    catalog = created_catalog(home)
    with pytest.raises(Exception, match=r"(?i)foreign key"), catalog.writing() as session:
        session.add(an_image("a.jpg"))


def test_an_id_is_never_used_again(home: Path) -> None:
    catalog = created_catalog(home)
    fill(catalog)
    with catalog.writing() as session:
        last = session.scalars(select(func.max(ImageRow.id))).one()
        session.delete(session.get_one(ImageRow, last))
    with catalog.writing() as session:
        row = an_image("new.jpg")
        session.add(row)
        session.flush()
        assert row.id > last


# --- values


def test_text_comes_back_as_it_was_and_nul_in_the_portable_notation(home: Path) -> None:
    catalog = created_catalog(home)
    fill(catalog, 0)
    texts = ["", "Grüße 写真 🦕", "a'b\"c\\d%e_f\n\t\x01", "nul:\0:", r"\x00 written"]
    with catalog.writing() as session:
        session.add_all(
            an_image(str(number), label=words, error_message=words, facts={words: words, "deep": [{"a": words}]})
            for number, words in enumerate(texts)
        )
    with catalog.reading() as session:
        rows = session.scalars(select(ImageRow).order_by(ImageRow.id)).all()
        stored = [words.replace("\0", r"\x00") for words in texts]
        assert [row.label for row in rows] == [row.error_message for row in rows] == stored
        assert [row.facts for row in rows] == [{words: words, "deep": [{"a": words}]} for words in stored]
        found = session.scalars(select(ImageRow.path).where(ImageRow.label == "nul:\0:")).all()
        assert found == ["3"]


def test_metadata_that_json_cannot_hold_becomes_what_it_can(home: Path) -> None:
    catalog = created_catalog(home)
    fill(catalog, 0)
    facts = {"nan": float("nan"), "inf": float("-inf"), "list": [float("nan"), 1.5], "large": 2**60, "none": None}
    with catalog.writing() as session:
        session.add(an_image("a.jpg", facts=facts))
    with catalog.reading() as session:
        stored = session.scalars(select(ImageRow.facts)).one()
    assert stored == {"nan": None, "inf": "-inf", "list": [None, 1.5], "large": 2**60, "none": None}


def test_metadata_can_be_asked_for_in_queries(home: Path) -> None:
    catalog = created_catalog(home)
    fill(catalog, 0)
    with catalog.writing() as session:
        session.add_all(
            an_image(name, facts=facts)
            for name, facts in (
                ("1", {"city": "Rom", "year": 1950}),
                ("2", {"city": "Bonn", "year": 2001.5}),
                ("3", {}),
            )
        )
    with catalog.reading() as session:
        city = ImageRow.facts["city"].as_string()
        assert session.scalars(select(ImageRow.path).where(city == "Rom")).all() == ["1"]
        year = ImageRow.facts["year"].as_float()
        assert session.scalars(select(ImageRow.path).where(year > 1950)).all() == ["2"]


def test_moments_come_back_in_utc(home: Path) -> None:
    catalog = created_catalog(home)
    fill(catalog, 0)
    moment = datetime(2026, 3, 4, 5, 6, 7, 890123, tzinfo=timezone(timedelta(hours=9)))
    with catalog.writing() as session:
        session.add(an_image("given.jpg", added_at=moment))
        session.add(an_image("now.jpg"))
    with catalog.reading() as session:
        given, now = session.scalars(select(ImageRow.added_at).order_by(ImageRow.id))
    assert (given, given.tzinfo) == (moment, UTC)
    assert abs(now - datetime.now(UTC)) < timedelta(minutes=1)


def test_paths_are_sorted_by_code_points(home: Path) -> None:
    catalog = created_catalog(home)
    fill(catalog, 0)
    paths = ["a", "B", "é", "b", "_", "Z", "写", "a b", "aa", "\U0001f995", "\uffee"]
    with catalog.writing() as session:
        session.add_all(an_image(path) for path in paths)
    with catalog.reading() as session:
        assert session.scalars(select(ImageRow.path).order_by(ImageRow.path)).all() == sorted(paths)


def test_a_large_result_is_streamed(home: Path) -> None:
    catalog = created_catalog(home)
    fill(catalog, 500)
    with catalog.reading() as session:
        rows = session.execute(select(ImageRow.id).order_by(ImageRow.id), execution_options={"yield_per": 100})
        parts = [len(part) for part in rows.partitions()]
    assert parts == [100] * 5


# --- the database's own checks


def test_a_sound_database_has_no_problems(home: Path) -> None:
    catalog = created_catalog(home)
    fill(catalog)
    assert catalog.integrity_problems() == []


def test_reclaiming_space_keeps_what_is_there(home: Path) -> None:
    catalog = created_catalog(home)
    fill(catalog, 500)
    with catalog.writing() as session:
        session.execute(text("DELETE FROM image WHERE id > 3"))
    catalog.reclaim_space()
    assert count_images(catalog) == 3


# --- schema and migrations


def migrations_with(folder: Path, body: str) -> Path:
    """The migrations as shipped, and one more, NEXT, that does what `body` says."""
    shutil.copytree(MIGRATIONS, folder)
    revisions = f"revision = '{NEXT}'\ndown_revision = '{SCHEMA_REVISION}'\n"
    script = "import sqlalchemy as sa\nfrom alembic import op\n" + revisions
    indented = "\n".join(f"    {line}" for line in body.splitlines())
    (folder / "versions" / f"{NEXT}_next.py").write_text(f"{script}def upgrade():\n{indented}\n")
    return folder


def test_models_and_migrations_agree(home: Path, database: str) -> None:
    catalog = created_catalog(home)
    with catalog.reading() as session:
        # Alembic compares defaults by an operator that PostgreSQL's JSON lacks.
        options = {"compare_type": True, "compare_server_default": database == "sqlite"}
        context = MigrationContext.configure(session.connection(), opts=options)
        assert compare_metadata(context, Base.metadata) == []


def test_the_present_revision_is_the_last_migration() -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    assert ScriptDirectory.from_config(config).get_heads() == [SCHEMA_REVISION]


@pytest.mark.parametrize(
    "body",
    [
        "op.add_column('image', sa.Column('note', sa.Text()))",
        "with op.batch_alter_table('image') as table:\n    table.alter_column('label', new_column_name='class_name')",
        "with op.batch_alter_table('collection') as table:\n    table.add_column(sa.Column('note', sa.Text()))\n"
        "    table.alter_column('name', type_=sa.Text())",
    ],
    ids=["a new column", "a table that refers to others, built anew", "a table that others refer to, built anew"],
)
def test_an_upgrade_keeps_all_data_and_a_copy_of_what_was(home: Path, tmp_path: Path, body: str) -> None:
    fill(created_catalog(home))
    store = store_of(home)
    backup = upgrade(store, migrations_with(tmp_path / "migrations", body), NEXT)
    assert backup is not None
    assert backup.parent == home
    copy = SqliteStore(backup)
    for migrated, revision in ((copy, SCHEMA_REVISION), (store, NEXT)):
        with migrated.engine.connect() as connection:
            assert revision_of(connection) == revision
            names = connection.execute(text("SELECT path FROM image ORDER BY id")).scalars().all()
            assert names == ["0.jpg", "1.jpg", "2.jpg"]
            assert connection.execute(text("SELECT name, model_id FROM collection")).all() == [("default", 1)]
            assert migrated.broken_references(connection) == []
    copy.close()
    assert file_problems(backup) == []


@pytest.mark.parametrize(
    "body",
    [
        "op.add_column('image', sa.Column('note', sa.Text()))\n"
        "op.execute('DELETE FROM image')\n"
        "raise RuntimeError('stopped')",
        "op.execute('DELETE FROM collection')",
    ],
    ids=["an error in the middle", "references left dangling"],
)
def test_a_migration_that_fails_leaves_everything_as_it_was(home: Path, tmp_path: Path, body: str) -> None:
    fill(created_catalog(home))
    with pytest.raises((RuntimeError, CatalogError), match=r"^stopped$|broken reference in"):
        upgrade(store_of(home), migrations_with(tmp_path / "migrations", body), NEXT)
    assert count_images(open_catalog(home)) == 3


def test_an_upgrade_is_made_once(home: Path, tmp_path: Path) -> None:
    store = created_catalog(home).store
    migrations = migrations_with(tmp_path / "migrations", "op.add_column('image', sa.Column('note', sa.Text()))")
    assert upgrade(store, migrations, NEXT) is not None
    assert upgrade(store, migrations, NEXT) is None


def test_the_first_schema_is_migrated_with_its_rows(home: Path) -> None:
    home.mkdir()
    store = open_store(home, databases.url_of(home))
    upgrade(store, revision="0001")
    with store.engine.connect().execution_options(**{WRITE: True}) as connection, connection.begin():
        for statement in (
            "INSERT INTO model VALUES (1, 'f', 'm', 2, '{}')",
            "INSERT INTO collection VALUES (1, 'default', 1, 5, '2026-01-02 03:04:05')",
            "INSERT INTO source VALUES (1, 1, '/photos')",
            "INSERT INTO image (collection_id, source_id, path, size, mtime_ns, status, generation, added_at) "
            "VALUES (1, 1, 'a.jpg', 1, 1, 'ok', 5, '2026-01-02 03:04:05')",
        ):
            connection.execute(text(statement))
    store.close()
    catalog = open_catalog(home)
    with catalog.reading() as session:
        row = session.scalars(select(ImageRow)).one()
        assert (row.path, row.facts, row.added_at) == ("a.jpg", {}, datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))
        assert session.scalars(select(CollectionRow.index_type)).one() == "auto"
    (backup,) = home.glob("*.backup")
    assert SqliteStore(backup).revision() == "0001"
    with closing(sqlite3.connect(backup)) as copy:
        assert copy.execute("SELECT path, added_at FROM image").fetchall() == [
            ("a.jpg", "2026-01-02 03:04:05.000000" if databases.url_of(home) else "2026-01-02 03:04:05")
        ]


def test_a_schema_of_the_future_is_refused_with_both_versions(home: Path) -> None:
    catalog = created_catalog(home)
    fill(catalog)
    with catalog.writing() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '0999'"))
    with pytest.raises(CatalogTooNew, match=rf"schema 0999, .* up to {SCHEMA_REVISION}; update dino-search"):
        Catalog.open(home, url=databases.url_of(home))
    with catalog.reading() as session:
        assert revision_of(session.connection()) == "0999"
    assert count_images(catalog) == 3
