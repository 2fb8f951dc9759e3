"""Vectors in Milvus against snapshots: storing, recall@10, searches a second, of every index type.

--copies: candidates of `copies` in place of that, against comparing all copy vectors in memory.
Starts the server of the tests, or asks the one that --url names. The vectors are drawn at random near a surface of 24
dimensions, as embeddings are; --embeddings takes real ones. Ratios are to the snapshot of the same type, searched in
the same process, rounds taking turns; recall is counted against comparing all.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))

from filled_catalog import Filled
from material import seconds

from dino_index.copy_descriptors import CopyDescriptor
from dino_index.copy_search import CopySearch
from dino_index.exact_search import scan
from dino_index.snapshots import Vectors, normalise
from dino_index.vector_stores import VectorSearch, VectorStore, vector_store_of
from milvus_server import Server, find_server_program

_TYPES = ("flat", "hnsw", "ivf", "ivfpq")
_NUM_QUERIES = 200
_K = 10
_NUM_VIEWS, _NUM_CANDIDATES = 20, 20


def random_embeddings(number: int, dim: int, rank: int = 24) -> NDArray[np.float16]:
    """Vectors near a surface of few dimensions, seeded."""
    rng = np.random.default_rng(0)
    surface = rng.normal(size=(number, rank)) @ rng.normal(size=(rank, dim))
    return (surface + 0.5 * rng.normal(size=(number, dim))).astype(np.float16)


def stored_in(filled: Filled, url: str | None, index_type: str) -> tuple[VectorSearch, float]:
    """The vectors as that store searches them, and how long storing and indexing took."""
    filled.ask_for(index_type)
    filled.catalog.vectors_url = url
    store = vector_store_of(filled.catalog)
    took_s = seconds(lambda: store.compact(filled.collection))
    with filled.catalog.reading() as session:
        return store.load(session, filled.collection), took_s


def recall(index: VectorSearch, queries_QD: NDArray[np.float32], exact: list[set[int]]) -> float:
    found = [set(ids.tolist()) for ids, _ in index.search(queries_QD, _K)]
    return float(np.mean([len(a & b) / _K for a, b in zip(found, exact, strict=True)]))


def measure(filled: Filled, url: str, index_type: str, queries_QD: NDArray[np.float32], exact: list[set[int]]) -> None:
    """Prints a row of the table."""
    served, served_s = stored_in(filled, url, index_type)
    local, local_s = stored_in(filled, None, index_type)
    allowed = np.arange(1, len(served) + 1, 2)
    cells = [f"{served_s:.1f} s ({local_s:.1f} s)"]
    cells.append(f"{recall(served, queries_QD, exact):.4f} ({recall(local, queries_QD, exact):.4f})")
    few = queries_QD[:50]
    for name in ("one", "batch", "filtered"):

        def ask(index: VectorSearch, name: str = name) -> None:
            if name == "batch":
                index.search(queries_QD, _K)
                return
            for query_D in few:
                index.search(query_D[None], _K, allowed_ids=allowed if name == "filtered" else None)

        times = [(seconds(lambda: ask(served)), seconds(lambda: ask(local))) for _ in range(3)]
        count = len(queries_QD) if name == "batch" else len(few)
        ratio = statistics.median(theirs / ours for ours, theirs in times)
        cells.append(f"{count / min(ours for ours, _ in times):.0f} ({ratio:.2f}x)")
    print(f"| {index_type} | {' | '.join(cells)} |", flush=True)


def measure_copies(filled: Filled, url: str, index_type: str, vectors_QD: NDArray[np.float16]) -> None:
    """Prints a row of the other table: each query is looked at in as many ways as `copies` does."""
    filled.ask_for(index_type)
    searches: list[CopySearch] = []
    took_s = []
    for where in (url, None):
        filled.catalog.vectors_url = where
        store = vector_store_of(filled.catalog)

        def load(store: VectorStore = store) -> None:
            with filled.catalog.reading() as session:
                references = store.load_copies(session, filled.collection, CopyDescriptor())
            searches.append(CopySearch(references, CopyDescriptor()))

        took_s.append(seconds(load))
    rng = np.random.default_rng(1)
    found: list[list[set[int]]] = []
    times = []
    queries = [
        (query_D + 0.3 * rng.normal(size=(_NUM_VIEWS, len(query_D)))).astype(np.float16) for query_D in vectors_QD[:50]
    ]
    for _ in range(3):
        found = [[], []]
        times.append(
            [
                seconds(
                    lambda search=search, sets=sets: sets.extend(  # type: ignore[misc]
                        {candidate.image_id for candidate in search.candidates(views_VD, views_VD, _NUM_CANDIDATES)}
                        for views_VD in queries
                    )
                )
                for search, sets in zip(searches, found, strict=True)
            ]
        )
    agree = np.mean([len(a & b) / _NUM_CANDIDATES for a, b in zip(*found, strict=True)])
    ratio = statistics.median(served / held for served, held in times)
    served_ms, held_ms = (1000 * min(column) / len(queries) for column in zip(*times, strict=True))
    print(
        f"| {index_type} | {took_s[0]:.1f} s ({took_s[1]:.1f} s) | {agree:.4f} | {served_ms:.1f} ms ({held_ms:.1f} ms; "
        f"{ratio:.2f}x) |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="of a Milvus server; none: that of the tests is started")
    parser.add_argument("--embeddings", type=Path, help="a .npy file of vectors")
    parser.add_argument("--number", type=int, default=30_000)
    parser.add_argument("--types", nargs="+", default=_TYPES)
    parser.add_argument("--copies", action="store_true", help="candidates of copies instead")
    arguments = parser.parse_args()
    if arguments.embeddings:
        vectors_ND: NDArray[np.float16] = np.load(arguments.embeddings)[: arguments.number].astype(np.float16)
    else:
        vectors_ND = random_embeddings(arguments.number + _NUM_QUERIES, 192)
    raw_QD, vectors_ND = vectors_ND[:_NUM_QUERIES], vectors_ND[_NUM_QUERIES:]
    queries_QD = normalise(raw_QD)
    rows = Vectors(np.arange(1, len(vectors_ND) + 1), normalise(vectors_ND))
    exact = []
    for query_D, positions in zip(queries_QD, scan(rows, queries_QD, _K, None), strict=True):
        best = np.argsort(-(rows.vectors_ND[positions] @ query_D), kind="stable")[:_K]
        exact.append(set(rows.ids_N[positions[best]].tolist()))
    with ExitStack() as ending:
        if arguments.url is None:
            try:
                server = Server(find_server_program())
            except pytest.skip.Exception as reason:
                print(f"skipped: {reason}; or name a server by --url")
                return
            ending.callback(server.delete)
            arguments.url = server.url
        print(f"{len(vectors_ND)} vectors of {vectors_ND.shape[1]} channels; in brackets: snapshots")
        if arguments.copies:
            print("| type | storing (reading) | same candidates | a query |")
        else:
            print("| type | storing | recall@10 | one query/s | batch queries/s | filtered queries/s |")
        for index_type in arguments.types:
            home = Path(tempfile.mkdtemp())
            try:
                filled = Filled.created(home, vectors_ND.shape[1])
                filled.add(vectors_ND, with_gem=arguments.copies)
                if arguments.copies:
                    measure_copies(filled, arguments.url, index_type, raw_QD)
                else:
                    measure(filled, arguments.url, index_type, queries_QD, exact)
            finally:
                shutil.rmtree(home)


if __name__ == "__main__":
    main()
