"""What a run leaves for its reader: metrics.jsonl, run.json, and TensorBoard files where that is installed."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dino_index.errors import OutputUnwritable

METRICS = "metrics.jsonl"
STATUS = "run.json"


class RunLog:
    """Appends events to metrics.jsonl; a resumed run goes on after the last event of its checkpoint."""

    def __init__(self, run: Path, *, last_step: int | None = None) -> None:
        """last_step: of the checkpoint that the run resumes from; later events are dropped, since they come again."""
        self._run = run
        self._started = datetime.now(UTC).isoformat(timespec="seconds")
        if last_step is not None:
            _drop_later_events(run / METRICS, last_step)
        self._board: Any = _tensorboard(run / "tensorboard")

    def write(self, event: str, step: int, **values: Any) -> None:
        """One line: {"event", "step", ...}; values that are not finite as null. Raises OutputUnwritable."""
        row = {"event": event, "step": step} | {key: _plain(value) for key, value in values.items()}
        try:
            with open(self._run / METRICS, "a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            raise OutputUnwritable(f"{self._run / METRICS} cannot be written: {error.strerror}") from error
        if self._board is not None:
            for key, value in row.items():
                if isinstance(value, (int, float)) and key != "step":
                    self._board.add_scalar(f"{event}/{key}", value, step)

    def save_status(self, status: str, **facts: Any) -> None:
        """run.json: where the run stands. Raises OutputUnwritable."""
        path = self._run / STATUS
        partial = path.with_suffix(".partial")
        try:
            partial.write_text(
                json.dumps({"status": status, "started": self._started} | facts, indent=2) + "\n", encoding="utf-8"
            )
            os.replace(partial, path)
        except OSError as error:
            raise OutputUnwritable(f"{path} cannot be written: {error.strerror}") from error

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _drop_later_events(path: Path, last_step: int) -> None:
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # cut off when the run was killed
            continue
        if row.get("step", 0) <= last_step:
            kept.append(line)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    os.replace(partial, path)


def _tensorboard(folder: Path) -> Any:
    """A writer, or None without the package tensorboard (the extra `[tensorboard]`)."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    writer: Any = importlib.import_module("torch.utils.tensorboard").SummaryWriter
    return writer(str(folder))
