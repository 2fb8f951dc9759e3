"""A catalog in an SQLite file: what is particular to it."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import select

from catalog_rows import an_image, count_images, fill
from databases import created_catalog, open_catalog
from dino_index.catalog import Catalog, ImageRow
from dino_index.catalog.backup import back_up, restore
from dino_index.catalog.database import DATABASE_NAME
from dino_index.errors import CatalogDamaged, CatalogTooNew, CatalogUnavailable, StorageFull


def test_the_file_is_in_wal_mode(home: Path) -> None:
    catalog = created_catalog(home)
    with closing(sqlite3.connect(catalog.path)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


@pytest.mark.parametrize("name", ["100 %?x=1&y#frag", "Grüße 写真", "a;b'\"", "caf\udce9", "deep/er"])
def test_a_home_may_have_any_name(tmp_path: Path, name: str) -> None:
    try:
        (tmp_path / name).mkdir(parents=True)
    except OSError:
        pytest.skip("this file system refuses the name")
    fill(created_catalog(tmp_path / name))
    assert count_images(open_catalog(tmp_path / name)) == 3
    assert (tmp_path / name / DATABASE_NAME).stat().st_size > 0


def test_a_schema_of_the_future_is_refused_without_touching_the_file(home: Path) -> None:
    catalog = created_catalog(home)
    catalog.close()
    with closing(sqlite3.connect(catalog.path)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '0999'")
        connection.commit()
    before = catalog.path.read_bytes()
    with pytest.raises(CatalogTooNew):
        Catalog.open(home)
    assert catalog.path.read_bytes() == before


# --- damage and other trouble


def test_a_file_that_is_no_database_is_called_damaged(home: Path) -> None:
    home.mkdir()
    (home / DATABASE_NAME).write_bytes(b"this is no database, however it is called" * 100)
    with pytest.raises(CatalogUnavailable, match=r"catalog\.sqlite3 is damaged .* restore a backup"):
        Catalog.open(home)


def test_a_database_with_overwritten_pages_is_called_damaged(home: Path) -> None:
    catalog = created_catalog(home)
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
    catalog = created_catalog(home)
    fill(catalog)

    def write_too_much() -> None:
        with catalog.writing() as session:
            num_pages = session.connection().exec_driver_sql("PRAGMA page_count").scalar_one()
            session.connection().exec_driver_sql(f"PRAGMA max_page_count = {num_pages}")
            session.add_all(an_image(f"{number}" * 50) for number in range(1000))

    with pytest.raises(StorageFull, match="what was committed before is intact"):
        write_too_much()
    assert count_images(open_catalog(home)) == 3


@pytest.mark.parametrize("damage", ["another file", "cut"])
def test_a_damaged_catalog_is_set_aside_and_restored_when_told(home: Path, tmp_path: Path, damage: str) -> None:
    catalog = created_catalog(home)
    fill(catalog, 300)
    back_up(catalog, tmp_path / "backup")
    catalog.close()
    content = catalog.path.read_bytes()[:-20000] if damage == "cut" else b"no database at all" * 1000
    catalog.path.write_bytes(content)
    with pytest.raises(CatalogDamaged, match="catalog restore"):
        restore(tmp_path / "backup", home)
    assert catalog.path.read_bytes() == content
    done = restore(tmp_path / "backup", home, force=True)
    assert done.kept is not None
    assert done.kept.read_bytes() == content
    assert count_images(open_catalog(home)) == 300
