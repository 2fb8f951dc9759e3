"""Masks of what a head attends to, and how they compare with a mask of the object.

Shapes: H heads, h x w patches, Y x X pixels of the picture.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.Image import Resampling


def keep_mass(maps_Hhw: NDArray[np.floating], mass: float) -> NDArray[np.bool_]:
    """masks_Hhw: of each head, the fewest patches that hold at least the share `mass` of its attention to patches.

    mass: above 0, up to 1; arXiv 2104.14294 draws its masks at .6. Of patches with the same value the first are taken.
    Raises ValueError.
    """
    if not 0 < mass <= 1:
        raise ValueError(f"mass must be above 0 and at most 1, found {mass}")
    values_HN = maps_Hhw.reshape(len(maps_Hhw), -1).astype(np.float64)
    order_HN = np.argsort(-values_HN, axis=1, kind="stable")
    sums_HN = np.cumsum(np.take_along_axis(values_HN, order_HN, axis=1), axis=1)
    # What the sum lost to rounding is not another patch's to make up.
    enough_HN = sums_HN >= mass * sums_HN[:, -1:] * (1 - 1e-12)
    num_kept_H = enough_HN.argmax(axis=1) + 1
    kept_HN = np.zeros(values_HN.shape, bool)
    np.put_along_axis(kept_HN, order_HN, np.arange(values_HN.shape[1]) < num_kept_H[:, None], axis=1)
    return kept_HN.reshape(maps_Hhw.shape)


def enlarge(mask_hw: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    """mask_YX: a mask of patches in the pixels of a picture. size: (width, height)."""
    drawn = Image.fromarray(mask_hw.astype(np.uint8)).resize(size, Resampling.NEAREST)
    return np.asarray(drawn) > 0


@dataclass(frozen=True, kw_only=True, eq=False)
class ObjectMask:
    """Where the object is. object_YX, void_YX: bool; what is void counts neither as object nor as background."""

    object_YX: NDArray[np.bool_]
    void_YX: NDArray[np.bool_]

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        return self.object_YX.shape[1], self.object_YX.shape[0]

    @property
    def object_area(self) -> float:
        """Share of the picture that is object: that of attention that is spread evenly."""
        return float(self.object_YX.sum() / max(1, (~self.void_YX).sum()))

    def resized(self, size: tuple[int, int]) -> ObjectMask:
        """In another size (width, height), by the nearest pixel."""
        return ObjectMask(object_YX=enlarge(self.object_YX, size), void_YX=enlarge(self.void_YX, size))


def jaccard(mask_YX: NDArray[np.bool_], truth: ObjectMask) -> float:
    """Intersection over union, void pixels left out; 0 where both are empty."""
    counted_YX = mask_YX & ~truth.void_YX
    union = (counted_YX | truth.object_YX).sum()
    return float((counted_YX & truth.object_YX).sum() / union) if union else 0.0


def shares_on_object(maps_Hhw: NDArray[np.floating], truth: ObjectMask) -> NDArray[np.float64]:
    """shares_H: how much of the attention to patches lies on the object; the rest is on the background.

    A patch that is partly object counts with that part of its area.
    """
    object_hw, background_hw = (
        _area(where_YX, maps_Hhw.shape[1:])
        for where_YX in (truth.object_YX, ~(truth.object_YX | truth.void_YX))
    )  # fmt: skip
    maps_HN = maps_Hhw.reshape(len(maps_Hhw), -1).astype(np.float64)
    on_object_H, on_background_H = maps_HN @ object_hw.reshape(-1), maps_HN @ background_hw.reshape(-1)
    shares_H: NDArray[np.float64] = on_object_H / np.maximum(on_object_H + on_background_H, 1e-300)
    return shares_H


def _area(where_YX: NDArray[np.bool_], grid: tuple[int, ...]) -> NDArray[np.float64]:
    """area_hw: the share of each patch that is covered."""
    height, width = grid
    covered = Image.fromarray(where_YX.astype(np.float32)).resize((width, height), Resampling.BOX)
    return np.asarray(covered, np.float64)
