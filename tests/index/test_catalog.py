from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, func, select

from dino_index.catalog import Base, Catalog, CollectionRow, ImageRow, ModelRow, SourceRow
from dino_index.catalog.database import DATABASE_NAME, MIGRATIONS, upgrade
from dino_index.catalog.schema import SCHEMA_REVISION
from dino_index.errors import CatalogError, CatalogTooNew, CatalogUnavailable, StorageFull
from sample_collections import open_catalog

NEXT = f"{int(SCHEMA_REVISION) + 1:04}"


def created(home: Path) -> Catalog:
    catalog = Catalog.open(home, create=True)
    assert catalog is not None
    return catalog


def fill(catalog: Catalog, num_images: int = 3) -> None:
    with catalog.writing() as session:
        session.add(ModelRow(id=1, fingerprint="f" * 64, name="m", dim=2, config={"a": [1, None]}))
        session.flush()
        session.add(CollectionRow(id=1, name="default", model_id=1))
        session.flush()
        session.add(SourceRow(id=1, collection_id=1, path="/photos"))
        session.flush()
        session.add_all(an_image(f"{number}.jpg") for number in range(num_images))


def an_image(path: str) -> ImageRow:
    return ImageRow(collection_id=1, source_id=1, path=path, size=1, mtime_ns=2, status="ok", generation=1)


def count_images(catalog: Catalog) -> int:
    with catalog.reading() as session:
        return session.scalars(select(func.count()).select_from(ImageRow)).one()


# --- opening


def test_nothing_is_made_unless_asked(tmp_path: Path) -> None:
    assert Catalog.open(tmp_path / "home") is None
    assert not (tmp_path / "home").exists()


def test_a_new_catalog_has_the_present_schema_in_wal_mode(home: Path) -> None:
    catalog = created(home)
    assert count_images(catalog) == 0
    with closing(sqlite3.connect(catalog.path)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("SELECT version_num FROM alembic_version").fetchone() == (SCHEMA_REVISION,)
    assert not list(home.glob("*.backup"))


@pytest.mark.parametrize("name", ["100 %?x=1&y#frag", "Grüße 写真", "a;b'\"", "caf\udce9", "deep/er"])
def test_a_home_may_have_any_name(tmp_path: Path, name: str) -> None:
    try:
        (tmp_path / name).mkdir(parents=True)
    except OSError:
        pytest.skip("this file system refuses the name")
    fill(created(tmp_path / name))
    assert count_images(open_catalog(tmp_path / name)) == 3
    assert (tmp_path / name / DATABASE_NAME).stat().st_size > 0


def test_many_processes_may_create_the_catalog_at_once(home: Path) -> None:
    script = (
        "import sys; from dino_index.catalog import Catalog; from sqlalchemy import text\n"
        "with Catalog.open(sys.argv[1], create=True).reading() as s: s.execute(text('SELECT * FROM image'))"
    )
    running = [subprocess.Popen([sys.executable, "-c", script, str(home)]) for _ in range(3)]
    assert [process.wait(timeout=60) for process in running] == [0, 0, 0]


# --- transactions


def test_what_fails_in_the_middle_of_writing_leaves_nothing(home: Path) -> None:
    catalog = created(home)
    fill(catalog)

    def write_half() -> None:
        with catalog.writing() as session:
            session.add(an_image("new.jpg"))
            session.flush()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert count_images(catalog) == 3


def test_a_reader_sees_one_state_while_another_process_commits(home: Path) -> None:
    catalog = created(home)
    fill(catalog)
    count = select(func.count()).select_from(ImageRow)
    script = (
        "import sqlite3, sys; connection = sqlite3.connect(sys.argv[1]);"
        "connection.execute('DELETE FROM image'); connection.commit()"
    )
    with catalog.reading() as session:
        before = session.scalars(count).one()
        subprocess.run([sys.executable, "-c", script, str(catalog.path)], check=True, timeout=60)
        assert (before, session.scalars(count).one()) == (3, 3)
    assert count_images(catalog) == 0


def test_a_second_writer_waits_and_sees_what_the_first_wrote(home: Path) -> None:
    catalog = created(home)
    fill(catalog)
    started, seen = threading.Event(), []

    def write() -> None:
        started.set()
        with open_catalog(home).writing() as session:
            seen.append(session.scalars(select(func.count()).select_from(ImageRow)).one())
            session.add(an_image("second.jpg"))

    with catalog.writing() as session:
        session.connection()  # the transaction begins with its first statement
        thread = threading.Thread(target=write)
        thread.start()
        assert started.wait(10)
        session.add(an_image("first.jpg"))
    thread.join(timeout=60)
    assert (seen, count_images(catalog)) == ([4], 5)


def test_references_are_enforced(home: Path) -> None:
    catalog = created(home)
    with pytest.raises(Exception, match="FOREIGN KEY"), catalog.writing() as session:
        session.add(an_image("a.jpg"))


def test_an_id_is_never_used_again(home: Path) -> None:
    catalog = created(home)
    fill(catalog)
    with catalog.writing() as session:
        last = session.scalars(select(func.max(ImageRow.id))).one()
        session.delete(session.get_one(ImageRow, last))
    with catalog.writing() as session:
        row = an_image("new.jpg")
        session.add(row)
        session.flush()
        assert row.id > last


# --- schema and migrations


def migrations_with(folder: Path, body: str) -> Path:
    """The migrations as shipped, and one more, NEXT, that does what `body` says."""
    shutil.copytree(MIGRATIONS, folder)
    revisions = f"revision = '{NEXT}'\ndown_revision = '{SCHEMA_REVISION}'\n"
    script = "import sqlalchemy as sa\nfrom alembic import op\n" + revisions
    indented = "\n".join(f"    {line}" for line in body.splitlines())
    (folder / "versions" / f"{NEXT}_next.py").write_text(f"{script}def upgrade():\n{indented}\n")
    return folder


def test_models_and_migrations_agree(home: Path) -> None:
    catalog = created(home)
    engine = create_engine(f"sqlite:///{catalog.path}")
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        differences = compare_metadata(context, Base.metadata)
    engine.dispose()
    assert differences == []


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
def test_an_upgrade_keeps_all_data_and_a_copy_of_the_old_file(home: Path, tmp_path: Path, body: str) -> None:
    catalog = created(home)
    fill(catalog)
    catalog.close()
    backup = upgrade(catalog.path, migrations_with(tmp_path / "migrations", body), NEXT)
    assert backup is not None
    for path, revision in ((backup, SCHEMA_REVISION), (catalog.path, NEXT)):
        with closing(sqlite3.connect(path)) as connection:
            assert connection.execute("SELECT version_num FROM alembic_version").fetchone() == (revision,)
            names = connection.execute("SELECT path FROM image ORDER BY id").fetchall()
            assert names == [("0.jpg",), ("1.jpg",), ("2.jpg",)]
            assert connection.execute("SELECT name, model_id FROM collection").fetchall() == [("default", 1)]
            assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


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
def test_a_migration_that_fails_leaves_the_file_as_it_was(home: Path, tmp_path: Path, body: str) -> None:
    catalog = created(home)
    fill(catalog)
    catalog.close()
    with pytest.raises((RuntimeError, CatalogError), match=r"^stopped$|broken reference in source"):
        upgrade(catalog.path, migrations_with(tmp_path / "migrations", body), NEXT)
    assert count_images(open_catalog(home)) == 3


def test_an_upgrade_is_made_once(home: Path, tmp_path: Path) -> None:
    catalog = created(home)
    migrations = migrations_with(tmp_path / "migrations", "op.add_column('image', sa.Column('note', sa.Text()))")
    assert upgrade(catalog.path, migrations, NEXT) is not None
    assert upgrade(catalog.path, migrations, NEXT) is None


def test_a_schema_of_the_future_is_refused_with_both_versions(home: Path) -> None:
    catalog = created(home)
    catalog.close()
    with closing(sqlite3.connect(catalog.path)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '0999'")
        connection.commit()
    before = catalog.path.read_bytes()
    with pytest.raises(CatalogTooNew, match=rf"schema 0999, .* up to {SCHEMA_REVISION}; update dino-search"):
        Catalog.open(home)
    assert catalog.path.read_bytes() == before


# --- damage and other trouble


def test_a_file_that_is_no_database_is_called_damaged(home: Path) -> None:
    home.mkdir()
    (home / DATABASE_NAME).write_bytes(b"this is no database, however it is called" * 100)
    with pytest.raises(CatalogUnavailable, match=r"catalog\.sqlite3 is damaged .* restore a backup"):
        Catalog.open(home)


def test_a_database_with_overwritten_pages_is_called_damaged(home: Path) -> None:
    catalog = created(home)
    fill(catalog, 3000)
    catalog.reclaim_space()
    catalog.close()
    data = bytearray(catalog.path.read_bytes())
    data[8192:-4096] = b"\xa5" * (len(data) - 12288)
    catalog.path.write_bytes(data)

    def read_all() -> None:
        with open_catalog(home).reading() as session:
            session.scalars(select(ImageRow)).all()

    with pytest.raises(CatalogUnavailable, match="damaged"):
        read_all()


def test_a_home_that_is_a_file_is_refused(home: Path) -> None:
    home.write_text("not a folder")
    with pytest.raises(CatalogUnavailable, match="must be a folder"):
        Catalog.open(home, create=True)


def test_a_full_disk_is_called_so(home: Path) -> None:
    catalog = created(home)
    fill(catalog)

    def write_too_much() -> None:
        with catalog.writing() as session:
            num_pages = session.connection().exec_driver_sql("PRAGMA page_count").scalar_one()
            session.connection().exec_driver_sql(f"PRAGMA max_page_count = {num_pages}")
            session.add_all(an_image(f"{number}" * 50) for number in range(1000))

    with pytest.raises(StorageFull, match="what was committed before is intact"):
        write_too_much()
    assert count_images(open_catalog(home)) == 3
