"""The engine: the one owner of catalog, models and vectors in a service, and the stages that a query goes through.

Pictures are decoded in threads of their own, share forward passes (`batching`), and are searched for in the one thread
that owns their collection's vectors. What other processes index is seen by the next query: each looks at the
collection's generation in the transaction that it answers from.

Shapes: Q queries, D channels.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import select
from sqlalchemy.orm import Session

from dino_index.catalog import CollectionRow
from dino_index.catalog.portable_paths import encode_path
from dino_index.collections import CollectionInfo, find_collection, model_of
from dino_index.embedding import num_processors
from dino_index.errors import (
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
from dino_index.vector_stores import VectorSearch
from dino_search.api.batching import Admission, ForwardPasses
from dino_search.api.metrics import Metrics
from dino_search.api.pictures import Picture, unit_vector
from dino_search.api.served_catalog import ServedCatalog
from dino_search.api.settings import ServiceSettings
from dino_search.api.shelves import Shelf
from dino_search.api.stored_images import image_file, stored_vector_of
from dino_search.api.threads import in_thread
from dino_search.api.thumbnails import ThumbnailCache
from dino_search.api.vector_probe import VectorProbe
from dino_search.neighbours import find_neighbours
from dino_search.results import SearchResults

logger = logging.getLogger(__name__)

T = TypeVar("T")

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


class Engine:
    """See the module. Its coroutines belong to one event loop; everything else is for any thread."""

    def __init__(self, settings: ServiceSettings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self.catalog = ServedCatalog(settings, metrics)
        self.admission = Admission(settings.queue_size, metrics)
        self.thumbnails = ThumbnailCache(settings.thumbnail_cache_bytes)
        self.models = models_folder(settings.home)
        self.decoders = ThreadPoolExecutor(num_processors(), "decode")
        # Of their own, so that a probe is answered while everything else waits for a catalog.
        self.probes = ThreadPoolExecutor(1, "probe")
        self._vector_probe = VectorProbe()
        self._loader = ThreadPoolExecutor(1, "load")
        self._shelves: dict[str, Shelf] = {}
        self._passes: dict[str, ForwardPasses] = {}
        self._lock = threading.Lock()
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
        for pool in (self.decoders, self.probes, self._loader):
            pool.shutdown(cancel_futures=True)
        self._vector_probe.close()
        for shelf in shelves:
            shelf.close()
        for each in passes:
            each.close()
        self.catalog.close()

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
        collection = await self.catalog.in_thread(self.catalog.read, lambda session: find_collection(session, name))
        passes = await self.passes_of(collection)
        side = collection.model_config["input_size"]
        # All threads take part: each pays for its first pass.
        await asyncio.gather(
            *(asyncio.wrap_future(passes.embed(np.zeros((side, side, 3), np.uint8))) for _ in range(8))
        )
        await asyncio.wrap_future(passes.embed(np.zeros((side, side, 3), np.uint8)))
        shelf = self._shelf(name)

        def load() -> None:
            catalog = self.catalog.opened()
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
            self.catalog.read(lambda session: session.execute(select(CollectionRow.id).limit(1)).first())
            if problem := self._vector_probe.problem(self.catalog.opened()):
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
            catalog = self.catalog.opened()
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
        with self.metrics.stage("catalog"), self.catalog.opened().reading() as session:
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
            with self.metrics.stage("catalog"), self.catalog.opened().reading() as session:
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

    def _shelf(self, name: str) -> Shelf:
        with self._lock:
            if name not in self._shelves:
                self._shelves[name] = Shelf(name, self.metrics)
            return self._shelves[name]
