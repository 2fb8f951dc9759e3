"""What SQLite and the file system report, in our own words."""

from __future__ import annotations

import errno
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy.exc import DatabaseError, OperationalError

from dino_index.errors import CatalogDamaged, CatalogError, CatalogUnavailable, StorageFull

DATABASE_NAME = "catalog.sqlite3"
BUSY_TIMEOUT_S = 120


@contextmanager
def storage_errors(home: Path) -> Iterator[None]:
    """Translates errors of SQLite and of files under `home`.

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
        folder = next((folder for folder in (home, *home.parents) if folder.exists()), home)
        free = shutil.disk_usage(folder).free
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
            f"{home} stayed locked by another process for {BUSY_TIMEOUT_S} s; wait for it to end, then run again"
        )
    if "malformed" in message or "not a database" in message:
        return CatalogDamaged(
            f"{home / DATABASE_NAME} is damaged ({message}); restore a backup of it: "
            "dino-search catalog restore FILE --force"
        )
    if "disk I/O error" in message:
        return CatalogUnavailable(f"the storage under {home} failed ({message}); what was committed before is intact")
    return None
