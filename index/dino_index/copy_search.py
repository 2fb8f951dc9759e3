"""Candidates for what a query is a copy of: references like any of its views, less what resembles everything.

Shapes: V views of one query, N reference vectors, P of them in a part, K candidates, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dino_index.copy_descriptors import CopyDescriptor
from dino_index.matrix_products import bfloat16_is_faster, product
from dino_index.score_normalisation import extended_queries, extended_references
from dino_index.snapshots import Vectors

_SCORE_DECIMALS = 6
# Regions of the same images take this many times as many places as images are wanted, if not more.
_REGIONS_PER_PLACE = 4
# Rounded products only choose: as many more are compared exactly.
_NUM_SPARE = 32
_ROWS_PER_PART = 1 << 17


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A reference that some view of the query resembles. score: cosine less the view's bias."""

    image_id: int
    score: float
    cosine: float
    """Of the view with the best score."""
    views: tuple[int, ...]
    """Positions of all views among the query's, the one with the best score first."""


class CopySearch:
    """The copy vectors of a collection, ready to be searched, in any thread."""

    def __init__(self, references: Vectors, descriptor: CopyDescriptor) -> None:
        """references: copy vectors; those of one image are itself, first, and its regions."""
        self._references = references
        self._has_regions = len(np.unique(references.ids_N)) < len(references)
        self._descriptor = descriptor
        # All rows against a few views are matrix products, which torch does five times as fast as FAISS's exact index.
        self._dtype = torch.bfloat16 if bfloat16_is_faster() else torch.float32
        self._parts = [
            torch.from_numpy(extended_references(references.vectors_ND[begin : begin + _ROWS_PER_PART])).to(self._dtype)
            for begin in range(0, len(references), _ROWS_PER_PART)
        ]

    def cosine(self, first_id: int, second_id: int) -> float:
        """Of the copy vectors of two images that are there, whole."""
        first, second = (
            int(np.flatnonzero(self._references.ids_N == image_id)[0]) for image_id in (first_id, second_id)
        )
        return float(self._references.vectors_ND[first] @ self._references.vectors_ND[second])

    def candidates(self, cls_VD: NDArray[np.float16], gem_VD: NDArray[np.float16], k: int) -> list[Candidate]:
        """The k best references of one query; best first, ties by id.

        cls_VD, gem_VD: raw vectors of the query's views.
        """
        views_VC = self._descriptor.vectors(cls_VD, gem_VD)
        biases_V = self._descriptor.biases(views_VC)
        num_fetched = k * (_REGIONS_PER_PLACE if self._has_regions else 1) + _NUM_SPARE
        positions_K = self._nearest(torch.from_numpy(extended_queries(views_VC, biases_V)), num_fetched)
        ids_K = self._references.ids_N[positions_K]
        cosines_KV = product(self._references.vectors_ND[positions_K], views_VC.T)
        scores_KV = np.round(cosines_KV - biases_V, _SCORE_DECIMALS)
        best: dict[int, Candidate] = {}
        for row, image_id in enumerate(ids_K.tolist()):
            views = np.argsort(-scores_KV[row], kind="stable")
            score = float(scores_KV[row, views[0]])
            if image_id not in best or best[image_id].score < score:
                cosine = round(float(cosines_KV[row, views[0]]), _SCORE_DECIMALS)
                best[image_id] = Candidate(image_id=image_id, score=score, cosine=cosine, views=tuple(views.tolist()))
        return sorted(best.values(), key=lambda candidate: (-candidate.score, candidate.image_id))[:k]

    def _nearest(self, queries_VC: Tensor, number: int) -> NDArray[np.int64]:
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
