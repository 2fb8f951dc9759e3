"""Image files that cannot be read, each broken in its own way, and good ones that are easily misread.

Everything is made here from seeded noise, so that no broken file needs to be shipped.
"""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pillow_heif
from PIL import Image, ImageCms

SIZE = (96, 64)  # of most files


def picture(width: int = SIZE[0], height: int = SIZE[1], *, seed: int = 0) -> Image.Image:
    """A picture with something like a photograph's structure: coarse colours with a little noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    noisy = smooth + rng.integers(-6, 7, (height, width, 3))
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def encoded(image: Image.Image, format_name: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    if format_name == "HEIF":
        pillow_heif.from_pillow(image).save(buffer, **options)
    else:
        image.save(buffer, format_name, **options)
    return buffer.getvalue()


def exif_orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_file(width: int, height: int, *chunks: bytes, depth: int = 8, colour_type: int = 2) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + b"".join(chunks) + png_chunk(b"IEND", b"")


def png_16_bit(samples: np.ndarray[tuple[int, ...], np.dtype[np.uint16]]) -> bytes:
    """A 16-bit PNG, grey (HW), RGB or RGBA (HWC); Pillow writes only the grey one."""
    colour_type = {2: 0, 3: 2, 4: 6}[samples.shape[2] if samples.ndim == 3 else 2]
    rows = samples.astype(">u2").reshape(samples.shape[0], -1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    body = png_chunk(b"IDAT", zlib.compress(raw))
    return png_file(samples.shape[1], samples.shape[0], body, depth=16, colour_type=colour_type)


def tiff_file(tags: dict[int, tuple[int, int]], pixels: bytes = b"", next_page: int = 0) -> bytes:
    """A little-endian TIFF file of one page: {tag: (type, value)}; the pixels lie behind the directory."""
    directory = struct.pack("<H", len(tags))
    for tag, (kind, value) in sorted(tags.items()):
        directory += struct.pack("<HHII", tag, kind, 1, value)
    return b"II*\0" + struct.pack("<I", 8) + directory + struct.pack("<I", next_page) + pixels


def grey_tiff_tags(width: int, height: int, **changed: int) -> dict[int, tuple[int, int]]:
    num_tags = 8
    values = {
        256: width,
        257: height,
        258: changed.get("depth", 8),
        259: changed.get("compression", 1),
        262: 1,
        273: changed.get("offset", 8 + 2 + 12 * num_tags + 4),
        278: height,
        279: changed.get("num_bytes", width * height),
    }
    return {tag: (4 if tag in (256, 257, 273, 278, 279) else 3, value) for tag, value in values.items()}


def psd_file(image: Image.Image, *, width: int | None = None, depth: int = 8, mode: int = 3) -> bytes:
    """A flattened, uncompressed Photoshop file."""
    header = struct.pack(">4sH6xHIIHH", b"8BPS", 1, 3, image.height, width or image.width, depth, mode)
    planes = np.asarray(image).transpose(2, 0, 1).tobytes()
    return header + bytes(12) + b"\0\0" + planes


def _replaced(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def _truncated() -> Iterator[tuple[str, bytes, str]]:
    image = picture()
    files = {
        "jpeg.jpg": encoded(image, "JPEG", quality=90),
        "progressive.jpg": encoded(image, "JPEG", quality=90, progressive=True),
        "cmyk.jpg": encoded(image.convert("CMYK"), "JPEG"),
        "plain.png": encoded(image, "PNG"),
        "palette.png": encoded(image.quantize(64), "PNG"),
        "plain.gif": encoded(image.quantize(64), "GIF"),
        "lossy.webp": encoded(image, "WEBP"),
        "lossless.webp": encoded(image, "WEBP", lossless=True),
        "plain.bmp": encoded(image, "BMP"),
        "raw.tif": encoded(image, "TIFF"),
        "lzw.tif": encoded(image, "TIFF", compression="tiff_lzw"),
        "deflate.tif": encoded(image, "TIFF", compression="tiff_adobe_deflate"),
        "phone.heic": encoded(image, "HEIF"),
        "phone.avif": encoded(image, "AVIF"),
        "plain.jp2": encoded(image, "JPEG2000"),
        "plain.ppm": encoded(image, "PPM"),
        "plain.qoi": encoded(image, "QOI"),
        "plain.psd": psd_file(image),
        "plain.ico": encoded(image.resize((64, 64)), "ICO", sizes=[(64, 64)]),
    }
    for name, data in files.items():
        yield f"half of {name}", data[: len(data) // 2], "truncated"
    for name in ("jpeg.jpg", "plain.png", "plain.gif", "lossy.webp", "phone.heic", "phone.avif"):
        data = files[name]
        yield f"nearly all of {name}", data[: len(data) * 9 // 10], "truncated"
    yield "only the magic number.png", files["plain.png"][:8], "truncated"
    yield "only the first segment.jpg", files["jpeg.jpg"][:20], "truncated"
    yield "only the container.webp", files["lossy.webp"][:12], "truncated"
    yield "only the brand.heic", files["phone.heic"][:40], "truncated"
    yield "only the header.gif", files["plain.gif"][:13], "truncated"
    yield "only the header.bmp", files["plain.bmp"][:54], "truncated"
    yield "only two letters.bmp", b"BM", "not_an_image"


def _foreign() -> Iterator[tuple[str, bytes, str]]:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr(zipfile.ZipInfo("a.txt"), "hello")
    rng = np.random.default_rng(1)
    film_head = struct.pack(">I4s4sI", 32, b"ftyp", b"isom", 512) + b"isomiso2avc1mp41"
    contents = {
        "text.jpg": b"This is not a picture.\n" * 20,
        "BMW or so.bmp": b"BMW makes motor cars, and this is a text about them. " * 5,
        "page.jpg": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "error.jpg": json.dumps({"error": "not found", "status": 404}).encode(),
        "document.png": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n<<>>\nendobj\n",
        "archive.webp": archive.getvalue(),
        "film.jpg": film_head + struct.pack(">I4s", 8, b"mdat"),
        "quicktime.heic": struct.pack(">I4s4sI", 20, b"ftyp", b"qt  ", 0) + b"qt  " + bytes(50),
        "program.jpg": b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\0>\0" + bytes(200),
        "drawing.png": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>',
        "postscript.tif": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        "only zeros.jpg": bytes(4096),
        "noise.png": b"\x01" + rng.integers(0, 256, 3000, dtype=np.uint8).tobytes(),
        "sound.jpg": b"ID3\x04\0\0\0\0\0\x23" + bytes(300),
        "one byte.jpg": b"\xff",
        "upload form.jpg": b"------WebKitFormBoundary\r\nContent-Type: image/jpeg\r\n\r\n\xff\xd8\xff",
    }
    for name, data in contents.items():
        yield name, data, "not_an_image"
    yield "no bytes.jpg", b"", "empty"
    yield "no bytes.png", b"", "empty"


def _bombs() -> Iterator[tuple[str, bytes, str]]:
    """Headers that claim far more pixels than their few bytes can hold."""
    image = picture()
    jpeg = encoded(image, "JPEG")
    jpeg_size = jpeg.index(b"\xff\xc0") + 5
    bmp = encoded(image, "BMP")
    extended = struct.pack("<I", 0) + b"\xff\xff\0" * 2
    webp = encoded(image, "WEBP", lossless=True)
    heic = encoded(image, "HEIF")
    jp2 = encoded(image, "JPEG2000")
    icon_picture = png_file(60000, 60000, png_chunk(b"IDAT", zlib.compress(bytes(9))))
    contents = {
        "bomb.png": png_file(60000, 60000, png_chunk(b"IDAT", zlib.compress(bytes(9)))),
        "bomb.jpg": _replaced(jpeg, jpeg_size, struct.pack(">HH", 65000, 65000)),
        "bomb.gif": b"GIF89a"
        + struct.pack("<HH", 60000, 60000)
        + b"\0\0\0,"
        + struct.pack("<HHHH", 0, 0, 60000, 60000)
        + b"\0\x02\x02\x4c\x01\0;",
        "bomb.bmp": _replaced(bmp, 18, struct.pack("<ii", 60000, 60000)),
        "bomb.tif": tiff_file(grey_tiff_tags(2**20, 2**20, num_bytes=100), bytes(100)),
        "bomb.webp": b"RIFF"
        + struct.pack("<I", 22 + len(webp) - 12)
        + b"WEBPVP8X"
        + struct.pack("<I", 10)
        + extended
        + webp[12:],
        "bomb.ppm": b"P6\n60000 60000\n255\n" + bytes(100),
        "bomb.qoi": b"qoif" + struct.pack(">IIBB", 60000, 60000, 3, 0) + bytes(100),
        "bomb.psd": psd_file(image)[:14] + struct.pack(">II", 30000, 30000) + psd_file(image)[22:],
        "bomb.heic": heic.replace(struct.pack(">II", *SIZE), struct.pack(">II", 30000, 30000)),
        "bomb.jp2": jp2.replace(struct.pack(">II", SIZE[1], SIZE[0]), struct.pack(">II", 60000, 60000)),
        "bomb.ico": b"\0\0\1\0\1\0" + struct.pack("<BBBBHHII", 0, 0, 0, 0, 1, 32, len(icon_picture), 22) + icon_picture,
    }
    for name, data in contents.items():
        yield name, data, "too_many_pixels"


def _damaged() -> Iterator[tuple[str, bytes, str]]:
    image = picture()
    png, jpeg = encoded(image, "PNG"), encoded(image, "JPEG", quality=90)
    webp, heic, avif = encoded(image, "WEBP"), encoded(image, "HEIF"), encoded(image, "AVIF")
    gif = encoded(image.quantize(64), "GIF")
    jp2 = encoded(image, "JPEG2000")
    pixels_at = png.index(b"IDAT") + 4
    flipped = bytes(byte ^ 0xFF for byte in png[pixels_at + 40 : pixels_at + 44])
    yield "wrong checksum.png", _replaced(png, pixels_at + 40, flipped), "corrupt"
    yield "wrong header checksum.png", _replaced(png, 29, b"\0\0\0\0"), "corrupt"
    yield "no pixels.png", png_file(*SIZE), "corrupt"
    noise = png_chunk(b"IDAT", b"\x78\x9c" + b"\xff" * 200)
    yield "pixels that are no zlib stream.png", png_file(*SIZE, noise), "corrupt"
    short = png_chunk(b"IDAT", zlib.compress(bytes(100)))
    yield "fewer rows than claimed.png", png_file(*SIZE, short), "corrupt"
    body = png_chunk(b"IDAT", zlib.compress(bytes(64 * (1 + 96 * 3))))
    yield "colour type 5.png", png_file(*SIZE, body, colour_type=5), "corrupt"
    yield "no width.png", png_file(0, 64, body), "corrupt"

    tables_at = jpeg.index(b"\xff\xc4")
    yield "broken Huffman table.jpg", _replaced(jpeg, tables_at + 5, b"\xff" * 16), "corrupt"
    size_at = jpeg.index(b"\xff\xc0") + 5
    yield "no height and width.jpg", _replaced(jpeg, size_at, bytes(4)), "corrupt"
    yield "12 bits.jpg", _replaced(jpeg, size_at - 1, b"\x0c"), "unsupported"
    yield "two colours.jpg", _replaced(jpeg, size_at + 4, b"\x02"), "unsupported"
    yield "start and end.jpg", b"\xff\xd8\xff\xd9", "corrupt"
    quantization_at = jpeg.index(b"\xff\xdb")
    yield "no quantization.jpg", jpeg[:quantization_at] + jpeg[size_at - 5 :], "corrupt"
    yield "sampling factor 15.jpg", _replaced(jpeg, size_at + 6, b"\xff"), "corrupt"

    yield "pages in a circle.tif", tiff_file({270: (3, 0)}, next_page=8), "corrupt"
    yield "directory behind the end.tif", b"II*\0" + struct.pack("<I", 10**6) + bytes(50), "truncated"
    yield (
        "unknown compression.tif",
        tiff_file(grey_tiff_tags(8, 8, compression=9999), bytes(64)),
        "unsupported",
    )
    yield "13 bits.tif", tiff_file(grey_tiff_tags(8, 8, depth=13), bytes(64)), "unsupported"
    yield "pixels behind the end.tif", tiff_file(grey_tiff_tags(8, 8, offset=10**6), bytes(64)), "truncated"
    noise_tags = grey_tiff_tags(64, 64, compression=5, num_bytes=64)
    yield "LZW noise.tif", tiff_file(noise_tags, b"\xff" * 64), "corrupt"
    yield "no dimensions.tif", tiff_file({258: (3, 8), 259: (3, 1), 262: (3, 1)}), "corrupt"

    bmp = encoded(image, "BMP")
    yield "unknown compression.bmp", _replaced(bmp, 30, struct.pack("<I", 77)), "unsupported"
    yield "two bits.bmp", _replaced(bmp, 28, struct.pack("<H", 2)), "unsupported"
    yield "header of an old kind.bmp", _replaced(bmp, 14, struct.pack("<I", 999)), "not_an_image"

    yield "code size 99.gif", _replaced(gif, gif.index(b",", 13 + 64 * 3) + 10, b"\x63"), "corrupt"
    yield "no frame.gif", gif[: 13 + 64 * 3] + b";", "corrupt"
    yield "no start code.webp", _replaced(webp, 23, bytes(3)), "corrupt"
    yield "unknown chunk.webp", webp[:12] + b"ABCD" + webp[16:], "corrupt"
    yield "no item table.heic", heic.replace(b"iloc", b"free"), "corrupt"
    media_at = heic.index(b"mdat") + 4
    yield "zeros for pixels.heic", heic[:media_at] + bytes(len(heic) - media_at), "corrupt"
    yield (
        "no picture inside.heic",
        heic[: heic.index(b"meta") - 4] + struct.pack(">I4s", 100, b"mdat") + bytes(92),
        "corrupt",
    )
    media_at = avif.index(b"mdat") + 4
    yield "zeros for pixels.avif", avif[:media_at] + bytes(len(avif) - media_at), "corrupt"
    yield "no item table.avif", avif.replace(b"iloc", b"free"), "corrupt"
    stream_at = jp2.index(b"\xff\x4f\xff\x51")
    yield "broken codestream.jp2", jp2[: stream_at + 2] + b"\xff\x99" * 60 + b"\xff\xd9", "corrupt"
    yield "a letter for a size.ppm", b"P6\n# made by hand\nab cd\n255\n" + bytes(100), "corrupt"
    yield "greys beyond the maximum.ppm", b"P2\n2 2\n15\n1 2 3 99\n", "corrupt"
    yield "no channels.psd", _replaced(psd_file(image), 12, b"\0\0"), "corrupt"
    yield "a mode of its own.psd", psd_file(image, mode=42), "unsupported"
    icon = struct.pack("<BBBBHHII", 32, 32, 0, 0, 1, 32, 40, 22) + b"\x28\0\0\0" + b"\xff" * 36
    yield "broken picture.ico", b"\0\0\1\0\1\0" + icon, "unsupported"


def make_bad_files(folder: Path) -> dict[str, str]:
    """Writes more than 100 files with names of images that cannot be read: {file name: reason of ImageError}.

    Links and pipes are among them where the system has such.
    """
    reasons: dict[str, str] = {}
    for group in (_truncated(), _foreign(), _bombs(), _damaged()):
        for name, data, reason in group:
            assert name not in reasons, name
            (folder / name).write_bytes(data)
            reasons[name] = reason
    if os.name == "posix":
        os.mkfifo(folder / "pipe.jpg")
        reasons["pipe.jpg"] = "not_a_file"
        os.symlink("nowhere at all", folder / "broken link.jpg")
        reasons["broken link.jpg"] = "broken_link"
        os.symlink("link to itself.jpg", folder / "link to itself.jpg")
        reasons["link to itself.jpg"] = "broken_link"
    return reasons


def wide_gamut_profile() -> bytes:
    """A profile with the primaries of Display P3 and the transfer curve of sRGB, as phones embed it."""
    return _matrix_profile(
        red=(0.51512, 0.24120, -0.00105), green=(0.29198, 0.69225, 0.04189), blue=(0.15710, 0.06657, 0.78407)
    )


def _matrix_profile(**primaries: tuple[float, float, float]) -> bytes:
    """A profile from the XYZ of its primaries under D50, after the curve of sRGB."""
    levels = np.linspace(0, 1, 256)
    linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    curve = b"curv" + bytes(4) + struct.pack(">I", 256) + np.rint(linear * 65535).astype(">u2").tobytes()
    tags = {}
    for name in ("red", "green", "blue"):
        letter = name[:1].encode()
        tags[letter + b"XYZ"] = _xyz(primaries[name])
        tags[letter + b"TRC"] = curve
    return _profile(b"mntrRGB XYZ ", tags)


def grey_cyan_profile() -> bytes:
    """A printer's profile of odd inks: full cyan alone is a grey of Lab lightness 50, any other black."""
    grid = np.zeros((2, 2, 2, 2, 3), dtype=np.uint8)
    grid[..., 1:] = 128
    grid[0, 0, 0, 0, 0], grid[1, 0, 0, 0, 0] = 255, 128
    straight = bytes(range(256))
    matrix = _fixed((1, 0, 0, 0, 1, 0, 0, 0, 1))
    table = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + matrix + straight * 4 + grid.tobytes() + straight * 3
    return _profile(b"prtrCMYKLab ", {b"A2B0": table})


def _fixed(values: tuple[float, ...]) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def _xyz(values: tuple[float, ...]) -> bytes:
    return b"XYZ " + bytes(4) + _fixed(values)


def _profile(kind: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile of version 2. kind: device class, colour space and connection space, 4 letters each."""
    white = (0.9642, 1.0, 0.8249)
    text = b"Made for a test\0"
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", len(text)) + text + bytes(78),
        b"cprt": b"text" + bytes(4) + b"none\0",
        b"wtpt": _xyz(white),
        **tags,
    }
    table, body = struct.pack(">I", len(tags)), b""
    for tag, value in tags.items():
        table += tag + struct.pack(">II", 128 + 4 + 12 * len(tags) + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    header = struct.pack(">I4xI12s", 128 + len(table) + len(body), 0x02100000, kind)
    header += bytes(12) + b"acsp" + bytes(28) + _fixed(white)
    return header.ljust(128, b"\0") + table + body


def _good() -> Iterator[tuple[str, bytes, tuple[int, int]]]:
    image = picture(seed=3)
    upright, turned = SIZE, SIZE[::-1]
    for value in range(1, 9):
        size = turned if value >= 5 else upright
        yield f"orientation {value}.jpg", encoded(image, "JPEG", exif=exif_orientation(value)), size
    sideways = exif_orientation(6)
    yield "orientation 6.png", encoded(image, "PNG", exif=sideways), turned
    yield "orientation 6.webp", encoded(image, "WEBP", exif=sideways), turned
    yield "orientation 6.tif", encoded(image, "TIFF", exif=sideways), turned
    yield "orientation 6.avif", encoded(image, "AVIF", exif=sideways), turned
    yield "broken EXIF.jpg", encoded(image, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f"), upright
    yield "progressive.jpg", encoded(image, "JPEG", progressive=True), upright
    yield "grey.jpg", encoded(image.convert("L"), "JPEG"), upright
    yield "cmyk.jpg", encoded(image.convert("CMYK"), "JPEG"), upright
    inks = encoded(image.convert("CMYK"), "JPEG", icc_profile=grey_cyan_profile())
    yield "cmyk with profile.jpg", inks, upright
    yield "junk behind the end.jpg", encoded(image, "JPEG") + b"trailing junk" * 50, upright
    yield "wide gamut.jpg", encoded(image, "JPEG", icc_profile=wide_gamut_profile()), upright
    yield "broken profile.jpg", encoded(image, "JPEG", icc_profile=b"not a colour profile"), upright
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    yield "grey with colour profile.png", encoded(image.convert("L"), "PNG", icc_profile=srgb), upright
    grey = np.asarray(image.convert("L")).astype(np.uint16) * 257
    yield "16-bit grey.png", png_16_bit(grey), upright
    yield "16-bit colour.png", png_16_bit(np.asarray(image).astype(np.uint16) * 257), upright
    yield "16-bit grey.tif", encoded(Image.fromarray(grey), "TIFF"), upright
    yield "floats.tif", encoded(Image.fromarray(grey.astype(np.float32) / 65535), "TIFF"), upright
    yield "cmyk.tif", encoded(image.convert("CMYK"), "TIFF", compression="tiff_lzw"), upright
    yield "one bit.png", encoded(image.convert("1"), "PNG"), upright
    yield "fax.tif", encoded(image.convert("1"), "TIFF", compression="group4"), upright
    yield "palette.png", encoded(image.quantize(16), "PNG"), upright
    yield "transparent palette.png", encoded(image.quantize(16), "PNG", transparency=3), upright
    veiled = image.copy()
    veiled.putalpha(Image.linear_gradient("L").resize(SIZE))
    yield "alpha.png", encoded(veiled, "PNG"), upright
    yield "alpha.webp", encoded(veiled, "WEBP"), upright
    yield "alpha.heic", encoded(veiled, "HEIF"), upright
    yield "grey alpha.png", encoded(veiled.convert("LA"), "PNG"), upright
    frames = [picture(seed=seed) for seed in range(4, 7)]
    for format_name, extension in (("GIF", "gif"), ("WEBP", "webp"), ("PNG", "png"), ("TIFF", "tif")):
        data = encoded(image, format_name, save_all=True, append_images=frames)
        yield f"several frames.{extension}", data, upright
    yield "phone.heic", encoded(image, "HEIF"), upright
    yield "phone.avif", encoded(image, "AVIF"), upright
    yield "scan.jp2", encoded(image, "JPEG2000"), upright
    yield "photoshop.psd", psd_file(image), upright
    yield "small.qoi", encoded(image, "QOI"), upright
    yield "small.ppm", encoded(image, "PPM"), upright
    yield "icon.ico", encoded(image.resize((48, 48)), "ICO", sizes=[(48, 48)]), (48, 48)
    yield "clipboard.dib", encoded(image, "DIB"), upright
    yield "one pixel.png", encoded(image.crop((0, 0, 1, 1)), "PNG"), (1, 1)
    yield "a line.png", encoded(image.resize((3000, 1)), "PNG"), (3000, 1)
    yield "really a png.jpg", encoded(image, "PNG"), upright
    yield "really a jpeg.txt", encoded(image, "JPEG"), upright
    yield "IMG_0001", encoded(image, "JPEG"), upright
    yield "SHOUTING.JPG", encoded(image, "JPEG"), upright
    yield "two\nlines.jpg", encoded(image, "JPEG"), upright
    yield "Grüße 写真 🌄.jpg", encoded(image, "JPEG"), upright
    yield "caf\udce9.jpg", encoded(image, "JPEG"), upright  # Latin-1, not UTF-8


def make_good_files(folder: Path) -> dict[str, tuple[int, int]]:
    """Writes more than 50 readable but unusual images: {file name: (width, height) when upright}.

    All are listed as images. Names that the file system refuses are left out.
    """
    sizes: dict[str, tuple[int, int]] = {}
    for index, (name, data, size) in enumerate(_good()):
        assert name not in sizes, name
        try:
            # Each a file of its own: same pixels are wanted in several formats, same bytes are not.
            (folder / name).write_bytes(data + bytes([index]) if name.endswith((".jpg", ".JPG")) else data)
        except OSError:  # macOS refuses names that are not UTF-8, Windows those with a line break
            continue
        sizes[name] = size
    return sizes
