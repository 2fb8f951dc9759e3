"""Indexing by a Ray cluster on this machine against indexing in this process, one after the other.

ViT-S/16 at 224 px, random weights, ImageNet-sized JPEG files. `--images N --rounds R --replicas N`
"""

from __future__ import annotations

import argparse
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from material import report, report_ratio, write_photographs, write_random_model

from dino_index.indexing import IndexOptions, Progress
from dino_index.ray_engine import RaySettings
from dino_search import Collection


@contextmanager
def cluster(num_cpus: int) -> Iterator[str]:
    """The address of a cluster of one node, which runs before and after: starting it is not measured."""
    code = (
        "import ray, sys\n"
        f"context = ray.init('local', num_cpus={num_cpus}, include_dashboard=False, log_to_driver=False)\n"
        "print(context.address_info['gcs_address'], flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdin is not None
        yield process.stdout.readline().strip()
        process.stdin.close()


def indexing_rates(photos: Path, home: Path, model: Path, ray: RaySettings | None) -> tuple[float, float]:
    """Images/s of a first `index` into an empty home: of the whole run, and from the first recorded image to the last.

    The second leaves out what a run costs however long it is: processes that start, replicas that load.
    """
    marks: list[tuple[int, float]] = []

    def mark(progress: Progress) -> None:
        if progress.done and (not marks or marks[-1][0] < progress.done):
            marks.append((progress.done, time.perf_counter()))

    with Collection.open(home=home, model=model) as collection:
        start = time.perf_counter()
        collection.index(photos, IndexOptions(ray=ray), on_progress=mark)
    (first, began), (last, ended) = marks[0], marks[-1]
    return last / (ended - start), (last - first) / (ended - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--replicas", type=int, default=2)
    arguments = parser.parse_args()
    # As Ray has it for a cluster of its own; to be said to who connects to it.
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    rates: dict[str, list[tuple[float, float]]] = {"local": [], "ray": []}
    with tempfile.TemporaryDirectory() as name, cluster(arguments.replicas) as address:
        folder = Path(name)
        write_photographs(folder / "photos", arguments.images, (500, 375))
        model = write_random_model(folder / "vits16.safetensors", "vit_small_patch16_224")
        ray = RaySettings(address=address, replicas=arguments.replicas)
        for round_number in range(arguments.rounds):
            for engine, settings in (("local", None), ("ray", ray)):
                home = folder / f"home-{engine}-{round_number}"
                rates[engine].append(indexing_rates(folder / "photos", home, model, settings))
    print(f"{arguments.images} JPEG files of 500x375, {arguments.replicas} replicas on {os.cpu_count()} processors")
    for place, what in enumerate(("the whole run", "from the first to the last recorded")):
        local, cluster_rates = ([rate[place] for rate in rates[engine]] for engine in ("local", "ray"))
        report(f"--engine local, {what}", local, "images/s")
        report(f"--engine ray, {what}", cluster_rates, "images/s")
        report_ratio(f"ray / local, {what}", cluster_rates, local, ">= 0.85")


if __name__ == "__main__":
    main()
