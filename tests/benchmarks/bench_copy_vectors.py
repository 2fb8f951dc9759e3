"""Copy vectors after a change of the collection: following it against reading all anew, which is the baseline.

    python tests/benchmarks/bench_copy_vectors.py [--number 100000]

As a service does between an upload and the next look for copies. Made-up vectors of 192 channels in SQLite.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import numpy as np
from filled_catalog import Filled
from material import report, report_ratio, seconds

from dino_index.copy_descriptors import CopyDescriptor
from dino_index.copy_search import CopyReferences
from dino_index.vector_stores import vector_store_of

_DIM, _NUM_ADDED, _NUM_ROUNDS = 192, 8, 5


def load(filled: Filled, before: CopyReferences | None = None) -> CopyReferences:
    with filled.catalog.reading() as session:
        return vector_store_of(filled.catalog).load_copies(session, filled.collection, CopyDescriptor(), before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=100_000)
    number = parser.parse_args().number
    home = Path(tempfile.mkdtemp())
    try:
        filled = Filled.created(home, _DIM)
        rng = np.random.default_rng(0)
        filled.add(rng.normal(size=(number, _DIM)).astype(np.float16), with_gem=True)
        before = load(filled)
        times: dict[str, list[float]] = {"following": [], "reading": []}
        for _ in range(_NUM_ROUNDS):
            filled.add(rng.normal(size=(_NUM_ADDED, _DIM)).astype(np.float16), with_gem=True)
            times["following"].append(1000 * seconds(lambda: load(filled, before)))
            times["reading"].append(1000 * seconds(lambda: load(filled)))
        report(f"{number} images, {_NUM_ADDED} more: following", times["following"], "ms")
        report("reading all anew", times["reading"], "ms")
        report_ratio("  / reading", times["following"], times["reading"], "as low as can be")
    finally:
        shutil.rmtree(home)


if __name__ == "__main__":
    main()
