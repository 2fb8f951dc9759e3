"""What copy detection learns of a collection, and regions of its images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from databases import open_catalog
from dino_index.backbones import Backbone
from dino_index.catalog import Catalog
from dino_index.collections import CollectionInfo, find_collection
from dino_index.copy_descriptors import CopyDescriptor
from dino_index.copy_settings import latest_whitening
from dino_index.copy_vectors import load_copy_vectors
from dino_index.descriptor_learning import MIN_OWN_BACKGROUND, copy_descriptor
from dino_index.model_files import resolve_model
from dino_index.reference_regions import embed_regions, load_region_vectors
from dino_index.regions import region_boxes
from sample_collections import TINY_DIM, index_files, write_pictures

pytestmark = pytest.mark.usefixtures("database")


def indexed(home: Path, model: Path, folder: Path, number: int) -> tuple[Catalog, CollectionInfo]:
    write_pictures(folder, *(f"{n:04d}.jpg" for n in range(number)))
    index_files(home, model, folder)
    catalog = open_catalog(home)
    with catalog.reading() as session:
        return catalog, find_collection(session, "default")


def version(catalog: Catalog, collection: CollectionInfo) -> int:
    with catalog.reading() as session:
        latest = latest_whitening(session, collection)
    return latest[0] if latest else 0


def test_a_small_collection_learns_and_stores_nothing(home: Path, tiny_model: Path, tmp_path: Path) -> None:
    catalog, collection = indexed(home, tiny_model, tmp_path / "p", MIN_OWN_BACKGROUND - 1)
    remarks: list[str] = []
    descriptor = copy_descriptor(catalog, collection, home / "models", on_remark=remarks.append)
    assert (descriptor.whitening, descriptor.background_BC, remarks) == (None, None, [])
    assert version(catalog, collection) == 0


def test_the_background_is_learned_once_of_the_collections_own_images(
    home: Path, tiny_model: Path, tmp_path: Path
) -> None:
    catalog, collection = indexed(home, tiny_model, tmp_path / "p", MIN_OWN_BACKGROUND)
    remarks: list[str] = []
    first = copy_descriptor(catalog, collection, home / "models", on_remark=remarks.append)
    assert remarks == [f"learned from {MIN_OWN_BACKGROUND} images of collection 'default': background"]
    assert len(set(first.background_sha256)) == MIN_OWN_BACKGROUND
    index_files(home, tiny_model, *write_pictures(tmp_path / "more", "a.jpg", "b.jpg", seed=10_000))
    again = copy_descriptor(catalog, collection, home / "models", on_remark=remarks.append)
    assert again.background_sha256 == first.background_sha256, "what was learned is frozen"
    assert len(remarks) == 1
    anew = copy_descriptor(catalog, collection, home / "models", refit=True, on_remark=remarks.append)
    assert len(anew.background_sha256) == MIN_OWN_BACKGROUND + 2
    assert version(catalog, collection) == 2


def test_whitening_is_learned_from_ten_images_a_dimension_on(home: Path, tiny_model: Path, tmp_path: Path) -> None:
    catalog, collection = indexed(home, tiny_model, tmp_path / "p", 10 * 2 * TINY_DIM)
    descriptor = copy_descriptor(catalog, collection, home / "models")
    assert descriptor.whitening is not None
    with catalog.reading() as session:
        vectors = load_copy_vectors(session, collection, descriptor).vectors_ND
    # Half whitened: the mean is gone, and no direction has most of the variance.
    assert np.linalg.norm(vectors.mean(axis=0)) < 0.2
    assert descriptor.background_BC is not None
    assert np.linalg.norm(descriptor.background_BC, axis=1) == pytest.approx(1, abs=1e-3)


def test_regions_are_embedded_once_and_searched_beside_the_whole(home: Path, tiny_model: Path, tmp_path: Path) -> None:
    catalog, collection = indexed(home, tiny_model, tmp_path / "p", 5)
    (tmp_path / "p" / "0003.jpg").write_bytes(b"changed")
    backbone = Backbone(resolve_model(tiny_model), device="cpu")
    remarks: list[str] = []
    embed_regions(catalog, collection, backbone, on_remark=remarks.append)
    assert remarks[0] == f"embedding regions of 5 images, {5 * len(region_boxes())} forward passes, once"
    assert "1 images cannot be read any more" in remarks[1]
    with catalog.reading() as session:
        vectors = load_region_vectors(session, collection, CopyDescriptor())
        whole = load_copy_vectors(session, collection, CopyDescriptor())
    assert len(whole) == 5
    assert len(vectors) == 4 * len(region_boxes())
    assert set(vectors.ids_N.tolist()) < set(whole.ids_N.tolist())
    assert np.linalg.norm(vectors.vectors_ND, axis=1) == pytest.approx(1, abs=1e-3)
    remarks.clear()
    embed_regions(catalog, collection, backbone, on_remark=remarks.append)
    assert remarks[0].startswith("embedding regions of 1 images")
    assert index_files(home, tiny_model, tmp_path / "p").failed == 1
