from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn

from dino_index.attention import attention_maps, has_attention
from dino_index.backbones import Backbone
from dino_index.errors import ModelError, OutOfMemory
from dino_index.model_files import resolve_model

SMALL: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 0}


def vit(**arguments: Any) -> nn.Module:
    """A small ViT whose random weights are large enough for uneven attention."""
    torch.manual_seed(0)
    settings = SMALL | {"img_size": 64, "dynamic_img_size": True} | arguments
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", pretrained=False, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


@torch.no_grad()
def maps_by_hand(model: Any, pictures_BCHW: Tensor) -> Tensor:
    """All rows of the attention matrix, as the plain (unfused) layer itself computes them."""
    layer = model.blocks[-1].attn
    matrices: list[Tensor] = []
    fused = layer.fused_attn
    layer.fused_attn = False
    hook = layer.attn_drop.register_forward_hook(lambda module, inputs, output: matrices.append(inputs[0]))
    model.forward_features(pictures_BCHW)
    hook.remove()
    layer.fused_attn = fused
    height, width = (side // 16 for side in pictures_BCHW.shape[2:])
    return matrices[0][:, :, 0, model.num_prefix_tokens :].reshape(len(pictures_BCHW), -1, height, width)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"reg_tokens": 4}, {"qk_norm": True}, {"init_values": 0.1, "qkv_bias": False}],
    ids=["plain", "registers", "qk_norm", "layer_scale"],
)
@pytest.mark.parametrize("size", [(64, 64), (48, 96)])
def test_maps_are_rows_of_the_attention_matrix(arguments: dict[str, Any], fused: bool, size: tuple[int, int]) -> None:
    model: Any = vit(**arguments)
    model.blocks[-1].attn.fused_attn = fused
    pictures_BCHW = torch.randn(2, 3, *size)
    maps_BHhw = attention_maps(model, pictures_BCHW)
    assert maps_BHhw.shape == (2, 3, size[0] // 16, size[1] // 16)
    assert maps_BHhw.dtype == torch.float32
    torch.testing.assert_close(maps_BHhw, maps_by_hand(model, pictures_BCHW))
    assert maps_BHhw.std() > 0.01  # uneven, or the comparison would say nothing
    assert bool((maps_BHhw.sum(dim=(2, 3)) <= 1 + 1e-6).all())


def test_the_model_stays_as_it_was() -> None:
    model: Any = vit()
    pictures_BCHW = torch.randn(1, 3, 64, 64)
    before = model.forward_features(pictures_BCHW)
    maps_BHhw = attention_maps(model, pictures_BCHW)
    assert not maps_BHhw.requires_grad
    assert not model.blocks[-1].attn._forward_pre_hooks
    assert torch.equal(model.forward_features(pictures_BCHW), before)


def test_half_precision_gives_float32_maps() -> None:
    model = vit()
    pictures_BCHW = torch.randn(1, 3, 64, 64)
    maps_BHhw = attention_maps(model.to(torch.bfloat16), pictures_BCHW.to(torch.bfloat16))
    assert maps_BHhw.dtype == torch.float32
    assert bool((maps_BHhw.sum(dim=(2, 3)) <= 1 + 1e-6).all())


@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [
        ("resnet18", {}),
        ("vit_tiny_patch16_224", SMALL | {"class_token": False, "global_pool": "avg"}),
        ("beit_base_patch16_224", SMALL),  # adds a bias for the distance of two patches
    ],
)
def test_a_model_without_such_attention_is_refused(architecture: str, arguments: dict[str, Any]) -> None:
    model: nn.Module = timm.create_model(architecture, pretrained=False, **arguments)
    assert not has_attention(model)
    with pytest.raises(ModelError, match=r"need a vision transformer .* found (ResNet|VisionTransformer|Beit)"):
        attention_maps(model, torch.zeros(1, 3, 224, 224))


def test_a_vision_transformer_has_attention() -> None:
    assert has_attention(vit(reg_tokens=2))


def test_maps_equal_a_softmax_by_hand_from_the_stored_weights(tiny_model: Path) -> None:
    weights = load_file(tiny_model)
    backbone = Backbone(resolve_model(tiny_model), device="cpu", dtype=torch.float32)
    pixels_HWC = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    spec = backbone.spec
    values_HWC = (pixels_HWC / 255 - np.array(spec.mean)) / np.array(spec.std)
    patches = [values_HWC[top : top + 16, left : left + 16] for top in (0, 16) for left in (0, 16)]
    kernel_DK = weights["patch_embed.proj.weight"].reshape(64, -1)
    embedded = [kernel_DK @ patch.transpose(2, 0, 1).reshape(-1) for patch in patches]
    tokens_ND = np.stack([weights["cls_token"][0, 0], *(row + weights["patch_embed.proj.bias"] for row in embedded)])
    tokens_ND = tokens_ND + weights["pos_embed"][0]
    centred_ND = tokens_ND - tokens_ND.mean(axis=1, keepdims=True)
    normed_ND = centred_ND / np.sqrt((centred_ND**2).mean(axis=1, keepdims=True) + 1e-6)
    normed_ND = normed_ND * weights["blocks.0.norm1.weight"] + weights["blocks.0.norm1.bias"]
    qkv_N3D = normed_ND @ weights["blocks.0.attn.qkv.weight"].T + weights["blocks.0.attn.qkv.bias"]
    scores_N = qkv_N3D[:, 64:128] @ qkv_N3D[0, :64] / 64**0.5
    softmax_N = np.exp(scores_N - scores_N.max()) / np.exp(scores_N - scores_N.max()).sum()
    assert softmax_N.std() > 1e-4  # uneven, or the comparison would say nothing
    maps_BHhw = backbone.attention(pixels_HWC[None])
    np.testing.assert_allclose(maps_BHhw, softmax_N[1:].reshape(1, 1, 2, 2), rtol=1e-4)


def test_what_does_not_fit_into_memory_is_done_in_halves(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = Backbone(resolve_model(tiny_model), device="cpu", dtype=torch.float32)
    pixels_BHWC = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    expected = backbone.attention(pixels_BHWC)
    room = [2]

    def little_memory(model: nn.Module, pictures_BCHW: Tensor) -> Tensor:
        if len(pictures_BCHW) > room[0]:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return attention_maps(model, pictures_BCHW)

    monkeypatch.setattr("dino_index.backbones.attention_maps", little_memory)
    np.testing.assert_allclose(backbone.attention(pixels_BHWC), expected, rtol=1e-5)
    room[0] = 0
    with pytest.raises(OutOfMemory, match="one picture of 32x32 px does not fit"):
        backbone.attention(pixels_BHWC)
