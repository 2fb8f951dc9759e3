from __future__ import annotations

import numpy as np
import pytest

from dino_index.heat import draw_heat, with_heat


def test_heat_is_brightest_where_the_map_is_highest() -> None:
    map_hw = np.zeros((4, 4), np.float32)
    map_hw[3, 0] = 1.0
    drawn = draw_heat(map_hw, (40, 80))
    assert drawn.size == (40, 80)
    grey_YX = np.asarray(drawn.convert("RGB").convert("L"))
    row, column = np.unravel_index(grey_YX.argmax(), grey_YX.shape)
    assert row >= 60
    assert column < 10
    assert grey_YX[:40].max() < 20 < 200 < grey_YX.max()


@pytest.mark.parametrize("level", [0.0, 0.3])
def test_an_even_map_has_no_heat(level: float) -> None:
    drawn = np.asarray(draw_heat(np.full((3, 5), level, np.float32), (7, 9)).convert("RGB"))
    assert np.unique(drawn.reshape(-1, 3), axis=0).tolist() == [[0, 0, 4]]


def test_an_overlay_keeps_size_and_shape_of_the_picture() -> None:
    picture_HWC = np.zeros((30, 50, 3), np.uint8)
    picture_HWC[:, 25:] = 255
    overlay_HWC = with_heat(picture_HWC, np.zeros((2, 2), np.float32))
    assert overlay_HWC.shape == picture_HWC.shape
    assert overlay_HWC.dtype == np.uint8
    # A quarter of the brightness of the picture shines through, cut off to whole numbers.
    assert (overlay_HWC[:, 25:, 0] - overlay_HWC[:, :25, 0]).tolist() == [[63] * 25] * 30
