"""Weights files as other projects save them, made from timm models with random weights."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

State = dict[str, Tensor]


def random_model(architecture: str, *, seed: int = 0, **arguments: Any) -> Any:
    """A timm model whose every tensor is random, so that no two of them could be mistaken for each other."""
    model: Any = timm.create_model(architecture, num_classes=0, **arguments).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.normal_(0, 0.05, generator=generator)
            if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "running_var", "bn1.weight")):
                value.abs_().add_(0.5)
    return model


def wrapped(state: State, prefix: str = "module.") -> State:
    """As DINO's networks name it: the backbone beside a projection head, under what wraps them for training."""
    head = {"head.mlp.0.weight": torch.zeros(4, 4), "head.last_layer.weight_v": torch.zeros(4, 4)}
    named = {f"{prefix}backbone.{name}": value for name, value in state.items()}
    return named | {f"{prefix}{name}": value for name, value in head.items()}


def dino_full_checkpoint(state: State) -> dict[str, Any]:
    """As DINO's training saves it; the student's weights are others."""
    return {
        "student": wrapped({name: value + 1 for name, value in state.items()}),
        "teacher": wrapped(state, prefix=""),
        "optimizer": {"state": {0: {"step": 3}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999)}]},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", lr=0.0005, local_crops_scale=(0.05, 0.25), use_fp16=True),
        "dino_loss": OrderedDict(center=torch.zeros(1, 8)),
        "fp16_scaler": None,
    }


def dinov2_layout(state: State, *, positions_of_cls: Tensor | None = None) -> State:
    """A timm state dict under the names of DINOv2's own files.

    positions_of_cls: (1, 1, D), with registers: what the original keeps apart and timm adds to the [CLS] token.
    """
    original = {name: value.clone() for name, value in state.items()}
    original["mask_token"] = torch.zeros(1, state["cls_token"].shape[-1])
    if "reg_token" in original:
        assert positions_of_cls is not None
        original["register_tokens"] = original.pop("reg_token")
        original["pos_embed"] = torch.cat([positions_of_cls, original["pos_embed"]], dim=1)
        original["cls_token"] = original["cls_token"] - positions_of_cls
    return original


def dinov2_chunked(state: State, chunk_size: int) -> State:
    """Blocks under the chunks that DINOv2 trains in; the numbers of blocks stay as they are."""
    chunked = {}
    for name, value in state.items():
        parts = name.split(".")
        if parts[0] == "blocks":
            parts.insert(1, str(int(parts[1]) // chunk_size))
        chunked[".".join(parts)] = value
    return chunked


def save(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path
