"""Views: parts of an image, cut out, edited and recoloured at random, as student and teacher see them.

What is cut out is decided and cut one image at a time by worker threads, because images differ in size; colours change
in batches of tensors on the device of the model, where everything that is linear is one matrix an image.

Shapes: B images, V views of an image, S side of a view, H x W an image, C = 3 colours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dino_index.backbones import GREY
from dino_index.edits import EDITS, paste
from dino_training.recipe import Recipe

_ATTEMPTS = 10
_RGB_TO_YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))


@dataclass(frozen=True)
class ViewsOfImage:
    """Views of one image before their colours change: uint8 squares, and the changes drawn for them.

    colour_VP: float32, P = 7: brightness, contrast, saturation, hue (turns), grey (0 or 1), sigma of the blur
    (0: none), solarise (0 or 1).
    """

    squares: list[NDArray[np.uint8]]
    colour_VP: NDArray[np.float32]


def cut_views(
    pixels_HWC: NDArray[np.uint8], recipe: Recipe, rng: np.random.Generator, background: NDArray[np.uint8] | None = None
) -> ViewsOfImage:
    """The views of one image. background: another image, for the edit `paste`. All choices are drawn from rng.

    Cut as torchvision's RandomResizedCrop does, bicubic and antialiased.
    """
    image = Image.fromarray(pixels_HWC)
    squares: list[Image.Image] = []
    for view, size in enumerate(recipe.view_sizes):
        is_local = view >= recipe.num_global_views
        # Views of global views are cut before those are mirrored or edited: they still show the image.
        from_global = is_local and recipe.local_source == "global"
        source = squares[view % recipe.num_global_views] if from_global else image
        scale = recipe.local_scale if is_local else recipe.global_scale
        squares.append(resized_crop(source, size, scale, recipe.aspect_ratio, rng))
    flips = rng.random(len(squares)) < recipe.flip_prob
    views = []
    for square, flip in zip(squares, flips.tolist(), strict=True):
        if flip:
            square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if recipe.edits:
            square = _edited(square, recipe, rng, background)
        views.append(np.asarray(square))
    return ViewsOfImage(views, _draw_colour(recipe, rng))


def recolour(squares_BSSC: Tensor, colour_BP: Tensor, recipe: Recipe) -> Tensor:
    """pictures_BCSS: normalised float32 of in_chans channels, after jitter, grey, blur and solarisation.

    squares_BSSC: uint8, on the device to compute on.
    Differs from the reference in that jitter's four steps come in one fixed order and are clipped to 0..1 once, at
    their end; hue turns in YIQ; and blur ends at the border instead of repeating the border's pixels.
    """
    pictures_BCSS = squares_BSSC.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    pictures_BCSS = _jitter(pictures_BCSS, colour_BP).clamp_(0, 1)
    blurred_B = (colour_BP[:, 5] > 0).nonzero().squeeze(1)
    if len(blurred_B):
        pictures_BCSS[blurred_B] = _blur(pictures_BCSS[blurred_B], colour_BP[blurred_B, 5])
    solarised_B = (colour_BP[:, 6] > 0).nonzero().squeeze(1)
    if len(solarised_B):
        bright = pictures_BCSS[solarised_B]
        # From 128 on; rounding leaves some pixels of 128 a little below it.
        pictures_BCSS[solarised_B] = torch.where(bright >= 127.5 / 255, 1 - bright, bright)
    return normalise(pictures_BCSS, recipe)


def normalise(pictures_BCHW: Tensor, recipe: Recipe) -> Tensor:
    """Pictures of 0..1 in RGB as the backbone takes them: in_chans channels, normalised."""
    if recipe.in_chans == 1:
        grey = torch.tensor(GREY, device=pictures_BCHW.device).view(1, 3, 1, 1)
        pictures_BCHW = (pictures_BCHW * grey).sum(dim=1, keepdim=True)
    mean, std = (
        torch.tensor(values, device=pictures_BCHW.device).view(1, -1, 1, 1) for values in (recipe.mean, recipe.std)
    )
    return (pictures_BCHW - mean) / std


def squash(pixels_HWC: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """The whole image as a square, as indexing sees it."""
    if pixels_HWC.shape[:2] == (size, size):
        return pixels_HWC
    image = Image.fromarray(pixels_HWC).resize((size, size), Image.Resampling.BICUBIC, reducing_gap=3.0)
    return np.array(image)


def resized_crop(
    image: Image.Image, size: int, scale: Sequence[float], aspect_ratio: Sequence[float], rng: np.random.Generator
) -> Image.Image:
    """A part of the image by area and aspect ratio, as a square; the middle of it where no draw fits."""
    width, height = image.size
    areas = rng.uniform(scale[0], scale[1], _ATTEMPTS) * (width * height)
    ratios = np.exp(rng.uniform(math.log(aspect_ratio[0]), math.log(aspect_ratio[1]), _ATTEMPTS))
    left_frac, top_frac = rng.random(2)
    crop_width = crop_height = 0
    for area, ratio in zip(areas.tolist(), ratios.tolist(), strict=True):
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            break
    else:
        ratio = min(max(width / height, aspect_ratio[0]), aspect_ratio[1])
        crop_width, crop_height = min(width, round(height * ratio)), min(height, round(width / ratio))
        left_frac = top_frac = 0.5
    left = math.floor(left_frac * (width - crop_width + 1))
    top = math.floor(top_frac * (height - crop_height + 1))
    box = (left, top, left + max(1, crop_width), top + max(1, crop_height))
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def _edited(
    square: Image.Image, recipe: Recipe, rng: np.random.Generator, background: NDArray[np.uint8] | None
) -> Image.Image:
    """The view after each edit of the recipe that chance chooses, in a random order, at its own size again."""
    size = square.size
    kinds = list(recipe.edits)
    chosen = rng.random(len(kinds)) < np.array([recipe.edits[kind] for kind in kinds])
    for number in rng.permutation(len(kinds)).tolist():
        if not chosen[number]:
            continue
        if kinds[number] == "paste" and background is not None:
            canvas = resized_crop(Image.fromarray(background), size[0], (0.3, 1.0), (0.75, 4 / 3), rng)
            square = paste(square, rng, background=canvas)
        else:
            square = EDITS[kinds[number]](square, rng)
    return square if square.size == size else square.resize(size, Image.Resampling.BICUBIC)


def _draw_colour(recipe: Recipe, rng: np.random.Generator) -> NDArray[np.float32]:
    num_views = len(recipe.view_sizes)
    kinds_V = np.minimum(np.arange(num_views), 1)  # first global view, other global views, local views
    kinds_V[recipe.num_global_views :] = 2
    jittered_V1 = rng.random((num_views, 1)) < recipe.jitter_prob
    strengths_4 = np.array(recipe.jitter)
    lowest_4 = np.append(np.maximum(0, 1 - strengths_4[:3]), -strengths_4[3])
    highest_4 = np.append(1 + strengths_4[:3], strengths_4[3])
    factors_V4 = rng.uniform(lowest_4, highest_4, (num_views, 4))
    grey_V = rng.random(num_views) < recipe.grey_prob
    blur_V = rng.random(num_views) < np.array(recipe.blur_prob)[kinds_V]
    sigma_V = rng.uniform(recipe.blur_sigma[0], recipe.blur_sigma[1], num_views)
    solarise_V = rng.random(num_views) < np.array(recipe.solarise_prob)[kinds_V]
    columns = (np.where(jittered_V1, factors_V4, (1, 1, 1, 0)), grey_V, np.where(blur_V, sigma_V, 0), solarise_V)
    return np.column_stack(columns).astype(np.float32)


def _jitter(pictures_BCSS: Tensor, colour_BP: Tensor) -> Tensor:
    """Brightness, contrast, saturation, hue and grey: each is linear in a pixel, so all are one matrix an image."""
    device = pictures_BCSS.device
    brightness_B, contrast_B, saturation_B, hue_B, grey_B = colour_BP[:, :5].unbind(dim=1)
    to_yiq_CC = torch.tensor(_RGB_TO_YIQ, device=device)
    grey_CC = torch.tensor([GREY] * 3, device=device)
    identity_CC = torch.eye(3, device=device)

    def mix(to_grey_B: Tensor) -> Tensor:
        return identity_CC + to_grey_B.view(-1, 1, 1) * (grey_CC - identity_CC)

    turn_BCC = torch.zeros(len(hue_B), 3, 3, device=device)
    cosine_B, sine_B = torch.cos(2 * math.pi * hue_B), torch.sin(2 * math.pi * hue_B)
    turn_BCC[:, 0, 0] = 1
    turn_BCC[:, 1, 1] = turn_BCC[:, 2, 2] = cosine_B
    turn_BCC[:, 1, 2], turn_BCC[:, 2, 1] = -sine_B, sine_B
    hue_BCC = torch.linalg.solve(to_yiq_CC, turn_BCC @ to_yiq_CC)
    colours_BCC = mix(grey_B) @ hue_BCC @ mix(1 - saturation_B)
    # Contrast blends with one grey value, the picture's mean; hue, saturation and grey leave greys as they are.
    mean_grey_B = (pictures_BCSS.mean(dim=(2, 3)) * grey_CC[0]).sum(dim=1) * brightness_B
    offset_B = (1 - contrast_B) * mean_grey_B
    matrix_BCC = colours_BCC * (contrast_B * brightness_B).view(-1, 1, 1)
    size = pictures_BCSS.shape[-1]
    mixed_BCN = torch.baddbmm(offset_B.view(-1, 1, 1), matrix_BCC, pictures_BCSS.flatten(2))
    return mixed_BCN.view(len(mixed_BCN), 3, size, size)


def _blur(pictures_BCSS: Tensor, sigma_B: Tensor) -> Tensor:
    """Gaussian blur as a product with one band matrix an image, for rows and for columns."""
    size = pictures_BCSS.shape[-1]
    places_S = torch.arange(size, device=pictures_BCSS.device, dtype=torch.float32)
    squared_SS = (places_S[:, None] - places_S[None, :]).square()
    weights_BSS = torch.exp(-squared_SS / (2 * sigma_B.square()).view(-1, 1, 1))
    # Beyond five deviations they are noise, and where they are denormal the product takes forty times as long.
    weights_BSS = torch.where(weights_BSS < 1e-6, 0, weights_BSS)
    weights_BSS = weights_BSS / weights_BSS.sum(dim=-1, keepdim=True)
    # Rows of all colours in one product, then columns.
    rows_BSCS = torch.bmm(pictures_BCSS.flatten(1, 2), weights_BSS.mT).view(pictures_BCSS.shape).transpose(1, 2)
    columns_BSN = torch.bmm(weights_BSS, rows_BSCS.flatten(2))
    return columns_BSN.view(rows_BSCS.shape).transpose(1, 2)
