from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import faiss
import numpy as np
import pytest
from numpy.typing import NDArray
from sqlalchemy import select

import dino_index.snapshots
from dino_index.catalog import RemovalRow, SnapshotRow
from dino_index.errors import CatalogUnavailable, StorageFull
from dino_index.index_types import Choice, Rows, build_index
from dino_index.snapshots import normalise
from sample_collections import count_rows
from vector_shelf import VectorShelf

DIM = 8


@pytest.fixture
def shelf(home: Path) -> Iterator[VectorShelf]:
    shelf = VectorShelf(home, DIM)
    shelf.put(**vectors(30))
    shelf.compact()
    shelf.put(**vectors(5, "new"))
    yield shelf
    shelf.catalog.close()


def vectors(number: int, prefix: str = "", seed: int = 0) -> dict[str, NDArray[np.float16]]:
    rng = np.random.default_rng([seed, len(prefix)])
    return {f"{prefix}{i}": rng.normal(size=DIM).astype(np.float16) for i in range(number)}


def assert_right(shelf: VectorShelf) -> None:
    for seed in range(5):
        query = np.random.default_rng(100 + seed).normal(size=DIM)
        found, expected = shelf.search(query, 40), shelf.brute_force(query, 40)
        assert found[0] == expected[0]
        np.testing.assert_allclose(found[1], expected[1], atol=2e-6)


def pointer(shelf: VectorShelf) -> tuple[str, int, int]:
    with shelf.catalog.reading() as session:
        row = session.scalars(select(SnapshotRow)).one()
        return row.file_name, row.generation, row.num_vectors


# --- what is written when


def test_adding_an_image_writes_no_snapshot(shelf: VectorShelf) -> None:
    before = [(path, path.read_bytes()) for path in shelf.snapshots()]
    shelf.put(one_more=vectors(1)["0"])
    assert [(path, path.read_bytes()) for path in shelf.snapshots()] == before
    assert_right(shelf)


def test_a_snapshot_holds_everything_and_the_catalog_points_to_it(shelf: VectorShelf) -> None:
    shelf.compact()
    name, generation, num_vectors = pointer(shelf)
    assert num_vectors == 35
    assert shelf.snapshots()[-1].name == name
    index = faiss.read_index(str(shelf.snapshots()[-1]))
    assert index.ntotal == 35
    assert sorted(faiss.vector_to_array(index.id_map)) == sorted(shelf.vectors)  # type: ignore[attr-defined]
    assert generation == shelf.index().generation


def test_old_files_go_and_the_one_before_stays(shelf: VectorShelf) -> None:
    names = [pointer(shelf)[0]]
    for number in range(3):
        shelf.put(another=vectors(1, seed=number)["0"])
        shelf.compact()
        names.append(pointer(shelf)[0])
    assert [path.name for path in shelf.snapshots()] == names[-2:]


def test_what_a_killed_writer_left_is_cleaned_up(shelf: VectorShelf) -> None:
    folder = shelf.snapshots()[0].parent
    (folder / "flat-99-deadbeef.partial").write_bytes(b"half of a snapshot")
    (folder / "flat-98-deadbeef.faiss").write_bytes(b"whole, but the pointer never came to it")
    (folder / "notes.txt").write_text("not ours")
    shelf.compact()
    assert not (folder / "flat-99-deadbeef.partial").exists()
    assert not (folder / "flat-98-deadbeef.faiss").exists()
    assert (folder / "notes.txt").exists()


def test_removals_are_forgotten_once_the_snapshot_is_newer(shelf: VectorShelf) -> None:
    shelf.remove(*list(shelf.vectors)[:3])
    assert count_rows(shelf.home, RemovalRow) == 3
    shelf.compact()
    assert count_rows(shelf.home, RemovalRow) == 0
    assert_right(shelf)


def test_what_is_recorded_while_a_snapshot_is_written_is_found(
    shelf: VectorShelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build_slowly(choice: Choice, rows: Rows) -> tuple[faiss.Index, Choice]:
        shelf.put(**vectors(3, "meanwhile"))
        shelf.remove(*list(shelf.vectors)[:2])
        return build_index(choice, rows)

    monkeypatch.setattr(dino_index.snapshots, "build_index", build_slowly)
    shelf.compact()
    assert pointer(shelf)[2] == 35
    assert count_rows(shelf.home, RemovalRow) == 2
    assert_right(shelf)


# --- damage


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_fewer(path: Path) -> None:
    index = faiss.IndexIDMap2(faiss.IndexFlatIP(DIM))
    index.add_with_ids(np.ones((2, DIM), np.float32), np.arange(2))
    faiss.write_index(index, str(path))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "deleted": Path.unlink,
    "cut by a byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "cut in half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "garbage of the same size": lambda path: path.write_bytes(b"?" * path.stat().st_size),
    "zeros of the same size": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "another snapshot": replace_by_fewer,
    "a folder": replace_by_folder,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_snapshot_is_rebuilt_with_a_warning(
    shelf: VectorShelf, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    shelf.remove(*list(shelf.vectors)[:3])
    (path,) = shelf.snapshots()
    damage(path)
    with caplog.at_level(logging.WARNING):
        assert_right(shelf)
    assert path.name in caplog.text
    assert "compact" in caplog.text
    caplog.clear()
    shelf.compact()
    assert_right(shelf)
    assert not caplog.records


def test_a_write_that_fails_leaves_the_earlier_snapshot(shelf: VectorShelf, monkeypatch: pytest.MonkeyPatch) -> None:
    before = pointer(shelf)

    def fail(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageFull, match="what was committed before is intact"):
        shelf.compact()
    monkeypatch.undo()
    assert pointer(shelf) == before
    assert [path.name for path in shelf.snapshots()[0].parent.iterdir() if path.suffix != ""] == [before[0]]
    assert_right(shelf)


def test_a_vector_of_the_wrong_length_names_the_way_out(shelf: VectorShelf) -> None:
    with shelf.catalog.writing() as session:
        session.connection().exec_driver_sql("UPDATE embedding SET vector = x'0011' WHERE rowid = 1")
    with pytest.raises(CatalogUnavailable, match="verify --repair"):
        shelf.compact()


# --- several at once


def test_compactions_by_many_threads_are_safe(shelf: VectorShelf) -> None:
    failures: list[BaseException] = []

    def compact() -> None:
        try:
            VectorShelf(shelf.home, DIM).compact()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=compact) for _ in range(6)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        assert_right(shelf)
    for thread in threads:
        thread.join(timeout=60)
    assert failures == []
    assert pointer(shelf)[2] == 35
    assert pointer(shelf)[0] in {path.name for path in shelf.snapshots()}
    assert_right(shelf)


def test_compactions_by_two_processes_are_safe(shelf: VectorShelf) -> None:
    script = (
        "import sys; from pathlib import Path; from dino_index.catalog import Catalog\n"
        "from dino_index.collections import find_collection; from dino_index.snapshots import write_snapshot\n"
        "catalog = Catalog.open(sys.argv[1])\n"
        "with catalog.reading() as session: collection = find_collection(session, 'default')\n"
        "for _ in range(20): write_snapshot(catalog, collection)"
    )
    running = [subprocess.Popen([sys.executable, "-c", script, str(shelf.home)]) for _ in range(2)]
    for number in range(10):
        shelf.put(**vectors(2, f"during{number}"))
        assert_right(shelf)
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    assert_right(shelf)


# --- vectors


def test_normalised_rows_have_unit_length_and_zeros_stay_zero() -> None:
    rows_ND = np.array([[3, 4], [0, 0], [6e4, 6e4], [6e-8, 0]], np.float16)
    result = normalise(rows_ND)
    expected_ND = np.array([[0.6, 0.8], [0, 0], [0.5**0.5, 0.5**0.5], [1, 0]], np.float32)
    np.testing.assert_allclose(result, expected_ND, rtol=1e-6)
    assert result.dtype == np.float32


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_home_whose_name_is_not_utf_8_keeps_its_snapshots(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shelf = VectorShelf(tmp_path / "caf\udce9", DIM)
    shelf.put(**vectors(5))
    shelf.compact()
    assert_right(shelf)
    assert not caplog.records
