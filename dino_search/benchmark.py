"""What `bench` measures: this machine and this installation, through the code that `index` and `search` run.

Shapes: N vectors, D channels; B pictures of H x W pixels, C colours.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import skimage
from sqlalchemy import insert

from dino_index.backbones import Backbone
from dino_index.catalog import Catalog, EmbeddingRow, ImageRow
from dino_index.collections import CollectionInfo, count_images, create_collection, find_collection, model_of
from dino_index.embedding import EmbeddingSettings
from dino_index.errors import CollectionNotFound, ImageError, NoImagesFound
from dino_index.image_bytes import read_file
from dino_index.image_files import list_images
from dino_index.images import decode
from dino_index.indexing import IndexOptions, Progress, index_paths
from dino_index.model_files import BUNDLED, ModelSpec, resolve_model
from dino_index.model_store import models_folder
from dino_index.recording import Sources
from dino_index.snapshots import write_snapshot
from dino_index.vector_index import VectorIndex
from dino_search.demonstration import PHOTOGRAPHS
from dino_search.home import default_database

SIZES = (10_000, 100_000, 1_000_000)

_MAX_PICTURES = 400
_K = 10
_NUM_SEARCHES = 50
_ROWS_PER_INSERT = 5000
# Rows, keys and pages beside the vectors of an image: measured on catalogs of 100,000 images.
_CATALOG_BYTES_AN_IMAGE = 700
_ID_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class Speed:
    """num_images done in seconds."""

    num_images: int
    seconds: float
    images_per_second: float


@dataclass(frozen=True, kw_only=True)
class SearchSpeed:
    """Searches of one query each, for its 10 nearest vectors."""

    vectors: str
    """Whose: the collection's, or random ones."""
    num_vectors: int
    open_s: float
    """From the files to an index that answers."""
    median_ms: float
    slowest_of_20_ms: float
    """19 of 20 searches take less."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What so many images take."""

    images: int
    index_s: float
    disk_bytes: int
    """Catalog and exact index."""
    memory_bytes: int
    """Of a process that searches them exactly with the model loaded."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """All figures. device, dtype: where and in what numbers the model computes."""

    model: str
    dim: int
    device: str
    dtype: str
    pictures: str
    megapixels: float
    """Mean of the pictures."""
    decode: Speed
    forward: Speed
    index: Speed
    search: SearchSpeed
    estimates: list[Estimate]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def run_benchmark(
    home: Path,
    collection_name: str,
    images: Path | None = None,
    *,
    seconds_a_stage: float = 4.0,
    num_random_vectors: int = 100_000,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Benchmark:
    """Measures decoding, forward passes, indexing and searching, with the collection's model where there is one.

    images: a folder; None for the photographs that scikit-image ships. The home is read, and nothing written to it.
    Raises SourceNotFound, NoImagesFound, ModelError, CatalogErrors.
    """
    with tempfile.TemporaryDirectory(prefix="dino-search-bench-") as scratch_name:
        scratch = Path(scratch_name)
        pictures = _pictures(images)
        catalog = Catalog.open(home, url=default_database())
        try:
            collection = _existing_collection(catalog, collection_name)
            spec = model_of(collection, models_folder(home)) if collection else resolve_model(BUNDLED)
            on_stage("decoding")
            decoding, megapixels = _measure_decoding(pictures, spec.input_size, seconds_a_stage)
            on_stage("forward passes")
            backbone = Backbone(spec)
            forward = _measure_forward(backbone, seconds_a_stage)
            on_stage("indexing")
            wanted = int(min(decoding.images_per_second, forward.images_per_second) * 2 * seconds_a_stage)
            if images is None:
                pictures = _distinct_copies(pictures, scratch / "pictures", max(wanted, 4 * backbone.batch_size))
            indexing = _measure_indexing(pictures, spec, scratch / "home", 2 * seconds_a_stage)
            on_stage("searching")
            if catalog is not None and collection is not None and _num_images(catalog, collection):
                search = _measure_search(catalog, collection.name, "the collection's")
            else:
                filled = _random_collection(scratch / "random", spec, backbone.dim, num_random_vectors)
                with closing(filled):
                    search = _measure_search(filled, "random", "random")
        finally:
            if catalog is not None:
                catalog.close()
    return Benchmark(
        model=spec.name, dim=backbone.dim, device=str(backbone.device), dtype=str(backbone.dtype).split(".")[-1],
        pictures=str(images) if images else "scikit-image's photographs", megapixels=megapixels, decode=decoding,
        forward=forward, index=indexing, search=search,
        estimates=[_estimate(size, backbone.dim, indexing, search) for size in SIZES],
    )  # fmt: skip


def _pictures(folder: Path | None) -> list[Path]:
    """Some pictures, spread evenly over the folder."""
    if folder is None:
        data = Path(skimage.__file__).parent / "data"
        return [path for path in sorted(data.iterdir()) if path.stem in PHOTOGRAPHS]
    paths = [Path(file.path) for file in list_images([str(folder)]).files]
    if not paths:
        raise NoImagesFound(f"expected images under {folder}, found none; leave out --images to take photographs")
    return paths[:: -(-len(paths) // _MAX_PICTURES)]


def _measure_decoding(pictures: Sequence[Path], input_size: int, seconds: float) -> tuple[Speed, float]:
    """Speed of reading and decoding by as many workers as `index` has, and the mean megapixels of a picture."""

    def load(path: Path) -> int:
        try:
            picture = decode(read_file(path).data, size=(input_size, input_size))
        except ImageError:
            return 0
        return picture.width * picture.height

    num_pixels: list[int] = []
    with ThreadPoolExecutor(EmbeddingSettings().num_workers) as workers:
        start = time.perf_counter()
        while (taken := time.perf_counter() - start) < seconds:
            num_pixels += [pixels for pixels in workers.map(load, pictures[:64]) if pixels]
            if not num_pixels:
                raise NoImagesFound(f"none of {len(pictures)} images could be read, {pictures[0]} among them")
    return _speed(len(num_pixels), taken), round(float(np.mean(num_pixels)) / 1e6, 2)


def _measure_forward(backbone: Backbone, seconds: float) -> Speed:
    """Speed of forward passes side by side, as `index` runs them, over pictures that are ready."""
    side = backbone.spec.input_size
    rng = np.random.default_rng(0)
    pixels_BHWC = rng.integers(0, 256, (backbone.batch_size, side, side, 3), np.uint8)
    with backbone.forward_threads() as threads:
        list(threads.map(backbone.embed, [pixels_BHWC] * backbone.num_passes))  # the first pass prepares kernels
        num_images, start = 0, time.perf_counter()
        while (taken := time.perf_counter() - start) < seconds:
            batches = [pixels_BHWC] * (2 * backbone.num_passes)
            num_images += sum(len(cls_BD) for cls_BD, _ in threads.map(backbone.embed, batches))
    return _speed(num_images, taken)


def _distinct_copies(pictures: Sequence[Path], folder: Path, count: int) -> list[Path]:
    """Copies that differ in some bytes behind the picture: equal files would be embedded once."""
    folder.mkdir()
    copies = []
    for number in range(count):
        source = pictures[number % len(pictures)]
        copies.append(folder / f"{number}-{source.name}")
        shutil.copyfile(source, copies[-1])
        with open(copies[-1], "ab") as file:
            file.write(number.to_bytes(8, "little"))
    return copies


def _measure_indexing(pictures: Sequence[Path], spec: ModelSpec, home: Path, seconds: float) -> Speed:
    """Speed of `index` end to end with the model loaded, into a home that goes away."""
    moments: dict[int, float] = {}
    """When so many images were first seen to be done: a stopped run waits for passes whose images nobody counts."""

    def note(progress: Progress) -> None:
        moments.setdefault(progress.done, time.perf_counter())

    catalog = Catalog.open(home, create=True)
    assert catalog is not None
    with closing(catalog):
        index_paths(
            catalog, "bench", [str(path) for path in pictures], spec, lambda: spec, IndexOptions(),
            on_progress=note, should_stop=lambda: time.perf_counter() - moments[0] > seconds,
        )  # fmt: skip
    num_done = max(moments)
    return _speed(num_done, moments[num_done] - moments[0])


def _random_collection(home: Path, spec: ModelSpec, dim: int, num_vectors: int) -> Catalog:
    """A catalog whose collection `random` has so many images with random vectors, and a snapshot."""
    catalog = Catalog.open(home, create=True)
    assert catalog is not None
    rng = np.random.default_rng(0)
    with catalog.writing() as session:
        collection = create_collection(session, "random", spec, dim)
        (source_id,) = Sources.covering(session, collection, [str(home)]).paths_by_id
        for begin in range(0, num_vectors, _ROWS_PER_INSERT):
            numbers = range(begin, min(begin + _ROWS_PER_INSERT, num_vectors))
            vectors_ND = rng.normal(size=(len(numbers), dim)).astype(np.float16)
            digests = [number.to_bytes(32, "little") for number in numbers]
            place = {"collection_id": collection.id, "source_id": source_id, "status": "ok", "generation": 0}
            facts = {"size": 1, "mtime_ns": 1, "width": 1, "height": 1}
            images = [
                {"path": str(number), "sha256": digest, **place, **facts}
                for number, digest in zip(numbers, digests, strict=True)
            ]
            of_model = {"model_id": collection.model_id, "kind": "cls", "region": "full"}
            vectors = [
                {"sha256": digest, "vector": vector_D.tobytes(), **of_model}
                for digest, vector_D in zip(digests, vectors_ND, strict=True)
            ]
            session.execute(insert(ImageRow), images)
            session.execute(insert(EmbeddingRow), vectors)
    write_snapshot(catalog, collection)
    return catalog


def _measure_search(catalog: Catalog, name: str, whose: str) -> SearchSpeed:
    """Opens the index as the first search of a process does, then searches for random directions, one by one."""
    start = time.perf_counter()
    with catalog.reading() as session:
        collection = find_collection(session, name)
        index = VectorIndex.load(catalog, session, collection)
    opened = time.perf_counter() - start
    queries_QD = np.random.default_rng(1).normal(size=(_NUM_SEARCHES, collection.dim)).astype(np.float32)
    queries_QD /= np.linalg.norm(queries_QD, axis=1, keepdims=True)
    milliseconds = []
    for query_D in queries_QD:
        start = time.perf_counter()
        index.search(query_D[None], _K)
        milliseconds.append(1000 * (time.perf_counter() - start))
    return SearchSpeed(
        vectors=whose, num_vectors=len(index), open_s=round(opened, 3),
        median_ms=round(float(np.median(milliseconds)), 2),
        slowest_of_20_ms=round(float(np.quantile(milliseconds, 0.95)), 2),
    )  # fmt: skip


def _estimate(num_images: int, dim: int, indexing: Speed, search: SearchSpeed) -> Estimate:
    stored = 2 * 2 * dim + _CATALOG_BYTES_AN_IMAGE  # [CLS] and GeM in float16
    searched = 4 * dim + _ID_BYTES
    # What this process has taken besides the vectors that it searched.
    process = max(psutil.Process().memory_info().rss - searched * search.num_vectors, 0)
    return Estimate(
        images=num_images, index_s=round(num_images / indexing.images_per_second, 1),
        disk_bytes=num_images * (stored + searched), memory_bytes=process + num_images * searched,
    )  # fmt: skip


def _existing_collection(catalog: Catalog | None, name: str) -> CollectionInfo | None:
    if catalog is None:
        return None
    with catalog.reading() as session:
        try:
            return find_collection(session, name)
        except CollectionNotFound:
            return None


def _num_images(catalog: Catalog, collection: CollectionInfo) -> int:
    with catalog.reading() as session:
        return count_images(session, collection)["ok"]


def _speed(num_images: int, seconds: float) -> Speed:
    return Speed(num_images=num_images, seconds=round(seconds, 4), images_per_second=round(num_images / seconds, 1))
