"""Pages that show next to nothing or only text, and whether two of them are the same.

Descriptors and patches tell photographs apart; all blank pages look alike to them, and so do all pages of text of one
layout. Such pictures are recognised here and compared at a resolution at which letters differ.

Shapes: H x W pixels, C colour (red, green, blue).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from dino_index.backbones import GREY

PlainKind = Literal["blank", "text"]

SHORT_SIDE = 256
"""Pixels of the shorter side that `plain_kind` was measured with; 128 is too few for the lines of a full page."""
COMPARED_SIDE = 512
"""Pixels of the shorter side that `pages_agree` wants; smaller pictures are compared as they are."""
SAME_PAGE = 0.6
"""What `pages_agree` gives for copies of one page, and not for others; see the README for what was measured."""

# Blank: colours differ from a smooth gradient by more than this (of 1) in no more than this share of the pixels.
# The emptiest of 1,475 photographs (the moon) has 6 %.
_VISIBLE, _MAX_MARKED_FRAC = 0.06, 0.01
# Text: thin strokes on paper that is even once they are filled in.
_STROKE_FRAC = 1 / 14
_SHADED, _MAX_SHADED_FRAC = 0.08, 0.04
_INK_FAINT, _INK = 0.06, 0.2
_MIN_PAPER_FRAC, _MIN_INK_FRAC, _MAX_INK_FRAC = 0.5, 0.03, 0.35
_MIN_CONTRAST = 0.25
_MIN_SIDE_OF_TEXT = 24
# Ink varies more from row to row, where lines alternate with gaps, than from column to column.
_MIN_LINES = 1.03
_NUM_FITTED = 4000
_MAX_SHIFT = 12


def plain_kind(pixels_HWC: NDArray[np.uint8]) -> PlainKind | None:
    """`blank` for a uniform, nearly empty or gradient picture, `text` for one of text alone; None for all others.

    pixels_HWC: RGB, the whole picture with its shorter side at about 256 px. Upright text: sideways it counts as none.
    """
    colours_HWC: NDArray[np.float32] = pixels_HWC.astype(np.float32) / np.float32(255)
    # Noise is not to count as marks.
    smooth_HWC = np.stack([_averaged(colours_HWC[..., colour], 3, 3) for colour in range(3)], axis=2)
    deviations_HW = np.max([np.abs(_beside_gradient(smooth_HWC[..., colour], degree=4)) for colour in range(3)], axis=0)
    if (deviations_HW > _VISIBLE).mean() <= _MAX_MARKED_FRAC:
        return "blank"
    if min(pixels_HWC.shape[:2]) < _MIN_SIDE_OF_TEXT:
        return None
    grey_HW: NDArray[np.float32] = (colours_HWC @ np.array(GREY)).astype(np.float32)
    tint_HW = np.abs(_beside_gradient(smooth_HWC[..., 0] - smooth_HWC[..., 2], degree=2))
    return "text" if _is_text(grey_HW, tint_HW) or _is_text(np.float32(1) - grey_HW, tint_HW) else None


def pages_agree(pixels_a_HWC: NDArray[np.uint8], pixels_b_HWC: NDArray[np.uint8]) -> float:
    """Correlation of two whole pages letter by letter, -1..1: near 1 for copies of one page, low for others.

    The pictures should have shorter sides of about 512 px. Both are squashed to one square, of the resolution of the
    smaller, and shifted against each other by up to 12 px; lines, which pages of one layout share, are taken out first.
    0 where there is nothing to correlate.
    """
    side = min(COMPARED_SIDE, *pixels_a_HWC.shape[:2], *pixels_b_HWC.shape[:2])
    if side < 2 * _MAX_SHIFT:
        return 0.0
    a_SS, b_SS = _letters(pixels_a_HWC, side), _letters(pixels_b_HWC, side)
    norm = float(np.sqrt((a_SS**2).sum() * (b_SS**2).sum()))
    if norm <= 1e-6:
        return 0.0
    correlations_SS = np.fft.irfft2(np.fft.rfft2(a_SS) * np.conj(np.fft.rfft2(b_SS)), s=a_SS.shape) / norm
    shifts = np.arange(-_MAX_SHIFT, _MAX_SHIFT + 1)
    return float(np.clip(correlations_SS[np.ix_(shifts, shifts)].max(), -1, 1))


def _is_text(grey_HW: NDArray[np.float32], tint_HW: NDArray[np.float32]) -> bool:
    """Whether the picture shows dark lines of text on light paper and nothing else.

    tint_HW: how far red less blue is from a smooth gradient, 0..1.
    """
    stroke = max(3, round(min(grey_HW.shape) * _STROKE_FRAC) | 1)
    paper_HW = _filled_in(grey_HW, stroke)
    shades_HW = np.abs(_beside_gradient(_averaged(paper_HW, 3, 3), degree=2))
    if (shades_HW > _SHADED).mean() > _MAX_SHADED_FRAC:
        return False
    ink_HW = paper_HW - grey_HW
    if float(np.quantile(ink_HW, 0.97)) < _MIN_CONTRAST or (ink_HW < _INK_FAINT).mean() < _MIN_PAPER_FRAC:
        return False
    # Cloth on wood can be as even in grey as paper, but not in colour.
    if (tint_HW[ink_HW < _INK_FAINT] > _SHADED).mean() > _MAX_SHADED_FRAC:
        return False
    lines = ink_HW.mean(axis=1).std() / (ink_HW.mean(axis=0).std() + 1e-3)
    return bool(_MIN_INK_FRAC <= (ink_HW > _INK).mean() <= _MAX_INK_FRAC and lines >= _MIN_LINES)


def _beside_gradient(values_HW: NDArray[np.float32], *, degree: int) -> NDArray[np.float32]:
    """What the best smooth gradient leaves, a polynomial of x and y; fitted so that a few marks do not bend it."""
    height, width = values_HW.shape
    x_powers = np.vander(np.linspace(-1, 1, width), degree + 1, increasing=True)
    y_powers = np.vander(np.linspace(-1, 1, height), degree + 1, increasing=True)
    exponents = [(i, j) for i in range(degree + 1) for j in range(degree + 1 - i)]
    step = max(1, round((height * width / _NUM_FITTED) ** 0.5))
    terms = np.stack([np.outer(y_powers[::step, j], x_powers[::step, i]).ravel() for i, j in exponents], axis=1)
    values = values_HW[::step, ::step].ravel()
    is_near = np.ones(len(values), dtype=bool)
    factors: NDArray[np.floating] = np.zeros(len(exponents))
    for _ in range(3):
        factors = np.linalg.lstsq(terms[is_near], values[is_near], rcond=None)[0]
        left = values - terms @ factors
        is_near = np.abs(left) <= 2.5 * left.std() + 1e-4
    factors_ji = np.zeros((degree + 1, degree + 1))
    for (i, j), factor in zip(exponents, factors, strict=True):
        factors_ji[j, i] = factor
    deviations: NDArray[np.float32] = (values_HW - y_powers @ factors_ji @ x_powers.T).astype(np.float32)
    return deviations


def _averaged(values_HW: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """Means of windows of that odd size."""
    padding = height // 2, width // 2
    values_1HW = torch.from_numpy(np.ascontiguousarray(values_HW))[None]
    averaged_1HW = F.avg_pool2d(values_1HW, (height, width), 1, padding, count_include_pad=False)
    means_HW: NDArray[np.float32] = averaged_1HW[0].numpy()
    return means_HW


def _filled_in(values_HW: NDArray[np.float32], stroke: int) -> NDArray[np.float32]:
    """The picture without what is dark and thinner than the odd number of pixels (a morphological closing)."""
    half = stroke // 2
    values_1HW = torch.from_numpy(np.ascontiguousarray(values_HW))[None]
    for sign in (1, -1):
        for size, padding in (((stroke, 1), (half, 0)), ((1, stroke), (0, half))):
            values_1HW = sign * F.max_pool2d(sign * values_1HW, size, 1, padding)
    filled_HW: NDArray[np.float32] = values_1HW[0].numpy()
    return filled_HW


def _letters(pixels_HWC: NDArray[np.uint8], side: int) -> NDArray[np.float32]:
    """The page as a grey square less each pixel's surroundings along its row, so that whole lines cancel out."""
    grey = Image.fromarray(pixels_HWC).convert("L").resize((side, side), Image.Resampling.BICUBIC)
    values_SS = np.asarray(grey, dtype=np.float32)
    values_SS = values_SS - _averaged(values_SS, 1, max(3, side // 16 | 1))
    letters_SS: NDArray[np.float32] = values_SS - values_SS.mean()
    # JPEG and the edges of a scan leave a faint pattern on blank paper, which is no letter.
    return letters_SS if letters_SS.std() > 1.0 else np.zeros_like(letters_SS)
