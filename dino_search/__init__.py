"""dino-search: image search, copy detection and k-NN classification on self-supervised Vision Transformers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dino_index.embedding import EmbeddingSettings
    from dino_index.errors import DinoSearchError
    from dino_index.indexing import IndexOptions, IndexSummary
    from dino_search.collection import Collection
    from dino_search.models import Models

__all__ = ["Collection", "DinoSearchError", "EmbeddingSettings", "IndexOptions", "IndexSummary", "Models"]

_MODULES = {
    "Collection": "dino_search.collection",
    "DinoSearchError": "dino_index.errors",
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
