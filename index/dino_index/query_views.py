"""Views of a query: the ways to look at a picture in which an edited copy resembles its original again.

A mirror image, turned or tilted copy is turned back; a picture pasted into a larger one, framed or captioned is found
by a part of it. All views are squares of the model's input size, made from the query alone.

Shapes: S x S pixels, C channels, V views.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dino_index import geometry
from dino_index.geometry import Map
from dino_index.regions import Box, region_boxes, trimmed_box

Variants = Literal["none", "mirror", "all"]
"""Turned views of a query: none; its mirror image; quarter turns of both and small rotations as well."""

AS_IS = "as_is"

_TILTS_DEG = (-15, 15)
# Of a tilted picture in its enlarged frame, the middle that mostly shows picture.
_TILTED_FRAC = 0.75


@dataclass(frozen=True, slots=True, eq=False)
class QueryView:
    """pixels_SSC: uint8. from_query: from points of the query to points of the view."""

    name: str
    pixels_SSC: NDArray[np.uint8]
    from_query: Map

    def size_of(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) in pixels of what the view shows of a query of that size."""
        across_2, down_2 = np.linalg.inv(self.from_query)[:2, :2].T * (width, height)
        return max(1, round(math.hypot(*across_2))), max(1, round(math.hypot(*down_2)))


def check_variants(variants: str) -> None:
    """Raises ValueError for none of `Variants`."""
    if variants not in get_args(Variants):
        raise ValueError(f"variants must be one of {', '.join(get_args(Variants))}, found {variants!r}")


def query_views(
    square_SSC: NDArray[np.uint8], picture_HWC: NDArray[np.uint8], *, variants: Variants, regions: bool
) -> list[QueryView]:
    """The views of one query, the whole picture as it is first.

    square_SSC: the whole picture squashed to the model's input size, as references are. picture_HWC: the same picture
    in its own proportions, with at least twice as many pixels a side where it has them; parts are cut from it.
    """
    views = [QueryView(AS_IS, square_SSC, geometry.identity())]
    mirrored_SSC = np.ascontiguousarray(square_SSC[:, ::-1])
    if variants != "none":
        views.append(QueryView("mirror", mirrored_SSC, geometry.mirror()))
    picture = Image.fromarray(picture_HWC)
    if variants == "all":
        views += _turned("rotate", square_SSC, geometry.identity())
        views += _turned("mirror_rotate", mirrored_SSC, geometry.mirror())
        views += [_tilted(picture, angle, len(square_SSC)) for angle in _TILTS_DEG]
    if regions:
        boxes = {"trimmed": box} if (box := trimmed_box(picture_HWC)) is not None else {}
        views += [
            QueryView(name, cut(picture, box, len(square_SSC)), geometry.region(*box))
            for name, box in (boxes | region_boxes()).items()
        ]
    return views


def cut(picture: Image.Image, box: Box, side: int) -> NDArray[np.uint8]:
    """A part of the picture, squashed to a square. box: in fractions."""
    left, top, right, bottom = box
    pixels = (left * picture.width, top * picture.height, right * picture.width, bottom * picture.height)
    return np.array(picture.resize((side, side), Image.Resampling.BICUBIC, box=pixels))


def _turned(name: str, square_SSC: NDArray[np.uint8], from_query: Map) -> list[QueryView]:
    return [
        QueryView(
            f"{name}_{90 * number}",
            np.ascontiguousarray(np.rot90(square_SSC, number)),
            geometry.quarter_turns(number) @ from_query,
        )
        for number in (1, 2, 3)
    ]


def _tilted(picture: Image.Image, angle_deg: float, side: int) -> QueryView:
    """The picture turned counter-clockwise about its middle, and the middle of that in proportion to the frame."""
    tilted = picture.rotate(angle_deg, Image.Resampling.BICUBIC, expand=True)
    margin = (1 - _TILTED_FRAC) / 2
    middle: Box = (margin, margin, 1 - margin, 1 - margin)
    from_query = geometry.region(*middle) @ geometry.rotation(angle_deg, picture.size)
    return QueryView(f"rotate_{angle_deg:+d}", cut(tilted, middle, side), from_query)
