"""Whether a candidate really is an edited copy, and which area of each picture matches.

Three steps. Patches of both pictures that are each other's nearest are matched. Seeded RANSAC proposes affine maps that
many matches follow, and each is fitted to all of its matches. The best few maps, and the identity, are tried
and refined on the pixels (see `alignment`), which decide: alike patches are no proof, since those of two shirts on one
table lie alike, but their pixels do not fit. That costs most of the time, and is left out where so few matches follow
any map that they are chance: so do four fifths of the wrong candidates, and no copy that pixels would prove.

Mirrored and turned copies are verified by giving the query as mirrored or turned back, in several ways where it is not
clear in which; `Verification.of_original` expresses the result in the query as it was.

Shapes: h x w patches (N in all), P channels of a patch; S x S grey pixels; L levels of blur; M matches, T maps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dino_index import geometry
from dino_index.alignment import agreement, blur_levels, refine
from dino_index.geometry import Map, Polygon
from dino_index.matrix_products import product

VERIFIED_SCORE = 0.7
"""Score from which on patches and pixels are taken to show the same."""
GREY_SIDE = 128
"""Pixels on a side of the grey picture that is compared."""

# Pairs of matches that propose a map each.
_NUM_PROPOSALS = 400
# How far a match may lie from where a map puts it, in patches.
_TOLERANCE = 1.0
_MIN_MATCHES = 3
# Keeps the fit to matches on one line from having no solution; it changes others by less than a millionth.
_RIDGE = 1e-9
_MIN_INLIERS_TO_FIT = 6
_MAX_LOOKED_AT, _MAX_TRIED = 60, 7
# Proposals of which more than this share of the inliers belongs to a better one are the same map.
_SAME_INLIERS = 0.7
# What edits do: no more than a sixth or six times the size, one side stretched up to 2.4 times as much as the other,
# turned by less than 40 degrees (quarter turns are variants of the query).
_SCALES = (0.15, 6.0)
_MAX_STRETCH = 2.4
_MAX_TURN = math.radians(40)
_COARSE_SAMPLES, _FINE_SAMPLES = 24, 64
_COARSE_STEPS, _FINE_STEPS = 6, 4
# Matches of 256 patches that follow one map by chance.
_MAX_CHANCE_INLIERS = 7
# Of several ways to look at a query, those that most matches speak for are tried on the pixels.
_MAX_JUDGED = 2
# Below this the pixels disagree so much that finer steps change nothing.
_HOPELESS = 0.25
_BIAS, _PER_AGREEMENT, _PER_LOG_INLIERS = -8.92, 9.45, 1.40


@dataclass(frozen=True, kw_only=True, eq=False)
class Patches:
    """What is kept of a picture for verification; about 600 KB with the bundled model, once it has been compared.

    patches_hwP: float16, of `Backbone.embed_with_patches`. grey_SS: uint8, the picture squashed to a square.
    width, height: of the whole upright picture in pixels.
    """

    patches_hwP: NDArray[np.float16]
    grey_SS: NDArray[np.uint8]
    width: int
    height: int

    @property
    def aspect(self) -> float:
        return self.width / self.height

    @property
    def num_patches(self) -> int:
        height, width = self.patches_hwP.shape[:2]
        return int(height) * int(width)

    @cached_property
    def _unit_vectors(self) -> Tensor:
        """vectors_NP, of unit length."""
        vectors_NP = torch.from_numpy(self.patches_hwP).flatten(0, 1).float().nan_to_num()
        return F.normalize(vectors_NP, dim=1, eps=1e-6)

    @cached_property
    def _blurred(self) -> Tensor:
        """levels_LSS, see `alignment.blur_levels`."""
        return blur_levels(torch.from_numpy(self.grey_SS.astype(np.float32) / 255))

    @cached_property
    def _middles(self) -> NDArray[np.float32]:
        """points_N2: where the patches are, in fractions of the picture."""
        height, width = self.patches_hwP.shape[:2]
        y_hw, x_hw = np.mgrid[0:height, 0:width]
        return np.stack([(x_hw.ravel() + 0.5) / width, (y_hw.ravel() + 0.5) / height], axis=1).astype(np.float32)


@dataclass(frozen=True, kw_only=True, eq=False)
class Verification:
    """What is known of a pair after a look at patches and pixels."""

    score: float
    """0..1, how sure it is that one picture shows (a part of) the other."""
    num_inliers: int
    """Matched patches that follow the map."""
    correlation: float
    """Mean correlation of the blocks of grey pixels under the map, weighted by their texture; -1..1."""
    agreement: float
    """Share of the blocks with texture that are the same; 0..1."""
    transform: Map | None
    """From fractions of the query to fractions of the reference; None where there is nothing to compare."""
    query_area: Polygon = ()
    """What both show, as an area of the query: corners in fractions. The best guess, however bad the score."""
    reference_area: Polygon = ()

    def of_original(self, variant: Map) -> Verification:
        """The same for the query as it was. variant: from fractions of that to fractions of what was verified."""
        if self.transform is None:
            return self
        transform = self.transform @ variant
        query_area, reference_area = geometry.shared_areas(transform)
        return replace(self, transform=transform, query_area=query_area, reference_area=reference_area)


NOTHING = Verification(score=0.0, num_inliers=0, correlation=0.0, agreement=0.0, transform=None)


def patches_of(square_HWC: NDArray[np.uint8], patches_hwP: NDArray[np.float16], *, width: int, height: int) -> Patches:
    """square_HWC: the RGB pixels that were embedded. width, height: of the whole upright picture."""
    grey = Image.fromarray(square_HWC).convert("L")
    if grey.size != (GREY_SIDE, GREY_SIDE):
        grey = grey.resize((GREY_SIDE, GREY_SIDE), Image.Resampling.BICUBIC)
    return Patches(patches_hwP=patches_hwP, grey_SS=np.array(grey), width=width, height=height)


@dataclass(frozen=True, kw_only=True, eq=False)
class Matching:
    """Patches of two pictures that are each other's nearest, and maps that many of them follow.

    query_M2, reference_M2: middles of the matched patches. maps: best first, the identity last.
    """

    query: Patches
    reference: Patches
    query_M2: NDArray[np.float32]
    reference_M2: NDArray[np.float32]
    maps: list[Map]
    num_inliers: int
    """The most matches that follow one of the maps."""

    @property
    def is_chance(self) -> bool:
        """Whether so few matches agree that the pictures do not show the same."""
        return self.num_inliers <= max(_MIN_MATCHES, _MAX_CHANCE_INLIERS * self.query.num_patches // 256)


def match(query: Patches, reference: Patches) -> Matching:
    """The first two steps of `verify`. Both must come from one model."""
    # In torch, which keeps to the processor of the calling thread.
    likeness_NN = (query._unit_vectors @ reference._unit_vectors.T).numpy()
    nearest_N, back_N = likeness_NN.argmax(axis=1), likeness_NN.argmax(axis=0)
    numbers_N = np.arange(len(nearest_N))
    mutual_M = numbers_N[back_N[nearest_N] == numbers_N]
    query_M2, reference_M2 = query._middles[mutual_M], reference._middles[nearest_N[mutual_M]]
    maps = [*_proposed_maps(query, reference, query_M2, reference_M2), geometry.identity()]
    follows_TM = _follows(_rows(maps), query_M2, reference_M2, _tolerance(reference))
    return Matching(
        query=query, reference=reference, query_M2=query_M2, reference_M2=reference_M2, maps=maps,
        num_inliers=int(follows_TM.sum(axis=1).max()),
    )  # fmt: skip


def verify(query: Patches, reference: Patches) -> Verification:
    """How sure it is that the pictures show the same, and where. The same answer every time; never raises.

    Both must come from one model. Uniform pictures have nothing to compare: score 0.
    """
    return verify_best([match(query, reference)])[1]


def verify_best(matchings: Sequence[Matching]) -> tuple[int, Verification]:
    """The position of the matching that holds best, the earlier of equal ones, and its verification.

    matchings: of several ways to look at one query with one reference; at least one.
    """
    order = sorted(range(len(matchings)), key=lambda number: -matchings[number].num_inliers)
    best, verification = order[0], NOTHING
    for number in order[:_MAX_JUDGED]:
        if matchings[number].is_chance:
            break
        judged = _judge(matchings[number])
        if judged.score > verification.score:
            best, verification = number, judged
        if verification.score >= VERIFIED_SCORE:
            break
    return best, verification


def _proposed_maps(
    query: Patches, reference: Patches, query_M2: NDArray[np.float32], reference_M2: NDArray[np.float32]
) -> list[Map]:
    """The maps that most matches follow, best first, no two with the same matches."""
    if len(query_M2) < _MIN_MATCHES:
        return []
    maps_T23 = _maps_of_two_matches(query, reference, query_M2, reference_M2)
    maps_T23 = maps_T23[_is_plausible(maps_T23, query.aspect, reference.aspect)]
    tolerance = _tolerance(reference)
    follows_TM = _follows(maps_T23, query_M2, reference_M2, tolerance)
    best_T = np.argsort(-follows_TM.sum(axis=1), kind="stable")[:_MAX_LOOKED_AT]
    maps_T23, follows_TM = maps_T23[best_T], follows_TM[best_T]
    shared_TT = product(follows_TM.astype(np.float32), follows_TM.T.astype(np.float32))
    chosen: list[int] = []
    for number, shared_T in enumerate(shared_TT):
        if not (shared_T[chosen] > _SAME_INLIERS * shared_T[number]).any():
            chosen.append(number)
            if len(chosen) == _MAX_TRIED:
                break
    return _fitted(maps_T23[chosen], follows_TM[chosen], query, reference, query_M2, reference_M2)


def _maps_of_two_matches(
    query: Patches, reference: Patches, query_M2: NDArray[np.float32], reference_M2: NDArray[np.float32]
) -> NDArray[np.float32]:
    """maps_T23 of random pairs of matches: a similarity, and a stretch along the axes, which changed aspects need."""
    first, second = np.random.default_rng(0).integers(len(query_M2), size=(2, _NUM_PROPOSALS))
    query_T2 = query_M2[second] - query_M2[first]
    reference_T2 = reference_M2[second] - reference_M2[first]

    # As complex numbers in units of each picture's height, a similarity is a factor.
    query_T = query_T2[:, 0] * query.aspect + 1j * query_T2[:, 1]
    reference_T = reference_T2[:, 0] * reference.aspect + 1j * reference_T2[:, 1]
    is_apart = (np.abs(query_T) > 0.12) & (np.abs(reference_T) > 0.08)
    factor_T = np.where(is_apart, reference_T, 0) / np.where(is_apart, query_T, 1)
    similar_T22 = np.stack(
        [
            factor_T.real * query.aspect / reference.aspect, -factor_T.imag / reference.aspect,
            factor_T.imag * query.aspect, factor_T.real,
        ],
        axis=1,
    ).reshape(-1, 2, 2)  # fmt: skip
    is_similar = is_apart & (np.abs(np.angle(factor_T)) < _MAX_TURN)

    is_stretched = (np.abs(query_T2) > 0.1).all(1) & (np.abs(reference_T2) > 0.05).all(1)
    stretch_T2 = np.where(is_stretched[:, None], reference_T2, 0) / np.where(is_stretched[:, None], query_T2, 1)
    is_stretched &= (stretch_T2 > 0).all(axis=1)
    stretched_T22 = stretch_T2[:, :, None] * np.eye(2)

    linear_T22 = np.concatenate([similar_T22[is_similar], stretched_T22[is_stretched]])
    origins = np.concatenate([first[is_similar], first[is_stretched]])
    shifts_T2 = reference_M2[origins] - (linear_T22 @ query_M2[origins][..., None])[..., 0]
    return np.concatenate([linear_T22, shifts_T2[..., None]], axis=2).astype(np.float32)


def _is_plausible(maps_T23: NDArray[np.float32], query_aspect: float, reference_aspect: float) -> NDArray[np.bool_]:
    """Which maps keep to what edits do, in units of the pictures' heights; none of them mirrors."""
    units_22 = np.array([[reference_aspect / query_aspect, reference_aspect], [1 / query_aspect, 1.0]])
    linear_T22 = maps_T23[:, :, :2].astype(np.float64) * units_22
    determinants_T = linear_T22[:, 0, 0] * linear_T22[:, 1, 1] - linear_T22[:, 0, 1] * linear_T22[:, 1, 0]
    squares_T = (linear_T22**2).sum(axis=(1, 2))
    root_T = np.sqrt(np.maximum(squares_T**2 - 4 * determinants_T**2, 0))
    longest_T, shortest_T = np.sqrt((squares_T + root_T) / 2), np.sqrt(np.maximum(squares_T - root_T, 0) / 2)
    plausible: NDArray[np.bool_] = (
        (determinants_T > 0)
        & (shortest_T > _SCALES[0])
        & (longest_T < _SCALES[1])
        & (longest_T < _MAX_STRETCH * shortest_T)
    )
    return plausible


def _rows(maps: Sequence[Map]) -> NDArray[np.float32]:
    """maps_T23 of maps as matrices of 3 x 3."""
    return np.stack(maps)[:, :2].astype(np.float32)


def _tolerance(reference: Patches) -> float:
    height, width = reference.patches_hwP.shape[:2]
    return _TOLERANCE / min(int(height), int(width))


def _follows(
    maps_T23: NDArray[np.float32],
    query_M2: NDArray[np.float32],
    reference_M2: NDArray[np.float32],
    tolerance: float,
) -> NDArray[np.bool_]:
    """follows_TM: whether a map puts a match's patch where it lies; maps that enlarge are as coarse as their source."""
    x_TM = product(maps_T23[:, 0, :2], query_M2.T) + maps_T23[:, 0, 2:] - reference_M2[:, 0]
    y_TM = product(maps_T23[:, 1, :2], query_M2.T) + maps_T23[:, 1, 2:] - reference_M2[:, 1]
    determinants_T = maps_T23[:, 0, 0] * maps_T23[:, 1, 1] - maps_T23[:, 0, 1] * maps_T23[:, 1, 0]
    allowed_T1 = tolerance**2 * np.maximum(1, np.abs(determinants_T))[:, None]
    follows: NDArray[np.bool_] = x_TM**2 + y_TM**2 < allowed_T1
    return follows


def _fitted(
    maps_T23: NDArray[np.float32],
    follows_TM: NDArray[np.bool_],
    query: Patches,
    reference: Patches,
    query_M2: NDArray[np.float32],
    reference_M2: NDArray[np.float32],
) -> list[Map]:
    """For each map the affine one of all matches that follow it, by least squares, where as many follow that."""
    points_M3 = np.column_stack([query_M2, np.ones(len(query_M2))])
    # All at once and without a decomposition: LAPACK's would wake all processors for each map.
    normal_T33 = np.einsum("tm,mi,mj->tij", follows_TM, points_M3, points_M3) + _RIDGE * np.eye(3)
    right_T32 = np.einsum("tm,mi,mj->tij", follows_TM, points_M3, reference_M2)
    fitted_T23 = np.linalg.solve(normal_T33, right_T32).transpose(0, 2, 1).astype(np.float32)
    num_following_T = follows_TM.sum(axis=1)
    is_as_good_T = (
        (num_following_T >= _MIN_INLIERS_TO_FIT)
        & _is_plausible(fitted_T23, query.aspect, reference.aspect)
        & (_follows(fitted_T23, query_M2, reference_M2, _tolerance(reference)).sum(axis=1) >= num_following_T)
    )
    chosen_T23 = np.where(is_as_good_T[:, None, None], fitted_T23, maps_T23).astype(np.float64)
    return [np.vstack([map_23, [0, 0, 1]]) for map_23 in chosen_T23]


@torch.inference_mode()
def _judge(matching: Matching) -> Verification:
    """What the pixels say of the best of the maps."""
    query, reference = matching.query, matching.reference
    pictures = query._blurred, reference._blurred
    given_K23 = torch.from_numpy(_rows(matching.maps))
    refined_K23 = refine(*pictures, given_K23, num_samples=_COARSE_SAMPLES, num_steps=_COARSE_STEPS)
    tried_K23 = _plausible_only(torch.cat([given_K23, refined_K23]), query, reference)
    if not len(tried_K23):  # not even the identity, between pictures of very different aspects
        return NOTHING
    correlation_K = agreement(*pictures, tried_K23, num_samples=_COARSE_SAMPLES).correlation_K
    best_123 = tried_K23[correlation_K.argmax()][None]
    if float(correlation_K.max()) > _HOPELESS:
        finer_123 = refine(*pictures, best_123, num_samples=_FINE_SAMPLES, num_steps=_FINE_STEPS)
        best_123 = _plausible_only(torch.cat([best_123, finer_123]), query, reference)
    fits = agreement(*pictures, best_123, num_samples=_FINE_SAMPLES)
    best = int(fits.correlation_K.argmax())
    if not fits.num_blocks_K[best]:
        return NOTHING
    map_23 = best_123[best].numpy()
    follows_1M = _follows(map_23[None], matching.query_M2, matching.reference_M2, _tolerance(reference))
    num_inliers = int(follows_1M.sum())
    transform = np.vstack([map_23, [0, 0, 1]]).astype(np.float64)
    query_area, reference_area = geometry.shared_areas(transform)
    agreement_frac = float(fits.share_K[best])
    return Verification(
        score=_score(agreement_frac, num_inliers / len(query._middles)),
        num_inliers=num_inliers,
        correlation=float(fits.correlation_K[best]),
        agreement=agreement_frac,
        transform=transform,
        query_area=query_area,
        reference_area=reference_area,
    )


def _plausible_only(maps_K23: Tensor, query: Patches, reference: Patches) -> Tensor:
    maps = maps_K23.numpy()
    is_sound = np.isfinite(maps).all(axis=(1, 2))
    return maps_K23[torch.from_numpy(is_sound & _is_plausible(maps, query.aspect, reference.aspect))]


def _score(agreement_frac: float, inliers_frac: float) -> float:
    """Logistic regression on 960 edited copies and 3,840 pictures that are most alike to them (see the README).

    inliers_frac: of the query's patches. Counts are those of 16 x 16 patches, whatever the model has.
    """
    logit = _BIAS + _PER_AGREEMENT * agreement_frac + _PER_LOG_INLIERS * math.log1p(256 * inliers_frac)
    return 1 / (1 + math.exp(-logit))
