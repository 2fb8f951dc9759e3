"""What a collection survives: kills, signals, full and read-only disks, company, damaged files, bad pictures."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import pytest

import sabotage
from bad_files import make_bad_files, make_good_files
from dino_index.catalog.portable_paths import encode_path
from forked_commands import CommandLine, Finished, Running
from requirements import require
from sample_collections import save_tiny_model, write_pictures
from small_disks import fill

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs fork and POSIX signals")

NUM_QUICK_KILLS = 5
NUM_SLOW_KILLS = 50


@dataclass(frozen=True)
class State:
    """All that a catalog holds about images, in a fixed order; ids, times and generations left out."""

    images: list[tuple[Any, ...]]
    """(path, sha256, size, status, width, height, label, error code, error message)"""
    embeddings: list[tuple[Any, ...]]
    """(sha256, kind, region, vector)"""
    num_models: int
    num_collections: int

    def paths(self, status: str = "ok") -> set[str]:
        return {row[0] for row in self.images if row[3] == status}


@dataclass(frozen=True)
class Photos:
    """A folder of pictures, and the home that one uninterrupted run of the installed program made of it."""

    folder: Path
    model: Path
    home: Path
    state: State

    @property
    def query(self) -> Path:
        return self.folder / "hills" / "0007.jpg"

    def index(self, *options: object) -> list[object]:
        """The command that made `home`; another home comes from the environment."""
        return ["index", self.folder, "--model", self.model, "--labels", "folders", "--batch-size", 4, *options]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Photos:
    """A few hundred pictures in labelled folders, copies and unreadable files among them."""
    base = tmp_path_factory.mktemp("survival")
    folder = base / "photos"
    for seed, label in enumerate(("hills", "lakes", "roads", "woods")):
        write_pictures(folder / label, *(f"{number:04}.jpg" for number in range(90)), seed=1000 * seed)
    for number in range(6):
        shutil.copy(folder / "hills" / f"{10 * number:04}.jpg", folder / "roads" / f"copy {number}.jpg")
    (folder / "lakes" / "truncated.jpg").write_bytes((folder / "lakes" / "0000.jpg").read_bytes()[:300])
    (folder / "roads" / "words.png").write_text("no picture")
    (folder / "woods" / "empty.jpg").touch()
    (folder / "woods" / "dangling.jpg").symlink_to("nowhere")
    model = save_tiny_model(base / "model.safetensors")
    photos = Photos(folder, model, base / "home", State([], [], 0, 0))
    command = [sys.executable, "-m", "dino_search", *map(str, photos.index("--home", photos.home))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    state = state_of(photos.home)
    assert (len(state.paths("ok")), len(state.paths("failed"))) == (366, 4)
    return Photos(folder, model, photos.home, state)


@pytest.fixture
def dino_search(tmp_path: Path) -> Iterator[CommandLine]:
    commands = CommandLine(tmp_path / "output")
    yield commands
    commands.end()


@pytest.fixture
def filled_home(home: Path, photos: Photos) -> Path:
    """A home that holds the finished collection."""
    shutil.copytree(photos.home, home)
    return home


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str, Path | None], Path]]:
    """Mounts a memory file system with the given options, with the content of a folder; gone after the test."""
    mounted: list[Path] = []

    def mount_memory(options: str, content: Path | None = None) -> Path:
        point = tmp_path / f"disk {len(mounted)}"
        point.mkdir()
        require(sys.platform == "linux" and shutil.which("mount"), "small file systems are mounted on Linux only")
        command = ["mount", "-t", "tmpfs", "-o", options, "dino-search-test", str(point)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        require(done.returncode == 0, f"this user may not mount: {done.stderr.splitlines()[:1]}")
        mounted.append(point)
        if content is not None:
            shutil.copytree(content, point, dirs_exist_ok=True)
        return point

    yield mount_memory
    for point in mounted:
        subprocess.run(["umount", "--lazy", str(point)], check=True)


def state_of(home: Path) -> State:
    """What the catalog holds, read without our own code, after SQLite has found its file sound."""
    with closing(sqlite3.connect(home / "catalog.sqlite3")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        images = connection.execute(
            "SELECT source.path || '/' || image.path, sha256, size, status, width, height, label, error_code,"
            " error_message FROM image JOIN source ON source.id = image.source_id ORDER BY 1"
        ).fetchall()
        embeddings = connection.execute(
            "SELECT sha256, kind, region, vector FROM embedding ORDER BY 1, 2, 3"
        ).fetchall()
        counts = [
            connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in ("model", "collection")
        ]
    return State(images, embeddings, *counts)


def num_recorded(home: Path) -> int:
    """Images that are committed, seen from outside while a command may be writing; 0 before there is a table."""
    try:
        with closing(sqlite3.connect(f"{(home / 'catalog.sqlite3').as_uri()}?mode=ro", uri=True)) as connection:
            return int(connection.execute("SELECT count(*) FROM image").fetchone()[0])
    except sqlite3.OperationalError:
        return 0


def fail_in_one_line(done: Finished, *words: str) -> None:
    """Asserts that a command ended as expected failures do: exit 1, nothing on stdout, one line that says why."""
    assert (done.exit_code, done.stdout) == (1, ""), done
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: "), done.stderr
    for word in words:
        assert word in done.stderr


def is_sound(dino_search: CommandLine, *options: object) -> bool:
    """Whether `verify` finds nothing."""
    return dino_search.run("verify", *options).exit_code == 0


def found(dino_search: CommandLine, query: Path, *options: object) -> list[tuple[str, float]]:
    """(path, score) of a search's results."""
    done = dino_search.run("search", query, "-k", 50, "--json", *options)
    assert done.exit_code == 0, done
    return [(result["path"], result["score"]) for result in json.loads(done.stdout)["results"]]


# --- kill -9


def kill_sometime(running: Running, home: Path, number: int, num_kills: int, num_images: int) -> str:
    """Kills the command in its own part of the run; returns when, for the report.

    The first tenth of the numbers fall into the start, the last into the end, when all is recorded and the snapshot
    is written; the others are spread over the images.
    """
    rng = random.Random(1000 * num_kills + number)
    frac = (number + 0.5) / num_kills
    if frac <= 0.1:
        target, delay_s = 0, rng.uniform(0, 0.6)
    elif frac < 0.9:
        target, delay_s = int((frac - 0.1) / 0.8 * num_images) + 1, rng.uniform(0, 0.03)
    else:
        target, delay_s = num_images, rng.uniform(0, 0.06)
    running.wait_until(lambda: num_recorded(home) >= target)
    time.sleep(delay_s)
    running.send(signal.SIGKILL)
    done = running.wait()
    moment = f"kill {number} of {num_kills}: {delay_s:.4f} s after {target} images; exit {done.exit_code}"
    print(moment)
    assert done.exit_code in (137, 0), f"{moment}\n{done.stderr}"
    if 0.1 < frac < 0.8:
        assert done.exit_code == 137, f"{moment}: too late to be a test"
    return moment


def survives_a_kill(
    photos: Photos, dino_search: CommandLine, home: Path, tmp_path: Path, number: int, num_kills: int
) -> None:
    command = photos.index("--json")
    running = dino_search.start(*command, prepare=sabotage.write_snapshots_early)
    moment = kill_sometime(running, home, number, num_kills, len(photos.state.images))

    if (home / "catalog.sqlite3").exists() and num_recorded(home):
        # Looked at in a copy: opening a catalog already repairs it.
        partial_state = state_of(shutil.copytree(home, tmp_path / "copy"))
        assert set(partial_state.images) <= set(photos.state.images), moment
        assert set(partial_state.embeddings) <= set(photos.state.embeddings), moment

    done = dino_search.run(*command, prepare=sabotage.write_snapshots_early)
    assert done.exit_code == 0, f"{moment}\n{done.stderr}"
    summary = json.loads(done.stdout)
    assert summary["added"] + summary["skipped"] == summary["images"] == 366, moment
    assert (summary["failed"], summary["updated"], summary["removed"]) == (4, 0, 0), moment
    assert state_of(home) == photos.state, moment
    assert is_sound(dino_search), moment
    assert found(dino_search, photos.query) == found(dino_search, photos.query, "--home", photos.home), moment
    assert not list(home.rglob("*.partial")), moment


@pytest.mark.parametrize("number", range(NUM_QUICK_KILLS))
def test_a_killed_run_goes_on_to_the_same_collection(
    photos: Photos, dino_search: CommandLine, home: Path, tmp_path: Path, number: int
) -> None:
    survives_a_kill(photos, dino_search, home, tmp_path, number, NUM_QUICK_KILLS)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(NUM_SLOW_KILLS))
def test_a_run_killed_at_any_moment_goes_on_to_the_same_collection(
    photos: Photos, dino_search: CommandLine, home: Path, tmp_path: Path, number: int
) -> None:
    survives_a_kill(photos, dino_search, home, tmp_path, number, NUM_SLOW_KILLS)


@pytest.mark.slow
def test_a_run_killed_again_and_again_comes_to_its_end(photos: Photos, dino_search: CommandLine, home: Path) -> None:
    rng = random.Random(7)
    num_kills = 0
    while num_kills < 15:
        running = dino_search.start(*photos.index(), prepare=sabotage.write_snapshots_early)
        target = num_recorded(home) + rng.randrange(2, 40)
        running.wait_until(lambda target=target: num_recorded(home) >= target)  # type: ignore[misc]
        time.sleep(rng.uniform(0, 0.02))
        running.send(signal.SIGKILL)
        if running.wait().exit_code == 0:
            break
        num_kills += 1
    assert num_kills >= 5
    assert dino_search.run(*photos.index()).exit_code == 0
    assert state_of(home) == photos.state
    assert is_sound(dino_search)


# --- signals


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_after_the_batch_and_the_next_run_goes_on(
    photos: Photos, dino_search: CommandLine, home: Path, number: signal.Signals, exit_code: int
) -> None:
    running = dino_search.start(*photos.index())
    running.wait_until(lambda: num_recorded(home) >= 30)
    running.send(number)
    done = running.wait()
    assert done.exit_code == exit_code, done
    assert "stopping after this batch" in done.stderr
    stopped = state_of(home)
    num_done, num_left = len(stopped.images), len(photos.state.images) - len(stopped.images)
    assert 30 <= num_done < 200
    assert f"stopped with {num_left} files to go; the same command goes on from there" in done.stderr
    assert done.stdout.startswith(f"{len(stopped.paths())} added, 0 updated, 0 unchanged")
    assert is_sound(dino_search)

    again = dino_search.run(*photos.index())
    assert again.exit_code == 0
    assert again.stdout.startswith(f"{366 - len(stopped.paths())} added, 0 updated, {len(stopped.paths())} unchanged")
    assert state_of(home) == photos.state


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_stops_at_once(
    photos: Photos, dino_search: CommandLine, home: Path, number: signal.Signals
) -> None:
    running = dino_search.start(*photos.index(), prepare=partial(sabotage.hang_in_forward_pass, 30))
    running.wait_until(lambda: num_recorded(home) >= 20)
    running.send(number)
    running.wait_until(lambda: "stopping after this batch" in running.stderr())
    assert running.is_alive(), running.stderr()
    running.send(number)
    done = running.wait(timeout_s=20)
    assert done.exit_code == 128 + number, done
    assert "error: interrupted; what was recorded before stays" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(state_of(home).images) >= 20

    assert dino_search.run(*photos.index()).exit_code == 0
    assert state_of(home) == photos.state


@pytest.mark.usefixtures("filled_home")
def test_an_interrupted_command_says_so(photos: Photos, dino_search: CommandLine, tmp_path: Path) -> None:
    unknown = write_pictures(tmp_path, "unknown.jpg", seed=9999)[0]
    running = dino_search.start("search", unknown, prepare=partial(sabotage.hang_in_forward_pass, 1))
    time.sleep(1)
    running.send(signal.SIGINT)
    done = running.wait(timeout_s=20)
    assert (done.exit_code, done.stdout) == (130, "")
    assert done.stderr.startswith("error: interrupted")
    assert len(done.stderr.splitlines()) == 1


# --- a full disk


@pytest.mark.mounts
def test_a_disk_that_fills_up_stops_the_run_with_one_line(
    photos: Photos, dino_search: CommandLine, mount: Callable[..., Path]
) -> None:
    disk = mount("size=650k")
    home = disk / "home"
    first = dino_search.run("index", photos.folder / "hills", "--model", photos.model, "--home", home)
    assert first.exit_code == 0, first
    earlier = state_of(home)

    command = photos.index("--home", home)
    fail_in_one_line(dino_search.run(*command), f"no space left in {home}", "free some space", "same command again")
    # Labels came with the second run.
    kept = {row[:6] for row in state_of(home).images}
    assert {row[:6] for row in earlier.images} <= kept <= {row[:6] for row in photos.state.images}
    assert len(kept) < len(photos.state.images)

    fill(disk)
    assert is_sound(dino_search, "--home", home)
    results = found(dino_search, photos.query, "--home", home)
    assert results[0] == (str(photos.query), 1.0)
    fail_in_one_line(dino_search.run(*command), "no space left")

    subprocess.run(["mount", "-o", "remount,size=32m", str(disk)], check=True)
    done = dino_search.run(*command)
    assert done.exit_code == 0, done
    assert state_of(home) == photos.state
    assert is_sound(dino_search, "--home", home)


@pytest.mark.mounts
def test_a_disk_full_from_the_start_is_called_so(
    photos: Photos, dino_search: CommandLine, mount: Callable[..., Path]
) -> None:
    disk = mount("size=400k")
    filler = fill(disk)
    command = photos.index("--home", disk / "home")
    fail_in_one_line(dino_search.run(*command), "no space left")
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=32m", str(disk)], check=True)
    assert dino_search.run(*command).exit_code == 0
    assert state_of(disk / "home") == photos.state


@pytest.mark.mounts
def test_search_on_a_full_disk_works_or_says_no_space(
    photos: Photos, dino_search: CommandLine, mount: Callable[..., Path]
) -> None:
    home = mount("size=4m", photos.home)
    filler = fill(home)
    done = dino_search.run("search", photos.query, "--home", home)
    if done.exit_code != 0:
        # SQLite needs 32 KB beside the database for readers and writers to agree.
        fail_in_one_line(done, "no space left")
    filler.unlink()
    assert found(dino_search, photos.query, "--home", home) == found(dino_search, photos.query, "--home", photos.home)


@pytest.mark.mounts
def test_a_disk_that_fills_up_under_a_snapshot_leaves_the_earlier_state(
    photos: Photos, dino_search: CommandLine, mount: Callable[..., Path]
) -> None:
    home = mount("size=4m", photos.home)
    expected = found(dino_search, photos.query, "--home", home)
    fill(home, leave_kb=72)  # what SQLite needs fits, a snapshot of 366 vectors of 256 bytes does not
    fail_in_one_line(dino_search.run("compact", "--home", home), "no space left")
    assert not [file for file in home.rglob("*") if file.suffix in (".faiss", ".partial")]
    assert state_of(home) == photos.state
    assert found(dino_search, photos.query, "--home", home) == expected
    assert is_sound(dino_search, "--home", home)

    # An indexing run that has done everything else says the same, and writes the snapshot when there is space.
    command = photos.index("--home", home)
    failed = dino_search.run(*command, prepare=sabotage.write_snapshots_early)
    fail_in_one_line(failed, "no space left")
    (home / "filler").unlink()
    assert dino_search.run(*command, prepare=sabotage.write_snapshots_early).exit_code == 0
    assert list(home.rglob("*.faiss"))
    assert found(dino_search, photos.query, "--home", home) == expected
    assert is_sound(dino_search, "--home", home)


# --- a read-only home


@pytest.mark.mounts
@pytest.mark.parametrize("with_snapshot", [True, False])
def test_a_home_on_a_read_only_medium_can_be_searched_and_not_changed(
    photos: Photos, dino_search: CommandLine, mount: Callable[..., Path], tmp_path: Path, with_snapshot: bool
) -> None:
    home = mount("size=8m", photos.home)
    if with_snapshot:
        assert dino_search.run("compact", "--home", home).exit_code == 0
    expected = found(dino_search, photos.query, "--home", home)
    subprocess.run(["mount", "-o", "remount,ro", str(home)], check=True)
    before = sorted(path.name for path in home.rglob("*"))

    assert found(dino_search, photos.query, "--home", home) == expected
    assert is_sound(dino_search, "--home", home)
    info = dino_search.run("info", "--json", "--home", home)
    assert json.loads(info.stdout)["images"] == 366
    more = write_pictures(tmp_path / "more", "new.jpg", seed=5000)[0].parent
    for command in (
        ["index", more, "--model", photos.model],
        ["index", more, "--model", photos.model, "-c", "other"],
        ["remove", photos.query],
        ["compact"],
    ):
        fail_in_one_line(dino_search.run(*command, "--home", home), f"{home} cannot be written", "--home")
    assert sorted(path.name for path in home.rglob("*")) == before
    assert state_of(shutil.copytree(home, tmp_path / "copy")) == photos.state


@pytest.mark.mounts
def test_a_killed_runs_home_on_a_read_only_medium_shows_what_was_recorded_or_says_why_not(
    photos: Photos, dino_search: CommandLine, mount: Callable[..., Path], tmp_path: Path
) -> None:
    home = mount("size=16m")
    running = dino_search.start(*photos.index("--home", home))
    running.wait_until(lambda: num_recorded(home) >= 100)
    running.send(signal.SIGKILL)
    running.wait()
    recorded = state_of(shutil.copytree(home, tmp_path / "copy"))
    assert (home / "catalog.sqlite3-wal").stat().st_size > 0
    subprocess.run(["mount", "-o", "remount,ro", str(home)], check=True)
    info = dino_search.run("info", "--json", "--home", home)
    assert json.loads(info.stdout)["images"] == len(recorded.paths())

    subprocess.run(["mount", "-o", "remount,rw", str(home)], check=True)
    (home / "catalog.sqlite3-shm").unlink()  # as in a copy made of the two other files only
    subprocess.run(["mount", "-o", "remount,ro", str(home)], check=True)
    fail_in_one_line(dino_search.run("search", photos.query, "--home", home), str(home), "--home")


@pytest.mark.mounts
def test_a_new_home_on_a_read_only_medium_is_refused(
    photos: Photos, dino_search: CommandLine, mount: Callable[..., Path]
) -> None:
    disk = mount("size=1m,ro")
    for home in (disk, disk / "home"):
        fail_in_one_line(dino_search.run(*photos.index("--home", home)), "cannot be written", "--home")


def test_a_home_that_this_user_may_only_read_stays_as_it_is(
    photos: Photos, dino_search: CommandLine, filled_home: Path, tmp_path: Path
) -> None:
    assert dino_search.run("compact").exit_code == 0
    home = filled_home
    more = write_pictures(tmp_path / "more", "new.jpg", seed=5000)[0].parent
    files = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    for path in [home, *home.rglob("*")]:
        path.chmod(0o444 if path.is_file() else 0o555)
    try:
        for command in (
            ["index", more, "--model", photos.model],
            ["index", more, "--model", photos.model, "--home", home / "below"],
            ["remove", photos.query],
            ["compact"],
            ["search", photos.query],  # a database that others may be writing cannot be read without a lock
        ):
            done = dino_search.run(*command, prepare=sabotage.obey_file_permissions)
            fail_in_one_line(done, "cannot be written", "--home")
    finally:
        for path in [home, *home.rglob("*")]:
            path.chmod(path.stat().st_mode | stat.S_IRWXU)
    assert {path: path.read_bytes() for path in home.rglob("*") if path.is_file()} == files
    assert found(dino_search, photos.query)[0] == (str(photos.query), 1.0)


# --- company


@pytest.mark.parametrize("folders", [(".", "."), ("hills", "woods")], ids=["the same folder", "different folders"])
def test_two_runs_at_once_and_searches_during_both(
    photos: Photos, dino_search: CommandLine, home: Path, tmp_path: Path, folders: tuple[str, str]
) -> None:
    expected = {row[:6] for row in photos.state.images if any(is_in(row[0], photos.folder / name) for name in folders)}
    go = tmp_path / "go"
    options = ("--model", photos.model, "--batch-size", 4, "--json")
    runs = [
        dino_search.start("index", photos.folder / name, *options, prepare=partial(sabotage.wait_for, go))
        for name in folders
    ]
    go.touch()
    searches = []
    while any(run.is_alive() for run in runs):
        searches.append(dino_search.run("search", photos.query, "-k", 500, "--json"))
    finished = [run.wait() for run in runs]
    assert [done.exit_code for done in finished] == [0, 0], finished

    state = state_of(home)
    assert {row[:6] for row in state.images} == expected
    assert len(state.images) == len(expected)
    assert (state.num_models, state.num_collections) == (1, 1)
    assert set(state.embeddings) <= set(photos.state.embeddings)
    summaries = [json.loads(done.stdout) for done in finished]
    assert sum(summary["added"] for summary in summaries) == len(state.paths())
    assert is_sound(dino_search)

    assert searches
    num_found = 0
    for search in searches:
        if search.exit_code != 0 and num_found == 0:
            fail_in_one_line(search, "run: dino-search index")
            assert "nothing has been indexed yet" in search.stderr or "no readable image" in search.stderr
            continue
        assert (search.exit_code, search.stderr) == (0, "")
        results = json.loads(search.stdout)["results"]
        paths, scores = [result["path"] for result in results], [result["score"] for result in results]
        assert len(paths) >= num_found, "images were lost from sight"
        assert len(set(paths)) == len(paths)
        assert set(paths) <= state.paths()
        assert scores == sorted(scores, reverse=True)
        num_found = len(paths)
    assert {path for path, _ in found(dino_search, photos.query, "-k", 500)} == state.paths()


def is_in(path: str, folder: Path) -> bool:
    return Path(path).is_relative_to(folder)


def test_a_home_may_come_into_being_in_several_processes_at_once(
    photos: Photos, dino_search: CommandLine, tmp_path: Path
) -> None:
    for number in range(3):
        go, home = tmp_path / f"go {number}", tmp_path / "not yet" / f"home {number}"
        runs = [
            dino_search.start(
                "index", *photos.folder.glob("hills/000*"), "--model", photos.model, "--home", home, *collection,
                prepare=partial(sabotage.wait_for, go),
            )
            for collection in ([], [], ["-c", "other"])
        ]  # fmt: skip
        go.touch()
        finished = [run.wait() for run in runs]
        assert [done.exit_code for done in finished] == [0, 0, 0], finished
        state = state_of(home)
        assert (state.num_models, state.num_collections, len(state.images)) == (1, 2, 20)


@pytest.mark.usefixtures("filled_home")
def test_snapshots_written_by_several_processes_at_once_do_not_disturb_searches(
    photos: Photos, dino_search: CommandLine, tmp_path: Path
) -> None:
    expected = found(dino_search, photos.query)
    more = write_pictures(tmp_path / "more", *(f"{number}.jpg" for number in range(40)), seed=7000)[0].parent
    (query := tmp_path / "query.jpg").write_bytes(photos.query.read_bytes())
    indexing = dino_search.start("index", more, "--batch-size", 4, prepare=sabotage.write_snapshots_early)
    while indexing.is_alive():
        compacting = [dino_search.start("compact") for _ in range(2)]
        older = [path for path, _ in found(dino_search, query) if not is_in(path, more)]
        assert len(older) >= 10
        assert older == [path for path, _ in expected][: len(older)]
        assert [run.wait().exit_code for run in compacting] == [0, 0]
    assert indexing.wait().exit_code == 0
    assert is_sound(dino_search)


# --- snapshots


def truncate(snapshot: Path) -> None:
    os.truncate(snapshot, snapshot.stat().st_size // 2)


def empty(snapshot: Path) -> None:
    os.truncate(snapshot, 0)


def delete(snapshot: Path) -> None:
    snapshot.unlink()


def overwrite_header(snapshot: Path) -> None:
    with open(snapshot, "r+b") as file:
        file.write(b"\xff" * 64)


@pytest.mark.parametrize("damage", [truncate, empty, delete, overwrite_header])
def test_a_damaged_snapshot_is_replaced(
    photos: Photos, dino_search: CommandLine, filled_home: Path, damage: Callable[[Path], None]
) -> None:
    assert dino_search.run("compact").exit_code == 0
    expected = found(dino_search, photos.query)
    damage(next(filled_home.rglob("*.faiss")))

    search = dino_search.run("search", photos.query, "-k", 50, "--json")
    assert search.exit_code == 0
    assert [(item["path"], item["score"]) for item in json.loads(search.stdout)["results"]] == expected
    assert "WARNING" in search.stderr
    assert "compact" in search.stderr
    assert len(search.stderr.splitlines()) == 1, search.stderr

    verify = dino_search.run("verify")
    assert verify.exit_code == 1
    assert "problem\tsnapshot: " in verify.stdout
    assert "dino-search verify --repair" in verify.stderr
    repair = dino_search.run("verify", "--repair")
    assert repair.exit_code == 0
    assert "repaired\tsnapshot: " in repair.stdout
    assert is_sound(dino_search)

    damage(max(filled_home.rglob("*.faiss"), key=lambda path: path.stat().st_mtime_ns))
    assert dino_search.run("compact").exit_code == 0
    again = dino_search.run("search", photos.query, "-k", 50, "--json")
    assert (again.stdout, again.stderr) == (search.stdout, "")
    assert is_sound(dino_search)


def test_changed_bytes_in_a_snapshot_are_found_by_verify(dino_search: CommandLine, filled_home: Path) -> None:
    assert dino_search.run("compact").exit_code == 0
    snapshot = next(filled_home.rglob("*.faiss"))
    data = bytearray(snapshot.read_bytes())
    data[len(data) // 2] ^= 1
    snapshot.write_bytes(data)
    verify = dino_search.run("verify")
    assert verify.exit_code == 1
    assert "not those that were written" in verify.stdout
    assert dino_search.run("verify", "--repair").exit_code == 0
    assert is_sound(dino_search)


@pytest.mark.parametrize(
    "accident",
    [
        sabotage.die_in_the_middle_of_a_snapshot,
        partial(sabotage.die_before, "os:fsync"),
        partial(sabotage.die_before, "os:replace"),
        partial(sabotage.die_before, "dino_index.snapshots:_file_digest"),
        partial(sabotage.die_before, "dino_index.snapshots:delete"),
    ],
    ids=["half written", "not synced", "not renamed", "not pointed to", "pointer not committed"],
)
def test_a_killed_snapshot_writer_leaves_the_earlier_state(
    photos: Photos, dino_search: CommandLine, filled_home: Path, accident: Callable[[], None]
) -> None:
    assert dino_search.run("compact").exit_code == 0
    assert dino_search.run("remove", photos.folder / "lakes").exit_code == 0
    before, expected = state_of(filled_home), found(dino_search, photos.query)
    size_before = next(filled_home.rglob("*.faiss")).stat().st_size

    assert dino_search.run("compact", prepare=accident).exit_code == 137
    sizes = [path.stat().st_size for path in filled_home.rglob("*.faiss")]
    for path in filled_home.rglob("*.faiss"):
        faiss.read_index(str(path))
    assert max(sizes) == size_before
    assert all(size == size_before or 0.7 < size / size_before < 0.8 for size in sizes), "a half file"
    assert state_of(filled_home) == before
    assert found(dino_search, photos.query) == expected
    assert is_sound(dino_search)

    assert dino_search.run("compact").exit_code == 0
    assert found(dino_search, photos.query) == expected
    assert is_sound(dino_search)
    assert not list(filled_home.rglob("*.partial"))
    assert len(list(filled_home.rglob("*.faiss"))) <= 2


def test_an_interrupted_snapshot_writer_cleans_up(photos: Photos, dino_search: CommandLine, filled_home: Path) -> None:
    expected = found(dino_search, photos.query)
    running = dino_search.start("compact", prepare=sabotage.hang_in_the_middle_of_a_snapshot)
    # Not the copy of the vectors that it makes first, `*.partial` too.
    running.wait_until(lambda: any(path.stat().st_size for path in filled_home.rglob("flat-*.partial")))
    running.send(signal.SIGINT)
    done = running.wait(timeout_s=20)
    assert (done.exit_code, done.stdout) == (130, ""), done
    assert done.stderr.startswith("error: interrupted")
    assert not [path for path in filled_home.rglob("*") if path.suffix in (".partial", ".faiss")]
    assert found(dino_search, photos.query) == expected
    assert is_sound(dino_search)
    assert dino_search.run("compact").exit_code == 0


# --- bad files


@pytest.mark.usefixtures("home")
def test_all_bad_files_are_in_the_ledger_and_all_good_ones_found(
    photos: Photos, dino_search: CommandLine, tmp_path: Path
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    good, bad = make_good_files(folder), make_bad_files(folder)
    assert len(bad) >= 40
    command = ["index", folder, "--model", photos.model]
    done = dino_search.run(*command)
    assert done.exit_code == 0, done
    counts = f"{len(good)} added, 0 updated, 0 unchanged, 0 removed, {len(bad)} failed, 0 ignored"
    assert done.stdout.splitlines()[0] == counts
    assert f"{len(bad)} files could not be read; list them: dino-search info --failures" in done.stderr
    assert "Traceback" not in done.stderr

    info = json.loads(dino_search.run("info", "--failures", "--json").stdout)
    assert (info["images"], info["failed"]) == (len(good), len(bad))
    ledger = {failure["path"]: failure["code"] for failure in info["failures"]}
    assert ledger == {encode_path(str(folder / name)): reason for name, reason in bad.items()}
    assert all(failure["message"] for failure in info["failures"])
    lines = dino_search.run("info", "--failures").stdout.splitlines()
    assert len(lines) == len(bad), "a name with a line break takes one line too"

    query = folder / "phone.heic"
    everything = dino_search.run("search", query, "-k", 1000, "--json")
    paths = {item["path"] for item in json.loads(everything.stdout)["results"]}
    assert paths == {encode_path(str(folder / name)) for name in good}

    again = json.loads(dino_search.run(*command, "--json").stdout)
    assert (again["added"], again["updated"], again["skipped"], again["failed"]) == (0, 0, len(good), len(bad))
    assert is_sound(dino_search)


@pytest.mark.usefixtures("home")
def test_files_that_change_between_listing_and_reading_stop_nothing(
    photos: Photos, dino_search: CommandLine, tmp_path: Path
) -> None:
    folder = tmp_path / "pictures"
    expected = {
        "now gone.jpg": "vanished",
        "now a folder.jpg": "not_a_file",
        "now a pipe.jpg": "not_a_file",
        "now empty.jpg": "empty",
        "now a link to nowhere.jpg": "broken_link",
        "now gone with all in it/picture.jpg": "vanished",
    }
    write_pictures(folder, "a.jpg", *expected, "z.jpg")
    command = ["index", folder, "--model", photos.model, "--json"]
    done = dino_search.run(*command, prepare=partial(sabotage.spoil_files_after_listing, folder))
    assert done.exit_code == 0, done
    summary = json.loads(done.stdout)
    assert (summary["added"], summary["failed"], summary["images"]) == (2, len(expected), 2)
    info = json.loads(dino_search.run("info", "--failures", "--json").stdout)
    assert {failure["path"]: failure["code"] for failure in info["failures"]} == {
        str(folder / name): reason for name, reason in expected.items()
    }

    # What is still there stays in the ledger, what is gone leaves it.
    again = dino_search.run(*command)
    assert again.exit_code == 0, again
    summary = json.loads(again.stdout)
    assert (summary["added"], summary["skipped"], summary["images"]) == (0, 2, 2)
    info = json.loads(dino_search.run("info", "--failures", "--json").stdout)
    left = {Path(failure["path"]).name: failure["code"] for failure in info["failures"]}
    assert left == {
        "now a pipe.jpg": "not_a_file",
        "now empty.jpg": "empty",
        "now a link to nowhere.jpg": "broken_link",
    }
    assert is_sound(dino_search)


def test_files_deleted_during_a_run_stop_nothing(
    photos: Photos, dino_search: CommandLine, home: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(photos.folder, tmp_path / "pictures", symlinks=True)
    files = sorted(path for path in folder.rglob("*.jpg") if not path.is_symlink())
    running = dino_search.start("index", folder, "--model", photos.model, "--batch-size", 4, "--json")
    running.wait_until(lambda: num_recorded(home) >= 20)

    def delete_from_the_end() -> None:
        for path in reversed(files[len(files) // 3 :]):
            path.unlink()

    remover = threading.Thread(target=delete_from_the_end)
    remover.start()
    done = running.wait()
    remover.join()
    assert done.exit_code == 0, done
    summary = json.loads(done.stdout)
    state = state_of(home)
    assert summary["added"] == len(state.paths())
    assert summary["failed"] == len(state.paths("failed"))
    assert len(state.images) == len(photos.state.images)
    assert any(row[7] == "vanished" for row in state.images), "nothing was deleted in time"
    assert is_sound(dino_search)

    again = json.loads(dino_search.run("index", folder, "--json").stdout)
    assert again["images"] == len(state.paths())
    assert not any(row[7] == "vanished" for row in state_of(home).images)
