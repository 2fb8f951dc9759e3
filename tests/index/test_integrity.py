from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from sqlalchemy import func, select, text

from databases import open_catalog
from dino_index.catalog import Catalog, EmbeddingRow, ImageRow, RemovalRow
from dino_index.collections import CollectionInfo, find_collection
from dino_index.indexing import IndexSummary
from dino_index.integrity import IntegrityReport, compact_collection, verify_collection
from dino_index.recording import remove_images
from dino_index.snapshots import load_vectors
from sample_collections import (
    TINY_DIM,
    count_rows,
    findable,
    ids_of,
    images_of,
    index_files,
    write_pictures,
)

Damage = Callable[[bytes], bytes | None]
"""What becomes of a vector; None: it is deleted."""


class Indexed:
    """A folder of eight pictures, indexed and compacted, to be damaged."""

    def __init__(self, home: Path, model: Path, photos: Path) -> None:
        self.home = home
        self.photos = photos
        self._model = model
        write_pictures(photos, *(f"{number}.jpg" for number in range(8)))
        self.index(photos)
        self.compact()

    def index(self, *paths: str | Path) -> IndexSummary:
        return index_files(self.home, self._model, *paths)

    def verify(self, *, repair: bool = False) -> IntegrityReport:
        with closing(open_catalog(self.home)) as catalog:
            reindex = (lambda paths: paths and self.index(*paths)) if repair else None
            return verify_collection(catalog, self._collection(catalog), reindex=reindex)

    def compact(self) -> None:
        with closing(open_catalog(self.home)) as catalog:
            compact_collection(catalog, self._collection(catalog))

    def remove(self, *names: str) -> None:
        ids = ids_of(self.home)
        with closing(open_catalog(self.home)) as catalog, catalog.writing() as session:
            collection = find_collection(session, "default")
            remove_images(session, collection, [ids[str(self.photos / name)] for name in names])

    def sql(self, statement: str, **values: object) -> None:
        with closing(open_catalog(self.home)) as catalog, catalog.writing() as session:
            session.execute(text(statement), values)

    def damage_embedding(self, name: str, kind: str | None, damage: Damage) -> str:
        """Replaces the vectors of one kind (None: both) of a file by what `damage` makes of them; the file's path."""
        path = str(self.photos / name)
        with closing(open_catalog(self.home)) as catalog, catalog.writing() as session:
            of_file = EmbeddingRow.sha256 == images_of(self.home)[path]["sha256"]
            for row in session.scalars(select(EmbeddingRow).where(of_file)):
                if kind in (None, row.kind):
                    vector = damage(row.vector)
                    if vector is None:
                        session.delete(row)
                    else:
                        row.vector = vector
        return path

    def snapshot(self) -> Path:
        return max((self.home / "snapshots").rglob("*.faiss"), key=lambda path: path.stat().st_mtime_ns)

    @staticmethod
    def _collection(catalog: Catalog) -> CollectionInfo:
        with catalog.reading() as session:
            return find_collection(session, "default")


@pytest.fixture
def indexed(home: Path, tiny_model: Path, tmp_path: Path, database: str) -> Indexed:
    return Indexed(home, tiny_model, tmp_path / "photos")


NAN = np.full(TINY_DIM, np.nan, np.float16).tobytes()
EMBEDDING_DAMAGES: dict[str, tuple[str | None, Damage]] = {
    "not a number": ("cls", lambda vector: NAN),
    "all zeros": ("gem", lambda vector: bytes(2 * TINY_DIM)),
    "too short": ("cls", lambda vector: vector[:10]),
    "too long": ("gem", lambda vector: vector + b"\0"),
    "no cls": ("cls", lambda vector: None),
    "nothing": (None, lambda vector: None),
}


def test_a_sound_collection_has_no_problems(indexed: Indexed) -> None:
    (indexed.photos / "bad.jpg").write_bytes(b"bad")
    write_pictures(indexed.photos, "new.jpg", seed=40)
    indexed.index(indexed.photos)
    indexed.remove("1.jpg")
    report = indexed.verify()
    assert (report.problems, report.repaired, report.images_checked) == ([], [], 8)
    assert (indexed.verify(repair=True).problems, indexed.verify(repair=True).repaired) == ([], [])


# --- embeddings


@pytest.mark.parametrize(("kind", "damage"), EMBEDDING_DAMAGES.values(), ids=EMBEDDING_DAMAGES)
def test_a_damaged_embedding_is_found_and_repaired_from_its_file(
    indexed: Indexed, kind: str | None, damage: Damage
) -> None:
    before, ids = images_of(indexed.home), ids_of(indexed.home)
    path = indexed.damage_embedding("3.jpg", kind, damage)
    assert indexed.verify().problems == [f"{path}: its embedding is missing or damaged"]
    assert indexed.verify().problems  # looking repairs nothing
    report = indexed.verify(repair=True)
    assert report.problems == []
    assert report.repaired == [f"{path}: its embedding was damaged"]
    assert indexed.verify().problems == []
    assert ids_of(indexed.home) == ids
    assert images_of(indexed.home).keys() == before.keys()
    for kind in ("cls", "gem"):
        new, old = (np.frombuffer(images[path][kind], np.float16) for images in (images_of(indexed.home), before))
        np.testing.assert_allclose(new, old, rtol=0.02, atol=0.02)
    assert len(findable(indexed.home)) == 8


def test_copies_with_a_damaged_embedding_are_repaired_together(indexed: Indexed) -> None:
    shutil.copy(indexed.photos / "3.jpg", indexed.photos / "copy.jpg")
    indexed.index(indexed.photos)
    path = indexed.damage_embedding("3.jpg", *EMBEDDING_DAMAGES["not a number"])
    report = indexed.verify(repair=True)
    assert sorted(report.repaired) == [f"{name}: its embedding was damaged"
                                       for name in (path, str(indexed.photos / "copy.jpg"))]  # fmt: skip
    assert report.problems == []
    assert len(findable(indexed.home)) == 9


@pytest.mark.parametrize(("fate", "reason"), [("gone", "vanished"), ("overwritten", "not_an_image")])
def test_what_cannot_be_repaired_is_a_problem_and_leaves_search(indexed: Indexed, fate: str, reason: str) -> None:
    path = indexed.damage_embedding("3.jpg", *EMBEDDING_DAMAGES["not a number"])
    if fate == "gone":
        os.unlink(path)
    else:
        Path(path).write_bytes(b"overwritten")
    report = indexed.verify(repair=True)
    assert (len(report.problems), report.repaired) == (1, [])
    assert path in report.problems[0]
    assert path not in findable(indexed.home)
    assert len(findable(indexed.home)) == 7
    assert images_of(indexed.home)[path]["error_code"] == reason
    indexed.compact()
    assert indexed.verify().problems == []  # the ledger has it now


# --- the snapshot


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-300] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 8)


SNAPSHOT_DAMAGES: dict[str, Callable[[Path], None]] = {"one bit": flip_a_byte, "cut": cut, "deleted": Path.unlink}


@pytest.mark.parametrize("damage", SNAPSHOT_DAMAGES.values(), ids=SNAPSHOT_DAMAGES)
def test_a_tampered_snapshot_is_found_and_written_anew(indexed: Indexed, damage: Callable[[Path], None]) -> None:
    damage(indexed.snapshot())
    (problem,) = indexed.verify().problems
    assert problem.startswith("snapshot: ")
    assert indexed.verify(repair=True).repaired == [problem]
    assert indexed.verify().problems == []
    assert len(findable(indexed.home)) == 8


def test_a_snapshot_of_another_state_is_found_and_written_anew(indexed: Indexed) -> None:
    indexed.sql("UPDATE collection SET generation = 0")
    (problem,) = indexed.verify().problems
    assert "newer than the catalog" in problem
    assert indexed.verify(repair=True).problems == []
    assert indexed.verify().problems == []


def test_a_snapshot_that_lacks_an_image_is_found_and_written_anew(indexed: Indexed) -> None:
    """As if the row had been written behind the program's back, or an earlier version had forgotten it."""
    with closing(open_catalog(indexed.home)) as catalog, catalog.reading() as session:
        vectors = load_vectors(session, find_collection(session, "default"))
    path = indexed.snapshot()
    vectors.ids_N[0] += 1000
    index = faiss.IndexIDMap2(faiss.IndexFlatIP(vectors.dim))
    index.add_with_ids(vectors.vectors_ND, vectors.ids_N)
    faiss.write_index(index, str(path))
    indexed.sql("UPDATE snapshot SET sha256 = :new", new=hashlib.sha256(path.read_bytes()).digest())
    (problem,) = indexed.verify().problems
    assert "lacks 1 images of the catalog and has 1 that are not in it" in problem
    assert indexed.verify(repair=True).repaired == [problem]
    assert indexed.verify().problems == []


def test_changes_after_the_snapshot_are_no_fault_of_it(indexed: Indexed) -> None:
    write_pictures(indexed.photos, "new.jpg", "2.jpg", seed=40)
    (indexed.photos / "3.jpg").write_bytes(b"bad")
    indexed.index(indexed.photos)
    indexed.remove("4.jpg")
    assert indexed.verify().problems == []


# --- the database


def test_a_broken_reference_is_found(indexed: Indexed, database: str) -> None:
    # What references forbid is done with them switched off.
    off = "PRAGMA foreign_keys = OFF" if database == "sqlite" else "SET session_replication_role = replica"
    with closing(open_catalog(indexed.home)) as catalog, catalog.store.engine.connect() as connection:
        driver: Any = connection.connection.driver_connection
        driver.rollback()
        driver.execute(off)
        driver.execute("INSERT INTO removal (collection_id, image_id, generation) VALUES (77, 1, 1)")
        driver.commit()
        connection.invalidate()
    assert indexed.verify().problems == ["the database file: broken reference in removal"]


# --- compacting


def test_compacting_drops_embeddings_that_no_image_has(indexed: Indexed) -> None:
    shutil.copy(indexed.photos / "1.jpg", indexed.photos / "copy.jpg")
    indexed.index(indexed.photos)
    indexed.remove("0.jpg", "1.jpg", "2.jpg")
    assert count_rows(indexed.home, EmbeddingRow) == 16
    indexed.compact()
    assert count_rows(indexed.home, EmbeddingRow) == 2 * 6  # 1.jpg's is its copy's too
    assert count_rows(indexed.home, RemovalRow) == 0
    assert len(findable(indexed.home)) == 6
    assert indexed.verify().problems == []


def test_compacting_one_collection_leaves_the_embeddings_of_another(
    indexed: Indexed, home: Path, tiny_model: Path
) -> None:
    index_files(home, tiny_model, indexed.photos, collection="second")
    indexed.remove(*(f"{number}.jpg" for number in range(8)))
    indexed.compact()
    assert len(findable(home, "second")) == 8
    assert findable(home) == set()


def test_compacting_gives_space_back(indexed: Indexed, database: str) -> None:
    catalog = open_catalog(indexed.home)
    with catalog.writing() as session:
        model_id = session.scalars(select(func.max(EmbeddingRow.model_id))).one()
        session.add_all(
            EmbeddingRow(sha256=number.to_bytes(32, "big"), model_id=model_id, kind="cls", region="full",
                         vector=bytes(2000))
            for number in range(500)
        )  # fmt: skip
    catalog.close()
    indexed.compact()
    catalog = open_catalog(indexed.home)
    with catalog.reading() as session:
        pages = "page_count * page_size FROM pragma_page_count, pragma_page_size"
        table = "pg_total_relation_size('embedding')"
        size = session.execute(text(f"SELECT {pages if database == 'sqlite' else table}")).scalar_one()
    assert size < 300_000
    assert count_rows(indexed.home, ImageRow) == 8


def test_a_removed_image_comes_back_when_its_folder_is_indexed_again(indexed: Indexed) -> None:
    ids = ids_of(indexed.home)
    indexed.remove("5.jpg")
    assert len(findable(indexed.home)) == 7
    assert indexed.index(indexed.photos).added == 1
    assert ids_of(indexed.home)[str(indexed.photos / "5.jpg")] not in ids.values()
    assert len(findable(indexed.home)) == 8
