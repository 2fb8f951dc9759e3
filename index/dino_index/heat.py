"""Maps over a picture, such as its attention, drawn as heat.

Shapes: H x W pixels, C = 3 colours, h x w patches.
"""

from __future__ import annotations

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
    lowest, highest = np.quantile(map_hw, (0, _HEAT_QUANTILE))
    level_hw = np.clip((map_hw - lowest) / max(highest - lowest, 1e-12), 0, 1).astype(np.float32)
    size = picture_HWC.shape[1], picture_HWC.shape[0]
    level_HW = np.asarray(Image.fromarray(level_hw).resize(size, Resampling.BICUBIC))  # overshoots a little
    grey_HW1 = np.asarray(Image.fromarray(picture_HWC).convert("L"))[..., None]
    mixed_HWC = _HEAT_SHARE * _heat(level_HW) + (1 - _HEAT_SHARE) * grey_HW1
    return mixed_HWC.round().astype(np.uint8)


def _heat(level_HW: NDArray[np.floating]) -> NDArray[np.float64]:
    """Colours 0..255 of levels 0..1; of levels outside, those of the nearer end."""
    stops = np.linspace(0, 1, len(_HEAT_COLOURS))
    return np.stack([np.interp(level_HW, stops, channel) for channel in zip(*_HEAT_COLOURS, strict=True)], axis=-1)
