from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dino_index import geometry
from dino_index.backbones import Backbone
from dino_index.edits import apply_edits
from dino_index.images import load_image
from dino_index.model_files import resolve_model
from dino_index.verification import NOTHING, Patches, Verification, match, patches_of, verify, verify_best
from photographs import photograph

SURE = 0.9
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "camera", "immunohistochemistry", "retina")


@cache
def bundled() -> Backbone:
    return Backbone(resolve_model(), device="cpu", dtype=torch.float32)


def patches(image: Image.Image) -> Patches:
    return embedded(image.size, image.tobytes())


@cache
def embedded(size: tuple[int, int], rgb: bytes) -> Patches:
    image = Image.frombytes("RGB", size, rgb)
    backbone = bundled()
    decoded = load_image(image, size=(backbone.spec.input_size, backbone.spec.input_size))
    patches_hwP = backbone.embed_with_patches(decoded.pixels_HWC[None])[2][0]
    return patches_of(decoded.pixels_HWC, patches_hwP, width=decoded.width, height=decoded.height)


def compare(query: Image.Image, reference: Image.Image) -> Verification:
    return verify(patches(query), patches(reference))


def edited(name: str, kinds: list[str], seed: int = 0) -> Image.Image:
    return apply_edits(photograph(name), kinds, np.random.default_rng(seed))


def largest_error(found: Verification, expected: geometry.Map) -> float:
    """Of the middle and the corners of the shared area, in fractions of the reference."""
    assert found.transform is not None
    area, _ = geometry.shared_areas(expected)
    points = np.array([*area, np.mean(area, axis=0)])
    return float(np.abs(geometry.apply(found.transform, points) - geometry.apply(expected, points)).max())


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_a_picture_is_itself(name: str) -> None:
    found = compare(photograph(name), photograph(name))
    assert found.score > 0.99
    assert largest_error(found, geometry.identity()) < 0.005
    assert geometry.area(found.query_area) > 0.99
    assert geometry.area(found.reference_area) > 0.99


def test_different_photographs_do_not_match() -> None:
    for number, first in enumerate(PHOTOGRAPHS):
        for second in PHOTOGRAPHS[number + 1 :]:
            assert compare(photograph(first), photograph(second)).score < 0.5, (first, second)


@pytest.mark.parametrize(
    "kinds",
    [
        ["reencode"], ["blur"], ["grey"], ["colour"], ["noise"], ["crop"], ["aspect"], ["caption"], ["overlay"],
        ["paste"], ["rotate_small"], ["resize"], ["screenshot"], ["crop", "caption", "reencode"], ["grey", "overlay"],
        ["rotate_small", "colour"],
    ],
    ids="+".join,
)  # fmt: skip
@pytest.mark.parametrize("name", ["astronaut", "coffee"])
def test_edited_copies_are_verified(kinds: list[str], name: str) -> None:
    assert compare(edited(name, kinds), photograph(name)).score > SURE


def test_a_crop_is_found_where_it_was_cut_out() -> None:
    image = photograph("chelsea")
    box = (0.3, 0.1, 0.9, 0.8)
    crop = image.crop(tuple(round(part * side) for part, side in zip(box, image.size * 2, strict=True)))  # type: ignore[arg-type]
    found = compare(crop, image)
    assert found.score > SURE
    assert largest_error(found, geometry.inverse(geometry.region(*box))) < 0.02
    left, top = np.min(found.reference_area, axis=0)
    right, bottom = np.max(found.reference_area, axis=0)
    assert (left, top, right, bottom) == pytest.approx(box, abs=0.02)


def test_the_whole_is_found_for_its_crop_the_other_way_round() -> None:
    image = photograph("chelsea")
    crop = image.crop((image.width // 5, 0, image.width, image.height * 4 // 5))
    found = compare(image, crop)
    assert found.score > SURE
    assert largest_error(found, geometry.region(0.2, 0, 1, 0.8)) < 0.03


def test_a_picture_pasted_on_another_is_found_where_it_lies() -> None:
    image, canvas = photograph("astronaut"), photograph("coffee").copy()
    canvas.paste(image.resize((200, 200)), (150, 50))
    found = compare(canvas, image)
    box = (150 / canvas.width, 50 / canvas.height, 350 / canvas.width, 250 / canvas.height)
    assert found.score > SURE
    assert largest_error(found, geometry.region(*box)) < 0.03
    assert np.min(found.query_area, axis=0) == pytest.approx(box[:2], abs=0.02)
    assert np.max(found.query_area, axis=0) == pytest.approx(box[2:], abs=0.02)


@pytest.mark.parametrize("degrees", [-20, -6, 9, 18])
def test_a_small_rotation_is_recovered(degrees: int) -> None:
    image = photograph("coffee")
    turned = image.rotate(degrees, Image.Resampling.BICUBIC, expand=True, fillcolor=(9, 9, 9))
    found = compare(turned, image)
    assert found.score > SURE
    assert largest_error(found, geometry.inverse(geometry.rotation(degrees, image.size))) < 0.03


def test_a_changed_aspect_is_recovered() -> None:
    image = photograph("rocket")
    assert largest_error(compare(image.resize((image.width, image.height * 2 // 3)), image), np.eye(3)) < 0.02


@pytest.mark.parametrize(
    ("transposition", "variant"),
    [
        (Image.Transpose.FLIP_LEFT_RIGHT, geometry.mirror()),
        (Image.Transpose.ROTATE_90, geometry.quarter_turns(1)),
        (Image.Transpose.ROTATE_270, geometry.quarter_turns(3)),
    ],
)
def test_a_variant_of_the_query_is_expressed_in_the_query(
    transposition: Image.Transpose, variant: geometry.Map
) -> None:
    """The query is a mirrored or turned crop. Undone as a variant it matches, and maps back to the query as it was."""
    image = photograph("chelsea")
    crop = image.crop((0, 0, image.width * 3 // 4, image.height))
    undone = {
        Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270,
        Image.Transpose.ROTATE_270: Image.Transpose.ROTATE_90,
    }
    query = crop.transpose(undone.get(transposition, transposition))
    found = compare(query.transpose(transposition), image).of_original(variant)
    assert largest_error(found, geometry.inverse(geometry.region(0, 0, 0.75, 1)) @ variant) < 0.02
    assert geometry.area(found.query_area) == pytest.approx(1, abs=0.03)
    assert geometry.area(found.reference_area) == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize("mirrored_first", [True, False])
def test_of_several_views_the_one_that_fits_is_chosen(mirrored_first: bool) -> None:
    image = photograph("chelsea")
    crop = image.crop((0, 0, image.width * 3 // 4, image.height))
    views = [crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT), crop]
    views = views if mirrored_first else views[::-1]
    best, found = verify_best([match(patches(view), patches(image)) for view in views])
    assert views[best] is crop
    assert found.score > SURE


def test_the_answer_is_the_same_every_time() -> None:
    query, reference = edited("astronaut", ["crop", "noise"]), photograph("astronaut")
    first, second = compare(query, reference), compare(query, reference)
    assert first.score == second.score
    np.testing.assert_array_equal(first.transform, second.transform)


def test_a_sticker_costs_agreement_where_it_lies_only() -> None:
    image = photograph("astronaut")
    covered = image.copy()
    covered.paste((250, 210, 60), (0, 0, image.width // 3, image.height // 3))
    found = compare(covered, image)
    assert found.score > SURE
    assert 0.75 < found.agreement < 0.99
    assert largest_error(found, geometry.identity()) < 0.01


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (120, 60, 200)])
def test_uniform_pictures_have_nothing_to_compare(colour: tuple[int, int, int]) -> None:
    uniform = Image.new("RGB", (90, 60), colour)
    for other in (uniform, Image.new("RGB", (60, 90), "white")):
        assert compare(uniform, other) is NOTHING
    assert compare(uniform, photograph("camera")).score < 0.1
    assert compare(photograph("camera"), uniform).score < 0.1
    assert NOTHING.of_original(geometry.mirror()) is NOTHING


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (700, 2), (3, 3)])
def test_the_smallest_pictures_are_verified_without_an_error(size: tuple[int, int]) -> None:
    small = photograph("coffee").resize(size)
    for query, reference in ((small, small), (small, photograph("coffee")), (photograph("coffee"), small)):
        assert 0 <= compare(query, reference).score <= 1


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    sides=st.lists(st.integers(1, 20_000), min_size=4, max_size=4),
    num_patches=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    spread=st.sampled_from([0, 1, 100]),
    unknown_share=st.sampled_from([0, 0.5, 1]),
)
def test_any_input_gives_a_score_and_areas_inside_of_the_pictures(
    seed: int, sides: list[int], num_patches: tuple[int, int], spread: int, unknown_share: float
) -> None:
    rng = np.random.default_rng(seed)

    def anything(width: int, height: int) -> Patches:
        tokens = rng.normal(size=(*num_patches, 4))
        tokens[rng.random(tokens.shape) < unknown_share] = np.nan
        grey = rng.integers(100, 101 + spread, (128, 128)).astype(np.uint8)
        return Patches(patches_hwP=tokens.astype(np.float16), grey_SS=grey, width=width, height=height)

    found = verify(anything(*sides[:2]), anything(*sides[2:]))
    assert 0 <= found.score <= 1
    assert 0 <= found.agreement <= 1
    assert all(0 <= part <= 1 for point in (*found.query_area, *found.reference_area) for part in point)


def test_maps_of_other_sizes_than_16_x_16_are_matched() -> None:
    """Models differ in their patches: here every second one is left out."""
    query, reference = patches(edited("coffee", ["crop"])), patches(photograph("coffee"))
    sparse = [
        Patches(patches_hwP=one.patches_hwP[::2, ::2], grey_SS=one.grey_SS, width=one.width, height=one.height)
        for one in (query, reference)
    ]
    assert verify(*sparse).score > SURE
