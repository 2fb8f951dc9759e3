from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.ExifTags import IFD, Base

from bad_files import picture
from dino_index.bursts import Capture, are_frames_of_a_burst, read_capture
from dino_index.image_bytes import ReadLimits


def photo(
    time: Any = "2024:05:31 18:04:59",
    fraction: Any = None,
    *,
    offset: Any = None,
    make: Any = "Maker",
    model: Any = "Camera 7",
    size: tuple[int, int] = (60, 40),
    format: str = "JPEG",
) -> bytes:
    exif = Image.Exif()
    exif[Base.Make], exif[Base.Model] = make, model
    details = {Base.DateTimeOriginal: time, Base.SubsecTimeOriginal: fraction, Base.OffsetTimeOriginal: offset}
    exif.get_ifd(IFD.Exif).update({tag: value for tag, value in details.items() if value is not None})
    buffer = io.BytesIO()
    picture(*size).save(buffer, format, exif=exif.tobytes())
    return buffer.getvalue()


def capture(*args: Any, **kwargs: Any) -> Capture:
    read = read_capture(photo(*args, **kwargs))
    assert read is not None
    return read


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_moment_and_the_camera_are_read_from_the_bytes(format: str) -> None:
    found = capture(fraction="25", format=format)
    assert found.taken_at.isoformat() == "2024-05-31T18:04:59.250000+00:00"
    assert (found.make, found.model, found.size, found.has_fraction) == ("Maker", "Camera 7", (60, 40), True)


def test_frames_a_fraction_of_a_second_apart_are_a_burst() -> None:
    assert are_frames_of_a_burst(capture(fraction="10"), capture(fraction="43"))


def test_frames_some_seconds_apart_are_a_burst_and_minutes_apart_are_none() -> None:
    first = capture("2024:05:31 18:04:59")
    assert are_frames_of_a_burst(first, capture("2024:05:31 18:05:01"))
    assert not are_frames_of_a_burst(first, capture("2024:05:31 18:07:01"))


def test_a_copy_has_the_same_moment_and_is_no_frame() -> None:
    assert not are_frames_of_a_burst(capture(fraction="25"), capture(fraction="25"))
    assert not are_frames_of_a_burst(capture(fraction="25"), capture(fraction="250"))


def test_a_copy_that_lost_its_fraction_is_no_frame() -> None:
    assert not are_frames_of_a_burst(capture(fraction="25"), capture())


def test_a_copy_that_lost_its_offset_is_no_frame() -> None:
    assert not are_frames_of_a_burst(capture(offset="+02:00"), capture())


def test_offsets_are_taken_into_account() -> None:
    first = capture("2024:05:31 18:04:59", offset="+02:00")
    assert are_frames_of_a_burst(first, capture("2024:05:31 17:05:00", offset="+01:00"))
    assert not are_frames_of_a_burst(first, capture("2024:05:31 18:05:00", offset="+01:00"))


def test_other_cameras_and_other_sizes_make_no_burst() -> None:
    first, later = capture(), "2024:05:31 18:05:00"
    assert not are_frames_of_a_burst(first, capture(later, model="Camera 8"))
    assert not are_frames_of_a_burst(first, capture(later, make="Other"))
    assert not are_frames_of_a_burst(first, capture(later, size=(30, 20)))
    assert are_frames_of_a_burst(first, capture(later, size=(40, 60)))


def test_nothing_is_said_without_a_camera_or_metadata() -> None:
    assert not are_frames_of_a_burst(None, capture())
    nameless = capture(make="", model=""), capture("2024:05:31 18:05:00", make="", model="")
    assert not are_frames_of_a_burst(*nameless)


@pytest.mark.parametrize(
    "time",
    [
        "",
        "0000:00:00 00:00:00",
        "    :  :     :  :  ",
        "2024:13:45 99:99:99",
        "yesterday",
        "9" * 5000,
        b"\xff\xfe\0",
        7,
    ],
)
def test_what_is_no_time_counts_as_none(time: Any) -> None:
    assert read_capture(photo(time)) is None


@pytest.mark.parametrize(
    "details",
    [
        {"fraction": "x" * 3000}, {"fraction": "-1"}, {"fraction": "٣"}, {"offset": "+99:99"}, {"offset": "noon"},
        {"make": "\0" * 900, "model": "\n"}, {"model": "M" * 60_000},
        {"time": "0001:01:01 00:00:00", "offset": "+23:00"}, {"time": "9999:12:31 23:59:59", "offset": "-23:00"},
    ],
)  # fmt: skip
def test_absurd_metadata_never_raises(details: dict[str, Any]) -> None:
    found = read_capture(photo(**details))
    are_frames_of_a_burst(found, capture())


@pytest.mark.parametrize("data", [b"", b"no image", b"\xff\xd8\xff\xe1\xff\xff" + bytes(50), b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_says_nothing(data: bytes) -> None:
    assert read_capture(data) is None


def test_a_file_over_the_limits_is_not_opened() -> None:
    assert read_capture(photo(), ReadLimits(max_bytes=10)) is None


@given(place=st.integers(2, 400), value=st.integers(0, 255), length=st.integers(1, 12))
def test_damaged_metadata_never_raises(place: int, value: int, length: int) -> None:
    data = bytearray(photo(fraction="25", offset="+02:00"))
    data[place : place + length] = bytes([value]) * length
    read_capture(bytes(data))


def test_no_pixel_is_decoded() -> None:
    whole = photo()
    assert read_capture(whole[: whole.index(b"\xff\xda") + 20]) == read_capture(whole)
