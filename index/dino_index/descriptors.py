"""Descriptors of a picture from one forward pass: the [CLS] token and GeM-pooled patch tokens.

Shapes: B pictures, N patch tokens, D channels.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dino_index.model_files import Pooling

GEM_POWER = 4.0
GEM_FLOOR = 1e-6


def descriptors(model: nn.Module, pictures_BCHW: Tensor, pooling: Pooling) -> tuple[Tensor, Tensor]:
    """(cls_BD, gem_BD) in float32: the raw [CLS] after the final norm, and GeM of the patch tokens.

    pictures_BCHW: normalised, in the model's dtype.
    """
    return descriptors_of(model, model.forward_features(pictures_BCHW), pooling)  # type: ignore[operator]


def descriptors_of(model: nn.Module, features: Tensor, pooling: Pooling) -> tuple[Tensor, Tensor]:
    """`descriptors` from what the model's `forward_features` gave."""
    tokens_BND = _patch_tokens(model, features)
    cls_BD = global_token(model, features)
    return cls_BD.float(), gem(tokens_BND.float(), pooling)


def gem(tokens_BND: Tensor, pooling: Pooling) -> Tensor:
    """Generalised-mean pooling with p = 4 of float32 patch tokens.

    `normalised`: tokens are scaled to unit length first and the result is unit length. `reference`: raw tokens
    in, unscaled mean out, as facebookresearch/dino at 7c446df pools for copy detection (eval_copy_detection.py).
    """
    if pooling == "normalised":
        tokens_BND = F.normalize(tokens_BND, dim=-1)
    pooled_BD = tokens_BND.clamp(min=GEM_FLOOR).pow(GEM_POWER).mean(dim=1).pow(1 / GEM_POWER)
    return F.normalize(pooled_BD, dim=-1) if pooling == "normalised" else pooled_BD


def global_token(model: nn.Module, features: Tensor) -> Tensor:
    """The [CLS] token of `forward_features`, raw; for an architecture without one (ResNet-50), its pooled features."""
    if features.ndim == 3 and getattr(model, "cls_token", None) is not None:
        return features[:, 0]
    pooled: Tensor = model.forward_head(features, pre_logits=True)  # type: ignore[operator]
    return pooled.flatten(1)


def _patch_tokens(model: nn.Module, features: Tensor) -> Tensor:
    if features.ndim == 4:
        channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        return features.flatten(1, 2) if channels_last else features.flatten(2).transpose(1, 2)
    return features[:, int(getattr(model, "num_prefix_tokens", 0)) :]
