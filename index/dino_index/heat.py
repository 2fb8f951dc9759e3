"""Maps over a picture, such as its attention, drawn as heat.

Shapes: H x W pixels, C = 3 colours, h x w patches.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.Image import Resampling

# Heat from none to most, as in matplotlib's `inferno`: it gets brighter throughout, so that it reads without colour.
_HEAT_COLOURS = ((0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164))
_HEAT_QUANTILE = 0.97
_HEAT_SHARE = 0.75  # of the overlay; the rest is the picture's brightness


def with_heat(picture_HWC: NDArray[np.uint8], map_hw: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The picture, uint8 RGB, in grey under a map of any size that covers it.

    The map is stretched to its own range, so that heat compares places in one picture and not pictures. A few patches
    often take most of the attention: the range ends below them.
    """
    picture = Image.fromarray(picture_HWC)
    heat = draw_heat(map_hw, picture.size).convert("RGB")
    return np.asarray(Image.blend(picture.convert("L").convert("RGB"), heat, _HEAT_SHARE))


def draw_heat(map_hw: NDArray[np.float32], size: tuple[int, int]) -> Image.Image:
    """The map alone in a size (width, height), stretched as `with_heat` does; 256 colours with a palette.

    A byte a pixel: a map of a large photograph takes no more memory than its grey picture.
    """
    lowest, highest = np.quantile(map_hw, (0, _HEAT_QUANTILE))
    level_hw = np.clip((map_hw - lowest) / max(highest - lowest, 1e-12), 0, 1).astype(np.float32)
    level_HW = np.array(Image.fromarray(level_hw).resize(size, Resampling.BICUBIC))
    np.clip(level_HW, 0, 1, out=level_HW)  # bicubic overshoots a little
    level_HW *= 255
    drawn = Image.fromarray(np.rint(level_HW, out=level_HW).astype(np.uint8))
    drawn.putpalette(_palette())
    return drawn


@cache
def _palette() -> bytes:
    """Red, green and blue of 256 levels."""
    levels, stops = np.linspace(0, 1, 256), np.linspace(0, 1, len(_HEAT_COLOURS))
    channels = [np.interp(levels, stops, channel) for channel in zip(*_HEAT_COLOURS, strict=True)]
    return np.stack(channels, axis=-1).round().astype(np.uint8).tobytes()
