"""`dino-search evaluate linear` and `finetune`: JSON, table, files, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from coloured_sets import write_coloured
from commands_in_process import Command
from dino_search.cli import app

QUICK_FINETUNING: list[str | Path] = ["--epochs", "10", "--batch-size", "6", "--learning-rate", ".1", "--mixup", "0"]
QUICK_FINETUNING += ["--cutmix", "0", "--erasing", "0", "--warmup-epochs", "1", "--drop-path", "0"]
QUICK_PROBE: list[str | Path] = ["--epochs", "20", "--train-batch", "6", "--learning-rate", ".1"]
COMMANDS: dict[str, list[str | Path]] = {
    "linear": QUICK_PROBE,
    "linear --fast": ["--epochs", "20", "--fast"],
    "finetune": QUICK_FINETUNING,
    "finetune --from-scratch": [*QUICK_FINETUNING, "--from-scratch"],
}


@pytest.fixture
def options(tmp_path: Path, tiny_model: Path) -> list[str | Path]:
    train, val = write_coloured(tmp_path / "train", 6), write_coloured(tmp_path / "val", 3, seed=1)
    return ["--train", train, "--val", val, "--model", tiny_model, "--device", "cpu", "--workers", "1"]


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_print_the_json_that_is_promised(
    dino_search: Command, options: list[str | Path], tiny_model: Path, name: str
) -> None:
    ended = dino_search("evaluate", name.split()[0], *options, *COMMANDS[name], "--json", "--seed", "2")
    assert ended.code == 0
    printed = ended.json()
    assert (printed["top1"], printed["top5"]) == (1.0, 1.0)
    assert printed["confidence"] == {"top1": [1.0, 1.0], "top5": [1.0, 1.0]}
    assert (printed["model"], printed["seed"], printed["train"]["used"]) == (str(tiny_model), 2, 18)


@pytest.mark.parametrize("name", ["linear --fast", "finetune"])
def test_results_are_written_and_not_overwritten(
    dino_search: Command, options: list[str | Path], tmp_path: Path, name: str
) -> None:
    command = ["evaluate", name.split()[0], *options, *COMMANDS[name], "--per-class", "5", "--out", tmp_path / "out"]
    ended = dino_search(*command)
    assert ended.code == 0
    assert [line.split()[0] for line in ended.out.splitlines()] == ["top1", "top5"]
    assert "15 training images and 9 others, 3 classes" in ended.err
    assert json.loads((tmp_path / "out/result.json").read_text())["per_class"] == 5
    assert "| top1 | 100.0 % |" in (tmp_path / "out/table.md").read_text()
    assert (tmp_path / "out/plot.png").stat().st_size > 1000
    again = dino_search(*command)
    assert (again.code, again.err.count("\n")) == (1, 1)
    assert "exists already" in again.err


def test_features_are_kept_in_the_home(dino_search: Command, options: list[str | Path], home: Path) -> None:
    command = ["evaluate", "linear", *options, *COMMANDS["linear --fast"], "--json"]
    first = dino_search(*command).json()
    kept = {path.name for path in (home / "evaluation").iterdir() if "cls-of-1" in path.name}
    assert len(kept) == 1
    assert dino_search(*command).json() == first
    assert dino_search(*command, "--no-cache").json() == first


def test_a_tuned_backbone_is_saved_for_index_and_not_overwritten(
    dino_search: Command, options: list[str | Path], tmp_path: Path
) -> None:
    path = tmp_path / "tuned.safetensors"
    command = ["evaluate", "finetune", *options, *QUICK_FINETUNING, "--save", path, "--json"]
    assert dino_search(*command).code == 0
    indexed = dino_search("index", tmp_path / "val", "--model", path, "--json")
    assert (indexed.code, indexed.json()["added"]) == (0, 9)
    refused = dino_search(*command)
    assert (refused.code, refused.err.count("\n")) == (1, 1)
    assert "exists already" in refused.err
    assert dino_search(*command, "--force").code == 0


@pytest.mark.parametrize("command", ["linear", "finetune"])
def test_errors_of_folders_are_one_line(
    dino_search: Command, options: list[str | Path], tmp_path: Path, command: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/train2018.json").write_text("{}")
    for train, said in (
        (tmp_path / "gone", "no such file or folder"),
        (tmp_path / "empty", "expected images under"),
        (tmp_path / "val/red", "found one (red)"),
        (tmp_path / "damaged/train2018.json", "as iNaturalist has them"),
    ):
        ended = dino_search("evaluate", command, *options, "--train", train)
        assert (ended.code, ended.out, ended.err.count("\n")) == (1, "", 1)
        assert said in ended.err


def test_blocks_that_the_model_has_not_are_an_error_in_one_line(
    dino_search: Command, options: list[str | Path]
) -> None:
    ended = dino_search("evaluate", "linear", *options, "--blocks", "4", "--fast")
    assert (ended.code, ended.err) == (1, "error: the model has 1 blocks, expected 4 or more; take fewer\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["linear", "--train", "t"],
        ["linear", "--train", "t", "--val", "v", "--device", "tpu"],
        ["linear", "--train", "t", "--val", "v", "--learning-rate", "0"],
        ["linear", "--train", "t", "--val", "v", "--blocks", "0"],
        ["finetune", "--val", "v"],
        ["finetune", "--train", "t", "--val", "v", "--layer-decay", "2"],
        ["finetune", "--train", "t", "--val", "v", "--save", "weights.pth"],
        ["finetune", "--train", "t", "--val", "v", "--drop-path", "1"],
    ],
)
def test_wrong_usage_ends_with_2(dino_search: Command, arguments: list[Any]) -> None:
    assert dino_search("evaluate", *arguments).code == 2


@pytest.mark.parametrize("command", ["linear", "finetune"])
def test_help_ends_with_an_example(command: str) -> None:
    result = CliRunner().invoke(app, ["evaluate", command, "--help"], env={"COLUMNS": "120", "TERM": "dumb"})
    assert result.exit_code == 0
    assert result.stdout.rstrip().splitlines()[-1].strip().startswith(f"dino-search evaluate {command} ")
