"""Copying a catalog's rows from one database to another, whichever they are."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, MetaData, Table, func, select, text

from dino_index.catalog.bulk import insert_rows
from dino_index.catalog.column_types import portable_text
from dino_index.catalog.sqlite import SqliteStore, copy_file
from dino_index.catalog.store import WRITE, upgrade
from dino_index.durable_files import sync_folder
from dino_index.errors import BackupUnusable

OWN_SETTING = "catalog"
"""Key of the setting that tells a database on a server from others; it stays where it is."""

_ROWS_PER_FETCH = 4096


def copy_rows(source: Connection, target: Connection) -> dict[str, int]:
    """Copies every row, ids included, into a catalog of the same revision without any; number of rows by table.

    Ids that the source has given away are never given away by the target, even those of rows that are gone.
    """
    counts = {}
    tables = tables_of(target)
    for table in tables_of(source).sorted_tables:
        counts[table.name] = 0
        result = source.execute(select(table), execution_options={"yield_per": _ROWS_PER_FETCH})
        for part in result.mappings().partitions():
            rows = [_portable(row) for row in part if not _is_own(table, row)]
            insert_rows(target, tables.tables[table.name], rows)
            counts[table.name] += len(rows)
    _raise_last_ids(target, _last_ids(source))
    return counts


def delete_rows(connection: Connection) -> None:
    """Empties a catalog. Ids stay given away."""
    for table in reversed(tables_of(connection).sorted_tables):
        rows = table.delete()
        connection.execute(rows.where(table.c.key != OWN_SETTING) if table.name == "setting" else rows)


def count_rows(connection: Connection) -> dict[str, int]:
    """Number of rows by table."""
    counts = {}
    for table in tables_of(connection).sorted_tables:
        rows = select(func.count()).select_from(table)
        rows = rows.where(table.c.key != OWN_SETTING) if table.name == "setting" else rows
        counts[table.name] = connection.execute(rows).scalar_one()
    return counts


def write_portable_copy(source: Connection, revision: str, path: Path) -> dict[str, int]:
    """Writes what `source` sees into one SQLite file, whole or not at all; number of rows by table.

    Raises OSError, sqlite3.Error.
    """
    with whole_file(path) as partial:
        store = SqliteStore(partial)
        try:
            upgrade(store, revision=revision)
            with store.engine.connect().execution_options(**{WRITE: True}) as target, target.begin():
                counts = copy_rows(source, target)
        finally:
            store.close()
            store.upgrade_lock.unlink(missing_ok=True)
    return counts


def write_file_copy(source: Path, path: Path) -> None:
    """The same from an SQLite file, page by page. Raises OSError, sqlite3.Error."""
    with whole_file(path) as partial:
        copy_file(source, partial)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name for an SQLite file that, once written and found sound, takes the place of `path`.

    Raises BackupUnusable for one that is not sound.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.unlink(missing_ok=True)
        yield partial
        with closing(sqlite3.connect(partial)) as connection:
            # One file, whatever was said to its original.
            connection.execute("PRAGMA journal_mode = DELETE")
        if problems := file_problems(partial):
            raise BackupUnusable(f"the copy for {path} is not sound ({problems[0]}); nothing was written")
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    finally:
        for suffix in ("", "-journal", "-wal", "-shm"):
            partial.with_name(partial.name + suffix).unlink(missing_ok=True)


def file_problems(path: Path) -> list[str]:
    """What SQLite finds wrong with a file; empty when it is sound."""
    try:
        with closing(sqlite3.connect(path)) as connection:
            found = [str(row[0]) for row in connection.execute("PRAGMA integrity_check")]
            found += [f"broken reference in {row[0]}" for row in connection.execute("PRAGMA foreign_key_check")]
    except sqlite3.DatabaseError as error:
        return [str(error)]
    return [problem for problem in found if problem != "ok"]


def tables_of(connection: Connection) -> MetaData:
    """The catalog's tables as the database has them: at an older revision they are not those of `schema`."""
    metadata = MetaData()
    metadata.reflect(connection)
    if "alembic_version" in metadata.tables:
        metadata.remove(metadata.tables["alembic_version"])
    return metadata


def _portable(row: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(name): portable_text(value) if isinstance(value, str) else value for name, value in row.items()}


def _is_own(table: Table, row: Mapping[Any, Any]) -> bool:
    return table.name == "setting" and row["key"] == OWN_SETTING


def _last_ids(connection: Connection) -> dict[str, int]:
    """The highest id that each table has given away."""
    if connection.dialect.name == "sqlite":
        rows = connection.exec_driver_sql("SELECT name, seq FROM sqlite_sequence").all()
        found = {str(name): int(seq) for name, seq in rows}
    else:
        found = {}
        for name, sequence in _sequences(connection):
            row = connection.exec_driver_sql(f"SELECT last_value, is_called FROM {sequence}").one()
            found[name] = int(row.last_value) if row.is_called else 0
    for table in tables_of(connection).sorted_tables:
        if "id" in table.c:
            highest = connection.execute(select(func.max(table.c.id))).scalar() or 0
            found[table.name] = max(found.get(table.name, 0), highest)
    return found


def _raise_last_ids(connection: Connection, wanted: Mapping[str, int]) -> None:
    before = _last_ids(connection)
    if connection.dialect.name == "sqlite":
        # Only tables that are to remember ids of rows that are gone have an entry, from their first row on.
        statement = text("UPDATE sqlite_sequence SET seq = :seq WHERE name = :name")
        missing = text(
            "INSERT INTO sqlite_sequence (name, seq) SELECT :name, :seq FROM sqlite_master "
            "WHERE name = :name AND sql LIKE '%AUTOINCREMENT%' "
            "AND NOT EXISTS (SELECT 1 FROM sqlite_sequence WHERE name = :name)"
        )
        for name, seq in wanted.items():
            values = {"name": name, "seq": max(seq, before.get(name, 0))}
            connection.execute(statement, values)
            connection.execute(missing, values)
        return
    for name, sequence in _sequences(connection):
        if last := max(wanted.get(name, 0), before[name]):
            connection.execute(
                text("SELECT setval(CAST(:sequence AS regclass), :last)"), {"sequence": sequence, "last": last}
            )


def _sequences(connection: Connection) -> list[tuple[str, str]]:
    """(table, name of the sequence that numbers its rows) of a PostgreSQL database."""
    names = [table.name for table in tables_of(connection).sorted_tables if "id" in table.c]
    found = []
    for name in names:
        sequence = connection.execute(text("SELECT pg_get_serial_sequence(:name, 'id')"), {"name": name}).scalar()
        if sequence is not None:
            found.append((name, str(sequence)))
    return found
