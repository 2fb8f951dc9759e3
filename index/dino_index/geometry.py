"""Where a point of one picture lies in another: affine maps between pictures, and the areas that they share.

Points are (x, y) as fractions of an upright picture's width and height, (0, 0) the outer corner of its first pixel.
A map is a 3 x 3 matrix of float64 for columns (x, y, 1), its last row 0 0 1.
`second @ first` does first, then second.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Map = NDArray[np.float64]
Polygon = tuple[tuple[float, float], ...]
"""Corners in order; empty for no area."""

UNIT_SQUARE: Polygon = ((0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0))
# Smaller determinants squash a picture to a line.
_MIN_DETERMINANT = 1e-9


def identity() -> Map:
    return np.eye(3)


def mirror() -> Map:
    """From a picture to itself with left and right exchanged."""
    return np.array([[-1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])


def quarter_turns(number: int) -> Map:
    """From a picture to itself turned by so many times 90 degrees against the clock, as Pillow turns."""
    once = np.array([[0.0, 1.0, 0.0], [-1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    return np.linalg.matrix_power(once, number % 4)


def rotation(degrees: float, size: tuple[int, int], *, expand: bool = True) -> Map:
    """From a picture to itself turned against the clock about its middle.

    size: (width, height) of the picture in pixels. expand: whether the frame grows to hold all of it, as
    `PIL.Image.rotate` has it (but for the rounding to whole pixels), or stays as it is.
    """
    width, height = size
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turned_width, turned_height = float(width), float(height)
    if expand:
        turned_width = abs(width * cosine) + abs(height * sine)
        turned_height = abs(width * sine) + abs(height * cosine)
    to_middle = np.array([[width, 0.0, -width / 2], [0.0, height, -height / 2], [0.0, 0.0, 1.0]])
    turn = np.array([[cosine, sine, 0.0], [-sine, cosine, 0.0], [0.0, 0.0, 1.0]])
    to_fractions = np.array([[1 / turned_width, 0.0, 0.5], [0.0, 1 / turned_height, 0.5], [0.0, 0.0, 1.0]])
    turned: Map = to_fractions @ turn @ to_middle
    return turned


def region(left: float, top: float, right: float, bottom: float) -> Map:
    """From a picture to a part of it, whose sides are given as fractions of the whole. Raises ValueError."""
    if not (left < right and top < bottom):
        raise ValueError(f"a region must have left < right and top < bottom, found {(left, top, right, bottom)}")
    width, height = right - left, bottom - top
    return np.array([[1 / width, 0.0, -left / width], [0.0, 1 / height, -top / height], [0.0, 0.0, 1.0]])


def in_pixels(map_33: Map, from_size: tuple[int, int], to_size: tuple[int, int]) -> Map:
    """The same map between pixels of the two pictures, whose (width, height) are given.

    Pixel coordinates are continuous: the middle of the first pixel is (0.5, 0.5).
    """
    return np.diag([*to_size, 1.0]) @ map_33 @ np.diag([1 / from_size[0], 1 / from_size[1], 1.0])


def inverse(map_33: Map) -> Map:
    """The way back. Raises numpy.linalg.LinAlgError for a map that squashes to a line."""
    back: Map = np.linalg.inv(map_33).astype(np.float64)
    return back


def is_invertible(map_33: Map) -> bool:
    return bool(np.isfinite(map_33).all() and abs(np.linalg.det(map_33)) > _MIN_DETERMINANT)


def apply(map_33: Map, points_N2: NDArray[np.float64]) -> NDArray[np.float64]:
    moved: NDArray[np.float64] = points_N2 @ map_33[:2, :2].T + map_33[:2, 2]
    return moved


def shared_areas(query_to_reference: Map) -> tuple[Polygon, Polygon]:
    """What both pictures show, as an area of the query and as the same area of the reference.

    Both are empty where the pictures have nothing in common.
    """
    if not is_invertible(query_to_reference):
        return (), ()
    frame = apply(inverse(query_to_reference), np.array(UNIT_SQUARE))
    query_area = clip_to_frame(tuple((float(x), float(y)) for x, y in frame))
    if not query_area:
        return (), ()
    reference_area = np.clip(apply(query_to_reference, np.array(query_area)), 0.0, 1.0)
    return query_area, tuple((float(x), float(y)) for x, y in reference_area)


def clip_to_frame(polygon: Polygon) -> Polygon:
    """The part of a convex polygon that lies inside of the picture (Sutherland and Hodgman, one side at a time)."""
    for axis, limit, sign in ((0, 0.0, 1), (0, 1.0, -1), (1, 0.0, 1), (1, 1.0, -1)):
        kept: list[tuple[float, float]] = []
        for start, end in zip(polygon, (*polygon[1:], *polygon[:1]), strict=True):
            start_depth, end_depth = sign * (start[axis] - limit), sign * (end[axis] - limit)
            if start_depth >= 0:
                kept.append(start)
            if (start_depth >= 0) != (end_depth >= 0):
                share = start_depth / (start_depth - end_depth)
                kept.append((start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1])))
        polygon = tuple(kept)
    return tuple((min(1.0, max(0.0, x)), min(1.0, max(0.0, y))) for x, y in polygon)


def area(polygon: Polygon) -> float:
    """Share of the picture that the polygon covers."""
    if len(polygon) < 3:
        return 0.0
    x, y = np.array(polygon).T
    return float(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2)
