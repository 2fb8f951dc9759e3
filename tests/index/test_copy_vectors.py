from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import delete, update

from databases import open_catalog
from dino_index.catalog import EmbeddingRow
from dino_index.collections import find_collection
from dino_index.copy_descriptors import CopyDescriptor
from dino_index.copy_vectors import load_copy_vectors
from dino_index.errors import CatalogUnavailable
from dino_index.snapshots import Vectors
from sample_collections import TINY_DIM, ids_of, images_of, index_files, write_pictures

pytestmark = pytest.mark.usefixtures("database")


def loaded(home: Path) -> Vectors:
    catalog = open_catalog(home)
    with catalog.reading() as session:
        return load_copy_vectors(session, find_collection(session, "default"), CopyDescriptor())


def test_each_readable_image_has_its_two_vectors_in_one(
    home: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pictures(tmp_path / "photos", *(f"{number}.jpg" for number in range(5)))
    (tmp_path / "photos" / "same.jpg").write_bytes((tmp_path / "photos" / "3.jpg").read_bytes())
    (tmp_path / "photos" / "bad.jpg").write_bytes(b"no picture")
    index_files(home, tiny_model, tmp_path / "photos")
    monkeypatch.setattr("dino_index.copy_vectors._ROWS_PER_FETCH", 2)
    vectors = loaded(home)
    images, ids = images_of(home), ids_of(home)
    paths = {image_id: path for path, image_id in ids.items()}
    assert vectors.ids_N.tolist() == sorted(ids[path] for path in images if images[path]["status"] == "ok")
    for image_id, vector_C in zip(vectors.ids_N.tolist(), vectors.vectors_ND, strict=True):
        raw = [np.frombuffer(images[paths[image_id]][kind], np.float16).astype(np.float64) for kind in ("cls", "gem")]
        expected = np.concatenate([part / np.linalg.norm(part) for part in raw]) / np.sqrt(2)
        assert vector_C == pytest.approx(expected, abs=1e-6)
        assert np.linalg.norm(vector_C) == pytest.approx(1, abs=1e-6)


def test_a_collection_without_a_readable_image_has_none(home: Path, tmp_path: Path, tiny_model: Path) -> None:
    write_pictures(tmp_path / "photos", "a.jpg")
    index_files(home, tiny_model, tmp_path / "photos")
    (tmp_path / "photos" / "a.jpg").write_bytes(b"no picture")
    index_files(home, tiny_model, tmp_path / "photos")
    assert loaded(home).vectors_ND.shape == (0, 2 * TINY_DIM)


@pytest.mark.parametrize("kind", ["cls", "gem"])
def test_a_missing_or_short_vector_is_an_error_that_says_how_to_repair(
    home: Path, tmp_path: Path, tiny_model: Path, kind: str
) -> None:
    write_pictures(tmp_path / "photos", "a.jpg", "b.jpg")
    index_files(home, tiny_model, tmp_path / "photos")
    of_kind = EmbeddingRow.kind == kind
    with open_catalog(home).writing() as session:
        session.execute(update(EmbeddingRow).where(of_kind).values(vector=b"12"))
    with pytest.raises(CatalogUnavailable, match=r"no|not one of 64 numbers; run: dino-search verify --repair"):
        loaded(home)
    with open_catalog(home).writing() as session:
        session.execute(delete(EmbeddingRow).where(of_kind))
    with pytest.raises(CatalogUnavailable, match="2 readable images without"):
        loaded(home)
