"""Sheets of small pictures for the report: the views that a run trains on, and where its backbone looks.

Shapes: B images, H x W pixels, S side of a view, C = 3 colours, H heads (in maps_BHhw), h x w patches, T = `TILE`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.Image import Resampling
from torch import Tensor

from dino_index.heat import with_heat

TILE = 112
"""Side in pixels at which pictures are drawn."""
NUM_VIEW_ROWS = 8
NUM_ATTENTION_IMAGES = 16
_ATTENTION_COLUMNS = 8
_GAP, _WIDE_GAP = 2, 10


def draw_views(views: Sequence[NDArray[np.uint8]]) -> Image.Image:
    """One row for each of the first eight images, one column for each view; a wider gap where their size changes.

    views: uint8 pixels_BSSC of each view of the same B images, before normalisation.
    """
    sides = [view_BSSC.shape[1] for view_BSSC in views]
    gaps = [0] + [_GAP if side == before else _WIDE_GAP for before, side in pairwise(sides)]
    rows = [[_tile(view_BSSC[row]) for view_BSSC in views] for row in range(min(NUM_VIEW_ROWS, len(views[0])))]
    return _sheet(rows, gaps)


def draw_attention(pictures_BHWC: NDArray[np.uint8], maps_BHhw: Tensor) -> Image.Image:
    """The first sixteen pictures, eight a row, each beside its attention as heat: the mean over the heads.

    maps_BHhw: as `dino_index.attention.attention_maps` gives it. Each map is stretched to its own range, so that heat
    compares places in one picture and not pictures. A few patches often take most of the attention: the range ends
    below them.
    """
    maps_Bhw = maps_BHhw.mean(dim=1).float().cpu().numpy()
    tiles: list[NDArray[np.uint8]] = []
    for picture_HWC, map_hw in list(zip(pictures_BHWC, maps_Bhw, strict=True))[:NUM_ATTENTION_IMAGES]:
        tile_TTC = _tile(picture_HWC)
        tiles += [tile_TTC, with_heat(tile_TTC, map_hw)]
    width = 2 * min(_ATTENTION_COLUMNS, len(tiles) // 2)
    gaps = [0] + [_GAP if column % 2 else _WIDE_GAP for column in range(1, width)]
    return _sheet([tiles[start : start + width] for start in range(0, len(tiles), width)], gaps)


def _tile(pixels_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(pixels_HWC).resize((TILE, TILE), Resampling.BICUBIC))


def _sheet(rows: Sequence[Sequence[NDArray[np.uint8]]], gaps: Sequence[int]) -> Image.Image:
    """Tiles in rows on transparent ground. gaps: pixels before each column."""
    lefts = [TILE * column + sum(gaps[: column + 1]) for column in range(len(gaps))]
    sheet = Image.new("RGBA", (lefts[-1] + TILE, len(rows) * (TILE + _GAP) - _GAP))
    for row, tiles in enumerate(rows):
        for left, tile_TTC in zip(lefts, tiles, strict=False):  # the last row may be short
            sheet.paste(Image.fromarray(tile_TTC), (left, row * (TILE + _GAP)))
    return sheet
