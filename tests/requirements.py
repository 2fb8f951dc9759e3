"""What a test needs of its machine: absent things skip the test, or fail it where they are promised."""

from __future__ import annotations

import os

import pytest


def require(condition: object, reason: str) -> None:
    """Go on when `condition` is true; otherwise skip, or fail under DINO_SEARCH_REQUIRE_SERVICES=1.

    CI sets the variable, so that a service that did not start cannot hide its tests behind a skip.
    """
    if condition:
        return
    if os.environ.get("DINO_SEARCH_REQUIRE_SERVICES") == "1":
        pytest.fail(f"required by DINO_SEARCH_REQUIRE_SERVICES=1, but absent: {reason}")
    pytest.skip(reason)
