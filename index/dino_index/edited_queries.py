"""Edited copies in the number and mixture that calibration and benchmarks search with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from dino_index.edits import EDITS, paste

_NUM_EDITS_SHARES = (0.5, 0.3, 0.2)
"""Of copies with one, two and three edits."""
_PASTED_ON_PICTURE_FRAC = 0.5


def draw_edits(rng: np.random.Generator) -> Iterator[tuple[str, ...]]:
    """Kinds of edit, in the order to apply them, without end: each kind leads in turn, others follow or go before."""
    kinds = list(EDITS)
    while True:
        for leading in rng.permutation(kinds).tolist():
            num_more = int(rng.choice(len(_NUM_EDITS_SHARES), p=_NUM_EDITS_SHARES))
            others = rng.choice([kind for kind in kinds if kind != leading], num_more, replace=False).tolist()
            yield tuple(rng.permutation([leading, *others]).tolist())


def edited_copy(
    image: Image.Image,
    kinds: Sequence[str],
    rng: np.random.Generator,
    backgrounds: Sequence[Image.Image] = (),
) -> Image.Image:
    """The image after these edits; half of the pasted ones lie on one of the other pictures, if there are any."""
    for kind in kinds:
        if kind == "paste" and backgrounds and rng.random() < _PASTED_ON_PICTURE_FRAC:
            image = paste(image, rng, background=backgrounds[int(rng.integers(len(backgrounds)))])
        else:
            image = EDITS[kind](image, rng)
    return image
