"""Index types on real embeddings: bytes per vector, building, recall, speed, opening, adding.

Embeds the images under --images with the bundled model once and keeps the vectors in --cache; --embeddings takes
vectors that are there already. Everything goes through a catalog, as the commands do. --million makes a million by
adding perturbed copies. Ratios are to exact search by FAISS (`IndexFlatIP`) in the same process, rounds taking turns.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import tempfile
from pathlib import Path

import faiss
import numpy as np
import torch
from filled_catalog import Filled
from material import seconds
from numpy.typing import NDArray

from dino_index.model_files import BUNDLED, resolve_model
from dino_index.snapshots import normalise

_TYPES = ("flat", "hnsw", "ivf", "ivfpq")
_NUM_QUERIES = 500
_K = 10


def embed_images(images: Path, cache: Path, limit: int) -> NDArray[np.float16]:
    """Raw [CLS] of up to `limit` images, in random order, by the bundled model; kept in `cache`."""
    from dino_index.backbones import Backbone
    from dino_index.embedding import EmbeddedFile, EmbeddingSettings, embed_files
    from dino_index.image_files import list_images

    path = cache / f"embeddings-{limit}.npy"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        spec = resolve_model(BUNDLED)
        files = sorted(list_images([str(images)]).files, key=lambda file: file.path)
        random.Random(0).shuffle(files)
        batches = embed_files(
            files[:limit], lambda: Backbone(spec), spec.input_size, lambda _: None, EmbeddingSettings()
        )
        rows = [item.cls_D for batch in batches for item in batch if isinstance(item, EmbeddedFile)]
        np.save(path, np.stack([row for row in rows if row is not None]))
    vectors_ND: NDArray[np.float16] = np.load(path)
    return vectors_ND


def perturbed(vectors_ND: NDArray[np.float16], number: int) -> NDArray[np.float16]:
    """The vectors and noisy copies of them: as far away as a real neighbour is."""
    rng = np.random.default_rng(0)
    parts = [vectors_ND]
    scale = 0.4 * vectors_ND.astype(np.float32).std(axis=0)
    for begin in range(len(vectors_ND), number, len(vectors_ND)):
        source_ND = vectors_ND[: min(len(vectors_ND), number - begin)].astype(np.float32)
        parts.append((source_ND + scale * rng.standard_normal(source_ND.shape, np.float32)).astype(np.float16))
    return np.concatenate(parts)


def measure(
    filled: Filled, index_type: str, queries_QD: NDArray[np.float32], baseline: faiss.Index, exact: list[set[int]],
    rounds: int,
) -> float:  # fmt: skip
    """Prints a row of the table; returns how many seconds building took."""
    filled.ask_for(index_type)
    build_s = seconds(filled.build)
    open_s = seconds(lambda: filled.open().search(queries_QD[:1], _K))
    index = filled.open()
    # Copies that pay only after some searches are made now.
    index.search(queries_QD[:40], _K)
    found = [set(ids.tolist()) for ids, _ in index.search(queries_QD, _K)]
    recall = np.mean([len(a & b) / _K for a, b in zip(found, exact, strict=True)])
    one: list[tuple[float, float]] = []
    batch: list[tuple[float, float]] = []
    few = queries_QD[:50]
    for _ in range(rounds):
        ours = seconds(lambda: [index.search(query_D[None], _K) for query_D in few])
        one.append((ours, seconds(lambda: [baseline.search(query_D[None], _K) for query_D in few])))
        ours = seconds(lambda: index.search(queries_QD, _K))
        batch.append((ours, seconds(lambda: baseline.search(queries_QD, _K))))
    num_bytes, num_vectors, reason = filled.snapshot()
    one_s, batch_s = (min(ours for ours, _ in pairs) for pairs in (one, batch))
    one_ratio, batch_ratio = (statistics.median(theirs / ours for ours, theirs in pairs) for pairs in (one, batch))
    print(
        f"| {index_type} | {num_bytes / num_vectors:.0f} | {build_s:.1f} s | {recall:.4f} | "
        f"{len(few) / one_s:.0f} ({one_ratio:.1f}x) | {_NUM_QUERIES / batch_s:.0f} ({batch_ratio:.1f}x) | "
        f"{open_s:.2f} s |",
        flush=True,
    )
    print(f"  {reason}", flush=True)
    return build_s


def measure_adding(
    filled: Filled, index_type: str, build_s: float, more_ND: NDArray[np.float16], query_1D: NDArray[np.float32]
) -> None:
    """The cost of one percent more: found at once from memory, and once compacted into the index."""
    before_s = seconds(lambda: filled.open().search(query_1D, _K))
    filled.add(more_ND)
    after_s = seconds(lambda: filled.open().search(query_1D, _K))
    append_s = seconds(lambda: filled.build(append=True))
    print(
        f"  {index_type}: {len(more_ND)} more are found {after_s - before_s:.2f} s later "
        f"({(after_s - before_s) / build_s:.1%} of building), and added to the file in {append_s:.1f} s "
        f"({append_s / build_s:.1%})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, help="folder of images to embed")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "dino-search-embeddings")
    parser.add_argument("--limit", type=int, default=100_000)
    parser.add_argument("--embeddings", type=Path, help="a .npy file of vectors, instead of images")
    parser.add_argument("--million", action="store_true")
    parser.add_argument("--types", nargs="+", default=_TYPES)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.embeddings:
        vectors_ND: NDArray[np.float16] = np.load(arguments.embeddings)[: arguments.limit].astype(np.float16)
    elif arguments.images:
        vectors_ND = embed_images(arguments.images, arguments.cache, arguments.limit)
    else:
        print("skipped: needs --images FOLDER or --embeddings FILE.npy")
        return
    # Searching loads torch only for very many queries; a process that embeds them has it loaded, like this one.
    torch.set_num_threads(faiss.omp_get_max_threads())
    # Queries are images that are not in the collection.
    queries_QD = normalise(vectors_ND[:_NUM_QUERIES])
    vectors_ND = vectors_ND[_NUM_QUERIES:]
    if arguments.million:
        vectors_ND = perturbed(vectors_ND, 1_010_000)
    num_first = len(vectors_ND) * 100 // 101
    first_ND, more_ND = vectors_ND[:num_first], vectors_ND[num_first:]
    baseline = faiss.IndexFlatIP(first_ND.shape[1])
    baseline.add(normalise(first_ND))
    # Image ids count from 1.
    exact = [set((row + 1).tolist()) for row in baseline.search(queries_QD, _K)[1]]
    print(f"{len(first_ND)} vectors of {first_ND.shape[1]} channels, {faiss.omp_get_max_threads()} threads")
    print("| type | bytes/vector | building | recall@10 | one query/s | batch queries/s | open + search |")
    for index_type in arguments.types:
        home = Path(tempfile.mkdtemp())
        try:
            filled = Filled.created(home, first_ND.shape[1])
            filled.add(first_ND)
            build_s = measure(filled, index_type, queries_QD, baseline, exact, arguments.rounds)
            measure_adding(filled, index_type, build_s, more_ND, queries_QD[:1])
        finally:
            shutil.rmtree(home)


if __name__ == "__main__":
    main()
