"""What the tests of the protocols share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dino_index.model_files import resolve_model
from dino_training.evaluation.features import FeatureStore


@pytest.fixture
def store(tiny_model: Path) -> Iterator[FeatureStore]:
    """The tiny model on the processor, without a cache."""
    opened = FeatureStore(resolve_model(tiny_model), device="cpu")
    yield opened
    opened.close()
