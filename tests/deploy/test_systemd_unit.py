from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from deploy_files import DEPLOY, DRAIN_S, output_of, program, seconds

UNIT = DEPLOY / "systemd" / "dino-search.service"


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit with a program that this machine has, or systemd would miss the one it starts."""
    file = tmp_path / UNIT.name
    file.write_text(UNIT.read_text(encoding="utf-8").replace("/opt/dino-search/bin/dino-search", sys.executable))
    return file


def test_systemd_understands_the_unit(unit: Path) -> None:
    assert output_of(program("systemd-analyze"), "verify", unit).strip() == ""


def test_unit_exposes_little(unit: Path) -> None:
    # Of 100; a unit without any hardening has 96.
    output_of(program("systemd-analyze"), "security", "--offline=true", "--threshold=15", unit)


def test_requests_may_end_before_systemd_kills() -> None:
    assert seconds(_settings()["TimeoutStopSec"]) > DRAIN_S


def test_home_is_where_systemd_makes_it() -> None:
    settings = _settings()
    text = UNIT.read_text(encoding="utf-8")
    assert f"DINO_SEARCH_HOME=/var/lib/{settings['StateDirectory']}" in text
    assert f"XDG_CACHE_HOME=/var/cache/{settings['CacheDirectory']}" in text
    assert f"u {settings['User']} " in (DEPLOY / "systemd" / "dino-search.sysusers").read_text(encoding="utf-8")


def test_machine_code_may_be_made_at_run_time() -> None:
    # With it on, convolutions and bfloat16 products of PyTorch on the processor end in "could not create a primitive".
    assert _settings()["MemoryDenyWriteExecute"] == "no"


def _settings() -> dict[str, str]:
    return dict(re.findall(r"^(\w+)=(.*)$", UNIT.read_text(encoding="utf-8"), flags=re.MULTILINE))
