"""dino-search: image search, copy detection and k-NN classification on self-supervised Vision Transformers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dino_index.copy_detection import DetectionOptions
    from dino_index.embedding import EmbeddingSettings
    from dino_index.errors import DinoSearchError
    from dino_index.indexing import IndexOptions, IndexSummary
    from dino_search.collection import Collection
    from dino_search.copies import CopiesOptions
    from dino_search.copy_results import CopyMatch, CopyQuery
    from dino_search.duplicates import DuplicateOptions
    from dino_search.models import Models

__all__ = [
    "Collection",
    "CopiesOptions",
    "CopyMatch",
    "CopyQuery",
    "DetectionOptions",
    "DinoSearchError",
    "DuplicateOptions",
    "EmbeddingSettings",
    "IndexOptions",
    "IndexSummary",
    "Models",
]

_MODULES = {
    "Collection": "dino_search.collection",
    "CopiesOptions": "dino_search.copies",
    "CopyMatch": "dino_search.copy_results",
    "CopyQuery": "dino_search.copy_results",
    "DetectionOptions": "dino_index.copy_detection",
    "DinoSearchError": "dino_index.errors",
    "DuplicateOptions": "dino_search.duplicates",
    "EmbeddingSettings": "dino_index.embedding",
    "IndexOptions": "dino_index.indexing",
    "IndexSummary": "dino_index.indexing",
    "Models": "dino_search.models",
}


def __getattr__(name: str) -> Any:
    # The command line imports this package first and must answer `--help` at once.
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
