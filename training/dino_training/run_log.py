"""What a run leaves for its reader: metrics.jsonl, run.json, and TensorBoard files where that is installed."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
from contextlib import suppress
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
        self._board: Any = _tensorboard(run / "tensorboard", last_step)

    def write(self, event: str, step: int, **values: Any) -> None:
        """One line: {"event", "step", ...}; values that are not finite as null. Raises OutputUnwritable."""
        row = {"event": event, "step": step} | {key: _plain(value) for key, value in values.items()}
        try:
            with open(self._run / METRICS, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            if self._board is not None:
                for key, value in row.items():
                    if isinstance(value, (int, float)) and key != "step":
                        self._board.add_scalar(f"{event}/{key}", value, step)
        except OSError as error:
            raise _unwritable(self._run / METRICS, error) from error

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
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise _unwritable(path, error) from error

    def close(self) -> None:
        if self._board is not None:
            # It fails where it has failed before, on a full disk: whoever wrote then was told.
            with suppress(OSError):
                self._board.close()


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _drop_later_events(path: Path, last_step: int) -> None:
    if not path.is_file():
        return
    kept = []
    partial = path.with_suffix(".partial")
    try:
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                row = json.loads(line)
            except ValueError:  # the end, or cut off when the run was killed
                continue
            if row.get("step", 0) <= last_step:
                kept.append(line)
        partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise _unwritable(path, error) from error


def _tensorboard(folder: Path, last_step: int | None) -> Any:
    """A writer, or None without the package tensorboard (the extra `[tensorboard]`).

    last_step: TensorBoard hides what earlier files hold beyond it.
    """
    if importlib.util.find_spec("tensorboard") is None:
        return None
    writer: Any = importlib.import_module("torch.utils.tensorboard").SummaryWriter
    try:
        return writer(str(folder), purge_step=None if last_step is None else last_step + 1)
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(path: Path, error: OSError) -> OutputUnwritable:
    return OutputUnwritable(f"{path} cannot be written: {error.strerror or error}")
