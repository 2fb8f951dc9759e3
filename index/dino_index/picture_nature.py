"""What about a picture, apart from its likeness to others, bears on whether a pair is a copy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dino_index.bursts import Capture, are_frames_of_a_burst, read_capture
from dino_index.image_bytes import DEFAULT_LIMITS, ReadLimits
from dino_index.images import load_image
from dino_index.plain_pages import COMPARED_SIDE, SAME_PAGE, SHORT_SIDE, PlainKind, pages_agree, plain_kind


@dataclass(frozen=True, kw_only=True, eq=False)
class PictureNature:
    """capture: when and by what it was taken, as far as the file says."""

    plain: PlainKind | None = None
    """`blank` or `text`: the descriptor does not tell such pages apart."""
    page_HWC: NDArray[np.uint8] | None = None
    """Of such a page alone, pixels to compare it with others by."""
    capture: Capture | None = None


def nature_of(data: bytes | Image.Image, limits: ReadLimits = DEFAULT_LIMITS) -> PictureNature:
    """The nature of an image file's bytes, or of a picture that has no capture to speak of. Raises ImageError."""
    plain = plain_kind(load_image(data, max_short_side=SHORT_SIDE, limits=limits).pixels_HWC)
    page_HWC = None if plain is None else load_image(data, max_short_side=COMPARED_SIDE, limits=limits).pixels_HWC
    capture = read_capture(data, limits) if isinstance(data, bytes) else None
    return PictureNature(plain=plain, page_HWC=page_HWC, capture=capture)


def are_burst_frames(first: PictureNature, second: PictureNature) -> bool:
    """Whether one camera took both within seconds: alike, and no copies of each other."""
    return are_frames_of_a_burst(first.capture, second.capture)


def are_unproven_plain(first: PictureNature, second: PictureNature) -> bool:
    """Whether one is a blank or text-only page, and their pixels do not prove that both show the same page."""
    if first.plain is None and second.plain is None:
        return False
    if first.page_HWC is None or second.page_HWC is None:
        # A page and a picture: whatever they share is not the whole page.
        return True
    return pages_agree(first.page_HWC, second.page_HWC) < SAME_PAGE
