from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dino_index.errors import OutputUnwritable, RunNotFound
from dino_training.checkpoints import list_checkpoints, load_checkpoint, save_checkpoint
from small_disks import fill, mounted
from tiny_runs import assert_same


def state(step: int, size: int = 100) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {
        "step": step,
        "weights": {"a.weight": torch.randn(size, generator=generator), "count": torch.tensor(step)},
        "figures": {"knn_top1": None, "copies_found": 0.5},
        "warnings": ["one", "zwei äöü"],
        "best_figure": float("-inf"),
    }


def steps(run: Path) -> list[int]:
    return [int(path.stem.removeprefix("step-")) for path in list_checkpoints(run)]


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 7, state(7))
    assert path == tmp_path / "checkpoints" / "step-00000007.pt"
    assert_same(load_checkpoint(tmp_path), state(7))


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    for step in (1, 5, 9, 12):
        save_checkpoint(tmp_path, step, state(step))
    assert steps(tmp_path) == [9, 12]
    assert load_checkpoint(tmp_path)["step"] == 12


def test_a_step_that_is_saved_again_replaces_itself_alone(tmp_path: Path) -> None:
    for step in (5, 9, 9):
        save_checkpoint(tmp_path, step, state(step))
    assert steps(tmp_path) == [5, 9]


@pytest.mark.parametrize("damage", ["cut", "empty", "other bytes", "code"])
def test_a_damaged_one_is_told_and_the_one_before_counts(tmp_path: Path, damage: str) -> None:
    for step in (5, 9):
        newest = save_checkpoint(tmp_path, step, state(step))
    if damage == "cut":
        newest.write_bytes(newest.read_bytes()[:-300])
    elif damage == "empty":
        newest.write_bytes(b"")
    elif damage == "other bytes":
        newest.write_bytes(os.urandom(4000))
    else:
        torch.save({"step": 9, "weights": print}, newest)
    remarks: list[str] = []
    assert_same(load_checkpoint(tmp_path, remarks.append), state(5))
    assert len(remarks) == 1
    assert remarks[0].startswith("step-00000009.pt cannot be read: ")
    assert "\n" not in remarks[0]


def test_a_run_that_went_on_from_before_a_damaged_one_keeps_two_good_ones(tmp_path: Path) -> None:
    for step in (5, 9):
        newest = save_checkpoint(tmp_path, step, state(step))
    newest.write_bytes(b"")
    save_checkpoint(tmp_path, 7, state(7))
    assert steps(tmp_path) == [5, 7]
    assert load_checkpoint(tmp_path)["step"] == 7


def test_without_a_readable_checkpoint_there_is_nothing_to_resume(tmp_path: Path) -> None:
    for run in (tmp_path, tmp_path / "missing", tmp_path / ("x" * 300)):
        with pytest.raises(RunNotFound, match=r"no checkpoint to resume from \(none was written yet"):
            load_checkpoint(run)
    save_checkpoint(tmp_path, 5, state(5)).write_bytes(b"")
    with pytest.raises(RunNotFound, match=r"step-00000005\.pt cannot be read"):
        load_checkpoint(tmp_path)


def test_what_a_killed_process_left_is_no_checkpoint_and_goes_with_the_next_one(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 5, state(5))
    half = tmp_path / "checkpoints" / "step-00000009.partial"
    half.write_bytes(b"half")
    assert load_checkpoint(tmp_path)["step"] == 5
    save_checkpoint(tmp_path, 12, state(12))
    assert not half.exists()
    assert steps(tmp_path) == [5, 12]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(OutputUnwritable, match=r"step-00000005\.pt cannot be written"):
        save_checkpoint(tmp_path, 5, state(5))


@pytest.mark.mounts
def test_a_full_disk_leaves_the_earlier_checkpoints_and_nothing_half_written(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "1m") as disk:
        for step in (5, 9):
            save_checkpoint(disk, step, state(step, 10_000))
        filler = fill(disk)
        for step in (12, 13):
            with pytest.raises(OutputUnwritable, match=r"earlier checkpoints are intact: free some space .* --resume"):
                save_checkpoint(disk, step, state(step, 10_000))
        assert sorted(path.name for path in (disk / "checkpoints").iterdir()) == [
            "step-00000005.pt",
            "step-00000009.pt",
        ]
        assert_same(load_checkpoint(disk), state(9, 10_000))
        filler.unlink()
        save_checkpoint(disk, 12, state(12, 10_000))
        assert steps(disk) == [9, 12]
