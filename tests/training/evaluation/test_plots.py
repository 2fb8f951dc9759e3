from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image, ImageColor

from dino_training.evaluation.plots import draw_lines, side_by_side

BLUE, ORANGE = ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00))


def rows_of(sheet: Image.Image, colour: tuple[int, int, int], column: float) -> list[int]:
    """Rows in which a column (0..1 of the width) has the colour, below the legend."""
    pixels_HWC = np.asarray(sheet)
    found = np.flatnonzero((pixels_HWC[:, round(column * sheet.width)] == colour).all(axis=-1))
    return [int(row) for row in found if row > 200]


def test_a_rising_line_rises_and_a_flat_one_does_not() -> None:
    sheet = draw_lines("entropy", "step", {"rising": [(0, 0.0), (10, 4.0)], "flat": [(0, 2.0), (10, 2.0)]})
    left, right = rows_of(sheet, BLUE, 0.2), rows_of(sheet, BLUE, 0.8)
    assert left
    assert right
    assert min(left) > max(right)
    assert rows_of(sheet, ORANGE, 0.2) == rows_of(sheet, ORANGE, 0.8) != []


def test_each_series_is_drawn_and_named_in_its_own_colour() -> None:
    series = {f"series {number}": [(0, float(number)), (1, number + 0.5)] for number in range(8)}
    pixels = {tuple(pixel) for pixel in np.asarray(draw_lines("t", "x", series)).reshape(-1, 3).tolist()}
    for colour in ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5c3e", "#1b1f24"):
        assert ImageColor.getrgb(colour) in pixels
    assert draw_lines("t", "x", series).height > draw_lines("t", "x", {"one": [(0, 1.0)]}).height


def test_a_point_that_is_not_finite_breaks_the_line_there() -> None:
    points = [(0, 1.0), (4, 1.0), (5, math.nan), (6, 1.0), (10, 1.0)]
    sheet = draw_lines("t", "x", {"broken": points})
    unbroken = draw_lines("t", "x", {"broken": [point for point in points if math.isfinite(point[1])]})
    columns = [
        {column for column in range(sheet.width) if rows_of(drawn, BLUE, column / sheet.width)}
        for drawn in (sheet, unbroken)
    ]
    gap = columns[1] - columns[0]
    assert columns[0] < columns[1]
    assert 0.15 < len(gap) / len(columns[1]) < 0.25  # from 4 to 6 of 10


@pytest.mark.parametrize("points", [[], [(3, 2.0)], [(0, 2.0), (5, 2.0)], [(0, -1e-9), (1, 1e9)]])
def test_any_number_of_points_and_any_range_can_be_drawn(points: list[tuple[float, float]]) -> None:
    sheet = draw_lines("t", "x", {"a": points})
    assert bool(rows_of(sheet, BLUE, 0.5) or len(points) != 2 or points[1][1] > 1e6)
    assert min(sheet.size) > 100


def test_marks_and_the_range_widen_the_axis() -> None:
    series = {"a": [(0, 1.0), (10, 1.2)]}
    narrow, wide = draw_lines("t", "x", series), draw_lines("t", "x", series, y_range=(0, 8), marks={"ln K": 6.9})
    slopes = [min(rows_of(sheet, BLUE, 0.2)) - min(rows_of(sheet, BLUE, 0.7)) for sheet in (narrow, wide)]
    assert slopes[0] > 3 * slopes[1] > 0


def test_panels_stand_side_by_side() -> None:
    one, two = draw_lines("one", "x", {"a": [(0, 1.0)]}), draw_lines("two", "x", {"a": [(0, 1.0)], "b": []})
    joined = side_by_side([one, two])
    assert joined.size == (one.width + two.width, two.height)
    assert np.array_equal(np.asarray(joined)[-one.height :, : one.width], np.asarray(one))
