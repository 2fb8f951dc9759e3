"""Small pictures for pages: upright, without any metadata of the original."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

from PIL import Image

from dino_index.catalog.portable_paths import decode_path
from dino_index.errors import ImageError
from dino_index.image_bytes import DEFAULT_LIMITS, ReadLimits
from dino_index.images import load_image


@dataclass(frozen=True, kw_only=True)
class Thumbnail:
    """width, height: pixels. jpeg: a file's bytes."""

    width: int
    height: int
    jpeg: bytes

    @property
    def base64(self) -> str:
        return base64.b64encode(self.jpeg).decode()

    @property
    def data_uri(self) -> str:
        return f"data:image/jpeg;base64,{self.base64}"


def make_thumbnail(portable_path: str, *, side: int, quality: int) -> Thumbnail:
    """The picture at a path in the catalog's encoding, no longer than `side` pixels. Raises ImageError."""
    return thumbnail_of(decode_path(portable_path), side=side, quality=quality)


def thumbnail_of(source: str | bytes, *, side: int, quality: int, limits: ReadLimits = DEFAULT_LIMITS) -> Thumbnail:
    """The picture at a path or of a file's bytes, no longer than `side` pixels. Raises ImageError."""
    # The longer side is at most 2.5 times `side` for all but panoramas, so that JPEG files are decoded small.
    picture = Image.fromarray(load_image(source, max_short_side=side, limits=limits).pixels_HWC)
    picture.thumbnail((side, side))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality, optimize=True)
    return Thumbnail(width=picture.width, height=picture.height, jpeg=buffer.getvalue())


def thumbnail_uri(portable_path: str, *, side: int, quality: int) -> str | None:
    """A data URI of the picture's thumbnail; None if it cannot be read any more."""
    try:
        return make_thumbnail(portable_path, side=side, quality=quality).data_uri
    except ImageError:
        return None
