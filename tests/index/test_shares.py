"""Files shared between processes that index the same paths: all shares together come to what one run does."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sabotage
from databases import open_catalog
from dino_index.catalog import EmbeddingRow, SnapshotRow, SourceRow
from dino_index.collections import find_collection
from dino_index.embedding import EmbeddingSettings
from dino_index.errors import ModelNotNamed
from dino_index.indexing import IndexOptions, index_paths
from dino_index.integrity import verify_collection
from dino_index.model_files import resolve_model
from dino_index.shares import Share
from dino_search import Collection
from forked_commands import CommandLine
from sample_collections import (
    count_rows,
    findable,
    ids_of,
    images_of,
    index_files,
    jpeg,
    write_pictures,
    write_shard,
)

# --- which share


@given(paths=st.lists(st.text(max_size=20)), total=st.integers(1, 9))
def test_each_path_falls_to_one_share(paths: list[str], total: int) -> None:
    shares = [Share(number, total) for number in range(1, total + 1)]
    for path in paths:
        assert sum(share.holds(path) for share in shares) == 1


def test_a_path_falls_to_the_same_share_in_every_process() -> None:
    # On other machines, under other hash seeds, with a later version: what they agreed on once.
    shares = [next(n for n in range(1, 6) if Share(n, 5).holds(f"/photos/{name}.jpg")) for name in "abcdefgh"]
    assert shares == [4, 3, 3, 5, 5, 1, 2, 3]


def test_shares_are_of_about_the_same_size() -> None:
    paths = [f"/photos/{number:06d}.jpg" for number in range(20_000)]
    sizes = [sum(Share(number, 8).holds(path) for path in paths) for number in range(1, 9)]
    assert sum(sizes) == 20_000
    assert all(abs(size - 2_500) < 250 for size in sizes), sizes


def test_names_that_are_not_utf8_fall_to_a_share() -> None:
    assert sum(Share(number, 3).holds("/photos/caf\udce9.jpg") for number in (1, 2, 3)) == 1


@pytest.mark.parametrize("text", ["0/4", "5/4", "x", "", "1", "1/0", "-1/4", "1/4/2", "1.5/4", " 1/4", "1/٤"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a share is i/N with i from 1 to N"):
        Share.parse(text)


def test_a_share_is_written_as_it_is_read() -> None:
    assert str(Share.parse("3/8")) == "3/8"


# --- the result


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Pictures, copies, files that cannot be read and others, a shard and a manifest, in folders."""
    folder = tmp_path / "photos"
    write_pictures(folder, *(f"{name}/{number}.jpg" for name in ("hills", "woods", "lake") for number in range(8)))
    shutil.copy(folder / "hills/0.jpg", folder / "woods/copy.jpg")
    for number in range(4):
        (folder / f"lake/bad-{number}.jpg").write_bytes(b"bad")
    (folder / "notes.txt").write_text("no picture")
    elsewhere = tmp_path / "elsewhere"
    members = {f"{n}.jpg": jpeg(100 + n) for n in range(6)} | {f"{n}.cls": f"kind {n % 2}".encode() for n in range(6)}
    write_pictures(elsewhere, "listed.jpg", seed=300)
    write_shard(elsewhere / "s.tar", members)
    rows = [{"path": "listed.jpg", "label": "told", "year": 1999}, {"path": "missing.jpg"}, {"path": "s.tar"}]
    (elsewhere / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def index_share(home: Path, model: Path, photos: Path, share: str, **options: Any) -> Any:
    return index_files(
        home, model, photos, photos.parent / "elsewhere/list.jsonl", labels="folders", share=Share.parse(share),
        embedding=EmbeddingSettings(batch_size=4, workers=1), **options,
    )  # fmt: skip


def index_whole(home: Path, model: Path, photos: Path, **options: Any) -> Any:
    return index_files(
        home, model, photos, photos.parent / "elsewhere/list.jsonl", labels="folders",
        embedding=EmbeddingSettings(batch_size=4, workers=1), **options,
    )  # fmt: skip


def without_vectors(images: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Whether there are vectors, not their values: in other batches the last bits differ."""
    return {
        path: {key: bool(value) if key in ("cls", "gem") else value for key, value in facts.items()}
        for path, facts in images.items()
    }


@pytest.mark.usefixtures("database")
@pytest.mark.parametrize("order", ["123", "312", "3213"])
def test_all_shares_in_any_order_are_one_run(
    home: Path, tiny_model: Path, photos: Path, tmp_path: Path, order: str
) -> None:
    other = tmp_path / "other"
    whole = index_whole(other, tiny_model, photos)
    summaries = [index_share(home, tiny_model, photos, f"{number}/3") for number in order[:3]]
    for number in order[3:]:
        assert index_share(home, tiny_model, photos, f"{number}/3").added == 0
    assert without_vectors(images_of(home)) == without_vectors(images_of(other))
    assert findable(home) == findable(other)
    assert count_rows(home, EmbeddingRow) == count_rows(other, EmbeddingRow)
    assert count_rows(home, SourceRow) == count_rows(other, SourceRow)
    assert sum(summary.added for summary in summaries) == whole.added == 32
    assert sum(summary.failed for summary in summaries) == whole.failed == 5
    assert all(summary.added > 0 for summary in summaries)  # of 32: about once in 100,000 folders it is none
    # And one run of all finds nothing left to do.
    again = index_whole(home, tiny_model, photos)
    assert (again.added, again.updated, again.skipped, again.failed) == (0, 0, 32, 5)


def test_the_last_share_writes_the_snapshot(
    home: Path, tiny_model: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dino_index.snapshot_store._MIN_DELTA_TO_COMPACT", 1)
    for number in (2, 3):
        index_share(home, tiny_model, photos, f"{number}/3")
        assert count_rows(home, SnapshotRow) == 0
    index_share(home, tiny_model, photos, "1/3")
    assert count_rows(home, SnapshotRow) == 1
    catalog = open_catalog(home)
    assert verify_collection(catalog, catalog.read(lambda session: find_collection(session, "default"))).problems == []


def test_changed_labels_and_files_are_updated_by_their_share_alone(home: Path, tiny_model: Path, photos: Path) -> None:
    index_whole(home, tiny_model, photos)
    (photos / "hills").rename(photos / "mountains")  # all of them found again, under another label
    before = ids_of(home)
    updated = [index_share(home, tiny_model, photos, f"{number}/2").updated for number in (1, 2)]
    assert sum(updated) == 8
    assert set(ids_of(home).values()) == set(before.values())
    assert {facts["label"] for path, facts in images_of(home).items() if "mountains" in path} == {"mountains"}


def test_a_failed_file_that_is_gone_is_forgotten_by_its_share(home: Path, tiny_model: Path, photos: Path) -> None:
    index_whole(home, tiny_model, photos)
    gone = photos / "lake/bad-1.jpg"
    gone.unlink()
    removed = {number: index_share(home, tiny_model, photos, f"{number}/3").removed for number in (1, 2, 3)}
    assert removed == {number: int(Share(number, 3).holds(str(gone))) for number in (1, 2, 3)}
    assert str(gone) not in images_of(home)


def test_more_shares_than_files_leave_some_without_work(home: Path, tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "few"
    write_pictures(folder, "1.jpg", "2.jpg")
    added = [
        index_files(home, tiny_model, folder, share=Share(number, 9)).added for number in range(1, 10)
    ]  # fmt: skip
    assert (sum(added), added.count(0) >= 7) == (2, True)
    assert len(findable(home)) == 2


def test_a_share_is_not_pruned() -> None:
    with pytest.raises(ValueError, match="prune when all shares are done"):
        IndexOptions(share=Share(1, 2), prune=True)


# --- the model


def test_shares_of_a_new_collection_need_a_named_model(home: Path, tiny_model: Path, photos: Path) -> None:
    catalog = open_catalog(home, create=True)
    share = Share(1, 2)
    options = IndexOptions(share=share)
    with pytest.raises(ModelNotNamed, match="--model bundled"):
        index_paths(catalog, "default", [photos], None, lambda: pytest.fail("a model was chosen"), options)
    index_files(home, tiny_model, photos / "hills")
    spec = resolve_model(tiny_model)
    summary = index_paths(catalog, "default", [photos / "woods"], None, lambda: spec, options)
    assert summary.added == sum(share.holds(str(path)) for path in (photos / "woods").iterdir())


def test_a_default_model_at_another_input_size_is_not_named(home: Path, photos: Path) -> None:
    with Collection.open(home=home, input_size=64) as collection, pytest.raises(ModelNotNamed, match="name the same"):
        collection.index(photos, IndexOptions(share=Share(1, 2)))


# --- processes


@pytest.fixture
def dino_search(tmp_path: Path) -> Iterator[CommandLine]:
    command_line = CommandLine(tmp_path / "commands")
    yield command_line
    command_line.end()


@pytest.mark.usefixtures("database")
def test_all_shares_at_once_are_one_run(
    dino_search: CommandLine, home: Path, tiny_model: Path, photos: Path, tmp_path: Path
) -> None:
    index_whole(tmp_path / "other", tiny_model, photos)
    go = tmp_path / "go"
    arguments = ("index", photos, tmp_path / "elsewhere/list.jsonl", "--labels", "folders", "--model", tiny_model)
    runs = [
        dino_search.start(
            *arguments, "--shard", f"{number}/3", "--batch-size", 2, "--json", prepare=partial(sabotage.wait_for, go)
        )
        for number in (1, 2, 3)
    ]
    go.touch()
    finished = [run.wait() for run in runs]
    assert [(done.exit_code, done.stderr) for done in finished] == [(0, "")] * 3
    assert sum(json.loads(done.stdout)["added"] for done in finished) == 32
    assert without_vectors(images_of(home)) == without_vectors(images_of(tmp_path / "other"))
    assert len(findable(home)) == 32
    assert dino_search.run("verify").stdout == "32 images checked, 0 problems\n"


@pytest.mark.usefixtures("database")
def test_a_killed_share_goes_on_when_it_is_run_again(
    dino_search: CommandLine, home: Path, tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "many"
    paths = write_pictures(folder, *(f"{number}.jpg" for number in range(200)))
    arguments = ("index", folder, "--model", tiny_model, "--batch-size", 1, "--workers", 1, "--json")
    dino_search.run(*arguments, "--shard", "2/2")
    done_by_other = len(ids_of(home))
    running = dino_search.start(*arguments, "--shard", "1/2", prepare=partial(sabotage.die_in_transaction, 2))
    assert running.wait().exit_code == 128 + signal.SIGKILL
    recorded = len(ids_of(home))
    assert done_by_other < recorded < 200
    again = dino_search.run(*arguments, "--shard", "1/2")
    assert again.exit_code == 0
    assert json.loads(again.stdout)["added"] == 200 - recorded
    assert findable(home) == {str(path) for path in paths}


def test_bad_shares_are_wrong_usage(dino_search: CommandLine, tmp_path: Path) -> None:
    write_pictures(tmp_path / "p", "1.jpg")
    refused = [dino_search.run("index", tmp_path / "p", "--shard", share) for share in ("0/4", "5/4", "x")]
    refused.append(dino_search.run("index", tmp_path / "p", "--shard", "1/2", "--prune"))
    assert [(done.exit_code, done.stdout) for done in refused] == [(2, "")] * 4
    assert all("i/N" in done.stderr for done in refused[:3])
    unnamed = dino_search.run("index", tmp_path / "p", "--shard", "1/2")
    assert (unnamed.exit_code, len(unnamed.stderr.splitlines())) == (1, 1)
    assert "--model" in unnamed.stderr


def test_a_share_without_files_is_done_and_one_of_bad_files_alone_is_not(
    dino_search: CommandLine, tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "p"
    folder.mkdir()
    (folder / "bad.jpg").write_bytes(b"bad")
    ended = [
        dino_search.run("index", folder, "--model", tiny_model, "--shard", f"{number}/2").exit_code
        for number in (1, 2)
    ]  # fmt: skip
    assert sorted(ended) == [0, 1]
