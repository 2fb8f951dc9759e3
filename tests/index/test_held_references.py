"""Copy vectors in memory that follow the catalog: what was updated finds what is read anew finds."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

import dino_index.held_references
import dino_index.snapshot_store
from dino_index.collections import find_collection
from dino_index.copy_descriptors import CopyDescriptor
from dino_index.copy_search import CopyReferences
from dino_index.held_references import HeldReferences
from dino_index.vector_stores import vector_store_of
from dino_index.whitening import Whitening
from vector_shelf import VectorShelf, random_vectors

DIM = 8
many = partial(random_vectors, dim=DIM)
pytestmark = pytest.mark.usefixtures("database")


@pytest.fixture
def shelf(home: Path, monkeypatch: pytest.MonkeyPatch) -> VectorShelf:
    monkeypatch.setattr(dino_index.held_references, "_ROWS_PER_PART", 10)
    shelf = VectorShelf(home, DIM)
    shelf.put(**many(35))
    return shelf


def loaded(
    shelf: VectorShelf, before: CopyReferences | None = None, descriptor: CopyDescriptor | None = None
) -> HeldReferences:
    with shelf.catalog.reading() as session:
        collection = find_collection(session, "default")
        references = vector_store_of(shelf.catalog).load_copies(
            session, collection, descriptor or CopyDescriptor(), before
        )
    assert isinstance(references, HeldReferences)
    return references


def held(references: HeldReferences) -> dict[int, tuple[float, ...]]:
    """Each image's vector, as a query that wants all of them finds it."""
    nothing = np.zeros((1, 2 * DIM), np.float32)
    ids_N, vectors_NC = references.nearest(nothing, np.zeros(1, np.float32), 10_000)
    found = {int(image_id): tuple(vector_C) for image_id, vector_C in zip(ids_N, vectors_NC.tolist(), strict=True)}
    assert len(found) == len(ids_N)
    if found:
        by_id = references.vectors_of(list(found)).tolist()
        assert {image_id: tuple(vector_C) for image_id, vector_C in zip(found, by_id, strict=True)} == found
    return found


def test_it_follows_what_is_added_replaced_and_removed(shelf: VectorShelf, monkeypatch: pytest.MonkeyPatch) -> None:
    references = loaded(shelf)
    rng = np.random.default_rng(1)
    for step in range(12):
        shelf.put(
            **many(int(rng.integers(0, 7)), prefix=f"new {step} ", seed=step),
            **many(int(rng.integers(0, 4)), seed=step),
        )
        shelf.remove(*rng.choice(list(shelf.vectors), int(rng.integers(0, 5)), replace=False).tolist())
        if step % 3:  # as several changes between two looks
            references = loaded(shelf, references)
            assert held(references) == held(loaded(shelf))
            assert set(held(references)) == set(shelf.vectors)
    shelf.remove(*list(shelf.vectors))
    assert held(loaded(shelf, references)) == {}
    shelf.put(**many(3, prefix="last", seed=99))
    assert set(held(loaded(shelf, loaded(shelf, references)))) == set(shelf.vectors)


def test_what_has_not_changed_is_neither_read_nor_copied(shelf: VectorShelf) -> None:
    before = loaded(shelf)
    shelf.put(**many(2, prefix="new", seed=2))
    after = loaded(shelf, before)
    shared = [part for part in after._parts if any(part is other for other in before._parts)]
    assert [len(part) for part in shared] == [10, 10, 10]
    assert [len(part) for part in after._parts] == [10, 10, 10, 7]


def test_many_small_changes_make_no_more_parts_than_they_need(shelf: VectorShelf) -> None:
    references = loaded(shelf)
    for number in range(25):
        shelf.put(**many(1, prefix=f"{number} ", seed=number))
        references = loaded(shelf, references)
    assert [len(part) for part in references._parts] == [10] * 6


def test_it_is_read_anew_where_nothing_can_be_used_again(shelf: VectorShelf) -> None:
    rng = np.random.default_rng(3)
    mean_D, projection_DD = rng.normal(size=2 * DIM), rng.normal(size=(2 * DIM, 2 * DIM))
    whitened = CopyDescriptor(whitening=Whitening(mean_D.astype(np.float32), projection_DD.astype(np.float32)))
    plain = loaded(shelf)
    assert held(loaded(shelf, plain, whitened)) == held(loaded(shelf, None, whitened)) != held(plain)
    assert held(loaded(shelf, loaded(shelf, None, whitened))) == held(plain)
