"""Checkpoints: all state of a run in one file, the last two kept, none ever half written."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from dino_index.errors import OutputUnwritable, RunNotFound

FOLDER = "checkpoints"
_KEPT = 2
_NAME = re.compile(r"step-(\d{8})\.pt")


def save_checkpoint(run: Path, step: int, state: dict[str, Any]) -> Path:
    """Writes under a temporary name, syncs, renames, then drops all but the last two.

    Dropped are later ones as well: they were damaged, or the run would not have gone on from before them.
    state: tensors, numbers, text, lists and dicts. Raises OutputUnwritable; earlier checkpoints are then untouched.
    """
    folder = run / FOLDER
    path = folder / f"step-{step:08d}.pt"
    partial = path.with_suffix(".partial")
    try:
        folder.mkdir(exist_ok=True)
        for left_by_a_kill in folder.glob("*.partial"):
            left_by_a_kill.unlink()
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        checkpoints = list_checkpoints(run)
        last = checkpoints.index(path) + 1
        for other in checkpoints[: max(0, last - _KEPT)] + checkpoints[last:]:
            other.unlink()
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError for a full disk
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise OutputUnwritable(
            f"checkpoint {path} cannot be written: {error}; earlier checkpoints are intact: free some space "
            "and go on with --resume"
        ) from error
    return path


def load_checkpoint(run: Path, on_remark: Callable[[str], None] = lambda remark: None) -> dict[str, Any]:
    """The newest checkpoint that can be read; on_remark is told of any that cannot. Raises RunNotFound."""
    problem = "none was written yet; start without --resume"
    for path in reversed(list_checkpoints(run)):
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            return state
        except Exception as error:  # a damaged file can make the reader raise anything
            problem = f"{path.name} cannot be read: {str(error).splitlines()[0] if str(error) else error!r}"
            on_remark(problem)
    raise RunNotFound(f"{run} holds no checkpoint to resume from ({problem})")


def list_checkpoints(run: Path) -> list[Path]:
    """Checkpoint files, oldest first."""
    folder = run / FOLDER
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name)) if os.path.isdir(folder) else []
