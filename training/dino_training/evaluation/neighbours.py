"""The nearest of many vectors to many queries: exact, in float32, a block at a time.

Shapes: Q queries, N vectors, D channels, K neighbours, B vectors in a block, G groups of them, M members of a group.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# 256 queries against 128k vectors are products of 128 MB.
_QUERIES_PER_BLOCK = 512
_VECTORS_PER_BLOCK = 1 << 17
_GROUP = 16


def nearest_in_blocks(queries_QD: Tensor, vectors_ND: Tensor, k: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(scores_QK, positions_QK) of block after block of the queries: the k largest inner products, largest first.

    Both float32 and on one device. k: 1 or more; K is the number of vectors where they are fewer.
    Of vectors with equal products at the last place, which one is taken does not depend on the run.
    """
    for queries in torch.split(queries_QD, _QUERIES_PER_BLOCK):
        scores, positions = _nearest(queries, vectors_ND, k)
        yield scores, positions


def _nearest(queries_QD: Tensor, vectors_ND: Tensor, k: int) -> tuple[Tensor, Tensor]:
    best_scores: list[Tensor] = []
    best_positions: list[Tensor] = []
    for number, block_BD in enumerate(torch.split(vectors_ND, _VECTORS_PER_BLOCK)):
        scores_QK, positions_QK = _largest(queries_QD @ block_BD.T, k)
        best_scores.append(scores_QK)
        best_positions.append(positions_QK + number * _VECTORS_PER_BLOCK)
    if len(best_scores) == 1:
        return best_scores[0], best_positions[0]
    all_scores = torch.cat(best_scores, dim=1)
    scores_QK, places_QK = all_scores.topk(min(k, all_scores.shape[1]))
    return scores_QK, torch.cat(best_positions, dim=1).gather(1, places_QK)


def _largest(scores_QB: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What `scores_QB.topk(k)` gives, for many columns in a third of the time.

    The k largest lie in the k groups with the largest maxima, and taking maxima is much quicker than ranking.
    """
    num_columns = scores_QB.shape[1]
    num_groups = num_columns // _GROUP
    if num_groups < 4 * k:
        return scores_QB.topk(min(k, num_columns))
    num_grouped = num_groups * _GROUP
    grouped_QMG = scores_QB[:, :num_grouped].view(len(scores_QB), _GROUP, num_groups)
    groups_QK = grouped_QMG.amax(dim=1).topk(k, sorted=False).indices
    columns_QC = groups_QK.new_empty(len(scores_QB), k * _GROUP + num_columns - num_grouped)
    firsts_M = num_groups * torch.arange(_GROUP, device=scores_QB.device)
    members_QMK = columns_QC[:, : k * _GROUP].view(len(scores_QB), _GROUP, k)
    torch.add(groups_QK[:, None], firsts_M[:, None], out=members_QMK)
    columns_QC[:, k * _GROUP :] = torch.arange(num_grouped, num_columns, device=scores_QB.device)
    values_QK, places_QK = scores_QB.gather(1, columns_QC).topk(k)
    return values_QK, columns_QC.gather(1, places_QK)
