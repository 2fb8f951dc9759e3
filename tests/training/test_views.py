"""Views against Pillow and torchvision, on pictures whose pixels say where they come from.

Shapes: B pictures, S side of a view, H x W a picture, C = 3 colours.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF  # type: ignore[import-untyped]
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop

from bad_files import picture
from dino_index.edits import EDITS
from dino_training.recipe import Recipe
from dino_training.views import ViewsOfImage, cut_views, normalise, recolour, squash

Pixels = NDArray[np.uint8]
Box = tuple[float, float, float, float]

# Columns of a view's colours, and what leaves the colours alone.
COLUMNS = ("brightness", "contrast", "saturation", "hue", "grey", "sigma", "solarise")
UNCHANGED = (1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0)
GREY, SIGMA, SOLARISE = 4, 5, 6
# One step of 8-bit pixels is .0039.
HALF_A_STEP = 0.5 / 255 + 1e-4


def recipe(**changed: Any) -> Recipe:
    """Views without any change of colour, flips or edits, as values of 0..1."""
    plain: dict[str, Any] = {
        "global_size": 24, "local_size": 12, "num_local_views": 3, "flip_prob": 0.0, "jitter_prob": 0.0,
        "grey_prob": 0.0, "blur_prob": (0.0, 0.0, 0.0), "solarise_prob": (0.0, 0.0, 0.0),
        "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0),
    }  # fmt: skip
    return Recipe(**plain | changed)


def pixels(width: int = 96, height: int = 64, *, seed: int = 0) -> Pixels:
    return np.asarray(picture(width, height, seed=seed))


def places(width: int = 250, height: int = 180) -> Pixels:
    """Red is the column, green the row."""
    columns_HW, rows_HW = np.meshgrid(np.arange(width), np.arange(height))
    return np.stack([columns_HW, rows_HW, np.zeros_like(rows_HW)], axis=-1).astype(np.uint8)


def cut(
    wanted: Recipe, image: Pixels | None = None, *, seed: int = 0, background: Pixels | None = None
) -> ViewsOfImage:
    return cut_views(pixels() if image is None else image, wanted, np.random.default_rng(seed), background)


def recoloured(squares_BSSC: Pixels, wanted: Recipe | None = None, **columns: float) -> Tensor:
    """Pictures after one change of colours, given by the name of its column."""
    colour_P = dict(zip(COLUMNS, UNCHANGED, strict=True)) | columns
    colour_BP = torch.tensor([list(colour_P.values())] * len(squares_BSSC))
    return recolour(torch.from_numpy(squares_BSSC), colour_BP, wanted or recipe())


def squares(num: int = 3, size: int = 40) -> Pixels:
    return np.stack([pixels(size, size, seed=seed) for seed in range(num)])


def as_floats(squares_BSSC: Pixels) -> Tensor:
    return torch.from_numpy(squares_BSSC).permute(0, 3, 1, 2).float() / 255


@pytest.fixture
def boxes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, int], Box]]:
    """Size of the source and the box of each part that is cut out, in order."""
    recorded: list[tuple[tuple[int, int], Box]] = []
    resize = Image.Image.resize

    def recording(
        self: Image.Image, size: Any, resample: Any = None, box: Any = None, reducing_gap: Any = None
    ) -> Image.Image:
        if box is not None:
            assert resample == Image.Resampling.BICUBIC
            recorded.append((self.size, box))
        return resize(self, size, resample, box, reducing_gap)

    monkeypatch.setattr(Image.Image, "resize", recording)
    return recorded


# --- what is cut out


@pytest.mark.parametrize(
    ("changed", "sizes"),
    [
        ({}, [24, 24, 12, 12, 12]),
        ({"multi_crop": False}, [24, 24]),
        ({"num_local_views": 0}, [24, 24]),
        ({"num_global_views": 1, "num_local_views": 1}, [24, 12]),
        ({"num_global_views": 3, "global_size": 16, "local_size": 32}, [16, 16, 16, 32, 32, 32]),
    ],
)
def test_there_are_as_many_views_of_each_size_as_the_recipe_says(changed: dict[str, Any], sizes: list[int]) -> None:
    views = cut(recipe(**changed))
    assert [square.shape for square in views.squares] == [(size, size, 3) for size in sizes]
    assert all(square.dtype == np.uint8 for square in views.squares)
    assert views.colour_VP.shape == (len(sizes), 7)
    assert recipe(**changed).view_sizes == tuple(sizes)


@pytest.mark.parametrize("size", [(250, 180), (96, 64), (40, 40)])
def test_parts_have_the_area_and_the_aspect_ratio_of_the_recipe(
    size: tuple[int, int], boxes: list[tuple[tuple[int, int], Box]]
) -> None:
    wanted = recipe(num_local_views=40, global_scale=(0.5, 0.9), local_scale=(0.1, 0.3), aspect_ratio=(0.8, 1.25))
    for seed in range(5):
        cut(wanted, pixels(*size), seed=seed)
    assert len(boxes) == 5 * 42
    for number, (source, (left, top, right, bottom)) in enumerate(boxes):
        assert source == size
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]
        width, height = right - left, bottom - top
        lowest, highest = (0.5, 0.9) if number % 42 < 2 else (0.1, 0.3)
        # Sides are rounded to whole pixels.
        area = size[0] * size[1]
        assert (width + 0.5) * (height + 0.5) >= lowest * area
        assert (width - 0.5) * (height - 0.5) <= highest * area
        assert (width + 0.5) / (height - 0.5) >= 0.8
        assert (width - 0.5) / (height + 0.5) <= 1.25


def test_parts_are_distributed_as_torchvision_draws_them(boxes: list[tuple[tuple[int, int], Box]]) -> None:
    scale, ratio = (0.2, 0.8), (0.5, 2.0)
    wanted = recipe(num_local_views=1500, local_scale=scale, aspect_ratio=ratio, local_size=8, global_size=8)
    cut(wanted, pixels(120, 90))
    drawn = torch.zeros(1, 90, 120)
    theirs_N4 = np.array([RandomResizedCrop.get_params(drawn, scale, ratio) for _ in range(1500)])
    ours_N4 = np.array([(box[1], box[0], box[3] - box[1], box[2] - box[0]) for _, box in boxes[2:]])

    def described(found_N4: NDArray[np.float64]) -> NDArray[np.float64]:
        top, left, height, width = found_N4.T
        with np.errstate(invalid="ignore"):
            figures = [width * height / 120 / 90, np.log(width / height), left / (120 - width), top / (90 - height)]
        return np.array([np.nanquantile(figure, np.linspace(0.1, 0.9, 9)) for figure in figures])

    assert np.abs(described(ours_N4) - described(theirs_N4)).max() < 0.07


@pytest.mark.parametrize(
    ("size", "expected"), [((300, 20), (27, 20)), ((20, 300), (20, 27)), ((1, 9), (1, 1)), ((1, 1), (1, 1))]
)
def test_a_long_image_gives_its_middle_at_the_nearest_aspect_ratio(
    size: tuple[int, int], expected: tuple[int, int], boxes: list[tuple[tuple[int, int], Box]]
) -> None:
    cut(recipe(global_scale=(0.9, 1.0), num_local_views=0), pixels(*size))
    for _, (left, top, right, bottom) in boxes:
        assert [right - left, bottom - top] == list(expected)
        assert abs(left + right - size[0]) <= 1
        assert abs(top + bottom - size[1]) <= 1


def test_pixels_come_from_the_part_that_was_chosen(boxes: list[tuple[tuple[int, int], Box]]) -> None:
    views = cut(recipe(num_local_views=6, local_scale=(0.1, 0.4)), places())
    for square, (_, (left, top, right, bottom)) in zip(views.squares, boxes, strict=True):
        size = len(square)
        centres_S = (np.arange(size) + 0.5) / size
        inner = slice(3, -3)  # at its border a part is not interpolated with what lies beyond
        np.testing.assert_allclose(
            square[size // 2, inner, 0], (left + centres_S * (right - left) - 0.5)[inner], atol=0.75
        )
        np.testing.assert_allclose(
            square[inner, size // 2, 1], (top + centres_S * (bottom - top) - 0.5)[inner], atol=0.75
        )


def test_a_part_is_resized_as_torchvision_resizes_it(boxes: list[tuple[tuple[int, int], Box]]) -> None:
    image = pixels()
    views = cut(recipe(), image)
    for square, (_, box) in zip(views.squares, list(boxes), strict=True):
        left, top, right, bottom = (int(edge) for edge in box)
        expected = TF.resized_crop(
            Image.fromarray(image),
            top,
            left,
            bottom - top,
            right - left,
            list(square.shape[:2]),
            InterpolationMode.BICUBIC,
        )
        # torchvision cuts first and interpolates then; a box also sees the pixels around it.
        difference = np.abs(square.astype(int) - np.asarray(expected).astype(int))
        assert difference[2:-2, 2:-2].max() <= 2
        assert difference.mean() < 2


@pytest.mark.parametrize("num_global", [1, 2, 3])
def test_local_views_of_global_views_show_nothing_from_outside_them(num_global: int) -> None:
    changed: dict[str, Any] = {
        "num_global_views": num_global, "num_local_views": 6, "global_scale": (0.1, 0.2), "local_scale": (0.3, 0.9),
        "global_size": 64, "local_size": 16, "flip_prob": 0.5,
    }  # fmt: skip
    outside = 0
    for seed in range(8):
        squares_V = cut(recipe(local_source="global", **changed), places(), seed=seed).squares
        for number, local in enumerate(squares_V[num_global:]):
            assert is_inside(local, squares_V[(num_global + number) % num_global])
        squares_V = cut(recipe(local_source="image", **changed), places(), seed=seed).squares
        outside += sum(not is_inside(local, squares_V[0]) for local in squares_V[num_global:])
    assert outside > 24


def is_inside(local: Pixels, view: Pixels) -> bool:
    """Whether all columns and rows that one view shows are shown by the other, too."""
    lowest, highest = view.astype(int).min(axis=(0, 1)) - 1, view.astype(int).max(axis=(0, 1)) + 1
    return bool((lowest <= local.min(axis=(0, 1))).all() and (local.max(axis=(0, 1)) <= highest).all())


def test_local_views_of_an_edited_global_view_still_show_the_image() -> None:
    changed: dict[str, Any] = {"local_source": "global", "edits": {"paste": 1.0}, "num_local_views": 2}
    red = np.zeros((50, 50, 3), np.uint8)
    red[..., 0] = 255
    plain = cut(recipe(local_source="global", num_local_views=2), places())
    edited = cut(recipe(**changed), places(), background=red)
    # One paste alone covers each view with the background: local views are not pasted twice.
    for square, source in zip(edited.squares, plain.squares, strict=True):
        share = (square[..., 0] == 255).mean()
        assert 0.4 < share < 0.9
        assert not (source[..., 0] == 255).any()


# --- flips and edits


def test_flips_mirror_left_and_right_and_nothing_else() -> None:
    plain, flipped = (cut(recipe(flip_prob=prob)) for prob in (0.0, 1.0))
    for one, other in zip(plain.squares, flipped.squares, strict=True):
        np.testing.assert_array_equal(other, one[:, ::-1])
    assert np.array_equal(plain.colour_VP, flipped.colour_VP)
    halves = [cut(recipe(flip_prob=0.5, num_local_views=100), seed=seed).squares for seed in range(4)]
    never = [cut(recipe(flip_prob=0.0, num_local_views=100), seed=seed).squares for seed in range(4)]
    same = [
        np.array_equal(*pair) for one, other in zip(halves, never, strict=True) for pair in zip(one, other, strict=True)
    ]
    assert 0.4 < np.mean(same) < 0.6


@pytest.mark.parametrize("size", [8, 17, 40])
@pytest.mark.parametrize("kind", sorted(EDITS))
def test_every_edit_runs_at_every_size_and_keeps_it(kind: str, size: int) -> None:
    for background in (None, pixels(30, 50, seed=9)):
        for seed in range(3):
            wanted = recipe(edits={kind: 1.0}, global_size=size, local_size=8, num_local_views=1)
            views = cut(wanted, seed=seed, background=background)
            assert [square.shape for square in views.squares] == [(side, side, 3) for side in (size, size, 8)]
            assert all(square.dtype == np.uint8 for square in views.squares)


@pytest.mark.parametrize("kind", sorted(EDITS))
def test_edits_change_views_as_often_as_the_recipe_says(kind: str) -> None:
    def num_changed(probability: float) -> int:
        wanted = recipe(edits={kind: probability}, num_local_views=38)
        # The first view is cut and edited before chance has gone another way.
        plain = [cut(recipe(num_local_views=38), seed=seed) for seed in range(4)]
        edited = [cut(wanted, seed=seed) for seed in range(4)]
        pairs = [
            pair
            for one, other in zip(plain, edited, strict=True)
            for pair in zip(one.squares, other.squares, strict=True)
        ]
        return sum(not np.array_equal(*pair) for pair in pairs)

    assert num_changed(0.0) == 0
    assert num_changed(1.0) == 160
    assert 30 < num_changed(0.3) < 66


def test_several_edits_come_together_in_any_order() -> None:
    wanted = recipe(edits={"mirror": 1.0, "grey": 1.0})
    plain = cut(recipe())
    for one, other in zip(plain.squares, cut(wanted).squares, strict=True):
        grey = np.asarray(Image.fromarray(one[:, ::-1]).convert("L"))
        np.testing.assert_array_equal(other, np.repeat(grey[..., None], 3, axis=2))
    # Noise has colours unless grey came after it.
    both = recipe(edits={"noise": 1.0, "grey": 1.0}, num_local_views=48)
    is_grey = [(square == square[..., :1]).all() for seed in range(4) for square in cut(both, seed=seed).squares]
    assert 0.4 < np.mean(is_grey) < 0.6


def test_paste_puts_the_view_on_the_background() -> None:
    image, background = np.zeros((60, 80, 3), np.uint8), np.zeros((40, 30, 3), np.uint8)
    image[..., 0] = background[..., 2] = 255
    for square in cut(recipe(edits={"paste": 1.0}), image, background=background).squares:
        is_image, is_background = square[..., 0] > 200, square[..., 2] > 200
        assert 0.15 < is_image.mean() < 0.51
        assert is_background.mean() == pytest.approx(1 - is_image.mean(), abs=0.15)
    for square in cut(recipe(edits={"paste": 1.0}), image).squares:
        assert not (square[..., 2] == 255).all(axis=(0, 1)).any()


def test_the_image_and_the_background_stay_as_they_are() -> None:
    image, background = pixels(), pixels(seed=2)
    image.flags.writeable = background.flags.writeable = False
    cut(recipe(edits=dict.fromkeys(EDITS, 0.5), flip_prob=0.5), image, background=background)
    assert np.array_equal(image, pixels())


# --- what is drawn for the colours


def drawn(num_seeds: int = 4, **changed: Any) -> NDArray[np.float32]:
    """Colours of many images, G + L views each: shape images x views x columns."""
    wanted = recipe(num_local_views=2, global_size=8, local_size=8, **changed)
    return np.stack([cut(wanted, pixels(8, 8), seed=seed).colour_VP for seed in range(num_seeds)])


def test_nothing_is_drawn_at_probability_zero() -> None:
    assert (drawn() == np.array(UNCHANGED, np.float32)).all()


def test_jitter_is_drawn_within_its_strengths() -> None:
    colours = drawn(300, jitter_prob=1.0, jitter=(0.4, 0.3, 1.5, 0.1)).reshape(-1, 7)
    for column, lowest, highest in ((0, 0.6, 1.4), (1, 0.7, 1.3), (2, 0.0, 2.5), (3, -0.1, 0.1)):
        values = colours[:, column]
        assert lowest <= values.min() < values.max() <= highest + 1e-6
        assert values.mean() == pytest.approx((lowest + highest) / 2, abs=0.05 * (highest - lowest))
        assert values.std() == pytest.approx((highest - lowest) / math.sqrt(12), rel=0.1)
    assert abs(np.corrcoef(colours[:, :4].T) - np.eye(4)).max() < 0.15
    assert (colours[:, GREY:] == 0).all()


def test_jitter_comes_as_often_as_the_recipe_says_all_of_it_at_once() -> None:
    colours = drawn(300, jitter_prob=0.8).reshape(-1, 7)
    changed = colours[:, :4] != np.array(UNCHANGED[:4], np.float32)
    assert (changed.all(axis=1) | ~changed.any(axis=1)).all()
    assert changed[:, 0].mean() == pytest.approx(0.8, abs=0.04)


def test_grey_comes_as_often_as_the_recipe_says() -> None:
    assert (drawn(grey_prob=1.0)[..., GREY] == 1).all()
    assert drawn(300, grey_prob=0.2)[..., GREY].mean() == pytest.approx(0.2, abs=0.04)


def test_blur_and_solarisation_have_a_probability_for_each_kind_of_view() -> None:
    colours = drawn(
        300, num_global_views=3, blur_prob=(1.0, 0.1, 0.5), solarise_prob=(0.0, 0.2, 0.7), blur_sigma=(0.5, 1.5)
    )
    blurred, solarised = colours[..., SIGMA] > 0, colours[..., SOLARISE] == 1
    expected_blur, expected_solarise = [1.0, 0.1, 0.1, 0.5, 0.5], [0.0, 0.2, 0.2, 0.7, 0.7]
    np.testing.assert_allclose(blurred.mean(axis=0), expected_blur, atol=0.08)
    np.testing.assert_allclose(solarised.mean(axis=0), expected_solarise, atol=0.08)
    assert blurred[:, 0].all()
    assert not solarised[:, 0].any()
    sigmas = colours[..., SIGMA][blurred]
    assert 0.5 <= sigmas.min() < sigmas.max() <= 1.5
    assert sigmas.mean() == pytest.approx(1.0, abs=0.05)


# --- what the colours do


def test_unchanged_colours_are_the_pixels_themselves() -> None:
    torch.testing.assert_close(recoloured(squares()), as_floats(squares()), atol=1e-5, rtol=0)


def test_grey_is_pillows_grey() -> None:
    found = recoloured(squares(), grey=1.0)
    for picture_CSS, square in zip(found, squares(), strict=True):
        grey = torch.from_numpy(np.array(Image.fromarray(square).convert("L"))).float() / 255
        for channel_SS in picture_CSS:
            torch.testing.assert_close(channel_SS, grey, atol=HALF_A_STEP, rtol=0)


@pytest.mark.parametrize("factor", [0.0, 0.3, 0.8, 1.0, 1.4, 2.5])
@pytest.mark.parametrize("kind", ["brightness", "contrast", "saturation"])
def test_each_kind_of_jitter_alone_is_torchvisions(kind: str, factor: float) -> None:
    adjust = getattr(TF, f"adjust_{kind}")
    expected = torch.stack([adjust(picture, factor) for picture in as_floats(squares())])
    torch.testing.assert_close(recoloured(squares(), recipe(), **{kind: factor}), expected, atol=5e-4, rtol=0)


def test_jitter_together_is_one_kind_after_the_other_with_one_clipping() -> None:
    dim = (squares().astype(int) // 4 + 90).astype(np.uint8)  # so that nothing is clipped on the way
    expected = as_floats(dim)
    for adjust, factor in ((TF.adjust_brightness, 0.9), (TF.adjust_contrast, 0.8), (TF.adjust_saturation, 0.7)):
        expected = torch.stack([adjust(picture, factor) for picture in expected])
    found = recoloured(dim, brightness=0.9, contrast=0.8, saturation=0.7)
    torch.testing.assert_close(found, expected, atol=5e-4, rtol=0)
    grey = recoloured(dim, brightness=0.9, contrast=0.8, saturation=0.7, hue=0.1, grey=1.0)
    torch.testing.assert_close(grey[:, :1], TF.rgb_to_grayscale(expected), atol=5e-4, rtol=0)


@pytest.mark.parametrize("turns", [-0.5, -0.1, 0.05, 0.3])
def test_a_turn_of_the_hue_leaves_greys_and_brightness_alone(turns: float) -> None:
    greys = np.repeat(squares()[..., :1], 3, axis=-1)
    torch.testing.assert_close(recoloured(greys, hue=turns), as_floats(greys), atol=1e-5, rtol=0)
    dull = (squares().astype(int) // 4 + 90).astype(np.uint8)
    turned = recoloured(dull, hue=turns)
    before, after = (
        torch.tensor([0.299, 0.587, 0.114]) @ pictures.flatten(2) for pictures in (as_floats(dull), turned)
    )
    torch.testing.assert_close(after, before, atol=1e-4, rtol=0)
    assert (turned - as_floats(dull)).abs().max() > 0.02


def test_the_hue_turns_like_an_angle() -> None:
    dull = (squares().astype(int) // 4 + 90).astype(np.uint8)

    def chroma(pictures: Tensor) -> Tensor:
        """I and Q of the NTSC's colours: saturation is their length, hue their angle."""
        to_iq = torch.tensor([[0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
        return to_iq @ pictures.flatten(2)

    before = chroma(as_floats(dull))
    for turns in (0.1, 0.25, 0.5, -0.3):
        after = chroma(recoloured(dull, hue=turns))
        angle = torch.tensor(2 * math.pi * turns)
        rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
        torch.testing.assert_close(after, rotation @ before, atol=1e-4, rtol=0)
    torch.testing.assert_close(recoloured(dull, hue=1.0), as_floats(dull), atol=1e-4, rtol=0)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_is_a_gaussian_away_from_the_border(sigma: float) -> None:
    expected = TF.gaussian_blur(as_floats(squares()), [21, 21], [sigma, sigma])
    inner = (..., slice(11, -11), slice(11, -11))
    found = recoloured(squares(), sigma=sigma)
    torch.testing.assert_close(found[inner], expected[inner], atol=1e-4, rtol=0)
    flat = np.full((1, 16, 16, 3), 77, np.uint8)
    torch.testing.assert_close(recoloured(flat, sigma=sigma), as_floats(flat), atol=1e-5, rtol=0)


def test_blur_near_the_border_averages_what_there_is() -> None:
    size, sigma = 12, 1.7
    square = squares(1, size)
    found = recoloured(square, sigma=sigma)[0].double().numpy()
    weights = np.array([[math.exp(-((a - b) ** 2) / (2 * sigma**2)) for b in range(size)] for a in range(size)])
    weights /= weights.sum(axis=1, keepdims=True)
    for channel in range(3):
        expected = weights @ (square[0, ..., channel] / 255) @ weights.T
        np.testing.assert_allclose(found[channel], expected, atol=1e-4)


def test_solarisation_inverts_from_128_on() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    expected = np.asarray(ImageOps.solarize(Image.fromarray(ramp[0]), 128))
    found = (recoloured(ramp, solarise=1.0)[0] * 255).round().byte().permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(found, expected)


def test_solarisation_comes_after_jitter_grey_and_blur() -> None:
    both = recoloured(squares(), brightness=1.3, grey=1.0, sigma=1.0, solarise=1.0)
    before = recoloured(squares(), brightness=1.3, grey=1.0, sigma=1.0)
    torch.testing.assert_close(both, torch.where(before >= 127.5 / 255, 1 - before, before))


def test_colours_stay_within_range() -> None:
    extremes = recoloured(squares(), brightness=1.4, contrast=1.4, saturation=1.4, hue=0.1)
    assert extremes.min() >= 0
    assert extremes.max() <= 1
    assert extremes.max() == 1


def test_a_grey_backbone_gets_one_normalised_channel() -> None:
    wanted = recipe(in_chans=1, mean=(0.3,), std=(0.2,))
    found = recoloured(squares(), wanted, brightness=1.1)
    assert found.shape == (3, 1, 40, 40)
    in_colour = recoloured(squares(), brightness=1.1)
    expected = (0.299 * in_colour[:, 0] + 0.587 * in_colour[:, 1] + 0.114 * in_colour[:, 2] - 0.3) / 0.2
    torch.testing.assert_close(found[:, 0], expected)


def test_channels_are_normalised_each_by_its_own_mean_and_deviation() -> None:
    wanted = recipe(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.2))
    found, plain = normalise(as_floats(squares()), wanted), as_floats(squares())
    for channel, (mean, std) in enumerate(zip((0.1, 0.2, 0.3), (0.5, 0.25, 0.2), strict=True)):
        torch.testing.assert_close(found[:, channel], (plain[:, channel] - mean) / std)


def test_a_batch_gets_the_colours_that_each_picture_would_get_alone() -> None:
    wanted = recipe(
        jitter_prob=0.8, grey_prob=0.3, blur_prob=(0.5,) * 3, solarise_prob=(0.5,) * 3, num_local_views=0,
        num_global_views=12, global_size=16,
    )  # fmt: skip
    views = cut(wanted)
    squares_BSSC, colour_BP = torch.from_numpy(np.stack(views.squares)), torch.from_numpy(views.colour_VP)
    together = recolour(squares_BSSC, colour_BP, wanted)
    alone = [recolour(squares_BSSC[b : b + 1], colour_BP[b : b + 1], wanted) for b in range(12)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)
    assert torch.equal(squares_BSSC, torch.from_numpy(np.stack(views.squares)))
    assert together.is_contiguous()


# --- the rest


def test_views_depend_on_the_generator_alone() -> None:
    wanted = recipe(edits=dict.fromkeys(EDITS, 0.3), jitter_prob=0.8, flip_prob=0.5)
    one, same, other = (cut(wanted, seed=seed) for seed in (1, 1, 2))
    assert all(np.array_equal(*pair) for pair in zip(one.squares, same.squares, strict=True))
    assert np.array_equal(one.colour_VP, same.colour_VP)
    assert not any(np.array_equal(*pair) for pair in zip(one.squares, other.squares, strict=True))
    assert not np.array_equal(one.colour_VP, other.colour_VP)


def test_squash_shows_the_whole_image() -> None:
    image = places(200, 100)
    square = squash(image, 50)
    assert square.shape == (50, 50, 3)
    np.testing.assert_allclose(square[25, 2:-2, 0], (np.arange(50) * 4 + 1.5)[2:-2], atol=1)
    np.testing.assert_allclose(square[2:-2, 25, 1], (np.arange(50) * 2 + 0.5)[2:-2], atol=1)
    assert np.array_equal(squash(square, 50), square)
