"""Copy vectors in this machine's memory, all of which are compared with a query's views.

Shapes: V views of one query, N vectors, P of them in a part, K chosen ones, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dino_index.matrix_products import bfloat16_is_faster
from dino_index.score_normalisation import extended_queries, extended_references
from dino_index.snapshots import Vectors

# Regions of the same images take this many times as many places as images are wanted, if not more.
_REGIONS_PER_PLACE = 4
# Rounded products only choose: as many more are compared exactly.
_NUM_SPARE = 32
_ROWS_PER_PART = 1 << 17


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Which vectors of a catalog some are: as of one generation of a collection."""

    collection_id: int
    model_id: int
    whitening_sha256: bytes | None
    generation: int

    def continues(self, earlier: Origin) -> bool:
        """Whether this is a later state of the same."""
        return replace(self, generation=earlier.generation) == earlier and self.generation >= earlier.generation


class HeldReferences:
    """See `CopyReferences`."""

    def __init__(self, vectors: Vectors, origin: Origin | None = None) -> None:
        """vectors: those of one image are itself, first, and its regions. origin: None for other than a catalog's."""
        self.origin = origin
        self._parts = list(_parts_of(vectors))
        self._has_regions = len(np.unique(vectors.ids_N)) < len(vectors)

    def updated(self, present_ids: Sequence[int], changed: Vectors, origin: Origin) -> HeldReferences:
        """The same images at a later time, sharing what has not changed.

        present_ids: all that there are then. changed: those that are new or have another vector; none has regions.
        """
        assert not self._has_regions
        present_N = np.array(present_ids, np.int64)
        parts = []
        for part in self._parts:
            stays_P = np.isin(part.ids_P, present_N) & ~np.isin(part.ids_P, changed.ids_N)
            parts.append(part if stays_P.all() else part[stays_P])
        # What came last grows until it is a part like the others, so that there are not ever more of them.
        if parts and len(parts[-1]) + len(changed) <= _ROWS_PER_PART:
            last = parts.pop()
            changed = Vectors(
                np.concatenate([last.ids_P, changed.ids_N]), np.concatenate([last.vectors_PC, changed.vectors_ND])
            )
        updated = HeldReferences(changed, origin)
        updated._parts = [part for part in parts if len(part)] + updated._parts
        return updated

    def nearest(
        self, views_VC: NDArray[np.float32], biases_V: NDArray[np.float32], num_images: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        number = num_images * (_REGIONS_PER_PLACE if self._has_regions else 1) + _NUM_SPARE
        queries_VC = torch.from_numpy(extended_queries(views_VC, biases_V)).to(_dtype())
        scores: list[Tensor] = []
        ids: list[NDArray[np.int64]] = []
        vectors: list[NDArray[np.float32]] = []
        for part in self._parts:
            best_P = (queries_VC @ part.extended_PC.T).amax(dim=0).float()
            scores_K, positions_K = best_P.topk(min(number, len(part)))
            scores.append(scores_K)
            ids.append(part.ids_P[positions_K.numpy()])
            vectors.append(part.vectors_PC[positions_K.numpy()])
        if not scores:
            return np.empty(0, np.int64), np.empty((0, views_VC.shape[1]), np.float32)
        # As far as they are told apart in this precision.
        chosen_K = torch.cat(scores).topk(min(number, sum(map(len, scores)))).indices.numpy()
        return np.concatenate(ids)[chosen_K], np.concatenate(vectors)[chosen_K]

    def vectors_of(self, image_ids: Sequence[int]) -> NDArray[np.float32]:
        found: dict[int, NDArray[np.float32]] = {}
        for part in self._parts:
            for position in np.flatnonzero(np.isin(part.ids_P, image_ids)).tolist():
                found.setdefault(int(part.ids_P[position]), part.vectors_PC[position])
        return np.stack([found[image_id] for image_id in image_ids])


@dataclass(frozen=True, eq=False, slots=True)
class _Part:
    ids_P: NDArray[np.int64]
    vectors_PC: NDArray[np.float32]
    extended_PC: Tensor
    """The same with one more channel, in what multiplies fastest."""

    def __len__(self) -> int:
        return len(self.ids_P)

    def __getitem__(self, chosen_P: NDArray[np.bool_]) -> _Part:
        return _Part(self.ids_P[chosen_P], self.vectors_PC[chosen_P], self.extended_PC[torch.from_numpy(chosen_P)])


def _parts_of(vectors: Vectors) -> Iterator[_Part]:
    for begin in range(0, len(vectors), _ROWS_PER_PART):
        part = slice(begin, begin + _ROWS_PER_PART)
        extended_PC = torch.from_numpy(extended_references(vectors.vectors_ND[part])).to(_dtype())
        yield _Part(vectors.ids_N[part], vectors.vectors_ND[part], extended_PC)


def _dtype() -> torch.dtype:
    # All rows against a few views are matrix products, which torch does five times as fast as FAISS's exact index.
    return torch.bfloat16 if bfloat16_is_faster() else torch.float32
