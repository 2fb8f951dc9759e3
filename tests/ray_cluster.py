"""A Ray cluster of several nodes on this machine, to be taken apart."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster

_OBJECT_STORE_BYTES = 80 << 20


@contextmanager
def running_cluster(*cpus: int) -> Iterator[Cluster]:
    """A cluster with so many processors on each of its nodes, the head first."""
    # Asked in a process of its own, as tests may not reach out of this machine.
    code = "import ray; print(ray.util.get_node_ip_address())"
    address = subprocess.run([sys.executable, "-c", code], check=True, text=True, capture_output=True).stdout.strip()
    # Its sockets lie there, and their paths may not be long.
    with (
        tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as environment,
    ):
        # By itself Ray has its workers wait for whatever else the machine does.
        environment.setenv("RAY_worker_niceness", "0")
        # There Ray notes which cluster was started last, for whoever names none; other processes have their own.
        environment.setenv("RAY_TMPDIR", folder)
        temp_dir = Path(folder, "ray")
        temp_dir.mkdir()
        head = {"num_cpus": cpus[0], "num_gpus": 0, "object_store_memory": _OBJECT_STORE_BYTES}
        cluster = Cluster(
            initialize_head=True,
            head_node_args=head | {"node_ip_address": address, "include_dashboard": False, "temp_dir": str(temp_dir)},
        )
        try:
            for number in cpus[1:]:
                add_node(cluster, number)
            yield cluster
        finally:
            cluster.shutdown()  # type: ignore[no-untyped-call]


def add_node(cluster: Any, num_cpus: int) -> None:
    cluster.add_node(
        num_cpus=num_cpus,
        num_gpus=0,
        object_store_memory=_OBJECT_STORE_BYTES,
        node_ip_address=cluster.head_node.node_ip_address,
    )


def kill_worker(node: Any, what: str) -> bool:
    """Kills a process of a node that does what is named, if there is one."""
    found = _workers(node, what)
    for process in found[:1]:
        process.kill()
    return bool(found)


def has_worker(node: Any, what: str) -> bool:
    return bool(_workers(node, what))


def _workers(node: Any, what: str) -> list[psutil.Process]:
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    found = []
    for process in raylet.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if what in " ".join(process.cmdline()):
                found.append(process)
    return found


def remove_node(cluster: Cluster, node: Any) -> None:
    """Ends a node as a machine that loses its power does."""
    cluster.remove_node(node, allow_graceful=False)
