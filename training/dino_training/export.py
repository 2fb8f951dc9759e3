"""A run's backbone as one file that `dino-search index --model` takes."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import nn

from dino_index.errors import OutputUnwritable
from dino_index.model_files import METADATA_KEY
from dino_training.networks import architecture_args, build_backbone
from dino_training.recipe import Recipe

WEIGHTS = "backbone.safetensors"
"""In a run's folder: the last weights."""
BEST_WEIGHTS = "best.safetensors"
"""Those with the best figure on the way."""


def export_backbone(backbone: nn.Module, recipe: Recipe, path: Path, card: dict[str, Any]) -> None:
    """Writes the backbone's weights (float32) with everything needed to use them, under a temporary name first.

    card: what the weights come from, as plain JSON values. Raises OutputUnwritable.
    """
    description = {
        "architecture": recipe.architecture,
        "architecture_args": architecture_args(recipe),
        "input_size": recipe.input_size,
        "mean": list(recipe.mean),
        "std": list(recipe.std),
        "card": card,
    }
    save_weights(backbone, description, path)


def save_weights(backbone: nn.Module, description: dict[str, Any], path: Path) -> None:
    """Writes weights (float32) under a temporary name first, the description in the file's metadata.

    description: as `dino_index.model_files` reads it. Raises OutputUnwritable.
    """
    weights = {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in backbone.state_dict().items()
    }
    partial = path.with_suffix(".partial")
    try:
        save_file(weights, partial, metadata={METADATA_KEY: json.dumps(description)})
        os.replace(partial, path)
    except Exception as error:  # safetensors raises an error of its own for a full disk
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise OutputUnwritable(f"{path} cannot be written: {error}") from error


def same_architecture(recipe: Recipe, architecture: str, architecture_arguments: dict[str, Any]) -> str | None:
    """None if weights of the given architecture fit the recipe's backbone, else what differs, in words.

    The size of the views may differ: position embeddings are resampled.
    """
    if architecture != recipe.architecture:
        return f"expected {recipe.architecture}, found {architecture}"
    ignored = {"img_size", "dynamic_img_size", "num_classes"}
    wanted, found = (
        {key: value for key, value in arguments.items() if key not in ignored}
        for arguments in (architecture_args(recipe), architecture_arguments)
    )
    differing = {key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key)}
    # What is not given is as the architecture has it: of these two, names and shapes of tensors tell.
    if differing <= {"patch_size", "depth"}:
        with torch.device("meta"):
            ours = build_backbone(recipe, student=False)
            theirs = timm.create_model(architecture, pretrained=False, num_classes=0, **found)
        if _shapes(ours) == _shapes(theirs):
            return None
    return f"expected {recipe.architecture} with {wanted or 'no arguments'}, found {found or 'no arguments'}"


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items() if name != "pos_embed"}
