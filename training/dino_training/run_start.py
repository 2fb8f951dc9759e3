"""How a run begins: in a new folder, from given weights, or from its own last checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from dino_index.backbones import fastest_dtype, load_model
from dino_index.errors import OutputUnwritable, RecipeError, RunError, RunExists
from dino_index.model_files import ModelSpec, resolve_model
from dino_training.checkpoints import list_checkpoints, load_checkpoint
from dino_training.distributed import Processes
from dino_training.export import WEIGHTS, same_architecture
from dino_training.image_source import ImageSource
from dino_training.recipe import Recipe, recipe_from

CONVERTED = "init"
"""Folder in a run for what a PyTorch checkpoint to start from is converted into."""
# What a resumed run may change: the machine, how the run is watched, and how long it is.
_CHANGEABLE = frozenset(
    "name epochs device precision attention compile workers cache_gb evaluate_every_epochs num_evaluated"
    " save_every_minutes log_every_steps gradient_checkpointing gradient_accumulation".split()
)


def begin_or_resume(
    run: Path, resume: bool, processes: Processes, on_remark: Callable[[str], None]
) -> dict[str, Any] | None:
    """The checkpoint to go on from, or None for a new run in a folder that can be written."""
    # Started anew by torchrun, the command that goes on must also be the one that begins.
    if resume and (list_checkpoints(run) or not processes.is_launched):
        return load_checkpoint(run, on_remark)
    try:
        if list_checkpoints(run) or (run / WEIGHTS).exists():
            raise RunExists(f"{run} holds a run already; go on with it by --resume, or choose another --out")
        processes.wait()
        if processes.is_first:
            run.mkdir(parents=True, exist_ok=True)
            probe = run / ".writable"
            probe.touch()
            probe.unlink()
    except OSError as error:
        raise OutputUnwritable(f"{run} cannot be written: {error.strerror}; choose another --out") from error
    return None


def resumed_recipe(state: dict[str, Any], recipe: Recipe, source: ImageSource) -> Recipe:
    """The run's own recipe with the changes that a resumed run may make. Raises RecipeError, RunError."""
    saved = recipe_from(yaml.safe_load(state["recipe"]), "the checkpoint")
    if source.digest != state["images"]:
        raise RunError(
            "the images are not those that the run began with; resume with the same ones, "
            f"or start a new run from the weights so far: --init RUN/{WEIGHTS}"
        )
    # What was chosen when the run began is chosen again, so that the command that began it also goes on with it.
    resolved, _ = recipe.resolve(len(source), from_weights=state["started_from"] is not None)
    not_compared = set(_CHANGEABLE)
    not_compared |= {"mean", "std"} if state["started_from"] is not None else set()  # as the weights have them
    not_compared |= {"head_bottleneck"} if saved.teacher == "frozen" else set()  # as many as the teacher has components
    for key in (field.name for field in fields(Recipe) if field.name not in not_compared):
        was, asked = getattr(saved, key), getattr(recipe, key)
        if was not in (asked, getattr(resolved, key)):
            raise RecipeError(
                f"a resumed run keeps its recipe: {key} was {was!r}, found {asked!r}; "
                "leave out --recipe and --set to keep all of it"
            )
    return replace(saved, **{key: getattr(resolved, key) for key in _CHANGEABLE})


def initial_spec(init: str | Path, recipe: Recipe, converted: Path, on_remark: Callable[[str], None]) -> ModelSpec:
    """The weights to start from, for the size of the global views. Raises ModelError, RecipeError, OutputUnwritable.

    converted: folder for what a PyTorch checkpoint is converted into.
    """
    spec = resolve_model(init, models=converted, on_remark=on_remark)
    if difference := same_architecture(recipe, spec.architecture, spec.architecture_args):
        raise RecipeError(f"the weights {init} do not fit the recipe's backbone: {difference}; --set the recipe's")
    return replace(spec, input_size=recipe.global_size)


def load_initial_weights(backbone: nn.Module, spec: ModelSpec) -> None:
    values = load_model(spec).state_dict()
    backbone.load_state_dict({name: values[name] for name in backbone.state_dict()}, strict=True)


def wants_fused_attention(recipe: Recipe, device: torch.device) -> bool:
    return device.type == "cuda" if recipe.attention == "auto" else recipe.attention == "fused"


def choose_precision(recipe: Recipe, device: torch.device) -> torch.dtype:
    """What the forward pass computes in; `auto` takes what is faster in training."""
    if recipe.precision != "auto":
        chosen: torch.dtype = getattr(torch, recipe.precision)
        return chosen
    fastest = fastest_dtype(device)
    # Old GPUs multiply float16 faster; gradients then need the scaler.
    return torch.float16 if device.type == "cuda" and fastest == torch.float32 else fastest
