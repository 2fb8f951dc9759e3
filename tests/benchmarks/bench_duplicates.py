"""Finding pairs and groups of duplicates: seconds, memory, share of all pairs found, and growth with the number.

Vectors are synthetic unless --embeddings names a .npy file: clusters within clusters with falling variances, as
embeddings have them, and noisy copies of a tenth of them from nearly equal to just above the asked cosine. Each size
runs in a process of its own, whose highest resident memory is shown. --million adds a run of a million.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dino_index.duplicate_groups import CopyPairs, group_pairs
from dino_index.near_pairs import near_pairs
from dino_index.snapshots import Vectors, normalise

_COPIES_FRAC = 0.1
_MAX_SAMPLED = 2000
_ROWS_PER_PART = 16_384


def synthetic(number: int, dim: int) -> NDArray[np.float32]:
    """Unit vectors in two levels of clusters."""
    rng = np.random.default_rng(0)
    scale_D = np.arange(1, dim + 1, dtype=np.float32) ** -0.4
    coarse_KD = rng.standard_normal((100, dim), np.float32)
    fine_KD = coarse_KD[rng.integers(0, 100, 3000)] + rng.standard_normal((3000, dim), np.float32)
    vectors_ND = np.empty((number, dim), np.float32)
    for begin in range(0, number, _ROWS_PER_PART):
        end = min(begin + _ROWS_PER_PART, number)
        noise_PD = rng.standard_normal((end - begin, dim), np.float32)
        vectors_ND[begin:end] = normalise((0.5 * fine_KD[rng.integers(0, 3000, end - begin)] + noise_PD) * scale_D)
    return vectors_ND


def plant_copies(vectors_ND: NDArray[np.float32], min_cosine: float) -> None:
    """Makes a tenth of the vectors copies of others, at cosines spread evenly from the asked one to 1."""
    rng = np.random.default_rng(1)
    number, dim = vectors_ND.shape
    num_copies = int(_COPIES_FRAC * number)
    source, target = rng.permutation(number)[: 2 * num_copies].reshape(2, -1)
    spread_D = vectors_ND[:_ROWS_PER_PART].std(axis=0)
    for begin in range(0, num_copies, _ROWS_PER_PART):
        of = vectors_ND[source[begin : begin + _ROWS_PER_PART]]
        turned = rng.standard_normal((len(of), dim), np.float32) * spread_D
        turned -= np.einsum("nd,nd->n", turned, of)[:, None] * of
        cosine = rng.uniform(min_cosine, 1, (len(of), 1)).astype(np.float32)
        vectors_ND[target[begin : begin + _ROWS_PER_PART]] = cosine * of + np.sqrt(1 - cosine**2) * normalise(turned)


def share_found(
    vectors_ND: NDArray[np.float32], left_P: NDArray[np.int64], right_P: NDArray[np.int64], min_cosine: float
) -> tuple[float, int]:
    """(share of the pairs of up to 2,000 random vectors with all others that were found, how many such pairs)."""
    number = len(vectors_ND)
    sample = np.random.default_rng(2).choice(number, min(_MAX_SAMPLED, number), replace=False)
    keys_P = left_P * number + right_P
    wanted = []
    for begin in range(0, number, _ROWS_PER_PART):
        hit, other = np.nonzero(vectors_ND[sample] @ vectors_ND[begin : begin + _ROWS_PER_PART].T >= min_cosine + 2e-6)
        one, other = sample[hit], other + begin
        wanted.append((np.minimum(one, other) * number + np.maximum(one, other))[one != other])
    keys = np.unique(np.concatenate(wanted))
    return float(np.isin(keys, keys_P).mean()), len(keys)


def measure(number: int, dim: int, min_cosine: float, embeddings: str) -> dict[str, float]:
    """What one size takes; run in a process of its own."""
    vectors_ND = normalise(np.load(embeddings)[:number]) if embeddings else synthetic(number, dim)
    plant_copies(vectors_ND, min_cosine)
    rows = Vectors(np.arange(len(vectors_ND)), vectors_ND)
    start = time.perf_counter()
    found = near_pairs(rows, min_cosine)
    pairs_s = time.perf_counter() - start

    def scores(left_A: NDArray[np.int64], right_B: NDArray[np.int64]) -> NDArray[np.float32]:
        products: NDArray[np.float32] = vectors_ND[left_A] @ vectors_ND[right_B].T
        return products

    start = time.perf_counter()
    groups = group_pairs(
        CopyPairs(
            num_nodes=len(rows), left_P=found.left_P, right_P=found.right_P, score_P=found.cosine_P,
            crowded_N=found.crowded_N,
        ),
        "components", scores, lambda left_A, right_B: scores(left_A, right_B) >= min_cosine,
    )  # fmt: skip
    groups_s = time.perf_counter() - start
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    share, num_known = share_found(vectors_ND, found.left_P, found.right_P, min_cosine)
    return {
        "vectors": len(rows), "pairs": len(found), "crowded": int(found.crowded_N.sum()), "groups": len(groups),
        "pairs_s": pairs_s, "groups_s": groups_s, "peak_mb": peak_mb, "share": share, "known": num_known,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[25_000, 50_000, 100_000])
    parser.add_argument("--million", action="store_true")
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--min-cosine", type=float, default=0.8)
    parser.add_argument("--embeddings", default="", help="a .npy file of vectors, instead of synthetic ones")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.dim, arguments.min_cosine, arguments.embeddings)))
        return
    print("| vectors | pairs | groups | finding pairs | grouping | peak memory | of exact pairs |")
    seconds: dict[float, float] = {}
    for number in [*arguments.sizes, *([1_000_000] if arguments.million else [])]:
        command = [sys.executable, str(Path(__file__)), "--one", str(number), "--dim", str(arguments.dim),
                   "--min-cosine", str(arguments.min_cosine), "--embeddings", arguments.embeddings]  # fmt: skip
        run = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        seconds[run["vectors"]] = run["pairs_s"] + run["groups_s"]
        print(
            f"| {run['vectors']:,} | {run['pairs']:,} | {run['groups']:,} | {run['pairs_s']:.1f} s | "
            f"{run['groups_s']:.1f} s | {run['peak_mb']:,.0f} MB | {run['share']:.4f} of {run['known']:,} |",
            flush=True,
        )
    if len(seconds) > 1:
        logs = np.log(list(seconds)), np.log(list(seconds.values()))
        print(f"time grows with the number to the power of {np.polyfit(*logs, 1)[0]:.2f}")
    largest = max(seconds)
    print(f"{math.comb(int(largest), 2) / seconds[largest] / 1e6:,.0f} million pairs a second ruled out or found")


if __name__ == "__main__":
    main()
