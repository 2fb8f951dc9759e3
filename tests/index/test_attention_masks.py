from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dino_index.attention_masks import ObjectMask, enlarge, jaccard, keep_mass, shares_on_object


def truth(rows: list[str]) -> ObjectMask:
    """`#` is object, `.` background, `?` void."""
    cells = np.array([list(row) for row in rows])
    return ObjectMask(object_YX=cells == "#", void_YX=cells == "?")


def fewest_patches(values: list[float], mass: float) -> int:
    """By trying all sets."""
    for number in range(1, len(values) + 1):
        if any(sum(chosen) >= mass * sum(values) * (1 - 1e-12) for chosen in combinations(values, number)):
            return number
    raise AssertionError


@given(
    values=st.lists(st.integers(0, 20), min_size=1, max_size=9).filter(any),
    mass=st.sampled_from([0.01, 0.3, 0.5, 0.6, 0.9, 1.0]),
)
def test_a_mask_keeps_the_mass_with_as_few_patches_as_can_be(values: list[int], mass: float) -> None:
    map_hw = np.array(values, np.float32).reshape(1, -1)
    (mask_hw,) = keep_mass(map_hw[None], mass)
    assert map_hw[mask_hw].sum() >= mass * map_hw.sum() * (1 - 1e-6)
    assert mask_hw.sum() == fewest_patches([float(value) for value in values], mass)
    assert map_hw[mask_hw].min() >= map_hw[~mask_hw].max(initial=0)


def test_each_head_has_a_mask_of_its_own() -> None:
    maps_Hhw = np.array([[[0.7, 0.1], [0.1, 0.1]], [[0.1, 0.1], [0.5, 0.3]]], np.float32)
    assert keep_mass(maps_Hhw, 0.6).tolist() == [[[True, False], [False, False]], [[False, False], [True, True]]]


def test_of_even_attention_the_first_patches_are_kept() -> None:
    (mask_hw,) = keep_mass(np.full((1, 10, 10), 0.01, np.float32), 0.6)
    assert mask_hw.sum() == 60
    assert mask_hw[:6].all()


@pytest.mark.parametrize("mass", [0.0, -1.0, 1.01, float("nan")])
def test_a_mass_that_is_no_share_is_refused(mass: float) -> None:
    with pytest.raises(ValueError, match="mass must be above 0 and at most 1"):
        keep_mass(np.ones((1, 2, 2), np.float32), mass)


def test_patches_cover_their_part_of_the_picture() -> None:
    mask_YX = enlarge(np.array([[True, False], [False, True]]), (6, 4))
    assert mask_YX.astype(int).tolist() == [[1, 1, 1, 0, 0, 0]] * 2 + [[0, 0, 0, 1, 1, 1]] * 2


@pytest.mark.parametrize(
    ("mask", "rows", "expected"),
    [
        (["##..", "##.."], ["##..", "##.."], 1.0),
        (["##..", "##.."], ["..##", "..##"], 0.0),
        (["##..", "##.."], [".##.", ".##."], 2 / 6),
        (["####", "####"], ["#...", "...."], 1 / 8),
        (["####", "####"], ["##??", "##??"], 1.0),
        (["....", "...."], ["....", "...."], 0.0),
    ],
    ids=["same", "apart", "overlap", "part", "void", "empty"],
)
def test_jaccard_is_intersection_over_union(mask: list[str], rows: list[str], expected: float) -> None:
    assert jaccard(truth(mask).object_YX, truth(rows)) == pytest.approx(expected)


def test_shares_count_patches_by_the_part_that_is_object() -> None:
    maps_Hhw = np.array([[[0.5, 0.1], [0.2, 0.2]], [[0.0, 1.0], [0.0, 0.0]]], np.float32)
    # All of the first patch, half of the third.
    shares_H = shares_on_object(maps_Hhw, truth(["##..", "##..", "#...", "#..."]))
    assert shares_H == pytest.approx([0.6, 0.0])


def test_void_belongs_to_neither_side() -> None:
    maps_Hhw = np.array([[[0.5, 0.3], [0.1, 0.1]]], np.float32)
    shares_H = shares_on_object(maps_Hhw, truth(["##??", "##??", "....", "...."]))
    assert shares_H == pytest.approx([0.5 / 0.7])
    assert truth(["##??", "##??", "....", "...."]).object_area == pytest.approx(4 / 12)


def test_shares_of_uneven_grids_equal_a_count_of_pixels() -> None:
    rng = np.random.default_rng(0)
    maps_Hhw = rng.random((3, 3, 5)).astype(np.float32)
    mask = ObjectMask(object_YX=rng.random((12, 20)) < 0.4, void_YX=np.zeros((12, 20), bool))
    pixels_HYX = maps_Hhw.repeat(4, axis=1).repeat(4, axis=2)
    expected_H = [float(map_YX[mask.object_YX].sum() / map_YX.sum()) for map_YX in pixels_HYX]
    assert shares_on_object(maps_Hhw, mask) == pytest.approx(expected_H, rel=1e-5)


def test_a_resized_mask_keeps_object_and_void_apart() -> None:
    resized = truth(["#.", "?."]).resized((4, 4))
    assert resized.size == (4, 4)
    assert resized.object_YX.sum() == resized.void_YX.sum() == 4
    assert not (resized.object_YX & resized.void_YX).any()
