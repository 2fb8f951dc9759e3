"""Architectures that are known by the names and shapes of their tensors: plain ViTs (DINO), DINOv2, ResNets.

Nothing here imports torch or timm.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

Shapes = Mapping[str, Sequence[int]]

# Of the luminance of ImageNet's pictures, roughly: the means of the three channels' values.
GREY_MEAN = (0.449,)
GREY_STD = (0.226,)

_VIT_REQUIRED = {"cls_token", "pos_embed", "patch_embed.proj.weight"}
_RESNET_REQUIRED = {"conv1.weight", "layer1.0.conv1.weight", "layer1.0.conv2.weight"}
_PLAIN_VIT_NAMES = {192: "vit_tiny", 384: "vit_small", 768: "vit_base", 1024: "vit_large"}
_PLAIN_VIT_KEY = re.compile(
    r"cls_token|pos_embed|patch_embed\.proj\.(weight|bias)|norm\.(weight|bias)|head\.(weight|bias)"
    r"|blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias)"
)
_DINOV2_NAMES = {384: ("vit_small", 12), 768: ("vit_base", 12), 1024: ("vit_large", 24), 1536: ("vit_giant", 40)}
_DINOV2_KEY = re.compile(_PLAIN_VIT_KEY.pattern + r"|reg_token|blocks\.\d+\.ls[12]\.gamma")
_DINOV2_PATCH_SIZE = 14
_DINOV2_IMG_SIZE = 518
_DINOV2_REGISTERS = 4
_RESNET_KEY = re.compile(
    r"conv1\.weight|bn1\.(weight|bias|running_mean|running_var|num_batches_tracked)|fc\.(weight|bias)"
    r"|layer[1-4]\.\d+\.(conv[123]\.weight|bn[123]\.(weight|bias|running_mean|running_var|num_batches_tracked)"
    r"|downsample\.(0\.weight|1\.(weight|bias|running_mean|running_var|num_batches_tracked)))"
)
# By number of blocks in each stage, and channels inside the first block of three convolutions (0: it has two).
_RESNET_NAMES: dict[tuple[int, ...], str] = {
    (2, 2, 2, 2, 0): "resnet18",
    (3, 4, 6, 3, 0): "resnet34",
    (3, 4, 6, 3, 64): "resnet50",
    (3, 4, 23, 3, 64): "resnet101",
    (3, 8, 36, 3, 64): "resnet152",
    (3, 4, 6, 3, 128): "wide_resnet50_2",
    (3, 4, 23, 3, 128): "wide_resnet101_2",
}


def describe_tensors(shapes: Shapes) -> dict[str, Any] | None:
    """The description of the architecture that tensors of these names and shapes belong to; None if not known.

    A ViT's number of heads leaves no trace in the shapes: 64 channels a head, as every published DINO ViT has.
    """
    try:
        return _plain_vit(shapes) or _dinov2(shapes) or _resnet(shapes)
    except IndexError:  # a tensor with fewer axes than it would have
        return None


def strange_tensors(shapes: Shapes) -> list[str]:
    """Names of the tensors that keep these from being a known architecture's; empty if most of them are strange."""
    found = [
        sorted(name for name in shapes if not pattern.fullmatch(name))
        for required, pattern in ((_VIT_REQUIRED, _DINOV2_KEY), (_RESNET_REQUIRED, _RESNET_KEY))
        if required <= shapes.keys()
    ]
    return next((names for names in found if len(names) < len(shapes) / 2), [])


def _plain_vit(shapes: Shapes) -> dict[str, Any] | None:
    if not _are_all(_VIT_REQUIRED, _PLAIN_VIT_KEY, shapes):
        return None
    width, patch_size = shapes["cls_token"][-1], shapes["patch_embed.proj.weight"][-1]
    if width not in _PLAIN_VIT_NAMES:
        return None
    size = patch_size * _side(shapes["pos_embed"][1] - 1)
    return _description(
        f"{_PLAIN_VIT_NAMES[width]}_patch16_224",
        {"patch_size": patch_size, "img_size": size, "depth": _depth(shapes)},
        size,
        shapes["patch_embed.proj.weight"][1],
    )


def _dinov2(shapes: Shapes) -> dict[str, Any] | None:
    if not _are_all(_VIT_REQUIRED, _DINOV2_KEY, shapes):
        return None
    width, depth = shapes["cls_token"][-1], _depth(shapes)
    scales = {f"blocks.{number}.ls{place}.gamma" for number in range(depth) for place in (1, 2)}
    if not scales or not scales <= shapes.keys() or width not in _DINOV2_NAMES:
        return None
    if shapes["patch_embed.proj.weight"][-1] != _DINOV2_PATCH_SIZE:
        return None
    name, usual_depth = _DINOV2_NAMES[width]
    # With registers, no prefix token has a position of its own.
    registers = shapes["reg_token"][1] if "reg_token" in shapes else 0
    size = _DINOV2_PATCH_SIZE * _side(shapes["pos_embed"][1] - (0 if registers else 1))
    differing = {
        "depth": (depth, usual_depth),
        "img_size": (size, _DINOV2_IMG_SIZE),
        "reg_tokens": (registers, _DINOV2_REGISTERS if registers else 0),
    }
    return _description(
        f"{name}_patch14_{'reg4_' if registers else ''}dinov2",
        {key: found for key, (found, usual) in differing.items() if found != usual},
        size,
        shapes["patch_embed.proj.weight"][1],
    )


def _resnet(shapes: Shapes) -> dict[str, Any] | None:
    if not _are_all(_RESNET_REQUIRED, _RESNET_KEY, shapes):
        return None
    numbers = [
        len({name.split(".")[1] for name in shapes if name.startswith(f"layer{stage}.")}) for stage in range(1, 5)
    ]
    inside = shapes["layer1.0.conv2.weight"][1] if "layer1.0.conv3.weight" in shapes else 0
    name = _RESNET_NAMES.get((*numbers, inside))
    return _description(name, {}, 224, shapes["conv1.weight"][1]) if name else None


def _description(architecture: str, arguments: dict[str, Any], size: int, channels: int) -> dict[str, Any]:
    description = {"architecture": architecture, "architecture_args": arguments, "input_size": size}
    if channels != 3:
        description["architecture_args"] = arguments | {"in_chans": channels}
    if channels == 1:
        description |= {"mean": list(GREY_MEAN), "std": list(GREY_STD)}
    return description


def _are_all(required: set[str], pattern: re.Pattern[str], shapes: Shapes) -> bool:
    return required <= shapes.keys() and all(pattern.fullmatch(name) for name in shapes)


def _depth(shapes: Shapes) -> int:
    return 1 + max((int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")), default=-1)


def _side(num_positions: int) -> int:
    return round(math.sqrt(max(0, num_positions)))
