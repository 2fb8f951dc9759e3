"""Photographs that scikit-image ships, about as large as the pictures that people post."""

from __future__ import annotations

from functools import cache
from typing import Any

from PIL import Image
from skimage import data


@cache
def photograph(name: str) -> Image.Image:
    """RGB, at most 300 px high."""
    pixels: Any = getattr(data, name)()
    image = Image.fromarray(pixels).convert("RGB")
    image.thumbnail((400, 300))
    return image
