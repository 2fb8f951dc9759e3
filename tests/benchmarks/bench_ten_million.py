"""Ten million vectors on one machine: the catalog, the index, searches, and how much memory and disk they take.

`--num N --dim D --type ivfpq --home FOLDER`. The vectors are made up: noise around centres in a space of fewer
dimensions, as embeddings of real pictures have it. Everything goes through a catalog, as the commands do. Building and
searching are processes of their own, whose highest resident memory is printed; pages of files that are mapped count,
which the system takes back when it needs them, and so does anonymous memory by itself. Queries are vectors of the
collection with noise; recall is against all vectors, compared block by block.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import faiss
import numpy as np
import psutil
from filled_catalog import Filled
from numpy.typing import NDArray

from dino_index.snapshots import normalise

_BLOCK = 200_000
_NUM_CENTRES = 20_000
_INTRINSIC_DIM = 48
_NUM_QUERIES = 200
_K = 10
_GB = 1e9


def blocks(num: int, dim: int) -> Iterator[NDArray[np.float16]]:
    """The vectors, the same each time, some at a time."""
    rng = np.random.default_rng(0)
    basis_ID = rng.standard_normal((_INTRINSIC_DIM, dim), np.float32) / np.sqrt(dim)
    centres_CI = rng.standard_normal((_NUM_CENTRES, _INTRINSIC_DIM), np.float32)
    for begin in range(0, num, _BLOCK):
        rng = np.random.default_rng(1 + begin)
        size = min(_BLOCK, num - begin)
        points_NI = centres_CI[rng.integers(0, _NUM_CENTRES, size)]
        points_NI = points_NI + 0.6 * rng.standard_normal(points_NI.shape, np.float32)
        vectors_ND = points_NI @ basis_ID + 0.03 * rng.standard_normal((size, dim), np.float32)
        yield normalise(vectors_ND).astype(np.float16)


def queries(num: int, dim: int) -> NDArray[np.float32]:
    first_ND = next(blocks(num, dim))[:_NUM_QUERIES].astype(np.float32)
    noise_ND = np.random.default_rng(7).standard_normal(first_ND.shape, np.float32)
    return normalise(first_ND + 0.3 * noise_ND / np.sqrt(dim))


def exact_neighbours(num: int, dim: int, queries_QD: NDArray[np.float32]) -> list[set[int]]:
    """Image ids, which count from 1."""
    heap = faiss.ResultHeap(len(queries_QD), _K, keep_max=True)
    for number, block_ND in enumerate(blocks(num, dim)):
        scores_QK, rows_QK = faiss.knn(queries_QD, normalise(block_ND), _K, metric=faiss.METRIC_INNER_PRODUCT)
        heap.add_result(scores_QK, rows_QK + number * _BLOCK + 1)
    heap.finalize()
    return [set(row) for row in heap.I.tolist()]


def in_process(work: Callable[..., None], *arguments: object) -> None:
    """Runs it in a process of its own and prints time and memory."""
    begin = time.perf_counter()
    process = multiprocessing.get_context("spawn").Process(target=_measured, args=(work, *arguments))
    process.start()
    process.join()
    assert process.exitcode == 0, work
    print(f"  {work.__name__}: {time.perf_counter() - begin:.0f} s", flush=True)


def _measured(work: Callable[..., None], *arguments: object) -> None:
    anonymous, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            info = psutil.Process().memory_info()
            anonymous[0] = max(anonymous[0], info.rss - getattr(info, "shared", 0))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        work(*arguments)
    finally:
        over.set()
        watching.join()
    unit = 1024 if sys.platform.startswith("linux") else 1
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    print(f"  highest memory: {resident / _GB:.1f} GB, {anonymous[0] / _GB:.1f} GB of it not of files", flush=True)


def fill(home: Path, num: int, dim: int) -> None:
    filled = Filled.created(home, dim)
    for block_ND in blocks(num, dim):
        filled.add(block_ND)
    filled.catalog.close()


def build(home: Path, index_type: str) -> None:
    filled = Filled.opened(home)
    filled.ask_for(index_type)
    filled.build()
    num_bytes, num_vectors, reason = filled.snapshot()
    print(f"  {num_bytes / num_vectors:.0f} bytes a vector in the index file; {reason}")


def search(home: Path, num: int, dim: int) -> None:
    queries_QD = queries(num, dim)
    begin = time.perf_counter()
    index = Filled.opened(home).open()
    index.search(queries_QD[:1], _K)
    print(f"  opened and searched once: {time.perf_counter() - begin:.2f} s")
    index.search(queries_QD, _K)
    times = []
    for query_D in queries_QD:
        begin = time.perf_counter()
        index.search(query_D[None], _K)
        times.append(time.perf_counter() - begin)
    begin = time.perf_counter()
    found = [set(ids.tolist()) for ids, _ in index.search(queries_QD, _K)]
    batch_s = time.perf_counter() - begin
    exact = exact_neighbours(num, dim, queries_QD)
    recall = np.mean([len(a & b) / _K for a, b in zip(found, exact, strict=True)])
    print(
        f"  recall@{_K} {recall:.4f}; one query {1000 * np.median(times):.1f} ms (99 %: "
        f"{1000 * np.quantile(times, 0.99):.1f}), {_NUM_QUERIES / batch_s:.0f}/s in a batch of {_NUM_QUERIES}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=10_000_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--type", default="ivfpq")
    parser.add_argument("--home", type=Path, help="a folder that is empty or not there, on a disk with room")
    arguments = parser.parse_args()
    home = arguments.home or Path(tempfile.mkdtemp())
    try:
        print(f"{arguments.num} vectors of {arguments.dim} channels, {faiss.omp_get_max_threads()} threads")
        in_process(fill, home, arguments.num, arguments.dim)
        in_process(build, home, arguments.type)
        for path in sorted(home.rglob("*")):
            if path.is_file() and path.stat().st_size > 1e6:
                print(f"  {path.relative_to(home)}: {path.stat().st_size / _GB:.2f} GB")
        in_process(search, home, arguments.num, arguments.dim)
    finally:
        shutil.rmtree(home)


if __name__ == "__main__":
    main()
