"""What the bytes of a picture say before anything is decoded: the format, the size, whether they end early.

Pillow answers the first two only by opening a file, which for WebP and ICO already allocates or decodes the
picture, and never answers the third. Nothing here imports Pillow, so that listing a folder stays cheap.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator

# As many leading bytes as `image_format` can use: the fixed fields of every format, and enough of an ISO
# "ftyp" box to see its compatible brands.
HEAD_BYTES = 256

_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),  # BigTIFF
    (b"MM\0+", "TIFF"),
    (b"8BPS\0\1", "PSD"),
    (b"\xff\x4f\xff\x51", "JPEG2000"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG2000"),
)
_DIB_HEADER_SIZES = frozenset((12, 40, 52, 56, 64, 108, 124))
_BIT_DEPTHS = frozenset((1, 2, 4, 8, 16, 24, 32))
_NETPBM = re.compile(rb"P[1-6fF]\s(?:\s*#|\s*\d+\s+\d)")
_AVIF_BRANDS = frozenset((b"avif", b"avis"))
_HEVC_BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"))
# Brands of the container alone: the compatible brands say which codec is inside.
_CONTAINER_BRANDS = frozenset((b"mif1", b"mif2", b"msf1", b"miaf"))


def image_format(head: bytes) -> str | None:
    """Name of the image format that a file begins with, None if it is none that can be read.

    head: the first 32 bytes of the file or more (`HEAD_BYTES` at best). One of JPEG, PNG, WEBP, GIF, BMP,
    DIB, TIFF, AVIF, HEIF, JPEG2000, PPM, QOI, PSD, ICO; MPO is told as the JPEG that it begins with. Short
    magic numbers are believed only when the fields behind them are plausible, so that neither a text that
    starts with "BM" nor a film in an ISO container is taken for a picture.
    """
    for magic, name in _MAGIC:
        if head.startswith(magic):
            return name
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        return _iso_format(head)
    if head.startswith(b"qoif") and head[12:13] in (b"\3", b"\4") and head[13:14] in (b"\0", b"\1"):
        return "QOI"
    if head.startswith(b"BM") and len(head) >= 30 and _is_dib_header(head[14:]):
        return "BMP"
    if head.startswith(b"\0\0\1\0") and len(head) >= 22 and _is_icon_entry(head):
        return "ICO"
    if _NETPBM.match(head):
        return "PPM"
    if _is_dib_header(head):
        return "DIB"
    return None


def _iso_format(head: bytes) -> str | None:
    major = head[8:12]
    box_end = min(int.from_bytes(head[:4], "big"), len(head))
    brands = {head[at : at + 4] for at in range(16, box_end - 3, 4)}
    if major in _CONTAINER_BRANDS:
        return "AVIF" if brands & _AVIF_BRANDS and not brands & _HEVC_BRANDS else "HEIF"
    if major in _AVIF_BRANDS:
        return "AVIF"
    return "HEIF" if major in _HEVC_BRANDS else None


def _is_dib_header(head: bytes) -> bool:
    if len(head) < 16:
        return False
    header_size = int.from_bytes(head[:4], "little")
    if header_size not in _DIB_HEADER_SIZES:
        return False
    width, height, planes, depth = struct.unpack_from("<HHHH" if header_size == 12 else "<iiHH", head, 4)
    return width > 0 and height != 0 and planes == 1 and depth in _BIT_DEPTHS


def _is_icon_entry(head: bytes) -> bool:
    num_entries = int.from_bytes(head[4:6], "little")
    planes, depth, num_bytes, offset = struct.unpack_from("<HHII", head, 10)
    plausible = planes <= 1 and (depth == 0 or depth in _BIT_DEPTHS) and num_bytes > 0
    return 0 < num_entries < 256 and plausible and offset >= 6 + 16 * num_entries


def claimed_size(format_name: str, data: bytes) -> tuple[int, int] | None:
    """Largest (width, height) that the header asks memory for, where opening would already take it.

    None for the formats that Pillow opens without touching the pixels, and for a header that breaks off.
    """
    if format_name == "WEBP":
        return _webp_size(data)
    if format_name == "ICO":
        return max(_icon_sizes(data), key=lambda size: size[0] * size[1], default=None)
    return None


def _webp_size(data: bytes) -> tuple[int, int] | None:
    chunk = data[12:16]
    if len(data) < 30:
        return None
    if chunk == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if chunk == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if chunk == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    return None


def _icon_entries(data: bytes) -> Iterator[tuple[int, int]]:
    """(offset, number of bytes) of each picture in an icon file."""
    num_entries = int.from_bytes(data[4:6], "little")
    for at in range(6, 6 + 16 * num_entries, 16):
        if at + 16 > len(data):
            return
        num_bytes, offset = struct.unpack_from("<II", data, at + 8)
        yield offset, num_bytes


def _icon_sizes(data: bytes) -> Iterator[tuple[int, int]]:
    # The directory's own sizes are one byte each and need not be true: the pictures' headers decide.
    for offset, _ in _icon_entries(data):
        picture = data[offset : offset + 24]
        if len(picture) < 24:
            continue
        if picture.startswith(b"\x89PNG"):
            yield struct.unpack_from(">II", picture, 16)
        else:
            width, doubled_height = struct.unpack_from("<ii", picture, 4)
            yield abs(width), abs(doubled_height) // 2


def ends_early(format_name: str, data: bytes) -> bool | None:
    """Whether the file was cut short, by its own structure; None where the format does not tell.

    Asked only after decoding failed: decoders report the same error for missing bytes and for wrong ones.
    """
    check = _END_CHECKS.get(format_name)
    if check is None:
        return None
    try:
        return check(data)
    except (struct.error, IndexError):  # a header that itself breaks off
        return True


def _jpeg_ends_early(data: bytes) -> bool:
    # Segments are walked up to the scan, since an embedded thumbnail has an end marker of its own.
    at = 2
    while at + 2 <= len(data):
        if data[at] != 0xFF:
            return False
        marker = data[at + 1]
        if marker == 0xDA:
            return data.rfind(b"\xff\xd9") < at
        if marker == 0xD9:
            return False
        if marker in (0xFF, 0x00, 0x01) or 0xD0 <= marker <= 0xD9:  # padding and markers without a length
            at += 1 if marker == 0xFF else 2
            continue
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return True


def _png_ends_early(data: bytes) -> bool:
    return b"IEND" not in data


def _gif_ends_early(data: bytes) -> bool:
    return not data.rstrip(b"\0").endswith(b";")


def _webp_ends_early(data: bytes) -> bool:
    return 8 + int.from_bytes(data[4:8], "little") > len(data)


def _iso_ends_early(data: bytes) -> bool:
    at = 0
    while at < len(data):
        size, header = int(struct.unpack_from(">I", data, at)[0]), 8
        if size == 1:
            size, header = int(struct.unpack_from(">Q", data, at + 8)[0]), 16
        if size == 0:  # the last box reaches to the end of the file
            return False
        if size < header:
            return False
        at += size
    return at > len(data)


def _bmp_ends_early(data: bytes) -> bool:
    return int.from_bytes(data[2:6], "little") > len(data)


def _icon_ends_early(data: bytes) -> bool:
    return any(offset + num_bytes > len(data) for offset, num_bytes in _icon_entries(data))


def _codestream_ends_early(data: bytes) -> bool:
    return b"\xff\xd9" not in data  # packets of JPEG 2000 hold no byte pair above FF 8F


def _qoi_ends_early(data: bytes) -> bool:
    return not data.endswith(b"\0\0\0\0\0\0\0\1")


def _tiff_ends_early(data: bytes) -> bool | None:
    """Whether the first page's directory or one of its strips lies behind the end; None for BigTIFF."""
    order = "<" if data.startswith(b"II") else ">"
    version, first_page = struct.unpack_from(order + "HI", data, 2)
    if version != 42:
        return None
    (num_tags,) = struct.unpack_from(order + "H", data, first_page)
    values: dict[int, tuple[int, ...]] = {}
    for at in range(first_page + 2, first_page + 2 + 12 * num_tags, 12):
        tag, kind, count = struct.unpack_from(order + "HHI", data, at)
        if tag not in (273, 279, 324, 325) or kind not in (3, 4) or count > len(data):
            continue
        item = "H" if kind == 3 else "I"
        num_bytes = count * struct.calcsize(item)
        where = at + 8 if num_bytes <= 4 else int(struct.unpack_from(order + "I", data, at + 8)[0])
        values[tag] = struct.unpack_from(f"{order}{count}{item}", data, where)
    offsets = values.get(273) or values.get(324) or ()
    counts = values.get(279) or values.get(325) or ()
    return any(offset + count > len(data) for offset, count in zip(offsets, counts, strict=False))


_END_CHECKS: dict[str, Callable[[bytes], bool | None]] = {
    "JPEG": _jpeg_ends_early,
    "PNG": _png_ends_early,
    "GIF": _gif_ends_early,
    "WEBP": _webp_ends_early,
    "HEIF": _iso_ends_early,
    "AVIF": _iso_ends_early,
    "BMP": _bmp_ends_early,
    "ICO": _icon_ends_early,
    "JPEG2000": _codestream_ends_early,
    "QOI": _qoi_ends_early,
    "TIFF": _tiff_ends_early,
}
