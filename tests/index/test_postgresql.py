"""A catalog on PostgreSQL: what is particular to a server, and to one that goes away."""

from __future__ import annotations

import builtins
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import func, select, text
from sqlalchemy.exc import IntegrityError

import dino_index.catalog.database
from catalog_rows import an_image, count_images, fill
from databases import opened
from dino_index.catalog import Catalog, EmbeddingRow, ImageRow
from dino_index.catalog.bulk import insert_rows
from dino_index.catalog.storage_errors import BUSY_TIMEOUT_S
from dino_index.embedding import EmbeddingSettings
from dino_index.errors import CatalogUnavailable, DatabaseAway
from dino_index.indexing import IndexOptions, IndexSummary, Progress, index_paths
from dino_index.model_files import resolve_model
from postgres_server import Catalogs, Server
from sample_collections import write_pictures

pytestmark = pytest.mark.postgres


def opened_at(url: str, home: Path) -> Catalog:
    catalog = Catalog.open(home, create=True, url=url)
    assert catalog is not None
    opened.append(catalog)
    return catalog


@pytest.fixture
def catalogs(postgres_server: Server) -> Iterator[Catalogs]:
    """Catalogs on the server that a test may stop and start."""
    catalogs = Catalogs(postgres_server.url)
    yield catalogs
    while opened:
        opened.pop().close()
    catalogs.drop()


@pytest.fixture
def url(catalogs: Catalogs, home: Path) -> str:
    return catalogs.url_of(home)


@pytest.fixture
def admin(postgres_server: Server) -> Iterator[Callable[[str], Any]]:
    """Runs a statement as the server's owner."""
    with psycopg.connect(postgres_server.url, autocommit=True) as connection:
        yield lambda statement: connection.execute(statement)


def refusal(url: str, home: Path, kind: type[CatalogUnavailable] = CatalogUnavailable) -> str:
    with pytest.raises(CatalogUnavailable) as caught:
        opened_at(url, home)
    message = str(caught.value)
    assert type(caught.value) is kind
    assert "\n" not in message
    assert "secret" not in message
    return message


# --- servers that refuse


def test_a_server_that_does_not_run_is_named(home: Path) -> None:
    message = refusal("postgresql://tester:secret@127.0.0.1:1/photos", home, DatabaseAway)
    assert "postgresql://tester@127.0.0.1:1/photos cannot be reached" in message
    assert "Connection refused" in message
    assert not home.exists()


def test_a_wrong_password_is_called_so_and_not_shown(postgres_server: Server, home: Path) -> None:
    message = refusal(postgres_server.url.replace(":secret@", ":notsecret@"), home)
    assert "password authentication failed" in message
    assert "~/.pgpass" in message


def test_a_missing_database_names_how_to_make_it(postgres_server: Server, home: Path) -> None:
    message = refusal(postgres_server.url.replace("/postgres", "/nowhere"), home)
    assert 'database "nowhere" does not exist' in message
    assert "createdb" in message


def test_a_missing_schema_is_called_so(postgres_server: Server, home: Path) -> None:
    assert "CREATE SCHEMA" in refusal(postgres_server.url + "?options=-csearch_path%3Dnowhere", home)


def test_a_user_without_rights_is_told_which(
    postgres_server: Server, url: str, home: Path, admin: Callable[[str], Any]
) -> None:
    schema = url.rsplit("%3D", 1)[1]
    fill(opened_at(url, home))
    admin("CREATE ROLE guest LOGIN PASSWORD 'secret'")
    try:
        as_guest = url.replace("tester:", "guest:")
        assert "schemas in this connection's search path" in refusal(as_guest, home)
        admin(f"GRANT USAGE ON SCHEMA {schema} TO guest")
        message = refusal(as_guest, home)
        assert "permission denied for table alembic_version" in message
        assert "GRANT USAGE" in message
        admin(f"GRANT SELECT ON ALL TABLES IN SCHEMA {schema} TO guest")
        catalog = opened_at(as_guest, home)
        assert count_images(catalog) == 3  # reading is allowed
        with (
            pytest.raises(CatalogUnavailable, match="permission denied for table image"),
            catalog.writing() as session,
        ):
            session.execute(text("DELETE FROM image"))
    finally:
        while opened:
            opened.pop().close()
        admin("DROP OWNED BY guest")
        admin("DROP ROLE guest")


def test_a_server_that_takes_no_changes_answers_and_says_so(url: str, home: Path) -> None:
    fill(opened_at(url, home))
    standby = url.replace("options=", "options=-cdefault_transaction_read_only%3Don%20")
    catalog = opened_at(standby, home)
    assert count_images(catalog) == 3
    with pytest.raises(CatalogUnavailable, match=r"takes no changes .* primary"), catalog.writing() as session:
        session.add(an_image("new.jpg"))


def test_another_programs_tables_are_left_alone(url: str, home: Path) -> None:
    with psycopg.connect(url) as connection:
        connection.execute("CREATE TABLE alembic_version (version_num text)")
        connection.execute("INSERT INTO alembic_version VALUES ('ae10')")
    assert "tables of another program (their revision is ae10)" in refusal(url, home)
    with psycopg.connect(url) as connection:
        connection.execute("DROP TABLE alembic_version")
        connection.execute("CREATE TABLE image (mine text)")
    assert 'tables of another program (relation "image" already exists)' in refusal(url, home)
    with psycopg.connect(url) as connection:
        assert connection.execute("SELECT count(*) FROM pg_tables WHERE schemaname = current_schema()").fetchone() == (
            1,
        )


def test_a_database_that_cannot_hold_every_file_name_is_refused(
    postgres_server: Server, home: Path, admin: Callable[[str], Any]
) -> None:
    admin("CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    try:
        message = refusal(postgres_server.url.replace("/postgres", "/latin"), home)
    finally:
        admin("DROP DATABASE latin WITH (FORCE)")
    assert "stores text as LATIN1" in message
    assert "ENCODING 'UTF8'" in message


def test_a_path_too_long_for_an_index_is_called_so(url: str, home: Path) -> None:
    catalog = opened_at(url, home)
    fill(catalog)
    path = "".join(chr(0x4E00 + (number * number * 7919) % 20000) for number in range(1300))
    with pytest.raises(CatalogUnavailable, match="so long a path"), catalog.writing() as session:
        session.add(an_image(path))


@pytest.mark.parametrize(
    "bad",
    [
        "mysql://tester:secret@localhost/photos",
        "postgresql://tester:sec/secret@localhost/photos",
        "postgresql://tester:sec@secret@localhost/photos",
        "postgresql://tester:secret@localhost/photos?secret=1",
        "postgresql://tester:secret@localhost/photos?sslmode",
        "secret",
    ],
)
def test_a_url_that_cannot_be_understood_is_not_repeated(home: Path, bad: str) -> None:
    assert "%XX" in refusal(bad, home)


def test_without_psycopg_the_message_says_what_to_install(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.split(".")[0] == "psycopg":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "pip install 'dino-search[distributed]'" in refusal("postgresql://localhost/photos", home)


@pytest.mark.parametrize("scheme", ["postgres", "postgresql+psycopg", "postgresql+psycopg2"])
def test_other_spellings_of_the_scheme_mean_the_same(url: str, home: Path, scheme: str) -> None:
    catalog = opened_at(url.replace("postgresql", scheme, 1), home)
    assert count_images(catalog) == 0


# --- several catalogs


def test_writers_of_different_catalogs_do_not_wait_for_each_other(catalogs: Catalogs, tmp_path: Path) -> None:
    one, other = (opened_at(catalogs.url_of(tmp_path / name), tmp_path / name) for name in ("one", "other"))
    with one.writing() as first, other.writing() as second:
        assert first.execute(text("SELECT 1")).scalar() == second.execute(text("SELECT 2")).scalar() - 1  # type: ignore[operator]


def test_catalogs_keep_their_snapshots_apart_in_one_home(catalogs: Catalogs, tmp_path: Path) -> None:
    one, other = (opened_at(catalogs.url_of(tmp_path / name), tmp_path / "home") for name in ("one", "other"))
    assert one.snapshots_folder != other.snapshots_folder
    assert opened_at(catalogs.url_of(tmp_path / "one"), tmp_path / "home").snapshots_folder == one.snapshots_folder


def test_a_writer_that_waits_in_vain_says_who_keeps_it(url: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dino_index.catalog.postgresql.BUSY_TIMEOUT_S", 0.2)
    first, second = opened_at(url, home), opened_at(url, home)
    with first.writing() as session:
        session.execute(text("SELECT 1"))
        with pytest.raises(CatalogUnavailable, match="stayed locked by another process"), second.writing() as waiting:
            waiting.execute(text("SELECT 1"))
    assert BUSY_TIMEOUT_S >= 60


# --- a server that goes away


@contextmanager
def away(server: Server, seconds: float) -> Iterator[None]:
    """The server has crashed, and comes back after so long, whatever happens meanwhile."""
    server.stop("immediate")

    def come_back() -> None:
        time.sleep(seconds)
        server.start()

    thread = threading.Thread(target=come_back)
    thread.start()
    try:
        yield
    finally:
        thread.join()


@pytest.fixture
def index(url: str, home: Path, tiny_model: Path) -> Callable[..., IndexSummary]:
    def run(folder: Path, **callbacks: Any) -> IndexSummary:
        spec = resolve_model(tiny_model)
        options = IndexOptions(embedding=EmbeddingSettings(batch_size=2))
        catalog = opened_at(url, home)
        return index_paths(catalog, "default", [folder], spec, lambda: spec, options, **callbacks)

    return run


@pytest.fixture
def one_batch_a_transaction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dino_index.recording._IMAGES_A_TRANSACTION", 2)
    monkeypatch.setattr("dino_index.recording._MAX_TRANSACTION_GROWTH", 1)


def rows_of(url: str, home: Path) -> tuple[int, int]:
    """Number of images and of embeddings."""
    with opened_at(url, home).reading() as session:
        count = [session.scalars(select(func.count()).select_from(row)).one() for row in (ImageRow, EmbeddingRow)]
    return count[0], count[1]


@pytest.mark.usefixtures("one_batch_a_transaction")
def test_indexing_outlasts_a_server_that_restarts_again_and_again(
    postgres_server: Server, url: str, home: Path, tmp_path: Path, index: Callable[..., IndexSummary]
) -> None:
    write_pictures(tmp_path / "photos", *(f"{number}.jpg" for number in range(12)))
    restarts = []

    def restart(progress: Progress) -> None:
        if progress.done in (2, 6, 10) and progress.done not in restarts:
            restarts.append(progress.done)
            postgres_server.stop("fast" if progress.done == 6 else "immediate")
            postgres_server.start()

    summary = index(tmp_path / "photos", on_progress=restart)
    assert restarts == [2, 6, 10]
    assert (summary.added, summary.images) == (12, 12)
    assert rows_of(url, home) == (12, 24)


@pytest.mark.usefixtures("one_batch_a_transaction")
def test_a_batch_waits_for_a_server_that_is_away_for_a_while(
    postgres_server: Server,
    url: str,
    home: Path,
    tmp_path: Path,
    index: Callable[..., IndexSummary],
    caplog: pytest.LogCaptureFixture,
) -> None:
    write_pictures(tmp_path / "photos", *(f"{number}.jpg" for number in range(6)))
    absences = []

    def leave(progress: Progress) -> None:
        if progress.done == 2:
            absence = away(postgres_server, 1.0)
            absence.__enter__()
            absences.append(absence)

    try:
        summary = index(tmp_path / "photos", on_progress=leave)
    finally:
        for absence in absences:
            absence.__exit__(None, None, None)
    assert (summary.added, rows_of(url, home)) == (6, (6, 12))
    assert "trying again in 0.5 s" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.usefixtures("one_batch_a_transaction")
def test_a_server_that_stays_away_ends_the_run_and_the_next_one_goes_on(
    postgres_server: Server,
    url: str,
    home: Path,
    tmp_path: Path,
    index: Callable[..., IndexSummary],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dino_index.catalog.database, "_WAITS_S", (0.05, 0.1))
    write_pictures(tmp_path / "photos", *(f"{number}.jpg" for number in range(6)))

    def leave(progress: Progress) -> None:
        if progress.done == 2:
            postgres_server.stop("immediate")

    try:
        with pytest.raises(DatabaseAway, match="cannot be reached"):
            index(tmp_path / "photos", on_progress=leave)
    finally:
        postgres_server.start()
    assert rows_of(url, home) == (2, 4)
    summary = index(tmp_path / "photos")
    assert (summary.added, summary.skipped, rows_of(url, home)) == (4, 2, (6, 12))


def test_work_whose_commit_was_confirmed_to_nobody_is_done_once(
    url: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = opened_at(url, home)
    fill(catalog, 0)
    attempts = []

    def add_if_missing(session: Any) -> None:
        if session.scalar(select(ImageRow.id).where(ImageRow.path == "a.jpg")) is None:
            session.add(an_image("a.jpg"))

    def lose_the_answer() -> None:
        with catalog.writing() as session:
            add_if_missing(session)
        attempts.append(1)
        if len(attempts) == 1:
            raise DatabaseAway("the connection ended after the commit")

    monkeypatch.setattr(dino_index.catalog.database, "_WAITS_S", (0.01,))
    catalog.outlast(lose_the_answer)
    assert (len(attempts), count_images(catalog)) == (2, 1)


def embedding(number: int) -> dict[str, Any]:
    return {"sha256": bytes([number]) * 32, "model_id": 1, "kind": "cls", "region": "full", "vector": b"\0\1\\N"}


def test_many_rows_at_once_report_a_lost_connection_and_a_refused_row(
    url: str, home: Path, admin: Callable[[str], Any]
) -> None:
    catalog = opened_at(url, home)
    fill(catalog)
    table = EmbeddingRow.__table__

    def add(*rows: dict[str, Any], terminated: bool = False) -> None:
        with catalog.writing() as session:
            if terminated:
                admin(f"SELECT pg_terminate_backend({session.execute(text('SELECT pg_backend_pid()')).scalar()})")
            insert_rows(session.connection(), table, rows)

    with pytest.raises(DatabaseAway, match="ended the connection"):
        add(embedding(1), terminated=True)
    add(embedding(1))
    with pytest.raises(IntegrityError):
        add(embedding(2), embedding(1))
    with catalog.reading() as session:
        assert [row.vector for row in session.scalars(select(EmbeddingRow))] == [b"\0\1\\N"]


def test_a_catalog_that_lay_idle_during_a_restart_goes_on(
    postgres_server: Server, url: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = opened_at(url, home)
    fill(catalog)
    postgres_server.stop("fast")
    postgres_server.start()
    monkeypatch.setattr("dino_index.catalog.postgresql._MAX_IDLE_UNTRIED_S", 0)
    assert count_images(catalog) == 3
    with catalog.writing() as session:
        session.add(an_image("new.jpg"))
    assert count_images(catalog) == 4


def test_a_writer_that_is_killed_leaves_no_lock(url: str, home: Path) -> None:
    catalog = opened_at(url, home)
    fill(catalog)
    script = (
        "import sys, time; from dino_index.catalog import Catalog; from sqlalchemy import text\n"
        "with Catalog.open(sys.argv[1], url=sys.argv[2]).writing() as s:\n"
        "    s.execute(text('DELETE FROM image')); print('writing', flush=True); time.sleep(60)"
    )
    writer = subprocess.Popen([sys.executable, "-c", script, str(home), url], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "writing\n"
    writer.kill()
    writer.wait()
    writer.stdout.close()
    with catalog.writing() as session:
        session.add(an_image("new.jpg"))
    assert count_images(catalog) == 4


# --- damage


def test_a_broken_reference_is_found(url: str, home: Path) -> None:
    catalog = opened_at(url, home)
    fill(catalog)
    with psycopg.connect(url) as connection:
        connection.execute("SET session_replication_role = replica")
        connection.execute("INSERT INTO removal (collection_id, image_id, generation) VALUES (77, 1, 1)")
    assert catalog.integrity_problems() == ["broken reference in removal"]


def test_an_index_that_lacks_a_row_is_found_where_amcheck_is_installed(
    url: str, home: Path, admin: Callable[[str], Any]
) -> None:
    catalog = opened_at(url, home)
    fill(catalog)
    schema = url.rsplit("%3D", 1)[1]
    try:
        admin("CREATE EXTENSION amcheck SCHEMA pg_catalog")
    except psycopg.Error as error:
        pytest.skip(f"this server has no amcheck: {error}")
    try:
        assert catalog.integrity_problems() == []
        # The row comes while the index is not looked after, as after a crash of a disk that lies.
        admin(f"UPDATE pg_index SET indisready = false WHERE indexrelid = '{schema}.ix_image_generation'::regclass")
        with catalog.writing() as session:
            session.add(an_image("unindexed.jpg"))
        admin(f"UPDATE pg_index SET indisready = true WHERE indexrelid = '{schema}.ix_image_generation'::regclass")
        (problem,) = catalog.integrity_problems()
        assert problem.startswith("index ix_image_generation: ")
    finally:
        admin("DROP EXTENSION amcheck")
