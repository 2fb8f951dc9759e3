"""Candidates for what a query is a copy of: references like any of its views, less what resembles everything.

Shapes: V views of one query, K candidates, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dino_index.copy_descriptors import CopyDescriptor
from dino_index.matrix_products import product

_SCORE_DECIMALS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A reference that some view of the query resembles. score: cosine less the view's bias."""

    image_id: int
    score: float
    cosine: float
    """Of the view with the best score."""
    views: tuple[int, ...]
    """Positions of all views among the query's, the one with the best score first."""


class CopyReferences(Protocol):
    """The copy vectors of a collection, in memory or on a server. For any thread."""

    def nearest(
        self, views_VC: NDArray[np.float32], biases_V: NDArray[np.float32], num_images: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """(ids_K, vectors_KC): those most like any of the views, likeness being cosine less the view's bias.

        Enough for that many different images, in no order, and some more, as what chooses them may be coarse.
        """
        ...

    def vectors_of(self, image_ids: Sequence[int]) -> NDArray[np.float32]:
        """Of whole images that are there, in that order."""
        ...


class CopySearch:
    """References that are searched with one descriptor, in any thread."""

    def __init__(self, references: CopyReferences, descriptor: CopyDescriptor) -> None:
        self._references = references
        self._descriptor = descriptor

    def cosine(self, first_id: int, second_id: int) -> float:
        """Of the copy vectors of two images that are there, whole."""
        first_C, second_C = self._references.vectors_of([first_id, second_id])
        return float(first_C @ second_C)

    def candidates(self, cls_VD: NDArray[np.float16], gem_VD: NDArray[np.float16], k: int) -> list[Candidate]:
        """The k best references of one query; best first, ties by id.

        cls_VD, gem_VD: raw vectors of the query's views.
        """
        views_VC = self._descriptor.vectors(cls_VD, gem_VD)
        biases_V = self._descriptor.biases(views_VC)
        ids_K, vectors_KC = self._references.nearest(views_VC, biases_V, k)
        cosines_KV = product(vectors_KC, views_VC.T)
        scores_KV = np.round(cosines_KV - biases_V, _SCORE_DECIMALS)
        best: dict[int, Candidate] = {}
        for row, image_id in enumerate(ids_K.tolist()):
            views = np.argsort(-scores_KV[row], kind="stable")
            score = float(scores_KV[row, views[0]])
            if image_id not in best or best[image_id].score < score:
                cosine = round(float(cosines_KV[row, views[0]]), _SCORE_DECIMALS)
                best[image_id] = Candidate(image_id=image_id, score=score, cosine=cosine, views=tuple(views.tolist()))
        return sorted(best.values(), key=lambda candidate: (-candidate.score, candidate.image_id))[:k]
