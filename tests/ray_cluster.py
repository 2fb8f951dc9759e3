"""A Ray cluster of several nodes on this machine, to be taken apart."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
from ray.cluster_utils import Cluster

_NODE = {"num_gpus": 0, "object_store_memory": 80 << 20, "include_dashboard": False}


@contextmanager
def running_cluster(*cpus: int) -> Iterator[Cluster]:
    """A cluster with so many processors on each of its nodes, the head first."""
    # Asked in a process of its own, as tests may not reach out of this machine.
    code = "import ray; print(ray.util.get_node_ip_address())"
    address = subprocess.run([sys.executable, "-c", code], check=True, text=True, capture_output=True).stdout.strip()
    node = {**_NODE, "node_ip_address": address}
    # Its sockets lie there, and their paths may not be long.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        cluster = Cluster(head_node_args={**node, "num_cpus": cpus[0], "temp_dir": folder}, initialize_head=True)
        try:
            for number in cpus[1:]:
                cluster.add_node(**{**node, "num_cpus": number})
            yield cluster
        finally:
            cluster.shutdown()


def kill_worker(node: Any, what: str) -> bool:
    """Kills a process of a node that does what is named, if there is one."""
    for process in workers(node):
        if what in " ".join(process.cmdline()):
            os.kill(process.pid, signal.SIGKILL)
            return True
    return False


def workers(node: Any) -> list[psutil.Process]:
    raylet = node.all_processes["raylet"][0].process.pid
    return psutil.Process(raylet).children(recursive=True)


def remove_node(cluster: Cluster, node: Any) -> None:
    """Ends a node as a machine that loses its power does."""
    cluster.remove_node(node, allow_graceful=False)
