"""Weighted k-NN classification of many queries at once (arXiv 2104.14294, section 4.1).

The vote is that of `dino_index.knn.vote`: a neighbour weighs exp(cosine / temperature), ties go to the class that comes
first.

Shapes: Q queries, N training images, K neighbours, L classes, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dino_training.evaluation.neighbours import nearest_in_blocks

TEMPERATURE = 0.07
KS = (10, 20, 100, 200)
NO_CLASS = -1
# Votes of so many pairs of query and class are in memory at a time.
_MAX_VOTES = 1 << 24


def class_votes(scores_QK: Tensor, classes_QK: Tensor, num_classes: int, temperature: float = TEMPERATURE) -> Tensor:
    """votes_QL: the weight of the neighbours of each class, that of the nearest being 1.

    scores_QK: cosines, largest first. classes_QK: int64, below num_classes.
    """
    weights_QK = torch.exp((scores_QK - scores_QK[:, :1]) / temperature)
    votes_QL = torch.zeros(len(scores_QK), num_classes, device=scores_QK.device)
    return votes_QL.scatter_add_(1, classes_QK, weights_QK)


def places_of(votes_QL: Tensor, classes_Q: Tensor) -> Tensor:
    """places_Q: how many classes come before a query's own, ties by number; -1 where no neighbour voted for it.

    classes_Q: int64, `NO_CLASS` for a class that the votes do not have.
    """
    known_Q = classes_Q != NO_CLASS
    own_Q1 = torch.where(known_Q, classes_Q, 0)[:, None]
    votes_Q1 = votes_QL.gather(1, own_Q1)
    earlier_QL = torch.arange(votes_QL.shape[1], device=votes_QL.device)[None] < own_Q1
    places_Q = ((votes_QL > votes_Q1) | ((votes_QL == votes_Q1) & earlier_QL)).sum(dim=1)
    return torch.where(known_Q & (votes_Q1[:, 0] > 0), places_Q, -1)


def knn_places(
    train_ND: NDArray[np.float32],
    train_classes_N: NDArray[np.int64],
    queries_QD: NDArray[np.float32],
    classes_Q: NDArray[np.int64],
    *,
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
    device: str | torch.device = "cpu",
) -> dict[int, NDArray[np.int64]]:
    """places_Q for each k: at which place the vote of the k nearest has a query's own class; see `places_of`.

    Vectors of unit length. train_classes_N: from 0 on. classes_Q: of the same numbers, `NO_CLASS` for a class without
    a training image. With fewer than k training images all of them vote.
    """
    vectors_ND = torch.from_numpy(train_ND).to(device)
    labels_N = torch.from_numpy(train_classes_N).to(device)
    num_classes = int(train_classes_N.max()) + 1
    own_Q = torch.from_numpy(classes_Q).to(device)
    places: dict[int, list[Tensor]] = {k: [] for k in ks}
    num_voting = max(1, _MAX_VOTES // num_classes)
    begin = 0
    for scores_QK, positions_QK in nearest_in_blocks(torch.from_numpy(queries_QD).to(device), vectors_ND, max(ks)):
        parts = torch.split(scores_QK, num_voting), torch.split(positions_QK, num_voting)
        for scores, positions in zip(*parts, strict=True):
            own = own_Q[begin : begin + len(scores)]
            classes_QK = labels_N[positions]
            for k in ks:
                votes_QL = class_votes(scores[:, :k], classes_QK[:, :k], num_classes, temperature)
                places[k].append(places_of(votes_QL, own))
            begin += len(scores)
    return {k: torch.cat(found).cpu().numpy() for k, found in places.items()}
