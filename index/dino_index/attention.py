"""Where a vision transformer looks: attention of its [CLS] token to the patches of a picture.

Shapes: B pictures, C channels, H x W pixels, N tokens, h x w patches.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dino_index.errors import AttentionUnavailable


def has_attention(model: nn.Module) -> bool:
    """Whether `attention_maps` can be taken: timm's plain ViTs with a [CLS] token, of any size."""
    return _last_attention(model) is not None


@torch.no_grad()
def attention_maps(model: nn.Module, pictures_BCHW: Tensor) -> Tensor:
    """maps_BHhw, float32: how much the [CLS] token attends to each patch in the last block, H being its heads.

    pictures_BCHW: normalised, in the model's dtype; any size that the model takes. A map sums to 1 less what goes to
    [CLS] itself and to register tokens. The model is not changed, and may compute attention in fused kernels: they
    give no weights, so those of the one query are computed again from the block's input. A model with dropout of
    patches must be in evaluation mode.
    Raises AttentionUnavailable for a model without such attention, such as a ResNet.
    """
    attention = _last_attention(model)
    if attention is None:
        raise AttentionUnavailable(
            f"attention maps need a vision transformer of timm with a [CLS] token, found {type(model).__name__}"
        )
    assert isinstance(model, VisionTransformer)
    taken: list[Tensor] = []

    def take(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        taken.append(_cls_attention(attention, inputs[0]))

    hook = attention.register_forward_pre_hook(take)
    try:
        model.forward_features(pictures_BCHW)
    finally:
        hook.remove()
    height, width = model.patch_embed.dynamic_feat_size(tuple(pictures_BCHW.shape[2:]))
    maps_BHN = taken[0][:, :, model.num_prefix_tokens :]
    return maps_BHN.reshape(*maps_BHN.shape[:2], height, width)


def _last_attention(model: nn.Module) -> Attention | None:
    """The attention layer of the last block. Subclasses may add biases or rotations that `_cls_attention` lacks."""
    if not isinstance(model, VisionTransformer) or model.cls_token is None:
        return None
    attention = getattr(model.blocks[-1], "attn", None)
    return attention if type(attention) is Attention else None


def _cls_attention(attention: Attention, tokens_BND: Tensor) -> Tensor:
    """Softmax over all N tokens of the [CLS] token's query, per head."""
    qkv: Tensor = attention.qkv(tokens_BND)
    queries_BNHd, keys_BNHd, _ = qkv.reshape(*qkv.shape[:2], 3, attention.num_heads, -1).unbind(2)
    query_BHd = attention.q_norm(queries_BNHd[:, 0])
    scores_BHN = torch.einsum("bhd,bnhd->bhn", query_BHd, attention.k_norm(keys_BNHd))
    scaled_BHN: Tensor = scores_BHN.float() * attention.scale
    return scaled_BHN.softmax(dim=2)
