"""Reading images: the one place where a file, an upload or a query becomes RGB pixels.

Indexing and queries take the same path, so that the same picture always gives the same pixels. Everything
that a file can do wrong ends as an ImageError with a reason; nothing else leaves `read_file`, `decode` and
`load_image`. All functions may be called from several threads at once.

Shapes: H height, W width, C colour (red, green, blue).
"""

from __future__ import annotations

import importlib
import io
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from dino_index.errors import ImageError
from dino_index.image_bytes import DEFAULT_LIMITS, FileContent, ReadLimits, check_num_bytes, read_file
from dino_index.image_formats import HEAD_BYTES, claimed_size, ends_early, image_format
from dino_index.image_modes import expand, premultiply, to_srgb

__all__ = [
    "DecodedImage",
    "FileContent",
    "ReadLimits",
    "decode",
    "image_format",
    "load_image",
    "opened",
    "read_file",
]

# Allow-list. Formats whose readers start other programs or follow references (EPS, PDF, WMF) stay out.
_PLUGINS = {
    "JPEG": ("PIL.JpegImagePlugin", "JpegImageFile"),  # of an MPO, the first picture, which is the main one
    "PNG": ("PIL.PngImagePlugin", "PngImageFile"),
    "WEBP": ("PIL.WebPImagePlugin", "WebPImageFile"),
    "GIF": ("PIL.GifImagePlugin", "GifImageFile"),
    "BMP": ("PIL.BmpImagePlugin", "BmpImageFile"),
    "DIB": ("PIL.BmpImagePlugin", "DibImageFile"),
    "TIFF": ("PIL.TiffImagePlugin", "TiffImageFile"),
    "AVIF": ("PIL.AvifImagePlugin", "AvifImageFile"),
    "HEIF": ("pillow_heif", "HeifImageFile"),
    "JPEG2000": ("PIL.Jpeg2KImagePlugin", "Jpeg2KImageFile"),
    "PPM": ("PIL.PpmImagePlugin", "PpmImageFile"),
    "QOI": ("PIL.QoiImagePlugin", "QoiImageFile"),
    "PSD": ("PIL.PsdImagePlugin", "PsdImageFile"),
    "ICO": ("PIL.IcoImagePlugin", "IcoImageFile"),
}
_ORIENTATION_TAG = 0x0112
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Large pictures are first averaged in whole blocks to no less than this many times the target: Pillow's
# documented value for a result that cannot be told from the full bicubic filter.
_REDUCING_GAP = 3.0
# Pillow tells the kinds of failure apart by message only.
_UNSUPPORTED = re.compile(
    r"unsupported|not (yet )?supported|cannot handle|unknown pixel mode|not available|no codec", re.IGNORECASE
)
_TRUNCATED = re.compile(
    r"truncated|not enough (image )?data|not large enough|unexpected end|end of (data|file)", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """Pixels of one picture.

    pixels_HWC: uint8, sRGB, C-contiguous and writable. width, height: of the whole picture, upright, before
    any resizing.
    """

    pixels_HWC: NDArray[np.uint8]
    width: int
    height: int


def decode(
    data: bytes,
    *,
    size: tuple[int, int] | None = None,
    max_short_side: int | None = None,
    limits: ReadLimits = DEFAULT_LIMITS,
) -> DecodedImage:
    """Pixels of an image file: upright, sRGB, over white; the first frame or page of several.

    size: (width, height) that the whole picture is squashed to, bicubic and antialiased; None keeps its own.
    max_short_side: the whole picture keeps its aspect ratio and is reduced so that its shorter side has no more
    pixels than that; a smaller picture stays as it is. Not together with `size`.
    JPEG files are decoded at the smallest of the scales 1, 1/2, 1/4, 1/8 that still covers the target.
    Raises ImageError: empty, too_large, too_many_pixels, not_an_image, truncated, corrupt, unsupported.
    """
    _check_target(size, max_short_side)
    with opened(data, limits) as image:
        return _decode_opened(image, size, max_short_side)


@contextmanager
def opened(data: bytes, limits: ReadLimits = DEFAULT_LIMITS) -> Iterator[ImageFile.ImageFile]:
    """An image file as Pillow opens it, of which no pixel is decoded yet.

    What goes wrong inside of the block is raised as ImageError, too. Raises ImageError as `decode` does.
    """
    check_num_bytes(len(data), limits)
    format_name = image_format(data[:HEAD_BYTES])
    if format_name is None:
        raise ImageError("not_an_image", f"no known image format starts with {data[:12]!r}")
    with _decoding_errors(format_name, data):
        if (claimed := claimed_size(format_name, data)) is not None:
            _check_pixels(claimed, limits)
        # The plugin and not Image.open: that applies Pillow's process-wide pixel limit over ours, and tries
        # one format after another.
        with _plugin(format_name)(io.BytesIO(data)) as image:
            _check_pixels(image.size, limits)
            yield image


def load_image(
    source: str | os.PathLike[str] | bytes | Image.Image,
    *,
    size: tuple[int, int] | None = None,
    max_short_side: int | None = None,
    limits: ReadLimits = DEFAULT_LIMITS,
) -> DecodedImage:
    """Pixels of a path, of an image file's bytes or of a Pillow image, all treated as `decode` does.

    A Pillow image is not changed; its EXIF orientation and its colour profile count as in a file.
    Raises ImageError as `read_file` and `decode` do.
    """
    if isinstance(source, bytes):
        return decode(source, size=size, max_short_side=max_short_side, limits=limits)
    if not isinstance(source, Image.Image):
        return decode(read_file(source, limits).data, size=size, max_short_side=max_short_side, limits=limits)
    _check_target(size, max_short_side)
    if min(source.size) < 1:
        raise ImageError("empty", f"the picture has no pixels: {source.width} x {source.height}")
    _check_pixels(source.size, limits)
    with _decoding_errors(source.format or "image", None):
        source.load()
        orientation = _orientation(source)
        return _finish(source, _target(size, max_short_side, source.size, orientation), orientation, source.size)


def _check_target(size: tuple[int, int] | None, max_short_side: int | None) -> None:
    if size is not None and max_short_side is not None:
        raise ValueError(f"either size or max_short_side can be given, not both: {size!r} and {max_short_side!r}")
    if size is not None and min(size) < 1:
        raise ValueError(f"size must be (width, height) of at least 1 pixel each, not {size!r}")
    if max_short_side is not None and max_short_side < 1:
        raise ValueError(f"max_short_side must be at least 1 pixel, not {max_short_side!r}")


def _target(
    size: tuple[int, int] | None, max_short_side: int | None, stored_size: tuple[int, int], orientation: int
) -> tuple[int, int] | None:
    """The upright (width, height) to resize to, None to keep the picture's own."""
    if max_short_side is None or min(stored_size) <= max_short_side:
        return size
    width, height = _as_stored(stored_size, orientation)
    short = min(width, height)
    return round(width * max_short_side / short), round(height * max_short_side / short)


def _check_pixels(size: tuple[int, int], limits: ReadLimits) -> None:
    width, height = size
    if width * height > limits.max_pixels:
        raise ImageError(
            "too_many_pixels",
            f"{width} x {height} = {width * height:,} pixels, more than the limit of"
            f" {limits.max_pixels:,} (max_pixels)",
        )


# Only the reader of the format at hand is imported, and libheif not before the first HEIC file.
@cache
def _plugin(format_name: str) -> type[ImageFile.ImageFile]:
    module, class_name = _PLUGINS[format_name]
    return cast(type[ImageFile.ImageFile], getattr(importlib.import_module(module), class_name))


def _decode_opened(
    image: ImageFile.ImageFile, size: tuple[int, int] | None, max_short_side: int | None
) -> DecodedImage:
    if image.format != "JPEG":
        # HEIC would lend its embedded thumbnail for a small size: not taken, since nothing makes sure that
        # it shows the same picture.
        image.load()
        # Not before loading: TIFF is turned upright by its reader, PNG may carry EXIF behind the pixels.
        orientation = _orientation(image)
        return _finish(image, _target(size, max_short_side, image.size, orientation), orientation, image.size)
    orientation = _orientation(image)
    stored_size = image.size
    size = _target(size, max_short_side, stored_size, orientation)
    box = None
    if size is not None:
        drafted = image.draft("RGB", _as_stored(size, orientation))
        # The box leaves out the padding of a last block that the picture fills only in part.
        box = drafted[1] if drafted else None
    image.load()
    return _finish(image, size, orientation, stored_size, box)


def _finish(
    image: Image.Image,
    size: tuple[int, int] | None,
    orientation: int,
    stored_size: tuple[int, int],
    box: tuple[float, float, float, float] | None = None,
) -> DecodedImage:
    """Resizing first, then turning and colour, which are cheap on few pixels."""
    icc_profile = image.info.get("icc_profile")
    image = expand(image)
    if size is not None:
        image = premultiply(image).resize(
            _as_stored(size, orientation), Image.Resampling.BICUBIC, box=box, reducing_gap=_REDUCING_GAP
        )
    image = to_srgb(image, icc_profile)
    if orientation in _TRANSPOSITIONS:
        image = image.transpose(_TRANSPOSITIONS[orientation])
    width, height = _as_stored(stored_size, orientation)
    # A copy: Pillow lends its pixels read-only, which torch.from_numpy warns about.
    return DecodedImage(pixels_HWC=np.array(image), width=width, height=height)


def _as_stored(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """The upright size as the file stores it, and the other way round: 5 to 8 swap the sides."""
    return (size[1], size[0]) if orientation >= 5 else size


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # EXIF data is often damaged by editors; the pixels are not
        return 1
    return value if value in _TRANSPOSITIONS else 1


@contextmanager
def _decoding_errors(format_name: str, data: bytes | None) -> Iterator[None]:
    """Everything that Pillow and its libraries raise on damaged files, as ImageError."""
    _ignore_pillow_warnings()
    try:
        yield
    except ImageError:
        raise
    except (MemoryError, Image.DecompressionBombError) as error:
        raise ImageError("too_many_pixels", f"{format_name}: {str(error) or 'not enough memory'}") from error
    except Exception as error:
        raise ImageError(_reason(error, format_name, data), f"{format_name}: {_in_words(error)}") from error


def _reason(error: Exception, format_name: str, data: bytes | None) -> str:
    message = str(error)
    # Pillow looks compression schemes and modes up in tables and lets the KeyError stand.
    if _UNSUPPORTED.search(message) or isinstance(error.__cause__ or error, KeyError):
        return "unsupported"
    cut_short = None if data is None else ends_early(format_name, data)
    if cut_short is None:
        cut_short = isinstance(error, EOFError) or _TRUNCATED.search(message) is not None
    return "truncated" if cut_short else "corrupt"


def _in_words(error: Exception) -> str:
    message = " ".join(str(error).split())
    return message if len(message) > 3 else type(error).__name__


_warning_filter: Any = None


def _ignore_pillow_warnings() -> None:
    """Keeps Pillow's remarks on damaged metadata off stderr, and from failing good pictures under -W error.

    warnings.catch_warnings would be tidier, but it is not safe with threads before Python 3.14. Whoever
    restores the filters meanwhile removes ours, so it is looked for each time.
    """
    global _warning_filter
    if _warning_filter is None or _warning_filter not in warnings.filters:
        warnings.filterwarnings("ignore", module=r"PIL\.")
        _warning_filter = warnings.filters[0]
