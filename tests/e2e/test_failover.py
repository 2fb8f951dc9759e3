"""Two PostgreSQL servers, one of which follows the other and takes over when that is gone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest

from dino_index.catalog import Catalog
from dino_index.embedding import EmbeddingSettings
from dino_index.errors import DatabaseAway
from dino_index.indexing import IndexOptions, Progress
from dino_search import Collection
from live_servers import waits_until
from postgres_server import Server, find_server_binaries
from sample_collections import write_pictures

pytestmark = pytest.mark.postgres


@pytest.fixture
def servers() -> Iterator[tuple[Server, Server]]:
    """The one that takes changes, and the one that has all that it has confirmed."""
    binaries = find_server_binaries()
    with ExitStack() as started:
        first = Server(binaries)
        started.callback(first.delete)
        second = Server(binaries, standby_of=first)
        started.callback(second.delete)
        with psycopg.connect(first.url, autocommit=True) as connection:
            connection.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
            connection.execute("SELECT pg_reload_conf()")
            state = "SELECT sync_state FROM pg_stat_replication"
            assert waits_until(lambda: connection.execute(state).fetchall() == [("sync",)])
        yield first, second


def test_indexing_goes_on_at_the_server_that_takes_over(
    servers: tuple[Server, Server], home: Path, tmp_path: Path, tiny_model: Path
) -> None:
    first, second = servers
    # The one that does not take changes yet stands first: it is passed over.
    both = f"postgresql://tester:secret@127.0.0.1:{second.port},127.0.0.1:{first.port}/postgres"
    write_pictures(tmp_path / "photos", *(f"{number}.jpg" for number in range(12)))

    def fail_over(progress: Progress) -> None:
        if progress.done == 4:
            first.stop("immediate")
            second.promote()

    options = IndexOptions(embedding=EmbeddingSettings(batch_size=2))
    with Collection.open(home=home, model=tiny_model, database=both) as collection:
        summary = collection.index(tmp_path / "photos", options, on_progress=fail_over)
        assert (summary.added, summary.failed) == (12, 0)
        assert collection.verify().problems == []
    with Collection.open(home=home, database=second.url) as collection:
        assert collection.info()["images"] == 12


def test_a_standby_alone_is_passed_over_and_all_addresses_are_named(
    servers: tuple[Server, Server], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = servers
    first.stop()
    both = f"postgresql://tester:secret@127.0.0.1:{first.port},127.0.0.1:{second.port}/postgres"
    with pytest.raises(DatabaseAway) as caught:
        Catalog.open(home, url=both)
    assert f"postgresql://tester@127.0.0.1:{first.port},127.0.0.1:{second.port}/postgres cannot" in str(caught.value)
