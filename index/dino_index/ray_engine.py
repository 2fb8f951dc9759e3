"""Embedding on a Ray cluster: the same outcomes as `embedding.embed_files`, made by the cluster's processors and GPUs.

Ray ends a process that loses its cluster, prints where it likes and takes over signals. It therefore has a process of
its own, `ray_driver.py`, that lives as long as one attempt: when a node goes away and with it what held a replica, the
files whose outcome has not come back are given to the next attempt, with as many replicas as the rest can hold.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import subprocess
import sys
import tempfile
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, Queue
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from dino_index.embedding import EmbeddedFile, EmbeddingSettings, FailedFile
from dino_index.errors import ClusterError, ClusterLost, DinoSearchError, ImageError, RayMissing
from dino_index.image_files import ListedFile
from dino_index.model_files import ModelSpec

if TYPE_CHECKING:
    from dino_index.backbones import Device

# How often the caller can stop the run while nothing comes back.
_POLL_EVERY_S = 0.3
_GO_ON = "what was recorded stays, and the same command goes on from there"
_MAX_WAITING_MESSAGES = 8
# For the driver to leave the cluster in order, which ends a cluster that it started.
_LEAVE_TIMEOUT_S = 15.0


@dataclass(frozen=True, kw_only=True)
class RaySettings:
    """Which cluster embeds, and with how many replicas of the model."""

    address: str | None = None
    """`HOST:PORT` of the head, or `auto`; None takes what RAY_ADDRESS names, a cluster that runs on this machine, or
    starts one on it for the run."""
    replicas: int = 0
    """Each on a GPU, or on a processor of a cluster without GPUs; 0 takes as many as the cluster has free."""
    patience_s: float = 60.0
    """How long to wait for processors or GPUs that other jobs of the cluster hold."""

    def __post_init__(self) -> None:
        if self.replicas < 0:
            raise ValueError(f"replicas must be 0 or more, found {self.replicas}")


@dataclass(frozen=True, kw_only=True)
class RayJob:
    """What the driver process is given."""

    paths: list[str]
    spec: ModelSpec
    known: Mapping[bytes, tuple[int, int]]
    device: Device
    embedding: EmbeddingSettings
    ray: RaySettings


class Message(NamedTuple):
    """What the driver process says. value: rows (number, pickled outcome, CLS, GeM) of the paths by their numbers; how
    many replicas the cluster can still hold; or why the driver ended."""

    kind: Literal["outcomes", "node_lost", "failed", "refused", "done"]
    value: Any = None


def embed_files_on_ray(
    files: Sequence[ListedFile],
    spec: ModelSpec,
    known: Mapping[bytes, tuple[int, int]],
    embedding: EmbeddingSettings,
    ray: RaySettings,
    device: Device = "auto",
) -> Generator[list[EmbeddedFile | FailedFile]]:
    """Outcomes of all files, in any order, some at a time; empty lists while nothing comes back.

    known: (width, height) of bytes whose vectors are known, by sha256.
    Raises RayMissing, ClusterUnreachable, ClusterTooSmall, ClusterLost, NodeUnfit, ModelError.
    """
    if importlib.util.find_spec("ray") is None or importlib.util.find_spec("pandas") is None:
        raise RayMissing(
            "--engine ray needs Ray Data, which is not installed: pip install 'ray[data]' in the environment of "
            "dino-search, here and on all nodes"
        )
    remaining = dict(enumerate(files))
    job = RayJob(paths=[], spec=spec, known=known, device=device, embedding=embedding, ray=ray)
    while remaining:
        numbers = list(remaining)
        job = replace(job, paths=[file.path for file in remaining.values()])
        with _driver(job) as driver:
            while (message := driver.next_message()).kind == "outcomes":
                batch = []
                for place, outcome, cls, gem in message.value:
                    # Ray may do a task again after its outcome has come back.
                    if (file := remaining.pop(numbers[place], None)) is not None:
                        batch.append(_outcome(file, outcome, cls, gem))
                yield batch
            problem = driver.problem(message)
        if message.kind == "refused":
            if len(remaining) < len(files) and isinstance(problem, ClusterError):
                raise ClusterLost(f"the Ray cluster can embed no more: {problem}; {_GO_ON}") from problem
            raise problem
        if message.kind == "node_lost":
            if not message.value:
                raise problem
            job = replace(job, ray=replace(job.ray, replicas=message.value))
        elif remaining and len(remaining) == len(numbers):
            raise problem


def _outcome(file: ListedFile, outcome: bytes, cls: bytes | None, gem: bytes | None) -> EmbeddedFile | FailedFile:
    facts = pickle.loads(outcome)
    if isinstance(facts, tuple):
        return FailedFile(file, ImageError(*facts))
    vectors = (None if vector is None else np.frombuffer(vector, np.float16) for vector in (cls, gem))
    return EmbeddedFile(file, facts, *vectors)


class _Driver:
    """One attempt: a running driver process."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process = process
        self._log = log
        self._messages: Queue[Message] = Queue(_MAX_WAITING_MESSAGES)
        self._leaving = False
        assert process.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(process.stdout,), daemon=True)
        self._reader.start()

    def next_message(self) -> Message:
        """What the driver says next; outcomes of no file when it says nothing for a moment."""
        try:
            return self._messages.get(timeout=_POLL_EVERY_S)
        except Empty:
            return Message("outcomes", [])

    def problem(self, message: Message) -> DinoSearchError:
        """Why the attempt has ended early, as its last message has it."""
        if message.kind == "refused":
            problem: DinoSearchError = message.value
            return problem
        if message.kind == "node_lost":
            return ClusterLost(f"all nodes of the Ray cluster that could embed are gone; {_GO_ON}")
        lines = self._log.read_text(errors="replace").split("\n")
        last_line = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        return ClusterLost(f"the Ray cluster gave nothing any more: {message.value or last_line}; {_GO_ON}")

    def leave(self) -> None:
        """Ends the process, and with it its job on the cluster."""
        self._leaving = True
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(_LEAVE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self, stream: IO[bytes]) -> None:
        last = Message("failed")
        try:
            while (message := pickle.load(stream)).kind == "outcomes":
                self._hand_over(message)
            last = message
        except (EOFError, pickle.UnpicklingError):
            pass  # ended in the middle, as Ray ends a process that lost its cluster
        self._hand_over(last)
        # The driver must not wait for somebody to read what it still says.
        while stream.read(1 << 16):
            pass

    def _hand_over(self, message: Message) -> None:
        if not self._leaving:
            self._messages.put(message)


@contextmanager
def _driver(job: RayJob) -> Generator[_Driver]:
    environment = {
        **os.environ,
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    with (
        tempfile.TemporaryDirectory() as folder,
        open(Path(folder) / "driver.log", "wb") as log,
        subprocess.Popen(
            [sys.executable, "-m", "dino_index.ray_driver"], env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            start_new_session=True,  # Ctrl-C is for the caller, who ends the driver in order
        ) as process,
    ):  # fmt: skip
        driver = _Driver(process, Path(log.name))
        try:
            assert process.stdin is not None
            pickle.dump(job, process.stdin)
            process.stdin.flush()
            yield driver
        finally:
            driver.leave()
