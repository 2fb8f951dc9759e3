"""Portable copies of a catalog, and catalogs from them.

A backup is one SQLite file with the schema of its time, whichever database the catalog is in.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, delete, insert, select, update

from dino_index.catalog.copying import (
    copy_rows,
    count_rows,
    delete_rows,
    file_problems,
    write_file_copy,
    write_portable_copy,
)
from dino_index.catalog.database import Catalog
from dino_index.catalog.schema import DROPPED, SCHEMA_REVISION, CollectionRow, JobRow, StoredVectorsRow
from dino_index.catalog.sqlite import SqliteStore, copy_file
from dino_index.catalog.store import known_revisions, revision_of, upgrade
from dino_index.errors import (
    BackupUnusable,
    CatalogDamaged,
    CatalogError,
    CatalogNotEmpty,
    CatalogTooNew,
    OutputExists,
    OutputUnwritable,
)

_SQLITE_FILES = ("", "-wal", "-shm")


@dataclass(frozen=True, kw_only=True)
class Replacement:
    """What took the place of a catalog's contents."""

    rows: dict[str, int]
    """Number of rows by table."""
    kept: Path | None
    """The file that holds what was there before; None where nothing was."""


def back_up(catalog: Catalog, path: Path, *, force: bool = False) -> dict[str, int]:
    """Writes a checked copy of the whole catalog as of one moment, while others work on it; number of rows by table.

    force: overwrite an existing file.
    Raises OutputExists, OutputUnwritable, CatalogErrors.
    """
    path = path.absolute()
    if path.exists() and not force:
        raise OutputExists(f"{path} exists already; choose another name or add --force to overwrite it")
    if isinstance(catalog.store, SqliteStore) and path.exists() and path.samefile(catalog.path):
        raise OutputExists(f"{path} is the catalog itself; choose another name")
    with _unwritable(path):
        tempfile.TemporaryFile(dir=path.parent).close()
        _write_copy(catalog, path)
    with closing(sqlite3.connect(path)) as connection:
        names = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        ours = [name for name in names if name not in ("alembic_version", "sqlite_sequence")]
        return {name: connection.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0] for name in ours}


def restore(file: Path, home: Path, url: str | None = None, *, force: bool = False) -> Replacement:
    """Fills the catalog of a home from a backup, all at once or not at all; an older one is migrated.

    force: replace a catalog that holds something, or is damaged; what was there is kept as a file in the home.
    Raises BackupUnusable, CatalogTooNew, CatalogNotEmpty, CatalogErrors.
    """
    home = Path(home).expanduser().absolute()
    with _checked(file, home) as backup:
        try:
            with closing(_sound(home, url)) as target:
                return _fill(backup, target, force=force)
        except CatalogDamaged:
            if not force or url is not None:
                raise
        damaged = _set_aside(home)
        with closing(_sound(home, url)) as target:
            return Replacement(rows=_fill(backup, target, force=force).rows, kept=damaged)


def copy_catalog(source: Catalog, home: Path, url: str | None = None, *, force: bool = False) -> Replacement:
    """Fills the catalog of a home, or of a database by URL, from another one, which stays.

    force: as for `restore`. Raises CatalogNotEmpty, CatalogErrors.
    """
    with closing(_sound(Path(home).expanduser().absolute(), url)) as target:
        if source.identity == target.identity:
            raise CatalogError(f"{target.store.place} is the catalog that is to be copied; name another one")
        return _fill(source, target, force=force)


def _fill(source: Catalog, target: Catalog, *, force: bool) -> Replacement:
    with source.reading() as reading, target.writing() as writing:
        connection = writing.connection()
        found = count_rows(connection)
        found.pop(StoredVectorsRow.__tablename__)
        stored = [dict(row) for row in connection.execute(select(StoredVectorsRow.__table__)).mappings()]
        kept = None
        if any(found.values()):
            if not force:
                contents = f"{found['image']} images in {found['collection']} collections"
                for table, what in (("verdict", "verdicts"), ("api_key", "API keys"), ("job", "jobs")):
                    contents += f" and {found[table]} {what}" if found[table] else ""
                raise CatalogNotEmpty(
                    f"{target.store.place} holds {contents} already; add --force to replace them "
                    "(a copy of them is kept)"
                )
            # Nobody else can write meanwhile.
            kept = target.home / f"catalog.before-{_now()}.backup"
            target.home.mkdir(parents=True, exist_ok=True)
            _write_copy(target, kept)
            generations = dict(connection.execute(select(CollectionRow.id, CollectionRow.generation)).all())
            delete_rows(connection)
        else:
            generations = {}
        rows = copy_rows(reading.connection(), connection)
        _disown_vectors(connection, stored)
        _advance_beyond(connection, generations)
        _end_jobs(connection)
    return Replacement(rows=rows, kept=kept)


def _advance_beyond(connection: Connection, generations: dict[int, int]) -> None:
    """Generations that were never there before, so that whoever has the collections loaded notices."""
    highest = max(generations.values(), default=-1)
    rows = connection.execute(select(CollectionRow.id, CollectionRow.generation)).all()
    for collection_id, generation in rows if generations else ():
        advanced = max(generation, highest) + 1
        changed = update(CollectionRow).where(CollectionRow.id == collection_id)
        connection.execute(changed.values(generation=advanced))


def _disown_vectors(connection: Connection, before: list[dict[str, Any]]) -> None:
    """What servers hold for the source stays its own; what they held for the target is of no use any more."""
    connection.execute(delete(StoredVectorsRow))
    if before:
        connection.execute(insert(StoredVectorsRow), [row | {"state": DROPPED} for row in before])


def _end_jobs(connection: Connection) -> None:
    """Jobs that were going on where the rows come from do not begin again here."""
    going_on = update(JobRow).where(JobRow.status.in_(("queued", "running")))
    connection.execute(
        going_on.values(
            status="failed", error_code="copied", owner=None, ended_at=datetime.now(UTC),
            error_message="it had not ended when the catalog was copied to here; ask for it again",
        )
    )  # fmt: skip


def _write_copy(catalog: Catalog, path: Path) -> None:
    if isinstance(catalog.store, SqliteStore):
        write_file_copy(catalog.path, path)
        return
    with catalog.store.errors(), catalog.store.engine.connect() as connection, connection.begin():
        revision = revision_of(connection)
        assert revision == SCHEMA_REVISION, revision
        write_portable_copy(connection, revision, path)


@contextmanager
def _checked(file: Path, home: Path) -> Iterator[Catalog]:
    """The catalog in a copy of a backup file, sound and of the present schema; the file itself is not touched."""
    try:
        with open(file, "rb") as opened:
            is_sqlite = opened.read(16) == b"SQLite format 3\0"
    except OSError as error:
        raise BackupUnusable(
            f"{file} cannot be read ({error.strerror}); name a file that catalog backup wrote"
        ) from error
    if not is_sqlite:
        raise BackupUnusable(f"{file} is no backup of a catalog: expected an SQLite file, found something else")
    with _unwritable(home):
        home.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix="restoring-", dir=home)
    with folder as name:
        store = SqliteStore(Path(name) / "catalog.sqlite3")
        try:
            copy_file(file.absolute(), store.path)
        except sqlite3.Error as error:
            raise BackupUnusable(f"{file} is damaged ({error}); restore another backup") from error
        if problems := file_problems(store.path):
            raise BackupUnusable(f"{file} is damaged ({problems[0]}); restore another backup")
        found = store.revision()
        if found is None:
            raise BackupUnusable(f"{file} is an SQLite file, but no backup of a catalog")
        if found not in known_revisions():
            raise CatalogTooNew(
                f"{file} has schema {found}, and this version knows schemas up to {SCHEMA_REVISION}; update dino-search"
            )
        upgrade(store)
        with closing(Catalog(Path(name), store)) as catalog:
            yield catalog


def _sound(home: Path, url: str | None) -> Catalog:
    """The catalog of a home, made where there is none. Raises CatalogDamaged when its pages contradict themselves."""
    catalog = Catalog.open(home, create=True, url=url)
    assert catalog is not None
    try:
        if isinstance(catalog.store, SqliteStore) and (problems := catalog.integrity_problems()):
            raise CatalogDamaged(
                f"{catalog.path} is damaged ({problems[0]}); restore a backup of it: "
                "dino-search catalog restore FILE --force"
            )
    except BaseException:
        catalog.close()
        raise
    return catalog


def _set_aside(home: Path) -> Path:
    """Renames the files of a damaged SQLite catalog; the new name of the first."""
    path = SqliteStore.in_home(home).path
    aside = path.with_name(f"catalog.damaged-{_now()}.sqlite3")
    for suffix in _SQLITE_FILES:
        file = path.with_name(path.name + suffix)
        if file.exists():
            os.replace(file, aside.with_name(aside.name + suffix))
    return aside


def _now() -> str:
    return datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")


@contextmanager
def _unwritable(path: Path) -> Iterator[None]:
    """Raises OutputUnwritable."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise OutputUnwritable(f"{path} cannot be written ({reason}); nothing was changed there") from error
