"""Pictures that a run leaves behind: its views as the model sees them, and what the backbone attends to over time.

Shapes: B images, S side of a picture, C = 3 colours.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from dino_index.attention import attention_maps, has_attention
from dino_index.errors import OutputUnwritable
from dino_training.recipe import Recipe
from dino_training.sheets import draw_attention, draw_views
from dino_training.views import normalise

ATTENTION_FOLDER = "attention"
VIEWS = "views.png"


def save_views(views: Sequence[Tensor], recipe: Recipe, run: Path) -> None:
    """Draws the first images of a batch as the networks get them, a row an image. views: normalised, B x C x S x S."""
    _save(draw_views([_as_pixels(view, recipe) for view in views]), run / VIEWS)


def save_attention(
    backbone: nn.Module, pictures_BSSC: NDArray[np.uint8], recipe: Recipe, device: torch.device, run: Path, step: int
) -> None:
    """Draws what [CLS] attends to in each picture; nothing for a backbone without such attention."""
    if not has_attention(backbone):
        return
    pixels_BCSS = torch.from_numpy(pictures_BSSC).to(device).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        maps_BHhw = attention_maps(backbone, normalise(pixels_BCSS, recipe))
    _save(draw_attention(pictures_BSSC, maps_BHhw.cpu()), run / ATTENTION_FOLDER / f"step-{step:08d}.png")


def _as_pixels(view_BCSS: Tensor, recipe: Recipe) -> NDArray[np.uint8]:
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (recipe.mean, recipe.std))
    pixels_BCSS = ((view_BCSS.cpu() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    pixels_BSSC: NDArray[np.uint8] = pixels_BCSS.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
    return pixels_BSSC


def _save(image: Image.Image, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    except OSError as error:
        raise OutputUnwritable(f"{path} cannot be written: {error}") from error
