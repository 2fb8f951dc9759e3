"""`dino-search evaluate ablation`: what it prints, writes and answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from commands_in_process import Command
from set_bytes import write_mnist
from tiny_runs import leave_out_pictures, write_tiny_recipe


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    leave_out_pictures(monkeypatch)
    folder = write_mnist(tmp_path / "set", [0, 3, 6, 9] * 6, [0, 3, 6, 9] * 2, side=16)
    recipe = write_tiny_recipe(tmp_path / "tiny.yaml")
    return [
        "evaluate", "ablation", "--train", folder, "--val", folder, "--out", tmp_path / "out", "--recipe", recipe,
        "--epochs", "1", "--device", "cpu",
    ]  # fmt: skip


def test_json_table_and_plot_say_the_same(dino_search: Command, command: list[object], tmp_path: Path) -> None:
    ended = dino_search(*command, "--only", "dino", "--only", "mse", "--set", "batch_size=4", "-k", "5", "--json")
    assert ended.code == 0, ended.err
    printed = ended.json()
    assert list(printed["top1"]) == ["random", "dino", "mse"]
    assert (printed["batch_size"], printed["k"], printed["runs"]["mse"]["steps"]) == (4, 5, 6)
    assert json.loads((tmp_path / "out/result.json").read_text()) == printed
    assert f"| mse | squared distance, no cross-entropy | {100 * printed['top1']['mse']:.1f} % |" in (
        tmp_path / "out/table.md"
    ).read_text("utf-8")
    with Image.open(tmp_path / "out/plot.png") as plot:
        assert plot.width > 400
    assert "mse (2 of 2)" in ended.err


def test_the_same_command_goes_on_with_what_is_there(dino_search: Command, command: list[object]) -> None:
    first = dino_search(*command, "--only", "dino")
    second = dino_search(*command, "--only", "mse")
    assert (first.code, second.code) == (0, 0)
    assert [line.split()[1] for line in second.out.splitlines()] == ["random", "dino", "mse"]
    assert second.out.splitlines()[:2] == first.out.splitlines()
    assert "published 52.6 %" in second.out


def test_a_run_that_fails_shows_in_the_exit_code_and_not_in_the_others(
    dino_search: Command, command: list[object]
) -> None:
    options = ["--set", "batch_size=12", "--only", "dino", "--only", "eighth_batch"]
    ended = dino_search(*command, *options)
    assert ended.code == 1
    assert [line.split()[1] for line in ended.out.splitlines()] == ["random", "dino"]
    assert "eighth_batch failed: expected a batch_size that 8 divides, found 12" in ended.err


def test_mistakes_are_one_line(dino_search: Command, command: list[object], tmp_path: Path) -> None:
    assert dino_search(*command, "--only", "dyno").code == 2
    assert dino_search(*command, "--steps", "3").code == 2
    wrong = dino_search(*command, "--set", "epoch=3")
    assert (wrong.code, wrong.out) == (1, "")
    assert wrong.err.startswith("error: --set: unknown recipe key 'epoch'")
    dino_search(*command, "--only", "dino")
    other = dino_search(*command, "--only", "dino", "--set", "seed=5")
    assert (other.code, other.err.count("\n")) == (1, 1)
    assert "choose another --out" in other.err
