from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest

from dino_index.errors import OutputUnwritable
from dino_training.run_log import METRICS, STATUS, RunLog
from small_disks import fill, mounted


@pytest.fixture(autouse=True)
def _no_tensorboard(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The package is hidden, but from the tests that are about it."""
    if "tensorboard" not in request.node.name:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / METRICS).read_text("utf-8").splitlines()]


def write_steps(run: Path, *steps: int, last_step: int | None = None) -> None:
    log = RunLog(run, last_step=last_step)
    for step in steps:
        log.write("step", step, loss=1 / step)
    log.close()


def write_many(log: RunLog) -> None:
    for step in range(4, 2000):
        log.write("step", step, loss=0.5, message="x" * 1000)


def test_an_event_is_a_line_of_json(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.write("step", 10, loss=1 / 3, koleo=None, best=True, kl=math.nan, grad_norm=math.inf, images=640)
    log.write("remark", 11, message="zwei\nZeilen \u2028 \udcff")
    assert rows(tmp_path) == [
        {
            "event": "step", "step": 10, "loss": 0.333333, "koleo": None, "best": True, "kl": None, "grad_norm": None,
            "images": 640,
        },
        {"event": "remark", "step": 11, "message": "zwei\nZeilen \u2028 \udcff"},
    ]  # fmt: skip


def test_a_resumed_run_goes_on_after_the_last_event_of_its_checkpoint(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2, 3, 4)
    write_steps(tmp_path, 3, 4, 5, last_step=2)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_new_log_adds_to_what_is_there(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2)
    write_steps(tmp_path, 3)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("ending", [b'{"event": "step", "st', '{"message": "zwei ä'.encode()[:-1], b""])
def test_a_line_that_a_kill_cut_off_goes_when_the_run_is_resumed(tmp_path: Path, ending: bytes) -> None:
    write_steps(tmp_path, 1, 2)
    with open(tmp_path / METRICS, "ab") as file:
        file.write(ending)
    write_steps(tmp_path, 3, last_step=2)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]


def test_a_resumed_run_without_a_log_begins_one(tmp_path: Path) -> None:
    write_steps(tmp_path, 3, last_step=2)
    assert [row["step"] for row in rows(tmp_path)] == [3]


def test_the_status_is_replaced_as_a_whole(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.save_status("running", step=1, warnings=["zwei äöü \udcff"])
    log.save_status("finished", step=2)
    found = json.loads((tmp_path / STATUS).read_text("utf-8"))
    assert (found.pop("status"), found.pop("step")) == ("finished", 2)
    assert list(found) == ["started"]
    assert [path.name for path in tmp_path.glob("*.partial")] == []


def test_a_folder_that_is_gone_is_an_expected_failure(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "gone")
    with pytest.raises(OutputUnwritable, match=r"metrics\.jsonl cannot be written: No such file"):
        log.write("step", 1)
    with pytest.raises(OutputUnwritable, match=r"run\.json cannot be written"):
        log.save_status("running")


@pytest.mark.mounts
@pytest.mark.parametrize("board", ["tensorboard", "no board"])
def test_a_full_disk_is_an_expected_failure_and_the_log_goes_on_later(tmp_path: Path, board: str) -> None:
    with mounted(tmp_path / "disk", "200k") as disk:
        log = RunLog(disk)
        log.save_status("running", step=1)
        for step in range(1, 4):
            log.write("step", step, loss=0.5)
        filler = fill(disk)
        with pytest.raises(OutputUnwritable, match="No space left on device"):
            write_many(log)
        with pytest.raises(OutputUnwritable, match="No space left on device"):
            log.save_status("failed", warnings=["x" * 100_000])
        log.close()
        assert json.loads((disk / STATUS).read_text("utf-8"))["status"] == "running"
        with pytest.raises(OutputUnwritable, match="No space left on device"):
            RunLog(disk, last_step=3).close()
        assert [path.name for path in disk.glob("*.partial")] == []
        filler.unlink()
        write_steps(disk, 4, last_step=3)
        assert [row["step"] for row in rows(disk)] == [1, 2, 3, 4]


def test_tensorboard_gets_every_number_and_hides_what_a_resumed_run_repeats(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for last_step, values in ((None, [1.0, 2.0, 3.0]), (2, [30.0, 40.0])):
        log = RunLog(tmp_path, last_step=last_step)
        for step, value in enumerate(values, 1 if last_step is None else 3):
            log.write("step", step, loss=value, koleo=None, kl=math.nan)
        log.write("evaluation", 4, copies_found=0.25)
        log.close()
    found = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert sorted(found.Tags()["scalars"]) == ["evaluation/copies_found", "step/loss"]
    assert [(point.step, point.value) for point in found.Scalars("step/loss")] == [(1, 1), (2, 2), (3, 30), (4, 40)]
