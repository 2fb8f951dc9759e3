from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dino_index import geometry
from dino_index.geometry import Map

TRANSPOSITIONS = {1: Image.Transpose.ROTATE_90, 2: Image.Transpose.ROTATE_180, 3: Image.Transpose.ROTATE_270}


def spot(width: int, height: int, x: int, y: int) -> Image.Image:
    image = Image.new("L", (width, height))
    image.putpixel((x, y), 255)
    return image


def place_of_spot(image: Image.Image) -> tuple[float, float]:
    """Middle of the bright pixels, as fractions."""
    y, x = np.nonzero(np.asarray(image) > 100)
    return (float(x.mean()) + 0.5) / image.width, (float(y.mean()) + 0.5) / image.height


def moved(map_33: Map, image: Image.Image) -> tuple[float, float]:
    x, y = geometry.apply(map_33, np.array([place_of_spot(image)]))[0]
    return float(x), float(y)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_quarter_turns_go_where_pillow_turns(number: int) -> None:
    image = spot(40, 30, 31, 7)
    turned = image.transpose(TRANSPOSITIONS[number])
    assert moved(geometry.quarter_turns(number), image) == pytest.approx(place_of_spot(turned))


def test_mirror_exchanges_left_and_right() -> None:
    image = spot(40, 30, 31, 7)
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert moved(geometry.mirror(), image) == pytest.approx(place_of_spot(mirrored))


@pytest.mark.parametrize("degrees", [-25, -8, 13, 90, 170])
@pytest.mark.parametrize("expand", [True, False])
def test_rotation_goes_where_pillow_rotates(degrees: int, expand: bool) -> None:
    image = Image.new("L", (200, 120))
    image.paste(255, (96, 40, 102, 46))
    rotated = image.rotate(degrees, Image.Resampling.BICUBIC, expand=expand)
    found = moved(geometry.rotation(degrees, image.size, expand=expand), image)
    assert found == pytest.approx(place_of_spot(rotated), abs=0.01)


def test_a_region_becomes_the_whole_frame() -> None:
    map_33 = geometry.region(0.2, 0.1, 0.7, 0.9)
    np.testing.assert_allclose(geometry.apply(map_33, np.array([[0.2, 0.1], [0.7, 0.9]])), [[0, 0], [1, 1]], atol=1e-12)


def test_a_region_without_an_area_is_refused() -> None:
    with pytest.raises(ValueError, match="left < right"):
        geometry.region(0.5, 0.1, 0.5, 0.9)


def test_pixels_are_fractions_times_the_sizes() -> None:
    map_33 = geometry.in_pixels(geometry.quarter_turns(1), (400, 300), (300, 400))
    np.testing.assert_allclose(geometry.apply(map_33, np.array([[400.0, 0.0], [100.0, 30.0]])), [[0, 0], [30, 300]])


def test_shared_areas_of_a_crop_are_the_crop_and_all_of_it() -> None:
    crop_to_whole = geometry.inverse(geometry.region(0.25, 0.0, 0.75, 0.5))
    query_area, reference_area = geometry.shared_areas(crop_to_whole)
    assert geometry.area(query_area) == pytest.approx(1)
    assert geometry.area(reference_area) == pytest.approx(0.25)
    assert {(round(x, 6), round(y, 6)) for x, y in reference_area} == {(0.25, 0), (0.75, 0), (0.75, 0.5), (0.25, 0.5)}


def test_pictures_with_nothing_in_common_share_no_area() -> None:
    shift = geometry.identity()
    shift[0, 2] = 1.5
    assert geometry.shared_areas(shift) == ((), ())
    assert geometry.shared_areas(np.zeros((3, 3))) == ((), ())
    assert geometry.area(()) == 0


@given(
    numbers=st.lists(st.floats(-2, 2), min_size=4, max_size=4), shift=st.lists(st.floats(-1, 1), min_size=2, max_size=2)
)
def test_shared_areas_lie_inside_of_both_frames_and_on_each_other(numbers: list[float], shift: list[float]) -> None:
    map_33 = np.array([[*numbers[:2], shift[0]], [*numbers[2:], shift[1]], [0, 0, 1]])
    query_area, reference_area = geometry.shared_areas(map_33)
    assert len(query_area) == len(reference_area)
    for x, y in (*query_area, *reference_area):
        assert 0 <= x <= 1
        assert 0 <= y <= 1
    if query_area:
        np.testing.assert_allclose(geometry.apply(map_33, np.array(query_area)), reference_area, atol=1e-6)
