"""The runs of the ablations, what each changes of a recipe, and what is published of it.

Published are tables 2, 7 and 9 and figure 6 of arXiv 2104.14294, on ImageNet.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from dino_index.errors import RecipeError
from dino_training.recipe import Recipe, load_recipe

BASE = "dino"
_FOLDER = "ablation"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One run. what: in words. knn, linear: published top-1, 0..1. change: the base recipe as this run has it."""

    name: str
    what: str
    knn: float | None = None
    linear: float | None = None
    change: Callable[[Recipe], Recipe]

    def recipe(self, base: Recipe) -> Recipe:
        """Raises RecipeError where base and change do not go together."""
        return replace(self.change(base), name=f"{base.name}/{self.name}")


def recipe_changes(name: str) -> dict[str, Any]:
    """What the shipped recipe `ablation/NAME` has other than `ablation/dino`, by key."""
    base, changed = load_recipe(f"{_FOLDER}/{BASE}"), load_recipe(f"{_FOLDER}/{name}")
    keys = [field.name for field in fields(Recipe) if field.name != "name"]
    return {key: getattr(changed, key) for key in keys if getattr(changed, key) != getattr(base, key)}


def patch_size_of(recipe: Recipe) -> int:
    """Side of the backbone's patches in pixels. Raises RecipeError for one whose name and arguments tell none."""
    if isinstance(found := recipe.architecture_args.get("patch_size"), int):
        return found
    if (named := re.search(r"patch(\d+)", recipe.architecture)) is not None:
        return int(named[1])
    raise RecipeError(
        f"expected a vision transformer with a patch size, found {recipe.architecture}; leave this run out"
    )


def _shipped(name: str) -> Callable[[Recipe], Recipe]:
    return lambda base: replace(base, **recipe_changes(name))


def _half_patches(base: Recipe) -> Recipe:
    size = patch_size_of(base)
    if size % 2:
        raise RecipeError(f"expected an even patch size to halve, found {size}; leave this run out")
    return replace(base, architecture_args=base.architecture_args | {"patch_size": size // 2})


def _part_of_batch(parts: int) -> Callable[[Recipe], Recipe]:
    def change(base: Recipe) -> Recipe:
        if base.batch_size % parts:
            raise RecipeError(f"expected a batch_size that {parts} divides, found {base.batch_size}; --set another")
        return replace(base, batch_size=base.batch_size // parts, **recipe_changes("no_multi_crop"))

    return change


VARIANTS = (
    Variant(name=BASE, what="the recipe as it is; momentum teacher", knn=0.728, linear=0.761, change=_shipped("dino")),
    Variant(
        name="no_momentum", what="the student is its own teacher", knn=0.001, linear=0.001,
        change=_shipped("no_momentum"),
    ),
    Variant(
        name="teacher_previous_iteration", what="the teacher is the student one step ago", knn=0.001,
        change=_shipped("teacher_previous_iteration"),
    ),
    Variant(
        name="teacher_previous_epoch", what="the teacher is the student one epoch ago", knn=0.666,
        change=_shipped("teacher_previous_epoch"),
    ),
    Variant(
        name="sinkhorn", what="Sinkhorn-Knopp instead of the center", knn=0.722, linear=0.760,
        change=_shipped("sinkhorn"),
    ),
    Variant(
        name="no_multi_crop", what="the two global views alone", knn=0.679, linear=0.725,
        change=_shipped("no_multi_crop"),
    ),
    Variant(name="mse", what="squared distance, no cross-entropy", knn=0.526, linear=0.624, change=_shipped("mse")),
    Variant(name="predictor", what="a predictor on the student", knn=0.718, linear=0.756, change=_shipped("predictor")),
    Variant(name="byol", what="BYOL", knn=0.666, linear=0.714, change=_shipped("byol")),
    Variant(name="mocov2", what="MoCo v2", knn=0.620, linear=0.716, change=_shipped("mocov2")),
    Variant(name="swav", what="SwAV", knn=0.647, linear=0.718, change=_shipped("swav")),
    Variant(name="no_centring", what="sharpening alone", change=_shipped("no_centring")),
    Variant(name="no_sharpening", what="centring alone", change=_shipped("no_sharpening")),
    Variant(
        name="half_patches", what="half the patch size (published: ViT-S/8; ViT-S/16 of table 2 has 74.5 / 77.0)",
        knn=0.783, linear=0.797, change=_half_patches,
    ),
    Variant(
        name="half_batch", what="no multi-crop, 1/2 of the batch (published: 512; 1,024 of table 9 has 59.9)",
        knn=0.596, change=_part_of_batch(2),
    ),
    Variant(
        name="quarter_batch", what="no multi-crop, 1/4 of the batch (published: 256)", knn=0.591,
        change=_part_of_batch(4),
    ),
    Variant(
        name="eighth_batch", what="no multi-crop, 1/8 of the batch (published: 128)", knn=0.579,
        change=_part_of_batch(8),
    ),
)  # fmt: skip
"""In the order in which they run."""
