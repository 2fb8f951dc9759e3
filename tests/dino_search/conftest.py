"""What the tests of the product share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from commands_in_process import Command, Ended
from dino_search.cli import main
from sample_collections import write_pictures


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Eight pictures in two folders."""
    folder = tmp_path / "photos"
    write_pictures(folder, *(f"{name}/{number}.jpg" for name in ("cat", "dog") for number in range(4)))
    return folder


@pytest.fixture
def dino_search(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command in this process, as the installed script does."""

    def run(*arguments: str | Path) -> Ended:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["dino-search", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        written = capsys.readouterr()
        return Ended(code, written.out, written.err)

    return run
