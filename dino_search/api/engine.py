"""The engine: the one owner of catalog, models and vectors in a service, and the stages that a query goes through.

Pictures are decoded in threads of their own, share forward passes (`batching`), and are searched for in the one thread
that owns their collection's vectors. What other processes index is seen by the next query: each looks at the
collection's generation in the transaction that it answers from.

Shapes: Q queries, D channels.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import select
from sqlalchemy.orm import Session

from dino_index.catalog import Catalog, CollectionRow, EmbeddingRow, ImageRow, SourceRow
from dino_index.catalog.portable_paths import decode_path, encode_path
from dino_index.catalog.sqlite import SqliteStore
from dino_index.collections import CollectionInfo, find_collection, join_path, model_of
from dino_index.embedding import num_processors
from dino_index.errors import (
    CatalogUnavailable,
    CollectionNotFound,
    DinoSearchError,
    ImageError,
    ImageNotFound,
    NotReady,
    RequestInvalid,
)
from dino_index.filters import parse_filter
from dino_index.image_bytes import read_file
from dino_index.images import decode
from dino_index.model_files import ModelSpec
from dino_index.model_store import models_folder
from dino_index.snapshots import normalise, stored_vector
from dino_index.vector_stores import VectorSearch, vector_store_of
from dino_search.api.batching import Admission, ForwardPasses
from dino_search.api.metrics import Metrics
from dino_search.api.pictures import Picture
from dino_search.api.settings import ServiceSettings
from dino_search.api.thumbnails import ThumbnailCache
from dino_search.api.vector_probe import VectorProbe
from dino_search.neighbours import find_neighbours
from dino_search.results import SearchResults

logger = logging.getLogger(__name__)

T = TypeVar("T")

_NUM_CATALOG_THREADS = 4
# A reindex that switches the model between a query's embedding and its search is met at most so often.
_MAX_SWITCHES_MET = 3
# Errors that say nothing about the other pictures of a request.
_OF_ONE_PICTURE = (ImageError, ImageNotFound, RequestInvalid)


@dataclass(frozen=True, eq=False, slots=True)
class _Found:
    """A query after its decoding: its vector where the catalog has it, else pixels. For one collection's model."""

    collection: CollectionInfo
    vector_D: NDArray[np.float32] | None
    pixels_HWC: NDArray[np.uint8] | None


@dataclass(frozen=True, eq=False, slots=True)
class _Embedded:
    """A query's unit vector under a collection's model."""

    collection: CollectionInfo
    vector_D: NDArray[np.float32]


class _Shelf:
    """One collection's vectors, and the one thread that may touch them."""

    def __init__(self, name: str, metrics: Metrics) -> None:
        self.thread = ThreadPoolExecutor(1, f"search-{name[:32]}")
        self._name = name
        self._metrics = metrics
        self._vectors: VectorSearch | None = None
        self._of: tuple[int, int, int, datetime] | None = None
        self._catalog: Catalog | None = None

    def current(self, catalog: Catalog, session: Session, collection: CollectionInfo) -> VectorSearch:
        """The vectors as the session sees the collection; loaded where they have changed. In the shelf's thread."""
        of = id(catalog), collection.id, collection.model_id, collection.created_at
        if self._vectors is None or self._of != of or not self._vectors.is_current(session, collection):
            self._vectors = vector_store_of(catalog).load(session, collection)
            # Held, so that the id of a catalog that was closed is not that of another one.
            self._of, self._catalog = of, catalog
            self._metrics.index_images.labels(self._name).set(len(self._vectors))
        now = time.monotonic()
        self._metrics.index_age.labels(self._name).set_function(lambda: time.monotonic() - now)
        return self._vectors

    def close(self) -> None:
        self.thread.shutdown(cancel_futures=True)
        for gauge in (self._metrics.index_images, self._metrics.index_age):
            with suppress(KeyError):
                gauge.remove(self._name)


class Engine:
    """See the module. Its coroutines belong to one event loop; everything else is for any thread."""

    def __init__(self, settings: ServiceSettings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self.admission = Admission(settings.queue_size, metrics)
        self.thumbnails = ThumbnailCache(settings.thumbnail_cache_bytes)
        self.models = models_folder(settings.home)
        self.decoders = ThreadPoolExecutor(num_processors(), "decode")
        self.catalog_threads = ThreadPoolExecutor(_NUM_CATALOG_THREADS, "catalog")
        # Of their own, so that a probe is answered while everything else waits for a catalog.
        self.probes = ThreadPoolExecutor(1, "probe")
        self._vector_probe = VectorProbe()
        self._loader = ThreadPoolExecutor(1, "load")
        self._shelves: dict[str, _Shelf] = {}
        self._passes: dict[str, ForwardPasses] = {}
        self._lock = threading.Lock()
        # Another one, as opening a catalog may take long, and the event loop takes the first.
        self._catalog_lock = threading.Lock()
        self._catalog: Catalog | None = None
        self._catalog_file: tuple[int, int] | None = None
        self._had_catalog = False
        self._num_torch_threads = 0
        self.num_in_flight = 0
        """Requests that are being answered, probes aside."""
        self.is_warm = False
        self.is_draining = False
        self.warm_up_problem = ""

    def close(self) -> None:
        """Ends all threads, after what they are at."""
        with self._lock:
            shelves, self._shelves = list(self._shelves.values()), {}
            passes, self._passes = list(self._passes.values()), {}
        for pool in (self.decoders, self.catalog_threads, self.probes, self._loader):
            pool.shutdown(cancel_futures=True)
        self._vector_probe.close()
        for shelf in shelves:
            shelf.close()
        for each in passes:
            each.close()
        if self._catalog is not None:
            self._catalog.close()

    # The catalog

    def catalog(self) -> Catalog:
        """The home's catalog. It is opened anew where its file is another one by now.

        Raises CollectionNotFound where nothing has been indexed yet, CatalogUnavailable where it has gone.
        """
        with self._catalog_lock:
            if self._catalog is not None and self._file_of(self._catalog) == self._catalog_file:
                return self._catalog
            if self._catalog is not None:
                self._catalog.close()
                self._catalog = None
            opened = self._open()
            if opened is None and self._had_catalog:
                raise CatalogUnavailable(
                    f"the catalog in {self.settings.home} is gone; put it back, the service then goes on by itself"
                )
            if opened is None:
                raise CollectionNotFound(
                    f"nothing has been indexed yet under {self.settings.home}; "
                    "run: dino-search index FOLDER-WITH-PICTURES"
                )
            self._catalog, self._catalog_file, self._had_catalog = opened, self._file_of(opened), True
            return opened

    def create_catalog(self) -> None:
        """Makes the catalog where nothing has been indexed yet. Raises CatalogErrors."""
        try:
            self.catalog()
        except CollectionNotFound:
            created = self._open(create=True)
            assert created is not None
            created.close()

    def _open(self, *, create: bool = False) -> Catalog | None:
        settings = self.settings
        return Catalog.open(settings.home, create=create, url=settings.database, vectors_url=settings.vector_store)

    @staticmethod
    def _file_of(catalog: Catalog) -> tuple[int, int] | None:
        """What tells an SQLite file from one put in its place; None on a server, which tells by itself."""
        if not isinstance(catalog.store, SqliteStore):
            return None
        try:
            status = os.stat(catalog.store.path)
        except OSError:
            return (-1, -1)
        return status.st_dev, status.st_ino

    def read(self, work: Callable[[Session], T]) -> T:
        """What `work` gives back of a reading session. Not on the event loop."""
        with self.metrics.stage("catalog"), self.catalog().reading() as session:
            return work(session)

    def write(self, work: Callable[[Session], T]) -> T:
        """What `work` gives back of a writing session. Not on the event loop."""
        with self.metrics.stage("catalog"), self.catalog().writing() as session:
            return work(session)

    async def in_catalog_thread(self, work: Callable[..., T], *args: Any) -> T:
        return await in_thread(self.catalog_threads, work, *args)

    # Readiness

    async def warm_up(self) -> None:
        """Loads what the first requests need, and answers one of each kind."""
        try:
            await in_thread(self._loader, self._note_torch_threads)
            for name in self.settings.preload or (self.settings.collection,):
                try:
                    await self._warm_up(name)
                except CollectionNotFound:
                    if self.settings.preload:
                        logger.warning("collection %r is to be loaded before the service is ready; there is none", name)
        except DinoSearchError as error:
            # It may pass (a database that is away): requests find out for themselves.
            self.warm_up_problem = str(error)
            logger.error("warming up: %s", error)
        self.is_warm = True

    async def _warm_up(self, name: str) -> None:
        collection = await self.in_catalog_thread(self.read, lambda session: find_collection(session, name))
        passes = await self.passes_of(collection)
        side = collection.model_config["input_size"]
        # All threads take part: each pays for its first pass.
        await asyncio.gather(
            *(asyncio.wrap_future(passes.embed(np.zeros((side, side, 3), np.uint8))) for _ in range(8))
        )
        await asyncio.wrap_future(passes.embed(np.zeros((side, side, 3), np.uint8)))
        shelf = self._shelf(name)

        def load() -> None:
            catalog = self.catalog()
            with catalog.reading() as session:
                shelf.current(catalog, session, find_collection(session, name))

        await in_thread(shelf.thread, load)

    def check_ready(self) -> None:
        """Raises NotReady with the reasons. Not on the event loop."""
        reasons = []
        if self.is_draining:
            reasons.append("the service is about to end")
        if not self.is_warm:
            reasons.append("the service is starting: models and vectors are being loaded")
        try:
            self.read(lambda session: session.execute(select(CollectionRow.id).limit(1)).first())
            if problem := self._vector_probe.problem(self.catalog()):
                reasons.append(problem)
        except CollectionNotFound:
            pass  # an empty catalog is ready to be filled
        except DinoSearchError as error:
            reasons.append(str(error))
        if reasons:
            raise NotReady(*reasons)

    def loaded_collections(self) -> list[str]:
        return sorted(self._shelves)

    # The stages of a query

    async def search(
        self,
        pictures: Sequence[Picture],
        *,
        client: str,
        collection: str,
        k: int,
        labelled: bool = False,
        min_score: float | None = None,
        filters: Sequence[str] = (),
    ) -> list[SearchResults]:
        """The k images most like each picture, all from one state of the collection; as `Collection.search` does.

        client: whose share of the queue they take.
        Raises CollectionNotFound, CollectionEmpty, ImageNotFound, NoLabels, FilterError, RequestInvalid, ImageError,
        TooManyRequests, ServerFull, ModelError, CatalogError.
        """
        answers = await self.search_each(
            pictures, client=client, collection=collection, k=k, labelled=labelled, min_score=min_score,
            filters=filters,
        )  # fmt: skip
        found = []
        for answer in answers:
            if isinstance(answer, DinoSearchError):
                raise answer
            found.append(answer)
        return found

    async def search_each(
        self,
        pictures: Sequence[Picture],
        *,
        client: str,
        collection: str,
        k: int,
        labelled: bool = False,
        min_score: float | None = None,
        filters: Sequence[str] = (),
    ) -> list[SearchResults | DinoSearchError]:
        """As `search`, but what is wrong with a picture is its own answer, and the others have theirs."""
        self.check_k(k)
        parsed = [parse_filter(text) for text in filters]
        name = collection
        with self.admission.places(client, len(pictures)):
            for _ in range(_MAX_SWITCHES_MET):
                embedded = await self._embed_each(pictures, name)
                usable = [
                    (picture.name, each)
                    for picture, each in zip(pictures, embedded, strict=True)
                    if not isinstance(each, DinoSearchError)
                ]
                if not usable:
                    return [each for each in embedded if isinstance(each, DinoSearchError)]
                names = [name for name, _ in usable]
                queries_QD = np.stack([each.vector_D for _, each in usable])

                def find(
                    session: Session,
                    present: CollectionInfo,
                    vectors: VectorSearch,
                    names: Sequence[str] = names,
                    queries_QD: NDArray[np.float32] = queries_QD,
                ) -> list[SearchResults]:
                    return find_neighbours(
                        session, present, vectors, queries_QD, names,
                        k=k, labelled=labelled, min_score=min_score, filters=parsed,
                    )  # fmt: skip

                models = {each.collection.model_id for _, each in usable}
                if len(models) == 1 and (found := await self._with_vectors(usable[0][1].collection, find)) is not None:
                    rest = iter(found)
                    return [each if isinstance(each, DinoSearchError) else next(rest) for each in embedded]
        raise NotReady(f"collection {name!r} is being given another model; try again")

    async def _with_vectors(
        self, info: CollectionInfo, find: Callable[[Session, CollectionInfo, VectorSearch], T]
    ) -> T | None:
        """What `find` makes of a collection's vectors, in their thread; None if its model is another one by now."""
        shelf = self._shelf(info.name)

        def search() -> T | None:
            catalog = self.catalog()
            with catalog.reading() as session:
                present = find_collection(session, info.name)
                if present.model_id != info.model_id:
                    return None
                vectors = shelf.current(catalog, session, present)
                with self.metrics.stage("search"):
                    return find(session, present, vectors)

        return await in_thread(shelf.thread, search)

    async def embed(self, picture: Picture, *, client: str, collection: str) -> tuple[CollectionInfo, list[float]]:
        """The collection, and the unit vector of a picture under its model. Raises as `search` does."""
        with self.admission.places(client):
            embedded = await self._embed(picture, collection)
        return embedded.collection, embedded.vector_D.tolist()

    async def _embed_each(self, pictures: Sequence[Picture], name: str) -> list[_Embedded | DinoSearchError]:
        """Each picture's vector, or what is wrong with the picture. Raises what would be wrong with all."""
        embedded = await asyncio.gather(*(self._embed(picture, name) for picture in pictures), return_exceptions=True)
        results: list[_Embedded | DinoSearchError] = []
        for each in embedded:
            if isinstance(each, BaseException) and not isinstance(each, _OF_ONE_PICTURE):
                raise each
            results.append(each)
        return results

    async def _embed(self, picture: Picture, name: str) -> _Embedded:
        # A pass that is about to begin waits a moment for what is being decoded.
        passes = self._passes_known(name)
        with passes.coming() if passes is not None else nullcontext():
            found = await in_thread(self.decoders, self._look_up, picture, name)
        if found.vector_D is not None:
            return _Embedded(found.collection, found.vector_D)
        assert found.pixels_HWC is not None
        passes = await self.passes_of(found.collection)
        cls_D, _ = await asyncio.wrap_future(passes.embed(found.pixels_HWC))
        # Widened here: FAISS, which does it for many, would wake threads of its own.
        return _Embedded(found.collection, normalise(cls_D[None].astype(np.float32))[0])

    def _look_up(self, picture: Picture, name: str) -> _Found:
        """In a decoding thread."""
        digest = picture.sha256 if picture.data is not None else None
        with self.metrics.stage("catalog"), self.catalog().reading() as session:
            collection = find_collection(session, name)
            stored = None
            if digest is not None:
                stored = stored_vector(session, collection, digest)
            elif picture.image_id is not None:
                stored = stored_vector_of(session, collection, picture.image_id)
        if stored is not None:
            return _Found(collection, normalise(stored)[0], None)
        if picture.embedding is not None:
            return _Found(collection, unit_vector(picture.embedding, collection), None)
        assert picture.data is not None
        side = collection.model_config["input_size"]
        return _Found(collection, None, self.decode(picture, (side, side)))

    async def with_bytes(self, picture: Picture, name: str) -> tuple[CollectionInfo, Picture]:
        """The collection, and the picture with a file's bytes: of an image of the collection they are read.

        Raises CollectionNotFound, ImageNotFound, ImageError; RequestInvalid for a vector.
        """
        if picture.embedding is not None:
            raise RequestInvalid("embedding: expected a picture, found a vector, from which no picture can be had")

        def look_up() -> tuple[CollectionInfo, Picture]:
            with self.metrics.stage("catalog"), self.catalog().reading() as session:
                collection = find_collection(session, name)
                if picture.image_id is None:
                    return collection, picture
                image = image_file(session, picture.image_id)
            if image.collection != name:
                raise ImageNotFound(f"no image {picture.image_id} in collection {name!r}")
            data = read_file(image.path, self.settings.limits).data
            return collection, Picture(name=encode_path(image.path), data=data)

        return await in_thread(self.decoders, look_up)

    def decode(self, picture: Picture, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
        """Pixels of a picture of which the bytes are there. Raises ImageError."""
        assert picture.data is not None
        try:
            with self.metrics.stage("decode"):
                return decode(picture.data, size=size, limits=self.settings.limits).pixels_HWC
        except ImageError as error:
            raise ImageError(error.reason, f"the query {picture.name} cannot be used: {error}") from error

    def check_k(self, k: int) -> None:
        """Raises RequestInvalid."""
        if k > self.settings.max_k:
            raise RequestInvalid(f"k: expected at most {self.settings.max_k}, found {k}")

    # Models and vectors

    async def passes_of(self, collection: CollectionInfo) -> ForwardPasses:
        """The forward passes of a collection's model, which is loaded where it is not. Raises ModelError."""
        passes = self._passes.get(collection.fingerprint)
        if passes is None:
            passes = await in_thread(self._loader, lambda: self._load(model_of(collection, self.models)))
        return passes

    async def passes_for(self, spec: ModelSpec) -> ForwardPasses:
        """The forward passes of a model. Raises ModelError."""
        return await in_thread(self._loader, self._load, spec)

    def _load(self, spec: ModelSpec) -> ForwardPasses:
        """In the loading thread."""
        from dino_index.backbones import Backbone, use_threads

        if (passes := self._passes.get(spec.fingerprint)) is not None:
            return passes
        self._note_torch_threads()
        # With one team of threads more than there are processors, OpenMP's threads sleep at each of a pass's many
        # barriers, where they would wait awake: a picture that comes alone then takes 1.6 times as long. So this thread
        # gets no team.
        use_threads(1)
        backbone = Backbone(spec, device=self.settings.device)
        use_threads(self._num_torch_threads)
        # A processor gains less by company than it loses by waiting for it.
        max_wait_s = 0.0 if backbone.device.type == "cpu" else self.settings.max_wait_ms / 1000
        passes = ForwardPasses(backbone, self.metrics, max_wait_s=max_wait_s)
        with self._lock:
            self._passes[spec.fingerprint] = passes
        return passes

    def _note_torch_threads(self) -> None:
        """Before passes side by side: their threads take one processor each, and so would all that start later."""
        import torch

        self._num_torch_threads = self._num_torch_threads or torch.get_num_threads()

    def _passes_known(self, name: str) -> ForwardPasses | None:
        """What most probably computes the queries of a collection; for a hint only."""
        return next(iter(self._passes.values())) if len(self._passes) == 1 else None

    def forget(self, name: str) -> None:
        """Gives up a collection's vectors, which has been removed."""
        with self._lock:
            shelf = self._shelves.pop(name, None)
        if shelf is not None:
            shelf.close()

    def _shelf(self, name: str) -> _Shelf:
        with self._lock:
            if name not in self._shelves:
                self._shelves[name] = _Shelf(name, self.metrics)
            return self._shelves[name]


async def in_thread(threads: Executor, work: Callable[..., T], *args: Any) -> T:
    """What `work` gives back, done in one of the threads, in the caller's context (its trace)."""
    context = contextvars.copy_context()
    return await asyncio.get_running_loop().run_in_executor(threads, lambda: context.run(work, *args))


def stored_vector_of(session: Session, collection: CollectionInfo, image_id: int) -> NDArray[np.float16]:
    """The raw [CLS] of an image of the collection, (1, D). Raises ImageNotFound."""
    vector = session.scalars(
        select(EmbeddingRow.vector)
        .join(ImageRow, ImageRow.sha256 == EmbeddingRow.sha256)
        .where(
            ImageRow.id == image_id,
            ImageRow.collection_id == collection.id,
            ImageRow.status == "ok",
            EmbeddingRow.model_id == collection.model_id,
            EmbeddingRow.kind == "cls",
            EmbeddingRow.region == "full",
        )
    ).one_or_none()
    if vector is None:
        raise ImageNotFound(f"no image {image_id} in collection {collection.name!r}; its images: GET /collections")
    return np.frombuffer(vector, np.float16)[None]


def unit_vector(embedding: Sequence[float], collection: CollectionInfo) -> NDArray[np.float32]:
    """Raises RequestInvalid for another length, and for zeros."""
    if len(embedding) != collection.dim:
        raise RequestInvalid(
            f"embedding: expected {collection.dim} numbers, as {collection.model_name} gives, found {len(embedding)}"
        )
    wide_D = np.array(embedding, np.float64)
    length = float(np.abs(wide_D).max())
    if not 0 < length < np.inf:
        raise RequestInvalid("embedding: expected numbers that are not all 0, found a vector without direction")
    wide_D /= length  # so that squares neither vanish nor overflow
    unit_D: NDArray[np.float32] = (wide_D / np.linalg.norm(wide_D)).astype(np.float32)
    return unit_D


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A readable image. path: as the system names it. sha256: of the bytes that were indexed."""

    path: str
    sha256: bytes
    collection: str


def image_file(session: Session, image_id: int) -> ImageFile:
    """Raises ImageNotFound."""
    row = session.execute(
        select(SourceRow.path, ImageRow.path, ImageRow.sha256, CollectionRow.name)
        .join(SourceRow, SourceRow.id == ImageRow.source_id)
        .join(CollectionRow, CollectionRow.id == ImageRow.collection_id)
        .where(ImageRow.id == image_id, ImageRow.status == "ok")
    ).one_or_none()
    if row is None:
        raise ImageNotFound(f"no readable image {image_id} in any collection")
    source, name, sha256, collection = row
    assert sha256 is not None
    return ImageFile(join_path(decode_path(source), name), sha256, collection)
