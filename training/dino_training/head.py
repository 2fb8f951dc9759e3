"""The projection head, its prototypes, and the predictor that some methods put on top of the student.

Shapes: B views, D channels of the backbone, C channels of the bottleneck, K prototypes.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_index.errors import RecipeError
from dino_training.recipe import Recipe


class ProjectionHead(nn.Module):
    """D -> hidden -> ... -> C, scaled to unit length, -> K (facebookresearch/dino at 7c446df, DINOHead).

    Weights start from a normal of deviation .02 truncated at 2 (in units of the values, so hardly ever), biases from 0;
    the prototypes from PyTorch's default for a linear layer. Without layers, features are scaled to unit length as
    they are.
    """

    def __init__(self, in_features: int, recipe: Recipe) -> None:
        super().__init__()
        assert isinstance(recipe.num_prototypes, int)
        if recipe.head_layers:
            widths = [in_features, *[recipe.head_hidden] * (recipe.head_layers - 1), recipe.head_bottleneck]
            self.mlp = _mlp(widths, recipe.head_batch_norm)
        elif in_features == recipe.head_bottleneck:
            self.mlp = nn.Sequential()
        else:
            raise RecipeError(
                f"head_layers 0 projects the backbone's {in_features} features themselves: expected head_bottleneck "
                f"{in_features} (with a frozen teacher: whiten_dim), found {recipe.head_bottleneck}"
            )
        self.last_layer = (
            Prototypes(recipe.head_bottleneck, recipe.num_prototypes, fixed_length=recipe.norm_last_layer)
            if recipe.uses_prototypes
            else None
        )

    def forward(self, features_BD: Tensor) -> Tensor:
        """projections_BC of unit length. The predictor, if there is one, comes between them and the prototypes."""
        # Outside autocast's reach: lengths are taken in float32.
        return F.normalize(self.mlp(features_BD).float(), dim=-1, eps=1e-6)


class Prototypes(nn.Module):
    """A linear layer without bias whose K weight vectors have length 1 (or a learnt length each)."""

    def __init__(self, in_features: int, num_prototypes: int, *, fixed_length: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.Linear(in_features, num_prototypes, bias=False).weight.detach().clone())
        # Of two dimensions, so that lengths decay like weights, as they do in the reference implementation.
        self.length = None if fixed_length else nn.Parameter(torch.ones(num_prototypes, 1))

    def forward(self, projections_BC: Tensor) -> Tensor:
        """logits_BK: the cosine of each projection and each prototype, times the prototype's length."""
        logits_BK = F.linear(projections_BC, F.normalize(self.weight, dim=-1, eps=1e-12))
        return logits_BK if self.length is None else logits_BK * self.length.T


class Predictor(nn.Module):
    """C -> hidden -> C, scaled to unit length: predicts the teacher's projection from the student's."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.mlp = _mlp([recipe.head_bottleneck, recipe.head_hidden, recipe.head_bottleneck], recipe.head_batch_norm)

    def forward(self, projections_BC: Tensor) -> Tensor:
        return F.normalize(self.mlp(projections_BC).float(), dim=-1, eps=1e-6)


def _mlp(widths: list[int], batch_norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width, next_width in itertools.pairwise(widths[:-1]):
        layers.append(_linear(width, next_width))
        if batch_norm:
            layers.append(nn.BatchNorm1d(next_width))
        layers.append(nn.GELU())
    return nn.Sequential(*layers, _linear(widths[-2], widths[-1]))


def _linear(in_features: int, out_features: int) -> nn.Linear:
    layer = nn.Linear(in_features, out_features)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer
