"""Weighted k-NN classification against one plain matrix product of the same size, in one run.

    python tests/benchmarks/bench_evaluation.py [--train 100000] [--queries 10000] [--dim 384] [--classes 1000]

Both work on random unit vectors, in float32 and with the same number of threads. The product alone gives nothing but
cosines; k-NN finds the 200 nearest among them and votes with 10, 20, 100 and 200. Pairs are measured one after the
other; the median of the ratios counts.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from material import report, report_ratio, seconds
from numpy.typing import NDArray

from dino_index.snapshots import normalise
from dino_training.evaluation.voting import knn_places

# Of a plain product at a time: 10,000 x 100,000 cosines would be 4 GB.
_QUERIES_PER_PRODUCT = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rng = np.random.default_rng(0)

    def unit_vectors(number: int) -> NDArray[np.float32]:
        vectors = rng.standard_normal((number, options.dim), np.float32)
        return normalise(vectors)

    train, queries = unit_vectors(options.train), unit_vectors(options.queries)
    train_classes = rng.integers(options.classes, size=options.train)
    classes = rng.integers(options.classes, size=options.queries)
    columns = torch.from_numpy(train).T

    def plain() -> None:
        for part in torch.split(torch.from_numpy(queries), _QUERIES_PER_PRODUCT):
            torch.mm(part, columns)

    torch.mm(torch.from_numpy(queries[:64]), columns)  # what only the first product does
    products, voted = [], []
    for _ in range(options.rounds):
        products.append(seconds(plain))
        voted.append(seconds(lambda: knn_places(train, train_classes, queries, classes)))
    print(f"{options.train:,} x {options.queries:,} x {options.dim}, {torch.get_num_threads()} threads")
    report("plain product", products, "s")
    report("k-NN of k 10, 20, 100, 200", voted, "s")
    report_ratio("k-NN / plain product", voted, products, "at most 1.3")


if __name__ == "__main__":
    main()
