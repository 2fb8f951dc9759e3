"""Edited copies of a picture: what people do to an image before they post it again.

`EDITS` maps a kind to the function that makes it. Each takes an RGB image and a generator, returns a new
RGB image, draws all its choices from the generator, and gives the same pixels for the same seed (under the
same Pillow). Kinds combine: `apply_edits(image, ["crop", "caption", "reencode"], rng)`.

The strengths aim at copies that a person still recognises at a glance.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont
from PIL.Image import Resampling, Transpose

Edit = Callable[[Image.Image, np.random.Generator], Image.Image]
Colour = tuple[int, int, int]

BLACK: Colour = (0, 0, 0)
WHITE: Colour = (255, 255, 255)

_WORDS = (
    "when you see it again for the first time today my friends and everyone else were already there "
    "waiting look at this nobody told me about Monday best day of summer still not over it"
).split()
_STICKER_COLOURS: tuple[Colour, ...] = (
    (255, 205, 60),
    (230, 60, 70),
    (60, 140, 240),
    (80, 190, 110),
    (250, 250, 250),
)


def apply_edits(image: Image.Image, kinds: Sequence[str], rng: np.random.Generator) -> Image.Image:
    """The image after each edit in turn; a copy of it for no kinds.

    image: RGB. kinds: keys of `EDITS`, in the order they are applied.
    Raises ValueError for an unknown kind, before any edit is made.
    """
    unknown = [kind for kind in kinds if kind not in EDITS]
    if unknown:
        raise ValueError(f"unknown edit {unknown[0]!r}; the kinds are {', '.join(EDITS)}")
    edited = image.copy()
    for kind in kinds:
        edited = EDITS[kind](edited, rng)
    return edited


# Same size, other pixel values.


def reencode(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The image after a JPEG round trip at quality 10-50."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(rng.integers(10, 51)))
    return Image.open(buffer).convert("RGB")


def blur(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The image under a Gaussian of 0.5-2 % of its shorter side, at least one pixel."""
    radius = rng.uniform(0.005, 0.02) * min(image.size)
    return image.filter(ImageFilter.GaussianBlur(max(1.0, radius)))


def grey(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The image without colour. Draws nothing from the generator."""
    return image.convert("L").convert("RGB")


def colour(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The image with brightness, contrast and saturation each changed by a factor of 1.15-1.7, up or down."""
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        factor = rng.uniform(1.15, 1.7)
        image = enhance(image).enhance(float(factor if rng.random() < 0.5 else 1 / factor))
    return image


def noise(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The image plus Gaussian noise of standard deviation 8-30, out of 255, on each channel."""
    pixels_HWC = np.asarray(image, dtype=np.float32)
    noisy_HWC = pixels_HWC + rng.normal(0, rng.uniform(8, 30), pixels_HWC.shape)
    return Image.fromarray(noisy_HWC.round().clip(0, 255).astype(np.uint8))


# Same pixels, another frame.


def crop(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A part of the image that holds 30-80 % of its area, to within the rounding to whole pixels."""
    area_frac = rng.uniform(0.3, 0.8)
    # Between area_frac and 1, both sides fit into the image.
    width_frac = min(1.0, max(area_frac, math.sqrt(area_frac) * math.exp(rng.uniform(-0.25, 0.25))))
    width = _scaled(image.width, width_frac)
    height = _scaled(image.height, area_frac / width_frac)
    left = int(rng.integers(0, image.width - width + 1))
    top = int(rng.integers(0, image.height - height + 1))
    return image.crop((left, top, left + width, top + height))


def aspect(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The image with one side made 1.2-1.6 times as long."""
    factor = rng.uniform(1.2, 1.6)
    width, height = image.size
    stretched = (_scaled(width, factor), height) if rng.random() < 0.5 else (width, _scaled(height, factor))
    return image.resize(stretched, Resampling.BICUBIC)


def resize(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The image at 25-60 % of its width and height."""
    scale = rng.uniform(0.25, 0.6)
    return image.resize((_scaled(image.width, scale), _scaled(image.height, scale)), Resampling.LANCZOS)


def mirror(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The image with left and right exchanged. Draws nothing from the generator."""
    return image.transpose(Transpose.FLIP_LEFT_RIGHT)


def rotate_right(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The image turned by 90, 180 or 270 degrees, without loss."""
    turns = (Transpose.ROTATE_90, Transpose.ROTATE_180, Transpose.ROTATE_270)
    return image.transpose(turns[rng.integers(len(turns))])


def rotate_small(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The image turned by 5-25 degrees either way; the frame grows to hold it, the corners are one colour."""
    angle = rng.uniform(5, 25) * (1 if rng.random() < 0.5 else -1)
    return image.rotate(angle, Resampling.BICUBIC, expand=True, fillcolor=_random_colour(rng))


# Something added.


def caption(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The whole image with a bar of text above or below it, 12-25 % of its height."""
    bar_height = _scaled(image.height, rng.uniform(0.12, 0.25))
    paper, ink = (WHITE, BLACK) if rng.random() < 0.5 else (BLACK, WHITE)
    above = rng.random() < 0.5
    framed = Image.new("RGB", (image.width, image.height + bar_height), paper)
    framed.paste(image, (0, bar_height if above else 0))
    bar_top = 0 if above else image.height
    _draw_text(framed, (0, bar_top, image.width, bar_top + bar_height), ink, rng)
    return framed


def overlay(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The image with one to three opaque stickers on it (faces, stars, labels), each up to 40 % of a side."""
    covered = image.copy()
    stickers = (_draw_face, _draw_star, _draw_label)
    for _ in range(rng.integers(1, 4)):
        size = _scaled(min(image.size), rng.uniform(0.2, 0.4))
        left = int(rng.integers(0, image.width - size + 1))
        top = int(rng.integers(0, image.height - size + 1))
        stickers[rng.integers(len(stickers))](covered, (left, top, left + size, top + size), rng)
    return covered


def paste(image: Image.Image, rng: np.random.Generator, *, background: Image.Image | None = None) -> Image.Image:
    """The background with the image on it, at 40-70 % of the largest scale that fits.

    background: RGB, of the size of the result. None: a gradient of two colours, as large as the image.
    """
    canvas = _gradient(image.size, rng) if background is None else background.copy()
    scale = min(canvas.width / image.width, canvas.height / image.height) * rng.uniform(0.4, 0.7)
    small = image.resize((_scaled(image.width, scale), _scaled(image.height, scale)), Resampling.LANCZOS)
    left = int(rng.integers(0, canvas.width - small.width + 1))
    top = int(rng.integers(0, canvas.height - small.height + 1))
    canvas.paste(small, (left, top))
    return canvas


def screenshot(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The whole image as an app shows it: margins of 2-8 % at the sides, bars of 8-18 % above and below."""
    margin = _scaled(image.width, rng.uniform(0.02, 0.08))
    top_bar, bottom_bar = (_scaled(image.height, frac) for frac in rng.uniform(0.08, 0.18, size=2))
    paper, ink = (WHITE, BLACK) if rng.random() < 0.5 else ((24, 24, 28), WHITE)
    screen = Image.new("RGB", (image.width + 2 * margin, top_bar + image.height + bottom_bar), paper)
    screen.paste(image, (margin, top_bar))
    _draw_text(screen, (margin, 0, margin + image.width // 2, top_bar), ink, rng)
    draw = ImageDraw.Draw(screen)
    icon = bottom_bar / 2
    for column in range(1, 5):  # a row of buttons
        x, y = screen.width * column / 5, top_bar + image.height + bottom_bar / 2
        draw.ellipse((x - icon / 2, y - icon / 2, x + icon / 2, y + icon / 2), fill=ink)
    return screen


EDITS: dict[str, Edit] = {
    "reencode": reencode,
    "blur": blur,
    "grey": grey,
    "colour": colour,
    "noise": noise,
    "crop": crop,
    "aspect": aspect,
    "caption": caption,
    "overlay": overlay,
    "paste": paste,
    "rotate_small": rotate_small,
    "rotate_right": rotate_right,
    "mirror": mirror,
    "resize": resize,
    "screenshot": screenshot,
}

Box = tuple[int, int, int, int]  # left, top, right, bottom; right and bottom excluded


def _scaled(length: int, factor: float) -> int:
    return max(1, round(length * factor))


def _random_colour(rng: np.random.Generator) -> Colour:
    red, green, blue = rng.integers(0, 256, size=3)
    return int(red), int(green), int(blue)


def _gradient(size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    width, height = size
    first_C, last_C = np.array(_random_colour(rng)), np.array(_random_colour(rng))
    share_HW1 = np.broadcast_to(np.linspace(0, 1, height)[:, None, None], (height, width, 1))
    if rng.random() < 0.5:
        share_HW1 = np.broadcast_to(np.linspace(0, 1, width)[None, :, None], (height, width, 1))
    return Image.fromarray((first_C + share_HW1 * (last_C - first_C)).round().astype(np.uint8))


def _draw_text(image: Image.Image, box: Box, ink: Colour, rng: np.random.Generator) -> None:
    """Write as many random words as fit into one line of the box, and one in any case."""
    left, top, right, bottom = box
    font = ImageFont.load_default(size=max(4.0, (bottom - top) * 0.6))
    text = str(rng.choice(_WORDS))
    while font.getlength(longer := f"{text} {rng.choice(_WORDS)}") < 0.9 * (right - left):
        text = longer
    ImageDraw.Draw(image).text(((left + right) / 2, (top + bottom) / 2), text, fill=ink, font=font, anchor="mm")


def _draw_face(image: Image.Image, box: Box, rng: np.random.Generator) -> None:
    left, top, right, bottom = box
    size = right - left
    draw = ImageDraw.Draw(image)
    draw.ellipse((left, top, right - 1, bottom - 1), fill=_STICKER_COLOURS[0])
    for x_frac in (0.33, 0.67):
        x, y, radius = left + x_frac * size, top + 0.38 * size, 0.07 * size
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=BLACK)
    mouth = (left + 0.25 * size, top + 0.35 * size, left + 0.75 * size, top + 0.8 * size)
    draw.arc(mouth, 20, 160, fill=BLACK, width=_scaled(size, 0.06))


def _draw_star(image: Image.Image, box: Box, rng: np.random.Generator) -> None:
    left, top, right, bottom = box
    x, y, radius = (left + right) / 2, (top + bottom) / 2, (right - left) / 2
    corners = [
        (x + reach * math.sin(angle), y - reach * math.cos(angle))
        for angle, reach in ((math.pi * i / 5, radius if i % 2 == 0 else 0.45 * radius) for i in range(10))
    ]
    ImageDraw.Draw(image).polygon(corners, fill=_STICKER_COLOURS[rng.integers(len(_STICKER_COLOURS))])


def _draw_label(image: Image.Image, box: Box, rng: np.random.Generator) -> None:
    left, top, right, bottom = box
    middle, half_height = (top + bottom) // 2, max(1, (bottom - top) // 4)
    label: Box = (left, middle - half_height, right, middle + half_height)
    fill = _STICKER_COLOURS[rng.integers(len(_STICKER_COLOURS))]
    ImageDraw.Draw(image).rounded_rectangle(label, radius=half_height / 2, fill=fill)
    _draw_text(image, label, BLACK, rng)
