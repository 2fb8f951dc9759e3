"""What the API says about collections and images, and making and removing collections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from dino_index.catalog import CollectionRow, ImageRow, SourceRow, bound_parts
from dino_index.collection_removal import remove_collection
from dino_index.collections import CollectionInfo, count_images, create_collection, find_collection
from dino_index.errors import CollectionExists, CollectionNotFound, ImageNotFound, RequestInvalid
from dino_index.filters import matching_ids, parse_filter
from dino_index.model_files import BUNDLED, BUNDLED_VERSION, ModelSpec, resolve_model, stored_path
from dino_index.model_store import default_model, resolve_default
from dino_search.api.engine import Engine
from dino_search.api.threads import in_thread
from dino_search.neighbours import portable_path

if TYPE_CHECKING:
    from dino_search.api.uploads import Uploads


def summaries(session: Session) -> list[dict[str, Any]]:
    """Facts about all collections, by name."""
    names = session.scalars(select(CollectionRow.name).order_by(CollectionRow.name)).all()
    return [_summary(session, find_collection(session, name)) for name in names]


def summary(session: Session, name: str) -> dict[str, Any]:
    """Facts about one collection. Raises CollectionNotFound."""
    return _summary(session, find_collection(session, name))


def _summary(session: Session, collection: CollectionInfo) -> dict[str, Any]:
    """Of what `info --json` says, that which is not about this machine."""
    counts = count_images(session, collection)
    return {
        "collection": collection.name,
        "images": counts["ok"],
        "failed": counts["failed"],
        "model": collection.model_name,
        "dim": collection.dim,
        "input_size": collection.model_config["input_size"],
    }


async def create(engine: Engine, name: str, model: str | None) -> dict[str, Any]:
    """An empty collection under a model of the home, the default one for None.

    Raises CollectionExists, RequestInvalid, ModelError, CollectionError for a name that none can have, CatalogErrors.
    """
    spec = await engine.catalog.in_thread(_model_for_new, engine, name, model)
    passes = await engine.passes_for(spec)

    def write(session: Session) -> dict[str, Any]:
        _require_absent(session, name)
        return _summary(session, create_collection(session, name, spec, passes.backbone.dim))

    return await engine.catalog.in_thread(engine.catalog.write, write)


def _model_for_new(engine: Engine, name: str, model: str | None) -> ModelSpec:
    def look(session: Session) -> str:
        _require_absent(session, name)
        return default_model(session)

    engine.catalog.create()
    default = engine.catalog.read(look)
    if model is None:
        return resolve_default(default, engine.settings.home)
    # By name only: a path would let a request read any file.
    if model not in (BUNDLED, BUNDLED_VERSION) and stored_path(model, engine.models) is None:
        raise RequestInvalid(
            f"model: expected the name of a model in the home of this service, found {model!r}; fetch it there: "
            f"dino-search models get {model}"
        )
    return resolve_model(model, models=engine.models)


def _require_absent(session: Session, name: str) -> None:
    """Raises CollectionExists, CollectionError."""
    try:
        find_collection(session, name)
    except CollectionNotFound:
        return
    raise CollectionExists(f"there is a collection {name!r} already; send pictures to it, or choose another name")


async def delete(engine: Engine, uploads: Uploads, name: str) -> None:
    """Removes a collection, and the uploaded files that were its alone. Raises CollectionNotFound, CatalogErrors."""

    def remove() -> list[str]:
        files = engine.catalog.read(lambda session: uploads.paths_of(session, find_collection(session, name)))
        remove_collection(engine.catalog.opened(), name)
        return files

    files = await engine.catalog.in_thread(remove)
    await uploads.remove_files_of(files)
    await in_thread(engine.catalog.threads, engine.forget, name)


def images(session: Session, name: str, cursor: int, limit: int, filters: Sequence[str]) -> dict[str, Any]:
    """Images of a collection with an id above the cursor, by id, of those that pass.

    Raises CollectionNotFound, FilterError.
    """
    collection = find_collection(session, name)
    wanted = select(ImageRow.id).where(ImageRow.collection_id == collection.id)
    if filters:
        passing = matching_ids(session, collection, [parse_filter(text) for text in filters])
        ids = sorted(image_id for image_id in passing.tolist() if image_id > cursor)[: limit + 1]
    else:
        ids = list(session.scalars(wanted.where(ImageRow.id > cursor).order_by(ImageRow.id).limit(limit + 1)))
    shown = ids[:limit]
    facts: list[dict[str, Any]] = []
    for part in bound_parts(shown):
        rows = session.execute(
            select(ImageRow, SourceRow.path)
            .join(SourceRow, SourceRow.id == ImageRow.source_id)
            .where(ImageRow.id.in_(part))
            .order_by(ImageRow.id)
        )
        facts += [_facts(row, source) for row, source in rows]
    return {
        "collection": collection.name,
        "images": facts,
        "next_cursor": shown[-1] if len(ids) > limit else None,
    }


def image(session: Session, name: str, image_id: int) -> dict[str, Any]:
    """One image of a collection. Raises CollectionNotFound, ImageNotFound."""
    found: list[dict[str, Any]] = images(session, name, image_id - 1, 1, ())["images"]
    if not found or found[0]["image_id"] != image_id:
        raise ImageNotFound(f"expected the id of an image in {name!r}, found {image_id}")
    return found[0]


def _facts(row: ImageRow, source: str) -> dict[str, Any]:
    return {
        "image_id": row.id,
        "path": portable_path(source, row.path),
        "status": row.status,
        "label": row.label,
        "width": row.width,
        "height": row.height,
        "size": row.size,
        "sha256": row.sha256.hex() if row.sha256 else None,
        "added_at": row.added_at,
        "metadata": row.facts,
        "error_code": row.error_code,
        "error_message": row.error_message,
    }
