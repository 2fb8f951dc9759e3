from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from served_command import Serve, start_service


@pytest.fixture
def serve(home: Path, tmp_path: Path) -> Iterator[Serve]:
    """`start_service` on the test's home; what it starts ends with the test."""
    with ExitStack() as started:
        yield partial(start_service, started, tmp_path)
