"""A run's backbone as one file that `dino-search index --model` takes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from dino_index.errors import OutputUnwritable
from dino_index.model_files import METADATA_KEY
from dino_training.networks import architecture_args
from dino_training.recipe import Recipe


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
    weights = {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in backbone.state_dict().items()
    }
    partial = path.with_suffix(".partial")
    try:
        save_file(weights, partial, metadata={METADATA_KEY: json.dumps(description)})
        os.replace(partial, path)
    except Exception as error:  # safetensors raises an error of its own for a full disk
        partial.unlink(missing_ok=True)
        raise OutputUnwritable(f"{path} cannot be written: {error}") from error


def same_architecture(recipe: Recipe, architecture: str, architecture_arguments: dict[str, Any]) -> str | None:
    """None if weights of the given architecture fit the recipe's backbone, else what differs, in words.

    The size of the views may differ: position embeddings are resampled.
    """
    if architecture != recipe.architecture:
        return f"expected {recipe.architecture}, found {architecture}"
    ignored = {"img_size", "dynamic_img_size", "num_classes"}
    wanted = {key: value for key, value in architecture_args(recipe).items() if key not in ignored}
    found = {key: value for key, value in architecture_arguments.items() if key not in ignored}
    if wanted != found:
        return f"expected {recipe.architecture} with {wanted or 'no arguments'}, found {found or 'no arguments'}"
    return None
