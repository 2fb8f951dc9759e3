"""Runs one job on a Ray cluster by Ray Data; started by `ray_engine.py` as a process of its own.

Reads a pickled `RayJob` on stdin and writes pickled `Message`s on stdout. Ends when stdin does.
"""

from __future__ import annotations

import logging
import os
import pickle
import secrets
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import ray
import ray.data

from dino_index.errors import ClusterTooSmall, ClusterUnreachable, DinoSearchError, NodeUnfit
from dino_index.ray_engine import Message, RayJob
from dino_index.ray_stages import (
    FileEmbedder,
    KnownPictures,
    StageSettings,
    decode_files,
    installed_version,
    listed_files,
)

# A processor has a replica and what decodes for it: pictures take the larger part of the time to embed.
_CPUS_A_REPLICA = 0.75
_CPUS_A_DECODER = {"cpu": 0.25, "cuda": 1.0}
# Files in a table that goes from a decoder to a replica: a whole forward pass at least. At the end of a run replicas
# wait for the one with the last table, for seconds where a picture takes a processor a tenth of one.
_TABLE_SIZES = {"cpu": 16, "cuda": 256}
# Of a decoding task, which is what Ray does again when a node goes away.
_MAX_TABLES_A_TASK = 64
_TASKS_A_PROCESSOR = 8
_ANSWER_TIMEOUT_S = 5.0
_CONNECT_TIMEOUT_S = 40.0
_LOOK_EVERY_S = 1.0


def main() -> None:
    """Does the job on stdin."""
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what Ray prints is no message
    sending = threading.Lock()

    def send(message: Message) -> None:
        with sending:
            pickle.dump(message, channel)
            channel.flush()

    job: RayJob = pickle.load(sys.stdin.buffer)
    try:
        run(job, send)
        send(Message("done"))
    except Exception as error:
        logging.getLogger(__name__).exception("the job ended early")
        expected = _expected_error(error)
        send(Message("refused", expected) if expected else Message("failed", _in_one_line(error)))
    ray.shutdown()


def run(job: RayJob, send: Callable[[Message], None]) -> None:
    """Sends the outcomes of all files. Raises ClusterErrors, ModelErrors and whatever Ray does."""
    threading.Thread(target=_leave_with_caller, args=(sys.stdin.buffer,), daemon=True).start()
    _connect(job.ray.address or os.environ.get("RAY_ADDRESS") or None, send)
    device = _choose_device(job.device)
    replicas = _wait_for_room(job, device)
    threading.Thread(target=_watch_nodes, args=(device, replicas, send), daemon=True).start()
    for table in _outcomes(job, device, replicas):
        send(Message("outcomes", list(zip(*(column.to_pylist() for column in table.columns), strict=True))))


def _outcomes(job: RayJob, device: Literal["cpu", "cuda"], replicas: int) -> Iterator[Any]:
    """Tables of what became of the files, as they come."""
    table_size = max(_TABLE_SIZES[device], job.embedding.batch_size)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    # A decoding task hands on a table as soon as it is full of pictures.
    context.target_max_block_size = table_size * job.spec.input_size**2 * 3
    context.execution_options.verbose_progress = False
    settings = StageSettings(
        spec=job.spec,
        device=device,
        batch_size=job.embedding.batch_size,
        limits=job.embedding.limits,
        version=installed_version(),
        weights=ray.put(np.fromfile(job.spec.weights_path, np.uint8)),
        known=ray.put(KnownPictures(job.known)),
    )
    # Ray keeps an entry for each task, and hands them out in turn.
    num_tasks = _TASKS_A_PROCESSOR * max(_capacity("cpu"), 1)
    task_size = table_size * min(max(len(job.paths) // (num_tasks * table_size), 1), _MAX_TABLES_A_TASK)
    tables = [
        listed_files(job.paths[begin : begin + task_size], begin) for begin in range(0, len(job.paths), task_size)
    ]
    decoded = ray.data.from_arrow(tables).map_batches(
        decode_files,  # type: ignore[arg-type]
        fn_kwargs={"settings": settings},
        batch_size=table_size,
        batch_format="pyarrow",
        num_cpus=_CPUS_A_DECODER[device],
        compute=ray.data.TaskPoolStrategy(job.embedding.workers or None),
    )
    embedded = decoded.map_batches(
        FileEmbedder,
        fn_constructor_kwargs={"settings": settings},
        batch_size=table_size,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=replicas),
        **({"num_gpus": 1} if device == "cuda" else {"num_cpus": _CPUS_A_REPLICA}),
    )
    yield from embedded.iter_batches(batch_size=None, batch_format="pyarrow")


def _connect(address: str | None, send: Callable[[Message], None]) -> None:
    """Raises ClusterUnreachable, or sends it, as Ray tries for ever where something else answers."""
    if address and address.startswith("ray://"):
        raise ClusterUnreachable(
            f"{address} leads to a Ray client server: run dino-search on a node of the cluster, with "
            "--ray-address auto or HOST:PORT of the head (6379 by default)"
        )
    given_up = threading.Timer(
        _CONNECT_TIMEOUT_S,
        lambda: send(Message("refused", _unreachable(address, f"no answer within {_CONNECT_TIMEOUT_S:.0f} s"))),
    )
    given_up.daemon = True
    given_up.start()
    host, _, port = (address or "").rpartition(":")
    try:
        if host and port.isdecimal():
            socket.create_connection((host.strip("[]"), int(port)), _ANSWER_TIMEOUT_S).close()
        if address is None and _starts_own_cluster():
            address = "local"
            _choose_token()
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise _unreachable(address, _in_one_line(error)) from error
    finally:
        given_up.cancel()


def _starts_own_cluster() -> bool:
    """Whether Ray, told no address, has no cluster of this machine to connect to: where it looks for the last one."""
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    return not Path(folder, "ray/ray_current_cluster").exists()


def _choose_token() -> None:
    """Gives this process's own cluster a token, unless the user has one or wants none.

    Ray would write one of its own into the user's home, readable for all, where it stays.
    """
    variables = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
    if not any(name in os.environ for name in variables) and not Path("~/.ray/auth_token").expanduser().exists():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _unreachable(address: str | None, why: str) -> ClusterUnreachable:
    return ClusterUnreachable(
        f"no Ray cluster can be used at {address or 'this machine'} ({why}): expected one that was started with "
        "ray start --head, and this machine to be one of its nodes (and RAY_AUTH_MODE=token where it asks for a token)"
    )


def _choose_device(device: str) -> Literal["cpu", "cuda"]:
    if device == "auto":
        return "cuda" if _capacity("cuda") else "cpu"
    return "cuda" if device == "cuda" else "cpu"


def _capacity(device: Literal["cpu", "cuda"]) -> int:
    """How many replicas the nodes that are alive could hold."""
    resource = "GPU" if device == "cuda" else "CPU"
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return sum(int(node["Resources"].get(resource, 0)) for node in nodes if node["Alive"])


def _wait_for_room(job: RayJob, device: Literal["cpu", "cuda"]) -> int:
    """How many replicas to make, when there is room for them. Raises ClusterTooSmall."""
    what = "GPU" if device == "cuda" else "processor"
    wanted, capacity = job.ray.replicas, _capacity(device)
    if capacity < max(wanted, 1):
        advice = f" or use --replicas {capacity}" if capacity else ""
        raise ClusterTooSmall(
            f"{max(wanted, 1)} replicas of the model need a {what} each, and the nodes of the Ray cluster have "
            f"{capacity}: add nodes (ray start --address HOST:PORT){advice}"
        )
    deadline = time.monotonic() + job.ray.patience_s
    while (free := _free(device)) < max(wanted, 1):
        if time.monotonic() > deadline:
            raise ClusterTooSmall(
                f"{max(wanted, 1)} replicas of the model need a {what} each, and of the Ray cluster's {capacity} only "
                f"{free} are free: wait for its other jobs (ray status), add nodes, or use fewer --replicas"
            )
        time.sleep(_LOOK_EVERY_S)
    return wanted or min(free, capacity)


def _free(device: Literal["cpu", "cuda"]) -> int:
    """How many replicas have room beside what runs, with one decoder at least."""
    free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    cpus = free.get("CPU", 0.0) - _CPUS_A_DECODER[device]
    if cpus < 0:
        return 0
    return int(free.get("GPU", 0.0)) if device == "cuda" else int(cpus / _CPUS_A_REPLICA)


def _watch_nodes(device: Literal["cpu", "cuda"], replicas: int, send: Callable[[Message], None]) -> None:
    """Ends the job when replicas have lost their place: Ray would keep their work waiting for another one."""
    while True:
        time.sleep(_LOOK_EVERY_S)
        if (capacity := _capacity(device)) < replicas:
            send(Message("node_lost", capacity))
            return


def _leave_with_caller(stdin: IO[bytes]) -> None:
    select.select([stdin], [], [])
    if ray.is_initialized():
        ray.shutdown()
    os._exit(0)


def _expected_error(error: BaseException | None) -> DinoSearchError | None:
    """The error of this project that is behind one of Ray's."""
    while error is not None:
        cause = getattr(error, "cause", None)
        if isinstance(cause, BaseException):  # Ray makes a class of its own for each error of a task, with this inside
            error = cause
            continue
        if isinstance(error, DinoSearchError):
            return error
        if isinstance(error, ModuleNotFoundError) or "No module named 'dino_index" in str(error):
            return NodeUnfit(
                f"a node of the Ray cluster cannot import what it needs ({_in_one_line(error)}): install the same "
                "dino-search, with ray[data], on all nodes"
            )
        error = error.__cause__
    return None


def _in_one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:300] if lines else ''}".rstrip(": ")


if __name__ == "__main__":
    main()
