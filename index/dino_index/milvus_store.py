"""Vectors of a catalog's collections on a Milvus server: brought there, checked, built anew.

The catalog stays the truth. What the server has yet to be told needs no list of its own: it is the images of later
generations than it was told of, and the removals since, which are written with each change, in one transaction. They
are brought over after the commit and before each search, in the writers' turn, so that an older state never follows a
newer one; what a crash leaves out, the next one brings. Everything is an upsert or a deletion by image id, which may be
done twice.
"""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any
from uuid import uuid4

from sqlalchemy import ColumnElement, and_, delete, or_, select, update
from sqlalchemy.orm import Session

from dino_index.catalog import Catalog, CollectionRow, ImageRow, RemovalRow, StoredVectorsRow, bound_parts
from dino_index.catalog.schema import CURRENT, DROPPED, FILLING
from dino_index.collections import CollectionInfo, check_model, find_collection, generation_of, hold_model, option_for
from dino_index.copy_descriptors import CopyDescriptor
from dino_index.copy_search import CopyReferences
from dino_index.errors import CatalogUnavailable, DinoSearchError, IndexTypeInvalid, VectorStoreUnavailable
from dino_index.index_type_names import FLAT, NAMED_INDEX_TYPES
from dino_index.milvus_comparison import find_difference
from dino_index.milvus_search import INDEX_TYPES, MilvusIndex, ServedVectors
from dino_index.milvus_server import (
    BRIEFLY_S,
    CALL_TIMEOUT_S,
    PATIENTLY_S,
    CollectionGone,
    MilvusAddress,
    MilvusServer,
)
from dino_index.milvus_writing import (
    create_vectors,
    delete_vectors,
    drop_vectors,
    seal_vectors,
    server_time,
    upsert_vectors,
)
from dino_index.served_references import ServedReferences
from dino_index.snapshots import count_vectors, forget_removals
from dino_index.vector_kinds import COPIES, CopyVectors, SearchVectors, VectorKind

logger = logging.getLogger(__name__)

_PREFIX = "dino_search_"
_SEARCH = SearchVectors()
_CALLED = {_SEARCH.name: "vectors", COPIES: "copy vectors"}
_IMAGES_A_TURN = 4096
# What has so few vectors the server searches by comparing all; sealing them would take seconds for nothing.
_MIN_SEALED = 10_000
# Whoever fills a collection says so with each part; one that has been silent for so long is dead.
_ABANDONED_AFTER = timedelta(minutes=10)


@cache
def server_at(url: str) -> MilvusServer:
    """The one connection of this process to a server. Raises VectorStoreError for a URL of no use."""
    return MilvusServer(MilvusAddress.parse(url))


class MilvusStore:
    """See `VectorStore`. Cheap to make; for any number of threads."""

    def __init__(self, catalog: Catalog, server: MilvusServer) -> None:
        self._catalog = catalog
        self._server = server
        self.place = server.place

    def connect(self, *, patience_s: float = BRIEFLY_S) -> None:
        self._server.ping(patience_s=patience_s)

    def holdings(self) -> tuple[int, list[str]]:
        """How many of the catalog's collections were stored on the server, and the names of those that are not there.

        Raises VectorStoreErrors, CatalogErrors.
        """
        held = set(self._server.call(lambda client: client.list_collections(timeout=CALL_TIMEOUT_S)))
        with self._catalog.reading() as session:
            stored = session.execute(
                select(CollectionRow.name, StoredVectorsRow.name)
                .join(CollectionRow, CollectionRow.id == StoredVectorsRow.collection_id)
                .where(*self._ours(), StoredVectorsRow.state == CURRENT)
                .order_by(CollectionRow.name)
            ).all()
        lost = dict.fromkeys(collection for collection, name in stored if name not in held)
        return len({collection for collection, _ in stored}), list(lost)

    def check_type(self, asked: str, dim: int) -> None:
        if asked not in NAMED_INDEX_TYPES:
            raise IndexTypeInvalid(f"Milvus builds {', '.join(NAMED_INDEX_TYPES)}, found --index-type {asked}")

    def weigh(self, session: Session, collection: CollectionInfo, num_vectors: int) -> None:
        pass  # the server's memory is not this machine's

    def load(self, session: Session, collection: CollectionInfo) -> MilvusIndex:
        return self._load(session, collection, _SEARCH)

    def load_copies(
        self,
        session: Session,
        collection: CollectionInfo,
        descriptor: CopyDescriptor,
        before: CopyReferences | None = None,
    ) -> ServedReferences:
        return ServedReferences(self._load(session, collection, CopyVectors(descriptor)))

    def keep_up(self, collection: CollectionInfo) -> None:
        if self._server.seems_away:
            return
        try:
            self._bring(collection, _SEARCH, 0)
        except (DinoSearchError, CollectionGone) as error:
            logger.warning("vectors are not brought to Milvus yet: %s", str(error).split(";")[0])

    def settle(self, collection: CollectionInfo, *, retype: bool = False) -> None:
        for kind in self._catalog.read(lambda session: self._kinds(session, collection)):
            self._settle(collection, kind, retype)

    def compact(self, collection: CollectionInfo) -> None:
        for kind in self._catalog.read(lambda session: self._kinds(session, collection)):
            self._store_anew(collection, kind)

    def problem(self, collection: CollectionInfo) -> str | None:
        kinds = self._catalog.read(lambda session: self._kinds(session, collection))
        return next(filter(None, (self._problem(collection, kind) for kind in kinds)), None)

    def purge(self) -> int:
        with self._catalog.reading() as session:
            ids = session.scalars(select(StoredVectorsRow.collection_id).where(*self._ours()).distinct()).all()
            names = session.scalars(select(CollectionRow.name).where(CollectionRow.id.in_(ids))).all()
            collections = [find_collection(session, name) for name in names]
        for collection in collections:
            self.compact(collection)
        self._drop_outdated()
        return len(collections)

    def forget(self, collection: CollectionInfo) -> None:
        try:
            self._drop_outdated()
        except VectorStoreUnavailable as error:
            logger.warning("the vectors of %r stay there until it can be reached: %s", collection.name, error)

    def facts(self, session: Session, collection: CollectionInfo) -> dict[str, Any]:
        row = self._row(session, collection, _SEARCH)
        known = row.generation if row else -1
        return {
            "vector_store": self.place,
            "index_type": row.index_type if row else FLAT,
            "index_reason": row.reason if row else "nothing is stored there yet",
            "images_in_snapshot": count_vectors(session, collection, up_to_generation=known),
        }

    # What the catalog knows about the server

    def _ours(self, collection: CollectionInfo | None = None) -> list[ColumnElement[bool]]:
        ours = [StoredVectorsRow.place == self.place, StoredVectorsRow.owner == self._catalog.identity]
        return ours if collection is None else [*ours, StoredVectorsRow.collection_id == collection.id]

    def _kinds(self, session: Session, collection: CollectionInfo) -> list[VectorKind]:
        """What the server is to hold of a collection: copy vectors as soon as copies have been looked for."""
        rows = session.scalars(select(StoredVectorsRow).where(*self._current(collection)))
        return [_SEARCH, *(CopyVectors.of(row) for row in rows if row.kind == COPIES)]

    def _current(self, collection: CollectionInfo) -> list[ColumnElement[bool]]:
        of_model = StoredVectorsRow.model_id == collection.model_id
        return [*self._ours(collection), StoredVectorsRow.state == CURRENT, of_model]

    def _row(self, session: Session, collection: CollectionInfo, kind: VectorKind) -> StoredVectorsRow | None:
        of_kind = StoredVectorsRow.kind == kind.name, StoredVectorsRow.whitening_sha256 == kind.whitening_sha256
        return session.scalars(select(StoredVectorsRow).where(*self._current(collection), *of_kind)).one_or_none()

    def _served(self, collection: CollectionInfo, kind: VectorKind) -> ServedVectors:
        with self._catalog.reading() as session:
            row = self._row(session, collection, kind)
            if row is None:
                raise VectorStoreUnavailable(
                    f"the vectors of collection {collection.name!r} at {self.place} are just being replaced; try again"
                )
            return _served_by(row)

    def _wants_another_type(self, session: Session, collection: CollectionInfo, kind: VectorKind) -> bool:
        row = self._row(session, collection, kind)
        return row is not None and row.index_type != self._wanted_type(session, collection, kind)[0]

    def _wanted_type(self, session: Session, collection: CollectionInfo, kind: VectorKind) -> tuple[str, str]:
        """(name, reason). Raises IndexTypeInvalid."""
        from dino_index.index_types import choose_index_type

        asked = session.get_one(CollectionRow, collection.id).index_type
        choice = choose_index_type(asked, count_vectors(session, collection), kind.dim(collection), num_gpus=0)
        if choice.name not in INDEX_TYPES:
            raise IndexTypeInvalid(
                f"Milvus builds no {choice.name}, a factory string of FAISS; choose another type: "
                f"dino-search index PATH --index-type auto|{'|'.join(INDEX_TYPES)}{option_for(collection.name)}"
            )
        return choice.name, choice.reason

    # Searching

    def _load(self, session: Session, collection: CollectionInfo, kind: VectorKind) -> MilvusIndex:
        generation = generation_of(session, collection)
        row = self._row(session, collection, kind)
        if row is None or row.generation < generation:
            self._bring(collection, kind, BRIEFLY_S)
            served = self._served(collection, kind)
        else:
            served = _served_by(row)
        try:
            return self._index(collection, kind, generation, served)
        except CollectionGone:
            logger.warning(
                "Milvus at %s has lost the vectors of collection %r; storing them anew", self.place, collection.name
            )
            self._store_anew(collection, kind)
            return self._index(collection, kind, generation, self._served(collection, kind))

    def _index(
        self, collection: CollectionInfo, kind: VectorKind, generation: int, served: ServedVectors
    ) -> MilvusIndex:
        dim = kind.dim(collection)
        return MilvusIndex(self._server, dim, generation, served, lambda: self._served(collection, kind))

    # Comparing

    def _problem(self, collection: CollectionInfo, kind: VectorKind) -> str | None:
        found: str | None
        try:
            self._bring(collection, kind, BRIEFLY_S)
            with self._catalog.reading() as session:
                row = self._row(session, collection, kind)
                if row is None or row.generation != generation_of(session, collection):
                    return None  # others write: the next look tells
                served = _served_by(row)
                found = find_difference(self._catalog, session, collection, kind, row.generation, self._server, served)
        except CollectionGone:
            found = "it has lost those of the collection"
        except (VectorStoreUnavailable, CatalogUnavailable) as error:
            found = str(error)
        return f"{_CALLED[kind.name]} in Milvus at {self.place}: {found}" if found else None

    # Bringing changes over

    def _settle(self, collection: CollectionInfo, kind: VectorKind, retype: bool) -> None:
        try:
            self._catalog.outlast(lambda: self._bring(collection, kind, PATIENTLY_S))
        except CollectionGone:
            self._store_anew(collection, kind)
            return
        if retype and self._catalog.read(lambda session: self._wants_another_type(session, collection, kind)):
            self._store_anew(collection, kind)

    def _bring(self, collection: CollectionInfo, kind: VectorKind, patience_s: float) -> None:
        """Stores what the catalog has and the server was not told. Raises CollectionGone, VectorStoreErrors."""
        deadline = time.monotonic() + patience_s
        while True:
            with self._catalog.reading() as session:
                row = self._row(session, collection, kind)
                if row is not None and row.generation >= generation_of(session, collection):
                    return
            if row is None:
                self._store_anew(collection, kind, patience_s=patience_s)
                return
            try:
                # Who hangs in the writers' turn keeps all others from writing.
                self._server.ping_after_silence()
                self._bring_some(collection, kind)
            except VectorStoreUnavailable:
                # Not waited for in the writers' turn: others want to write meanwhile.
                if time.monotonic() > deadline:
                    raise
                time.sleep(1)

    def _bring_some(self, collection: CollectionInfo, kind: VectorKind) -> None:
        """In one turn among the writers, who follow one after the other over all processes."""
        with self._catalog.writing() as session:
            hold_model(session, collection)
            row = self._row(session, collection, kind)
            if row is None:
                return
            since = row.generation
            later = ImageRow.collection_id == collection.id, ImageRow.generation > since
            cut = select(ImageRow.generation).where(*later).order_by(ImageRow.generation)
            upto = session.scalar(cut.offset(_IMAGES_A_TURN).limit(1)) or generation_of(session, collection)
            removed = set(
                session.scalars(
                    select(RemovalRow.image_id).where(
                        RemovalRow.collection_id == collection.id,
                        RemovalRow.generation > since,
                        RemovalRow.generation <= upto,
                    )
                )
            )
            for part in bound_parts(sorted(removed)):
                # Some may be readable again, under the same id.
                readable = ImageRow.id.in_(part), ImageRow.status == "ok"
                removed -= set(session.scalars(select(ImageRow.id).where(*readable)))
            for ids, generations, vectors_ND in kind.parts(session, collection, since, upto):
                removed |= set(upsert_vectors(self._server, row.name, ids, generations, vectors_ND, patience_s=0))
            delete_vectors(self._server, row.name, sorted(removed), patience_s=0)
            row.generation, row.timestamp = upto, server_time(self._server, patience_s=0)

    # Building anew

    def _store_anew(self, collection: CollectionInfo, kind: VectorKind, *, patience_s: float = PATIENTLY_S) -> None:
        self.connect(patience_s=patience_s)
        self._drop_outdated()
        with self._catalog.writing() as session:
            hold_model(session, collection)
            index_type, reason = self._wanted_type(session, collection, kind)
            name = f"{_PREFIX}{collection.id}_{uuid4().hex}"
            row = StoredVectorsRow(
                name=name, collection_id=collection.id, model_id=collection.model_id, place=self.place,
                owner=self._catalog.identity, state=FILLING, generation=generation_of(session, collection),
                index_type=index_type, reason=reason, kind=kind.name, whitening=kind.whitening,
                whitening_sha256=kind.whitening_sha256,
            )  # fmt: skip
            session.add(row)
        try:
            generation = self._fill(collection, kind, name, index_type)
        except BaseException:
            self._change(name, state=DROPPED)
            raise
        timestamp = server_time(self._server, patience_s=PATIENTLY_S)
        with self._catalog.writing() as session:
            hold_model(session, collection)
            replaced = or_(
                StoredVectorsRow.kind == kind.name, StoredVectorsRow.model_id != collection.model_id
            )  # fmt: skip
            before = *self._ours(collection), StoredVectorsRow.state == CURRENT, replaced
            session.execute(update(StoredVectorsRow).where(*before).values(state=DROPPED))
            session.execute(
                update(StoredVectorsRow)
                .where(StoredVectorsRow.name == name)
                .values(state=CURRENT, generation=generation, timestamp=timestamp)
            )
            forget_removals(session, collection)
        self._bring(collection, kind, PATIENTLY_S)
        self._drop_outdated()

    def _fill(self, collection: CollectionInfo, kind: VectorKind, name: str, index_type: str) -> int:
        """Makes a collection on the server with the catalog's vectors, ready to be searched; as of which generation.

        Raises CatalogErrors, VectorStoreErrors.
        """
        with self._catalog.reading() as session:
            check_model(session, collection)
            generation = generation_of(session, collection)
            num_vectors = count_vectors(session, collection)
            create_vectors(self._server, name, index_type, num_vectors, kind.dim(collection))
            for ids, generations, vectors_ND in kind.parts(session, collection):
                upsert_vectors(self._server, name, ids, generations, vectors_ND, patience_s=PATIENTLY_S)
                self._say_alive(name)
        if num_vectors >= _MIN_SEALED and index_type != FLAT:
            seal_vectors(self._server, name, lambda: self._say_alive(name))
        return generation

    def _say_alive(self, name: str) -> None:
        self._change(name, changed_at=datetime.now(UTC))

    def _change(self, name: str, **values: Any) -> None:
        with self._catalog.writing() as session:
            session.execute(update(StoredVectorsRow).where(StoredVectorsRow.name == name).values(**values))

    def _drop_outdated(self) -> None:
        """Drops on the server what was replaced, what belonged to collections that are gone, and what a kill left."""
        silent = StoredVectorsRow.changed_at < datetime.now(UTC) - _ABANDONED_AFTER
        outdated = or_(StoredVectorsRow.state == DROPPED, and_(StoredVectorsRow.state == FILLING, silent))
        with self._catalog.reading() as session:
            names = session.scalars(select(StoredVectorsRow.name).where(*self._ours(), outdated)).all()
        for name in names:
            drop_vectors(self._server, name)
            with self._catalog.writing() as session:
                session.execute(delete(StoredVectorsRow).where(StoredVectorsRow.name == name))


def _served_by(row: StoredVectorsRow) -> ServedVectors:
    return ServedVectors(name=row.name, timestamp=row.timestamp, index_type=row.index_type)
