"""Whether two picture files look like frames of one burst: alike, taken one after the other, and no copies.

A copy keeps the moment at which it was taken, or loses it; frames of a burst have different ones, close together, of
one camera. Only metadata is read, no pixel is decoded. Without it nothing is said: by its pixels, a frame of a steady
camera is as near to the one before as a retouched copy is.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from PIL.ExifTags import IFD, Base

from dino_index.errors import ImageError
from dino_index.image_bytes import DEFAULT_LIMITS, ReadLimits
from dino_index.images import opened

MAX_GAP_S = 5.0
"""Seconds between frames of one burst; between two shots that were framed anew it is mostly longer."""
_MAX_TEXT = 64


@dataclass(frozen=True, kw_only=True)
class Capture:
    """What a file says of the moment at which its picture was taken."""

    taken_at: datetime
    """In UTC where the file gives an offset, else in the camera's own time taken for UTC."""
    has_fraction: bool
    """Whether fractions of a second are given."""
    has_offset: bool
    make: str
    model: str
    size: tuple[int, int]
    """Width and height in pixels, as stored."""


def read_capture(data: bytes, limits: ReadLimits = DEFAULT_LIMITS) -> Capture | None:
    """What the bytes of an image file say of its capture; None where they say nothing usable. Never raises.

    EXIF's DateTimeOriginal with SubSecTimeOriginal and OffsetTimeOriginal, Make and Model.
    """
    try:
        with opened(data, limits) as image:
            exif = image.getexif()
            details = exif.get_ifd(IFD.Exif)
            size = image.size
        make, model = _text(exif.get(Base.Make)), _text(exif.get(Base.Model))
        taken_at = _moment(
            _text(details.get(Base.DateTimeOriginal)),
            fraction := _digits(_text(details.get(Base.SubsecTimeOriginal))),
            offset := _text(details.get(Base.OffsetTimeOriginal)),
        )
    except ImageError:
        return None
    except Exception:  # EXIF is anything that anybody wrote: damaged, absurd, recursive
        return None
    if taken_at is None:
        return None
    return Capture(
        taken_at=taken_at,
        has_fraction=bool(fraction),
        has_offset=_offset(offset) is not None,
        make=make,
        model=model,
        size=size,
    )


def are_frames_of_a_burst(first: Capture | None, second: Capture | None) -> bool:
    """Whether one camera took both, at different moments no more than 5 seconds apart, at one size.

    Reliable where it says so: an edited copy keeps the time or loses it, and no editor moves it by a second. False says
    nothing: the metadata may be gone, or two frames of one second may carry no fractions of it.
    """
    if first is None or second is None or not (first.model or first.make):
        return False
    if (first.make, first.model) != (second.make, second.model) or sorted(first.size) != sorted(second.size):
        return False
    if first.has_offset != second.has_offset:
        return False
    gap_s = abs((first.taken_at - second.taken_at).total_seconds())
    if first.has_fraction != second.has_fraction:
        # One of them has lost its fraction, as some editors have it: less than a second apart is the same moment.
        return 1 <= gap_s <= MAX_GAP_S
    return 0 < gap_s <= MAX_GAP_S


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    return value.split("\0")[0].strip()[:_MAX_TEXT] if isinstance(value, str) else ""


def _digits(text: str) -> str:
    return text if text.isascii() and text.isdigit() else ""


def _moment(text: str, fraction: str, offset: str) -> datetime | None:
    """EXIF's `2024:05:31 18:04:59`; None for what is no time, such as the zeros of a camera without a clock."""
    try:
        moment = datetime.strptime(text, "%Y:%m:%d %H:%M:%S").replace(tzinfo=UTC)
    except ValueError:
        return None
    moment += timedelta(microseconds=int((fraction + "000000")[:6]))
    try:
        return moment - (_offset(offset) or timedelta())
    except OverflowError:
        return None


def _offset(text: str) -> timedelta | None:
    """`+02:00` as the time by which a clock is ahead of UTC."""
    try:
        return datetime.strptime(text, "%z").utcoffset()
    except ValueError:
        return None
