from __future__ import annotations

import io
import os
import random
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms

from bad_files import (
    SIZE,
    encoded,
    exif_orientation,
    grey_cyan_profile,
    make_bad_files,
    make_good_files,
    picture,
    png_16_bit,
    psd_file,
    wide_gamut_profile,
)
from dino_index.errors import ImageError
from dino_index.images import ReadLimits, decode, image_format, load_image, read_file

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
posix_only = pytest.mark.skipif(os.name != "posix", reason="links and pipes need a POSIX system")


def reason_of(call: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(ImageError) as caught:
        call(*args, **kwargs)
    assert str(caught.value)
    return caught.value.reason


def difference(one: NDArray[Any], other: NDArray[Any]) -> float:
    assert one.shape == other.shape
    return float(np.abs(one.astype(np.float64) - other.astype(np.float64)).mean())


def corners() -> Image.Image:
    """Red, green, blue and white quarters, so that every turn and flip looks different."""
    image = Image.new("RGB", (96, 64), WHITE)
    image.paste(RED, (0, 0, 48, 32))
    image.paste(GREEN, (48, 0, 96, 32))
    image.paste(BLUE, (0, 32, 48, 64))
    return image


def plain(colour: Any, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (32, 32), colour)


def middle(data: bytes, size: tuple[int, int] | None = None) -> tuple[int, ...]:
    pixels = decode(data, size=size).pixels_HWC
    return tuple(int(value) for value in pixels[pixels.shape[0] // 2, pixels.shape[1] // 2])


# --- files


def test_file_content_is_whole_and_hashed(tmp_path: Path) -> None:
    for num_bytes in (1, 1000, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, (3 << 20) + 7):
        data = random.randbytes(num_bytes)
        path = tmp_path / "a.bin"
        path.write_bytes(data)
        content = read_file(path)
        assert content.data == data
        assert content.sha256 == sha256(data).digest()
        assert content.size == num_bytes
        assert content.mtime_ns == path.stat().st_mtime_ns


def test_file_at_the_limit_is_read_and_above_it_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(bytes(1000))
    assert read_file(path, ReadLimits(max_bytes=1000)).size == 1000
    assert reason_of(read_file, path, ReadLimits(max_bytes=999)) == "too_large"
    with open(path, "wb") as sparse:
        sparse.truncate(1 << 40)
    assert reason_of(read_file, path) == "too_large"


def test_file_that_grows_beyond_the_limit_while_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(bytes(1000))
    monkeypatch.setattr(os, "read", lambda descriptor, wanted: bytes(wanted))
    assert reason_of(read_file, path, ReadLimits(max_bytes=10 << 20)) == "too_large"


def test_storage_that_fails_is_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"x")

    def fail(descriptor: int, wanted: int) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "read", fail)
    assert reason_of(read_file, path) == "unreadable"


def test_file_that_may_not_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"x")

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    assert reason_of(read_file, path) == "permission"


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    assert reason_of(read_file, tmp_path / "empty.jpg") == "empty"
    assert reason_of(read_file, tmp_path / "nothing.jpg") == "vanished"
    assert reason_of(read_file, tmp_path / "empty.jpg" / "below.jpg") == "vanished"
    assert reason_of(read_file, tmp_path) == "not_a_file"
    assert reason_of(read_file, "a\0b.jpg") == "unreadable"


@posix_only
def test_links_and_pipes_are_named_and_do_not_block(tmp_path: Path) -> None:
    os.symlink("nowhere", tmp_path / "broken.jpg")
    os.symlink("circle.jpg", tmp_path / "circle.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    assert reason_of(read_file, tmp_path / "broken.jpg") == "broken_link"
    assert reason_of(read_file, tmp_path / "circle.jpg") == "broken_link"
    assert reason_of(read_file, tmp_path / "pipe.jpg") == "not_a_file"
    assert reason_of(read_file, "/dev/zero") == "not_a_file"


@pytest.mark.parametrize("values", [{"max_bytes": 0}, {"max_pixels": -1}, {"max_pixels": 1.5}])
def test_limits_out_of_range_name_field_value_and_range(values: dict[str, Any]) -> None:
    ((field, value),) = values.items()
    with pytest.raises(ValueError, match=rf"{field} .* from 1 to \d+, not {value}"):
        ReadLimits(**values)


# --- formats


def test_format_is_told_by_the_first_32_bytes() -> None:
    image = picture()
    for name in (
        "JPEG",
        "PNG",
        "WEBP",
        "GIF",
        "BMP",
        "DIB",
        "TIFF",
        "AVIF",
        "HEIF",
        "JPEG2000",
        "PPM",
        "QOI",
    ):
        assert image_format(encoded(image, name)[:32]) == name
    assert image_format(encoded(image, "ICO")[:32]) == "ICO"
    assert image_format(psd_file(image)[:32]) == "PSD"
    assert image_format(encoded(image, "MPO", save_all=True, append_images=[image])[:32]) == "JPEG"
    assert image_format(b"II+\0\x08\0\0\0" + bytes(24)) == "TIFF"


@pytest.mark.parametrize(
    ("major", "compatible", "expected"),
    [
        (b"heic", b"mif1heic", "HEIF"),
        (b"mif1", b"mif1heic", "HEIF"),
        (b"mif1", b"mif1avif", "AVIF"),
        (b"avif", b"mif1miaf", "AVIF"),
        (b"avis", b"msf1", "AVIF"),
        (b"msf1", b"hevc", "HEIF"),
        (b"isom", b"isomavc1", None),
        (b"mp42", b"mp42isom", None),
        (b"qt  ", b"qt  ", None),
        (b"crx ", b"crx isom", None),
        (b"M4A ", b"M4A mp42", None),
    ],
)
def test_pictures_in_iso_containers_are_told_from_films(major: bytes, compatible: bytes, expected: str | None) -> None:
    head = (16 + len(compatible)).to_bytes(4, "big") + b"ftyp" + major + bytes(4) + compatible
    assert image_format(head.ljust(32, b"\0")) == expected


@pytest.mark.parametrize(
    "head",
    [
        b"BM and other letters, thirty-two of them",
        b"P1 is the first problem to be solved here",
        b"P6M is no header either, nor is this text",
        b"qoif is a word that begins this text file",
        b"\0\0\1\0\0\0" + bytes(26),
        bytes(32),
        b"\x28\0\0\0" + bytes(28),
        b"%PDF-1.7" + bytes(24),
        b"RIFF\0\0\0\0WAVEfmt " + bytes(16),
        b"RIFF\0\0\0\0AVI LIST" + bytes(16),
        b"",
        b"\xff\xd8",
    ],
)
def test_other_beginnings_are_no_image(head: bytes) -> None:
    assert image_format(head) is None


# --- good and bad files


def test_every_good_file_decodes_to_its_size(tmp_path: Path) -> None:
    for name, (width, height) in make_good_files(tmp_path).items():
        data = read_file(tmp_path / name).data
        whole = decode(data)
        assert (whole.width, whole.height) == (width, height), name
        assert whole.pixels_HWC.shape == (height, width, 3), name
        small = decode(data, size=(20, 12))
        assert (small.width, small.height) == (width, height), name
        for pixels_HWC, shape in ((whole.pixels_HWC, (height, width, 3)), (small.pixels_HWC, (12, 20, 3))):
            assert pixels_HWC.shape == shape, name
            assert pixels_HWC.dtype == np.uint8, name
            assert pixels_HWC.flags.c_contiguous, name
            assert pixels_HWC.flags.writeable, name


@pytest.mark.parametrize("size", [None, (32, 32)])
def test_every_bad_file_is_refused_for_its_reason(tmp_path: Path, size: tuple[int, int] | None) -> None:
    expected = make_bad_files(tmp_path)
    found = {name: reason_of(load_image, tmp_path / name, size=size) for name in expected}
    assert found == expected


def test_bad_files_are_the_same_in_every_run(tmp_path: Path) -> None:
    contents = []
    for run in ("one", "two"):
        (tmp_path / run).mkdir()
        reasons = make_bad_files(tmp_path / run)
        contents.append(
            {
                name: (tmp_path / run / name).read_bytes()
                for name in reasons
                if "." in name[-5:] and (tmp_path / run / name).is_file()
            }
        )
    assert contents[0] == contents[1]


def test_damage_anywhere_gives_pixels_or_an_image_error() -> None:
    """Thousands of flipped and cut files: nothing but ImageError may come out."""
    generator = random.Random(0)
    image = picture()
    files = [encoded(image, name) for name in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "HEIF", "JPEG2000", "QOI")]
    files += [encoded(image, "TIFF", compression="tiff_lzw"), encoded(image.quantize(32), "GIF")]
    files += [encoded(image, "JPEG", exif=exif_orientation(6), icc_profile=wide_gamut_profile())]
    files += [encoded(image, "AVIF"), encoded(image, "ICO", sizes=[(32, 32)]), psd_file(image)]
    limits = ReadLimits(max_pixels=10**6)
    refused = 0
    for data in files:
        for _ in range(60):
            damaged = bytearray(data)
            for _ in range(generator.choice((1, 4, 30))):
                damaged[generator.randrange(min(len(data), generator.choice((64, 10**6))))] = generator.randrange(256)
            try:
                decode(bytes(damaged), size=(16, 16), limits=limits)
            except ImageError:
                refused += 1
    assert 0 < refused < 60 * len(files)


def test_harmless_warnings_of_pillow_do_not_fail_a_picture() -> None:
    # An EXIF entry that points behind the end makes Pillow warn, and warnings are errors here.
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x0e\x01\x02\0\xff\0\0\0\xff\xff\0\0\0\0\0\0"
    data = encoded(picture(), "JPEG", exif=exif)
    with pytest.raises(UserWarning, match="Tag data larger"):
        Image.open(io.BytesIO(data)).getexif()
    assert decode(data).width == SIZE[0]


# --- limits


def test_picture_at_the_pixel_limit_is_read_and_above_it_refused() -> None:
    for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "HEIF", "AVIF", "JPEG2000", "PPM", "QOI"):
        data = encoded(picture(), name)
        limits = ReadLimits(max_pixels=SIZE[0] * SIZE[1])
        assert decode(data, limits=limits).width == SIZE[0]
        limits = ReadLimits(max_pixels=SIZE[0] * SIZE[1] - 1)
        assert reason_of(decode, data, limits=limits) == "too_many_pixels"


def test_icon_that_holds_a_larger_picture_than_it_says_is_refused_before_decoding() -> None:
    data = encoded(picture(256, 256), "ICO", sizes=[(256, 256)])
    assert reason_of(decode, data, limits=ReadLimits(max_pixels=255 * 256)) == "too_many_pixels"


def test_own_limit_counts_where_pillows_is_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(picture(), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert decode(data).width == SIZE[0]
    assert Image.MAX_IMAGE_PIXELS == 100


def test_bytes_over_the_limit_and_none_at_all_are_refused() -> None:
    assert reason_of(decode, encoded(picture(), "PNG"), limits=ReadLimits(max_bytes=100)) == "too_large"
    assert reason_of(decode, b"") == "empty"


def test_target_without_pixels_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="size must be"):
        decode(encoded(picture(), "PNG"), size=(0, 5))


# --- upright


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright(format_name: str, orientation: int) -> None:
    # What the camera stored: the scene, turned the other way.
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    scene = corners()
    stored = scene.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else scene
    # In HEIC and AVIF the encoder also writes the turn as the container's own: it must count once.
    data = encoded(stored, format_name, exif=exif_orientation(orientation).tobytes(), quality=95)
    for size, (width, height) in ((None, (96, 64)), ((48, 40), (48, 40))):
        decoded = decode(data, size=size)
        assert (decoded.width, decoded.height) == (96, 64)
        assert decoded.pixels_HWC.shape == (height, width, 3)
        for colour, x, y in ((RED, 1, 1), (GREEN, 3, 1), (BLUE, 1, 3), (WHITE, 3, 3)):
            found = decoded.pixels_HWC[height * y // 4, width * x // 4]
            assert np.abs(found.astype(int) - colour).max() <= 12, (colour, found)


def test_turned_jpeg_is_decoded_at_a_scale_that_covers_the_upright_target() -> None:
    scene = picture(400, 1600)
    stored = scene.transpose(Image.Transpose.ROTATE_90)
    data = encoded(stored, "JPEG", quality=95, exif=exif_orientation(6))
    exact = scene.resize((100, 400), Image.Resampling.BICUBIC)
    assert difference(decode(data, size=(100, 400)).pixels_HWC, np.asarray(exact)) < 3


# --- colour


def test_wide_gamut_colours_become_their_srgb_values() -> None:
    # CSS Color 4: color(display-p3 .5 .5 .5) is the same grey; color(display-p3 .6 .4 .3) is sRGB
    # (.6302, .3937, .2779), by the matrices of that specification.
    profile = wide_gamut_profile()
    for stored, expected in (((128, 128, 128), (128, 128, 128)), ((153, 102, 77), (161, 100, 71))):
        for size in (None, (8, 8)):
            found = middle(encoded(plain(stored), "PNG", icc_profile=profile), size)
            assert np.abs(np.subtract(found, expected)).max() <= 1, (found, expected)
    # Without the profile the numbers stand.
    assert middle(encoded(plain((153, 102, 77)), "PNG")) == (153, 102, 77)


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP", "TIFF", "HEIF", "AVIF"])
def test_profile_is_found_in_every_format(format_name: str) -> None:
    data = encoded(plain((153, 102, 77)), format_name, icc_profile=wide_gamut_profile(), quality=95)
    assert np.abs(np.subtract(middle(data), (161, 100, 71))).max() <= 3


def test_srgb_profile_changes_no_pixel() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = picture()
    assert np.array_equal(decode(encoded(image, "PNG", icc_profile=srgb)).pixels_HWC, np.asarray(image))


@pytest.mark.parametrize("profile", [b"x", bytes(200), wide_gamut_profile()[:300], b"\0" * 16 + b"CMYK" + bytes(200)])
def test_unusable_profile_is_ignored(profile: bytes) -> None:
    image = picture()
    assert np.array_equal(decode(encoded(image, "PNG", icc_profile=profile)).pixels_HWC, np.asarray(image))


def test_colour_profile_on_a_grey_picture_is_used() -> None:
    data = encoded(plain(120, "L"), "PNG", icc_profile=wide_gamut_profile())
    assert np.abs(np.subtract(middle(data), (120, 120, 120))).max() <= 1


@pytest.mark.parametrize("size", [None, (16, 16), (3, 3)])
@pytest.mark.parametrize("format_name", ["JPEG", "TIFF"])
def test_cmyk_inks_have_their_colours(format_name: str, size: tuple[int, int] | None) -> None:
    # Pillow writes CMYK JPEG as Adobe does, inverted.
    inks = {
        (255, 0, 0, 0): (0, 255, 255),
        (0, 255, 0, 0): (255, 0, 255),
        (0, 0, 255, 0): (255, 255, 0),
        (0, 0, 0, 255): (0, 0, 0),
        (0, 0, 0, 0): (255, 255, 255),
        (0, 0, 0, 128): (127, 127, 127),
    }
    for ink, colour in inks.items():
        data = encoded(plain(ink, "CMYK"), format_name)
        assert np.abs(np.subtract(middle(data, size), colour)).max() <= 3, ink


@pytest.mark.parametrize("format_name", ["JPEG", "TIFF"])
def test_cmyk_goes_through_its_profile(format_name: str) -> None:
    for ink, colour in (
        ((255, 0, 0, 0), (119, 119, 119)),
        ((0, 255, 0, 0), (0, 0, 0)),
        ((0, 0, 0, 0), WHITE),
    ):
        data = encoded(plain(ink, "CMYK"), format_name, icc_profile=grey_cyan_profile())
        for size in (None, (8, 8)):
            assert np.abs(np.subtract(middle(data, size), colour)).max() <= 2, ink


def test_lab_picture_has_its_colours() -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    transform = ImageCms.buildTransform(srgb, lab, "RGB", "LAB")
    data = encoded(transform.apply(plain((200, 100, 50))), "TIFF")
    assert np.abs(np.subtract(middle(data), (200, 100, 50))).max() <= 4


@pytest.mark.parametrize("format_name", ["PNG", "TIFF", "PPM"])
@pytest.mark.parametrize("size", [None, (8, 8)])
def test_16_bit_grey_keeps_its_tone(format_name: str, size: tuple[int, int] | None) -> None:
    samples = np.full((32, 32), 32768, dtype=np.uint16)
    samples[:2] = 65535
    assert middle(encoded(Image.fromarray(samples), format_name), size) == (128, 128, 128)


def test_16_bit_colour_and_alpha_keep_their_tones() -> None:
    samples = np.zeros((32, 32, 4), dtype=np.uint16)
    samples[:] = (65535, 32896, 257, 65535)
    assert middle(png_16_bit(samples[:, :, :3])) == (255, 128, 1)
    assert middle(png_16_bit(samples)) == (255, 128, 1)
    samples[:, :, 3] = 0
    assert middle(png_16_bit(samples)) == (255, 255, 255)


def test_12_bit_samples_in_a_16_bit_tiff_are_not_black() -> None:
    samples = np.full((32, 32), 2048, dtype=np.uint16)
    samples[:2] = 4095
    assert middle(encoded(Image.fromarray(samples), "TIFF")) == (128, 128, 128)


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (255.0, 0.0), (65535.0, 0.0), (1e6, -5e5)])
def test_float_samples_keep_their_tone(scale: float, offset: float) -> None:
    samples = np.full((32, 32), 0.5 * scale + offset, dtype=np.float32)
    samples[:2], samples[-2:] = offset, scale + offset
    assert middle(encoded(Image.fromarray(samples), "TIFF"))[0] in (127, 128)


def test_float_samples_without_a_value_do_no_harm() -> None:
    samples = np.full((32, 32), 0.5, dtype=np.float32)
    samples[:2], samples[-2:], samples[5] = 0.0, 1.0, np.nan
    samples[6], samples[7] = np.inf, -np.inf
    assert middle(encoded(Image.fromarray(samples), "TIFF"))[0] in (127, 128)
    samples[:] = np.nan
    assert middle(encoded(Image.fromarray(samples), "TIFF")) == (0, 0, 0)


def test_signed_samples_use_the_whole_range() -> None:
    samples = np.zeros((32, 32), dtype=np.int32)
    samples[:2], samples[-2:] = -1000, 1000
    assert middle(encoded(Image.fromarray(samples), "TIFF"))[0] in (127, 128)


def test_grey_one_bit_and_palette_have_their_colours() -> None:
    assert middle(encoded(plain(77, "L"), "PNG")) == (77, 77, 77)
    assert middle(encoded(plain(1, "1"), "PNG")) == (255, 255, 255)
    assert middle(encoded(plain(0, "1"), "TIFF", compression="group4")) == (0, 0, 0)
    palette = plain((10, 200, 30)).quantize(4)
    for format_name in ("PNG", "GIF", "BMP", "TIFF"):
        assert middle(encoded(palette, format_name), (5, 5)) == (10, 200, 30)


def test_one_bit_picture_is_averaged_not_sampled() -> None:
    stripes = Image.fromarray((np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)).convert("1")
    pixels = decode(encoded(stripes, "PNG"), size=(8, 8)).pixels_HWC
    assert np.abs(pixels.astype(int) - 127).max() <= 8


@pytest.mark.parametrize("size", [None, (16, 16)])
@pytest.mark.parametrize("format_name", ["PNG", "WEBP", "TIFF", "HEIF", "AVIF"])
def test_alpha_lies_over_white(format_name: str, size: tuple[int, int] | None) -> None:
    options: dict[str, object] = {"lossless": True} if format_name == "WEBP" else {"quality": 95}
    for alpha, expected in ((255, (200, 100, 0)), (0, WHITE), (128, (227, 177, 127))):
        data = encoded(plain((200, 100, 0, alpha), "RGBA"), format_name, **options)
        assert np.abs(np.subtract(middle(data, size), expected)).max() <= 4, alpha


def test_grey_alpha_and_transparent_colours_lie_over_white() -> None:
    assert middle(encoded(plain((100, 128), "LA"), "PNG"))[0] in (177, 178)
    assert middle(encoded(plain((100, 128), "LA"), "PNG"), (8, 8))[0] in (177, 178)
    assert middle(encoded(plain(100, "L"), "PNG", transparency=100)) == WHITE
    assert middle(encoded(plain((1, 2, 3)), "PNG", transparency=(1, 2, 3))) == WHITE
    indexed = plain(0, "P")
    indexed.putpalette([9, 9, 9, 200, 10, 10])
    for format_name in ("PNG", "GIF"):
        assert middle(encoded(indexed, format_name, transparency=0)) == WHITE
        assert middle(encoded(indexed, format_name, transparency=1)) == (9, 9, 9)


def test_hidden_colours_of_transparent_pixels_do_not_bleed() -> None:
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))  # transparent black
    image.paste((255, 255, 255, 255), (0, 0, 33, 64))
    assert decode(encoded(image, "PNG"), size=(8, 8)).pixels_HWC.min() >= 254


@pytest.mark.parametrize("format_name", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_or_page_counts(format_name: str) -> None:
    frames = [plain(BLUE), plain(GREEN)]
    data = encoded(plain(RED), format_name, save_all=True, append_images=frames)
    assert np.abs(np.subtract(middle(data), RED)).max() <= 2


# --- resizing


@pytest.mark.parametrize("size", [(224, 224), (50, 200), (700, 500)])
def test_small_jpeg_is_resized_as_pillow_would(size: tuple[int, int]) -> None:
    data = encoded(picture(500, 375), "JPEG", quality=95)
    with Image.open(io.BytesIO(data)) as image:
        exact = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    assert difference(decode(data, size=size).pixels_HWC, exact) < 2
    if size[0] == 224:  # no smaller scale covers it, so that the two are the same
        assert np.array_equal(decode(data, size=size).pixels_HWC, exact)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("stored", [(1600, 1203), (1031, 777)])
def test_scaled_decoding_is_close_to_the_full_one(mode: str, stored: tuple[int, int]) -> None:
    image = picture(*stored).convert(mode)
    data = encoded(image, "JPEG", quality=95)
    with Image.open(io.BytesIO(data)) as whole:
        exact = np.asarray(whole.convert("RGB").resize((96, 96), Image.Resampling.BICUBIC))
    decoded = decode(data, size=(96, 96))
    assert (decoded.width, decoded.height) == stored
    assert difference(decoded.pixels_HWC, exact) < 1.5


@pytest.mark.parametrize("format_name", ["PNG", "BMP", "TIFF"])
def test_large_picture_of_another_format_is_close_to_the_full_resize(format_name: str) -> None:
    image = picture(1500, 1100)
    exact = np.asarray(image.resize((96, 96), Image.Resampling.BICUBIC))
    assert difference(decode(encoded(image, format_name), size=(96, 96)).pixels_HWC, exact) < 1


def test_extreme_shapes_are_squashed() -> None:
    for shape in ((1, 1), (1, 4000), (4000, 1), (4000, 3)):
        for format_name in ("JPEG", "PNG"):
            decoded = decode(encoded(Image.new("RGB", shape, RED), format_name, quality=95), size=(32, 32))
            assert (decoded.width, decoded.height) == shape
            assert np.abs(decoded.pixels_HWC.astype(int) - RED).max() <= 3


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP", "TIFF", "HEIF"])
@pytest.mark.parametrize(
    ("stored", "reduced"),
    [((300, 200), (60, 40)), ((200, 301), (40, 60)), ((80, 80), (40, 40)), ((41, 500), (40, 488))],
)
def test_shorter_side_is_reduced_and_the_shape_kept(
    format_name: str, stored: tuple[int, int], reduced: tuple[int, int]
) -> None:
    data = encoded(picture(*stored), format_name)
    decoded = decode(data, max_short_side=40)
    assert (decoded.width, decoded.height) == stored
    assert decoded.pixels_HWC.shape == (reduced[1], reduced[0], 3)
    assert np.array_equal(decoded.pixels_HWC, decode(data, size=reduced).pixels_HWC)


@pytest.mark.parametrize("format_name", ["JPEG", "PNG"])
@pytest.mark.parametrize("max_short_side", [SIZE[1], SIZE[1] + 1, 10_000])
def test_short_side_within_the_limit_changes_nothing(format_name: str, max_short_side: int) -> None:
    data = encoded(picture(), format_name)
    assert np.array_equal(decode(data, max_short_side=max_short_side).pixels_HWC, decode(data).pixels_HWC)


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "TIFF"])
def test_picture_stored_sideways_is_reduced_upright(format_name: str) -> None:
    scene = corners().resize((1200, 800), Image.Resampling.NEAREST)
    data = encoded(
        scene.transpose(Image.Transpose.ROTATE_90), format_name, exif=exif_orientation(6).tobytes(), quality=95
    )
    decoded = decode(data, max_short_side=40)
    assert (decoded.width, decoded.height) == (1200, 800)
    assert decoded.pixels_HWC.shape == (40, 60, 3)
    for colour, x, y in ((RED, 15, 10), (GREEN, 45, 10), (BLUE, 15, 30), (WHITE, 45, 30)):
        assert np.abs(decoded.pixels_HWC[y, x].astype(int) - colour).max() <= 12, colour


def test_reduced_jpeg_is_decoded_at_a_smaller_scale_and_close_to_the_full_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL.JpegImagePlugin import JpegImageFile

    scene = picture(1600, 1200)
    drafts = []
    draft = JpegImageFile.draft

    def note_draft(self: JpegImageFile, mode: str, size: tuple[int, int]) -> Any:
        drafted = draft(self, mode, size)
        drafts.append(self.size)
        return drafted

    monkeypatch.setattr(JpegImageFile, "draft", note_draft)
    pixels_HWC = decode(encoded(scene, "JPEG", quality=95), max_short_side=96).pixels_HWC
    assert drafts == [(200, 150)]
    exact = np.asarray(scene.resize((128, 96), Image.Resampling.BICUBIC))
    assert difference(pixels_HWC, exact) < 1.5


def test_path_bytes_and_pillow_image_are_reduced_alike(tmp_path: Path) -> None:
    image = picture(300, 200)
    path = tmp_path / "a.png"
    path.write_bytes(encoded(image, "PNG"))
    expected = decode(path.read_bytes(), max_short_side=40).pixels_HWC
    for source in (path, path.read_bytes(), image):
        assert np.array_equal(load_image(source, max_short_side=40).pixels_HWC, expected)


def test_targets_that_contradict_are_a_mistake_of_the_caller() -> None:
    data = encoded(picture(), "PNG")
    for source in (data, picture()):
        with pytest.raises(ValueError, match="not both"):
            load_image(source, size=(5, 5), max_short_side=5)
        with pytest.raises(ValueError, match="max_short_side must be at least 1"):
            load_image(source, max_short_side=0)


# --- queries


def test_path_bytes_and_pillow_image_give_the_same_pixels(tmp_path: Path) -> None:
    sizes = make_good_files(tmp_path)
    for name in sizes:
        if name == "icon.ico" or name.endswith(".dib"):
            continue
        data = (tmp_path / name).read_bytes()
        expected = decode(data).pixels_HWC
        assert np.array_equal(load_image(tmp_path / name).pixels_HWC, expected), name
        assert np.array_equal(load_image(data).pixels_HWC, expected), name
        if image_format(data[:64]) in ("HEIF", None):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                found = load_image(image)
        assert np.array_equal(found.pixels_HWC, expected), name
        assert (found.width, found.height) == sizes[name], name


def test_given_pillow_image_stays_as_it_is() -> None:
    image = picture().convert("RGBA")
    before = image.tobytes()
    assert load_image(image, size=(8, 8)).pixels_HWC.shape == (8, 8, 3)
    assert (image.mode, image.size, image.tobytes()) == ("RGBA", SIZE, before)


def test_unusable_pillow_images_are_refused() -> None:
    assert reason_of(load_image, Image.new("RGB", (0, 5))) == "empty"
    assert reason_of(load_image, picture(), limits=ReadLimits(max_pixels=10)) == "too_many_pixels"
    cut = Image.open(io.BytesIO(encoded(picture(), "JPEG")[:900]))
    assert reason_of(load_image, cut) == "truncated"


# --- running


def test_threads_decode_the_same_pixels_as_one_alone(tmp_path: Path) -> None:
    sizes = make_good_files(tmp_path)
    contents = [(tmp_path / name).read_bytes() for name in sizes]
    alone = [decode(data, size=(32, 32)).pixels_HWC for data in contents]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda data: decode(data, size=(32, 32)).pixels_HWC, contents * 4))
    for index, pixels in enumerate(together):
        assert np.array_equal(pixels, alone[index % len(alone)])


def test_import_is_light_and_leaves_pillow_alone() -> None:
    code = (
        "import sys, warnings, dino_index.images; from PIL import Image;"
        "print({'torch', 'faiss', 'sqlalchemy', 'pillow_heif'} & set(sys.modules), list(Image.OPEN),"
        " 'PIL' in str(warnings.filters))"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    output = subprocess.check_output([sys.executable, "-c", code], text=True, env=env)
    assert output.strip() == "set() [] False"
