"""Collections as the catalog has them: finding, creating, counting, and the files' full paths."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import bindparam, func, select
from sqlalchemy.orm import Session

from dino_index.catalog import CollectionRow, ImageRow, ModelRow, SettingRow, SourceRow
from dino_index.catalog.portable_paths import decode_path, encode_path
from dino_index.errors import CollectionError, CollectionNotFound, FingerprintMismatch, ModelNotFound
from dino_index.image_paths import is_url, separator_of
from dino_index.model_files import BUNDLED, BUNDLED_VERSION, ModelSpec, resolve_model

_PENDING_MODEL = "reindex:"
# What a service asks for each search, built once: putting a statement together takes as long as running it.
_BY_NAME = (
    select(
        CollectionRow.id, CollectionRow.name, CollectionRow.model_id, ModelRow.name.label("model_name"),
        ModelRow.config.label("model_config"), ModelRow.fingerprint, ModelRow.dim, CollectionRow.created_at,
    )
    .join(ModelRow, ModelRow.id == CollectionRow.model_id)
    .where(CollectionRow.name == bindparam("name"))
)  # fmt: skip
_GENERATION = select(CollectionRow.generation).where(CollectionRow.id == bindparam("collection_id"))


@dataclass(frozen=True, kw_only=True)
class CollectionInfo:
    """What stays the same about a collection, detached from any session."""

    id: int
    name: str
    model_id: int
    model_name: str
    model_config: dict[str, Any]
    fingerprint: str
    dim: int
    created_at: datetime
    """Tells it from one of the same id that was deleted before it was made."""


def find_collection(session: Session, name: str) -> CollectionInfo:
    """The collection of this name.

    Raises CollectionNotFound with the names that exist, CollectionError for a name that none can have.
    """
    if not name or len(name) > 255 or not name.isprintable():
        raise CollectionError(f"a collection's name has 1 to 255 printable characters, found {name!r}")
    row = session.execute(_BY_NAME, {"name": name}).one_or_none()
    if row is None:
        names = session.scalars(select(CollectionRow.name).order_by(CollectionRow.name)).all()
        found = f"found {', '.join(names)}" if names else "nothing has been indexed yet"
        raise CollectionNotFound(f"no collection {name!r}: {found}; run: dino-search index PATH{option_for(name)}")
    return CollectionInfo(**row._mapping)


def create_collection(session: Session, name: str, spec: ModelSpec, dim: int) -> CollectionInfo:
    """The collection of this name, made with this model if another process has not just made it.

    Raises FingerprintMismatch; CollectionError as `find_collection` does.
    """
    if session.scalar(select(CollectionRow.id).where(CollectionRow.name == name)) is None:
        session.add(CollectionRow(name=name, model_id=ensure_model(session, spec, dim)))
        session.flush()
    collection = find_collection(session, name)
    require_same_model(collection, spec)
    return collection


def ensure_model(session: Session, spec: ModelSpec, dim: int) -> int:
    """Id of the model's row, which is added where the catalog lacks it."""
    model = session.scalars(select(ModelRow).where(ModelRow.fingerprint == spec.fingerprint)).one_or_none()
    if model is None:
        model = ModelRow(fingerprint=spec.fingerprint, name=spec.name, dim=dim, config=spec.config())
        session.add(model)
        session.flush()
    return model.id


def require_same_model(collection: CollectionInfo, spec: ModelSpec) -> None:
    """Raises FingerprintMismatch when the collection's vectors come from another model than this."""
    if collection.fingerprint != spec.fingerprint:
        was, now = collection.model_name, spec.name
        if was == now:
            settings = collection.model_config
            was += f" at {settings['input_size']} px, {settings['pooling']} pooling"
            now += f" at {spec.input_size} px, {spec.pooling} pooling"
        model = f"--model {shlex.quote(spec.name)}"
        pooling = collection.model_config.get("pooling", spec.pooling)
        if spec.pooling != pooling:
            model += f" --pooling {spec.pooling}"
        raise FingerprintMismatch(
            f"collection {collection.name!r} was built with {was} "
            f"({collection.fingerprint[:12]}), not with {now} ({spec.fingerprint[:12]}), and their vectors "
            f"cannot be compared; leave out --model, or give the collection this model: "
            f"dino-search reindex -c {shlex.quote(collection.name)} {model}, or index into another collection: "
            f"dino-search index PATH -c NAME {model}"
        )


def hold_model(session: Session, collection: CollectionInfo) -> None:
    """Makes sure that the collection still has this model, and keeps it so until the writing transaction ends.

    Raises FingerprintMismatch, CollectionNotFound.
    """
    # Locks the row where the database locks rows; SQLite lets one writer in at a time anyway.
    session.execute(select(CollectionRow.id).where(CollectionRow.id == collection.id).with_for_update())
    check_model(session, collection)


def check_model(session: Session, collection: CollectionInfo) -> None:
    """Makes sure that the collection has this model as the session sees it; raises as `hold_model` does."""
    if find_collection(session, collection.name).model_id != collection.model_id:
        raise FingerprintMismatch(
            f"collection {collection.name!r} was given another model than {collection.model_name} by another command "
            "meanwhile; what was recorded before stays: run the same command again, without --model"
        )


def pending_models(session: Session) -> dict[int, int]:
    """Models that collections are being changed to, by collection id: their embeddings are not to be dropped."""
    rows = session.scalars(select(SettingRow).where(SettingRow.key.startswith(_PENDING_MODEL)))
    return {int(row.key.removeprefix(_PENDING_MODEL)): row.value["model_id"] for row in rows}


def set_pending_model(session: Session, collection: CollectionInfo, model_id: int | None) -> None:
    """Notes the model that a collection is being changed to; None when that has ended."""
    key = f"{_PENDING_MODEL}{collection.id}"
    if model_id is not None:
        session.merge(SettingRow(key=key, value={"model_id": model_id}))
    elif (row := session.get(SettingRow, key)) is not None:
        session.delete(row)


def model_of(collection: CollectionInfo, models: Path | None = None) -> ModelSpec:
    """The spec of the model that a collection was built with.

    models: the home's folder of models, where weights are found again after the home has moved.
    Raises ModelNotFound, FingerprintMismatch.
    """
    config = collection.model_config
    weights_path = Path(config["weights_path"])
    if not weights_path.is_file() and models is not None and (models / weights_path.name).is_file():
        config = config | {"weights_path": str(models / weights_path.name)}
        weights_path = models / weights_path.name
    if collection.model_name == BUNDLED_VERSION:
        spec = resolve_model(collection.model_name, pooling=config["pooling"], input_size=config["input_size"])
    elif not weights_path.is_file() and re.fullmatch(rf"{BUNDLED}_v\d+", collection.model_name):
        raise ModelNotFound(
            f"collection {collection.name!r} was built with {collection.model_name}, and this version brings "
            f"{BUNDLED_VERSION}; run: dino-search reindex -c {shlex.quote(collection.name)} --model {BUNDLED}"
        )
    elif not weights_path.is_file():
        fetch = "" if os.sep in collection.model_name else f"fetch it: dino-search models get {collection.model_name}, "
        raise ModelNotFound(
            f"collection {collection.name!r} needs its model at {config['weights_path']}, found no such file; {fetch}"
            "put it back, or run: dino-search index PATH --model FILE with the same weights elsewhere"
        )
    else:
        spec = ModelSpec.from_config(collection.model_name, config)
    require_same_model(collection, spec)
    return spec


def generation_of(session: Session, collection: CollectionInfo) -> int:
    """The collection's generation as this session sees it."""
    return session.scalars(_GENERATION, {"collection_id": collection.id}).one()


def advance_generation(session: Session, collection: CollectionInfo) -> int:
    """The next generation, for the rows that this transaction changes."""
    row = session.get_one(CollectionRow, collection.id)
    row.generation += 1
    return row.generation


def count_images(session: Session, collection: CollectionInfo) -> dict[str, int]:
    """Number of images by status: `{"ok": …, "failed": …}`."""
    rows = session.execute(
        select(ImageRow.status, func.count()).where(ImageRow.collection_id == collection.id)
        .group_by(ImageRow.status)
    )  # fmt: skip
    return {"ok": 0, "failed": 0} | dict(rows.all())


def source_paths(session: Session, collection: CollectionInfo) -> dict[int, str]:
    """The folder of each of the collection's sources, by source id, as the operating system names it."""
    rows = session.execute(select(SourceRow.id, SourceRow.path).where(SourceRow.collection_id == collection.id))
    return {source_id: decode_path(path) for source_id, path in rows}


def join_path(source_path: str, portable_relative: str) -> str:
    """The absolute path or URL of an image row, as the operating system names it."""
    parts = decode_path(portable_relative).split("/")
    if is_url(source_path):
        return "/".join([source_path.rstrip("/"), *parts])
    return os.path.join(source_path, *parts)


def relative_path(path: str, source_path: str) -> str:
    """The portable path of what lies below its source, as an image row stores it."""
    separator = separator_of(source_path)
    if path == source_path:
        return "."
    return encode_path(path[len(source_path.rstrip(separator)) + 1 :].replace(separator, "/"))


def option_for(name: str) -> str:
    """What a command needs after it to mean this collection."""
    return "" if name == "default" else f" -c {name}"
