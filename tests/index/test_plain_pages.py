from __future__ import annotations

import io
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from skimage import data

from dino_index.edits import apply_edits
from dino_index.images import load_image
from dino_index.plain_pages import COMPARED_SIDE, SAME_PAGE, SHORT_SIDE, pages_agree, plain_kind

WORDS = "the of and to in was for it with as his on be at by had not are but from or have an they which one".split()
PHOTOGRAPHS = (
    "astronaut", "brick", "camera", "cat", "cell", "coffee", "coins", "colorwheel", "grass", "gravel",
    "hubble_deep_field", "immunohistochemistry", "moon", "retina", "rocket",
)  # fmt: skip


@cache
def page(seed: int, *, ink: str = "black", paper: str = "white") -> Image.Image:
    """A printed page; the words differ from seed to seed, the layout does not."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (700, 900), paper)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=20)
    for top in range(70, 820, 27):
        line = ""
        while font.getlength(line) < 540:
            line += f"{rng.choice(WORDS)} "
        draw.text((70, top), line, fill=ink, font=font)
    return image


def at(image: Image.Image, short_side: int) -> NDArray[np.uint8]:
    return load_image(image, max_short_side=short_side).pixels_HWC


def shown(image: Image.Image) -> str | None:
    return plain_kind(at(image, SHORT_SIDE))


def agree(first: Image.Image, second: Image.Image) -> float:
    return pages_agree(at(first, COMPARED_SIDE), at(second, COMPARED_SIDE))


def from_skimage(name: str) -> Image.Image:
    pixels: Any = getattr(data, name)()
    return Image.fromarray(pixels).convert("RGB")


def gradient(values_HW: NDArray[np.floating]) -> Image.Image:
    return Image.fromarray((255 * values_HW).astype(np.uint8)).convert("RGB")


X_HW, Y_HW = np.meshgrid(np.linspace(0, 1, 400), np.linspace(0, 1, 300))


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photographs_are_not_plain(name: str) -> None:
    assert shown(from_skimage(name)) is None


@pytest.mark.parametrize("name", ["page", "text"])
def test_scanned_text_is_text(name: str) -> None:
    assert shown(from_skimage(name)) == "text"


@pytest.mark.parametrize(("ink", "paper"), [("black", "white"), ("white", "black"), ("#333", "#f4ecd8")])
def test_printed_text_is_text(ink: str, paper: str) -> None:
    assert shown(page(0, ink=ink, paper=paper)) == "text"


@pytest.mark.parametrize("kind", ["reencode", "resize", "grey", "noise", "crop", "aspect"])
def test_edited_text_is_text(kind: str) -> None:
    assert shown(apply_edits(page(1), [kind], np.random.default_rng(0))) == "text"


@pytest.mark.parametrize(
    "image",
    [
        Image.new("RGB", (400, 300), "white"),
        Image.new("RGB", (400, 300)),
        Image.new("RGB", (1, 1), "red"),
        Image.new("RGB", (500, 2), "blue"),
        gradient(X_HW),
        gradient(X_HW * Y_HW),
        gradient(np.exp(-((X_HW - 0.5) ** 2) - (Y_HW - 0.5) ** 2)),
    ],
)
def test_uniform_pictures_and_gradients_are_blank(image: Image.Image) -> None:
    assert shown(image) == "blank"


@pytest.mark.parametrize("kind", ["reencode", "colour", "blur"])
def test_edited_blank_pages_are_blank(kind: str) -> None:
    assert shown(apply_edits(Image.new("RGB", (400, 300), "#d0c8b0"), [kind], np.random.default_rng(0))) == "blank"


def test_a_page_with_nothing_but_its_number_is_blank() -> None:
    image = Image.new("RGB", (700, 900), "white")
    ImageDraw.Draw(image).text((350, 870), "12", fill="black", font=ImageFont.load_default(size=20))
    assert shown(image) == "blank"


def test_a_small_thing_on_white_is_not_blank() -> None:
    image = Image.new("RGB", (800, 800), "white")
    image.paste(from_skimage("coffee").resize((160, 120)), (300, 340))
    assert shown(image) is None


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 700), (23, 23), (24, 24)])
def test_noise_of_any_size_gives_an_answer(size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    assert plain_kind(noise) in (None, "blank")
    assert -1 <= pages_agree(noise, noise) <= 1


@pytest.mark.parametrize("kind", ["reencode", "resize", "grey", "colour", "noise", "aspect"])
def test_copies_of_one_page_agree(kind: str) -> None:
    assert agree(apply_edits(page(2), [kind], np.random.default_rng(1)), page(2)) > 0.9


def test_a_page_agrees_with_itself_whatever_it_says() -> None:
    for image in (page(3), from_skimage("page"), from_skimage("text")):
        assert agree(image, image) == pytest.approx(1, abs=1e-4)


def test_other_words_in_one_layout_do_not_agree() -> None:
    assert max(agree(page(4), page(seed)) for seed in range(5, 11)) < SAME_PAGE / 2


def test_a_page_that_lies_a_little_aside_agrees() -> None:
    moved = Image.new("RGB", page(5).size, "white")
    moved.paste(page(5), (6, -8))
    assert agree(moved, page(5)) > SAME_PAGE


def test_blank_pages_have_nothing_that_agrees() -> None:
    blank = Image.new("RGB", (600, 800), "white")
    buffer = io.BytesIO()
    blank.save(buffer, "JPEG", quality=30)
    assert agree(blank, blank) == 0
    assert pages_agree(load_image(buffer.getvalue()).pixels_HWC, at(blank, 512)) == 0
    assert agree(blank, page(6)) == 0
