"""A catalog in an SQLite file, in WAL mode."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, text
from sqlalchemy.orm import Session

from dino_index.catalog.column_types import portable_json
from dino_index.catalog.storage_errors import BUSY_TIMEOUT_S, DATABASE_NAME, storage_errors
from dino_index.catalog.store import WRITE, Store


class SqliteStore(Store):
    """The file may be absent; `upgrade` makes it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.upgrade_lock = path.with_suffix(".upgrade-lock")
        self.place = str(path)
        self._engine: Engine | None = None

    @classmethod
    def in_home(cls, home: Path) -> SqliteStore:
        return cls(home / DATABASE_NAME)

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            self._engine = _create_engine(self.path)
        return self._engine

    def revision(self) -> str | None:
        if not self.path.is_file():
            return None
        with closing(sqlite3.connect(sqlite_uri(self.path), uri=True, timeout=BUSY_TIMEOUT_S)) as connection:
            has_schema = "SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'"
            if connection.execute(has_schema).fetchone() is None:
                return None
            row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        return str(row[0]) if row else None

    def errors(self) -> AbstractContextManager[None]:
        return storage_errors(self.path.parent)

    @contextmanager
    def upgrading(self) -> Iterator[Connection]:
        from filelock import FileLock

        with FileLock(self.upgrade_lock):
            # SQLite changes a table by dropping it after a copy, which enforced references would forbid.
            engine = _create_engine(self.path, enforce_references=False)
            try:
                with engine.connect().execution_options(**{WRITE: True}) as connection, connection.begin():
                    yield connection
            finally:
                engine.dispose()

    def back_up_schema(self, connection: Connection, revision: str) -> Path:
        backup = self.path.with_name(f"{self.path.name}.schema-{revision}.backup")
        partial = backup.with_suffix(f".{os.getpid()}.partial")
        copy_file(self.path, partial)
        os.replace(partial, backup)
        return backup

    def identity(self) -> str:
        return str(self.path.resolve())

    def snapshots_folder(self, home: Path) -> Path:
        return home / "snapshots"

    def integrity_problems(self, session: Session) -> list[str]:
        rows = [str(row) for row in session.scalars(text("PRAGMA integrity_check"))]
        rows += [f"broken reference in {table}" for table in self.broken_references(session.connection())]
        return [row for row in rows if row != "ok"]

    def broken_references(self, connection: Connection) -> list[str]:
        return [str(row[0]) for row in connection.exec_driver_sql("PRAGMA foreign_key_check")]

    def reclaim_space(self) -> None:
        with closing(sqlite3.connect(self.path, timeout=BUSY_TIMEOUT_S)) as connection:
            connection.execute("VACUUM")
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        if self._engine is not None:
            self._engine.dispose()


def copy_file(source: Path, target: Path) -> None:
    """Copies an SQLite database as of one moment, while others may be writing it."""
    with (
        closing(sqlite3.connect(sqlite_uri(source), uri=True, timeout=BUSY_TIMEOUT_S)) as reading,
        closing(sqlite3.connect(target)) as writing,
    ):
        reading.backup(writing)


def sqlite_uri(path: Path) -> str:
    """The file as SQLite is to open it.

    To read in WAL mode, SQLite creates files beside the database, unless it is told that nobody can write. On a
    medium that is mounted read-only that is so, once no changes wait in the log that a killed process left behind.
    """
    if hasattr(os, "statvfs") and os.statvfs(path.parent).f_flag & os.ST_RDONLY:
        log = path.with_name(f"{path.name}-wal")
        if not log.exists() or log.stat().st_size == 0:
            return f"{path.as_uri()}?immutable=1"
    return path.as_uri()


def _create_engine(path: Path, *, enforce_references: bool = True) -> Engine:
    url = URL.create("sqlite", database=sqlite_uri(path), query={"uri": "true"})
    engine = create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_S}, json_serializer=portable_json)

    # The driver would begin transactions late and never for reads; beginning them ourselves gives a read the same
    # state throughout, and makes a writer wait at its start instead of failing in its middle.
    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:
        connection.isolation_level = None
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute(f"PRAGMA foreign_keys = {'ON' if enforce_references else 'OFF'}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        write = connection.get_execution_options().get(WRITE, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine
