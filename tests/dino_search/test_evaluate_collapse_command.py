"""`dino-search evaluate collapse`: what it prints, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from commands_in_process import Command
from tiny_runs import leave_out_pictures, write_noise, write_tiny_recipe


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str | Path]:
    leave_out_pictures(monkeypatch)
    recipe = write_tiny_recipe(tmp_path / "tiny.yaml")
    return [
        "evaluate", "collapse", write_noise(tmp_path / "noise"), "--recipe", recipe, "--out", tmp_path / "out",
        "--set", "precision=float32",
    ]  # fmt: skip


def test_it_prints_and_writes_the_curves_of_four_runs(
    dino_search: Command, command: list[str | Path], tmp_path: Path
) -> None:  # fmt: skip
    ended = dino_search(*command, "--steps", "4", "--json")
    assert ended.code == 0
    printed = ended.json()
    assert list(printed["curves"]) == ["both", "centring only", "sharpening only", "neither"]
    assert printed["curves"]["both"]["step"] == [1, 2, 3, 4, 5, 6]  # whole epochs
    out = tmp_path / "out"
    assert json.loads((out / "result.json").read_text()) == printed
    with Image.open(out / "plot.png") as plot:
        assert plot.width > 800
    assert sorted(path.name for path in (out / "runs").iterdir()) == [
        "both", "centring_only", "neither", "sharpening_only",
    ]  # fmt: skip
    assert "centring only (2 of 4)" in ended.err
    again = dino_search(*command, "--steps", "4")
    assert again.code == 0
    assert len(again.out.splitlines()) == 8
    assert json.loads((out / "result.json").read_text()) == printed


def test_wrong_lengths_and_recipes_are_refused(dino_search: Command, command: list[str | Path], tmp_path: Path) -> None:
    both = dino_search(*command, "--steps", "4", "--epochs", "1")
    assert both.code == 2
    assert "expected steps or epochs, found both" in both.err
    without = dino_search(*command, "--epochs", "1", "--set", "centring=none")
    assert without.code == 1
    assert "expected a recipe with prototypes, centring and sharpening" in without.err
    assert not (tmp_path / "out").exists()
