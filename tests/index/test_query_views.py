"""Views of a query: each shows what its matrix says."""

from __future__ import annotations

import numpy as np
import pytest
import skimage
from PIL import Image
from skimage.transform import warp

from dino_index.edits import caption, paste, screenshot
from dino_index.query_views import AS_IS, QueryView, query_views
from dino_index.regions import region_boxes, trimmed_box

SIDE = 96
# Wider than high, so that fractions of the two sides differ.
PICTURE = np.asarray(Image.fromarray(skimage.data.astronaut()).resize((288, 240), box=(0, 0, 512, 400)))
SQUARE = np.asarray(Image.fromarray(PICTURE).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
ALL = query_views(SQUARE, PICTURE, variants="all", regions=True)


def resampled(view: QueryView) -> np.ndarray:
    """What the view's matrix takes it to show, computed from the whole picture by scikit-image."""
    height, width = PICTURE.shape[:2]
    to_pixels = np.diag([width, height, 1.0]) @ np.linalg.inv(view.from_query) @ np.diag([1 / SIDE, 1 / SIDE, 1.0])
    # Pixel centres lie half a pixel in.
    centre = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
    blurred = np.asarray(Image.fromarray(PICTURE).resize((width // 2, height // 2)).resize((width, height)))
    inner = np.linalg.inv(centre) @ to_pixels @ centre
    return np.asarray(warp(blurred / 255, inner, output_shape=(SIDE, SIDE), mode="edge") * 255)


@pytest.mark.parametrize("view", ALL, ids=lambda view: view.name)
def test_a_view_shows_what_its_matrix_says(view: QueryView) -> None:
    assert view.pixels_SSC.shape == (SIDE, SIDE, 3)
    assert view.pixels_SSC.dtype == np.uint8
    # The corners of a tilted view may lie outside of the picture.
    inner = slice(SIDE // 4, 3 * SIDE // 4)
    shown, expected = view.pixels_SSC[inner, inner].astype(float), resampled(view)[inner, inner]
    assert np.corrcoef(shown.ravel(), expected.ravel())[0, 1] > 0.97


def test_the_whole_picture_comes_first_and_alone_without_variants_and_regions() -> None:
    (only,) = query_views(SQUARE, PICTURE, variants="none", regions=False)
    assert (only.name, ALL[0].name) == (AS_IS, AS_IS)
    assert np.array_equal(only.pixels_SSC, SQUARE)


def test_each_switch_adds_its_views() -> None:
    def names(variants: str, regions: bool) -> set[str]:
        return {view.name for view in query_views(SQUARE, PICTURE, variants=variants, regions=regions)}  # type: ignore[arg-type]

    assert names("mirror", False) == {AS_IS, "mirror"}
    assert len(names("all", False)) == 10
    assert names("none", True) - {AS_IS, "trimmed"} == set(region_boxes())


def test_a_mirrored_copy_has_a_view_like_its_original() -> None:
    mirrored = np.ascontiguousarray(PICTURE[:, ::-1])
    views = query_views(np.ascontiguousarray(SQUARE[:, ::-1]), mirrored, variants="mirror", regions=False)
    assert np.array_equal(views[1].pixels_SSC, SQUARE)


@pytest.mark.parametrize("quarter_turns", [1, 2, 3])
def test_a_turned_copy_has_a_view_like_its_original(quarter_turns: int) -> None:
    turned = np.ascontiguousarray(np.rot90(PICTURE, quarter_turns))
    views = query_views(np.ascontiguousarray(np.rot90(SQUARE, quarter_turns)), turned, variants="all", regions=False)
    assert any(np.array_equal(view.pixels_SSC, SQUARE) for view in views)


def framed_copies() -> list[tuple[str, Image.Image]]:
    picture = Image.fromarray(PICTURE)
    copies = [(f"{edit.__name__}-{seed}", edit(picture, np.random.default_rng(seed)))
              for edit in (caption, screenshot) for seed in range(4)]  # fmt: skip
    background = Image.new("RGB", (400, 300), (30, 90, 160))
    return [*copies, ("paste", paste(picture, np.random.default_rng(0), background=background))]


@pytest.mark.parametrize(("name", "framed"), framed_copies(), ids=lambda value: value if isinstance(value, str) else "")
def test_borders_of_one_colour_are_trimmed(name: str, framed: Image.Image) -> None:
    box = trimmed_box(np.asarray(framed))
    assert box is not None
    left, top, right, bottom = box
    pixels = (left * framed.width, top * framed.height, right * framed.width, bottom * framed.height)
    inside = framed.resize((SIDE, SIDE), box=pixels)
    assert np.corrcoef(np.asarray(inside).ravel(), SQUARE.ravel())[0, 1] > 0.9


@pytest.mark.parametrize("picture", [PICTURE, np.full((50, 60, 3), 200, np.uint8)], ids=["photograph", "one colour"])
def test_nothing_is_trimmed_where_there_is_no_border_or_nothing_else(picture: np.ndarray) -> None:
    assert trimmed_box(picture) is None


def test_regions_lie_within_the_picture_at_two_scales() -> None:
    boxes = region_boxes()
    assert len(boxes) == 14
    sides = {(round(right - left, 6), round(bottom - top, 6)) for left, top, right, bottom in boxes.values()}
    assert sides == {(0.7, 0.7), (0.5, 0.5)}
    assert all(0 <= edge <= 1 + 1e-9 for box in boxes.values() for edge in box)


def test_a_view_knows_how_much_of_the_query_it_shows() -> None:
    sizes = {view.name: view.size_of(400, 300) for view in ALL}
    assert (sizes[AS_IS], sizes["mirror"], sizes["rotate_90"]) == ((400, 300), (400, 300), (300, 400))
    assert (sizes["middle"], sizes["50_00"]) == ((280, 210), (200, 150))
