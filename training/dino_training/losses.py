"""What the student is trained towards: distributions over prototypes, or projections, across the views of an image.

Shapes: B images, G views that the teacher saw, V views that the student saw (the G first, in the same order),
K prototypes, C channels of the projection, N negatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

SINKHORN_ITERATIONS = 3


def cross_entropy(student_logits_VBK: Tensor, targets_GBK: Tensor, temperature: float) -> Tensor:
    """Mean over images and over all pairs (teacher view, another view of the student) of H(target, student).

    targets_GBK: distributions. Equations 1 to 3 of arXiv 2104.14294; a scalar in nats.
    """
    log_probs_VBK = F.log_softmax(student_logits_VBK / temperature, dim=-1)
    return -(_targets_of_other_views(targets_GBK, len(student_logits_VBK)) * log_probs_VBK).sum() / (
        num_pairs(len(targets_GBK), len(student_logits_VBK)) * targets_GBK.shape[1]
    )


def kl_divergence(student_logits_VBK: Tensor, targets_GBK: Tensor, temperature: float) -> Tensor:
    """The cross-entropy minus the targets' own entropy: the same gradients, and 0 where the two agree."""
    return cross_entropy(student_logits_VBK, targets_GBK, temperature) - entropy(targets_GBK).mean()


def squared_distance(student_projections_VBC: Tensor, teacher_projections_GBC: Tensor) -> Tensor:
    """Mean over images and pairs of |s - t|^2 = 2 - 2 cos, of projections of unit length (BYOL, arXiv 2006.07733)."""
    targets_VBC = _targets_of_other_views(teacher_projections_GBC, len(student_projections_VBC))
    pairs = num_pairs(len(teacher_projections_GBC), len(student_projections_VBC))
    return 2 - 2 * (targets_VBC * student_projections_VBC).sum() / (pairs * teacher_projections_GBC.shape[1])


def infonce(
    student_projections_VBC: Tensor,
    teacher_projections_GBC: Tensor,
    temperature: float,
    *,
    others_GNC: Tensor | None = None,
    negatives_NC: Tensor | None = None,
) -> Tensor:
    """Mean over images and pairs of the cross-entropy of finding an image's teacher projection among all others.

    All projections have unit length. others_GNC: teacher projections of the other processes' images in the batch;
    negatives_NC: those of earlier images (MoCo, arXiv 1911.05722).
    """
    num_views, num_images, _ = student_projections_VBC.shape
    own_B = torch.arange(num_images, device=student_projections_VBC.device)
    total = student_projections_VBC.new_zeros(())
    for g, teacher_BC in enumerate(teacher_projections_GBC):
        keys = [teacher_BC]
        keys += [others_GNC[g]] if others_GNC is not None else []
        keys += [negatives_NC] if negatives_NC is not None else []
        keys_NC = torch.cat(keys)
        for v, student_BC in enumerate(student_projections_VBC):
            if v != g:
                total = total + F.cross_entropy(student_BC @ keys_NC.T / temperature, own_B)
    return total / num_pairs(len(teacher_projections_GBC), num_views)


def contrast_with_stored(
    student_VBC: Tensor, teacher_BC: Tensor, negatives_NC: Tensor, same_BN: Tensor, temperature: float
) -> Tensor:
    """infonce of every view against the stored embedding of its own image and those of other images.

    same_BN: True where a negative is the image itself, which is then left out.
    """
    losses = []
    for student_BC in student_VBC:
        positive_B1 = (student_BC * teacher_BC).sum(dim=-1, keepdim=True)
        negative_BN = (student_BC @ negatives_NC.T).masked_fill(same_BN, -math.inf)
        logits_BM = torch.cat([positive_B1, negative_BN], dim=1) / temperature
        losses.append(F.cross_entropy(logits_BM, logits_BM.new_zeros(len(logits_BM), dtype=torch.long)))
    return torch.stack(losses).mean()


def distance_to_stored(student_VBC: Tensor, teacher_BC: Tensor) -> Tensor:
    """squared_distance of every view to the stored embedding of its image."""
    return 2 - 2 * (student_VBC * teacher_BC).sum(dim=-1).mean()


def koleo(features_BD: Tensor) -> Tensor:
    """Minus the mean log distance of each unit-length feature to its nearest neighbour in the batch.

    As DINOv2 spreads features (arXiv 2304.07193, after arXiv 1806.03198). 0 for a single image.
    """
    if len(features_BD) < 2:
        return features_BD.new_zeros(())
    unit_BD = F.normalize(features_BD.float(), dim=-1, eps=1e-8)
    cosines_BB = (unit_BD @ unit_BD.T).detach()
    nearest_B = cosines_BB.fill_diagonal_(-math.inf).argmax(dim=1)
    distances_B = F.pairwise_distance(unit_BD, unit_BD[nearest_B], eps=1e-8)
    spreading: Tensor = -torch.log(distances_B + 1e-8).mean()
    return spreading


def sinkhorn(logits_GBK: Tensor, temperature: float, add_up: Callable[[Tensor], Tensor] = lambda part: part) -> Tensor:
    """targets_GBK by Sinkhorn-Knopp: each prototype gets the same share of the batch (SwAV, arXiv 2006.09882).

    Each view is balanced by itself. add_up: sums a tensor over all processes.
    """
    _, num_images, num_prototypes = logits_GBK.shape
    logits_GBK = logits_GBK.double() / temperature
    log_sums_GB1 = logits_GBK.logsumexp(dim=-1, keepdim=True)
    # The first division counts rows by their sums. A factor that a whole view shares is divided out again, so sums are
    # taken relative to their mean, which all processes agree on: exp stays finite at any logits.
    mean_G11 = add_up(log_sums_GB1.sum(dim=1, keepdim=True)) / add_up(torch.full_like(log_sums_GB1[:, :1], num_images))
    shares_GBK = torch.exp(logits_GBK - log_sums_GB1) * torch.exp((log_sums_GB1 - mean_G11).clamp(-300, 300))
    for _ in range(SINKHORN_ITERATIONS):
        shares_GBK = shares_GBK / (add_up(shares_GBK.sum(dim=1, keepdim=True)).clamp(min=1e-300) * num_prototypes)
        shares_GBK = shares_GBK / shares_GBK.sum(dim=-1, keepdim=True)
    return shares_GBK.float()


def entropy(probs: Tensor) -> Tensor:
    """Entropy in nats over the last dimension."""
    summed: Tensor = torch.special.entr(probs).sum(dim=-1)
    return summed


def num_pairs(num_teacher_views: int, num_student_views: int) -> int:
    """Pairs of a teacher's view and another one of the student's."""
    return num_teacher_views * num_student_views - num_teacher_views


def _targets_of_other_views(targets_G: Tensor, num_views: int) -> Tensor:
    """For each view of the student, the sum of the targets of the teacher's views other than itself."""
    total = targets_G.sum(dim=0)
    return torch.stack([total - targets_G[v] if v < len(targets_G) else total for v in range(num_views)])
