"""PyTorch checkpoints, read without running anything that they hold, as a backbone's tensors under timm's names.

Taken are state dicts and training checkpoints of DINO, DINOv2 and alike: of teacher and student the teacher, without
wrappers' prefixes and projection heads. DINOv2's own layout becomes timm's.
"""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino_index.errors import CheckpointRefused, ModelError

_MAX_LISTED = 4
# What training wraps around a network leaves its name before the network's own: any number, in any order.
_PREFIX = re.compile(r"(?:(?:module|backbone|_orig_mod)\.)*")
_PROJECTION_HEAD = re.compile(r"(?:head\.(?:mlp|last_layer)|dino_head|ibot_head)\.")
# DINOv2 trains in chunks of blocks: `blocks.CHUNK.NUMBER.` counts the blocks through.
_CHUNKED_BLOCK = re.compile(r"blocks\.\d+\.(\d+)\.")
_SWIGLU = re.compile(r"(blocks\.\d+\.mlp)\.(w12|w3)\.")
_SWIGLU_NAMES = {"w12": "fc1", "w3": "fc2"}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The backbone in a PyTorch file."""

    tensors: dict[str, Tensor]
    """By timm's names, in the file's order and number formats."""
    remarks: list[str]
    """What was chosen or left out, a sentence each."""


def read_checkpoint(path: Path) -> Checkpoint:
    """The backbone in a PyTorch file.

    Raises CheckpointRefused for a file with Python objects other than tensors, plain values and DINO's Namespace of
    options, of which nothing is run; ModelError for a damaged file and for one without a backbone.
    """
    remarks: list[str] = []
    state = _choose_state(_read_safely(path), path, remarks)
    tensors = _backbone_of(state, path, remarks)
    if not tensors:
        raise ModelError(f"{path}: expected a backbone's tensors, found {_listed(list(state))} alone")
    return Checkpoint(tensors=_in_timms_layout(tensors, remarks), remarks=remarks)


def _read_safely(path: Path) -> Any:
    what = f"{path} cannot be read as a PyTorch file of plain tensors"
    try:
        # DINO's own checkpoints hold the run's options beside the weights, as plain attributes.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles of another protocol, which fail or not
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if match := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise CheckpointRefused(
                f"{what}: it holds the Python object {match[1]}, which could run code; nothing in it was run. "
                "Save the state dict alone, torch.save(model.state_dict(), FILE), or use a .safetensors file"
            ) from error
        raise ModelError(
            f"{what}: it is damaged or holds other things ({_reason(error)}); nothing in it was run. "
            "To get it whole, copy it again"
        ) from error
    except Exception as error:
        # Damaged files end in many kinds of error, KeyError and AttributeError among them.
        raise ModelError(f"{what}: {_first_line(error)}; it is cut short or damaged, copy it again") from error


def _choose_state(content: Any, path: Path, remarks: list[str]) -> dict[str, Any]:
    """The state dict in what a file holds: the teacher's where there are a teacher and a student."""
    for key in ("teacher", "student", "state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            others = sorted(str(other) for other in content if other != key)
            content = content[key]
            if key in ("teacher", "student"):
                remarks.append(
                    f"the {key}'s weights are taken" + (f", not {_listed(others)}" if others else "")
                )  # fmt: skip
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        found = f"a dictionary of {_listed(list(content))}" if isinstance(content, dict) else type(content).__name__
        raise ModelError(f"{path}: expected a state dict of tensors, found {found}")
    return content


def _backbone_of(state: dict[str, Any], path: Path, remarks: list[str]) -> dict[str, Tensor]:
    """The tensors without wrappers' prefixes and projection heads."""
    tensors: dict[str, Tensor] = {}
    head, no_tensors = [], []
    for key, value in state.items():
        name = str(key)[_PREFIX.match(str(key)).end() :]  # type: ignore[union-attr]
        if not isinstance(value, Tensor):
            no_tensors.append(str(key))
        elif _PROJECTION_HEAD.match(name):
            head.append(name)
        elif name in tensors:
            raise ModelError(f"{path} holds {name} twice, under different prefixes: it is no single backbone")
        else:
            tensors[name] = value
    if head:
        remarks.append(f"the projection head is left out ({len(head)} tensors)")
    if no_tensors:
        remarks.append(f"left out, as they are no tensors: {_listed(no_tensors)}")
    return tensors


def _in_timms_layout(tensors: dict[str, Tensor], remarks: list[str]) -> dict[str, Tensor]:
    """DINOv2's tensors as timm names them; all others as they are.

    As facebookresearch/dinov2 at 027a9ac saves them (dinov2/models/vision_transformer.py).
    """
    if not any(name.endswith(".ls1.gamma") for name in tensors):
        return tensors
    tensors = {_CHUNKED_BLOCK.sub(r"blocks.\1.", name): value for name, value in tensors.items()}
    if tensors.pop("mask_token", None) is not None:
        remarks.append("mask_token, which only training uses, is left out")
    if "register_tokens" in tensors and {"cls_token", "pos_embed"} <= tensors.keys():
        # There only [CLS] and the patches have positions, and timm keeps none for [CLS]: it is added once.
        positions = tensors["pos_embed"]
        tensors["reg_token"] = tensors.pop("register_tokens")
        tensors["cls_token"] = tensors["cls_token"] + positions[:, :1]
        tensors["pos_embed"] = positions[:, 1:]
    return {_SWIGLU.sub(lambda m: f"{m[1]}.{_SWIGLU_NAMES[m[2]]}.", name): value for name, value in tensors.items()}


def _listed(names: list[Any]) -> str:
    shown = ", ".join(str(name) for name in names[:_MAX_LISTED]) or "nothing"
    return f"{shown} and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else shown


def _reason(error: pickle.UnpicklingError) -> str:
    """The line of PyTorch's message that says what is wrong; around it, it advises to load unsafely."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    advice = ("Weights only load failed", "Please file an issue", "Check the documentation")
    return next((line for line in lines if not line.startswith(advice)), "it is no pickle").rstrip(".")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), repr(error)).rstrip(".")
