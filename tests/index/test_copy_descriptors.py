"""Copy vectors, what is taken off their cosines, and candidates found by them."""

from __future__ import annotations

import numpy as np
import pytest

from dino_index.copy_descriptors import CopyDescriptor, shipped_descriptor
from dino_index.copy_search import CopySearch
from dino_index.errors import ModelError
from dino_index.held_references import HeldReferences
from dino_index.model_files import resolve_model
from dino_index.snapshots import Vectors, normalise
from dino_index.whitening import fit_whitening

DIM = 12


def raw(number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """[CLS] and GeM vectors, not unit length, in float16 as they are stored."""
    rng = np.random.default_rng(seed)
    cls_ND, gem_ND = rng.normal(0, 3, (number, DIM)), np.abs(rng.normal(0, 1, (number, DIM)))
    return cls_ND.astype(np.float16), gem_ND.astype(np.float16)


def learned(number: int = 300) -> CopyDescriptor:
    plain = CopyDescriptor().vectors(*raw(number, 1))
    whitening = fit_whitening(plain)
    assert whitening is not None
    return CopyDescriptor(
        whitening=whitening,
        background_BC=plain[:80],
        background_sha256=tuple(bytes([number]) * 32 for number in range(80)),
    )


def test_a_plain_vector_is_both_unit_parts_side_by_side() -> None:
    cls_ND, gem_ND = raw(5, 0)
    vectors_NC = CopyDescriptor().vectors(cls_ND, gem_ND)
    assert np.linalg.norm(vectors_NC, axis=1) == pytest.approx(1, abs=1e-6)
    expected = 0.5 * (normalise(cls_ND) @ normalise(cls_ND).T + normalise(gem_ND) @ normalise(gem_ND).T)
    assert np.allclose(vectors_NC @ vectors_NC.T, expected, atol=1e-5)


def test_what_was_learned_survives_storage() -> None:
    before = learned()
    after = CopyDescriptor.from_bytes(before.to_bytes())
    assert np.array_equal(after.vectors(*raw(5, 2)), before.vectors(*raw(5, 2)))
    queries = before.vectors(*raw(5, 3))
    assert after.biases(queries) == pytest.approx(before.biases(queries), abs=1e-3)
    assert after.background_sha256 == before.background_sha256


def test_nothing_learned_survives_storage_too() -> None:
    after = CopyDescriptor.from_bytes(CopyDescriptor().to_bytes())
    assert (after.whitening, after.background_BC, after.background_sha256) == (None, None, ())


def test_damaged_storage_says_how_to_learn_it_anew() -> None:
    with pytest.raises(ModelError, match="dino-search calibrate --refit"):
        CopyDescriptor.from_bytes(b"no safetensors")


def test_without_enough_background_nothing_is_taken_off() -> None:
    descriptor = learned()
    few = CopyDescriptor(whitening=descriptor.whitening, background_BC=np.asarray(descriptor.background_BC)[:20])
    assert not few.biases(few.vectors(*raw(3, 4))).any()


def test_a_smaller_background_takes_as_much_off() -> None:
    plain = CopyDescriptor().vectors(*raw(2000, 1))
    queries = CopyDescriptor().vectors(*raw(50, 3))
    by_size = [CopyDescriptor(background_BC=plain[:number]).biases(queries).mean() for number in (100, 2000)]
    assert by_size[0] == pytest.approx(by_size[1], rel=0.1)


def test_the_bundled_model_ships_whitening_and_background() -> None:
    shipped = shipped_descriptor(resolve_model().weights_path)
    assert shipped is not None
    assert shipped.whitening is not None
    assert shipped.background_BC is not None
    assert shipped.background_sha256 == ()
    assert shipped.background_BC.shape[1] == 2 * 192


def test_other_weights_ship_nothing(tiny_model: object) -> None:
    assert shipped_descriptor(tiny_model) is None  # type: ignore[arg-type]


def candidates_by_hand(
    descriptor: CopyDescriptor, references: np.ndarray, views: tuple[np.ndarray, np.ndarray], k: int
) -> list[tuple[int, int]]:
    """(reference, best view), best first."""
    vectors = descriptor.vectors(*views)
    scores_VN = vectors @ references.T - descriptor.biases(vectors)[:, None]
    order = np.argsort(-scores_VN.max(axis=0))[:k]
    return [(int(reference), int(scores_VN[:, reference].argmax())) for reference in order]


@pytest.mark.parametrize("descriptor", [CopyDescriptor(), learned()], ids=["plain", "learned"])
def test_candidates_are_the_references_that_any_view_resembles_most(descriptor: CopyDescriptor) -> None:
    references = descriptor.vectors(*raw(200, 5))
    views = raw(6, 6)
    search = CopySearch(HeldReferences(Vectors(np.arange(200) + 1000, references)), descriptor)
    found = search.candidates(*views, 10)
    expected = candidates_by_hand(descriptor, references, views, 10)
    assert [(candidate.image_id - 1000, candidate.views[0]) for candidate in found] == expected
    vectors = descriptor.vectors(*views)
    best = found[0]
    assert best.cosine == pytest.approx(float(vectors[best.views[0]] @ references[best.image_id - 1000]), abs=1e-5)


def test_each_image_is_one_candidate_by_its_best_region() -> None:
    references = CopyDescriptor().vectors(*raw(40, 5))
    ids = np.repeat(np.arange(10), 4)
    search = CopySearch(HeldReferences(Vectors(ids, references)), CopyDescriptor())
    cls_ND, gem_ND = raw(40, 5)
    found = search.candidates(cls_ND[6:7], gem_ND[6:7], 5)
    assert len({candidate.image_id for candidate in found}) == len(found) == 5
    assert found[0].image_id == 1
    assert found[0].cosine == pytest.approx(1, abs=1e-5)


def test_an_empty_collection_and_a_small_one_have_what_they_have() -> None:
    nothing = CopySearch(
        HeldReferences(Vectors(np.empty(0, np.int64), np.empty((0, 2 * DIM), np.float32))), CopyDescriptor()
    )
    assert nothing.candidates(*raw(2, 1), 5) == []
    one = CopySearch(HeldReferences(Vectors(np.array([7]), CopyDescriptor().vectors(*raw(1, 1)))), CopyDescriptor())
    assert [candidate.image_id for candidate in one.candidates(*raw(2, 1), 5)] == [7]
