"""Index types: which one suits a collection, how much memory it takes, and building it.

Shapes: N vectors, D channels, S samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import faiss
import numpy as np
from numpy.typing import NDArray

from dino_index.errors import IndexTypeInvalid, TooLittleMemory
from dino_index.index_type_names import AUTO, FLAT, NAMED_INDEX_TYPES

# Up to here all vectors are compared in a few milliseconds: no approximation, and nothing to build.
_MAX_FLAT = 200_000
# A graph is the fastest to search, and the slowest to build: some minutes a million vectors and processor.
_MAX_HNSW = 5_000_000
# A GPU compares all vectors of this many in a millisecond; beyond, lists fit it better than graphs, which it lacks.
_MAX_FLAT_GPU = 2_000_000

_HNSW_LINKS = 32
_HNSW_CONSTRUCTION = 80
_TRAINING_VECTORS_PER_LIST = 64
_MIN_VECTORS_PER_LIST = 39
_PQ_CHANNELS = 4
"""Channels that one byte stands for."""
_PQ_CENTROIDS = 256
_MAX_TRAINING_VECTORS = 1_000_000

# Search effort is chosen so that samples, searched before they are added, find this share of their 10 nearest.
_WANTED_RECALL = 0.995
_K_TUNED = 10
_NUM_SAMPLES = 512
# Never less than this: among many near copies samples find theirs at once, and a picture from outside does not.
_MIN_LISTS_FRAC = 1 / 16
_MIN_EF_SEARCH = 96
_EFFORTS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)

ROWS_PER_PART = 16_384
_GPU_TYPES = (faiss.IndexFlat, faiss.IndexIVFFlat, faiss.IndexIVFPQ, faiss.IndexIVFScalarQuantizer)


class Rows(Protocol):
    """Vectors somewhere, read in parts as unit float32."""

    def __len__(self) -> int: ...

    @property
    def dim(self) -> int: ...

    def rows(self, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """The vectors at these positions, unit length."""
        ...


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is to be built."""

    name: str
    """A named type other than `auto`, or a FAISS factory string."""
    factory: str
    reason: str
    """Why, for people."""
    num_bytes: int
    """Memory that building takes at most, about."""


def check_index_type(asked: str, dim: int) -> None:
    """Raises IndexTypeInvalid for what is neither a named type nor a factory string for vectors of `dim` numbers."""
    if asked in NAMED_INDEX_TYPES:
        return
    try:
        index = faiss.index_factory(dim, asked, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        reason = str(error).rsplit("Error: ", 1)[-1].strip()
        raise IndexTypeInvalid(
            f"--index-type must be one of {', '.join(NAMED_INDEX_TYPES)}, or a FAISS factory string for {dim} channels "
            f"such as IVF1024,SQ8; found {asked!r}: {reason}"
        ) from error
    if isinstance(_innermost(index), faiss.IndexNSG | faiss.IndexNNDescent):
        raise IndexTypeInvalid(
            f"--index-type {asked} never ends building where vectors are equal, as those of equal files are; use hnsw"
        )
    empty_lists = isinstance(index, faiss.IndexIVF) and index.nlist < 1
    if empty_lists or isinstance(index, faiss.IndexIDMap | faiss.IndexIDMap2):
        raise IndexTypeInvalid(
            "--index-type must be a FAISS index without IDMap (images are numbered anyway) and with a list at least, "
            f"found {asked!r}"
        )


def choose_index_type(
    asked: str, num_vectors: int, dim: int, *, num_gpus: int | None = None, available: int | None = None
) -> Choice:
    """What to build for so many vectors.

    num_gpus: None asks FAISS. available: bytes of memory; None for no limit.
    Raises TooLittleMemory where the type that was asked for, or every one for `auto`, takes more.
    """
    if asked != AUTO:
        choice = _asked(asked, num_vectors, dim)
        require_memory(choice, num_vectors, dim, available)
        return choice
    num_gpus = faiss.get_num_gpus() if num_gpus is None else num_gpus
    names = _preferred(num_vectors, num_gpus)
    choices = [_asked(name, num_vectors, dim) for name in names]
    for choice in choices:
        if available is None or choice.num_bytes <= available:
            reason = _reason(choice.name, num_vectors, num_gpus)
            if choice is not choices[0]:
                reason = (
                    f"{num_vectors:,} vectors: {choices[0].name} would take {_gigabytes(choices[0].num_bytes)}, and "
                    f"{_gigabytes(available or 0)} are available"
                )
            return Choice(name=choice.name, factory=choice.factory, reason=reason, num_bytes=choice.num_bytes)
    smallest = min(choices, key=lambda choice: choice.num_bytes)
    require_memory(smallest, num_vectors, dim, available)
    raise AssertionError("not reached")


def require_memory(choice: Choice, num_vectors: int, dim: int, available: int | None) -> None:
    """Raises TooLittleMemory with a type that would fit, if any does."""
    if available is None or choice.num_bytes <= available:
        return
    smaller = [
        other
        for name in ("hnsw", "ivf", "ivfpq")
        if (other := _asked(name, num_vectors, dim)).num_bytes < choice.num_bytes
    ]
    fitting = [other for other in smaller if other.num_bytes <= available]
    if fitting:
        advice = f"use --index-type {fitting[0].name} ({_gigabytes(fitting[0].num_bytes)})"
    elif smaller:
        least = min(smaller, key=lambda other: other.num_bytes)
        advice = f"use a machine with more; the smallest type, {least.name}, takes {_gigabytes(least.num_bytes)}"
    else:
        advice = "use a machine with more"
    raise TooLittleMemory(
        f"an index of type {choice.name} of {num_vectors:,} vectors of {dim} channels takes about "
        f"{_gigabytes(choice.num_bytes)} of memory, found {_gigabytes(available)} available; {advice}"
    )


def build_index(choice: Choice, rows: Rows) -> tuple[faiss.Index, Choice]:
    """The index over positions 0..N-1, and the choice with what tuning found.

    Where there are too few vectors to train what a factory string asks for, the index is flat and the reason says so.
    """
    if choice.name == FLAT:
        return flat_index(rows), choice
    index = faiss.index_factory(rows.dim, choice.factory, faiss.METRIC_INNER_PRODUCT)
    if (hnsw := _hnsw_of(index)) is not None:
        hnsw.efConstruction = max(_HNSW_CONSTRUCTION, hnsw.efConstruction)
    _quieten(index)
    if not index.is_trained:
        try:
            index.train(_finite(rows.rows(_training_positions(index, len(rows)))))
        except RuntimeError as error:
            message = str(error).rsplit("Error: ", 1)[-1].strip()
            reason = f"{len(rows):,} vectors are too few to train {choice.factory}: {message}"
            return flat_index(rows), Choice(name=FLAT, factory="Flat", reason=reason, num_bytes=choice.num_bytes)
    if _ivf_of(index) is None and _hnsw_of(index) is None:
        add_rows(index, rows, 0, len(rows))
        return index, choice
    num_samples = min(_NUM_SAMPLES, len(rows) // 20)
    num_first = len(rows) - num_samples
    add_rows(index, rows, 0, num_first)
    note = _tune(index, rows, num_first) if num_samples else ""
    add_rows(index, rows, num_first, len(rows))
    reason = f"{choice.reason}; {note}" if note else choice.reason
    return index, Choice(name=choice.name, factory=choice.factory, reason=reason, num_bytes=choice.num_bytes)


def flat_index(rows: Rows) -> faiss.Index:
    """An IndexFlatIP of the rows."""
    index = faiss.IndexFlatIP(rows.dim)
    # Made as large as it will be: FAISS would double it, copying, as it grows.
    index.codes.resize(len(rows) * rows.dim * 4)
    index.ntotal = len(rows)
    if len(rows):
        vectors_ND = faiss.rev_swig_ptr(index.get_xb(), len(rows) * rows.dim).reshape(len(rows), rows.dim)
        for begin, part_PD in _parts(rows):
            vectors_ND[begin : begin + len(part_PD)] = part_PD
    return index


def add_rows(index: faiss.Index, rows: Rows, begin: int, end: int) -> None:
    """Adds the rows from `begin` to `end` in parts, so that never two copies of all are in memory."""
    for part in range(begin, end, ROWS_PER_PART):
        index.add(_finite(rows.rows(np.arange(part, min(part + ROWS_PER_PART, end), dtype=np.int64))))


def can_append(index: faiss.Index, num_vectors: int) -> bool:
    """Whether vectors can be added to what was trained on fewer, for a total of so many."""
    ivf = _ivf_of(index)
    if ivf is not None:
        # Lists that are twice as long as planned take twice as long to search.
        return bool(4 * ivf.nlist**2 >= num_vectors) or _num_lists(num_vectors) <= 2 * ivf.nlist
    return _hnsw_of(index) is not None


def is_lossy(index: faiss.Index) -> bool:
    """Whether the index keeps so little of its vectors that many more than are wanted must be compared exactly."""
    inner = _innermost(index)
    storage = faiss.downcast_index(inner.storage) if hasattr(inner, "storage") else inner
    if storage.d != index.d:
        return True
    if isinstance(storage, faiss.IndexScalarQuantizer | faiss.IndexIVFScalarQuantizer):
        return bool(storage.sq.code_size < 2 * storage.d)
    return not isinstance(storage, faiss.IndexFlat | faiss.IndexIVFFlat)


def search_parameters(index: faiss.Index, selection: Any, effort: float = 1.0) -> Any:
    """FAISS search parameters that keep to a selection, with `effort` times the work that the index was tuned to.

    None where nothing differs from the index's own settings.
    """
    if selection is None and effort == 1.0:
        return None
    chosen = {"sel": selection} if selection is not None else {}
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        inner = search_parameters(index.index, selection, effort)
        return faiss.SearchParametersPreTransform(index_params=inner)  # type: ignore[call-arg]
    if isinstance(index, faiss.IndexRefine):
        inner = search_parameters(index.base_index, selection, effort)
        return faiss.IndexRefineSearchParameters(k_factor=index.k_factor, base_index_params=inner)  # type: ignore[call-arg]
    if isinstance(index, faiss.IndexIVF):
        probes = min(index.nlist, math.ceil(index.nprobe * effort))
        return faiss.SearchParametersIVF(nprobe=probes, **chosen)  # type: ignore[call-arg]
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(efSearch=math.ceil(index.hnsw.efSearch * effort), **chosen)  # type: ignore[attr-defined]
    return faiss.SearchParameters(**chosen) if chosen else None


def gpu_clone(index: faiss.Index, num_gpus: int) -> faiss.Index | None:
    """A copy on all visible GPUs; None where there are none or FAISS cannot clone the type (graphs)."""
    if not num_gpus or not isinstance(_innermost(index), _GPU_TYPES):
        return None
    options = faiss.GpuMultipleClonerOptions()
    options.shard = num_gpus > 1  # each holds a part: more vectors fit
    return faiss.index_cpu_to_all_gpus(index, options, num_gpus)


def _preferred(num_vectors: int, num_gpus: int) -> tuple[str, ...]:
    """Types that suit, best first; those after it take less memory."""
    if num_gpus:
        return (FLAT, "ivf", "ivfpq") if num_vectors < _MAX_FLAT_GPU else ("ivf", "ivfpq")
    if num_vectors < _MAX_FLAT:
        return (FLAT, "hnsw", "ivfpq")
    return ("hnsw", "ivf", "ivfpq") if num_vectors < _MAX_HNSW else ("ivf", "ivfpq")


def _reason(name: str, num_vectors: int, num_gpus: int) -> str:
    count = f"{num_vectors:,} vectors"
    if num_gpus:
        device = f"{num_gpus} GPU{'s' if num_gpus > 1 else ''}"
        return f"{count} on {device}: " + (
            f"below {_MAX_FLAT_GPU:,} all are compared" if name == FLAT else "lists, as FAISS has no graphs on GPUs"
        )
    if name == FLAT:
        return f"{count}: below {_MAX_FLAT:,} comparing all is fast and exact"
    if name == "hnsw":
        return f"{count}: from {_MAX_FLAT:,} on a graph is far faster than comparing all"
    return f"{count}: from {_MAX_HNSW:,} on lists are built in a fraction of a graph's time"


def _asked(name: str, num_vectors: int, dim: int) -> Choice:
    """The choice for one type, with the memory it takes."""
    factory, reason = _factory(name, num_vectors, dim), "asked for"
    if name == "ivfpq" and factory == "Flat":
        name, reason = FLAT, f"{num_vectors:,} vectors are too few to train ivfpq"
    lists = _lists_in(factory, dim)
    if lists > max(num_vectors, 1):
        name, reason, factory = FLAT, f"{num_vectors:,} vectors are fewer than the lists of {factory}", "Flat"
        lists = 0
    return Choice(
        name=name,
        factory=factory,
        reason=reason,
        num_bytes=_estimated_bytes(factory, num_vectors, dim),
    )


def _factory(name: str, num_vectors: int, dim: int) -> str:
    if name == FLAT:
        return "Flat"
    if name == "hnsw":
        return f"HNSW{_HNSW_LINKS}_SQfp16"
    if name == "ivf":
        return f"IVF{_num_lists(num_vectors)},SQfp16"
    if name == "ivfpq":
        parts = max(m for m in range(1, max(1, dim // _PQ_CHANNELS) + 1) if dim % m == 0)
        if num_vectors >= _PQ_CENTROIDS:
            return f"IVF{_num_lists(num_vectors)},PQ{parts}x8"
        # Too few for 256 centroids: 16 of them.
        return f"IVF{_num_lists(num_vectors)},PQ{parts}x4" if num_vectors >= 16 else "Flat"
    return name


def _num_lists(num_vectors: int) -> int:
    """Four times the root, which balances choosing lists and searching them; with enough vectors to train each."""
    return max(1, min(int(4 * math.sqrt(num_vectors)), num_vectors // _MIN_VECTORS_PER_LIST))


def _estimated_bytes(factory: str, num_vectors: int, dim: int) -> int:
    """Codes, graph links, list numbers, training vectors, and the copies that building holds at the same time."""
    index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    per_vector = float(_code_bytes(index))
    if (hnsw := _hnsw_of(index)) is not None:
        # Twice the links on the lowest layer, few above; offsets, levels, and a lock while building.
        per_vector += 4 * 2 * hnsw.nb_neighbors(1) * 1.1 + 24
    if _ivf_of(index) is not None:
        per_vector += 8
        per_vector *= 1.5  # lists grow by doubling
    num_trained = 0 if index.is_trained else _num_training(index, num_vectors)
    training = num_trained * dim * 4 * 2  # FAISS works on a copy
    # Ids; a part of the vectors as float32.
    part = min(num_vectors, ROWS_PER_PART) * dim * 4
    return int(num_vectors * (per_vector + 16) + training + 4 * part)


def _code_bytes(index: faiss.Index) -> int:
    index = _innermost(index)
    if hasattr(index, "storage"):
        index = faiss.downcast_index(index.storage)
    for attribute in ("code_size", "sq", "pq"):
        found = getattr(index, attribute, None)
        if found is not None:
            return int(found) if isinstance(found, int) else int(found.code_size)
    return 4 * int(index.d)


def _lists_in(factory: str, dim: int) -> int:
    ivf = _ivf_of(faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT))
    return int(ivf.nlist) if ivf is not None else 0


def _num_training(index: faiss.Index, num_vectors: int) -> int:
    ivf = _ivf_of(index)
    wanted = ivf.nlist * _TRAINING_VECTORS_PER_LIST if ivf is not None else 0
    wanted = max(wanted, _PQ_CENTROIDS * _TRAINING_VECTORS_PER_LIST * 4)
    return min(num_vectors, max(wanted, _MAX_TRAINING_VECTORS) if ivf is None else wanted)


def _training_positions(index: faiss.Index, num_vectors: int) -> NDArray[np.int64]:
    """A sample, seeded, in the vectors' order."""
    num_trained = _num_training(index, num_vectors)
    chosen = np.random.default_rng(0).choice(num_vectors, num_trained, replace=False)
    return np.sort(chosen).astype(np.int64)


def _finite(vectors_ND: NDArray[np.float32]) -> NDArray[np.float32]:
    """The vectors, with zeros in place of damaged ones, which FAISS refuses or lets spoil others."""
    damaged_N = np.asarray(~np.isfinite(vectors_ND).all(axis=1))
    return np.where(damaged_N[:, None], np.float32(0), vectors_ND) if damaged_N.any() else vectors_ND


def _quieten(index: faiss.Index) -> None:
    """FAISS prints a warning for small training sets, which `_num_lists` has weighed already."""
    ivf = _ivf_of(index)
    if ivf is not None:
        ivf.cp.min_points_per_centroid = 1
        ivf.cp.max_points_per_centroid = 2 * _TRAINING_VECTORS_PER_LIST
        if hasattr(ivf, "do_polysemous_training"):
            # Orders codes so that their bits can be compared, which nothing here does; takes minutes.
            ivf.do_polysemous_training = False
    inner = _innermost(index)
    storage = faiss.downcast_index(inner.storage) if hasattr(inner, "storage") else inner
    if hasattr(storage, "pq"):
        storage.pq.cp.min_points_per_centroid = 1
        storage.pq.cp.max_points_per_centroid = _TRAINING_VECTORS_PER_LIST
        storage.pq.cp.niter = 10  # of 25: a quarter of an index's building time, for the same recall


def _parts(rows: Rows) -> Iterator[tuple[int, NDArray[np.float32]]]:
    for begin in range(0, len(rows), ROWS_PER_PART):
        yield begin, rows.rows(np.arange(begin, min(begin + ROWS_PER_PART, len(rows)), dtype=np.int64))


def _tune(index: faiss.Index, rows: Rows, num_first: int) -> str:
    """Sets the least search effort with which rows that are not in the index yet find their neighbours in it."""
    samples_SD = rows.rows(np.arange(num_first, len(rows), dtype=np.int64))
    samples_SD = samples_SD[np.isfinite(samples_SD).all(axis=1)]
    k = min(_K_TUNED, num_first)
    if not len(samples_SD) or not k:
        return ""
    wanted = _nearest(samples_SD, rows, num_first, k)
    num_fetched = min(num_to_fetch(index, k), num_first)
    ivf, hnsw = _ivf_of(index), _hnsw_of(index)
    recall = 0.0
    setting = ""
    least = math.ceil(_MIN_LISTS_FRAC * ivf.nlist) if ivf is not None else _MIN_EF_SEARCH
    for effort in (least, *(effort for effort in _EFFORTS if effort > least)):
        if ivf is not None:
            ivf.nprobe = min(effort, ivf.nlist)
            setting = f"with {ivf.nprobe} of {ivf.nlist} lists "
        elif hnsw is not None:
            hnsw.efSearch = effort
            setting = f"with efSearch {effort} "
        _, found = index.search(samples_SD, num_fetched)
        recall = float(np.mean([np.isin(ids, row).mean() for ids, row in zip(wanted, found, strict=True)]))
        if recall >= _WANTED_RECALL or (ivf is not None and effort >= ivf.nlist):
            break
    return f"{setting}finds {recall:.1%} of the {k} nearest of {len(samples_SD)} samples"


def _nearest(samples_SD: NDArray[np.float32], rows: Rows, num_first: int, k: int) -> NDArray[np.int64]:
    """Positions of the k nearest rows of each sample, by comparing all."""
    best_SK = np.empty((len(samples_SD), 0), np.float32)
    positions_SK = np.empty((len(samples_SD), 0), np.int64)
    for begin in range(0, num_first, ROWS_PER_PART):
        positions = np.arange(begin, min(begin + ROWS_PER_PART, num_first), dtype=np.int64)
        scores_SP = np.nan_to_num(samples_SD @ rows.rows(positions).T, nan=-2.0)
        scores = np.concatenate([best_SK, scores_SP], axis=1)
        candidates = np.concatenate([positions_SK, np.broadcast_to(positions, scores_SP.shape)], axis=1)
        order = np.argpartition(-scores, min(k, scores.shape[1]) - 1, axis=1)[:, :k]
        best_SK = np.take_along_axis(scores, order, axis=1)
        positions_SK = np.take_along_axis(candidates, order, axis=1)
    return positions_SK


def num_to_fetch(index: faiss.Index, k: int) -> int:
    """How many candidates to compare exactly for the k nearest."""
    return max(20 * k, 200) if is_lossy(index) else k + 16


def _ivf_of(index: faiss.Index) -> Any:
    inner = _innermost(index)
    return inner if isinstance(inner, faiss.IndexIVF) else None


def _hnsw_of(index: faiss.Index) -> Any:
    inner = _innermost(index)
    return inner.hnsw if isinstance(inner, faiss.IndexHNSW) else None


def _innermost(index: faiss.Index) -> Any:
    """The index inside transformations, numbering and refinement."""
    index = faiss.downcast_index(index)
    while isinstance(index, faiss.IndexPreTransform | faiss.IndexIDMap | faiss.IndexIDMap2 | faiss.IndexRefine):
        inner = index.base_index if isinstance(index, faiss.IndexRefine) else index.index
        index = faiss.downcast_index(inner)
    return index


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 5e7 else f"{num_bytes / 1e6:.1f} MB"
