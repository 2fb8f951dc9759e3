"""Colour: from whatever Pillow decodes to 8-bit sRGB without transparency.

Three steps, so that a large picture is resized between the second and the third, when every later step is
cheap: `expand` (no palettes, no deep or one-bit samples), `premultiply` (alpha that may be averaged),
`to_srgb` (colour profile, CMYK, white behind transparency).
"""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

# Full scale of the sample depths in use, 8 to 16 bits.
_FULL_SCALES = (255, 1023, 4095, 16383, 65535)
_PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "LAB": "LAB"}
# A profile that moves no colour further than this is sRGB, whatever it is called.
_SAME_COLOUR = 2


def expand(image: Image.Image) -> Image.Image:
    """The picture in L, LA, La, RGB, RGBA, RGBa, CMYK, YCbCr or LAB, with one byte per sample.

    A transparent colour or palette entry becomes an alpha channel. The same image if nothing is to be done.
    """
    mode = image.mode
    if mode.startswith("I") or mode == "F":
        return _scale_to_bytes(image)
    if "transparency" in image.info and mode in ("1", "L", "P", "RGB"):
        return image.convert("RGBA")
    if mode == "PA" or (mode == "P" and image.palette is not None and image.palette.mode == "RGBA"):
        return image.convert("RGBA")
    if mode == "1":
        return image.convert("L")
    if mode in ("L", "LA", "La", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "LAB"):
        return image
    return image.convert("RGB")


def _scale_to_bytes(image: Image.Image) -> Image.Image:
    """Grey with one byte per sample from 16-bit, 32-bit and float samples.

    Pillow's own conversion clips at 255, which turns a 16-bit picture white.
    """
    samples = np.asarray(image)
    if samples.dtype.kind == "f":
        return Image.fromarray(_scale_floats(samples))
    lowest, highest = int(samples.min()), int(samples.max())
    if lowest < 0 or highest > _FULL_SCALES[-1]:
        # Signed or 32-bit measurements have no agreed black and white: the range in use is shown.
        return Image.fromarray(_stretch(samples, lowest, highest))
    if image.format in ("TIFF", None):
        # Microscopes and scanners store 10- to 14-bit samples in 16-bit TIFF files without saying so; at
        # full 16-bit scale those are black.
        white = next(scale for scale in _FULL_SCALES if highest <= scale)
    else:
        white = _FULL_SCALES[-1]
    scaled = (samples.astype(np.uint32) * 255 + white // 2) // white
    return Image.fromarray(scaled.astype(np.uint8))


def _scale_floats(samples: NDArray[np.floating]) -> NDArray[np.uint8]:
    finite = np.isfinite(samples)
    if not finite.all():
        known = samples[finite]
        lowest, highest = (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)
        samples = np.nan_to_num(samples, nan=lowest, posinf=highest, neginf=lowest)
    lowest, highest = float(samples.min()), float(samples.max())
    for white in (1.0, 255.0, 65535.0):
        if lowest >= 0 and highest <= white:
            return _stretch(samples, 0.0, white)
    return _stretch(samples, lowest, highest)


def _stretch(samples: NDArray[np.generic], lowest: float, highest: float) -> NDArray[np.uint8]:
    span = max(float(highest) - float(lowest), 1e-30)
    stretched = (samples.astype(np.float64) - lowest) * (255.0 / span)
    return np.rint(stretched).astype(np.uint8)


def premultiply(image: Image.Image) -> Image.Image:
    """The picture with its colours weighted by alpha.

    Only so may pixels be averaged: otherwise the hidden colour of transparent ones bleeds into the edges.
    """
    if image.mode == "RGBA":
        return image.convert("RGBa")
    if image.mode == "LA":
        return image.convert("La")
    return image


def to_srgb(image: Image.Image, icc_profile: object) -> Image.Image:
    """RGB in sRGB over white, from a mode that `expand` gives. A broken or foreign profile is ignored."""
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    alpha = None
    if image.mode in ("LA", "RGBA"):
        alpha = image.getchannel("A")
        image = image.convert(image.mode[:-1])
    rgb = _convert_colours(image, icc_profile)
    if alpha is None or alpha.getextrema() == (255, 255):
        return rgb
    white = Image.new("RGB", rgb.size, "white")
    white.paste(rgb, mask=alpha)
    return white


def _convert_colours(image: Image.Image, icc_profile: object) -> Image.Image:
    if image.mode == "YCbCr":
        image = image.convert("RGB")
    transform = None
    if isinstance(icc_profile, bytes) and icc_profile:
        profile_mode = _profile_mode(icc_profile)
        if image.mode == "L" and profile_mode == "RGB":
            image = image.convert("RGB")
        if image.mode == profile_mode:
            transform = _profile_transform(icc_profile, image.mode)
    if transform is None and image.mode == "LAB":
        transform = _lab_transform()
    if transform is not None:
        return transform.apply(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _profile_mode(icc_profile: bytes) -> str | None:
    # Bytes 16..20 of a profile's header name its colour space.
    return _PROFILE_MODES.get(icc_profile[16:20].decode("latin-1").strip().upper())


# Cached because building a transform costs more than applying it to a small picture, and a collection holds
# few different profiles; few entries because a printer's profile takes megabytes. lcms keeps the state of a
# running transform on the stack, so one transform serves all threads.
@lru_cache(maxsize=32)
def _profile_transform(icc_profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Transform into sRGB; None for a profile that cannot be used, and for sRGB itself."""
    try:
        source = ImageCms.getOpenProfile(io.BytesIO(icc_profile))
        transform = ImageCms.buildTransform(source, _srgb_profile(), mode, "RGB")
        if mode in ("L", "RGB") and _changes_nothing(transform, mode):
            return None
    except Exception:  # lcms and Pillow raise a dozen kinds for damaged profiles: colours as stored, then
        return None
    return transform


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    # Asked of the colours, since names mislead: some "sRGB" profiles are linear, some copies are renamed.
    levels = np.arange(0, 256, 17, dtype=np.uint8)
    if mode == "RGB":
        cube = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1)
        probe = Image.fromarray(cube.reshape(16, 256, 3))
    else:
        probe = Image.fromarray(levels[None, :])
    before = np.asarray(probe.convert("RGB")).astype(np.int16)
    after = np.asarray(transform.apply(probe)).astype(np.int16)
    return int(np.abs(after - before).max()) <= _SAME_COLOUR


@lru_cache(maxsize=1)
def _srgb_profile() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


@lru_cache(maxsize=1)
def _lab_transform() -> ImageCms.ImageCmsTransform:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    return ImageCms.buildTransform(lab, _srgb_profile(), "LAB", "RGB")
