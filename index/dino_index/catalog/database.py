"""The catalog of a home: opening it, and transactions that all see, and leave, one consistent state."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from sqlalchemy.orm import Session

from dino_index.catalog.schema import SCHEMA_REVISION
from dino_index.catalog.sqlite import SqliteStore
from dino_index.catalog.storage_errors import DATABASE_NAME, storage_errors
from dino_index.catalog.store import MIGRATIONS, WRITE, Store, upgrade
from dino_index.errors import DatabaseAway

__all__ = ["DATABASE_NAME", "MIGRATIONS", "Catalog", "bound_parts", "open_store", "storage_errors", "upgrade"]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_MAX_BOUND_PARAMETERS = 500
# A server that restarts is back within seconds, one that another takes the place of within a minute.
_WAITS_S = (0.5, 1, 2, 4, 8, 15, 30)


class Catalog:
    """The catalog of one home folder. Safe to use from several processes; sessions are for one thread each."""

    def __init__(self, home: Path, store: Store, *, vectors_url: str | None = None) -> None:
        self.home = home
        """Keeps the files: snapshots, models, backups; and the tables, where they are in SQLite."""
        self.store = store
        self.vectors_url = vectors_url
        """The server that vectors are searched by; None for snapshots in the home."""

    @classmethod
    def open(
        cls, home: str | Path, *, create: bool = False, url: str | None = None, vectors_url: str | None = None
    ) -> Catalog | None:
        """The catalog in `home`, brought to this version's schema after a backup copy.

        create: make it when there is none; otherwise None is returned then.
        url: of the PostgreSQL database with the tables, `postgresql://user:password@host/database`; None for an
        SQLite file in `home`.
        vectors_url: of the Milvus server that vectors are searched by, `milvus+http://user:password@host:port?db=NAME`;
        None for snapshots in `home`.
        Raises CatalogUnavailable, CatalogTooNew, StorageFull.
        """
        home = Path(home).expanduser().absolute()
        with ExitStack() as on_failure:
            store = open_store(home, url)
            on_failure.callback(store.close)
            on_failure.enter_context(store.errors())
            found = store.revision()
            if found is None and not create and not _is_empty_file(store):
                return None
            if found != SCHEMA_REVISION:
                home.mkdir(parents=True, exist_ok=True)
                upgrade(store)
            on_failure.pop_all()
        return cls(home, store, vectors_url=vectors_url)

    @property
    def path(self) -> Path:
        """The SQLite file."""
        assert isinstance(self.store, SqliteStore), "a catalog on a server is no file"
        return self.store.path

    @property
    def identity(self) -> str:
        """What tells this catalog from others, under whichever name its database is reached."""
        return self.store.identity()

    @property
    def snapshots_folder(self) -> Path:
        """Where this home keeps the snapshots of this catalog's collections."""
        return self.store.snapshots_folder(self.home)

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A session in which every query sees the same state, whatever other processes commit meanwhile."""
        with self.store.errors(), Session(self.store.engine) as session, session.begin():
            yield session

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """A session whose changes are committed together at the end, or not at all. Waits for other writers."""
        with self.store.errors(), self.store.engine.connect() as connection:
            connection = connection.execution_options(**{WRITE: True})
            with Session(connection) as session, session.begin():
                yield session

    def read(self, work: Callable[[Session], _T]) -> _T:
        """What `work` gives back of a `reading` session; see `outlast`."""

        def attempt() -> _T:
            with self.reading() as session:
                return work(session)

        return self.outlast(attempt)

    def write(self, work: Callable[[Session], _T]) -> _T:
        """What `work` gives back of a `writing` session; see `outlast`."""

        def attempt() -> _T:
            with self.writing() as session:
                return work(session)

        return self.outlast(attempt)

    def outlast(self, work: Callable[[], _T]) -> _T:
        """What `work` gives back, which is done again, after growing waits, while the database server is away.

        A commit whose confirmation was lost may have taken place: work must come to the same when it is done twice.
        Raises DatabaseAway when the server stays away for a minute.
        """
        for wait_s in _WAITS_S:
            try:
                return work()
            except DatabaseAway as error:
                logger.warning("%s; trying again in %s s", str(error).split(";")[0], wait_s)
                time.sleep(wait_s)
        return work()

    def integrity_problems(self) -> list[str]:
        """What the database itself finds wrong; empty when it is sound."""
        with self.reading() as session:
            return self.store.integrity_problems(session)

    def reclaim_space(self) -> None:
        """Gives the room of deleted rows back, as far as others who work on the database allow."""
        with self.store.errors():
            self.store.reclaim_space()

    def close(self) -> None:
        self.store.close()


def open_store(home: Path, url: str | None) -> Store:
    """The database that a home's catalog is in, or would be. Raises CatalogUnavailable for a URL of no use."""
    if url is None:
        return SqliteStore.in_home(home)
    # Costs the import of a driver that most do not have.
    from dino_index.catalog.postgresql import PostgresqlStore

    return PostgresqlStore(url, home)


def bound_parts(values: Sequence[_T]) -> list[Sequence[_T]]:
    """The values in runs that are short enough for one IN clause."""
    return [values[begin : begin + _MAX_BOUND_PARAMETERS] for begin in range(0, len(values), _MAX_BOUND_PARAMETERS)]


def _is_empty_file(store: Store) -> bool:
    """Whether the database's file is there; for one without a schema, as a killed first run leaves it."""
    return isinstance(store, SqliteStore) and store.path.is_file()
