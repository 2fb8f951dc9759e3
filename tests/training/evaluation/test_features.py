from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dino_index.embedding import EmbeddingSettings
from dino_index.errors import NoImagesFound, SourceNotFound
from dino_index.images import load_image
from dino_index.model_files import resolve_model
from dino_training.evaluation import features
from dino_training.evaluation.features import FeatureStore
from sample_collections import write_pictures


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_pictures(tmp_path / "photos", *(f"{name}/{number}.jpg" for name in "ab" for number in range(9)))
    (tmp_path / "photos/a/broken.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "photos/notes.txt").write_text("nothing")
    return tmp_path / "photos"


@pytest.fixture
def without_forward_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model may not be loaded any more."""

    def refuse(*arguments: Any, **named: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(features, "Backbone", refuse)


def cached(model: Path, cache: Path, remarks: list[str] | None = None) -> FeatureStore:
    told = [] if remarks is None else remarks
    settings = EmbeddingSettings(batch_size=4)
    return FeatureStore(resolve_model(model), device="cpu", cache=cache, settings=settings, on_remark=told.append)


def test_vectors_are_those_of_single_forward_passes(folder: Path, store: FeatureStore) -> None:
    pictures = store.embed_folder(folder)
    assert len(pictures) == 18
    for position in (0, 7, 17):
        pixels = load_image(pictures.paths[position], size=(32, 32)).pixels_HWC
        cls, gem = store.backbone.embed(pixels[None])
        np.testing.assert_allclose(pictures.cls_ND[position].astype(float), cls[0].astype(float), atol=0.02)
        np.testing.assert_allclose(pictures.gem_ND[position].astype(float), gem[0].astype(float), atol=0.02)


def test_what_is_no_readable_picture_is_counted_and_named(folder: Path, store: FeatureStore) -> None:
    facts = store.embed_folder(folder).to_json()
    assert (facts["images"], facts["ignored"]) == (18, {"text": 1})
    assert [entry["path"] for entry in facts["unreadable"]] == [str(folder / "a/broken.jpg")]
    assert facts["unreadable"][0]["reason"].startswith("truncated")


def test_no_readable_picture_is_an_error_in_one_line(tmp_path: Path, store: FeatureStore) -> None:
    (tmp_path / "x.jpg").write_bytes(b"")
    with pytest.raises(NoImagesFound, match=r"found none that can be read: 1 unreadable, such as .*x\.jpg") as caught:
        store.embed_folder(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(SourceNotFound):
        store.embed_folder(tmp_path / "gone")


def test_cached_vectors_are_used_by_content_and_without_a_model(
    folder: Path, tiny_model: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    first = cached(tiny_model, tmp_path / "cache")
    expected = first.embed_folder(folder)
    first.close()
    request.getfixturevalue("without_forward_passes")
    shutil.move(folder, tmp_path / "moved")
    again = cached(tiny_model, tmp_path / "cache").embed_folder(tmp_path / "moved")
    assert np.array_equal(again.cls_ND, expected.cls_ND)
    assert np.array_equal(again.gem_ND, expected.gem_ND)
    assert again.sha256 == expected.sha256


def test_another_input_size_has_vectors_of_its_own(folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    store = cached(tiny_model, tmp_path / "cache")
    small = store.embed_folder(folder)
    large = store.at_size(48).embed_folder(folder)
    assert not np.array_equal(small.cls_ND, large.cls_ND)
    assert np.array_equal(cached(tiny_model, tmp_path / "cache").embed_folder(folder).cls_ND, small.cls_ND)
    assert len(list((tmp_path / "cache").glob("*.sqlite3"))) == 2


@pytest.mark.parametrize("damage", [b"no database at all" * 100, b"SQLite format 3\0" + bytes(500)])
def test_a_damaged_cache_is_said_and_costs_nothing_else(
    folder: Path, tiny_model: Path, tmp_path: Path, damage: bytes
) -> None:
    first = cached(tiny_model, tmp_path / "cache")
    expected = first.embed_folder(folder)
    first.close()
    (path,) = (tmp_path / "cache").glob("*.sqlite3")
    path.write_bytes(damage)
    remarks: list[str] = []
    again = cached(tiny_model, tmp_path / "cache", remarks).embed_folder(folder)
    assert np.array_equal(again.cls_ND, expected.cls_ND)
    assert len(remarks) == 1
    assert "cannot be used" in remarks[0]


def test_a_cache_that_breaks_on_the_way_is_done_without(folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    first = cached(tiny_model, tmp_path / "cache")
    expected = first.embed_folder(folder)
    first.close()
    remarks: list[str] = []
    store = cached(tiny_model, tmp_path / "cache", remarks)
    (path,) = (tmp_path / "cache").glob("*.sqlite3")
    with sqlite3.connect(path) as other:
        other.execute("DROP TABLE vector")
    other.close()
    again = store.embed_folder(folder)
    assert again.paths == expected.paths
    assert len(remarks) == 1


def test_a_cache_folder_that_cannot_be_made_is_said(folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    remarks: list[str] = []
    assert len(cached(tiny_model, tmp_path / "file/cache", remarks).embed_folder(folder)) == 18
    assert len(remarks) == 1


def test_squares_are_embedded_in_batches(tiny_model: Path, tmp_path: Path) -> None:
    store = cached(tiny_model, tmp_path / "cache")
    squares = [np.full((32, 32, 3), value, np.uint8) for value in range(0, 250, 25)]
    cls, gem = store.embed_squares(squares)
    assert cls.shape == gem.shape == (10, 64)
    alone, _ = store.backbone.embed(squares[7][None])
    np.testing.assert_allclose(cls[7].astype(float), alone[0].astype(float), atol=0.02)
