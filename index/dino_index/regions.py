"""Regions: parts of a picture that are embedded by themselves, to find partial copies.

Shapes: H x W pixels, C channels.
"""

from __future__ import annotations

from itertools import product
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Regions = Literal["none", "query", "both"]
"""Whose regions are compared: nobody's; a query's with whole references; a query's with the references', too."""

Box = tuple[float, float, float, float]
"""Left, top, right, bottom as fractions of width and height."""

# (side of the region as a fraction of the picture's, places along each axis)
_SCALES = ((0.7, 2), (0.5, 3))
_MIDDLE_FRAC = 0.7

_SIDE = 128
# A border row begins and ends in one colour, to so much (of 255), which nearly all of its pixels have; some rows in
# between may be a line of text, of which fewer have it.
_MAX_DIFFERENCE = 12
_PLAIN_FRAC = 0.9
_TEXT_FRAC = 0.25
_MAX_TEXT_ROWS = 20
_MIN_KEPT_FRAC = 0.15


def check_regions(regions: str) -> None:
    """Raises ValueError for none of `Regions`."""
    if regions not in get_args(Regions):
        raise ValueError(f"regions must be one of {', '.join(get_args(Regions))}, found {regions!r}")


def region_boxes() -> dict[str, Box]:
    """The regions of any picture, by name: the middle and corners at .7, nine at half of its sides."""
    margin = (1 - _MIDDLE_FRAC) / 2
    boxes: dict[str, Box] = {"middle": (margin, margin, 1 - margin, 1 - margin)}
    for side, num_places in _SCALES:
        places = [(1 - side) * place / (num_places - 1) for place in range(num_places)]
        for row, column in product(range(num_places), repeat=2):
            left, top = places[column], places[row]
            boxes[f"{side:.0%}_{row}{column}".replace("%", "")] = (left, top, left + side, top + side)
    return boxes


def trimmed_box(picture_HWC: NDArray[np.uint8]) -> Box | None:
    """The picture without borders of one colour, such as the bars of a caption or the frame of a screenshot.

    None where there is nothing to trim, or next to nothing would be left.
    """
    small = Image.fromarray(picture_HWC).resize((_SIDE, _SIDE), Image.Resampling.BOX)
    pixels_HWC = np.asarray(small, np.int16)
    top, bottom = _inner(pixels_HWC)
    left, right = _inner(pixels_HWC[top:bottom].swapaxes(0, 1))
    if (bottom - top) * (right - left) == _SIDE**2 or min(bottom - top, right - left) < _MIN_KEPT_FRAC * _SIDE:
        return None
    return left / _SIDE, top / _SIDE, right / _SIDE, bottom / _SIDE


def _inner(pixels_HWC: NDArray[np.int16]) -> tuple[int, int]:
    """Begin and end of the rows between those of one colour at both ends."""
    first_HC, last_HC = pixels_HWC[:, 0], pixels_HWC[:, -1]
    ends_agree_H = np.abs(first_HC - last_HC).max(axis=1) <= _MAX_DIFFERENCE
    difference_HW = np.abs(pixels_HWC - (first_HC + last_HC)[:, None] // 2).max(axis=2)
    share_H = np.where(ends_agree_H, (difference_HW <= _MAX_DIFFERENCE).mean(axis=1), 0)
    top, bottom = _border(share_H), _border(share_H[::-1])
    return (top, len(share_H) - bottom) if top + bottom < len(share_H) else (0, len(share_H))


def _border(share_H: NDArray[np.float64]) -> int:
    """Rows of one colour from the first on, lines of text among them included."""
    border = 0
    for row, share in enumerate(share_H):
        if share >= _PLAIN_FRAC:
            border = row + 1
        elif share < _TEXT_FRAC or row - border >= _MAX_TEXT_ROWS:
            break
    return border
