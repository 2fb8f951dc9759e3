"""Exact nearest vectors: candidates by products of rounded numbers, as many as it takes to miss none.

Shapes: N stored vectors, Q queries, D channels, B vectors in a block, G groups in a block, H hits.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import faiss
import numpy as np
from numpy.typing import NDArray

from dino_index.index_types import ROWS_PER_PART, Rows

if TYPE_CHECKING:
    import torch

# Final scores are rounded to 6 decimals and tie by id: two vectors whose exact scores differ by less may tie.
# Float32 sums of the same products in another order differ in the seventh digit, which this covers too.
TIE_MARGIN = 2e-6
_SPARE_FOR_TIES = 16
# FAISS's limit.
MAX_FETCHED_GPU = 2048

# Rounded copies are made once searches are so many that they pay: they take half as much memory again.
_QUERIES_THAT_PAY = 32
_MIN_VECTORS = 4096
# Importing torch takes as long as so many multiplications in float32 (two processors, two seconds).
_MULTIPLICATIONS_OF_AN_IMPORT = 2e11

_BLOCK = 16_384
_GROUP = 32
_MAX_QUERIES = 512
# bfloat16 has 8 significant bits: rounding, in whichever direction, changes a number by less than this share.
_BFLOAT16_ERROR = 2.0**-8
_FLOAT32_ERROR = 2.0**-23


class ExactSearch:
    """Vectors in a FAISS flat index, searched without missing any. For one thread at a time.

    Three ways, with the same answers: products of float32 by FAISS; for single queries that come often, a scan of a
    bfloat16 copy, which is half the bytes to read; for many queries at once, products of bfloat16 by torch where the
    processor multiplies it faster. The copies only choose candidates. By how much they can be wrong is bounded from
    the vectors themselves: for a vector v stored as v', and a query q used as q',
    |q·v - q'·v'| <= |q| |v - v'| + |q - q'| |v'|.
    """

    def __init__(self, flat: faiss.Index, *, gpu_index: faiss.Index | None = None) -> None:
        """flat: an IndexFlatIP of unit vectors; rows that are not finite are never found.

        gpu_index: a clone, which answers searches without a filter: GPUs take none.
        """
        self._flat = flat
        self._gpu_index = gpu_index
        self._num_queries = 0
        self._rounded: _Rounded | None = None

    def __len__(self) -> int:
        return int(self._flat.ntotal)

    @property
    def dim(self) -> int:
        return int(self._flat.d)

    def rows(self, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """The vectors at these positions."""
        rows: NDArray[np.float32] = self._flat.reconstruct_batch(positions)
        return rows

    def candidates(
        self, queries_QD: NDArray[np.float32], k: int, allowed_N: NDArray[np.bool_] | None = None
    ) -> list[NDArray[np.int64]]:
        """For each query the positions of its k nearest vectors, of all that may tie with them, and of some more.

        allowed_N: which vectors may be found; None for all.
        """
        if not len(self) or not len(queries_QD):
            return [np.empty(0, np.int64) for _ in queries_QD]
        self._num_queries += len(queries_QD)
        if self._gpu_index is not None or len(self) < _MIN_VECTORS or self._num_queries < _QUERIES_THAT_PAY:
            return self._by_float32(queries_QD, k, allowed_N)
        use_products = len(queries_QD) > 1 and self._products_pay(len(queries_QD))
        if not use_products and len(queries_QD) > 1:
            return self._by_float32(queries_QD, k, allowed_N)
        if self._rounded is None:
            self._rounded = _Rounded(self._flat)
        if use_products:
            found = self._rounded.by_products(queries_QD, k, allowed_N)
        else:
            found = [self._rounded.by_scan(queries_QD[0], k, allowed_N)]
        missed = [number for number, positions in enumerate(found) if positions is None]
        if missed:
            exact = self._by_float32(queries_QD[missed], k, allowed_N)
            for number, positions in zip(missed, exact, strict=True):
                found[number] = positions
        return [positions for positions in found if positions is not None]

    def _products_pay(self, num_queries: int) -> bool:
        if "torch" not in sys.modules and num_queries * len(self) * self.dim < _MULTIPLICATIONS_OF_AN_IMPORT:
            return False
        from dino_index.matrix_products import bfloat16_is_faster

        return bfloat16_is_faster()

    def _by_float32(
        self, queries_QD: NDArray[np.float32], k: int, allowed_N: NDArray[np.bool_] | None
    ) -> list[NDArray[np.int64]]:
        """By FAISS; queries whose last results may tie with more are searched again with more results."""
        selection = selecting(allowed_N)
        results: list[NDArray[np.int64]] = [np.empty(0, np.int64)] * len(queries_QD)
        pending = np.arange(len(queries_QD))
        num_fetched = min(k + _SPARE_FOR_TIES, len(self))
        while len(pending):
            index = self._flat
            if self._gpu_index is not None and selection is None and num_fetched <= MAX_FETCHED_GPU:
                index = self._gpu_index
            scores_QK, positions_QK = index.search(queries_QD[pending], num_fetched, params=_parameters(selection))
            unfinished = []
            for query, scores, positions in zip(pending, scores_QK, positions_QK, strict=True):
                found = positions >= 0
                scores, positions = scores[found], positions[found]
                results[query] = positions[np.isfinite(scores)]
                complete = len(positions) < num_fetched or num_fetched == len(self)
                if not complete and scores[-1] >= scores[k - 1] - TIE_MARGIN:
                    unfinished.append(query)
            pending = np.array(unfinished, np.int64)
            num_fetched = min(4 * num_fetched, len(self))
        return results


class _Rounded:
    """A bfloat16 copy of all vectors, in FAISS's hands and as a tensor over the same bytes."""

    def __init__(self, flat: faiss.Index) -> None:
        num_vectors, dim = int(flat.ntotal), int(flat.d)
        self._index = faiss.IndexScalarQuantizer(
            dim, faiss.ScalarQuantizer.QT_bf16, faiss.METRIC_INNER_PRODUCT
        )  # fmt: skip
        self._index.codes.resize(num_vectors * dim * 2)
        self._index.ntotal = num_vectors
        codes = faiss.rev_swig_ptr(self._index.codes.data(), num_vectors * dim * 2)
        self._codes_ND: NDArray[np.int16] = codes.view(np.int16).reshape(num_vectors, dim)
        self._finite_N = np.empty(num_vectors, np.bool_)
        self._rounding = 0.0
        """No vector is further than this from its rounded copy."""
        for begin in range(0, num_vectors, ROWS_PER_PART):
            end = min(begin + ROWS_PER_PART, num_vectors)
            rows_PD = flat.reconstruct_n(begin, end - begin)
            codes_PC = self._index.sa_encode(rows_PD)
            finite_P = np.isfinite(rows_PD).all(axis=1)
            difference_PD = (self._index.sa_decode(codes_PC) - rows_PD)[finite_P]
            if len(difference_PD):
                self._rounding = max(self._rounding, float(np.linalg.norm(difference_PD, axis=1).max()))
            self._codes_ND[begin:end] = codes_PC.view(np.int16)
            self._finite_N[begin:end] = finite_P
        self._all_finite = bool(self._finite_N.all())

    def by_scan(
        self, query_D: NDArray[np.float32], k: int, allowed_N: NDArray[np.bool_] | None
    ) -> NDArray[np.int64] | None:
        """Candidates of one query; None where more would be needed than a scan should keep."""
        selection = selecting(self._searched(allowed_N))
        error = self._error(query_D[None], query_D[None])[0] + TIE_MARGIN
        num_fetched = min(2 * k + 64, len(self._codes_ND))
        for _ in range(2):
            scores, positions = (
                row[0] for row in self._index.search(
                    query_D[None], num_fetched, params=_parameters(selection)
                )
            )  # fmt: skip
            found = positions >= 0
            scores, positions = scores[found], positions[found]
            if len(positions) < num_fetched or num_fetched == len(self._codes_ND):
                complete: NDArray[np.int64] = positions[np.isfinite(scores)]
                return complete
            # The k-th best of all is at least this good, and none that was left out can be as good.
            if scores[-1] < scores[k - 1] - 2 * error:
                near: NDArray[np.int64] = positions[scores >= scores[k - 1] - 2 * error]
                return near
            num_fetched = min(8 * num_fetched, len(self._codes_ND))
        return None

    def by_products(
        self, queries_QD: NDArray[np.float32], k: int, allowed_N: NDArray[np.bool_] | None
    ) -> list[NDArray[np.int64] | None]:
        """Candidates of each query; None for one whose k-th best score is not clearly positive."""
        searched_N = self._searched(allowed_N)
        positions_N = None
        codes_ND = self._codes_ND
        if searched_N is not None and 2 * searched_N.sum() < len(searched_N):
            positions_N = np.flatnonzero(searched_N)
            codes_ND, searched_N = codes_ND[positions_N], None
        results: list[NDArray[np.int64] | None] = []
        for begin in range(0, len(queries_QD), _MAX_QUERIES):
            results += self._part_by_products(codes_ND, queries_QD[begin : begin + _MAX_QUERIES], k, searched_N)
        if positions_N is not None:
            results = [None if found is None else positions_N[found] for found in results]
        return results

    def _part_by_products(
        self,
        codes_ND: NDArray[np.int16],
        queries_QD: NDArray[np.float32],
        k: int,
        searched_N: NDArray[np.bool_] | None,
    ) -> list[NDArray[np.int64] | None]:
        """Keeps, block by block, what reaches a bound on the k-th best score that rises from block to block.

        The bound comes from groups: where k groups have a best score of at least t, k vectors have. So only each
        group's best is ranked, and only groups that reach the bound are looked into.
        """
        import torch

        num_vectors = len(codes_ND)
        if k * 4 > num_vectors // _GROUP:
            return [None] * len(queries_QD)
        with torch.inference_mode():
            vectors_ND = torch.from_numpy(codes_ND).view(torch.bfloat16)
            rounded_QD = torch.from_numpy(queries_QD).bfloat16()
            error_Q = torch.from_numpy(self._error(queries_QD, rounded_QD.float().numpy()))
            best_QK = torch.zeros(len(queries_QD), 0, dtype=torch.int16)
            lowest_Q1 = torch.zeros(len(queries_QD), 1, dtype=torch.int16)
            hits: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
            for begin in range(0, num_vectors, _BLOCK):
                end = min(begin + _BLOCK, num_vectors)
                scores_QB = self._block_scores(vectors_ND[begin:end], rounded_QD)
                if searched_N is not None:
                    scores_QB[:, np.flatnonzero(~searched_N[begin:end])] = _LOWEST
                group_QG = scores_QB.view(len(queries_QD), _GROUP, -1).amax(dim=1)
                best_QK = torch.cat([best_QK, group_QG], dim=1)
                best_QK = best_QK.topk(min(k, best_QK.shape[1]), dim=1).values
                if best_QK.shape[1] == k:
                    lowest_Q1 = self._lowest(best_QK[:, -1:], error_Q)
                hits.append(_hits(scores_QB, group_QG, lowest_Q1, begin))
            query_H, position_H, score_H = (torch.cat(parts) for parts in zip(*hits, strict=True))
            kept_H = score_H >= lowest_Q1[query_H, 0]
            query_H, position_H = query_H[kept_H], position_H[kept_H]
            order_H = torch.argsort(query_H, stable=True)
            numbers = torch.bincount(query_H, minlength=len(queries_QD))
            split = torch.split(position_H[order_H], numbers.tolist())
            return [
                positions.numpy() if lowest > 0 else None
                for positions, lowest in zip(split, lowest_Q1[:, 0].tolist(), strict=True)
            ]

    @staticmethod
    def _block_scores(vectors_BD: torch.Tensor, rounded_QD: torch.Tensor) -> torch.Tensor:
        """Scores (Q, B) as the bits of bfloat16, filled up to whole groups.

        As integers such bits compare like the numbers where one of two is positive, and integers compare faster.
        """
        import torch

        scores_QB = torch.mm(rounded_QD, vectors_BD.T).view(torch.int16)
        surplus = -len(vectors_BD) % _GROUP
        return torch.nn.functional.pad(scores_QB, (0, surplus), value=_LOWEST) if surplus else scores_QB

    @staticmethod
    def _lowest(kth_Q1: torch.Tensor, error_Q: torch.Tensor) -> torch.Tensor:
        """Bits of the lowest rounded score that a vector among the k best can have; 0 where it is not positive.

        kth_Q1: bits of a rounded score that k vectors reach.
        """
        import torch

        # Down to what the k-th best exactly has at least, then to what such a vector may have been rounded to.
        kth_Q = kth_Q1.view(torch.bfloat16)[:, 0].double()
        exact_Q = kth_Q * (1 - _BFLOAT16_ERROR) - error_Q - TIE_MARGIN
        lowest_Q = (exact_Q - error_Q) * (1 - _BFLOAT16_ERROR)
        usable_Q = (kth_Q1[:, 0] > 0) & (lowest_Q > _BFLOAT16_ERROR)
        bits_Q = lowest_Q.float().bfloat16().view(torch.int16) - 1  # never rounded up
        return torch.where(usable_Q, bits_Q, 0)[:, None]

    def _error(self, queries_QD: NDArray[np.float32], rounded_QD: NDArray[np.float32]) -> NDArray[np.float64]:
        """By how much a product of rounded vectors can differ from the exact one, before its own rounding."""
        length_Q = np.linalg.norm(queries_QD.astype(np.float64), axis=1)
        rounding_Q = np.linalg.norm(queries_QD.astype(np.float64) - rounded_QD, axis=1)
        sums = 2 * queries_QD.shape[1] * _FLOAT32_ERROR
        error_Q: NDArray[np.float64] = length_Q * self._rounding + (rounding_Q + sums) * (1 + self._rounding)
        return error_Q

    def _searched(self, allowed_N: NDArray[np.bool_] | None) -> NDArray[np.bool_] | None:
        if self._all_finite:
            return allowed_N
        return self._finite_N if allowed_N is None else allowed_N & self._finite_N


# As bits of bfloat16 this is a negative number that is not a number: less than every positive one.
_LOWEST = -1


def _hits(
    scores_QB: torch.Tensor, group_QG: torch.Tensor, lowest_Q1: torch.Tensor, begin: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(queries_H, positions_H, scores_H) of a block's scores that reach the bound."""
    import torch

    num_groups = group_QG.shape[1]
    query_P, group_P = torch.nonzero((group_QG >= lowest_Q1) & (lowest_Q1 > 0), as_tuple=True)
    columns_PM = group_P[:, None] + num_groups * torch.arange(_GROUP)
    scores_PM = scores_QB[query_P[:, None], columns_PM]
    pair_H, member_H = torch.nonzero(scores_PM >= lowest_Q1[query_P], as_tuple=True)
    return query_P[pair_H], begin + columns_PM[pair_H, member_H], scores_PM[pair_H, member_H]


def selecting(allowed_N: NDArray[np.bool_] | None) -> Any:
    """A FAISS selector of the positions that are allowed; None for all."""
    if allowed_N is None:
        return None
    return faiss.IDSelectorBitmap(np.packbits(allowed_N, bitorder="little"))  # type: ignore[call-arg, arg-type]


def _parameters(selection: Any) -> Any:
    return None if selection is None else faiss.SearchParameters(sel=selection)  # type: ignore[call-arg]


def scan(
    rows: Rows, queries_QD: NDArray[np.float32], k: int, allowed_N: NDArray[np.bool_] | None
) -> list[NDArray[np.int64]]:
    """For each query the positions of its k nearest allowed rows, and of all that may tie with them.

    Reads every allowed row once, wherever it lies.
    """
    positions_N = np.arange(len(rows)) if allowed_N is None else np.flatnonzero(allowed_N)
    kept = [(np.empty(0, np.int64), np.empty(0, np.float32)) for _ in queries_QD]
    for begin in range(0, len(positions_N), ROWS_PER_PART):
        positions_P = positions_N[begin : begin + ROWS_PER_PART].astype(np.int64)
        scores_QP = queries_QD @ rows.rows(positions_P).T
        for query, scores_P in enumerate(scores_QP):
            positions = np.concatenate([kept[query][0], positions_P])
            kept[query] = nearest(positions, np.concatenate([kept[query][1], scores_P]), k)
    return [positions for positions, _ in kept]


def nearest(
    positions: NDArray[np.int64], scores: NDArray[np.float32], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The k best of scored positions and all that may tie with the last of them; not sorted, finite scores only."""
    near = np.isfinite(scores)
    if near.sum() > k:
        lowest = np.partition(scores[near], -k)[-k] - TIE_MARGIN
        near &= scores >= lowest
    return positions[near], scores[near]
