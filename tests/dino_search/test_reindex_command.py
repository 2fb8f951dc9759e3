"""What `dino-search reindex` promises: answers, exit codes, and to go on after whatever stopped it."""

from __future__ import annotations

import json
import random
import shutil
import signal
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import sabotage
from dino_search import Collection
from forked_commands import CommandLine, Finished, Running
from sample_collections import ids_of, save_tiny_model, write_pictures

NUM_PICTURES = 120
NUM_QUICK_KILLS = 3
NUM_SLOW_KILLS = 50


@dataclass(frozen=True)
class Shelf:
    """Labelled pictures, and homes made of them by uninterrupted runs: under an old model, and under a new one."""

    folder: Path
    old_model: Path
    new_model: Path
    old_home: Path
    new_home: Path

    @property
    def query(self) -> Path:
        return self.folder / "hills" / "0007.jpg"

    def reindex(self, *options: object) -> list[object]:
        return ["reindex", "--model", self.new_model, "--batch-size", 4, *options]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    base = tmp_path_factory.mktemp("reindex")
    for seed, label in enumerate(("hills", "lakes")):
        names = (f"{number:04}.jpg" for number in range(NUM_PICTURES // 2))
        write_pictures(base / "photos" / label, *names, seed=1000 * seed)
    old_model, new_model = (save_tiny_model(base / f"{seed}.safetensors", seed=seed) for seed in (0, 1))
    shelf = Shelf(base / "photos", old_model, new_model, base / "old home", base / "new home")
    commands = CommandLine(base / "output")
    for model, home in ((shelf.old_model, shelf.old_home), (shelf.new_model, shelf.new_home)):
        options = ("--labels", "folders", "--batch-size", 4, "--home", home)
        done = commands.run("index", shelf.folder, "--model", model, *options)
        assert done.exit_code == 0, done
    return shelf


@pytest.fixture
def dino_search(tmp_path: Path) -> Iterator[CommandLine]:
    commands = CommandLine(tmp_path / "output")
    yield commands
    commands.end()


@pytest.fixture
def filled_home(home: Path, shelf: Shelf) -> Path:
    """A home that holds the collection under the old model."""
    shutil.copytree(shelf.old_home, home)
    return home


def rows(home: Path, query: str) -> list[tuple[Any, ...]]:
    """What the database holds, read without our own code while a command may be writing."""
    with closing(sqlite3.connect(f"{(home / 'catalog.sqlite3').as_uri()}?mode=ro", uri=True)) as connection:
        return connection.execute(query).fetchall()


def images(home: Path) -> list[tuple[Any, ...]]:
    """All about the images that changing the model must leave as it is; ids, too."""
    return rows(home, "SELECT id, path, sha256, size, width, height, label, metadata, status FROM image ORDER BY id")


def embeddings(home: Path) -> list[tuple[Any, ...]]:
    """All embeddings, whichever model's."""
    return rows(home, "SELECT sha256, kind, region, vector FROM embedding ORDER BY 1, 2, 3, 4")


def num_embedded(home: Path) -> int:
    """Pictures that have an embedding under the second model that the home came to know."""
    return int(rows(home, "SELECT count(*) FROM embedding WHERE model_id = 2 AND kind = 'cls'")[0][0])


def found(dino_search: CommandLine, query: Path, *options: object) -> list[tuple[str, float]]:
    done = dino_search.run("search", query, "-k", 50, "--json", *options)
    assert done.exit_code == 0, done
    return [(result["path"], result["score"]) for result in json.loads(done.stdout)["results"]]


def is_as_if_made_with_the_new_model(dino_search: CommandLine, shelf: Shelf, home: Path) -> None:
    assert images(home) == images(shelf.old_home)
    assert dino_search.run("compact").exit_code == 0  # what a kill may have left goes now
    assert embeddings(home) == embeddings(shelf.new_home)
    assert found(dino_search, shelf.query) == found(dino_search, shelf.query, "--home", shelf.new_home)
    assert dino_search.run("verify").exit_code == 0


def wait_until_embedded(running: Running, home: Path, number: int) -> None:
    running.wait_until(lambda: num_embedded(home) >= number)


# --- answers


def test_reindex_tells_what_it_did(dino_search: CommandLine, shelf: Shelf, filled_home: Path) -> None:
    done = dino_search.run(*shelf.reindex())
    assert done.exit_code == 0, done
    assert done.stdout == f"{NUM_PICTURES} images in collection 'default' ({shelf.new_model})\n"
    assert f"{NUM_PICTURES} pictures embedded" in done.stderr
    is_as_if_made_with_the_new_model(dino_search, shelf, filled_home)
    again = dino_search.run(*shelf.reindex())
    assert again.exit_code == 0
    assert again.stdout == f"nothing to do: collection 'default' has {shelf.new_model} already\n"


@pytest.mark.usefixtures("filled_home")
def test_reindex_json_has_the_promised_keys(dino_search: CommandLine, shelf: Shelf) -> None:
    done = dino_search.run(*shelf.reindex("--json"))
    answer = json.loads(done.stdout)
    assert answer.pop("images_per_second") > 0
    assert answer == {
        "collection": "default",
        "model": str(shelf.new_model),
        "previous_model": str(shelf.old_model),
        "switched": True,
        "images": NUM_PICTURES,
        "embedded": NUM_PICTURES,
        "reused": 0,
        "updated": 0,
        "failed": 0,
    }


def fails_in_one_line(done: Finished, *words: str) -> None:
    assert (done.exit_code, done.stdout) == (1, ""), done
    assert len(done.stderr.splitlines()) == 1, done.stderr
    for word in words:
        assert word in done.stderr


@pytest.mark.usefixtures("filled_home")
def test_the_error_of_another_model_names_the_command_that_changes_it(dino_search: CommandLine, shelf: Shelf) -> None:
    done = dino_search.run("index", shelf.folder, "--model", shelf.new_model)
    command = f"dino-search reindex -c default --model {shelf.new_model}"
    fails_in_one_line(done, command, f"dino-search index PATH -c NAME --model {shelf.new_model}")
    assert dino_search.run(*command.split()[1:]).exit_code == 0
    assert dino_search.run("index", shelf.folder, "--model", shelf.new_model).exit_code == 0

    done = dino_search.run("index", shelf.folder, "--model", shelf.new_model, "--pooling", "reference")
    command = f"dino-search reindex -c default --model {shelf.new_model} --pooling reference"
    fails_in_one_line(done, command)
    assert dino_search.run(*command.split()[1:]).exit_code == 0
    assert dino_search.run("index", shelf.folder, "--pooling", "reference", "--model", shelf.new_model).exit_code == 0


@pytest.mark.usefixtures("filled_home")
def test_the_pooling_stays_unless_another_is_asked_for(dino_search: CommandLine, shelf: Shelf) -> None:
    assert dino_search.run("reindex", "--model", shelf.old_model, "--pooling", "reference").exit_code == 0
    assert dino_search.run(*shelf.reindex()).exit_code == 0
    assert json.loads(dino_search.run("info", "--json").stdout)["pooling"] == "reference"


def test_expected_failures_are_one_line(dino_search: CommandLine, shelf: Shelf, home: Path, tmp_path: Path) -> None:
    fails_in_one_line(dino_search.run(*shelf.reindex()), "nothing has been indexed yet")
    photos = tmp_path / "photos"
    write_pictures(photos, *(f"{number}.jpg" for number in range(4)))
    assert dino_search.run("index", photos, "--model", shelf.old_model).exit_code == 0
    fails_in_one_line(dino_search.run(*shelf.reindex("-c", "other")), "no collection 'other'")
    fails_in_one_line(dino_search.run("reindex", "--model", tmp_path / "no.safetensors"), "found no such file")
    (photos / "0.jpg").unlink()
    fails_in_one_line(dino_search.run(*shelf.reindex()), "1 of its 4 images", "1 vanished", "--allow-missing")
    done = dino_search.run(*shelf.reindex("--allow-missing"))
    assert (done.exit_code, done.stdout.split()[0]) == (0, "3")
    assert "1 images could not be read any more" in done.stderr
    assert "vanished" in dino_search.run("info", "--failures").stdout
    assert dino_search.run("reindex").exit_code == 2
    assert dino_search.run(*shelf.reindex("--device", "tpu")).exit_code == 2
    assert len(ids_of(home)) == 4


def test_a_query_that_meets_the_switch_is_embedded_again(
    shelf: Shelf, filled_home: Path, dino_search: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    query = write_pictures(tmp_path, "unknown.jpg", seed=555)[0]
    embed_query = Collection._embed_query

    def embed_then_switch(self: Collection, *arguments: Any) -> Any:
        vector = embed_query(self, *arguments)
        monkeypatch.setattr(Collection, "_embed_query", embed_query)
        assert dino_search.run(*shelf.reindex()).exit_code == 0
        return vector

    with Collection.open(home=filled_home) as collection:
        collection.search(query)  # the old vectors are in memory
        monkeypatch.setattr(Collection, "_embed_query", embed_then_switch)
        met = collection.search(query)
    with Collection.open(home=shelf.new_home) as fresh:
        expected = fresh.search(query)
    assert met.model == str(shelf.new_model)
    assert [(one.path, one.score) for one in met.results] == [(one.path, one.score) for one in expected.results]


# --- stopping


def test_a_signal_stops_after_the_batch_and_the_next_run_goes_on(
    dino_search: CommandLine, shelf: Shelf, filled_home: Path
) -> None:
    running = dino_search.start(*shelf.reindex(), prepare=partial(sabotage.hang_in_forward_pass, 24))
    wait_until_embedded(running, filled_home, 60)
    running.send(signal.SIGTERM)
    running.wait_until(lambda: "stopping after this batch" in running.stderr())
    running.send(signal.SIGTERM)
    done = running.wait(timeout_s=20)
    assert done.exit_code == 143, done
    assert found(dino_search, shelf.query) == found(dino_search, shelf.query, "--home", shelf.old_home)
    num_before = num_embedded(filled_home)
    assert num_before >= 60
    again = json.loads(dino_search.run(*shelf.reindex("--json")).stdout)
    assert (again["reused"], again["embedded"]) == (num_before, NUM_PICTURES - num_before)
    is_as_if_made_with_the_new_model(dino_search, shelf, filled_home)


@pytest.mark.parametrize("function", ["snapshots:write_snapshot", "reindexing:drop_unneeded_embeddings"])
def test_a_run_killed_after_the_switch_has_switched(
    dino_search: CommandLine, shelf: Shelf, filled_home: Path, function: str
) -> None:
    dying = partial(sabotage.die_before, f"dino_index.{function}")
    assert dino_search.run(*shelf.reindex(), prepare=dying).exit_code == 137
    assert found(dino_search, shelf.query) == found(dino_search, shelf.query, "--home", shelf.new_home)
    assert "nothing to do" in dino_search.run(*shelf.reindex()).stdout
    is_as_if_made_with_the_new_model(dino_search, shelf, filled_home)


def survives_a_kill(dino_search: CommandLine, shelf: Shelf, home: Path, number: int, num_kills: int) -> None:
    """Kills the command in its own part of the run, and compares what is left and what the next run makes of it."""
    rng = random.Random(1000 * num_kills + number)
    target, delay_s = round((number + 0.5) / num_kills * 1.2 * NUM_PICTURES), rng.uniform(0, 0.05)
    running = dino_search.start(*shelf.reindex())
    wait_until_embedded(running, home, min(target, NUM_PICTURES))
    time.sleep(delay_s)
    running.send(signal.SIGKILL)
    done = running.wait()
    moment = f"kill {number} of {num_kills}: {delay_s:.4f} s after {target} pictures; exit {done.exit_code}"
    print(moment)
    assert done.exit_code in (137, 0), f"{moment}\n{done.stderr}"

    assert images(home) == images(shelf.old_home), moment
    assert dino_search.run("verify").exit_code == 0, moment
    homes = shelf.old_home, shelf.new_home
    answers = [found(dino_search, shelf.query, "--home", other) for other in homes]
    assert found(dino_search, shelf.query) in answers, moment

    again = dino_search.run(*shelf.reindex())
    assert again.exit_code == 0, f"{moment}\n{again.stderr}"
    is_as_if_made_with_the_new_model(dino_search, shelf, home)


@pytest.mark.parametrize("number", range(NUM_QUICK_KILLS))
def test_a_killed_run_goes_on_to_the_same_collection(
    dino_search: CommandLine, shelf: Shelf, filled_home: Path, number: int
) -> None:
    survives_a_kill(dino_search, shelf, filled_home, number, NUM_QUICK_KILLS)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(NUM_SLOW_KILLS))
def test_a_run_killed_at_any_moment_goes_on_to_the_same_collection(
    dino_search: CommandLine, shelf: Shelf, filled_home: Path, number: int
) -> None:
    survives_a_kill(dino_search, shelf, filled_home, number, NUM_SLOW_KILLS)
