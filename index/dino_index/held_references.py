"""Copy vectors in this machine's memory, all of which are compared with a query's views.

Shapes: V views of one query, N vectors, P of them in a part, K chosen ones, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

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


class HeldReferences:
    """See `CopyReferences`."""

    def __init__(self, vectors: Vectors) -> None:
        """vectors: those of one image are itself, first, and its regions."""
        self._vectors = vectors
        self._has_regions = len(np.unique(vectors.ids_N)) < len(vectors)
        # All rows against a few views are matrix products, which torch does five times as fast as FAISS's exact index.
        self._dtype = torch.bfloat16 if bfloat16_is_faster() else torch.float32
        self._parts = [
            torch.from_numpy(extended_references(vectors.vectors_ND[begin : begin + _ROWS_PER_PART])).to(self._dtype)
            for begin in range(0, len(vectors), _ROWS_PER_PART)
        ]

    def nearest(
        self, views_VC: NDArray[np.float32], biases_V: NDArray[np.float32], num_images: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        number = num_images * (_REGIONS_PER_PLACE if self._has_regions else 1) + _NUM_SPARE
        positions_K = self._positions(torch.from_numpy(extended_queries(views_VC, biases_V)), number)
        return self._vectors.ids_N[positions_K], self._vectors.vectors_ND[positions_K]

    def vectors_of(self, image_ids: Sequence[int]) -> NDArray[np.float32]:
        positions = [int(np.flatnonzero(self._vectors.ids_N == image_id)[0]) for image_id in image_ids]
        vectors_NC: NDArray[np.float32] = self._vectors.vectors_ND[positions]
        return vectors_NC

    def _positions(self, queries_VC: Tensor, number: int) -> NDArray[np.int64]:
        """positions_K of the vectors with the largest product with any of the queries, in no order.

        As far as they are told apart in this precision.
        """
        queries_VC = queries_VC.to(self._dtype)
        scores: list[Tensor] = []
        positions: list[Tensor] = []
        for part, vectors_PC in enumerate(self._parts):
            best_P = (queries_VC @ vectors_PC.T).amax(dim=0).float()
            scores_K, positions_K = best_P.topk(min(number, len(vectors_PC)))
            scores.append(scores_K)
            positions.append(positions_K + part * _ROWS_PER_PART)
        if not scores:
            return np.empty(0, np.int64)
        chosen_K = torch.cat(scores).topk(min(number, sum(map(len, scores)))).indices
        nearest_K: NDArray[np.int64] = torch.cat(positions)[chosen_K].numpy()
        return nearest_K
