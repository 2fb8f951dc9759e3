"""Pictures that are sent to a collection: kept in the home under their content's sha256, and indexed at once."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from dino_index.catalog import ImageRow, SourceRow, storage_errors
from dino_index.catalog.portable_paths import encode_path
from dino_index.collections import CollectionInfo, find_collection, model_of, source_paths
from dino_index.embedding import EmbeddedFile, FileFacts
from dino_index.errors import DinoSearchError, ImageError, ImageNotFound
from dino_index.image_files import ListedFile
from dino_index.image_formats import HEAD_BYTES, image_format
from dino_index.images import DecodedImage, decode
from dino_index.recording import BatchRecorder, Sources, remove_images
from dino_index.vector_stores import vector_store_of
from dino_search.api.batching import Vectors
from dino_search.api.engine import Engine
from dino_search.api.stored_images import image_file
from dino_search.api.threads import in_thread

logger = logging.getLogger(__name__)

FOLDER = "uploads"


@dataclass(frozen=True, kw_only=True)
class Uploaded:
    """What became of one file. status: added, updated, skipped (it was there) or failed, then with a reason."""

    file: str
    status: str
    image_id: int | None = None
    reason: str = ""


@dataclass(frozen=True, eq=False, slots=True)
class _Received:
    name: str
    path: Path
    sha256: bytes
    picture: DecodedImage
    vectors: Vectors


class Uploads:
    """Coroutines of the engine's event loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.folder = engine.settings.home / FOLDER
        self._maintenance = ThreadPoolExecutor(1, "maintenance")

    def close(self) -> None:
        self._maintenance.shutdown(cancel_futures=True)

    async def add(
        self, files: Sequence[tuple[str, bytes]], *, client: str, collection: str, label: str | None
    ) -> tuple[CollectionInfo, list[Uploaded]]:
        """Stores and indexes pictures, all in one transaction. files: (name, bytes).

        A file that is no usable picture is reported; where none is usable, its error is raised.
        Raises CollectionNotFound, ImageError, TooManyRequests, ServerFull, ModelError, CatalogErrors.
        """
        engine = self._engine
        with engine.admission.places(client, len(files)):
            info = await engine.catalog.in_thread(
                engine.catalog.read, lambda session: find_collection(session, collection)
            )
            # The files of a collection's images are where its model says how to read them, also on a home that moved.
            await in_thread(engine.decoders, model_of, info, engine.models)
            received = await asyncio.gather(
                *(self._receive(name, data, info) for name, data in files), return_exceptions=True
            )
            good = [each for each in received if isinstance(each, _Received)]
            for each in received:
                if isinstance(each, BaseException) and (not good or not isinstance(each, ImageError)):
                    raise each
            outcomes = await engine.catalog.in_thread(self._record, info, good, label)
        uploaded = [
            outcomes[each.path]
            if isinstance(each, _Received)
            else Uploaded(file=name, status="failed", reason=_reason(each))
            for (name, _), each in zip(files, received, strict=True)
        ]
        self._maintenance.submit(self._settle, info)
        return info, uploaded

    async def remove(self, image_id: int, collection: str) -> None:
        """Drops an image from a collection, and its file where it was uploaded and no other collection has it.

        Raises CollectionNotFound, ImageNotFound, CatalogErrors.
        """
        await self._engine.catalog.in_thread(self._remove, image_id, collection)

    async def remove_files_of(self, paths: Sequence[str]) -> None:
        """Deletes those of the files that were uploaded and that no image is any more."""
        await self._engine.catalog.in_thread(self._delete_unneeded, paths)

    def paths_of(self, session: Session, collection: CollectionInfo) -> list[str]:
        """The uploaded files that a collection has."""
        source_ids = [key for key, path in source_paths(session, collection).items() if Path(path) == self.folder]
        names = session.scalars(select(ImageRow.path).where(ImageRow.source_id.in_(source_ids)))
        return [str(self.folder / name) for name in names]

    async def _receive(self, name: str, data: bytes, info: CollectionInfo) -> _Received:
        """One file, decoded, embedded and stored. Raises ImageError, ModelError, CatalogErrors."""
        engine, side = self._engine, info.model_config["input_size"]

        def read() -> tuple[bytes, DecodedImage]:
            with engine.metrics.stage("decode"):
                picture = decode(data, size=(side, side), limits=engine.settings.limits)
            return hashlib.sha256(data).digest(), picture

        try:
            sha256, picture = await in_thread(engine.decoders, read)
        except ImageError as error:
            raise ImageError(error.reason, f"{name} cannot be used: {error}") from error
        passes = await engine.passes_of(info)
        vectors = await asyncio.wrap_future(passes.embed(picture.pixels_HWC))
        path = self._place_of(data, sha256)
        await in_thread(engine.decoders, self._store, path, data)
        return _Received(name, path, sha256, picture, vectors)

    def _place_of(self, data: bytes, sha256: bytes) -> Path:
        digest = sha256.hex()
        kind = (image_format(data[:HEAD_BYTES]) or "image").lower()
        return self.folder / digest[:2] / f"{digest}.{kind}"

    def _store(self, path: Path, data: bytes) -> None:
        """Whole or not at all; not where it is already. Raises CatalogErrors."""
        if path.is_file() and path.stat().st_size == len(data):
            return
        with storage_errors(self._engine.settings.home):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
            try:
                with open(partial, "xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)

    def _record(self, info: CollectionInfo, received: Sequence[_Received], label: str | None) -> dict[Path, Uploaded]:
        outcomes, names = [], {}
        for each in {item.path: item for item in received}.values():
            status = each.path.stat()
            listed = ListedFile(path=str(each.path), size=status.st_size, mtime_ns=status.st_mtime_ns)
            facts = FileFacts(each.sha256, status.st_size, status.st_mtime_ns, each.picture.width, each.picture.height)
            outcomes.append(EmbeddedFile(listed, facts, *each.vectors))
            names[listed.path] = each.name

        def record(session: Session) -> dict[Path, Uploaded]:
            sources = Sources.covering(session, info, [str(self.folder)])
            known = _ids_by_path(session, sources, list(names))
            BatchRecorder(session, info).record(
                outcomes,
                None if label is None else dict.fromkeys(names, label),
                {path: {"uploaded_as": name} for path, name in names.items() if path not in known},
            )
            session.flush()
            ids = _ids_by_path(session, sources, list(names))
            return {
                Path(path): Uploaded(file=name, status="skipped" if path in known else "added", image_id=ids[path])
                for path, name in names.items()
            }

        return self._engine.catalog.write(record)

    def _remove(self, image_id: int, name: str) -> None:
        def remove(session: Session) -> str:
            collection = find_collection(session, name)
            path = session.execute(
                select(ImageRow.id).where(ImageRow.id == image_id, ImageRow.collection_id == collection.id)
            ).one_or_none()
            if path is None:
                raise ImageNotFound(f"no image {image_id} in collection {name!r}; nothing was removed")
            try:
                file = image_file(session, image_id).path
            except ImageNotFound:  # one that could not be read
                file = ""
            remove_images(session, collection, [image_id])
            return file

        self._delete_unneeded([self._engine.catalog.write(remove)])

    def _delete_unneeded(self, paths: Sequence[str]) -> None:
        uploaded = {path for path in paths if Path(path).is_relative_to(self.folder)}

        def still_needed(session: Session) -> set[str]:
            source_ids = session.scalars(
                select(SourceRow.id).where(SourceRow.path == encode_path(str(self.folder)))
            ).all()
            names = {str(Path(path).relative_to(self.folder)): path for path in uploaded}
            rows = session.scalars(
                select(ImageRow.path).where(ImageRow.source_id.in_(source_ids), ImageRow.path.in_(list(names)))
            )
            return {names[name] for name in rows}

        if not uploaded:
            return
        for path in uploaded - self._engine.catalog.read(still_needed):
            Path(path).unlink(missing_ok=True)

    def _settle(self, info: CollectionInfo) -> None:
        try:
            vector_store_of(self._engine.catalog.opened()).settle(info)
        except DinoSearchError as error:
            # Searches go on with what was stored before and what came since.
            logger.warning("the vectors of collection %r are not stored anew: %s", info.name, error)


def _ids_by_path(session: Session, sources: Sources, paths: Sequence[str]) -> dict[str, int]:
    located = {sources.locate(path): path for path in paths}
    source_ids = {source_id for source_id, _ in located}
    rows = session.execute(
        select(ImageRow.id, ImageRow.source_id, ImageRow.path).where(
            ImageRow.source_id.in_(source_ids), ImageRow.path.in_([name for _, name in located])
        )
    )
    return {located[source_id, name]: image_id for image_id, source_id, name in rows}


def _reason(error: BaseException) -> str:
    assert isinstance(error, ImageError)
    return f"{error.reason}: {error}"
