"""Labelled pictures that even a network with random weights tells apart: the classes are colours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"blue": (20, 40, 220), "green": (30, 200, 40), "red": (220, 30, 30)}


def write_coloured(folder: Path, per_class: int, *, names: dict[str, str] | None = None, seed: int = 0) -> Path:
    """Noise around each colour, below a folder of its name, or of another that `names` gives it."""
    rng = np.random.default_rng(seed)
    for colour, rgb in COLOURS.items():
        below = folder / (names or {}).get(colour, colour)
        below.mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            pixels = np.array(rgb) + rng.integers(-30, 30, (40, 48, 3))
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(below / f"{number}.png")
    return folder
