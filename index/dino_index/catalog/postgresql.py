"""A catalog in a PostgreSQL database, by URL."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from sqlalchemy import Connection, Engine, create_engine, event, insert, inspect, select
from sqlalchemy.exc import DBAPIError, DisconnectionError
from sqlalchemy.orm import Session

from dino_index.catalog.column_types import portable_json
from dino_index.catalog.copying import OWN_SETTING, tables_of, write_portable_copy
from dino_index.catalog.schema import Base, SettingRow
from dino_index.catalog.storage_errors import BUSY_TIMEOUT_S, storage_errors
from dino_index.catalog.store import WRITE, Store, revision_of
from dino_index.errors import CatalogDamaged, CatalogError, CatalogUnavailable, DatabaseAway, StorageFull

if TYPE_CHECKING:
    import psycopg

# An `@` or `/` in a password that is not written as %XX would make a part of it a host, which messages name.
_URL = re.compile(r"^postgres(?:ql)?(?:\+\w+)?://(?P<rest>(?:[^@/?#]*@)?[^@?#]*(?:\?.*)?)$")
# So that a server that vanished without a word is noticed within a minute; a URL may say otherwise.
_CONNECTION_DEFAULTS = {
    "connect_timeout": "10",
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "application_name": "dino-search",
}
_NO_DATABASE = "create it (createdb NAME), or correct the URL"
_NO_LOGIN = "correct user and password in the URL, or give the password in ~/.pgpass"
_MAX_IDLE_UNTRIED_S = 5
# What refuses a connection for good, in the server's own (English) words.
_REFUSALS = {
    "password authentication failed": _NO_LOGIN,
    "no password supplied": _NO_LOGIN,
    "authentication failed": _NO_LOGIN,
    "no pg_hba.conf entry": "let the server's pg_hba.conf admit this user from here",
    'role "': _NO_LOGIN,
    'database "': _NO_DATABASE,
    "permission denied for database": "let the owner run: GRANT CONNECT, CREATE ON DATABASE ... TO ...",
}
_RIGHTS = "let its owner run: GRANT USAGE, CREATE ON SCHEMA ... TO ... and grant all rights on the tables in it"


class PostgresqlStore(Store):
    """A database on a server; its tables lie in the first schema of the connection's search path."""

    def __init__(self, url: str, home: Path) -> None:
        """home: takes the copies that are made before migrations.

        Raises CatalogUnavailable without psycopg and for a URL that makes no sense.
        """
        try:
            import psycopg
            from psycopg.conninfo import conninfo_to_dict
        except ImportError as error:
            raise CatalogUnavailable(
                "a catalog on PostgreSQL needs psycopg; run: pip install 'dino-search[distributed]'"
            ) from error
        given = _parameters_of(url, conninfo_to_dict, psycopg.Error)
        defaults = dict(_CONNECTION_DEFAULTS)
        if "," in str(given.get("host", given.get("hostaddr", ""))):
            # Of several servers the one that takes changes, which after a failover is another one.
            defaults |= {"target_session_attrs": "read-write", "connect_timeout": "5"}
        self._parameters: dict[str, Any] = defaults | given | {"client_encoding": "UTF8"}
        self.place = place_of(given)
        self._database = str(given.get("dbname", "postgresql"))
        self._home = home
        self._lock_key: int | None = None
        self._own_id: str | None = None
        self._engine = create_engine(
            "postgresql+psycopg://",
            creator=self._connect,
            use_native_hstore=False,
        )

        @event.listens_for(self._engine, "checkin")
        def _note_time(_connection: Any, record: Any) -> None:
            record.info["idle_since"] = time.monotonic()

        @event.listens_for(self._engine, "checkout")
        def _try(connection: Any, record: Any, _proxy: Any) -> None:
            # A connection that a restart of the server ended is noticed and made anew. Not after each pause between
            # two batches, where repeating the transaction does as well.
            if time.monotonic() - record.info.get("idle_since", float("inf")) > _MAX_IDLE_UNTRIED_S:
                try:
                    connection.execute("SELECT 1")
                    connection.rollback()
                except psycopg.Error as error:
                    raise DisconnectionError from error

        @event.listens_for(self._engine, "begin")
        def _begin(connection: Connection) -> None:
            options = connection.get_execution_options()
            if options.get(WRITE, False):
                # Taken first, in a transaction whose statements each see what was committed before them: once it is
                # granted nobody else writes, so all of them see the same.
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({self._lock_key})")
            elif options.get("isolation_level") != "AUTOCOMMIT":
                connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")

    @property
    def engine(self) -> Engine:
        return self._engine

    def _connect(self) -> psycopg.Connection[Any]:
        """A new connection. Raises DatabaseAway, CatalogUnavailable."""
        import psycopg
        from psycopg.types.json import set_json_dumps

        try:
            connection = psycopg.connect(**self._parameters)
        except psycopg.Error as error:
            raise self._refused(error) from error
        try:
            set_json_dumps(portable_json, connection)
            connection.execute(f"SET lock_timeout = '{BUSY_TIMEOUT_S}s'")
            connection.execute("SET timezone = 'UTC'")
            encoding, schema = connection.execute(
                "SELECT current_setting('server_encoding'), current_schema()"
            ).fetchone() or ("", None)
            connection.commit()
            if encoding != "UTF8":
                raise CatalogUnavailable(
                    f"{self.place} stores text as {encoding}, which has not all characters of file names; "
                    "create a database with ENCODING 'UTF8' TEMPLATE template0"
                )
            if schema is None:
                raise CatalogUnavailable(
                    f"{self.place} has none of the schemas in this connection's search path; create one: "
                    "CREATE SCHEMA ..."
                )
        except BaseException as error:
            connection.close()
            if isinstance(error, psycopg.Error):
                raise self._refused(error) from error
            raise
        self._lock_key = _lock_key(schema)
        return connection

    def revision(self) -> str | None:
        with self.errors(), self._engine.connect() as connection:
            return revision_of(connection)

    @contextmanager
    def errors(self) -> Iterator[None]:
        with storage_errors(self._home):
            try:
                yield
            except DBAPIError as error:
                translated = self._translated(error)
                if translated is None:
                    raise
                raise translated from error

    @contextmanager
    def upgrading(self) -> Iterator[Connection]:
        with self._engine.connect().execution_options(**{WRITE: True}) as connection, connection.begin():
            yield connection
            if inspect(connection).has_table(SettingRow.__tablename__):
                self._name_itself(connection)

    def back_up_schema(self, connection: Connection, revision: str) -> Path:
        name = re.sub(r"\W+", "-", self._database)
        backup = self._home / f"catalog.{name}.schema-{revision}.backup"
        with self._engine.connect() as reading:
            write_portable_copy(reading, revision, backup)
        return backup

    def identity(self) -> str:
        if self._own_id is None:
            with self.errors(), Session(self._engine) as session:
                own = session.scalars(select(SettingRow.value).where(SettingRow.key == OWN_SETTING)).one()
            self._own_id = str(own["id"])
        return self._own_id

    def snapshots_folder(self, home: Path) -> Path:
        return home / "snapshots" / self.identity()

    def integrity_problems(self, session: Session) -> list[str]:
        connection = session.connection()
        problems = [f"broken reference in {table}" for table in self.broken_references(connection)]
        can_check = (
            "SELECT 1 FROM pg_extension, pg_roles WHERE extname = 'amcheck' AND rolname = current_user AND rolsuper"
        )
        if connection.exec_driver_sql(can_check).first() is None:
            return problems
        for table in Base.metadata.sorted_tables:
            indexes = "SELECT indexrelid, indexrelid::regclass::text FROM pg_index WHERE indrelid = %s::regclass"
            for oid, name in connection.exec_driver_sql(indexes, (table.name,)).all():
                try:
                    with connection.begin_nested():
                        connection.exec_driver_sql("SELECT bt_index_check(%s::oid::regclass, true)", (oid,))
                except DBAPIError as error:
                    if error.connection_invalidated:
                        raise
                    problems.append(f"index {name}: {_first_line(error.orig)}")
        return problems

    def broken_references(self, connection: Connection) -> list[str]:
        """PostgreSQL checks references itself, unless somebody with all rights switched that off."""
        broken = []
        for table in tables_of(connection).sorted_tables:
            for key in table.foreign_keys:
                target = key.column
                lost = select(key.parent).where(
                    key.parent.is_not(None), ~select(target).where(target == key.parent).exists()
                )
                if connection.execute(lost.limit(1)).first() is not None:
                    broken.append(table.name)
        return broken

    def reclaim_space(self) -> None:
        """Frees the room of deleted rows for new ones, and to the system at the end of files; nobody has to wait.

        What VACUUM FULL would free besides needs tables to itself for minutes, which is for an administrator to choose.
        """
        tables = ", ".join(table.name for table in Base.metadata.sorted_tables)
        with self.errors(), self._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql(f"VACUUM (ANALYZE) {tables}")

    def close(self) -> None:
        self._engine.dispose()

    def _name_itself(self, connection: Connection) -> None:
        if connection.execute(select(SettingRow.key).where(SettingRow.key == OWN_SETTING)).first() is None:
            connection.execute(insert(SettingRow).values(key=OWN_SETTING, value={"id": uuid4().hex}))

    def _refused(self, error: psycopg.Error) -> CatalogUnavailable:
        """Our error for a connection that was not made."""
        message = _first_line(error)
        remedy = next((remedy for words, remedy in _REFUSALS.items() if words in message), None)
        if remedy is not None:
            return CatalogUnavailable(f"{self.place} refuses the connection ({message}); {remedy}")
        return DatabaseAway(
            f"{self.place} cannot be reached ({message}); see that the server runs and that the address is right"
        )

    def _translated(self, error: DBAPIError) -> CatalogError | None:
        """Our error for one that the server or the connection reports; None where it is no trouble of theirs."""
        state = getattr(error.orig, "sqlstate", None) or ""
        message = _first_line(error.orig)
        if error.connection_invalidated or state[:2] == "08" or state in ("57P01", "57P02", "57P03", "57P05"):
            return DatabaseAway(
                f"{self.place} ended the connection ({message}); what was committed before is intact: "
                "run the same command again"
            )
        if state in ("40001", "40P01", "53300"):  # a conflict on a standby, a deadlock, too many connections
            return DatabaseAway(f"{self.place} is too busy ({message}); run the same command again")
        if state == "53100":
            return StorageFull(
                f"no space left on the server of {self.place} ({message}); what was committed before is intact: "
                "free some there and run the same command again"
            )
        if state == "55P03":
            return CatalogUnavailable(
                f"{self.place} stayed locked by another process for {BUSY_TIMEOUT_S} s; wait for it to end, "
                "then run again"
            )
        if state == "25006":
            return CatalogUnavailable(
                f"{self.place} takes no changes ({message}): a standby or a read-only database; "
                "give the URL of the primary server"
            )
        if state == "42501":
            return CatalogUnavailable(f"{self.place} refuses this user ({message}); {_RIGHTS}")
        if state in ("42P07", "42710"):
            return CatalogUnavailable(
                f"{self.place} holds the tables of another program ({message}); use a database, or a schema of it, "
                "that is empty"
            )
        if state == "54000":
            return CatalogUnavailable(f"{self.place} cannot hold so long a path or name ({message})")
        if state in ("XX001", "XX002"):
            return CatalogDamaged(f"{self.place} is damaged ({message}); restore a backup of it")
        if state[:2] in ("53", "57", "58") or state == "":
            return CatalogUnavailable(
                f"{self.place} failed ({message}); what was committed before is intact: run the same command again"
            )
        return None


def _parameters_of(url: str, parse: Callable[[str], dict[str, Any]], failure: type[Exception]) -> dict[str, Any]:
    """libpq's connection parameters in a URL. Raises CatalogUnavailable."""
    if found := _URL.match(url):
        # The driver's message is not chained, as it may hold the password.
        with suppress(failure):
            return parse(f"postgresql://{found['rest']}")
    raise CatalogUnavailable(
        "the database URL cannot be understood; expected postgresql://USER:PASSWORD@HOST:PORT/DATABASE, "
        "with special characters in the password written as %XX"
    )


def place_of(parameters: dict[str, Any]) -> str:
    """A URL for messages, without password: of libpq's connection parameters."""
    user = f"{parameters['user']}@" if parameters.get("user") else ""
    hosts = str(parameters.get("host") or parameters.get("hostaddr") or parameters.get("service") or "").split(",")
    ports = str(parameters.get("port") or "").split(",")
    # One port for all of them, or one for each.
    ports *= len(hosts) if len(ports) == 1 else 1
    servers = ",".join(host + (f":{port}" if port else "") for host, port in zip(hosts, ports, strict=False))
    return f"postgresql://{user}{servers}/{parameters.get('dbname') or ''}"


def _lock_key(schema: str) -> int:
    """The advisory lock of a catalog's writers: a signed 64-bit number of this program and schema.

    PostgreSQL keeps such locks apart by database, but not by program or schema.
    """
    digest = hashlib.sha256(f"dino-search catalog in {schema}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def _first_line(error: object) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).strip()
