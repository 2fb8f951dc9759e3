"""What the files set is what the service knows."""

from __future__ import annotations

import re
from typing import Any

import pytest

from deploy_files import DEPLOY, DRAIN_S, read_yaml


@pytest.fixture(scope="module")
def fields() -> dict[str, Any]:
    found: dict[str, Any] = pytest.importorskip("dino_search.api.settings").ServiceSettings.model_fields
    return found


def test_variables_that_the_files_set_are_settings(fields: dict[str, Any]) -> None:
    files = [path for path in DEPLOY.rglob("*") if path.is_file() and path.suffix not in (".json", ".pyc")]
    texts = {path: path.read_text(encoding="utf-8") for path in files}
    named = {name for text in texts.values() for name in re.findall(r"\bDINO_SEARCH_([A-Z][A-Z_]*[A-Z])\b", text)}
    assert {"HOME", "KEYS", "DATABASE"} <= named
    assert {name.lower() for name in named} - {"config"} <= set(fields)


def test_chart_sets_settings_only(fields: dict[str, Any]) -> None:
    settings = read_yaml("helm", "dino-search", "values.yaml")["settings"]
    assert set(settings) <= set(fields)


def test_defaults_that_the_files_rely_on_still_hold(fields: dict[str, Any]) -> None:
    assert fields["drain_s"].default == DRAIN_S
    assert fields["port"].default == 8000
    assert fields["request_timeout_s"].default == 60
    assert fields["max_body_bytes"].default == 64 * 2**20
    assert fields["queue_size"].default == 64, "half of it is the limit of DinoSearchQueueStaysFull"
