"""Opening the catalog: engine, transactions, schema upgrades, and the database's errors in our own words."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import URL, Engine, create_engine, event, text
from sqlalchemy.exc import DatabaseError, OperationalError
from sqlalchemy.orm import Session

from dino_index.catalog.schema import SCHEMA_REVISION
from dino_index.errors import CatalogError, CatalogTooNew, CatalogUnavailable, StorageFull

DATABASE_NAME = "catalog.sqlite3"
MIGRATIONS = Path(__file__).with_name("migrations")

_T = TypeVar("_T")

_BUSY_TIMEOUT_S = 120
_MAX_BOUND_PARAMETERS = 500
_WRITE = "dino_index_write"


class Catalog:
    """The catalog of one home folder. Safe to use from several processes; sessions are for one thread each."""

    def __init__(self, home: Path, engine: Engine) -> None:
        self.home = home
        self._engine = engine

    @classmethod
    def open(cls, home: str | Path, *, create: bool = False) -> Catalog | None:
        """The catalog in `home`, brought to this version's schema after a backup copy of the file.

        create: make it when there is none; otherwise None is returned then.
        Raises CatalogUnavailable, CatalogTooNew, StorageFull.
        """
        home = Path(home).expanduser().absolute()
        path = home / DATABASE_NAME
        with storage_errors(home):
            if not path.is_file() and not create:
                return None
            home.mkdir(parents=True, exist_ok=True)
            if _revision(path) != SCHEMA_REVISION:
                upgrade(path)
            engine = _create_engine(path)
            return cls(home, engine)

    @property
    def path(self) -> Path:
        """The SQLite file."""
        return self.home / DATABASE_NAME

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A session in which every query sees the same state, whatever other processes commit meanwhile."""
        with storage_errors(self.home), Session(self._engine) as session, session.begin():
            yield session

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """A session whose changes are committed together at the end, or not at all. Waits for other writers."""
        with storage_errors(self.home), self._engine.connect() as connection:
            connection = connection.execution_options(**{_WRITE: True})
            with Session(connection) as session, session.begin():
                yield session

    def integrity_problems(self) -> list[str]:
        """What the database itself finds wrong with its file; empty when it is sound."""
        with self.reading() as session:
            rows = [str(row) for row in session.scalars(text("PRAGMA integrity_check"))]
            rows += [f"broken reference in {row[0]}" for row in session.execute(text("PRAGMA foreign_key_check"))]
        return [row for row in rows if row != "ok"]

    def reclaim_space(self) -> None:
        """Gives pages of deleted rows back to the file system."""
        with storage_errors(self.home), closing(sqlite3.connect(self.path, timeout=_BUSY_TIMEOUT_S)) as connection:
            connection.execute("VACUUM")
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        self._engine.dispose()


def bound_parts(values: Sequence[_T]) -> list[Sequence[_T]]:
    """The values in runs that are short enough for one IN clause."""
    return [values[begin : begin + _MAX_BOUND_PARAMETERS] for begin in range(0, len(values), _MAX_BOUND_PARAMETERS)]


def upgrade(path: Path, migrations: Path = MIGRATIONS, revision: str = SCHEMA_REVISION) -> Path | None:
    """Creates the database file or migrates it to `revision`; returns the backup copy that was made, if any.

    One process upgrades while others wait. A migration that fails leaves the file as it was.
    """
    # Both cost import time that only a first run or an upgrade should pay.
    from alembic import command
    from alembic.config import Config
    from filelock import FileLock

    with FileLock(path.with_suffix(".upgrade-lock")):
        found = _revision(path)
        if found == revision:
            return None
        known = {script.name.split("_")[0] for script in (migrations / "versions").glob("*.py")}
        if found is not None and found not in known:
            raise CatalogTooNew(
                f"{path} has schema {found}, and this version knows schemas up to {revision}; "
                "update dino-search, or use another --home"
            )
        backup = _back_up(path, found) if found is not None else None
        config = Config()
        config.set_main_option("script_location", str(migrations).replace("%", "%%"))
        # SQLite changes a table by dropping it after a copy, which enforced references would forbid.
        engine = _create_engine(path, enforce_references=False)
        try:
            with engine.connect().execution_options(**{_WRITE: True}) as connection, connection.begin():
                config.attributes["connection"] = connection
                command.upgrade(config, revision)
                if broken := connection.exec_driver_sql("PRAGMA foreign_key_check").fetchone():
                    raise CatalogError(
                        f"migrating {path} to schema {revision} would leave a broken reference in {broken[0]}; "
                        "it stays as it was; use the version before, or restore a backup of it"
                    )
        finally:
            engine.dispose()
        return backup


def _back_up(path: Path, revision: str) -> Path:
    backup = path.with_name(f"{path.name}.schema-{revision}.backup")
    partial = backup.with_suffix(f".{os.getpid()}.partial")
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(partial)) as target:
        source.backup(target)
    os.replace(partial, backup)
    return backup


def _revision(path: Path) -> str | None:
    """The schema revision of the file; None for a file that is not there or holds no schema yet."""
    if not path.is_file():
        return None
    with closing(sqlite3.connect(_sqlite_uri(path), uri=True, timeout=_BUSY_TIMEOUT_S)) as connection:
        has_schema = "SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'"
        if connection.execute(has_schema).fetchone() is None:
            return None
        row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    return str(row[0]) if row else None


def _create_engine(path: Path, *, enforce_references: bool = True) -> Engine:
    url = URL.create("sqlite", database=_sqlite_uri(path), query={"uri": "true"})
    engine = create_engine(url, connect_args={"timeout": _BUSY_TIMEOUT_S})

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
        write = connection.get_execution_options().get(_WRITE, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine


def _sqlite_uri(path: Path) -> str:
    """The file as SQLite is to open it.

    To read in WAL mode, SQLite creates files beside the database, unless it is told that nobody can write. On a
    medium that is mounted read-only that is so, once no changes wait in the log that a killed process left behind.
    """
    if hasattr(os, "statvfs") and os.statvfs(path.parent).f_flag & os.ST_RDONLY:
        log = path.with_name(f"{path.name}-wal")
        if not log.exists() or log.stat().st_size == 0:
            return f"{path.as_uri()}?immutable=1"
    return path.as_uri()


@contextmanager
def storage_errors(home: Path) -> Iterator[None]:
    """Translates errors of the database and of files under `home`.

    Raises CatalogUnavailable, StorageFull; what is no storage problem passes unchanged.
    """
    try:
        yield
    except (DatabaseError, sqlite3.DatabaseError, OSError) as error:
        translated = _translated(error, home)
        if translated is None:
            raise
        raise translated from error


def _translated(error: BaseException, home: Path) -> CatalogError | None:
    """Our error for one of the database or the file system; None where it is no storage problem."""
    original = getattr(error, "orig", None) or error
    message, number = str(original), getattr(error, "errno", None)
    # A full disk may first refuse the file through which SQLite's readers and writers agree, in other words.
    is_full = "disk is full" in message or getattr(original, "sqlite_errorname", "") == "SQLITE_IOERR_SHMSIZE"
    if number in (errno.ENOSPC, errno.EDQUOT) or is_full:
        free = shutil.disk_usage(home if home.exists() else home.parent).free
        return StorageFull(
            f"no space left in {home} ({free / 1e6:.0f} MB free); what was committed before is intact: "
            "free some space, or use another --home, and run the same command again"
        )
    if "unable to open" in message:
        return CatalogUnavailable(
            f"{home} cannot be written, which even reading a catalog takes ({message}); "
            "choose a writable folder with --home"
        )
    if number in (errno.EACCES, errno.EPERM, errno.EROFS) or any(
        words in message for words in ("readonly", "authorization denied")
    ):
        return CatalogUnavailable(f"{home} cannot be written ({message}); choose a writable folder with --home")
    if number in (errno.ENOTDIR, errno.EEXIST):
        return CatalogUnavailable(f"the home {home} must be a folder, found something else ({message})")
    if isinstance(error, OperationalError | sqlite3.OperationalError) and "locked" in message:
        return CatalogUnavailable(
            f"{home} stayed locked by another process for {_BUSY_TIMEOUT_S} s; wait for it to end, then run again"
        )
    if "malformed" in message or "not a database" in message:
        return CatalogUnavailable(f"{home / DATABASE_NAME} is damaged ({message}); restore a backup of it")
    if "disk I/O error" in message:
        return CatalogUnavailable(f"the storage under {home} failed ({message}); what was committed before is intact")
    return None
