"""Whitening and calibration: versions that are added and never changed."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from catalog_rows import fill
from databases import created_catalog, open_catalog
from dino_index.catalog import CalibrationRow, Catalog, CollectionRow, ModelRow, WhiteningRow
from dino_index.collections import CollectionInfo, find_collection
from dino_index.copy_settings import (
    SINGLE_IMAGES,
    add_calibration,
    add_whitening,
    drop_whitenings,
    latest_calibration,
    latest_whitening,
)
from sample_collections import count_rows

pytestmark = pytest.mark.usefixtures("database")


@pytest.fixture
def catalog(home: Path) -> Catalog:
    catalog = created_catalog(home)
    fill(catalog)
    return catalog


def info_of(catalog: Catalog) -> CollectionInfo:
    with catalog.reading() as session:
        return find_collection(session, "default")


def whiten(catalog: Catalog, data: bytes, *, after: int) -> tuple[int, bytes]:
    with catalog.writing() as session:
        return add_whitening(session, find_collection(session, "default"), data, {"images": 3}, after=after)


def calibrate(catalog: Catalog, slope: float, *, after: int) -> tuple[int, dict[str, object]]:
    with catalog.writing() as session:
        return add_calibration(session, find_collection(session, "default"), {"slope": slope}, after=after)


def latest(catalog: Catalog) -> tuple[object, object]:
    info = info_of(catalog)
    with catalog.reading() as session:
        return latest_whitening(session, info), latest_calibration(session, info)


def test_the_latest_version_is_in_use_and_the_earlier_ones_stay(catalog: Catalog, home: Path) -> None:
    assert latest(catalog) == (None, None)
    assert whiten(catalog, b"one", after=0) == (1, b"one")
    assert calibrate(catalog, 0.5, after=0) == (1, {"slope": 0.5})
    assert whiten(catalog, b"two", after=1) == (2, b"two")
    assert calibrate(catalog, 0.75, after=1) == (2, {"slope": 0.75})
    assert latest(catalog) == ((2, b"two"), (2, {"slope": 0.75}))
    assert (count_rows(home, WhiteningRow), count_rows(home, CalibrationRow)) == (2, 2)


def test_of_two_who_learn_at_once_the_first_is_taken_by_both(catalog: Catalog, home: Path) -> None:
    found: list[tuple[int, bytes]] = []
    barrier = threading.Barrier(2)

    def learn(data: bytes) -> None:
        own = open_catalog(home)
        barrier.wait(timeout=20)
        found.append(whiten(own, data, after=0))

    threads = [threading.Thread(target=learn, args=(data,)) for data in (b"mine", b"yours")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1]
    assert found[0][0] == 1
    assert count_rows(home, WhiteningRow) == 1


def test_another_model_has_its_own(catalog: Catalog) -> None:
    whiten(catalog, b"one", after=0)
    calibrate(catalog, 0.5, after=0)
    with catalog.writing() as session:
        session.add(ModelRow(fingerprint="e" * 64, name="n", dim=2, config={}))
        session.flush()
        session.get_one(CollectionRow, 1).model_id = 2
    assert latest(catalog) == (None, None)
    assert whiten(catalog, b"other", after=0) == (1, b"other")
    with catalog.writing() as session:
        session.get_one(CollectionRow, 1).model_id = 1
    assert latest(catalog) == ((1, b"one"), (1, {"slope": 0.5}))


def test_a_whitening_goes_with_an_image_whose_vector_it_holds_and_its_calibrations_with_it(catalog: Catalog) -> None:
    digests_N32 = np.arange(96, dtype=np.uint8).reshape(3, 32)
    whiten(catalog, save({"mean": np.zeros(4, np.float32)}), after=0)
    whiten(catalog, save({"mean": np.zeros(4, np.float32), SINGLE_IMAGES: digests_N32}), after=1)
    calibrate(catalog, 0.5, after=0)
    with catalog.writing() as session:
        assert drop_whitenings(session, [bytes(32)]) == 0
        assert drop_whitenings(session, [digests_N32[1].tobytes(), b"x" * 32]) == 1
    whitening, calibration = latest(catalog)
    assert whitening == (1, save({"mean": np.zeros(4, np.float32)}))
    assert calibration is None
