"""Edited copies in the mixture that calibration searches with."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import numpy as np
from PIL import Image

from dino_index.edited_queries import draw_edits, edited_copy
from dino_index.edits import EDITS


def test_every_kind_leads_once_before_any_leads_twice_and_some_are_combined() -> None:
    drawn = list(islice(draw_edits(np.random.default_rng(0)), 10 * len(EDITS)))
    used = Counter(kind for kinds in drawn for kind in kinds)
    assert all(used[kind] >= 10 for kind in EDITS)
    lengths = Counter(map(len, drawn))
    assert set(lengths) == {1, 2, 3}
    assert lengths[1] > lengths[2] > lengths[3]
    assert all(len(set(kinds)) == len(kinds) for kinds in drawn)


def test_the_same_seed_gives_the_same_copies() -> None:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (60, 80, 3), np.uint8))
    first, second = (edited_copy(image, ["crop", "noise"], np.random.default_rng(2)) for _ in range(2))
    assert np.array_equal(np.asarray(first), np.asarray(second))


def test_pasted_copies_lie_on_other_pictures_now_and_then() -> None:
    image, green = Image.new("RGB", (40, 40), (200, 0, 0)), Image.new("RGB", (90, 70), (0, 255, 0))
    rng = np.random.default_rng(0)
    sizes = Counter(edited_copy(image, ["paste"], rng, [green]).size for _ in range(40))
    assert set(sizes) == {(40, 40), (90, 70)}
    assert min(sizes.values()) > 8
