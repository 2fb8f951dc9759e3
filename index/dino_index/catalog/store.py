"""Where a catalog's tables live: what differs between databases, behind one interface; and upgrades of the schema."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from pathlib import Path

from sqlalchemy import Connection, Engine, inspect, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from dino_index.catalog.schema import SCHEMA_REVISION
from dino_index.errors import CatalogError, CatalogTooNew, CatalogUnavailable

MIGRATIONS = Path(__file__).with_name("migrations")

# An execution option of connections whose transactions change something.
WRITE = "dino_index_write"


class Store(ABC):
    """A database that holds, or is to hold, the tables of one catalog. Opening one connects to nothing."""

    place: str
    """Where it is, for messages; without any password."""

    @property
    @abstractmethod
    def engine(self) -> Engine:
        """Each transaction sees one state, whatever others commit meanwhile.

        Those of connections with the execution option `WRITE` follow one after the other, over all processes; others
        only read.
        """

    @abstractmethod
    def revision(self) -> str | None:
        """The schema's revision; None where there is no schema yet. Raises CatalogUnavailable."""

    @abstractmethod
    def errors(self) -> AbstractContextManager[None]:
        """Translates the database's errors into CatalogErrors; what is no trouble of it passes unchanged."""

    @abstractmethod
    def upgrading(self) -> AbstractContextManager[Connection]:
        """A transaction in which tables may be changed, committed at the end; one process at a time."""

    @abstractmethod
    def back_up_schema(self, connection: Connection, revision: str) -> Path:
        """Copies everything into a file before it is migrated from `revision`; the file."""

    @abstractmethod
    def identity(self) -> str:
        """What tells this database from others, under whichever name it is reached."""

    @abstractmethod
    def snapshots_folder(self, home: Path) -> Path:
        """Where a home keeps the snapshots of this database's collections, apart from those of other databases."""

    @abstractmethod
    def integrity_problems(self, session: Session) -> list[str]:
        """What the database itself finds wrong; empty when it is sound."""

    @abstractmethod
    def reclaim_space(self) -> None:
        """Frees the room of deleted rows."""

    @abstractmethod
    def broken_references(self, connection: Connection) -> list[str]:
        """Tables with rows that refer to rows which do not exist."""

    @abstractmethod
    def close(self) -> None:
        """Ends its connections."""


def revision_of(connection: Connection) -> str | None:
    """The schema's revision as a connection sees it; None where there is no schema yet."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


def known_revisions(migrations: Path = MIGRATIONS) -> set[str]:
    """The schema revisions that this version can migrate from, and its own."""
    return {script.name.split("_")[0] for script in (migrations / "versions").glob("*.py")}


def upgrade(store: Store, migrations: Path = MIGRATIONS, revision: str = SCHEMA_REVISION) -> Path | None:
    """Creates the schema or migrates it to `revision`; returns the backup copy that was made, if any.

    One process upgrades while others wait. A migration that fails leaves everything as it was.
    Raises CatalogTooNew, CatalogUnavailable, StorageFull.
    """
    # Both cost import time that only a first run or an upgrade should pay.
    from alembic import command
    from alembic.config import Config

    with store.errors(), store.upgrading() as connection:
        found = revision_of(connection)
        if found == revision:
            return None
        if found is not None and found not in known_revisions(migrations):
            raise _unknown_schema(store, connection, found, revision)
        backup = store.back_up_schema(connection, found) if found is not None else None
        config = Config()
        config.set_main_option("script_location", str(migrations).replace("%", "%%"))
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, revision)
            if broken := store.broken_references(connection):
                raise _would_break(store, revision, broken[0])
        except IntegrityError as error:
            raise _would_break(store, revision, str(error.orig).splitlines()[0]) from error
        return backup


def _unknown_schema(store: Store, connection: Connection, found: str, revision: str) -> CatalogError:
    if not inspect(connection).has_table("embedding"):
        return CatalogUnavailable(
            f"{store.place} holds the tables of another program (their revision is {found}); "
            "use a database, or a schema of it, that is empty"
        )
    return CatalogTooNew(
        f"{store.place} has schema {found}, and this version knows schemas up to {revision}; "
        "update dino-search, or use another --home"
    )


def _would_break(store: Store, revision: str, where: str) -> CatalogError:
    return CatalogError(
        f"migrating {store.place} to schema {revision} would leave a broken reference in {where}; "
        "it stays as it was; use the version before, or restore a backup of it"
    )
