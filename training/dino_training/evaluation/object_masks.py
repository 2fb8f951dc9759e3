"""How well attention finds the object: masks of heads against given masks (arXiv 2104.14294, section 4.2.2, figure 4).

The paper compares them on the validation pictures of PASCAL VOC 2012. Given masks are PNG files that are named as their
pictures.

Shapes: H heads, h x w patches, Y x X pixels of the picture, N pictures.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dino_index.attention_masks import ObjectMask, enlarge, jaccard, keep_mass, shares_on_object
from dino_index.errors import EvaluationImpossible, SourceNotFound
from dino_index.images import ReadLimits, opened, read_file
from dino_training.evaluation.bootstrap import interval_of_mean
from dino_training.evaluation.results import EvaluationResult, Figure

# Border and difficult pixels in the masks of PASCAL VOC, which are the only ones with a palette.
_VOC_VOID = 255


class MaskFolder:
    """Masks by the names of the pictures: `NAME.png` at the picture's place below DIR, else directly in DIR."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        """names: of all pictures, without suffix, with `/`. Raises SourceNotFound."""
        if not folder.is_dir():
            raise SourceNotFound(f"expected a folder of masks, found none at {folder}; name one that holds PNG files")
        self.folder = folder
        stems = Counter(_stem(name) for name in names)
        self._shared = {stem for stem, number in stems.items() if number > 1}

    def find(self, name: str) -> Path | None:
        """The mask of a picture. None also for one in DIR itself that several pictures could mean."""
        stem = _stem(name)
        if stem != name and os.path.isfile(beside := self.folder / f"{name}.png"):
            return beside
        alone = self.folder / f"{stem}.png"
        return alone if stem not in self._shared and os.path.isfile(alone) else None

    def require_any(self, names: Sequence[str]) -> None:
        """Raises EvaluationImpossible where not one of these pictures has a mask."""
        if not any(map(self.find, names)):
            example = f", such as {names[0]}.png" if names else ""
            raise EvaluationImpossible(
                f"expected masks named as the pictures in {self.folder}{example}, found none for any of {len(names)}; "
                "name another folder with --masks"
            )


def read_mask(path: str | os.PathLike[str], limits: ReadLimits) -> ObjectMask:
    """Whatever is not black, and not transparent, is object. In a file with a palette it is what is not index 0, and
    index 255 is void, as PASCAL VOC has it.

    Raises ImageError.
    """
    with opened(read_file(path, limits).data, limits) as image:
        image.load()
        return _object_mask(image)


def _object_mask(image: Image.Image) -> ObjectMask:
    values = np.asarray(image)
    object_YX: NDArray[np.bool_]
    void_YX: NDArray[np.bool_] = np.zeros((image.height, image.width), bool)
    if image.mode == "P":
        void_YX = values == _VOC_VOID
        object_YX = (values > 0) & ~void_YX
    elif image.mode in ("LA", "RGBA"):
        object_YX = (values[..., :-1].max(axis=-1) > 0) & (values[..., -1] > 0)
    else:
        object_YX = values.reshape(image.height, image.width, -1).max(axis=-1) > 0
    return ObjectMask(object_YX=object_YX, void_YX=void_YX)


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskScores:
    """Of one picture. jaccard_H: of each head's mask; on_object_H: share of each head's attention to patches."""

    jaccard_H: NDArray[np.float64]
    on_object_H: NDArray[np.float64]
    object_area: float

    @classmethod
    def of(cls, maps_Hhw: NDArray[np.floating], truth: ObjectMask, mass: float) -> MaskScores:
        """truth: in the picture's own size, with an object."""
        return cls(
            jaccard_H=np.array([jaccard(enlarge(mask_hw, truth.size), truth) for mask_hw in keep_mass(maps_Hhw, mass)]),
            on_object_H=shares_on_object(maps_Hhw, truth),
            object_area=truth.object_area,
        )

    def to_json(self) -> dict[str, Any]:
        on_object = float(self.on_object_H.mean())
        return {
            "jaccard": self.jaccard_H.tolist(),
            "best_head": int(self.jaccard_H.argmax()),
            "attention_on_object": on_object,
            "attention_on_background": 1 - on_object,
            "attention_on_object_of_heads": self.on_object_H.tolist(),
            "object_area": self.object_area,
        }


def mask_result(scores_N: Sequence[MaskScores], *, protocol: str, mass: float, seed: int = 0) -> EvaluationResult:
    """Means over pictures: Jaccard of each head and of the best head of each picture, and where attention lies.

    The best head is chosen knowing the mask, as the paper does: no way to find objects, but a bound. Raises
    EvaluationImpossible where no picture has a mask.
    """
    if not scores_N:
        raise EvaluationImpossible(
            "expected masks with an object, found none that can be read; what is not black in a mask is the object"
        )
    jaccard_NH = np.stack([scores.jaccard_H for scores in scores_N])
    on_object_N = np.array([scores.on_object_H.mean() for scores in scores_N])

    def figure(keys: tuple[str, ...], values_N: NDArray[np.float64]) -> Figure:
        return Figure(keys=keys, value=float(values_N.mean()), interval=interval_of_mean(values_N, seed=seed))

    return EvaluationResult(
        protocol=protocol,
        figures=[
            figure(("jaccard", "best_head"), jaccard_NH.max(axis=1)),
            *(figure(("jaccard", str(head)), values_N) for head, values_N in enumerate(jaccard_NH.T)),
            figure(("attention", "object"), on_object_N),
            figure(("attention", "background"), 1 - on_object_N),
            figure(("object_area",), np.array([scores.object_area for scores in scores_N])),
        ],
        facts={"masks": len(scores_N), "mass": mass, "seed": seed},
        remarks=[
            f"{len(scores_N)} pictures with a mask; best_head is the best of each picture, chosen by its mask",
            "object_area is what attention that is spread evenly would put on the object",
        ],
    )


def _stem(name: str) -> str:
    return name.rpartition("/")[2]
