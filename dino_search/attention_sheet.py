"""One picture of many: each picture, the attention of all heads over it, and each head by itself, in a row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.Image import Resampling

from dino_index.heat import draw_heat, with_heat

MAX_ROWS = 100
_TILE, _GAP, _HEADER = 160, 4, 26
_INK, _PAPER = "#1b1f24", "#ffffff"

Row = Sequence[Image.Image]


def sheet_row(picture_HWC: NDArray[np.uint8], maps_Hhw: NDArray[np.float32]) -> Row:
    """Small pictures: the picture, the mean of its heads as an overlay, each head."""
    small = Image.fromarray(picture_HWC)
    small.thumbnail((_TILE, _TILE), Resampling.BICUBIC)
    overlay = Image.fromarray(with_heat(np.asarray(small), maps_Hhw.mean(axis=0)))
    return [small, overlay, *(draw_heat(map_hw, small.size).convert("RGB") for map_hw in maps_Hhw)]


def draw_sheet(rows: Sequence[Row]) -> Image.Image:
    """A header and the rows, each as high as its pictures. rows: one or more, of the same length."""
    heights = [max(tile.height for tile in row) for row in rows]
    num_columns = max(map(len, rows))
    width, height = num_columns * (_TILE + _GAP) + _GAP, _HEADER + sum(heights) + _GAP * len(rows)
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    names = ["picture", "all heads", *(f"head {head}" for head in range(num_columns - 2))]
    middles = [_GAP + column * (_TILE + _GAP) + _TILE // 2 for column in range(num_columns)]
    for middle, name in zip(middles, names, strict=True):
        draw.text((middle, _HEADER // 2), name, _INK, font, anchor="mm")
    top = _HEADER
    for row, row_height in zip(rows, heights, strict=True):
        for middle, tile in zip(middles, row, strict=True):
            sheet.paste(tile, (middle - tile.width // 2, top + (row_height - tile.height) // 2))
        top += row_height + _GAP
    return sheet
