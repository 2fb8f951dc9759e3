"""Whether two pictures agree pixel by pixel under an affine map, and the map that makes them agree best.

Patches say roughly where one picture lies in the other. Here the map is tried on the pixels themselves: shifted until
the grey values fit (Gauss-Newton steps, as Lucas and Kanade align pictures), then compared block by block, so that a
sticker or a caption costs the blocks that it covers and nothing else.

Shapes: L levels of blur, S x S pixels of a squashed grey picture, K maps tried at a time, n x n samples of the area
that both pictures show. Maps are of fractions of the query to fractions of the reference (see `geometry`), as
float32 of 2 x 3. All that is asked here is answered for K maps at once, since the steps are small and many.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_LEVELS = 4
# Grey levels are 0..1. Differences below this are noise and compression.
_NOISE = 0.012
# Blocks that vary less than this in both pictures say nothing; those that vary more than the second count alike.
_MIN_TEXTURE, _FULL_TEXTURE = 0.02, 0.1
_BLOCK = 8
AGREEING = 0.6
"""Correlation from which on a block counts as the same."""
# An area of less than this share of either picture is too little to compare.
_MIN_SHARED = 0.04
_PROBES = 24
# The largest change of a step: a map that is further off leads anywhere.
_MAX_STEP = 0.08
_TUKEY = 4.0


@dataclass(frozen=True)
class Agreement:
    """How well the pictures fit under each of K maps.

    correlation_K: mean correlation of the blocks, weighted by texture; -1..1. share_K: of the blocks with texture,
    those that correlate at 0.6 or more. num_blocks_K: those with texture.
    Everything is 0 where there is nothing to compare.
    """

    correlation_K: Tensor
    share_K: Tensor
    num_blocks_K: Tensor


def blur_levels(grey_SS: Tensor) -> Tensor:
    """levels_LSS: the picture (0..1) averaged over squares of 1, 2, 4 and 8 pixels, all at full size."""
    grey_11SS = grey_SS[None, None]
    levels = [grey_11SS]
    for level in range(1, NUM_LEVELS):
        small = F.avg_pool2d(grey_11SS, 2**level)
        levels.append(F.interpolate(small, size=grey_SS.shape, mode="bilinear", align_corners=False))
    return torch.cat(levels)[:, 0]


def shared_boxes(maps_K23: Tensor) -> tuple[Tensor, Tensor]:
    """(boxes_K4, is_enough_K): left, top, width, height of what the query shares with the reference."""
    probes = (torch.arange(_PROBES) + 0.5) / _PROBES
    points_P2 = torch.cartesian_prod(probes, probes)
    inside_KP = _is_inside(_moved(maps_K23, points_P2.expand(len(maps_K23), -1, -1)))
    far = torch.where(inside_KP[..., None], points_P2, torch.tensor(-1.0)).amax(1)
    near = torch.where(inside_KP[..., None], points_P2, torch.tensor(2.0)).amin(1)
    near, far = (near - 0.5 / _PROBES), (far + 0.5 / _PROBES)
    shared_K = inside_KP.float().mean(1)
    is_enough_K = (shared_K >= _MIN_SHARED) & (shared_K * _magnification(maps_K23) >= _MIN_SHARED)
    boxes_K4 = torch.cat([near, (far - near)], dim=1)
    whole = torch.tensor([0.0, 0.0, 1.0, 1.0])
    return torch.where(is_enough_K[:, None], boxes_K4, whole), is_enough_K


def refine(query_LSS: Tensor, reference_LSS: Tensor, maps_K23: Tensor, *, num_samples: int, num_steps: int) -> Tensor:
    """Maps under which the grey values fit better, each from where the given one leads.

    Brightness and contrast are fitted along; pixels that do not fit at all (stickers) lose their say.
    """
    boxes_K4, _ = shared_boxes(maps_K23)
    units_n2 = _unit_grid(num_samples) - 0.5
    for _ in range(num_steps):
        query_Knn, reference_Knn, inside_Knn = _sample(query_LSS, reference_LSS, maps_K23, boxes_K4, num_samples)
        query_KN, reference_KN, inside_KN = query_Knn.flatten(1), reference_Knn.flatten(1), inside_Knn.flatten(1)
        slope_y_Knn, slope_x_Knn = torch.gradient(reference_Knn, spacing=1 / num_samples, dim=(1, 2))
        weights_KN = _weights(query_KN, reference_KN, inside_KN)
        x_N, y_N = units_n2.reshape(-1, 2).unbind(1)
        slope_x_KN, slope_y_KN = slope_x_Knn.flatten(1), slope_y_Knn.flatten(1)
        columns_KN8 = torch.stack(
            [
                slope_x_KN * x_N, slope_x_KN * y_N, slope_x_KN,
                slope_y_KN * x_N, slope_y_KN * y_N, slope_y_KN,
                reference_KN, torch.ones_like(reference_KN),
            ],
            dim=2,
        )  # fmt: skip
        weighted_K8N = (columns_KN8 * weights_KN[..., None]).transpose(1, 2)
        normal_K88 = weighted_K8N @ columns_KN8
        damping_K8 = 1e-3 * normal_K88.diagonal(dim1=1, dim2=2) + 1e-6
        solved_K8 = torch.linalg.solve_ex(normal_K88 + torch.diag_embed(damping_K8), weighted_K8N @ query_KN[..., None])
        gains_K8 = torch.nan_to_num(solved_K8.result[..., 0])
        # The first six are of gain x step; a picture in negative has no gain to speak of, and stays where it is.
        gain_K = gains_K8[:, 6]
        steps_K23 = (gains_K8[:, :6] / gain_K.clamp(min=0.05)[:, None]).clamp(-_MAX_STEP, _MAX_STEP).view(-1, 2, 3)
        steps_K23 = torch.where((gain_K > 0.05)[:, None, None], steps_K23, torch.zeros_like(steps_K23))
        maps_K23 = _after_step(maps_K23, steps_K23, boxes_K4)
    return maps_K23


def agreement(query_LSS: Tensor, reference_LSS: Tensor, maps_K23: Tensor, *, num_samples: int) -> Agreement:
    """How well the pictures fit under each map, as it is."""
    boxes_K4, is_enough_K = shared_boxes(maps_K23)
    query_Knn, reference_Knn, inside_Knn = _sample(query_LSS, reference_LSS, maps_K23, boxes_K4, num_samples)
    block, stride = num_samples * _BLOCK // 64, num_samples * _BLOCK // 128
    values = torch.stack([query_Knn, reference_Knn, query_Knn**2, reference_Knn**2, query_Knn * reference_Knn], dim=1)
    means_K5bb = F.avg_pool2d(values, block, stride)
    mean_q, mean_r, square_q, square_r, product = means_K5bb.flatten(2).unbind(1)
    is_whole_KN = F.avg_pool2d(inside_Knn.float()[:, None], block, stride).flatten(1) > 0.999
    variance_q, variance_r = (square_q - mean_q**2).clamp(min=0), (square_r - mean_r**2).clamp(min=0)
    correlation_KN = (product - mean_q * mean_r) / ((variance_q + _NOISE**2) * (variance_r + _NOISE**2)).sqrt()
    texture_KN = torch.maximum(variance_q, variance_r).sqrt().clamp(max=_FULL_TEXTURE)
    has_texture_KN = (texture_KN > _MIN_TEXTURE) & is_whole_KN & is_enough_K[:, None]
    weights_KN = torch.where(has_texture_KN, texture_KN, torch.zeros_like(texture_KN))
    num_blocks_K = has_texture_KN.sum(1)
    agreeing_K = ((correlation_KN > AGREEING) & has_texture_KN).sum(1)
    return Agreement(
        correlation_K=(correlation_KN * weights_KN).sum(1) / weights_KN.sum(1).clamp(min=1e-6),
        share_K=agreeing_K / num_blocks_K.clamp(min=1),
        num_blocks_K=num_blocks_K,
    )


def _sample(
    query_LSS: Tensor, reference_LSS: Tensor, maps_K23: Tensor, boxes_K4: Tensor, num_samples: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(query_Knn, reference_Knn, inside_Knn): both pictures at the same places, neither sharper than the samples are.

    The places fill the box in the query; inside: whether the reference has that place.
    """
    places_KN2 = boxes_K4[:, None, :2] + _unit_grid(num_samples).reshape(1, -1, 2) * boxes_K4[:, None, 2:]
    moved_KN2 = _moved(maps_K23, places_KN2)
    side = query_LSS.shape[-1]
    spacing_K = (boxes_K4[:, 2] * boxes_K4[:, 3]).sqrt() * side / num_samples
    query_Knn = _read(query_LSS, places_KN2, spacing_K, num_samples)
    reference_Knn = _read(reference_LSS, moved_KN2, spacing_K * _magnification(maps_K23).sqrt(), num_samples)
    return query_Knn, reference_Knn, _is_inside(moved_KN2).view(-1, num_samples, num_samples)


def _read(levels_LSS: Tensor, places_KN2: Tensor, spacing_K: Tensor, num_samples: int) -> Tensor:
    """values_Knn at those places, from the level of blur that suits samples so many pixels apart."""
    level_K = spacing_K.clamp(min=1e-3).log2().round().clamp(0, NUM_LEVELS - 1).long()
    grid_Knn2 = (places_KN2 * 2 - 1).view(-1, num_samples, num_samples, 2)
    pictures_K1SS = levels_LSS[level_K][:, None]
    return F.grid_sample(pictures_K1SS, grid_Knn2, padding_mode="border", align_corners=False)[:, 0]


def _weights(query_KN: Tensor, reference_KN: Tensor, inside_KN: Tensor) -> Tensor:
    """How much each sample counts: Tukey's weights of what brightness and contrast leave unexplained."""
    inside = inside_KN.float()
    total_K1 = inside.sum(1, keepdim=True).clamp(min=1)
    query = (query_KN - (query_KN * inside).sum(1, keepdim=True) / total_K1) * inside
    reference = (reference_KN - (reference_KN * inside).sum(1, keepdim=True) / total_K1) * inside
    variance_K1 = (reference**2).sum(1, keepdim=True) + 1e-6
    gain_K1 = ((query * reference).sum(1, keepdim=True) / variance_K1).clamp(min=0.1)
    residuals_KN = torch.addcmul(query, gain_K1, reference, value=-1)
    # The mean and not the median, which would take as long as all the rest.
    spread_K1 = residuals_KN.abs().sum(1, keepdim=True) / total_K1
    scaled_KN = residuals_KN / (_TUKEY * (spread_K1 + 0.01))
    return inside * (1 - scaled_KN**2).clamp(min=0) ** 2


def _after_step(maps_K23: Tensor, steps_K23: Tensor, boxes_K4: Tensor) -> Tensor:
    """Each map after a step of its box: the step is in units of the box, from its middle."""
    extents_K2 = boxes_K4[:, 2:]
    middles_K2 = boxes_K4[:, :2] + extents_K2 / 2
    linear_K22 = torch.eye(2) + extents_K2[:, :, None] * steps_K23[:, :, :2] / extents_K2[:, None, :]
    offset_K2 = extents_K2 * steps_K23[:, :, 2] + middles_K2 - (linear_K22 @ middles_K2[..., None])[..., 0]
    moved_K22 = maps_K23[:, :, :2] @ linear_K22
    shift_K2 = (maps_K23[:, :, :2] @ offset_K2[..., None])[..., 0] + maps_K23[:, :, 2]
    return torch.cat([moved_K22, shift_K2[..., None]], dim=2)


@cache
def _unit_grid(num_samples: int) -> Tensor:
    """places_nn2: (x, y) of the middles of n x n cells that fill the unit square."""
    middles = (torch.arange(num_samples) + 0.5) / num_samples
    y_nn, x_nn = torch.meshgrid(middles, middles, indexing="ij")
    return torch.stack([x_nn, y_nn], dim=2)


def _magnification(maps_K23: Tensor) -> Tensor:
    """How many times as much of the reference as of the query an area covers."""
    return (maps_K23[:, 0, 0] * maps_K23[:, 1, 1] - maps_K23[:, 0, 1] * maps_K23[:, 1, 0]).abs()


def _moved(maps_K23: Tensor, points_KN2: Tensor) -> Tensor:
    return points_KN2 @ maps_K23[:, :, :2].transpose(1, 2) + maps_K23[:, None, :, 2]


def _is_inside(points_KN2: Tensor) -> Tensor:
    return ((points_KN2 >= 0) & (points_KN2 <= 1)).all(-1)
