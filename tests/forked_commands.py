"""The command line as processes of its own that start at once, to be killed, interrupted and run side by side.

A server process imports torch, timm and FAISS once and forks a child for each command: the real code in a real
process, without the seconds that those imports take.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from unittest.mock import patch

_FORK_SERVER = multiprocessing.get_context("forkserver")
# Imported only, never used in the server: threads that it started would be missing in its children.
_FORK_SERVER.set_forkserver_preload(
    [
        "alembic.command",
        "alembic.config",
        "dino_index.backbones",
        "dino_index.integrity",
        "dino_index.snapshots",
        "dino_search.api.serving",
        "dino_search.cli",
        "dino_search.collection",
        "dino_search.copies",
        "dino_search.duplicates",
        "dino_search.neighbours",
        "dino_training.pretraining",
        "pydantic.type_adapter",  # for typer
    ]
)


@dataclass(frozen=True)
class Finished:
    """How a command ended. exit_code: as a shell gives it, 128 + signal for a process that a signal ended."""

    exit_code: int
    stdout: str
    stderr: str


class Running:
    """A command that has been started."""

    def __init__(self, process: ForkServerProcess, stdout: Path, stderr: Path) -> None:
        self._process = process
        self._stdout = stdout
        self._stderr = stderr

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def send(self, number: signal.Signals) -> None:
        """Sends a signal, unless the process has ended."""
        if self._process.pid is not None and self._process.is_alive():
            os.kill(self._process.pid, number)

    def stderr(self) -> str:
        """What it has written there up to now."""
        return self._stderr.read_text("utf-8") if self._stderr.exists() else ""

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Returns when the condition holds or the command has ended."""
        while not condition() and self.is_alive():
            time.sleep(0.002)

    def wait(self, timeout_s: float = 120) -> Finished:
        self._process.join(timeout_s)
        code = self._process.exitcode
        assert code is not None, f"still running after {timeout_s} s; stderr: {self.stderr()}"
        stdout = self._stdout.read_text("utf-8") if self._stdout.exists() else ""
        return Finished(code if code >= 0 else 128 - code, stdout, self.stderr())


class CommandLine:
    """Starts `dino-search` commands; what they print goes to files under `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: list[Running] = []

    def start(self, *arguments: object, prepare: Callable[[], None] | None = None) -> Running:
        """Starts a command. prepare: called in its process before; a function of a module that can be imported."""
        self._folder.mkdir(exist_ok=True)
        outputs = [self._folder / f"{len(self._started)}.{name}" for name in ("stdout", "stderr")]
        # One thread computes: on a busy machine two that wait for each other are slower than one.
        with patch.dict(os.environ, OMP_NUM_THREADS="1"):  # read when the server starts
            process = _FORK_SERVER.Process(
                target=_run_command, args=([str(item) for item in arguments], outputs, dict(os.environ), prepare)
            )
            process.start()
        running = Running(process, *outputs)
        self._started.append(running)
        return running

    def run(self, *arguments: object, prepare: Callable[[], None] | None = None, timeout_s: float = 120) -> Finished:
        """The same, and waits until it has ended."""
        return self.start(*arguments, prepare=prepare).wait(timeout_s)

    def end(self) -> None:
        """Kills what still runs."""
        for running in self._started:
            running.send(signal.SIGKILL)
            running.wait()


def _run_command(
    arguments: Sequence[str], outputs: Sequence[Path], environment: dict[str, str], prepare: Callable[[], None] | None
) -> None:
    gc.freeze()  # to look through all that was imported, again and again, takes longer than most commands
    os.environ.clear()  # of what the test had that started the server
    os.environ.update(environment)
    for descriptor, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), descriptor)
    if prepare is not None:
        prepare()
    sys.argv = ["dino-search", *arguments]
    from dino_search.cli import main

    main()
