"""Descriptors of a picture from one forward pass: the [CLS] token and GeM-pooled patch tokens.

Shapes: B pictures, N patch tokens, D channels; h x w patches, P channels of a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_index.model_files import Pooling

GEM_POWER = 4.0
GEM_FLOOR = 1e-6
# Of architectures whose maps shrink: the last one that is no coarser than this many pixels a patch tells where.
_COARSEST_PATCH_PX = 16


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


def descriptors_and_patches(model: nn.Module, pictures_BCHW: Tensor, pooling: Pooling) -> tuple[Tensor, Tensor, Tensor]:
    """(cls_BD, gem_BD, patches_BhwP): `descriptors`, and of the same pass what tells patches of a picture apart.

    A patch's vector is float32 and of unit length. Of a Vision Transformer it joins the tokens of the blocks at a third
    and at two thirds of the depth: earlier ones know better where they are than the last, which agree on the subject.
    Of an architecture whose maps shrink it is the last map with patches of no more than 16 px.
    """
    stages = _patch_stages(model)
    if stages is None:
        features = model.forward_features(pictures_BCHW)  # type: ignore[operator]
        maps_BPhw = [_last_map(model, features)]
    else:
        features, maps_BPhw = model.forward_intermediates(  # type: ignore[operator]
            pictures_BCHW, indices=stages, norm=False, output_fmt="NCHW"
        )
    return *descriptors_of(model, features, pooling), _joined(maps_BPhw)


def patches(model: nn.Module, pictures_BCHW: Tensor) -> Tensor:
    """patches_BhwP of `descriptors_and_patches` alone, of a pass that ends with the last block that they are from."""
    stages = _patch_stages(model)
    if stages is None:
        return _joined([_last_map(model, model.forward_features(pictures_BCHW))])  # type: ignore[operator]
    maps_BPhw = model.forward_intermediates(  # type: ignore[operator]
        pictures_BCHW, indices=stages, norm=False, output_fmt="NCHW", stop_early=True, intermediates_only=True
    )
    return _joined(maps_BPhw)


def _joined(maps_BPhw: Sequence[Tensor]) -> Tensor:
    """patches_BhwP, float32 and of unit length, to which all maps contribute alike."""
    # Channels come last before anything is computed: this is done for every view of every query.
    parts_BhwP = [
        F.normalize(map_BPhw.permute(0, 2, 3, 1).to(torch.float32, memory_format=torch.contiguous_format), dim=3)
        for map_BPhw in maps_BPhw
    ]
    return torch.cat(parts_BhwP, dim=3).div_(len(parts_BhwP) ** 0.5)


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


def _patch_stages(model: nn.Module) -> list[int] | None:
    """Which of the maps that timm counts `descriptors_and_patches` takes; None where only the last can be had."""
    infos: Any = getattr(model, "feature_info", None)
    if not infos or not hasattr(model, "forward_intermediates"):
        return None
    patch_sizes = [int(info["reduction"]) for info in infos]
    if len(set(patch_sizes)) == 1:
        depth = len(patch_sizes)
        return sorted({max(1, depth // 3) - 1, max(1, 2 * depth // 3) - 1})
    return [max((stage for stage, size in enumerate(patch_sizes) if size <= _COARSEST_PATCH_PX), default=0)]


def _last_map(model: nn.Module, features: Tensor) -> Tensor:
    """The patch tokens of `forward_features` as a map; those of no rectangle that is known of become one row."""
    if features.ndim == 4:
        return features.permute(0, 3, 1, 2) if getattr(model, "output_fmt", "NCHW") == "NHWC" else features
    tokens_BND = _patch_tokens(model, features)
    side = round(tokens_BND.shape[1] ** 0.5)
    height = side if side * side == tokens_BND.shape[1] else 1
    return tokens_BND.transpose(1, 2).reshape(len(tokens_BND), tokens_BND.shape[2], height, -1)
