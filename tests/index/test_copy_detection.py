from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

from dino_index.backbones import Backbone
from dino_index.copy_descriptors import CopyDescriptor, shipped_descriptor
from dino_index.copy_detection import (
    CopyDetector,
    Detection,
    DetectionOptions,
    FailedQuery,
    Query,
    Reference,
    make_query,
    make_reference,
)
from dino_index.copy_search import CopySearch
from dino_index.edits import apply_edits
from dino_index.held_references import HeldReferences
from dino_index.model_files import resolve_model
from dino_index.snapshots import Vectors
from photographs import photograph

NAMES = ("astronaut", "chelsea", "coffee", "rocket", "camera", "immunohistochemistry", "retina")


@cache
def bundled() -> tuple[Backbone, CopyDescriptor]:
    model = resolve_model()
    descriptor = shipped_descriptor(model.weights_path)
    assert descriptor is not None
    return Backbone(model, device="cpu", dtype=torch.float32), descriptor


class Gallery:
    """A detector among photographs, whose ids are their places; `loaded` has those that were read to be verified."""

    def __init__(self, pictures: Sequence[Image.Image], options: DetectionOptions | None = None) -> None:
        self.options = options or DetectionOptions(variants="mirror", regions="none")
        self.loaded: list[int] = []
        self.missing: set[int] = set()
        self._pictures = pictures
        backbone, descriptor = bundled()
        squares = [make_reference(picture, side=backbone.spec.input_size).square_SSC for picture in pictures]
        vectors = descriptor.vectors(*backbone.embed(np.stack(squares)))
        search = CopySearch(HeldReferences(Vectors(np.arange(len(pictures)), vectors)), descriptor)
        self._detector = CopyDetector(backbone, search, self._load, self.options)

    def _load(self, image_id: int) -> Reference | None:
        self.loaded.append(image_id)
        if image_id in self.missing:
            return None
        return make_reference(self._pictures[image_id], side=bundled()[0].spec.input_size)

    def query(self, picture: Image.Image, excluded: Sequence[int] = ()) -> Query:
        side = bundled()[0].spec.input_size
        made = make_query(picture, path="query.jpg", sha256=bytes(32), side=side, options=self.options)
        return Query(**vars(made) | {"excluded": frozenset(excluded)})

    def detect(self, *items: Query | FailedQuery, doubted_from: float = math.inf) -> list[list[Detection]]:
        answers = list(self._detector.detect(items, doubted_from=doubted_from))
        assert [item for item, _ in answers] == list(items)
        return [detections for _, detections in answers]


def edited(name: str, kinds: list[str]) -> Image.Image:
    return apply_edits(photograph(name), kinds, np.random.default_rng(0))


def test_queries_are_answered_in_order_and_failed_ones_with_nothing() -> None:
    gallery = Gallery([photograph(name) for name in NAMES])
    queries = [gallery.query(edited(name, ["colour"])) for name in NAMES]
    found = gallery.detect(queries[0], FailedQuery("broken.jpg", "truncated"), *queries[1:])
    assert found.pop(1) == []
    assert [detections[0].image_id for detections in found] == list(range(len(NAMES)))
    assert all(detections[0].verification is not None for detections in found)


def test_a_mirrored_copy_is_verified_in_the_mirrored_view() -> None:
    gallery = Gallery([photograph(name) for name in NAMES])
    (detections,) = gallery.detect(gallery.query(edited("chelsea", ["mirror"])))
    assert detections[0].image_id == NAMES.index("chelsea")
    assert detections[0].view.name == "mirror"
    assert detections[0].verification is not None
    assert detections[0].verification.score > 0.9


def test_candidates_far_behind_the_first_are_not_read() -> None:
    gallery = Gallery([photograph(name) for name in NAMES])
    # Not even where the first cannot be verified: then it has not put them out of the question.
    gallery.missing = {NAMES.index("coffee")}
    (detections,) = gallery.detect(gallery.query(edited("coffee", ["crop", "grey"])))
    first = detections[0]
    far = {each.image_id for each in detections if each.likeness < first.likeness - 0.16}
    assert first.image_id == NAMES.index("coffee")
    assert len(far & {each.image_id for each in detections[: gallery.options.num_verified]}) > 1
    assert first.image_id in gallery.loaded
    assert not far & set(gallery.loaded)


def test_candidates_near_the_first_are_verified_as_well() -> None:
    copies = [photograph("coffee"), edited("coffee", ["blur"]), edited("coffee", ["crop"])]
    gallery = Gallery([*copies, photograph("chelsea")])
    (detections,) = gallery.detect(gallery.query(edited("coffee", ["colour"])))
    assert sorted(gallery.loaded) == [0, 1, 2]
    assert {each.image_id for each in detections if each.verification is not None} == {0, 1, 2}


@pytest.mark.parametrize("num_verified", [1, 5])
def test_whatever_would_be_called_a_copy_for_its_likeness_alone_is_verified(num_verified: int) -> None:
    options = DetectionOptions(variants="none", regions="none", num_verified=num_verified)
    gallery = Gallery([photograph(name) for name in NAMES], options)
    (detections,) = gallery.detect(gallery.query(edited("coffee", ["colour"])))
    doubted_from = sorted(each.likeness for each in detections)[-4]
    assert sum(each.verification is not None for each in detections) < 4
    (detections,) = gallery.detect(gallery.query(edited("coffee", ["colour"])), doubted_from=doubted_from)
    assert [each.verification is not None for each in detections] == [
        each.likeness >= doubted_from for each in detections
    ]


def test_a_reference_that_cannot_be_read_keeps_its_likeness() -> None:
    gallery = Gallery([photograph(name) for name in NAMES])
    gallery.missing = {NAMES.index("rocket")}
    (detections,) = gallery.detect(gallery.query(edited("rocket", ["colour"])))
    assert detections[0].image_id == NAMES.index("rocket")
    assert detections[0].verification is None
    assert detections[0].score == detections[0].likeness


def test_excluded_images_are_neither_found_nor_read() -> None:
    gallery = Gallery([photograph(name) for name in NAMES])
    excluded = NAMES.index("camera")
    (detections,) = gallery.detect(gallery.query(edited("camera", ["colour"]), [excluded]))
    assert len(detections) == len(NAMES) - 1
    assert excluded not in {each.image_id for each in detections} | set(gallery.loaded)


@pytest.mark.parametrize("num_verified", [0, 2])
def test_no_more_candidates_are_verified_than_asked_for(num_verified: int) -> None:
    options = DetectionOptions(variants="none", regions="none", num_verified=num_verified)
    gallery = Gallery([edited("coffee", [kind]) for kind in ("blur", "colour", "noise", "grey")], options)
    (detections,) = gallery.detect(gallery.query(photograph("coffee")))
    assert len(gallery.loaded) <= num_verified
    assert sum(each.verification is not None for each in detections) == len(gallery.loaded)
    assert (len(gallery.loaded) == 0) == (num_verified == 0)
