"""DINO pretraining: a backbone from images without labels."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dino_training.pretraining import Progress, RunSummary, pretrain
    from dino_training.recipe import Recipe, load_recipe

__all__ = ["Progress", "Recipe", "RunSummary", "load_recipe", "pretrain"]

_MODULES = {
    "Progress": "dino_training.pretraining",
    "Recipe": "dino_training.recipe",
    "RunSummary": "dino_training.pretraining",
    "load_recipe": "dino_training.recipe",
    "pretrain": "dino_training.pretraining",
}


def __getattr__(name: str) -> Any:
    # Recipes can be read without torch, and the command line must answer `--help` at once.
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
