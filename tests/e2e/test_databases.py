"""Whole commands on a catalog in SQLite and in PostgreSQL, by one user, by two at once, from two homes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

import databases
import sabotage
from dino_index.catalog import EmbeddingRow
from dino_search import Collection
from dino_search.diagnosis import diagnose
from forked_commands import CommandLine
from postgres_server import Catalogs
from sample_collections import count_rows, findable, ids_of, write_pictures


@pytest.fixture
def dino_search(tmp_path: Path) -> Iterator[CommandLine]:
    command_line = CommandLine(tmp_path / "commands")
    yield command_line
    command_line.end()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    write_pictures(folder, *(f"{name}/{number}.jpg" for name in ("hills", "woods") for number in range(15)))
    return folder


@pytest.mark.usefixtures("database")
@pytest.mark.parametrize("folders", [(".", "."), ("hills", "woods")], ids=["the same folder", "different folders"])
def test_two_users_may_index_at_once(
    dino_search: CommandLine, home: Path, photos: Path, tiny_model: Path, tmp_path: Path, folders: tuple[str, str]
) -> None:
    go = tmp_path / "go"
    options = ("--model", tiny_model, "--batch-size", 4, "--json")
    runs = [
        dino_search.start("index", photos / name, *options, prepare=partial(sabotage.wait_for, go)) for name in folders
    ]
    go.touch()
    finished = [run.wait() for run in runs]
    assert [(done.exit_code, done.stderr) for done in finished] == [(0, ""), (0, "")]
    assert sum(json.loads(done.stdout)["added"] for done in finished) == 30
    assert len(ids_of(home)) == len(findable(home)) == 30
    assert count_rows(home, EmbeddingRow) == 60
    verified = dino_search.run("verify")
    assert (verified.exit_code, verified.stdout) == (0, "30 images checked, 0 problems\n")


@pytest.mark.postgres
def test_a_catalog_moves_to_a_server_and_back(
    dino_search: CommandLine, postgres: Catalogs, home: Path, photos: Path, tiny_model: Path, tmp_path: Path
) -> None:
    url = postgres.url_of(home)
    query = ("search", photos / "woods/3.jpg", "-k", 3, "--json")
    dino_search.run("index", photos, "--model", tiny_model)
    dino_search.run("compact")
    expected = dino_search.run(*query)
    assert expected.exit_code == 0
    moved = dino_search.run("catalog", "copy", url)
    assert (moved.exit_code, moved.stdout) == (0, "copied 30 images in 1 collections, 60 embeddings\n")
    assert dino_search.run("--database", url, *query) == expected
    again = dino_search.run("--database", url, "index", photos, "--json")
    assert json.loads(again.stdout)["skipped"] == 30
    saved = dino_search.run("--database", url, "catalog", "backup", tmp_path / "backup", "--json")
    assert json.loads(saved.stdout)["images"] == 30
    restored = dino_search.run("catalog", "restore", tmp_path / "backup", "--home", tmp_path / "back")
    assert (restored.exit_code, "1 index files were missing" in restored.stderr) == (0, True)
    assert dino_search.run(*query, "--home", tmp_path / "back") == expected
    refused = dino_search.run("--database", url, "catalog", "restore", tmp_path / "backup")
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "--force" in refused.stderr
    for told in (moved, saved, restored, refused):
        assert "secret" not in told.stdout + told.stderr


@pytest.mark.postgres
def test_a_home_without_the_index_file_searches_the_shared_catalog(
    dino_search: CommandLine, postgres: Catalogs, home: Path, photos: Path, tiny_model: Path, tmp_path: Path
) -> None:
    url = postgres.url_of(home)
    dino_search.run("--database", url, "index", photos, "--model", tiny_model)
    dino_search.run("--database", url, "compact")
    query = ("--database", url, "search", photos / "woods/3.jpg", "-k", 3, "--json")
    expected = dino_search.run(*query)
    elsewhere = dino_search.run(*query, "--home", tmp_path / "another machine's")
    assert (elsewhere.exit_code, elsewhere.stdout) == (0, expected.stdout)
    assert "rebuilt from the catalog" in elsewhere.stderr
    assert databases.url_of(home) is None


@pytest.mark.postgres
def test_a_given_database_is_the_only_one_that_is_used(
    postgres: Catalogs, home: Path, photos: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = postgres.url_of(home)
    with Collection.open("first", home=home, model=tiny_model, database=url) as first:
        num_images = first.index(photos).images
        first.export(tmp_path / "exported")
    with Collection.open("second", home=home, database=url) as second:
        assert second.import_from(tmp_path / "exported").images == num_images
        assert second.info()["images"] == num_images
    assert not list(home.glob("*.sqlite3"))

    monkeypatch.setenv("DINO_SEARCH_DATABASE", url)
    (checked,) = (check for check in diagnose(home) if check.name == "database")
    assert (checked.status, "secret" in checked.found) == ("ok", False)
    assert checked.found.endswith(f"{2 * num_images} files in 2 collections (first, second)")
