"""Copy detection in a service: what is prepared for a collection is kept for as long as the collection stays the same.

One query at a time is looked into; its forward passes take slots as those of all other requests do.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

from dino_index.collections import CollectionInfo, find_collection, generation_of
from dino_index.copy_detection import Query, make_query
from dino_index.errors import ImageError, RequestInvalid
from dino_search.api.engine import Engine
from dino_search.api.pictures import Picture
from dino_search.api.threads import in_thread
from dino_search.copies import CopiesOptions, CopyFinder
from dino_search.copy_results import CopyMatch
from dino_search.copy_runs import PairPicture, compare_pictures, decision_rule, facts_of, pair_picture, pair_tools

if TYPE_CHECKING:
    from dino_index.backbones import Backbone

T = TypeVar("T")

# Each holds the copy vectors of a whole collection.
_MAX_FINDERS = 2


@dataclass(frozen=True, eq=False, slots=True)
class _Prepared:
    finder: CopyFinder
    generation: int


class Copying:
    """Copies and comparisons; coroutines of the engine's event loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # The one that may use finders and the rules made from them.
        self.thread = ThreadPoolExecutor(1, "copies")
        self._finders: OrderedDict[tuple[int, int, CopiesOptions], _Prepared] = OrderedDict()

    def close(self) -> None:
        self.thread.shutdown(cancel_futures=True)

    async def copies(
        self, picture: Picture, options: CopiesOptions, *, client: str, collection: str, min_score: float | None
    ) -> dict[str, Any]:
        """What `copies --json` prints for one query.

        Raises CollectionNotFound, CollectionEmpty, ImageNotFound, CalibrationImpossible, RequestInvalid, ImageError,
        TooManyRequests, ServerFull, ModelError, CatalogError.
        """
        engine = self._engine
        engine.check_k(options.detection.k)
        with engine.admission.places(client):
            info, picture = await engine.with_bytes(picture, collection)
            query = await in_thread(engine.decoders, self._query, picture, info, options)
            backbone = cast("Backbone", (await engine.passes_of(info)).shared)

            def find() -> dict[str, Any]:
                finder = self._finder(info, backbone, options)
                rule = decision_rule(finder, engine.models)
                found = finder.find_one(query, rule).to_json()
                if min_score is not None:
                    found["matches"] = [match for match in found["matches"] if match["score"] >= min_score]
                return {
                    "collection": info.name,
                    "model": info.model_name,
                    "facts": facts_of(finder, rule),
                    "queries": [found],
                }

            return await in_thread(self.thread, find)

    async def compare(
        self, first: Picture, second: Picture, options: CopiesOptions, *, client: str, collection: str
    ) -> CopyMatch:
        """Whether one picture is a copy of the other, as `compare --json` prints it. Raises as `copies` does."""
        engine = self._engine
        with engine.admission.places(client, 2):
            read: list[PairPicture] = []
            for picture in (first, second):
                info, known = await engine.with_bytes(picture, collection)
                read.append(await in_thread(engine.decoders, self._pair_picture, known, info, options))
            backbone = cast("Backbone", (await engine.passes_of(info)).shared)

            def compare() -> CopyMatch:
                tools = pair_tools(engine.catalog.opened(), info, backbone, engine.models, options)
                return compare_pictures(tools, *read)

            return await in_thread(self.thread, compare)

    def _query(self, picture: Picture, info: CollectionInfo, options: CopiesOptions) -> Query:
        assert picture.data is not None
        return _used(
            picture,
            lambda: make_query(
                picture.data or b"", path=picture.name, sha256=picture.sha256,
                side=info.model_config["input_size"], options=options.detection, limits=options.limits,
            ),
        )  # fmt: skip

    def _pair_picture(self, picture: Picture, info: CollectionInfo, options: CopiesOptions) -> PairPicture:
        assert picture.data is not None
        return _used(
            picture,
            lambda: pair_picture(
                picture.data or b"", picture.name, picture.sha256,
                side=info.model_config["input_size"], detection=options.detection, limits=options.limits,
            ),
        )  # fmt: skip

    def _finder(self, info: CollectionInfo, backbone: Backbone, options: CopiesOptions) -> CopyFinder:
        """The finder for the collection's present state; in its thread."""
        catalog = self._engine.catalog.opened()
        with catalog.reading() as session:
            present = find_collection(session, info.name)
            generation = generation_of(session, present)
        if present.model_id != info.model_id:
            raise RequestInvalid(f"collection {info.name!r} has just been given another model; ask again")
        key = present.id, present.model_id, options
        prepared = self._finders.get(key)
        if prepared is None or prepared.generation != generation or prepared.finder.catalog is not catalog:
            before = prepared.finder if prepared is not None else None
            finder = CopyFinder(catalog, present, backbone, self._engine.models, options, before=before)
            prepared = _Prepared(finder, generation)
            self._finders[key] = prepared
        self._finders.move_to_end(key)
        while len(self._finders) > _MAX_FINDERS:
            self._finders.popitem(last=False)
        return prepared.finder


def _used(picture: Picture, read: Callable[[], T]) -> T:
    """What `read` makes of the picture; its errors name it. Raises ImageError."""
    try:
        return read()
    except ImageError as error:
        raise ImageError(error.reason, f"{picture.name} cannot be used: {error}") from error
