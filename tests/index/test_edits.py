from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from dino_index.edits import EDITS, apply_edits, paste

KINDS = sorted(EDITS)
SAME_SIZE = ("reencode", "blur", "grey", "colour", "noise", "overlay", "paste", "mirror")

seeds = st.integers(0, 2**32 - 1)


def picture(width: int = 96, height: int = 64, seed: int = 0) -> Image.Image:
    """Smooth coloured blobs: no symmetry that would hide an edit, no single pixel that JPEG would lose."""
    coarse_HWC = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse_HWC).resize((width, height), Image.Resampling.BICUBIC)


def pixels(image: Image.Image) -> NDArray[np.int16]:
    return np.asarray(image, dtype=np.int16)


def edited(kind: str, seed: int, image: Image.Image | None = None) -> Image.Image:
    return apply_edits(image or picture(), [kind], np.random.default_rng(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_copy(kind: str) -> None:
    assert edited(kind, seed=3).tobytes() == edited(kind, seed=3).tobytes()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("grey", "mirror")])
def test_other_seeds_give_other_copies(kind: str) -> None:
    copies = {(copy.size, copy.tobytes()) for copy in (edited(kind, seed) for seed in range(8))}
    assert len(copies) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_is_rgb_and_differs_from_its_original(kind: str) -> None:
    original = picture()
    for seed in range(5):
        copy = edited(kind, seed, original)
        assert copy.mode == "RGB"
        assert copy.size != original.size or copy.tobytes() != original.tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_the_original_is_left_alone(kind: str) -> None:
    original = picture()
    edited(kind, 1, original)
    assert original.tobytes() == picture().tobytes()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)
@given(width=st.integers(1, 40), height=st.integers(1, 40), seed=seeds)
def test_the_smallest_images_can_be_edited(kind: str, width: int, height: int, seed: int) -> None:
    copy = edited(kind, seed, picture(width, height))
    assert min(copy.size) >= 1


@pytest.mark.parametrize("kind", SAME_SIZE)
@given(seed=seeds)
def test_edits_of_pixel_values_keep_the_size(kind: str, seed: int) -> None:
    assert edited(kind, seed).size == picture().size


@given(seed=seeds, width=st.integers(50, 300), height=st.integers(50, 300))
def test_crop_keeps_30_to_80_percent_of_the_area(seed: int, width: int, height: int) -> None:
    copy = edited("crop", seed, picture(width, height))
    rounding = 0.5 / width + 0.5 / height + 0.25 / (width * height)
    assert 0.3 - rounding <= copy.width * copy.height / (width * height) <= 0.8 + rounding


@given(seed=seeds)
def test_crop_is_a_part_of_the_original(seed: int) -> None:
    whole_HWC, part_hwC = pixels(picture()), pixels(edited("crop", seed))
    windows_YX1hwC = np.lib.stride_tricks.sliding_window_view(whole_HWC, part_hwC.shape)
    assert any((window_hwC == part_hwC).all() for row in windows_YX1hwC for window_hwC in row[:, 0])


@given(seed=seeds)
def test_resize_shrinks_both_sides_alike_to_25_to_60_percent(seed: int) -> None:
    copy = edited("resize", seed, picture(300, 200))
    assert 75 <= copy.width <= 180
    assert 50 <= copy.height <= 120
    assert copy.width / 300 == pytest.approx(copy.height / 200, abs=0.005)


@given(seed=seeds)
def test_aspect_lengthens_one_side_by_a_factor_of_1_2_to_1_6(seed: int) -> None:
    copy = edited("aspect", seed, picture(300, 200))
    stretch = sorted((copy.width / 300, copy.height / 200))
    assert stretch[0] == 1
    assert 1.195 <= stretch[1] <= 1.605


def test_mirroring_twice_gives_the_original() -> None:
    assert apply_edits(picture(), ["mirror", "mirror"], np.random.default_rng(0)) == picture()


@given(seed=seeds)
def test_rotate_right_loses_nothing_and_four_times_gives_the_original(seed: int) -> None:
    four_times = picture()
    for _ in range(4):
        four_times = edited("rotate_right", seed, four_times)
    assert four_times == picture()


@given(seed=seeds)
def test_rotate_small_grows_the_frame_by_what_5_to_25_degrees_need(seed: int) -> None:
    copy = edited("rotate_small", seed, picture(200, 200))
    turned = [200 * (np.cos(angle) + np.sin(angle)) for angle in np.radians([5, 25])]
    assert turned[0] - 2 <= copy.width <= turned[1] + 2


@given(seed=seeds)
def test_caption_keeps_the_whole_image_beside_the_bar(seed: int) -> None:
    original = picture(200, 100)
    copy = edited("caption", seed, original)
    assert copy.width == 200
    assert 112 <= copy.height <= 125
    below, above = copy.crop((0, 0, 200, 100)), copy.crop((0, copy.height - 100, 200, copy.height))
    assert original in (below, above)


@given(seed=seeds)
def test_caption_writes_something_into_the_bar(seed: int) -> None:
    black = Image.new("RGB", (200, 100))
    colours = edited("caption", seed, black).crop((0, 0, 200, 125)).getcolors(1 << 16)
    assert colours is not None
    assert len(colours) > 2  # black, white, and the greys of antialiased letters


@given(seed=seeds)
def test_overlay_covers_a_part_only(seed: int) -> None:
    original = picture(200, 200)
    changed_HW = (pixels(edited("overlay", seed, original)) != pixels(original)).any(axis=2)
    assert 0.005 < changed_HW.mean() <= 3 * 0.4**2


@given(seed=seeds)
def test_screenshot_holds_the_whole_image(seed: int) -> None:
    original = Image.new("RGB", (100, 200), (200, 10, 90))
    copy = edited("screenshot", seed, original)
    assert 104 <= copy.width <= 116
    assert 232 <= copy.height <= 272
    inside_HW = (pixels(copy) == (200, 10, 90)).all(axis=2)
    rows, columns = inside_HW.any(axis=1), inside_HW.any(axis=0)
    assert inside_HW.sum() == 100 * 200
    assert (rows.sum(), columns.sum()) == (200, 100)


@given(seed=seeds)
def test_paste_leaves_the_background_around_the_small_image(seed: int) -> None:
    background = Image.new("RGB", (120, 120), (1, 2, 3))
    copy = paste(Image.new("RGB", (300, 150), "white"), np.random.default_rng(seed), background=background)
    assert copy.size == (120, 120)
    small_HW = (pixels(copy) == 255).all(axis=2)
    width, height = small_HW.any(axis=0).sum(), small_HW.any(axis=1).sum()
    assert 0.4 * 120 - 1 <= width <= 0.7 * 120 + 1
    assert abs(width / 2 - height) <= 1
    assert ((pixels(copy) == (1, 2, 3)).all(axis=2) | small_HW).all()


def test_edits_are_applied_in_the_order_given() -> None:
    kinds = ["crop", "grey", "caption", "reencode"]
    rng = np.random.default_rng(5)
    one_by_one = picture()
    for kind in kinds:
        one_by_one = EDITS[kind](one_by_one, rng)
    assert apply_edits(picture(), kinds, np.random.default_rng(5)) == one_by_one


def test_no_edits_give_a_copy_that_is_another_object() -> None:
    original = picture()
    copy = apply_edits(original, [], np.random.default_rng(0))
    assert copy == original
    assert copy is not original


def test_an_unknown_kind_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="unknown edit 'sepia'; the kinds are reencode, blur"):
        apply_edits(picture(), ["blur", "sepia"], np.random.default_rng(0))
